#include "incremental_prefill/instance.cuh"

namespace sk::incremental_prefill {

template const Instance* instances<BFloat16, 64>();
template const Instance* instances<Float16, 64>();

}  // namespace sk::incremental_prefill
