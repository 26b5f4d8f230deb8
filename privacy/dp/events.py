"""What a release costs, as data: the closed table of privacy events.

A ledger row names an event by one of the names below and its numbers; nothing else is ever turned into an
accountant's input (``dp_accounting.DpEvent.from_named_tuple`` imports modules by name and is never used).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedveil.common.errors import VerificationError

SGM = "sampled-gaussian"
_MAX_NOISE = 1e9
MAX_OVERFLOW = 1e-2  # as the largest δ
MIN_SAMPLE_RATE = 2.0**-48  # one record among the most that a plan may declare; accountants divide by it
# The maker of a plan and the verifier of its report both refuse what is beyond these, before any accountant is asked.
# Below this noise calibration ends. Above this loss a distribution takes gigabytes. Nothing with an epsilon up to 400
# comes near either.
MIN_NOISE_MULTIPLIER, MAX_LOSS = 0.2, 3000.0


@dataclass(frozen=True)
class SampledGaussian:
    """One step of the Poisson-sampled Gaussian mechanism, SGM(q, σ), under add-or-remove-one adjacency.

    Attributes:
        sample_rate: q in [2^-48, 1]; each record enters a step independently with this probability.
        noise_multiplier: σ > 0, the noise's standard deviation divided by the L2 sensitivity.
        overflow: the chance that the sample of the others outgrows the step's places, of which the accountants know
            nothing else: they take it off δ. (It depends on the others' coins alone; given that it does not happen,
            the step is SGM(q, σ).)
    """

    sample_rate: float
    noise_multiplier: float
    overflow: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.overflow <= MAX_OVERFLOW:
            raise VerificationError(f"an overflow of {self.overflow!r} is not in [0, {MAX_OVERFLOW:g}]")
        if not MIN_SAMPLE_RATE <= self.sample_rate <= 1:
            raise VerificationError(f"sample rate {self.sample_rate!r} is not in [2^-48, 1]")
        if not 0 < self.noise_multiplier <= _MAX_NOISE:
            raise VerificationError(f"noise multiplier {self.noise_multiplier!r} is not in (0, 1e9]")

    @property
    def loss(self) -> float:
        """A bound of the expected privacy loss of one step, in closed form; ``inf`` where that overflows.

        The smaller of q / (2 σ²), by convexity, and the Rényi divergence of order 2. Times the steps, it says how wide
        a loss distribution becomes, and so how costly it is to compute.
        """
        q, square = self.sample_rate, self.noise_multiplier * self.noise_multiplier
        if square < 1 / 700:
            return q / 2 / square if square > 0 else math.inf
        return min(q / 2 / square, math.log1p(q * q * math.expm1(1 / square)))

    def to_json(self) -> dict[str, Any]:
        """The form a ledger row carries."""
        own = {"event": SGM, "sample_rate": self.sample_rate, "noise_multiplier": self.noise_multiplier}
        return own | ({"overflow": self.overflow} if self.overflow else {})


def from_json(value: Any) -> SampledGaussian:
    """Parse a ledger row's event; an unknown name or a missing number is a :class:`VerificationError`."""
    names = {"event", "sample_rate", "noise_multiplier"}
    if not isinstance(value, dict) or value.get("event") != SGM or set(value) - {"overflow"} != names:
        raise VerificationError("a privacy event that is not in the table")
    q, sigma, overflow = value["sample_rate"], value["noise_multiplier"], value.get("overflow", 0.0)
    if any(type(x) not in (int, float) for x in (q, sigma, overflow)):
        raise VerificationError("a privacy event without its numbers")
    if not (MIN_SAMPLE_RATE <= q <= 1 and 0 < sigma <= _MAX_NOISE and 0 <= overflow <= MAX_OVERFLOW):
        raise VerificationError("a privacy event whose numbers are out of bounds")
    return SampledGaussian(float(q), float(sigma), float(overflow))
