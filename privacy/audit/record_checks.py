"""Is every record clipped, sampled and counted as the plan claims? Checks on sums over the slab's records."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedveil.privacy.audit.evidence import Finding, Release, Run
from fedveil.privacy.audit.noise_checks import POWER, mean, two_sided, weakest
from fedveil.privacy.audit.runs import Runs
from fedveil.privacy.audit.slab import Slab, noise_std, price, residuals, spread
from fedveil.privacy.dp.accounting import epsilon_pld, gaussian_epsilon
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.plan import PrivacyPlan

OFF = 1e-6  # how far the model's move may lie from the sum, in the sum's standard deviations
CHEAP = 1e-6  # how far a price may lie below that of the plan's raw numbers
LOOSE = 0.01  # how far PLD's discretisation may lie above what a ledger counts


def clipping(plan: PrivacyPlan, slab: Slab, releases: tuple[Release, ...], alpha: float, confidence: float) -> Finding:
    """With q = 1: the norm of one record's contribution against C, over all records and by group; two-sided."""
    scores, counts = np.sum([slab.scores(r) for r in releases], axis=0), slab.units * len(releases)
    noise = math.sqrt(sum(spread(plan, len(r.members)) ** 2 for r in releases))
    off = np.abs(scores - counts) / noise
    std = noise * math.sqrt(counts.size) / float(counts.sum())
    norm = float(scores.sum() / counts.sum())
    p = min(2 * float(stats.norm.sf(abs(norm - 1) / std)), 2 * float(stats.norm.sf(off.max())) * off.size)
    half = float(stats.norm.isf((1 - confidence) / 2)) * std
    least = float(stats.norm.isf(alpha / 4) + stats.norm.ppf(POWER)) * std
    return Finding(
        "clip: norm of a record", "norm of one record's contribution against C, over all and by group", min(1.0, 2 * p),
        alpha, norm * plan.clip, plan.clip, int(counts.sum()), f"contributions of {1 + least:.3f} C",
        ((norm - half) * plan.clip, (norm + half) * plan.clip),
    )  # fmt: skip


def clipped_sum(plan: PrivacyPlan, slab: Slab, releases: tuple[Release, ...], alpha: float) -> Finding:
    """With q = 1: every coordinate of the sums against the known clipped sum; clipping by layer shows in the bias."""
    return mean(residuals(plan, releases, slab.known(slab.units)), alpha, "clip: whole gradient")


def sampling_rate(plan: PrivacyPlan, slab: Slab, releases: tuple[Release, ...], alpha: float) -> Finding:
    """How many records entered, in all and by site, against Binomial(n, q): an exact test.

    What is seen is the count plus Gaussian noise of known variance; the test convolves the two distributions.
    """
    q, rounds = plan.sample_rate, len(releases)
    noise = float(np.mean([spread(plan, len(r.members)) ** 2 for r in releases]))
    seen = np.sum([slab.scores(r) for r in releases], axis=0)
    by_site, trials = seen.sum(1), slab.units.sum(1) * rounds
    added = noise * rounds * slab.units.shape[1]
    each = [_noisy_binomial(t, int(n), q, added) for t, n in zip(by_site, trials, strict=True)]
    whole = _noisy_binomial(float(seen.sum()), int(trials.sum()), q, added * len(each))
    n = int(trials.sum())
    std = math.sqrt(n * q * (1 - q) + added * len(each)) / n
    least = float((stats.norm.isf(alpha / 4) + stats.norm.ppf(POWER)) * std)
    half = float(stats.norm.isf(0.025)) * std
    rate = float(seen.sum()) / n
    return Finding(
        "sampling: rate", "share of the records that entered a round against q (binomial)",
        min(1.0, 2 * min(whole, len(each) * min(each))), alpha, rate, q, n, f"a rate off by {least:.2g}",
        (rate - half, rate + half),
    )  # fmt: skip


def _noisy_binomial(seen: float, trials: int, q: float, noise: float) -> float:
    """Two-sided p-value of ``seen`` = Binomial(trials, q) + N(0, noise)."""
    std = math.sqrt(max(noise, 1e-12))
    k = np.arange(trials + 1)
    weights = stats.binom.pmf(k, trials, q)
    below = float(weights @ stats.norm.cdf((seen - k) / std))
    return min(1.0, 2 * min(below, float(weights @ stats.norm.sf((seen - k) / std))))


