#include "incremental_prefill/plain/instance.cuh"

namespace sk::incremental_prefill {

template const PlainInstance* plain_instances<BFloat16>(int D);
template const PlainInstance* plain_instances<Float16>(int D);

}  // namespace sk::incremental_prefill
