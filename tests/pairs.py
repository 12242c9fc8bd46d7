"""All-pairs test cases: every two levels of different factors meet in some case, without every combination."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Possible = Callable[[Case], bool]


def all_pairs(factors: Mapping[str, Sequence[Any]], possible: Possible = lambda case: True) -> list[Case]:
    """Cases in which every two levels that may meet do; the same ones each time.

    possible: whether a case, or a part of one with some of the factors, may occur.
    """
    draw = random.Random(0)
    missing = possible_meetings(factors, possible)
    cases = []
    while missing:
        wanted = dict(min(missing, key=repr))
        candidates = []
        while len(candidates) < 60:
            case = {name: wanted[name] if name in wanted else draw.choice(levels) for name, levels in factors.items()}
            if possible(case):
                candidates.append(case)
        best = max(candidates, key=lambda case: len(missing & meetings(case)))
        missing -= meetings(best)
        cases.append(best)
    return cases


def possible_meetings(factors: Mapping[str, Sequence[Any]], possible: Possible = lambda case: True) -> set[Any]:
    """All pairs of (factor, level) that may occur together."""
    levels = [[(name, level) for level in levels] for name, levels in factors.items()]
    pairs = {pair for a, b in itertools.combinations(levels, 2) for pair in itertools.product(a, b)}
    return {pair for pair in pairs if possible(dict(pair))}


def meetings(case: Case) -> set[Any]:
    """The pairs of (factor, level) in a case."""
    return set(itertools.combinations(case.items(), 2))
