"""`VisionPruning`: what each layer does with vision tokens, and where every default comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.shapes import check_int, check_number, refuse
from .scores import Probe

TEXT_RULES = ("attend", "skip", "mass", "sink", "mass_first_half")
VISION_RULES = ("attend", "skip", "mass", "sink")
SCORES = ("norm", "attention")
Score = str | Callable[[Probe], Tensor]
Stage = tuple[str, str]
OP = "VisionPruning"


@dataclass(frozen=True)
class VisionPruning:
    """Where vision tokens are scored and dropped. Layers count from 0. The default is the preset `fast`.

    Without `schedule` the layer and the number of tokens are found while the prompt runs, as VisiPruner does
    (arXiv 2510.17205, sections 3.6 and 4.3 to 4.4; code: `custom_modeling_llama.py` of EIT-NLP/VisiPruner). From
    `first_probe_layer` on, each layer asks for every vision token what the attention output of the prompt's last token
    would be without it. The first layer in which that output turns for some token filters: what contributes little is
    dropped before the next layer. From then on, layers in which no kept token turns the output are counted, and
    after `exit_count` of them the rest is dropped too. Each sample of a batch has its own layers.

    Attributes:
        shallow: the rules (text to vision, vision to vision) of the layers 0, 1, ..., as `pruned_attention` names
            them; later layers attend. They hold for prompt rows and the prompt's own vision keys. Default none: this
            stage saves about 2 % of a prefill's multiplications and costs accuracy (the paper's Table 8: 96 points of
            MME-P with text to vision masked in its layers 1 to 7).
        decode_sees_shallow: whether later tokens see the vision keys of those layers. The code masks only prompts
            of more than 611 tokens (True); the paper leaves those keys out (False).
        first_probe_layer: default 7, the first layer above the code's `shallow_mid_layer` of 6 (strictly above).
        layer_threshold: 0.995, the paper's number and `layer_threshold` of the code's scripts
            (`scripts/v1_5/visiPruner_eval`). A cosine below it filters.
        token_threshold: 0.2, likewise (`tokens_threshold`). Norms above it stay. An absolute number: a model with
            activations of another scale wants another one.
        exit_threshold: 0.999, a constant of the code (`custom_modeling_llama.py`, lines 560 to 568).
        exit_count: 2, the paper's "two consecutive layers" and the code's constant (line 1398).
        consecutive: whether those layers must follow one another, as the paper says, or add up (False), as the code
            does.
        schedule: {layer: tokens} fixes it instead: after `layer` so many of a sample's vision tokens are left, an int,
            or a float for that share of the prompt's, rounded down. In the manner of FastV (arXiv 2403.06764, K = 2
            and R = 50 %) {1: 0.5}, of PyramidDrop (arXiv 2410.17247) {8: 0.5, 16: 0.25, 24: 0.125}. The best by
            `score` stay, ties to the earlier; 0 drops all. A fixed schedule reads nothing from the device while the
            language model runs, so that it can be captured in a CUDA graph.
        score: of a schedule: "norm", the norm of a token's contribution (VisiPruner), "attention", its probability as
            the mean over heads (FastV), both for the last prompt token; or a function from a `Probe` to [B, K].
        positions: "kept": tokens keep the positions they had (VisiPruner and FastV). "renumbered": from the layer
            after a drop on, the prompt's remaining tokens stand at consecutive positions, and so do later tokens
            (PyramidDrop). Not for M-RoPE.
        compaction: True drops rows and keys. False computes all rows in all layers and keeps the cache whole: nothing
            of a prefill is saved, but nothing of an image is lost. Each prompt on the cache, also one without an image,
            selects anew among all vision tokens before it, and its text, and what is generated behind it, attends to
            those by their places (`KEPT` spans). Without shallow stages and with positions "kept" only.
        when_unprofitable: what to do if the committed costs of this device (`streamkernels/pruning/costs.py`) say that
            a prompt is faster without, as a short one is in eager mode, where launches on the host take the time:
            "warn" (and prune), "off" (run it dense), "ignore". Where there are no costs for the device, the report says
            so and pruning runs.

    Raises TypeError or ValueError, naming the attribute.
    """

    shallow: tuple[Stage, ...] = ()
    decode_sees_shallow: bool = True
    first_probe_layer: int = 7
    layer_threshold: float = 0.995
    token_threshold: float = 0.2
    exit_threshold: float = 0.999
    exit_count: int = 2
    consecutive: bool = False
    schedule: Mapping[int, int | float] | None = None
    score: Score = "norm"
    positions: str = "kept"
    compaction: bool = True
    when_unprofitable: str = "warn"
    name: str = field(default="fast", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shallow", _stages(self.shallow))
        check_int(OP, "first_probe_layer", self.first_probe_layer)
        check_int(OP, "exit_count", self.exit_count, minimum=1)
        for name in ("layer_threshold", "token_threshold", "exit_threshold"):
            check_number(OP, name, getattr(self, name))
        for name in ("decode_sees_shallow", "consecutive", "compaction"):
            if not isinstance(getattr(self, name), bool):
                refuse(OP, name, "a bool", getattr(self, name), TypeError)
        _one_of("positions", self.positions, ("kept", "renumbered"))
        _one_of("when_unprofitable", self.when_unprofitable, ("warn", "off", "ignore"))
        if not callable(self.score):
            _one_of("score", self.score, SCORES)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _schedule(self.schedule))
        elif self.score != "norm":
            refuse(OP, "score", "'norm', unless there is a schedule", self.score)
        first = self.first_probe_layer if self.schedule is None else min(self.schedule)
        if first < len(self.shallow):
            name = "first_probe_layer" if self.schedule is None else "schedule"
            refuse(OP, name, f"a layer of at least {len(self.shallow)}, behind the shallow ones", first)
        if not self.compaction and (self.shallow or self.positions != "kept"):
            refuse(OP, "compaction", "True, under shallow stages and renumbered positions", False)
        if not self.decode_sees_shallow and not self.shallow:
            refuse(OP, "decode_sees_shallow", "True, because there are no shallow layers", False)

    @classmethod
    def fast(cls, **options: Any) -> VisionPruning:
        """The default: no shallow stage, the code's middle and deep stages. `options` replace attributes."""
        return cls(**{"name": "fast", **options})

    @classmethod
    def reference_code(cls, size: str = "7B", **options: Any) -> VisionPruning:
        """What the released code does with "7B" or "13B" models (`custom_modeling_llama.py`, lines 687 to 719).

        Layer 0: the mass from text to vision goes to the first vision token and vision to vision is mass only (7B);
        or text to the first half of the vision tokens and vision to vision are mass only (13B). Layers 1 to 5: text
        to vision is mass only. Layer 6 is plain, layers from 7 on are probed, exits add up, later tokens see all keys
        of shallow layers. `options` replace attributes.
        """
        first = {"7B": ("sink", "mass"), "13B": ("mass_first_half", "mass")}
        if size not in first:
            refuse(OP, "size", "'7B' or '13B'", size)
        shallow = (first[size], *(("mass", "attend"),) * 5)
        return cls(**{"name": f"reference_code {size}", "shallow": shallow, **options})

    @classmethod
    def paper(cls, **options: Any) -> VisionPruning:
        """What the paper says (sections 3.6 and 4.3 to 4.4), over the six shallow layers of the code's scripts.

        Layer 0: text to vision merged into one vision token, no vision self-attention; layers 1 to 5: neither. Every
        layer after those is probed, exits are consecutive, later tokens do not see the vision keys of shallow layers.
        `options` replace attributes.
        """
        shallow = (("sink", "skip"), *(("skip", "skip"),) * 5)
        given = {"shallow": shallow, "first_probe_layer": 6, "consecutive": True, "decode_sees_shallow": False}
        return cls(**{"name": "paper", **given, **options})

    @classmethod
    def fixed(cls, schedule: Mapping[int, int | float], **options: Any) -> VisionPruning:
        """A fixed schedule {layer: tokens left after it}. `options` replace attributes."""
        return cls(**{"name": "fixed", "schedule": schedule, **options})

    def check_layers(self, op: str, layers: int) -> None:
        """Refuse what a model of so many layers cannot do: a drop needs a layer behind it."""
        if len(self.shallow) > layers:
            refuse(op, "config", f"at most {layers} shallow stages, the layers of the model", f"{len(self.shallow)}")
        late = [layer for layer in self.schedule or () if layer > layers - 2]
        if late:
            refuse(op, "config", f"a schedule of layers in [0, {layers - 2}]", f"layer {late[0]}")
        if self.schedule is None and self.first_probe_layer > layers - 2:
            got = f"{self.first_probe_layer}"
            refuse(op, "config", f"a first_probe_layer of at most {layers - 2} for a model of {layers} layers", got)

    @property
    def reads_layout(self) -> bool:
        """Whether the host must know how many tokens there are before the first layer runs."""
        return self.schedule is not None or bool(self.shallow)


