"""Reading and writing by turns: the session over a step protocol, its policies and its latency metrics.

No kernels and no Hugging Face in here: a model is anything with the methods of `StreamModel`.
"""

from . import metrics
from .batch import RowErrors, Sessions
from .policies import Action, Policy, ReadAll, State, Threshold, WaitK
from .protocols import BatchModel, Decoder, Step
from .session import Codec, Session, StreamModel
from .trace import Counts, End, Event, Read, Write

__all__ = [
    "Action",
    "BatchModel",
    "Codec",
    "Counts",
    "Decoder",
    "End",
    "Event",
    "Policy",
    "Read",
    "ReadAll",
    "RowErrors",
    "Session",
    "Sessions",
    "State",
    "Step",
    "StreamModel",
    "Threshold",
    "WaitK",
    "Write",
    "metrics",
]