def batch_sizes(plan: PrivacyPlan, slab: Slab, releases: tuple[Release, ...], alpha: float) -> Finding:
    """Poisson sampling leaves a site's batch size random: the variance of the counts by site and round, two-sided."""
    noise = slab.units.shape[1] * float(np.mean([spread(plan, len(r.members)) ** 2 for r in releases]))
    sizes = slab.units.sum(1)
    d = np.stack([slab.scores(r).sum(1) for r in releases]) - plan.sample_rate * sizes
    n = np.broadcast_to(sizes, d.shape)
    p, ratio = _dispersion(d, n, plan.sample_rate, noise)
    seen = _fault_seen(n, plan.sample_rate, noise, 0.0, alpha)
    return Finding(
        "sampling: random batch size", "variance of the records that a site takes in a round against q(1-q)n", p, alpha,
        ratio, 1.0, d.size, "batches of a fixed size" if seen else "nothing: the noise hides the batch sizes",
    )  # fmt: skip


def fresh_samples(plan: PrivacyPlan, slab: Slab, releases: tuple[Release, ...], alpha: float) -> Finding:
    """Samples of different rounds are independent: the variance of the counts summed over the rounds, two-sided."""
    rounds = len(releases)
    noise = float(np.sum([spread(plan, len(r.members)) ** 2 for r in releases]))
    d = np.sum([slab.scores(r) for r in releases], axis=0) - rounds * plan.sample_rate * slab.units
    p, ratio = _dispersion(d, rounds * slab.units, plan.sample_rate, noise)
    seen = _fault_seen(rounds * slab.units, plan.sample_rate, noise, float(rounds), alpha)
    return Finding(
        "sampling: rounds independent", "variance of the number of records over all rounds against independence", p,
        alpha, ratio, 1.0, d.size * rounds, "the same records in every round" if seen else "nothing: too much noise",
    )  # fmt: skip


def _dispersion(d: NDArray[np.float64], n: NDArray[np.int64], q: float, noise: float) -> tuple[float, float]:
    """p-value of Σd² for d = Binomial(n, q) - nq + N(0, noise), and its ratio to the mean."""
    ratio = float((d**2).sum() / (n * q * (1 - q) + noise).sum())
    freedom = _freedom(n, q, noise)
    return two_sided(ratio * freedom, freedom), ratio


def _freedom(n: NDArray[np.int64], q: float, noise: float) -> float:
    """Of the chi-square with the first two moments of Σd² (Satterthwaite); fourth moments of the binomial included."""
    v = n * q * (1 - q)
    fourth = v * (1 + 3 * (n - 2) * q * (1 - q))
    expected = v + noise
    return 2 * float(expected.sum()) ** 2 / float((fourth + 6 * v * noise + 3 * noise**2 - expected**2).sum())


def _fault_seen(n: NDArray[np.int64], q: float, noise: float, times: float, alpha: float) -> bool:
    """Whether a sampling variance ``times`` what it must be fails the check, with the power stated elsewhere."""
    v = float((n * q * (1 - q)).mean())
    ratio, freedom = (times * v + noise) / (v + noise), _freedom(n, q, noise)
    edge = stats.chi2.ppf(POWER if ratio < 1 else 1 - POWER, freedom)
    return two_sided(ratio * float(edge), freedom) < alpha


def neighbours(slabs: tuple[Slab, Slab], runs: tuple[Runs, Runs], alpha: float) -> list[Finding]:
    """N against N + 1 units at one site, q = 1: noise and divisor are the plan's, the sums are one unit apart."""
    p, factor, off, scores, plan = [], [], 0.0, [], runs[0].plan
    for slab, run in zip(slabs, runs, strict=True):
        z = residuals(plan, run.releases, slab.known(slab.units))
        p.append(two_sided(float((z**2).sum()), z.size))
        factor.append(float(z.std()))
        scores.append(np.mean([slab.scores(r)[0, 0] for r in run.releases]))
        for r in run.releases:
            off = max(off, float(np.abs(r.applied * plan.divisor - r.values).max()) / noise_std(plan, len(r.members)))
    rounds = len(runs[0].releases)
    samples = 2 * rounds * plan.model.parameters
    std = spread(plan, len(runs[0].releases[0].members)) * math.sqrt(2 / rounds)
    apart = float(scores[1] - scores[0])
    far = float((stats.norm.isf(alpha / 2) + stats.norm.ppf(POWER)) * std)
    ratio = factor[1] / max(factor[0], 1e-300)
    least = f"noise x{weakest(samples // 2, alpha / 2):.3f} at one of the two"
    return [
        Finding("neighbours: noise", "noise with N + 1 records against noise with N, each against the claim",
                min(1.0, 2 * min(p)), alpha, ratio, 1.0, samples, least),
        Finding("neighbours: divisor", "what the model was moved by against the sum divided by the plan's q·N",
                float(off < OFF), alpha, off, 0.0, samples, "a divisor that is off by 1e-6"),
        Finding("neighbours: distance", "distance of the mean sums over N and N + 1 records, in clips",
                min(1.0, 2 * float(stats.norm.sf(abs(apart - 1) / std))), alpha, apart, 1.0, 2 * rounds,
                f"a distance of {1 + far:.2g} clips"),
    ]  # fmt: skip


