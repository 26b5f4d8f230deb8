"""A lower bound on ε from a single run (Steinke, Nasr & Jagielski 2023; Mahloujifar, Melis & Chaudhuri 2024).

m canaries each enter the run by the toss of a coin. Afterwards each gets a score; for the highest ``in_`` scores the
auditor guesses that they took part, for the lowest ``out`` that they did not, and abstains from the rest. A mechanism
that is (ε, δ)-DP cannot let too many guesses be right. Three readings of the same guesses:

* :func:`pvalue_dp`, Steinke et al., Theorem 5.2: no assumption beyond (ε, δ)-DP.
* :func:`rejects` with :func:`approximate_dp`: Mahloujifar et al., Algorithm 3, for the trade-off function of
  (ε, δ)-DP: no assumption either, usually tighter.
* :func:`rejects` with :func:`gaussian`: for a family of Gaussian trade-off functions. Exact for a mechanism that is a
  composition of unsampled Gaussians; the bound is then close to ε. For sampled ones it speaks of that family only.

Every bound holds with the stated confidence for any scores and any mechanism. The number of guesses may be chosen after
the scores were seen, because the bound is corrected for a fixed list of choices (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from fedveil.common.errors import UsageError
from fedveil.privacy.dp.accounting import gaussian_epsilon
from fedveil.privacy.dp.events import SampledGaussian

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
POWER = 0.9
_MOST = 64.0
_FAR = 400.0  # a claim that no number of guesses refutes
Method = Literal["dp", "f-dp", "gaussian"]
Inverse = Callable[[float], float]


@dataclass(frozen=True)
class Guesses:
    """What an auditor guessed: of ``canaries`` coins, ``made`` guesses, ``right`` of them right."""

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.canaries < 1:
            raise UsageError(f"{self.right} of {self.made} guesses about {self.canaries} canaries cannot be")


@dataclass(frozen=True)
class OneRun:
    """The result of an audit.

    Attributes:
        bound: ε is above it with ``confidence``, at ``delta``; 0 says nothing.
        method: how the guesses were read.
        guesses: the choice that gave the bound.
        claimed: ε at ``delta`` that the plan claims.
        detects: the largest factor on the noise, below 1, at which an audit like this one refutes the claim with a
            probability of :data:`POWER`; 0 if there is none. None in results that were made without it.
    """

    bound: float
    confidence: float
    delta: float
    method: Method
    guesses: Guesses
    claimed: float
    detects: float | None = None

    @property
    def passed(self) -> bool:
        """The evidence does not exceed the claim."""
        return self.bound <= self.claimed

    @property
    def sentence(self) -> str:
        """The line a report shows."""
        said = f"no evidence above ε ≥ {self.bound:.3g}" if self.passed else f"evidence that ε ≥ {self.bound:.3g}"
        return f"{said} (confidence {self.confidence:.0%}, δ = {self.delta:g}) against claimed {self.claimed:.4g}"

    @property
    def smallest_fault(self) -> str:
        """The smallest fault that the audit finds, in words."""
        if not self.detects:
            return f"no loss of noise, however large, is found {POWER:.0%} of the time: more canaries"
        return f"noise x{self.detects:.3g} of what is claimed, found {POWER:.0%} of the time"

    def to_json(self) -> dict[str, Any]:
        """The form that results are written in."""
        g = self.guesses
        return {
            "v": 1,
            "epsilon_lower_bound": self.bound,
            "confidence": self.confidence,
            "delta": self.delta,
            "method": self.method,
            "canaries": g.canaries,
            "guesses": g.made,
            "right": g.right,
            "claimed_epsilon": self.claimed,
            "passed": self.passed,
            "sentence": self.sentence,
            **({} if self.detects is None else {"detects_noise_factor": self.detects}),
        }


def pvalue_dp(g: Guesses, epsilon: float, delta: float) -> float:
    """Bound on the chance of so many right guesses about an (ε, δ)-DP mechanism (Steinke et al. 2023, Theorem 5.2).

    At δ = 0 the number of right guesses is dominated by Binomial(made, e^ε / (1 + e^ε)).
    """
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(g.right - 1, g.made, right))
    if delta == 0 or g.right == 0:
        return tail
    i = np.arange(1, g.right + 1)
    between = stats.binom.cdf(g.right - 1, g.made, right) - stats.binom.cdf(g.right - 1 - i, g.made, right)
    return min(1.0, tail + 2 * g.canaries * delta * float(np.max(between / i)))


def gaussian(mu: float) -> Inverse:
    """How likely an event at least is without a record, if it has a likelihood with it, under μ-GDP."""
    return lambda y: float(special.ndtr(special.ndtri(y) - mu))


def approximate_dp(epsilon: float, delta: float) -> Inverse:
    """The same under (ε, δ)-DP."""
    grow = math.exp(epsilon)
    return lambda y: max(0.0, (y - delta) / grow, 1 - delta - grow * (1 - y))


def rejects(g: Guesses, least: Inverse, alpha: float) -> bool:
    """Whether the guesses contradict a trade-off function (Mahloujifar et al. 2024, Algorithm 3, two outcomes).

    Args:
        least: see :func:`gaussian`.
        alpha: chance of rejecting a true one, at most.

    Given that ``right`` or more right guesses have the probability alpha, the recursion goes through each number i of
    right guesses. It bounds from below the weight that any mechanism with this trade-off must put on fewer. If all the
    weight needed exceeds what there is, no such mechanism exists.
    """
    wrong = alpha * (g.made - g.right) / g.canaries
    correct = alpha * g.right / g.canaries
    for i in range(g.right - 1, -1, -1):
        more = max(wrong, least(min(1.0, correct)))
        if more == wrong:
            break  # neither can change any more
        correct = min(1.0, correct + i / (g.made - i) * (more - wrong))
        wrong = more
    return correct + wrong > g.made / g.canaries


def lower_bound(g: Guesses, delta: float, alpha: float, method: Method = "f-dp") -> float:
    """The largest ε that the guesses contradict at ``delta``; 0 if they contradict none."""
    if method == "gaussian":
        mu = _largest(lambda m: rejects(g, gaussian(m), alpha))
        return gaussian_epsilon(mu, delta) if mu > 0 else 0.0
    if method == "f-dp":
        return _largest(lambda e: rejects(g, approximate_dp(e, delta), alpha))
    return _largest(lambda e: pvalue_dp(g, e, delta) <= alpha)


def sizes(canaries: int) -> list[int]:
    """How many canaries are guessed on either side, in each of the choices that are made about so many."""
    return sorted({k for share in SHARES if 1 <= (k := int(canaries * share)) <= canaries // 2})


def corrected(g: Guesses, delta: float, confidence: float, method: Method) -> float:
    """:func:`lower_bound`, corrected so that ``confidence`` holds although the best of all choices is taken."""
    return lower_bound(g, delta, (1 - confidence) / len(sizes(g.canaries)), method)


def _largest(contradicted: Callable[[float], bool]) -> float:
    if not contradicted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while contradicted(high):
        low, high = high, 2 * high
        if high > _MOST:
            return low
    for _ in range(40):
        mid = (low + high) / 2
        low, high = (mid, high) if contradicted(mid) else (low, mid)
    return low


def guess(scores: NDArray[np.float64], included: NDArray[np.bool_], in_: int, out: int) -> Guesses:
    """Guess "in" for the ``in_`` highest scores and "out" for the ``out`` lowest."""
    order = np.argsort(-scores, kind="stable")
    right = int(included[order[:in_]].sum()) + int((~included[order[len(order) - out :]]).sum())
    return Guesses(len(scores), in_ + out, right)


def audit(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    *,
    claimed: float,
    delta: float,
    confidence: float = 0.95,
    method: Method = "f-dp",
) -> OneRun:
    """The best bound over the fixed list :data:`SHARES` of how many canaries are guessed, corrected for the choice.

    Args:
        scores: ``(m,)``, higher for canaries that seem to have taken part; they may depend on everything released.
        included: ``(m,)`` the coins; fair, independent, unknown to whoever made the scores.
        claimed: ε at ``delta``.

    Raises:
        UsageError: fewer than ten canaries, or shapes that differ.
    """
    m = len(scores)
    if m < 10 or scores.shape != included.shape or scores.ndim != 1:
        raise UsageError("an audit needs at least ten canaries, and one coin for each score")
    if not (np.isfinite(scores).all() and 0 < confidence < 1 and 0 <= delta < 1):
        raise UsageError("scores must be finite, the confidence in (0, 1), delta in [0, 1)")
    tried = [guess(scores, included, k, k) for k in sizes(m)]
    bounds = [corrected(g, delta, confidence, method) for g in tried]
    best = int(np.argmax(bounds))
    return OneRun(bounds[best], confidence, delta, method, tried[best], claimed)


def detectable(
    canaries: int, event: SampledGaussian, steps: int, claimed: float, delta: float, confidence: float, method: Method
) -> float:
    """The largest factor on the noise, below 1, at which :func:`audit` refutes ``claimed`` with :data:`POWER`.

    A canary's score is normal: with it, of mean S·q and variance S·(σ² + q(1-q)); without it, of mean 0 and variance
    S·σ². Guesses are taken as independent. 0 if not even a thousandth of the noise would show.

    Args:
        event: q and σ that are claimed.
        steps: S, the number of sums.
    """
    if claimed > _FAR:
        return 0.0
    alpha = (1 - confidence) / len(sizes(canaries))
    mu = _mu(claimed, delta) if method == "gaussian" else 0.0

    def refuted(factor: float) -> bool:
        for k in sizes(canaries):
            right = int(stats.binom.ppf(1 - POWER, 2 * k, _accuracy(k / canaries, event, steps, factor)))
            g = Guesses(canaries, 2 * k, right)
            if method == "dp":
                found = pvalue_dp(g, claimed, delta) <= alpha
            else:
                found = rejects(g, gaussian(mu) if method == "gaussian" else approximate_dp(claimed, delta), alpha)
            if found:
                return True
        return False

    low, high = math.log(1e-3), 0.0
    if not refuted(math.exp(low)):
        return 0.0
    for _ in range(12):
        mid = (low + high) / 2
        low, high = (mid, high) if refuted(math.exp(mid)) else (low, mid)
    return math.exp(low)


def _mu(epsilon: float, delta: float) -> float:
    """μ of the Gaussian mechanism that costs ε at δ."""
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) < epsilon:
        low, high = high, 2 * high
    for _ in range(60):
        mid = (low + high) / 2
        low, high = (mid, high) if gaussian_epsilon(mid, delta) < epsilon else (low, mid)
    return high


def _accuracy(share: float, event: SampledGaussian, steps: int, factor: float) -> float:
    """How likely a guess is right that takes the highest ``share`` of the scores for canaries that took part."""
    q, out = event.sample_rate, math.sqrt(steps) * event.noise_multiplier * factor
    mean, with_it = steps * q, math.hypot(out, math.sqrt(steps * q * (1 - q)))
    low, high = -40 * out, mean + 40 * with_it
    for _ in range(80):
        t = (low + high) / 2
        above = float(special.ndtr(-t / out) + special.ndtr((mean - t) / with_it)) / 2
        low, high = (t, high) if above > share else (low, t)
    return min(1.0, float(special.ndtr((mean - low) / with_it)) / 2 / share)
