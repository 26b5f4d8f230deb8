"""The noise itself: distribution, independence, no reuse; every test with a fault that it must see.

False alarms: each statistical assertion fails for correct code with probability below 1e-9.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from scipy import stats

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.noise import MAX_STD, KeyStream, discrete_gaussian

FALSE_ALARM = 1e-9
N = 200_000


def pmf(std: float, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2 * std * std))
    return weights / weights.sum()


def chi_square(draws: np.ndarray, std: float) -> float:
    """p-value of the draws against N_Z(0, std²); bins with fewer than 10 expected are merged into the tails."""
    reach = math.ceil(12 * std) + 2
    expected = pmf(std, reach) * draws.size
    keep = np.flatnonzero(expected >= 10)
    low, high = keep[0], keep[-1]
    observed = np.bincount(np.clip(draws + reach, low, high) - low, minlength=high - low + 1)
    merged = expected[low : high + 1].copy()
    merged[0] += expected[:low].sum()
    merged[-1] += expected[high + 1 :].sum()
    return float(stats.chisquare(observed, merged).pvalue)


def variance_p(draws: np.ndarray, std: float) -> float:
    """Two-sided p-value of the variance around 0 against std²."""
    statistic = float((draws.astype(np.float64) ** 2).sum()) / std**2
    return 2 * float(np.minimum(stats.chi2.cdf(statistic, draws.size), stats.chi2.sf(statistic, draws.size)))


@pytest.mark.parametrize("std", [0.5, 0.7, 3.0, 3.7, 20.0])
def test_small_noise_has_the_exact_distribution(std) -> None:
    draws = discrete_gaussian(std, N)
    assert draws.dtype == np.int64
    assert draws.shape == (N,)
    assert chi_square(draws, std) > FALSE_ALARM
    for wrong in (0.9, 1.1):
        assert chi_square(draws, std * wrong) < FALSE_ALARM
        assert chi_square(discrete_gaussian(max(0.5, std * wrong), N), std) < FALSE_ALARM or std == 0.5


@pytest.mark.parametrize("std", [0.7, 3.0, 20.0])
def test_a_rounded_gaussian_and_a_clipped_one_are_seen(std) -> None:
    """Negative controls: clipping noisy values, rounding twice, a continuous Gaussian truncated towards 0."""
    gauss = np.random.default_rng(1).normal(0, std, N)
    assert chi_square(np.trunc(gauss).astype(np.int64), std) < FALSE_ALARM
    draws = discrete_gaussian(std, N)
    assert chi_square(np.clip(draws, -math.floor(2 * std), math.floor(2 * std)), std) < FALSE_ALARM
    assert chi_square(2 * np.rint(draws / 2).astype(np.int64), std) < FALSE_ALARM


@pytest.mark.parametrize("std", [200.5, 15230.14, 2.0**31 + 0.3, MAX_STD])
def test_large_noise_is_gaussian_to_all_appearance(std) -> None:
    draws = discrete_gaussian(std, N)
    assert variance_p(draws, std) > FALSE_ALARM
    assert stats.kstest(draws / std, "norm").pvalue > FALSE_ALARM or std < 1000
    assert abs(float(draws.mean())) < 7 * std / math.sqrt(N)
    kurtosis = float(((draws / std) ** 4).mean())
    assert kurtosis == pytest.approx(3, abs=10 * math.sqrt(96 / N))
    assert 3.6 < np.abs(draws).max() / std < 8
    for wrong in (0.9, 0.98, 1.02, 1.1):
        assert variance_p(draws, std * wrong) < FALSE_ALARM
        assert variance_p(np.rint(draws * wrong), std) < FALSE_ALARM


def test_clipped_noise_is_seen_in_the_variance() -> None:
    draws = discrete_gaussian(1000.0, N)
    assert variance_p(np.clip(draws, -2000, 2000), 1000.0) < FALSE_ALARM


@pytest.mark.parametrize("std", [0.7, 3.0, 5000.0])
def test_coordinates_do_not_know_each_other(std) -> None:
    draws = discrete_gaussian(std, N).astype(np.float64)
    limit = 6.2 / math.sqrt(N)
    for lag in (1, 2, 3, 7, 64, 1000):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < limit
        assert abs(np.corrcoef(np.abs(draws[:-lag]), np.abs(draws[lag:]))[0, 1]) < limit
    # negative control: noise in which each coordinate leans on the one before
    leaning = (draws[1:] + 0.1 * draws[:-1]) / math.sqrt(1.01)
    assert abs(np.corrcoef(leaning[:-1], leaning[1:])[0, 1]) > limit


def test_two_releases_share_nothing() -> None:
    a, b = discrete_gaussian(1e4, N), discrete_gaussian(1e4, N)
    assert (a == b).mean() < 0.001
    assert abs(np.corrcoef(a, b)[0, 1]) < 6.2 / math.sqrt(N)
    assert variance_p(a - b, 1e4 * math.sqrt(2)) > FALSE_ALARM
    # negative control: one stream used twice cancels out in the difference
    assert variance_p(a - a, 1e4 * math.sqrt(2)) < FALSE_ALARM


def in_child(work) -> bytes:
    """What ``work()`` returns in a forked child (up to 64 KiB)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, work())
        finally:
            os._exit(0)
    os.close(write)
    data = b""
    while part := os.read(read, 1 << 16):
        data += part
    os.close(read)
    os.waitpid(pid, 0)
    return data


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_draws_its_own_noise() -> None:
    discrete_gaussian(1e6, 100)  # whatever state there may be exists before the fork
    one = in_child(lambda: discrete_gaussian(1e6, 1000).tobytes())
    two = in_child(lambda: discrete_gaussian(1e6, 1000).tobytes())
    mine = discrete_gaussian(1e6, 1000).tobytes()
    assert len(one) == len(mine) == 8000
    assert len({one, two, mine}) == 3
    # negative control: a stream kept across the fork repeats itself in the child
    kept = KeyStream()
    assert in_child(lambda: kept.words(100).tobytes()) == kept.words(100).tobytes()


