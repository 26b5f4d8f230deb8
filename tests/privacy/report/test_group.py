"""ε of several units of one person: an upper bound, close to the truth, by integration without an accountant."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedveil.common.errors import VerificationError
from fedveil.privacy.dp import fourier_pld
from fedveil.privacy.dp.accounting import epsilon_pld, gaussian_epsilon
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report import claims, prices
from fedveil.privacy.report.privacy_loss import GROUPS, group, group_epsilon, groups

# (q, σ, steps, δ): small enough to integrate, with one step and with two.
SMALL = [(0.1, 1.0, 1, 1e-5), (0.3, 1.5, 2, 1e-4), (0.02, 0.8, 2, 1e-5), (0.6, 2.5, 2, 1e-3), (0.25, 0.9, 1, 0.05)]


def losses(q: float, sigma: float, size: int, points: int = 3001) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step on a grid of outcomes: the chance of each with and without the group, and the loss log(with/without)."""
    edges = np.linspace(-12 * sigma, size + 12 * sigma, points)
    erf = np.vectorize(math.erf)
    between = lambda mean: np.diff(erf((edges - mean) / sigma / math.sqrt(2))) / 2  # noqa: E731
    without = between(0.0)
    weights = [math.comb(size, j) * q**j * (1 - q) ** (size - j) for j in range(size + 1)]
    inside = np.sum([w * between(float(j)) for j, w in enumerate(weights)], axis=0)
    held = (without > 1e-300) & (inside > 1e-300)
    return inside[held], without[held], np.log(inside[held] / without[held])


def true_delta(q: float, sigma: float, size: int, steps: int, epsilon: float) -> float:
    """δ at ε, the larger of both directions; from below, for outcomes that were lost or put together only hide loss."""
    inside, without, loss = losses(q, sigma, size)
    worst = 0.0
    for chance, sign in ((inside, 1.0), (without, -1.0)):
        if steps == 1:
            total, mass = sign * loss, chance
        else:
            total, mass = np.add.outer(sign * loss, sign * loss).ravel(), np.multiply.outer(chance, chance).ravel()
        over = total > epsilon
        worst = max(worst, float(np.sum(mass[over] * -np.expm1(epsilon - total[over]))))
    return worst


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), SMALL)
@pytest.mark.parametrize("size", GROUPS)
def test_it_is_a_bound_and_close_to_the_truth(q, sigma, steps, delta, size) -> None:
    epsilon, accountant = group(SampledGaussian(q, sigma), steps, delta, size)
    assert accountant == "PLD"
    assert true_delta(q, sigma, size, steps, epsilon) <= delta * (1 + 1e-6)
    assert true_delta(q, sigma, size, steps, 0.93 * epsilon - 0.02) > delta, "far above the truth"


def test_the_noise_divided_by_the_size_at_the_same_rate_is_no_bound() -> None:
    """Negative control: it forgets that a larger group is seen in more steps."""
    q, sigma, size, delta = 0.25, 0.5, 3, 0.3
    wrong = epsilon_pld([(SampledGaussian(q, sigma / size), 1)], delta)
    assert true_delta(q, sigma, size, 1, wrong) > delta
    right, _ = group(SampledGaussian(q, sigma), 1, delta, size)
    assert true_delta(q, sigma, size, 1, right) <= delta


def test_parts_that_are_not_parallel_lose_less() -> None:
    """Two records' gradients of full length at an angle, in the plane: below the bound of the one dimension."""
    q, sigma, span = 0.3, 1.0, np.linspace(-8, 9, 400)
    x, y = np.meshgrid(span, span)
    cell = (span[1] - span[0]) ** 2
    density = lambda a, b: np.exp(-((x - a) ** 2 + (y - b) ** 2) / 2 / sigma**2) / (2 * math.pi * sigma**2) * cell  # noqa: E731
    without = density(0, 0)
    for angle in (0.0, 0.7, math.pi / 2, 2.5):
        c, s = math.cos(angle), math.sin(angle)
        mixed = (1 - q) ** 2 * without + q * (1 - q) * (density(1, 0) + density(c, s)) + q * q * density(1 + c, s)
        for epsilon in (0.2, 1.0, 2.0):
            bound = true_delta(q, sigma, 2, 1, epsilon)
            for p, other in ((mixed, without), (without, mixed)):
                assert float(np.sum(np.maximum(p - math.exp(epsilon) * other, 0))) <= bound * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("size", GROUPS)
