"""What an audit looks at, and what it says: runs of an implementation, findings, their JSON.

An implementation is audited from outside. It is given a plan and the records of every site, and shows what a receiver
of the sums would see. Nothing here knows how it works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.plan import PrivacyPlan, Workload

ALPHA = 1e-5  # each check fails a correct program with at most this probability
Part = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Release:
    """One opened sum.

    Attributes:
        members: positions in the roster of the sites in the sum.
        values: ``(D,)`` the opened sum in the gradient's unit.
        applied: ``(D,)`` what the model was moved by, divided by the learning rate.
        shares: by position, ``(D,)`` what a site handed to the sum before anything was encrypted, noise included; of
            all members, or of as many as were kept.
    """

    members: tuple[int, ...]
    values: NDArray[np.float64]
    applied: NDArray[np.float64]
    shares: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Charge:
    """What one site's ledger says after a run.

    Attributes:
        steps: how many were charged.
        epsilon: what it counts for them at the plan's δ.
        prices: the different (sample rate, noise multiplier) in its rows.
    """

    steps: int
    epsilon: float
    prices: tuple[tuple[float, float], ...]


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
        """Carry out ``plan`` from its public start.

        Args:
            plan: momentum 0, and a learning rate that leaves the weights where they are (except in mode ``client``).
            parts: ``(X, y)`` of every site, in the roster's order.
            absent: for every round, the sites whose contribution never arrives.
            cap: of every site's ledger; None: what the plan needs.
        """
        ...

    def seats(self, records: int, rate: float, places: int) -> NDArray[np.int64]:
        """``(places,)`` which of so many records sits at each place of one step, -1 for none; drawn as a site does."""
        ...


class Reference(Protocol):
    """Clipped sums computed apart from the implementation, one record after the other, for a plan's own workload."""

    def workload(self, plan: PrivacyPlan) -> Workload:
        """The plan's network or statistics, where weights that only a file holds are replaced by public ones."""
        ...

    def records(self, plan: PrivacyPlan, each: Sequence[int]) -> list[Part]:
        """Made-up records that the plan's workload takes, so many at each site; copies of a few different ones."""
        ...

    def lengths(self, plan: PrivacyPlan, parts: Sequence[Part]) -> NDArray[np.float64]:
        """L2 norms of what a record (in mode ``client``: a site) adds before it is clipped."""
        ...

    def known(self, plan: PrivacyPlan, parts: Sequence[Part]) -> NDArray[np.float64]:
        """``(D,)``: the clipped sum over all records at the plan's public start, every record taking part."""
        ...


@dataclass(frozen=True)
class Examined:
    """Which path an examination went: the plan's own, and how the sites computed.

    Attributes:
        network: name of the network, or ``stats``.
        parameters: D.
        engine, precision: of the clipping at every site.
    """

    task: str
    mode: str
    sum: str
    reveal_to: str
    committee: int
    network: str
    parameters: int
    engine: str
    precision: str

    @classmethod
    def of(cls, plan: PrivacyPlan, engine: str, precision: str) -> Examined:
        """The path of ``plan``."""
        return cls(
            plan.task, plan.mode, plan.sum, plan.reveal_to, plan.committee, plan.model.name, plan.model.parameters,
            engine, precision,
        )  # fmt: skip

    @property
    def sentence(self) -> str:
        """The line a terminal shows."""
        who = " to the sites alone" if self.reveal_to == "sites" else ""
        some = f", committee of {self.committee}" if self.committee else ""
        return (
            f"examined: task {self.task}, mode {self.mode}, sum {self.sum}{who}{some}; {self.network} with D = "
            f"{self.parameters}; engine {self.engine}, {self.precision}"
        )


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
        examined: the path; None in results of the first suite, which looked at training on the slab alone.
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
    examined: Examined | None = None

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
            **({} if self.examined is None else {"examined": asdict(self.examined)}),
        }
