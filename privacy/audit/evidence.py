"""What an audit looks at, and what it says: runs of an implementation, findings, their JSON.

An implementation is audited from outside. It is given a plan and the records of every site, and shows what a receiver
of the sums would see. Nothing here knows how it works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.plan import PrivacyPlan

ALPHA = 1e-5  # each check fails a correct program with at most this probability
Part = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Release:
    """One opened sum.

    Attributes:
        members: positions in the roster of the sites in the sum.
        values: ``(D,)`` the opened sum in the gradient's unit.
        applied: ``(D,)`` what the model was moved by, divided by the learning rate.
    """

    members: tuple[int, ...]
    values: NDArray[np.float64]
    applied: NDArray[np.float64]


@dataclass(frozen=True)
class Charge:
    """What one site's ledger says after a run: steps charged, and the ε it counts for them at the plan's δ."""

    steps: int
    epsilon: float


@dataclass(frozen=True)
class Run:
    """What an implementation showed of one run; ``charges`` by the site's position in the roster."""

    releases: tuple[Release, ...]
    status: str
    charges: Mapping[int, Charge]


class Implementation(Protocol):
    """Any program that carries out privacy plans."""

    def run(
        self, plan: PrivacyPlan, parts: Sequence[Part], *, absent: Sequence[frozenset[int]], cap: float | None = None
    ) -> Run:
        """Carry out ``plan`` from weights of zero.

        Args:
            plan: a logistic model; momentum 0.
            parts: ``(X, y)`` of every site, in the roster's order.
            absent: for every round, the sites whose contribution never arrives.
            cap: of every site's ledger; None: what the plan needs.
        """
        ...


@dataclass(frozen=True)
class Finding:
    """One named check.

    Attributes:
        name: stable; a failure is reported under it.
        asks: what was compared with what.
        p_value: how likely a correct program shows this or worse; 0 or 1 for a check without chance.
        alpha: the check fails below it.
        measured, expected: the number looked at.
        interval: of ``measured``, at the examination's confidence, where one is defined.
        samples: how many numbers the check rests on.
        detects: the smallest fault that it finds, in words.
    """

    name: str
    asks: str
    p_value: float
    alpha: float
    measured: float
    expected: float
    samples: int
    detects: str = ""
    interval: tuple[float, float] | None = None

    @property
    def passed(self) -> bool:
        """The data do not speak against the claim."""
        return self.p_value >= self.alpha

    def to_json(self) -> dict[str, Any]:
        """The form that results are written in."""
        return {
            "name": self.name,
            "asks": self.asks,
            "passed": self.passed,
            "p_value": self.p_value,
            "alpha": self.alpha,
            "measured": self.measured,
            "expected": self.expected,
            "interval": None if self.interval is None else list(self.interval),
            "samples": self.samples,
            "detects": self.detects,
        }


@dataclass(frozen=True)
class Conformance:
    """The result of an examination.

    Attributes:
        plan_hash: the plan whose mechanism was examined.
        claimed: its noise multiplier.
        measured, low, high: the noise multiplier of what was released, with its confidence interval.
        sum: how the shares were added.
    """

    plan_hash: str
    sum: str
    claimed: float
    measured: float
    low: float
    high: float
    confidence: float
    samples: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(f.passed for f in self.findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(f.name for f in self.findings if not f.passed)

    @property
    def sentence(self) -> str:
        """The line a report shows."""
        return (
            f"measured noise multiplier {self.measured:.4g} [{self.low:.4g}, {self.high:.4g}] "
            f"against claimed {self.claimed:.4g}"
        )

    def to_json(self) -> dict[str, Any]:
        """The form that results are written in (canonical JSON takes it)."""
        return {
            "v": 1,
            "plan_hash": self.plan_hash,
            "sum": self.sum,
            "claimed_noise_multiplier": self.claimed,
            "measured_noise_multiplier": self.measured,
            "interval": [self.low, self.high],
            "confidence": self.confidence,
            "samples": self.samples,
            "passed": self.passed,
            "failed": list(self.failed),
            "findings": [f.to_json() for f in self.findings],
            "sentence": self.sentence,
        }
