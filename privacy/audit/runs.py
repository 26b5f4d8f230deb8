"""Runs of an implementation, put together: a plan of statistics releases one sum, and an examination needs several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.common.errors import RunAborted
from fedveil.privacy.audit.evidence import Implementation, Part, Release, Run
from fedveil.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Runs:
    """Complete runs of one plan."""

    plan: PrivacyPlan
    runs: tuple[Run, ...]

    @property
    def releases(self) -> tuple[Release, ...]:
        """All sums, in order."""
        return tuple(r for run in self.runs for r in run.releases)


def carry_out(
    implementation: Implementation, plan: PrivacyPlan, parts: Sequence[Part], absent: Sequence[frozenset[int]]
) -> Runs:
    """As many sums as ``absent`` has entries, by runs of all the plan's steps.

    Raises:
        RunAborted: fewer were released.
    """
    runs: list[Run] = []
    for first in range(0, len(absent), plan.steps):
        run = implementation.run(plan, parts, absent=absent[first : first + plan.steps])
        if len(run.releases) != plan.steps:
            raise RunAborted(
                f"{len(run.releases)} of {plan.steps} sums were released ({run.status})", hint="see the run's own log"
            )
        runs.append(run)
    return Runs(plan, tuple(runs))
