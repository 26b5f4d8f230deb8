"""Bounds from one run: known answers, and never above the truth more often than the confidence allows."""

import math

import numpy as np
import pytest
from scipy import stats

from fedveil.common.errors import UsageError
from fedveil.privacy.audit.one_run import (
    Guesses,
    approximate_dp,
    audit,
    detectable,
    gaussian,
    guess,
    lower_bound,
    pvalue_dp,
    rejects,
)
from fedveil.privacy.dp.accounting import epsilon_pld, gaussian_epsilon
from fedveil.privacy.dp.events import SampledGaussian

METHODS = ["dp", "f-dp", "gaussian"]
DELTA = 1e-5
# jax_privacy 2.0.0, auditing._epsilon_one_run and _epsilon_one_run_fdp at significance 0.05
JAX = [
    (Guesses(1000, 100, 97), 1e-5, 2.4922872510633924, 3.8615127848757942),
    (Guesses(1000, 1000, 700), 1e-5, 0.7317406384658977, 1.3719800500431791),
    (Guesses(1000, 500, 480), 1e-5, 2.792646901008521, 4.931079225918221),
    (Guesses(1000, 500, 480), 1e-3, 2.2429092399697184, 3.564714371413089),
    (Guesses(2000, 200, 150), 1e-5, 0.8185366776682562, 1.1742060628453442),
    (Guesses(2000, 200, 150), 1e-3, 0.0, 0.7651659427230351),
]


@pytest.mark.parametrize(("guesses", "delta", "dp", "fdp"), JAX)
def test_the_bounds_are_those_of_an_independent_implementation(guesses, delta, dp, fdp):
    assert lower_bound(guesses, delta, 0.05, "dp") == pytest.approx(dp, abs=1e-5)
    assert lower_bound(guesses, delta, 0.05, "gaussian") == pytest.approx(fdp, abs=1e-5)


def test_pure_dp_is_a_binomial_tail():
    g = Guesses(100, 60, 50)
    for epsilon in (0.0, 0.5, 2.0):
        p = 1 / (1 + math.exp(-epsilon))
        assert pvalue_dp(g, epsilon, 0.0) == pytest.approx(sum(stats.binom.pmf(k, 60, p) for k in range(50, 61)))
    assert lower_bound(Guesses(1000, 1000, 1000), 0.0, 0.05, "dp") == pytest.approx(
        -math.log(math.expm1(-math.log(0.05) / 1000)), abs=1e-6
    )


def test_p_values_fall_with_right_guesses_and_rise_with_epsilon_and_delta():
    for delta in (0.0, 1e-5, 1e-3):
        by_right = [pvalue_dp(Guesses(500, 100, r), 1.0, delta) for r in range(101)]
        assert all(a >= b - 1e-12 for a, b in zip(by_right, by_right[1:], strict=False))
        by_epsilon = [pvalue_dp(Guesses(500, 100, 80), e / 4, delta) for e in range(20)]
        assert all(a <= b + 1e-12 for a, b in zip(by_epsilon, by_epsilon[1:], strict=False))
    assert pvalue_dp(Guesses(500, 100, 80), 1.0, 1e-3) > pvalue_dp(Guesses(500, 100, 80), 1.0, 0.0)


@pytest.mark.parametrize("least", [gaussian(0.7), approximate_dp(0.8, 1e-3)], ids=["gaussian", "dp"])
def test_what_an_event_needs_is_monotone_and_at_most_itself(least):
    y = np.linspace(1e-9, 1 - 1e-9, 1001)
    x = np.array([least(v) for v in y])
    assert (np.diff(x) >= -1e-12).all()
    assert (x <= y + 1e-12).all()
    assert rejects(Guesses(100, 100, 100), least, 0.05)
    assert not rejects(Guesses(100, 100, 50), least, 0.05)


