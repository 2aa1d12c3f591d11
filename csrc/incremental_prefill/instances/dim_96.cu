#include "incremental_prefill/instance.cuh"

namespace sk::incremental_prefill {

template const Instance* instances<BFloat16, 96>();
template const Instance* instances<Float16, 96>();

}  // namespace sk::incremental_prefill