def _one_of(name: str, x: object, allowed: tuple[str, ...]) -> None:
    if x not in allowed:
        refuse(OP, name, "one of " + ", ".join(repr(a) for a in allowed), x)


def _stages(stages: object) -> tuple[Stage, ...]:
    if not isinstance(stages, (tuple, list)):
        refuse(OP, "shallow", "a sequence of pairs (text to vision, vision to vision)", stages, TypeError)
    for n, stage in enumerate(stages):
        if not isinstance(stage, (tuple, list)) or len(stage) != 2:
            refuse(OP, f"shallow[{n}]", "a pair of rules (text to vision, vision to vision)", stage, TypeError)
        _one_of(f"shallow[{n}][0]", stage[0], TEXT_RULES)
        _one_of(f"shallow[{n}][1]", stage[1], VISION_RULES)
    return tuple((a, b) for a, b in stages)


def _schedule(given: object) -> dict[int, int | float]:
    if not isinstance(given, Mapping) or not given:
        refuse(OP, "schedule", "a mapping {layer: tokens} with an entry", given, TypeError)
    for layer, k in given.items():
        check_int(OP, "schedule", layer)
        name = f"schedule[{layer}]"
        if isinstance(k, bool) or not isinstance(k, (int, float)):
            refuse(OP, name, "an int (tokens) or a float (a share)", k, TypeError)
        if k < 0 or (isinstance(k, float) and not 0.0 <= k <= 1.0):
            refuse(OP, name, "an int >= 0 or a share in [0, 1]", k)
    return dict(sorted(given.items()))
