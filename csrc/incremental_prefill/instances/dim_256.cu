#include "incremental_prefill/instance.cuh"

namespace sk::incremental_prefill {

template const Instance* instances<BFloat16, 256>();
template const Instance* instances<Float16, 256>();

}  // namespace sk::incremental_prefill
