"""Home of visibility: which keys a query row sees, as a few key intervals per row, and the builders that say so.

Every method of the field is one attention with different data. `Spans` is that data, a builder per method makes it:

| builder | a query row sees |
|---|---|
| `causal`, `bottom_right` | keys up to itself; the last T rows of S keys |
| `sliding_window`, `sliding_window_by_position` | the last keys up to itself, by index or position, and sinks |
| `windowed_by_position`, `windowed_by_index` | of the keys of given spans, those inside a sliding window |
| `packed` | its own document up to itself |
| `wait_k`, `from_limits` | group streaming: what has been read when the row is computed, and the target up to itself |
| `interleaved`, `re_encoded` | the two older ways of streaming, for comparison |
| `vision`, `classes` | keys by rule: skipped, mass only, sent to a sink, only those kept |

Buffers of streaming rows are [source | target] per sample, the target right behind the sample's own source. Lengths
are sequences of ints: flat for one sample, nested for a batch; samples may differ in length and are padded at the
end. Builders run on the host; wrong input raises an error that names the argument. Nothing here reads a position,
except `sliding_window_by_position`, `windowed_by_position` and `window_begins`, which refuse positions that do not
increase.
"""

from __future__ import annotations

from .span_builders import (
    bottom_right,
    causal,
    packed,
    sliding_window,
    sliding_window_by_position,
    window_begins,
    window_begins_by_index,
)
from .span_schedules import (
    arrival_order,
    from_limits,
    interleaved,
    limits_from_visible,
    re_encoded,
    visible_segments,
    wait_k,
    wait_k_limits,
)
from .span_table import ATTEND, KEPT, MASS, SINK, SKIP, Rule, Spans
from .span_vision import classes, vision, vision_intervals
from .span_windows import windowed_by_index, windowed_by_position

__all__ = [
    "ATTEND",
    "KEPT",
    "MASS",
    "SINK",
    "SKIP",
    "Rule",
    "Spans",
    "arrival_order",
    "bottom_right",
    "causal",
    "classes",
    "from_limits",
    "interleaved",
    "limits_from_visible",
    "packed",
    "re_encoded",
    "sliding_window",
    "sliding_window_by_position",
    "vision",
    "vision_intervals",
    "visible_segments",
    "wait_k",
    "wait_k_limits",
    "window_begins",
    "window_begins_by_index",
    "windowed_by_index",
    "windowed_by_position",
]
