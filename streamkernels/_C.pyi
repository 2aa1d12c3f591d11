"""The CUDA extension: pointers, strides in elements, sizes, a device and a stream, all as ints. Call it through
`streamkernels.backends.cuda`, which knows tensors."""

__version__: str
architectures: str
toolkit: str

def unavailable_reason(device: int = -1) -> str: ...
def preload(device: int) -> None: ...
def capture_id(stream: int) -> int: ...
def incremental_prefill(words: bytes) -> None: ...
def incremental_prefill_workspace(
    B: int, H: int, HK: int, T: int, D: int, dtype: int, device: int
) -> tuple[int, int]: ...
def rotate_append(
    k: int,
    k_batch: int,
    k_head: int,
    k_row: int,
    v: int,
    v_batch: int,
    v_head: int,
    v_row: int,
    cos: int,
    cos_batch: int,
    cos_row: int,
    sin: int,
    sin_batch: int,
    sin_row: int,
    source_k: int,
    source_k_batch: int,
    source_k_head: int,
    source_k_row: int,
    source_v: int,
    source_v_batch: int,
    source_v_head: int,
    source_v_row: int,
    target_k: int,
    target_k_batch: int,
    target_k_head: int,
    target_k_row: int,
    target_v: int,
    target_v_batch: int,
    target_v_head: int,
    target_v_row: int,
    length: int,
    length_batch: int,
    length_segment: int,
    status: int,
    role: int,
    role_batch: int,
    role_row: int,
    B: int,
    HK: int,
    T: int,
    D: int,
    rotary_dim: int,
    source_capacity: int,
    target_capacity: int,
    segment: int,
    sinks: int,
    bounded: bool,
    interleaved: bool,
    dtype: int,
    angles_dtype: int,
    device: int,
    stream: int,
) -> None: ...
