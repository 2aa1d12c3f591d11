"""A few patterns over single letters, matched together and online: what is complete, and what could still grow.

Patterns know letters, `( )`, `|`, and `?` or `+` after a letter or a group. Python's `re` cannot say whether a text
could still become a match; this can, and that is all it is for.
"""

from __future__ import annotations


class Automaton:
    """Follows all phrases at once, one letter at a time. States are numbers, made when first met.

    phrases: kind -> pattern; where two kinds match the same letters the earlier wins. `start` is the first state,
    `kind[state]` the phrase that is complete there (None if none is), `grows[state]` whether any letter leads further.
    Construction: Thompson, Regular expression search algorithm (CACM 1968), with the subsets cached.
    """

    def __init__(self, phrases: dict[str, str]) -> None:
        self._steps: list[list[tuple[str, int]]] = []
        self._free: list[list[int]] = []
        self._kinds: dict[int, str] = {}
        self._rank = {kind: i for i, kind in enumerate(phrases)}
        first = self._state()
        for kind, text in phrases.items():
            begin, end, rest = self._either(text)
            if rest:
                raise ValueError(f"Automaton: phrases: expected balanced parentheses, got {text!r}")
            self._free[first].append(begin)
            self._kinds[end] = kind
        self._sets: dict[frozenset[int], int] = {}
        self._members: list[frozenset[int]] = []
        self._next: list[dict[str, int]] = []
        self.kind: list[str | None] = []
        self.grows: list[bool] = []
        self.start = self._known(self._closure({first}))

    def _state(self) -> int:
        self._steps.append([])
        self._free.append([])
        return len(self._free) - 1

    def _either(self, text: str) -> tuple[int, int, str]:
        begin, end = self._state(), self._state()
        while True:
            b, e, text = self._chain(text)
            self._free[begin].append(b)
            self._free[e].append(end)
            if not text.startswith("|"):
                return begin, end, text
            text = text[1:]

    def _chain(self, text: str) -> tuple[int, int, str]:
        begin = end = self._state()
        while text and text[0] not in "|)":
            if text[0] == "(":
                b, e, text = self._either(text[1:])
            else:
                b, e = self._state(), self._state()
                self._steps[b].append((text[0], e))
            text = text[1:]
            if text[:1] == "?":
                self._free[b].append(e)
            elif text[:1] == "+":
                self._free[e].append(b)
            text = text[1:] if text[:1] in ("?", "+") else text
            self._free[end].append(b)
            end = e
        return begin, end, text

    def _closure(self, states: set[int]) -> frozenset[int]:
        todo, seen = list(states), set(states)
        while todo:
            for state in self._free[todo.pop()]:
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        return frozenset(seen)

    def _known(self, states: frozenset[int]) -> int:
        if states not in self._sets:
            self._sets[states] = len(self._next)
            self._members.append(states)
            self._next.append({})
            kinds = sorted((self._kinds[s] for s in states if s in self._kinds), key=self._rank.__getitem__)
            self.kind.append(kinds[0] if kinds else None)
            self.grows.append(any(self._steps[s] for s in states))
        return self._sets[states]

    def step(self, state: int, letter: str) -> int | None:
        """The state after one more letter, None if no phrase goes on with it."""
        if letter not in self._next[state]:
            reached = {end for s in self._members[state] for symbol, end in self._steps[s] if symbol == letter}
            self._next[state][letter] = self._known(self._closure(reached)) if reached else -1
        after = self._next[state][letter]
        return None if after < 0 else after
