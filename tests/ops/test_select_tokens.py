"""`select_tokens` and VisiPruner's two decisions against Python's own sort and loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from streamkernels.backends.select import explain
from streamkernels.ops.select_tokens import select_tokens, visipruner_exit, visipruner_select
from streamkernels.ops.token_scores import TokenScores, token_scores

torch.set_num_threads(1)
NAN = float("nan")


def ints(x: list) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


def by_loops(row: list[float], count: int, threshold: float | None, limit: int, largest: bool) -> list[int]:
    sign = 1 if largest else -1
    entries = [i for i, x in enumerate(row[:count]) if not math.isnan(x)]
    if threshold is not None:
        entries = [i for i in entries if sign * row[i] > sign * threshold]
    return sorted(sorted(entries, key=lambda i: (-sign * row[i], i))[:limit])


@pytest.mark.parametrize("seed", range(60))
def test_against_loops(seed: int) -> None:
    draw = random.Random(seed)
    B, K = draw.randint(1, 3), draw.choice([0, 1, 5, 17, 63])
    dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    # few different values: ties everywhere, infinities and NaN among them
    values = [0.0, -0.0, 0.25, 0.5, 1.0, -1.0, math.inf, -math.inf, NAN]
    scores = torch.tensor([[draw.choice(values) for _ in range(K)] for _ in range(B)], dtype=dtype).view(B, K)
    scores = torch.cat([scores, torch.full((B, 3), NAN, dtype=dtype)], 1)[:, :K]
    count = ints([draw.randint(0, K) for _ in range(B)]) if draw.random() < 0.6 else None
    names = torch.randperm(100)[:K].sort().values.int().repeat(B, 1) if draw.random() < 0.5 else None
    threshold = draw.choice([0.0, 0.25, -2.0]) if draw.random() < 0.5 else None
    k = None if threshold is not None else draw.choice([0, 1, 4, 63, 99])
    max_keep = draw.choice([None, 0, 2, 70])
    largest = draw.random() < 0.7
    index, kept = select_tokens(
        scores, threshold=threshold, k=k, max_keep=max_keep, largest=largest, index=names, count=count
    )
    width = max_keep if max_keep is not None else k if k is not None else K
    assert index.shape == (B, width) and index.dtype == kept.dtype == torch.int32
    for b in range(B):
        limit = min(width, K if k is None else k)
        own = by_loops(scores[b].tolist(), K if count is None else int(count[b]), threshold, limit, largest)
        assert int(kept[b]) == len(own)
        own = own if names is None else names[b, own].tolist()
        assert index[b].tolist() == own + [-1] * (width - len(own))


def test_ties_go_to_the_lower_entry() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]])
    assert select_tokens(scores, k=2)[0].tolist() == [[1, 2]]
    assert select_tokens(scores, k=4)[0].tolist() == [[1, 2, 3, 4]]
    assert select_tokens(scores, k=2, largest=False)[0].tolist() == [[0, 3]]
    assert select_tokens(torch.ones(1, 1000), k=3)[0].tolist() == [[0, 1, 2]]
    # a threshold with a list too short for all keeps the best, in order
    index, count = select_tokens(scores, threshold=1.5, max_keep=2)
    assert index.tolist() == [[1, 2]] and count.tolist() == [2]


def test_the_threshold_is_strict_and_in_the_dtype_of_the_scores() -> None:
    at = torch.tensor([[0.2]])
    above = torch.nextafter(at, torch.ones(1, 1))
    assert select_tokens(torch.cat([at, above], 1), threshold=0.2)[0].tolist() == [[1, -1]]
    assert select_tokens(torch.cat([above, at], 1), threshold=float(above), largest=False)[0].tolist() == [[1, -1]]


def test_nothing_and_everything_kept() -> None:
    scores = torch.rand(2, 17)
    index, count = select_tokens(scores, threshold=2.0)
    assert bool((index == -1).all()) and count.tolist() == [0, 0]
    index, count = select_tokens(scores, threshold=-1.0)
    assert index.tolist() == [list(range(17))] * 2 and count.tolist() == [17, 17]
    assert select_tokens(scores, k=0)[0].shape == (2, 0)


def test_no_gradient_and_nothing_mutated() -> None:
    scores = torch.rand(2, 5, requires_grad=True)
    before = scores.detach().clone()
    index, _ = select_tokens(scores, k=2)
    assert not index.requires_grad and torch.equal(scores.detach(), before)


@pytest.mark.parametrize(
    "arguments",
    [(None, None, 0.3, 7, 7, True), (ints([[3, 4, 5, 6, 7, 8, 9]] * 2), ints([7, 2]), None, 2, 5, False)],
)
def test_registration(arguments: tuple) -> None:
    torch.library.opcheck(torch.ops.streamkernels.select_tokens, (torch.rand(2, 7), *arguments, "reference"))


def test_compile_with_dynamic_lengths() -> None:
    def call(scores: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        triple = (scores, scores, scores)
        chosen = visipruner_select(triple, layer_threshold=0.5, count=count)
        return *select_tokens(scores, k=3, count=count), *chosen, visipruner_exit(triple, count=count)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for K in (5, 9, 17):
        scores, count = torch.rand(2, K), ints([K, 2])
        for x, y in zip(compiled(scores, count), call(scores, count), strict=True):
            assert torch.equal(x, y)


def test_visipruner_by_hand() -> None:
    cosine = torch.tensor([[1.0, 0.99, 1.0], [0.995, 1.0, 0.999], [0.1, NAN, 1.0], [NAN, 1.0, 1.0]])
    norm = torch.tensor([[0.3, 0.1, 0.2], [9.0, 0.0, NAN], [0.0, 0.1, 0.1], [0.0, 0.0, 0.0]])
    found, index, count = visipruner_select((cosine, norm, norm), index=ints([[40, 41, 42]] * 4))
    # 0.2 is not over 0.2; 0.995 is not below it; NaN finds nothing; a filter layer may keep nothing
    assert found.tolist() == [True, False, True, False]
    assert index.tolist() == [[40, -1, -1], [40, 41, 42], [-1, -1, -1], [40, 41, 42]]
    assert count.tolist() == [1, 3, 0, 3]
    # only the first `count` entries take part
    found, index, count = visipruner_select((cosine, norm, norm), count=ints([1, 2, 0, 3]))
    assert found.tolist() == [False, False, False, False]
    assert index.tolist() == [[0, -1, -1], [0, 1, -1], [-1, -1, -1], [0, 1, 2]] and count.tolist() == [1, 2, 0, 3]
    assert visipruner_exit((cosine, norm, norm)).tolist() == [False, False, False, False]
    assert visipruner_exit((cosine, norm, norm), count=ints([1, 0, 0, 1])).tolist() == [True, True, True, False]
    assert visipruner_exit((cosine, norm, norm), exit_threshold=0.99).tolist() == [True, True, False, False]


def test_visipruner_from_scores() -> None:
    # key 2 alone points away from the rest: it is found, and kept for its norm
    torch.manual_seed(0)
    k, v = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    v[0, 0, :, 0], v[0, 0, 2, 1] = 0.1, 5.0
    q = torch.zeros(1, 2, 1, 8)
    lse = torch.full((1, 2, 1), math.log(4))
    o = v.mean(2, keepdim=True).expand(1, 2, 1, 8)
    index = ints([[1, 2, 3, 77]])
    scores = token_scores(q, k, v, o, lse, index, ints([3]))
    assert isinstance(scores, TokenScores)
    found, kept, count = visipruner_select(scores, index=index, count=ints([3]))
    assert found.tolist() == [True] and kept.tolist() == [[2, -1, -1, -1]] and count.tolist() == [1]
    assert visipruner_exit(scores, count=ints([3])).tolist() == [False]
    # what token_scores reports for entries that do not count changes nothing even without the count
    found, kept, _ = visipruner_select(scores, index=index)
    assert found.tolist() == [True] and kept.tolist() == [[2, -1, -1, -1]]


S = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, "threshold: expected exactly one of threshold and k, got none", lambda: select_tokens(S)),
        (ValueError, "k: expected exactly one .*, got both", lambda: select_tokens(S, threshold=0.1, k=1)),
        (ValueError, "k: expected an int >= 0", lambda: select_tokens(S, k=-1)),
        (TypeError, "k: expected an int", lambda: select_tokens(S, k=1.5)),
        (TypeError, "k: expected an int", lambda: select_tokens(S, k=torch.tensor(1))),
        (TypeError, "threshold: expected a number", lambda: select_tokens(S, threshold=torch.tensor(0.1))),
        (ValueError, "threshold: expected a finite number", lambda: select_tokens(S, threshold=NAN)),
        (ValueError, "max_keep", lambda: select_tokens(S, k=1, max_keep=-1)),
        (TypeError, "largest", lambda: select_tokens(S, k=1, largest="yes")),
        (ValueError, "scores: expected shape", lambda: select_tokens(S[0], k=1)),
        (TypeError, "scores: expected float16", lambda: select_tokens(S.int(), k=1)),
        (TypeError, "index: expected int32", lambda: select_tokens(S, k=1, index=S.long())),
        (ValueError, "index: expected shape", lambda: select_tokens(S, k=1, index=ints([[1], [2]]))),
        (ValueError, "count: expected shape", lambda: select_tokens(S, k=1, count=ints([1]))),
        (ValueError, "backend", lambda: select_tokens(S, k=1, backend="fast")),
        (NotImplementedError, "backend='triton'", lambda: select_tokens(S, k=1, backend="triton")),
        (TypeError, "visipruner_select: scores", lambda: visipruner_select(S)),
        (ValueError, r"visipruner_select: scores\[1\]", lambda: visipruner_select((S, S[:, :2], S))),
        (TypeError, "visipruner_select: layer_threshold", lambda: visipruner_select((S, S, S), layer_threshold=None)),
        (ValueError, "visipruner_select: token_threshold", lambda: visipruner_select((S, S, S), token_threshold=NAN)),
        (ValueError, "visipruner_exit: count", lambda: visipruner_exit((S, S, S), count=ints([1]))),
        (TypeError, "visipruner_exit: exit_threshold", lambda: visipruner_exit((S, S, S), exit_threshold="0.9")),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], text: str, call) -> None:
    with pytest.raises(error, match=text):
        call()


def test_explain() -> None:
    assert explain(select_tokens, S, k=1).backend == "reference"
