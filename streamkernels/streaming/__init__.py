"""Reading and writing by turns: the session over a step protocol, its policies and its latency metrics.

No kernels and no Hugging Face in here: a model is anything with the methods of `StreamModel`.
"""

from . import metrics
from .policies import Action, Policy, ReadAll, State, Threshold, WaitK
from .session import Codec, Session, StreamModel
from .trace import Counts, End, Event, Read, Write

__all__ = [
    "Action",
    "Codec",
    "Counts",
    "End",
    "Event",
    "Policy",
    "Read",
    "ReadAll",
    "Session",
    "State",
    "StreamModel",
    "Threshold",
    "WaitK",
    "Write",
    "metrics",
]
