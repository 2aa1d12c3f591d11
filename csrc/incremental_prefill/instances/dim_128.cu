#include "incremental_prefill/instance.cuh"

namespace sk::incremental_prefill {

template const Instance* instances<BFloat16, 128>();
template const Instance* instances<Float16, 128>();

}  // namespace sk::incremental_prefill
