"""Where the worlds of the property tests take their choices from: hypothesis, which shrinks them, or a seed.

One generator serves both: the laws draw from hypothesis, and whoever wants thousands of worlds quickly, or the same
few for ever, takes seeds. The first and the lowest choice is always the calmest one, because that is where shrinking
goes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import strategies as st

__all__ = ["Chance", "Drawn", "Seeded"]

T = TypeVar("T")


class Chance:
    """Choices from integers; a subclass says where these come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        raise NotImplementedError

    def one_of(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def happens(self, percent: int) -> bool:
        """True so often; shrinks to False."""
        return self.integer(0, 99) >= 100 - percent

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in some order; shrinks to their own."""
        rest = list(options)
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(len(rest))]


class Drawn(Chance):
    """Choices of hypothesis."""

    def __init__(self, draw: Callable[[st.SearchStrategy[int]], int]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return low if low == high else self._draw(st.integers(low, high))


class Seeded(Chance):
    """Choices of a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)
