"""Which cached keys later rows see, against a bool per key."""

from __future__ import annotations

import pytest
import torch

from streamkernels import Spans, spans
from streamkernels.core.spans import KEPT
from streamkernels.pruning.keys import Block, Keys, behind
from streamkernels.pruning.stages import Rows

B, HK = 2, 2


def counts(*n):
    return torch.tensor(n, dtype=torch.int32)


def live_of(blocks):
    """bool [B, width]: the keys that mean something and are not hidden."""
    out = []
    for block in blocks:
        own = torch.arange(block.width) < (block.width if block.count is None else block.count[:, None])
        own = own.expand(B, -1)
        out.append(own if block.hidden is None else own & ~block.hidden)
    return torch.cat([torch.zeros(B, 0, dtype=torch.bool), *out], 1)


HIDDEN = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
CASES = {
    "nothing": (),
    "whole": (Block(5),),
    "ragged": (Block(5, counts(3, 5)),),
    "mixed": (Block(4), Block(5, counts(0, 2)), Block(2), Block(3), Block(4, counts(4, 1)), Block(1)),
    "many": (Block(1), *(Block(2, counts(n % 3, 1)) for n in range(9)), Block(2)),
    "hidden": (Block(2), Block(4, counts(4, 2), HIDDEN), Block(1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("generated", [0, 3])
def test_a_generated_token_sees_what_is_live(name, generated):
    keys = Keys(CASES[name])
    S = keys.width + generated + 1
    seen = keys.spans(torch.full((1, 1), S, dtype=torch.int32), None, B, HK).validate(S).visible(S)
    expected = torch.cat([live_of(keys.blocks), torch.ones(B, generated + 1, dtype=torch.bool)], 1)
    assert seen[:, :, 0].equal(expected[:, None].expand(-1, seen.shape[1], -1))
    assert (KEPT in keys.spans(torch.ones(1, 1, dtype=torch.int32), None, B, HK).rules) == (name in ("many", "hidden"))


@pytest.mark.parametrize("name", CASES)
def test_the_rows_of_a_prompt_see_it_and_themselves(name):
    keys, own = Keys(CASES[name]), torch.arange(4)[None] < counts(4, 2)[:, None]
    end = torch.arange(1, 5, dtype=torch.int32)[None] + keys.width
    seen = keys.spans(end, own, B, HK).validate(keys.width + 4).visible(keys.width + 6)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    for b in range(B):
        expected = torch.cat([live_of(keys.blocks)[b].expand(4, -1), causal, torch.zeros(4, 2, dtype=torch.bool)], 1)
        assert (seen[b, 0] == expected & own[b, :, None]).all()


def test_generated_keys_become_a_block_and_may_be_cropped():
    keys = Keys((Block(3, counts(1, 3)), Block(2)))
    assert keys.and_open(5) is keys and keys.and_open(9).blocks == (*keys.blocks, Block(4))
    assert keys.and_open(9).and_open(6).blocks[1:] == (Block(2), Block(1))
    assert keys.and_open(9).and_open(4).blocks == (keys.blocks[0], Block(1))
    assert keys.and_open(9).and_open(3).blocks == keys.blocks[:1]
    with pytest.raises(ValueError, match="at least the 5 keys of the prompts .* cropped to 2"):
        keys.and_open(2)


def test_rows_become_a_block():
    vision = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    whole = Rows.all(vision)
    assert Keys().and_rows(whole).blocks == (Block(4),)
    assert Keys().and_rows(whole, guesses=1).blocks == (Block(3),)
    less = whole.keep(torch.tensor([[0, 1, 3], [2, 3, -1]], dtype=torch.int32), counts(3, 2))
    block = Keys().and_rows(less, hide_vision=True).blocks[0]
    assert block.width == 3 and block.count.tolist() == [3, 2]
    assert block.hidden.tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("many", [False, True], ids=["slots", "classes"])
def test_shallow_stages_behind_earlier_keys(name, many):
    """The rules hold among the prompt's own rows; what came before is seen by all of them."""
    keys, T = Keys(CASES[name]), 12
    rows = (12, 7)
    drawn = ("101010101010" if many else "011100011000", "010000011111")
    mask = torch.tensor([[c == "1" for c in row] for row in drawn])
    mask[1, 7:] = False
    alone = spans.vision(list(rows), mask, text_to_vision=spans.SINK, vision_to_vision=spans.SKIP)
    S = keys.width + T + 2
    made = behind(keys, alone, rows, S, HK)
    assert isinstance(made, Spans) and (made.key_class is not None) == many
    seen, goes = made.visible(S), made.destination(S)
    own_seen, own_goes = alone.visible(T), alone.destination(T)
    for b in range(B):
        past = live_of(keys.blocks)[b].expand(T, -1) & (torch.arange(T) < rows[b])[:, None]
        expected = torch.cat([past, own_seen[b, 0], torch.zeros(T, 2, dtype=torch.bool)], 1)
        for h in range(seen.shape[1]):
            assert (seen[b, h] == expected).all()
            at = torch.where(own_goes[b, 0] >= 0, own_goes[b, 0] + keys.width, -1)
            before = torch.where(past, torch.arange(keys.width), -1)
            assert (goes[b, h, :, : keys.width] == before).all()
            assert (goes[b, h, :, keys.width : keys.width + T] == at).all()
