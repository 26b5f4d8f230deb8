"""Learning-rate schedules as tables: a plan holds numbers, so that every machine takes the same step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedveil.common.errors import PlanError
from fedveil.common.settings import MAX_SCHEDULE, Schedule, ScheduleName

_LEAST = 0.01  # of the rate, at the end


def table(schedule: ScheduleName | Sequence[Sequence[float]], steps: int) -> Schedule:
    """The pairs (step, factor) of a schedule over so many steps: at most :data:`MAX_SCHEDULE` of them.

    Args:
        schedule: ``constant``; ``linear`` or ``cosine``, from 1 down to a hundredth; or the pairs themselves.

    Raises:
        PlanError: unknown, or no such pairs.
    """
    if schedule == "constant":
        return ()
    if isinstance(schedule, str):
        if schedule not in ("linear", "cosine"):
            raise PlanError(f"unknown schedule {schedule[:64]!r}", hint="constant, linear, cosine, or [[step, factor]]")
        parts = min(MAX_SCHEDULE, steps)
        return tuple((1 + steps * k // parts, _factor(schedule, k, parts)) for k in range(parts))
    try:
        pairs = tuple((int(step), float(factor)) for step, factor in schedule)
        if all(step == whole for (step, _), (whole, _) in zip(schedule, pairs, strict=True)):
            return pairs
    except (TypeError, ValueError, OverflowError):
        pass
    raise PlanError("a schedule is a list of pairs [step, factor]", hint="for example [[1, 1.0], [40, 0.1]]")


def problem(schedule: Schedule, steps: int) -> str:
    """What is wrong with a plan's table; empty if nothing is."""
    firsts = [first for first, _ in schedule]
    if firsts != sorted(set(firsts)) or not all(1 <= first <= steps for first in firsts):
        return f"a schedule's steps rise from 1 to at most {steps}"
    if not all(0 < factor <= 1000 for _, factor in schedule):
        return "a schedule's factors are above 0 and at most 1000"
    return ""


def _factor(name: str, k: int, parts: int) -> float:
    done = k / parts
    left = 1 - done if name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return round(max(_LEAST, left), 6)
