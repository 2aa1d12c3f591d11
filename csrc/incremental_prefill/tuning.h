// Overrides of the launch table, 0 for none: for measurements.
#pragma once

namespace sk::incremental_prefill {

struct Tuning {
  int rows = 0;      // of a tile
  int cluster = 0;   // blocks
  int smallest = 0;  // keys that are worth a block of their own
  int keep = 0;      // 1: keys like anything else in the L2
  int plain = 0;     // blocks of a cluster for plain sessions; -1: the general kernel
  int parts = 0;     // clusters that share an item of a plain session
  int patience = 0;  // 1 + cycles that blocks of a plain session wait for others
  int begin = 0;     // 1 + steps that beginning an item counts for
};

Tuning& tuning();

}  // namespace sk::incremental_prefill
