"""Checks of the noise on numbers drawn here: they hold when they must, and see what they say they see."""

import numpy as np
import pytest
from scipy import stats

from fedveil.privacy.audit import noise_checks as checks
from fedveil.privacy.audit.noise_checks import multiplier, two_sided, weakest

ALPHA = 1e-5
ROUNDS, D = 12, 2000


def normal(seed, rounds=ROUNDS, size=D):
    return np.random.default_rng(seed).standard_normal((rounds, size))


def all_checks(z):
    found = [
        checks.variance(z, 1.0, ALPHA, 0.95, 5, "variance"), checks.every_round(z, ALPHA),
        checks.every_coordinate(z, ALPHA), checks.mean(z, ALPHA), checks.shape(z, 0.0, ALPHA),
        checks.coordinates_apart(z, ALPHA), checks.rounds_apart([z], ALPHA),
    ]  # fmt: skip
    return {f.name.removeprefix("noise: "): f for f in found}


def test_p_values_of_right_noise_are_large_enough():
    p = {name: [] for name in all_checks(normal(0))}
    for seed in range(60):
        for name, f in all_checks(normal(seed)).items():
            p[name].append(f.p_value)
    for name, values in p.items():
        assert min(values) > 1e-4, name
        # valid: a p-value is below u with a probability of u at most
        assert stats.binomtest(sum(v <= 0.1 for v in values), 60, 0.1, alternative="greater").pvalue > 1e-4, name


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        value, low, high = multiplier(1.3 * normal(seed, 2, 200), 2.0, 0.9)
        assert low < value < high
        covered += low <= 2.6 <= high
    assert stats.binomtest(covered, 200, 0.9).pvalue > 1e-3


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (lambda z: 0.95 * z, "variance"),
        (lambda z: 1.05 * z, "variance"),
        (lambda z: z * np.where(np.arange(ROUNDS) == 3, 0.8, 1.0)[:, None], "every round"),
        (lambda z: z * (np.arange(D) != 7), "every coordinate"),
        (lambda z: z + 0.08, "mean"),
        (lambda z: z + 3.0 * (np.arange(D) == 11), "mean"),
        (lambda z: np.sign(z), "shape"),
        (lambda z: np.random.default_rng(5).uniform(-(3**0.5), 3**0.5, z.shape), "shape"),
        (lambda z: np.tile(z[:, : D // 8], 8), "coordinates independent"),
        (lambda z: (z + np.roll(z, 1, 1)) / 2**0.5, "coordinates independent"),
        (lambda z: np.where(np.arange(ROUNDS)[:, None] == 9, z[2], z), "rounds independent"),
        (lambda z: np.sqrt(0.8) * z + np.sqrt(0.2) * z[0], "rounds independent"),
        (lambda z: 0 * z, "variance"),
    ],
)
def test_each_fault_is_seen_by_its_check(fault, check):
    assert not all_checks(fault(normal(1)))[check].passed


def test_a_correlation_between_two_runs_is_seen():
    a, b = normal(2), normal(3)
    assert checks.rounds_apart([a, b, normal(4, 4, 900)], ALPHA).passed
    b[4] = a[7]
    assert not checks.rounds_apart([a, b, normal(4, 4, 900)], ALPHA).passed


@pytest.mark.parametrize("samples", [500, 20_000])
def test_the_smallest_fault_stated_is_found_as_often_as_stated(samples):
    factor = weakest(samples, 1e-3, power=0.9)
    rng = np.random.default_rng(samples)
    squares = rng.chisquare(samples, 1000) * factor**2
    found = sum(two_sided(float(s), samples) < 1e-3 for s in squares)
    assert 860 <= found <= 940


def test_a_coarse_grid_does_not_fail_the_shape():
    cell = 0.05
    z = np.rint(normal(6, 12, 4000) / cell) * cell
    assert checks.shape(z, cell, ALPHA).passed
    assert not checks.shape(np.rint(1.08 * z / cell) * cell, cell, ALPHA).passed
