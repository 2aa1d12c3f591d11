"""The presets say what their sources say, and nothing else is accepted."""

from __future__ import annotations

import dataclasses

import pytest

from streamkernels import VisionPruning


def test_the_default_is_fast():
    assert VisionPruning() == VisionPruning.fast()
    config = VisionPruning()
    assert (config.layer_threshold, config.token_threshold, config.exit_threshold) == (0.995, 0.2, 0.999)
    assert (config.first_probe_layer, config.exit_count, config.consecutive, config.shallow) == (7, 2, False, ())


def test_the_reference_code():
    config = VisionPruning.reference_code("7B")
    assert config.shallow == (("sink", "mass"), *(("mass", "attend"),) * 5)
    assert config.first_probe_layer == 7 and not config.consecutive and config.decode_sees_shallow
    other = VisionPruning.reference_code("13B", exit_count=3)
    assert other.shallow[0] == ("mass_first_half", "mass") and other.shallow[1:] == config.shallow[1:]
    assert other.exit_count == 3


def test_the_paper():
    config = VisionPruning.paper()
    assert config.shallow == (("sink", "skip"), *(("skip", "skip"),) * 5)
    assert config.first_probe_layer == 6 and config.consecutive and not config.decode_sees_shallow


def test_schedules_are_sorted():
    assert list(VisionPruning.fixed({4: 1, 2: 0.5}).schedule) == [2, 4]


WRONG = [
    (dict(schedule={}), TypeError, "schedule: expected a mapping"),
    (dict(schedule={1: 1.5}), ValueError, r"schedule\[1\]: expected an int >= 0 or a share in \[0, 1\], got 1.5"),
    (dict(schedule={1: "a"}), TypeError, r"schedule\[1\]: expected an int \(tokens\)"),
    (dict(schedule={-1: 2}), ValueError, "schedule: expected an int >= 0"),
    (dict(score="attention"), ValueError, "score: expected 'norm', unless there is a schedule"),
    (dict(score="mean", schedule={1: 1}), ValueError, "score: expected one of 'norm', 'attention'"),
    (dict(shallow=(("sink", "kept"),)), ValueError, r"shallow\[0\]\[1\]: expected one of"),
    (dict(shallow=("skip",)), TypeError, r"shallow\[0\]: expected a pair of rules"),
    (dict(shallow=(("skip", "skip"),) * 3, first_probe_layer=2), ValueError, "expected a layer of at least 3"),
    (dict(shallow=(("skip", "skip"),) * 3, schedule={1: 4}), ValueError, "expected a layer of at least 3"),
    (dict(decode_sees_shallow=False), ValueError, "decode_sees_shallow: expected True"),
    (dict(exit_count=0), ValueError, "exit_count: expected an int >= 1"),
    (dict(layer_threshold="high"), TypeError, "layer_threshold: expected a number"),
    (dict(token_threshold=float("nan")), ValueError, "token_threshold: expected a finite number"),
    (dict(positions="gone"), ValueError, "positions: expected one of 'kept', 'renumbered'"),
    (dict(when_unprofitable="no"), ValueError, "when_unprofitable: expected one of"),
    (dict(consecutive=1), TypeError, "consecutive: expected a bool"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG)
def test_wrong_options(options, error, text):
    with pytest.raises(error, match=f"VisionPruning: {text}|VisionPruning: .*{text}"):
        VisionPruning(**options)
    with pytest.raises(ValueError, match="'7B' or '13B'"):
        VisionPruning.reference_code("70B")


def test_a_config_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VisionPruning().exit_count = 3