def repeated(mu, method, times, seed, m=300):
    """Bounds for canaries of which each moves its own N(0, 1) score by mu: the Gaussian mechanism, mu-GDP."""
    rng, out = np.random.default_rng(seed), []
    true = gaussian_epsilon(mu, DELTA) if mu else 0.0
    for _ in range(times):
        included = rng.random(m) < 0.5
        scores = included * mu + rng.standard_normal(m)
        out.append(audit(scores, included, claimed=true, delta=DELTA, confidence=0.95, method=method))
    return true, out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_the_bound_exceeds_the_truth_no_more_often_than_it_says(method, mu):
    times = 40
    true, results = repeated(mu, method, times, seed=int(10 * mu))
    above = sum(r.bound > true for r in results)
    assert stats.binomtest(above, times, 0.05, alternative="greater").pvalue > 1e-4
    assert all(r.passed == (r.bound <= true) for r in results)


def test_the_bounds_are_not_empty():
    for mu, least in ((2.0, 2.0), (4.0, 3.0)):
        for method in METHODS:
            _, results = repeated(mu, method, 5, seed=3)
            assert np.mean([r.bound for r in results]) > least
    _, wide = repeated(2.0, "gaussian", 10, seed=4)
    _, plain = repeated(2.0, "dp", 10, seed=4)
    assert np.mean([r.bound for r in wide]) > np.mean([r.bound for r in plain])


@pytest.mark.parametrize(("method", "least"), [("dp", 4.5), ("f-dp", 4.5), ("gaussian", 7.5)])
def test_without_privacy_the_bound_is_what_so_many_canaries_can_show(method, least):
    included = np.arange(1000) % 2 == 0
    result = audit(included * 1.0, included, claimed=1.0, delta=DELTA, method=method)
    assert result.bound > least
    assert not result.passed
    assert result.sentence.startswith("evidence that ε ≥ ")
    assert result.guesses.right == result.guesses.made


def test_guesses_are_the_extremes_of_the_scores():
    scores = np.array([5.0, 4, 3, 2, 1, 0, -1, -2, -3, -4])
    included = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 0], bool)
    assert guess(scores, included, 3, 2) == Guesses(10, 5, 3)
    assert guess(scores, included, 0, 4) == Guesses(10, 4, 3)
    assert guess(-scores, included, 2, 0) == Guesses(10, 2, 1)


def test_the_sentence_of_a_pass():
    rng = np.random.default_rng(5)
    included = rng.random(200) < 0.5
    result = audit(rng.standard_normal(200), included, claimed=1.0, delta=DELTA)
    assert result.sentence == f"no evidence above ε ≥ {result.bound:.3g} (confidence 95%, δ = 1e-05) against claimed 1"
    assert result.to_json()["canaries"] == 200


@pytest.mark.parametrize(
    ("scores", "coins"),
    [(np.zeros(9), np.zeros(9, bool)), (np.zeros(20), np.zeros(19, bool)), (np.full(20, np.nan), np.zeros(20, bool))],
)
def test_what_cannot_be_scored_is_refused(scores, coins):
    with pytest.raises(UsageError):
        audit(scores, coins, claimed=1.0, delta=DELTA)


def test_impossible_guesses_are_refused():
    for numbers in ((10, 11, 5), (10, 5, 6), (0, 0, 0), (10, 5, -1)):
        with pytest.raises(UsageError, match="cannot be"):
            Guesses(*numbers)


@pytest.mark.parametrize(("q", "method"), [(1.0, "gaussian"), (0.5, "f-dp")])
def test_the_smallest_fault_is_found_as_often_as_it_says(q, method):
    """Scores of a mechanism with so much less noise refute the claim nine times in ten; those of a right one do not."""
    event, steps, m, delta = SampledGaussian(q, 8.0), 30, 400, 1e-5
    claimed = epsilon_pld([(event, steps)], delta)
    factor = detectable(m, event, steps, claimed, delta, 0.95, method)
    assert 0.01 < factor < 0.9
    rng = np.random.default_rng(11)

    def refuted(f):
        coins = rng.random(m) < 0.5
        taken = np.where(coins, rng.binomial(steps, q, m), 0)
        scores = taken + rng.standard_normal(m) * f * event.noise_multiplier * math.sqrt(steps)
        return not audit(scores, coins, claimed=claimed, delta=delta, method=method).passed

    assert sum(refuted(0.97 * factor) for _ in range(20)) >= 12  # of 18 or more expected
    assert not any(refuted(1.0) for _ in range(5))
    assert detectable(m, event, steps, 500.0, delta, 0.95, method) == 0.0
    assert detectable(4000, event, steps, claimed, delta, 0.95, method) > factor
