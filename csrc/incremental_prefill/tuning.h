// Overrides of the launch table, 0 for none: for measurements.
#pragma once

namespace sk::incremental_prefill {

struct Tuning {
  int rows = 0;      // of a tile
  int cluster = 0;   // blocks
  int smallest = 0;  // keys that are worth a block of their own
};

Tuning& tuning();

}  // namespace sk::incremental_prefill