def test_words_are_uniform() -> None:
    stream = KeyStream()
    words = stream.words(N)
    octets = np.bincount(words.view(np.uint8), minlength=256)
    assert stats.chisquare(octets).pvalue > FALSE_ALARM
    assert not np.array_equal(words, stream.words(N))
    uniform = stream.uniform(N)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 256, 1000])
def test_below_is_unbiased(bound) -> None:
    draws = KeyStream().below(bound, N)
    assert draws.min() >= 0
    assert draws.max() < bound
    assert bound == 1 or stats.chisquare(np.bincount(draws, minlength=bound)).pvalue > FALSE_ALARM


def test_below_rejects_instead_of_wrapping() -> None:
    """At 3 · 2^62 the remainder of a 64-bit word would hit the lowest third twice as often."""
    bound = 3 << 61
    third = 1 << 61
    draws = KeyStream().below(bound, N)
    low = int((draws < third).sum())
    assert stats.binomtest(low, N, 1 / 3).pvalue > FALSE_ALARM
    wrapped = int((KeyStream().words(N) % np.uint64(bound) < third).sum())  # negative control
    assert stats.binomtest(wrapped, N, 1 / 3).pvalue < FALSE_ALARM


def test_shares_add_up_to_the_plans_noise() -> None:
    """h shares of σ/sqrt(h) are one noise of σ: what the claim counts on."""
    h, std = 7, 640.0
    total = np.sum([discrete_gaussian(std / math.sqrt(h), N) for _ in range(h)], axis=0)
    assert variance_p(total, std) > FALSE_ALARM
    missing = np.sum([discrete_gaussian(std / math.sqrt(h), N) for _ in range(h - 1)], axis=0)
    assert variance_p(missing, std) < FALSE_ALARM


@pytest.mark.parametrize("std", [0.0, 0.49, -1.0, math.nan, math.inf, MAX_STD * 1.01])
def test_noise_outside_its_range_is_refused(std) -> None:
    with pytest.raises(PlanError, match="grid units"):
        discrete_gaussian(std, 10)


def test_sizes() -> None:
    assert discrete_gaussian(3.0, 0).shape == (0,)
    assert discrete_gaussian(3.0, 1).shape == (1,)
