"""Shares of prompts that clips confirm, by attribute, and how two ways differ; 95 % intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_Z = 1.959964  # of a two-sided 95 % interval

Result = Mapping[str, bool]  # of one prompt: attribute -> whether the clip confirms it


@dataclass(frozen=True, slots=True)
class Share:
    """``right`` of ``asked``, with Wilson's interval."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.asked, self.value
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] of {self.asked}"


@dataclass(frozen=True, slots=True)
class Change:
    """Of ``asked`` prompts ``gained`` are confirmed in the second way alone, ``lost`` in the first.

    The interval is that of Bonett and Price for pairs: much narrower than two shares would say.
    """

    gained: int
    lost: int
    asked: int

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        n = self.asked + 2
        gained, lost = (self.gained + 1) / n, (self.lost + 1) / n
        middle = gained - lost
        half = _Z * math.sqrt((gained + lost - middle**2) / n)
        return max(-1.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:+.3f} [{low:+.3f}, {high:+.3f}] of {self.asked}"


def confirmed_shares(results: Iterable[Result]) -> dict[str, Share]:
    """Share of prompts confirmed by attribute. An attribute counts where a prompt asks for it."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for result in results:
        asked.update(result.keys())
        right.update(name for name, value in result.items() if value)
    return {name: Share(right[name], asked[name]) for name in asked}


def shares_by_kind(
    kinds: Iterable[str], results: Iterable[Result], attribute: str = "all"
) -> dict[str, Share]:
    """The share of ``attribute`` for each kind of scene."""
    rows = zip(kinds, results, strict=True)
    return confirmed_shares({kind: result[attribute]} for kind, result in rows)


def changes(first: Sequence[Result], second: Sequence[Result]) -> dict[str, Change]:
    """How a second way differs from the first on the same prompts, by attribute."""
    gained: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for before, after in zip(first, second, strict=True):
        for name in before.keys() & after.keys():
            asked[name] += 1
            gained[name] += after[name] and not before[name]
            lost[name] += before[name] and not after[name]
    return {name: Change(gained[name], lost[name], asked[name]) for name in asked}
