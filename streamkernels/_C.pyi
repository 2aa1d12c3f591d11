"""The CUDA extension: pointers, strides in elements, sizes, a device and a stream as ints, or tensors that it reads
itself. Call it through `streamkernels.backends.cuda`."""

__version__: str
architectures: str
toolkit: str

def unavailable_reason(device: int = -1) -> str: ...
def preload(device: int) -> None: ...
def capture_id(stream: int) -> int: ...

# whether tensors can be read by the functions that their class hands out; the next five need it
def read_tensors(exchange: object, tensor: type, parameter: type) -> bool: ...

# what tells calls apart: how many tensors (each of them or None), these, then options
def look(count: int, *arguments: object) -> bytes | None: ...

# `look`, and where each tensor lies within 16 bytes
def signature(count: int, *arguments: object) -> bytes | None: ...

# 20 tensors, then 11 numbers, in the order of csrc/incremental_prefill/bind.h
def incremental_prefill(*arguments: object) -> None: ...

# q, k, v, bounds, sink_logits or None, o, lse, tickets, then scale and stream
def span_attention_many(*arguments: object) -> None: ...

# a Triton kernel's launch: parameters (kind, tensor, bytes of a number), kinds "n" (a number), "p" (a tensor's address)
# and "m" (its map, which make_map(tensor's place, tensor) makes); then whether it was launched over other tensors
def make_relaunch(
    launch: int,
    function: int,
    grid: list[int],
    threads: int,
    shared: int,
    tensors: int,
    parameters: list[tuple[str, int, bytes]],
    make_map: object,
) -> object: ...
def relaunch(kernel: object, stream: int, *tensors: object) -> bool: ...
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

# addresses and strides in elements: (address, batch, head, row) and (address, batch, row)
_Rows = tuple[int, int, int, int]
_Table = tuple[int, int, int]

def token_scores(
    q: _Table,
    o: _Table,
    k: _Rows,
    v: _Rows,
    lse: _Table,
    index: _Table,
    count: _Table,
    cosine: int,
    norm: int,
    mass: int,
    B: int,
    H: int,
    HK: int,
    S: int,
    D: int,
    K: int,
    scale: float,
    softcap: float,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def select_tokens(
    scores: _Table,
    index: _Table,
    count: _Table,
    out: int,
    out_count: int,
    threshold: float,
    thresholded: bool,
    largest: bool,
    B: int,
    K: int,
    limit: int,
    width: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def compact(
    x: int,
    batch: int,
    outer: int,
    token: int,
    inner: int,
    column: int,
    y: int,
    index: _Table,
    count: _Table,
    B: int,
    O: int,
    S: int,
    I: int,
    C: int,
    K: int,
    size: int,
    device: int,
    stream: int,
) -> None: ...
def rotate(
    x: _Rows,
    y: _Rows,
    cos: _Table,
    sin: _Table,
    B: int,
    H: int,
    T: int,
    D: int,
    rotary_dim: int,
    interleaved: bool,
    dtype: int,
    angles_dtype: int,
    device: int,
    stream: int,
) -> None: ...
def reanchor(
    x: _Rows,
    cos: _Table,
    sin: _Table,
    B: int,
    HK: int,
    S: int,
    rotary_dim: int,
    interleaved: bool,
    dtype: int,
    angles_dtype: int,
    device: int,
    stream: int,
) -> None: ...
def span_attention_splits(
    q: _Rows,
    k: _Rows,
    v: _Rows,
    o: int,
    lse: int,
    bounds: int,
    sink_key: _Table,
    kept: _Rows,
    kept_count: _Table,
    sink_logits: int,
    sink_logits_fp32: bool,
    B: int,
    H: int,
    HK: int,
    T: int,
    S: int,
    D: int,
    N: int,
    K: int,
    rules: tuple[int, ...],
    scale: float,
    softcap: float,
    dtype: int,
    device: int,
) -> int: ...
def span_attention(
    q: _Rows,
    k: _Rows,
    v: _Rows,
    o: int,
    lse: int,
    bounds: int,
    sink_key: _Table,
    kept: _Rows,
    kept_count: _Table,
    sink_logits: int,
    sink_logits_fp32: bool,
    B: int,
    H: int,
    HK: int,
    T: int,
    S: int,
    D: int,
    N: int,
    K: int,
    rules: tuple[int, ...],
    scale: float,
    softcap: float,
    dtype: int,
    device: int,
    room: int,
    splits: int,
    stream: int,
) -> None: ...
def span_attention_many_here(device: int) -> bool: ...
