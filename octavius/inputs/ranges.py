"""Ranges of numbers in a configuration."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above` and `below` leave the end itself out; `also` are further allowed values."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return value in self.also or (low and high)

    def __str__(self) -> str:
        words = [f"{value:g}" for value in self.also]
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " or ".join([*words, " and ".join(parts) or "a finite number"])


def check_range(value: object, allowed: Range, where: str) -> None:
    """Raise ValueError unless a number lies in its range; errors begin with `where`.

    Raises:
        ValueError: it does not.
    """
    if value not in allowed:
        raise ValueError(f"{where}: must be {allowed}, got {value!r}")