def places(draws: NDArray[np.int64], rate: float, alpha: float) -> Finding:
    """Where each record sits says nothing of the others: every place is as likely, and every number of records.

    Args:
        draws: ``(steps, places)`` which record sits where, -1 for none.

    If records sat in order, one record more would move all later ones, and their rounding (``docs/sensitivity.md``).
    """
    room, records = draws.shape[1], int(draws.max()) + 1
    by_place = np.stack([np.bincount(np.nonzero(draws == r)[1], minlength=room) for r in range(records)])
    usual = np.maximum(by_place.mean(1, keepdims=True), 1e-9)  # of a record that was never sampled
    statistic = float(((by_place - usual) ** 2 / usual).sum())
    free = records * (room - 1)
    seated = float(binomial_two_sided(int((draws >= 0).sum()), len(draws) * records, rate))
    return Finding(
        "places: at random", "the places at which a site seats the sampled records, against all places alike",
        min(1.0, 2 * min(float(stats.chi2.sf(statistic, free)), seated)), alpha, statistic / free, 1.0, draws.size,
        "records that sit in the order of the table",
    )  # fmt: skip


def binomial_two_sided(found: int, tries: int, rate: float) -> float:
    """How likely so many hits, or as many on the other side, are; 1 or 0 where every try hits."""
    if rate == 1:
        return float(found == tries)
    return min(1.0, 2 * float(min(stats.binom.cdf(found, tries, rate), stats.binom.sf(found - 1, tries, rate))))


def charges(plan: PrivacyPlan, runs: Sequence[Run], alpha: float) -> Finding:
    """Every ledger has charged each sum its site is in, and counts no less ε for all of them than PLD does."""
    lacking, complete = 0.0, True
    for run in runs:
        for site, charge in run.charges.items():
            if took_part := sum(site in r.members for r in run.releases):
                lacking = max(lacking, float(took_part - charge.steps), 1 - charge.epsilon / _least(plan, took_part))
        complete &= {s for r in run.releases for s in r.members} <= run.charges.keys() and bool(run.releases)
    return Finding(
        "ledger: composition", "ε in every site's ledger against PLD over all the sums it is in",
        float(complete and lacking <= LOOSE), alpha, lacking, 0.0, sum(len(run.charges) for run in runs),
        "one step that is not composed",
    )  # fmt: skip


def prices(plan: PrivacyPlan, inner: PrivacyPlan, runs: Sequence[Run], alpha: float) -> Finding:
    """What a step costs by the raw numbers of the plan, in every row that was charged, and in the ε that is claimed."""
    raw, whole, low = price(inner), price(plan), 0.0
    for q, sigma in (p for run in runs for c in run.charges.values() for p in c.prices):
        low = max(low, 1 - q / raw.sample_rate, sigma / raw.noise_multiplier - 1)
    low = max(low, 1 - plan.epsilon / _epsilon(whole, plan.steps, plan.delta))
    shown = sum(len(c.prices) for run in runs for c in run.charges.values())
    return Finding(
        "ledger: price", "rows charged, and the ε claimed, against the sample rate and noise multiplier of plan.json",
        float(shown > 0 and low <= CHEAP), alpha, low, 0.0, shown, "a step priced a millionth too low",
    )  # fmt: skip


def _least(plan: PrivacyPlan, steps: int) -> float:
    """ε of ``steps`` steps by the plan's raw numbers."""
    return _epsilon(price(plan), steps, plan.delta)


def _epsilon(event: SampledGaussian, steps: int, delta: float) -> float:
    """Exact for q = 1, by PLD below."""
    if event.sample_rate == 1:
        return gaussian_epsilon(math.sqrt(steps) / event.noise_multiplier, delta)
    return epsilon_pld([(event, steps)], delta)


def stops(run: Run, carried: int, status: str, alpha: float) -> Finding:
    """A cap that carries ``carried`` steps of a longer plan: as many sums and no more, and a normal ending."""
    most = max((c.steps for c in run.charges.values()), default=0)
    right = len(run.releases) == carried == most and run.status == status
    return Finding(
        "ledger: stops at the cap", "sums released under a cap that carries fewer than the plan has", float(right),
        alpha, float(len(run.releases)), float(carried), max(1, len(run.charges)), "one step over the cap",
    )  # fmt: skip
