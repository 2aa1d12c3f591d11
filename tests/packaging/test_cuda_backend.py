"""What the CUDA backend says of a call it cannot run: one sentence, without a GPU and without the extension."""

from __future__ import annotations

import pytest
import torch

from streamkernels import _ext
from streamkernels.backends import cuda, cuda_span_attention, triton
from streamkernels.backends.select import Call, choose

GPU = torch.device("cuda", 0)


def call(
    op: str = "rotate_append", device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16, D: int = 64
) -> Call:
    return Call(op, device, dtype, {"D": D})


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "unavailable", lambda device=-1: None)
    monkeypatch.setattr(cuda_span_attention, "_has_many", lambda index: False)


def test_reasons(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.reason(call()) is None
    for other, words in [
        (call(op="prepare"), "no CUDA kernel for prepare yet"),
        (call(op="span_attention", D=80), "64, 96, 128 or 256, not 80"),
        (call(op="span_attention", dtype=torch.float32), "not float32"),
        (call(op="token_scores", D=264), "not 264"),
        (Call("token_scores", GPU, torch.float16, {"D": 256, "H": 128}), "no room at H = 128"),
        (call(dtype=torch.float64), "not float64"),
        (call(device=torch.device("cpu")), "the tensors are on cpu"),
        (call(D=12), "a multiple of 8, at most 256, not 12"),
        (call(D=264), "not 264"),
    ]:
        why = cuda.reason(other)
        assert why is not None and words in why and "\n" not in why
        with pytest.raises(NotImplementedError, match="cannot run this call"):
            choose(other, "cuda")
    monkeypatch.setattr(_ext, "unavailable", lambda device=-1: "no NVIDIA driver is installed")
    assert cuda.reason(call()) == "no NVIDIA driver is installed"


def spans(T: int, *features: str, D: int = 64, N: int = 2, **sizes: int) -> Call:
    return Call("span_attention", GPU, torch.float16, {"D": D, "T": T, "N": N, **sizes}, frozenset(features))


def test_few_and_many_rows(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_span_attention, "_has_many", lambda index: True)
    monkeypatch.setattr(triton, "_missing", lambda: None)

    def say(*arguments, **sizes) -> str | None:
        return cuda.reason(spans(*arguments, **sizes))

    assert say(64, N=8) is None and say(1, "kept", "mass", "sink", "softcap", "sink_logits", D=96) is None
    assert say(65) is None and say(9999, "sink_logits", "backward", D=128) is None
    assert choose(spans(9999, S=9999), "auto") == choose(spans(64), "auto") == "cuda"
    for why, words in [
        (say(65, "softcap"), "with more than 64 query rows the CUDA kernel has no softcap"),
        (say(65, "kept"), "no KEPT"),
        (say(65, D=256), "64 or 128, not 256"),
        (say(65, N=4), "at most 2 slots"),
        (say(1, "backward"), "no backward"),
        (say(1, "classes"), "no class table"),
        (say(65, "scale"), "scale > 0"),
    ]:
        assert why is not None and words in why
    monkeypatch.setattr(triton, "_missing", lambda: "triton is not installed")
    assert "its gradient is Triton's" in str(say(65, "backward"))
    assert choose(spans(100), "auto") == choose(spans(100), "cuda") == "cuda"
    assert choose(spans(9999, "backward"), "auto") == "reference"
    monkeypatch.setattr(cuda_span_attention, "_has_many", lambda index: False)
    assert "at most 64 query rows but on Hopper" in str(say(65)) and say(64) is None


def test_auto_takes_many_rows_of_many_keys(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_span_attention, "_has_many", lambda index: True)
    monkeypatch.setattr(triton, "_missing", lambda: None)
    for B, H, T, S, chosen in [
        (1, 28, 65, 65, "triton"), (1, 28, 512, 512, "triton"), (1, 8, 1024, 1024, "triton"), (1, 28, 65, 9400, "cuda"),
        (8, 28, 512, 512, "cuda"), (1, 28, 1024, 1024, "cuda"), (1, 8, 2048, 2048, "cuda"), (1, 28, 64, 64, "cuda"),
    ]:  # fmt: skip
        assert choose(spans(T, B=B, H=H, HK=4, S=S, D=128), "auto") == chosen, (B, H, T, S)


def test_features_of_other_ops(ready: None) -> None:
    bits = Call("compact", GPU, torch.int64)
    assert cuda.reason(bits) is None
    assert "gradient" in str(cuda.reason(Call("compact", GPU, torch.float32, {}, frozenset({"backward"}))))


# sessions and rows: 7 to 14 query rows of a key head are few; more are left to Triton, but for many sessions
STEPS = ((1, 2), (7, 3), (8, 3), (1, 600))


def test_auto_takes_what_was_measured_to_be_faster(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Call("token_scores", GPU, torch.float16, {"D": 64, "K": 576})
    few, many = (Call("select_tokens", GPU, torch.float32, {"K": K}, frozenset({"threshold"})) for K in (576, 46080))
    best = Call("select_tokens", GPU, torch.float32, {"K": 46080}, frozenset({"k"}))
    monkeypatch.setattr(triton, "_missing", lambda: None)
    calls = (scores, few, many, best, Call("rotate_append", GPU, torch.float16, {"D": 64}))
    assert [choose(call, "auto") for call in calls] == ["triton", "cuda", "cuda", "cuda", "cuda"]
    heads = {"D": 128, "H": 28, "HK": 4}
    steps = [Call("incremental_prefill", GPU, torch.bfloat16, {**heads, "B": B, "T": T}) for B, T in STEPS]
    assert [choose(call, "auto") for call in steps] == ["cuda", "triton", "cuda", "triton"]
    assert choose(scores, "cuda") == "cuda"
    monkeypatch.setattr(triton, "_missing", lambda: "triton is not installed")
    assert choose(scores, "auto") == "cuda"


@pytest.mark.parametrize(
    ("B", "K", "H", "HK", "faster"),
    [
        (1, 576, 28, 4, "cuda"), (1, 46080, 28, 4, "cuda"), (1, 576, 12, 2, "triton"), (2, 576, 12, 2, "cuda"),
        (1, 64, 32, 32, "triton"), (1, 5760, 32, 32, "cuda"), (1, 11520, 32, 32, "triton"), (20, 576, 32, 32, "triton"),
    ],
)  # fmt: skip
def test_auto_scores_few_keys_and_many_unshared_ones_by_triton(
    ready: None, monkeypatch: pytest.MonkeyPatch, B: int, K: int, H: int, HK: int, faster: str
) -> None:
    monkeypatch.setattr(triton, "_missing", lambda: None)
    sizes = {"B": B, "K": K, "H": H, "HK": HK, "D": 128}
    assert choose(Call("token_scores", GPU, torch.float16, sizes), "auto") == faster
    assert choose(Call("token_scores", GPU, torch.float32, sizes), "auto") == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_auto_takes_the_kernel_for_plain_sessions_where_it_runs(
    ready: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(triton, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def chosen(B: int = 1, T: int = 32, D: int = 128, *features: str) -> str:
        sizes = {"D": D, "H": 28, "HK": 4, "B": B, "T": T}
        return choose(Call("incremental_prefill", GPU, torch.bfloat16, sizes, frozenset(features)), "auto")

    hopper = "cuda" if capability == (9, 0) else "triton"
    assert [chosen(), chosen(1, 64), chosen(1, 32, 256), chosen(1, 32, 64, "softcap", "sinks")] == [hopper] * 4
    general = [chosen(2), chosen(1, 65), chosen(1, 32, 96)]
    general += [chosen(1, 32, 128, name) for name in ("roles", "limits", "begins", "bounded")]
    assert general == ["triton"] * 7


@pytest.mark.parametrize("op", ["span_attention", "token_scores", "select_tokens", "compact", "rotate", "reanchor"])
def test_every_choice_can_be_traced(op: str) -> None:
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def chosen(x: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        return x + 1, cuda.reason(Call(op, GPU, x.dtype, {"D": 64, "T": x.shape[0]}))

    for T in (2, 70, 71):
        _, why = chosen(torch.zeros(T, 64, dtype=torch.float16))
        assert why == cuda.reason(Call(op, GPU, torch.float16, {"D": 64, "T": T}))


@pytest.mark.parametrize("op", ["rotate_append", "incremental_prefill", "span_attention", "token_scores", "rotate"])
def test_what_auto_takes_can_be_traced(op: str, ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def chosen(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, choose(Call(op, GPU, x.dtype, {"D": 64, "T": x.shape[0], "B": 1}), "auto")

    for T in (2, 70, 71, 600):
        _, backend = chosen(torch.zeros(T, 64, dtype=torch.float16))
        assert backend == choose(Call(op, GPU, torch.float16, {"D": 64, "T": T, "B": 1}), "auto")
        cuda_takes = {"rotate_append": True, "rotate": True, "incremental_prefill": T <= 16, "span_attention": T <= 64}
        assert backend == ("cuda" if cuda_takes.get(op, False) else "triton")


def test_the_choice_is_a_constant_to_torch_compile() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        return x + 1, cuda.reason(Call("rotate_append", GPU, x.dtype, {"D": x.shape[-1]}))

    x = torch.zeros(2, 64)
    _, why = chosen(x)
    assert why == cuda.reason(Call("rotate_append", GPU, x.dtype, {"D": 64}))


def test_errors_carry_the_code_of_cuda() -> None:
    error = _ext.CudaError("rotate_append: CUDA error 700 at or before this launch", 700)
    assert isinstance(error, RuntimeError) and error.code == 700 and "700" in str(error)


def test_loading_says_why_it_cannot() -> None:
    if _ext._find()[0] is not None:
        pytest.skip("the extension is here")
    with pytest.raises(NotImplementedError, match="CUDA extension"):
        _ext.load()
    assert _ext.cuda_status() == f"CUDA kernels not available: {_ext.unavailable()}"
