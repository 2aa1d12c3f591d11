"""What launches need besides their outputs and leave as it was, kept from call to call."""

from __future__ import annotations

from typing import Generic, TypeVar

Kept = TypeVar("Kept")
Key = tuple[int, int, int]


class Held(Generic[Kept]):
    """One thing per (device, stream, capture), so that no other launch can be using it: one per stream, and one per
    stream of a graph capture, made by the graph itself, since a graph may run beside anything."""

    def __init__(self) -> None:
        self.things: dict[Key, Kept] = {}

    def get(self, key: Key) -> Kept | None:
        return self.things.get(key)

    def keep(self, key: Key, thing: Kept) -> Kept:
        for other in [other for other in self.things if other[:2] == key[:2] and other[2] not in (0, key[2])]:
            # of a capture that has ended: its graph keeps the memory
            del self.things[other]
        self.things[key] = thing
        return thing