def test_with_every_record_in_every_step_it_is_the_closed_form(size) -> None:
    epsilon, accountant = group(SampledGaussian(1.0, 12.0), 30, 1e-5, size)
    assert accountant == "PLD"
    assert epsilon == pytest.approx(gaussian_epsilon(size * math.sqrt(30) / 12.0, 1e-5), rel=2e-3)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 2.0, 60), (0.05, 2.0, 100), (1.0, 9.0, 40)])
def test_it_grows_with_the_group_and_is_below_the_simple_bound(q, sigma, steps) -> None:
    event = SampledGaussian(q, sigma)
    found = [epsilon_pld([(event, steps)], 1e-5), *(group(event, steps, 1e-5, n)[0] for n in GROUPS)]
    assert found == sorted(found)
    for size, epsilon in zip(GROUPS, found[1:], strict=True):
        simple = SampledGaussian(1 - (1 - q) ** size, sigma / size)
        assert epsilon <= epsilon_pld([(simple, steps)], 1e-5) * (1 + 1e-3)


def test_what_is_too_wide_to_compute_is_bounded_by_the_second_accountant() -> None:
    for q, sigma, steps, size in ((0.5, 0.25, 50, 5), (0.9, 1.0, 900, 3), (1.0, 0.21, 20, 5), (0.01, 4.0, 10, 1 << 30)):
        epsilon, accountant = group(SampledGaussian(q, sigma), steps, 1e-6, size)
        assert accountant == "RDP"
        assert math.isfinite(epsilon)
    with pytest.raises(VerificationError, match="at least one"):
        group(SampledGaussian(0.1, 1.0), 1, 1e-5, 0)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), SMALL)
@pytest.mark.parametrize("size", GROUPS)
def test_the_verifiers_own_accountant_is_a_bound_too_and_never_above_the_builders(q, sigma, steps, delta, size) -> None:
    own, stated = (
        fourier_pld.epsilon([(q, sigma, steps)], delta, size=size),
        group(SampledGaussian(q, sigma), steps, delta, size)[0],
    )
    assert true_delta(q, sigma, size, steps, own) <= delta * (1 + 1e-6)
    assert true_delta(q, sigma, size, steps, 0.99 * own - 0.001) > delta, "far above the truth"
    assert own <= stated * (1 + 1e-6)


@pytest.mark.parametrize(("q", "steps", "sigma"), [(0.1, 60, 2.0), (1.0, 40, 9.0), (0.9, 900, 1.0), (0.25, 3, 0.3)])
def test_the_verifier_takes_what_the_builder_states_and_nothing_less(planned, q, steps, sigma) -> None:
    """Also where the mixture is too wide and RDP is stated: (0.9, 900, 1.0) for all sizes."""
    plan = planned(epsilon=None, sample_rate=q, steps=steps, noise_multiplier=sigma)
    own, found, factor = prices.read(plan.to_json()), groups(plan), 20 if q == 1 else 5
    table = {"stability_factor": factor, "epsilon_of_original_record": group_epsilon(plan, factor)}
    payload = {"claim": {"groups": found}, "sites": {"alba": {"anonymisation": table}, "berg": None}}
    claims.groups(payload, own)
    for entry, key in (*((g, "epsilon") for g in found), (table, "epsilon_of_original_record")):
        before = entry[key]
        entry[key] = 0.9 * before - 0.02
        with pytest.raises(VerificationError, match="is stated as"):
            claims.groups(payload, own)
        entry[key] = before


def test_the_verifier_states_no_epsilon_of_a_group_that_has_no_places(planned) -> None:
    plan = planned(sample_rate=0.5, steps=10)
    table = {"stability_factor": 6, "epsilon_of_original_record": 100.0}
    payload = {"claim": {"groups": groups(plan)}, "sites": {"alba": {"anonymisation": table}}}
    with pytest.raises(VerificationError, match="no places for a group of 6"):
        claims.groups(payload, prices.read(plan.to_json()))
    assert group_epsilon(plan, 6) is None


def test_a_report_names_all_sizes(honest) -> None:
    found = groups(honest.plan)
    assert [g["size"] for g in found] == list(GROUPS)
    assert [g["epsilon"] for g in found] == [group_epsilon(honest.plan, size) for size in GROUPS]
    assert all(g["epsilon"] > honest.plan.claim for g in found)
