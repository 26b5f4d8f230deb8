"""Sums are exact for every set of members; the opened errors tell the number of members and nothing else."""

from __future__ import annotations

import math
import secrets
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.common.errors import SecureSumError
from fedveil.common.units import SiteId
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.committee import committee, elect
from fedveil.privacy.secagg.params import VARIANCE, N, Q, choose

NAMES = [SiteId(f"site-{i}") for i in range(100)]
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.data())
def test_the_bounds_themselves_come_back_in_every_place_of_a_coefficient(session, data):
    n = data.draw(st.integers(2, 5))
    bound = data.draw(st.sampled_from([0, 1, 1447, 1448, 20642, 20643, (1 << 22) - 1, (1 << 45) - 1]))
    length = data.draw(st.sampled_from([1, 7, N, 2 * N + 1, 5 * N]))
    s = session("keysum", n, length=length, bound=bound)
    signs = np.random.default_rng(data.draw(st.integers(0, 1 << 20))).integers(-1, 1, length, endpoint=True)
    share = bound // n
    rows = [signs * share for _ in range(n - 1)] + [signs * (bound - (n - 1) * share)]
    got, _ = s.sum(1, dict(zip(s.names, rows, strict=True)))
    assert np.array_equal(got, signs * bound)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_sum_one_above_its_bound_is_noticed_in_every_place(session, place):
    s = session("keysum", 2, length=4 * N, bound=1000)
    assert choose(s.spec).per_coefficient == 4
    for round, value in ((1, 501), (2, -501)):
        values = np.zeros(4 * N, np.int64)
        values[place * N + 5] = value
        with pytest.raises(SecureSumError, match="bound"):
            s.sum(round, dict.fromkeys(s.names, values))


def test_every_drop_out_pattern_of_six_sites(session):
    s = session("keysum", 6, length=3, bound=1 << 20)
    vectors = {name: np.array([1 << i, -(3**i), 10**6 // (i + 1) // 6]) for i, name in enumerate(s.names)}
    round = 0
    for size in range(2, 7):
        for members in combinations(s.names, size):
            round += 1
            got, opened = s.sum(round, {m: vectors[m] for m in members})
            assert opened == members
            assert np.array_equal(got, sum(vectors[m] for m in members))


@pytest.mark.parametrize("n", [17, 40, pytest.param(100, marks=pytest.mark.slow)])
def test_drop_outs_drawn_at_random_up_to_a_hundred_sites(session, n):
    """Whoever is missing from the members and whoever else from the helpers, down to the fewest of each."""
    draw = np.random.default_rng(n)
    fewest, threshold = n - n // 6, (n + n // 6) // 2 + 1
    s = session("keysum", n, threshold=threshold, min_members=fewest, length=2, bound=9999, colluders=n // 6)
    for round, missing in enumerate((n // 6, int(draw.integers(0, n // 6 + 1)))[: 1 + (n < 50)], 1):
        members = [s.names[i] for i in sorted(draw.permutation(n)[missing:])]
        helpers = [s.names[i] for i in draw.permutation(n)[:threshold]]
        got, opened = s.sum(round, {m: np.array([s.names.index(m), -1]) for m in members}, helpers)
        assert opened == tuple(members)
        assert got.tolist() == [sum(s.names.index(m) for m in members), -len(members)]


def test_a_hundred_sites_and_the_fewest_helpers_of_an_elected_committee(session):
    figures = committee(100, 16, 16, 32)
    helpers = [NAMES.index(h) for h in elect(NAMES, figures.size, secrets.token_bytes(32))]
    s = session(
        "keysum", 100, threshold=figures.threshold, min_members=84, length=2, bound=9999, colluders=16, helpers=helpers
    )
    draw = np.random.default_rng(7)
    members = [s.names[i] for i in sorted(draw.permutation(100)[:84])]
    chosen = [s.names[i] for i in draw.permutation(helpers)[: figures.threshold]]
    got, opened = s.sum(1, {m: np.array([s.names.index(m), -1]) for m in members}, chosen)
    assert opened == tuple(members)
    assert got.tolist() == [sum(s.names.index(m) for m in members), -84]


def _residuals(s, round: int, vectors) -> np.ndarray:
    """The errors that the server meets when it opens the sum of ``vectors``."""
    s.collect(round, vectors)
    answers = s.answers()
    for name, packet in answers.items():
        s.server.add_answer(name, packet)
    p = choose(s.spec)
    sums = s.server._held
    key = s.server._key(tuple(answers)[: s.spec.threshold])
    a = lattice.PublicPolynomials(s.spec.session, round, f"nonce-{round}").take(p.blocks)
    total, _ = s.server.result()
    values = np.zeros(p.blocks * p.per_coefficient * N, np.int64)
    values[: len(total)] = total
    encoded = lattice.encode(values.reshape(p.blocks, p.per_coefficient, N), p).astype(object)
    error = (sums.astype(object) + s.server._engine.multiply(a, key).astype(object) - encoded) % Q
    return np.where(error > Q // 2, error - Q, error).astype(np.int64).reshape(-1)


def test_the_opened_errors_tell_the_number_of_members_and_nothing_else(session):
    """One target sum, split evenly, wildly, with one site giving all, and among other sites: the same errors."""
    s = session("keysum", 6, length=8 * N, bound=1 << 22)
    target = np.random.default_rng(3).integers(-(1 << 21), 1 << 21, 8 * N)
    zero = np.zeros_like(target)
    splits = {
        "one gives all": (s.names[:3], [target, zero, zero]),
        "other sites": (s.names[3:], [zero, zero, target]),
        "wild": (s.names[:3], [target + (1 << 50), zero - (1 << 49), zero - (1 << 49)]),
        "zero": (s.names[:3], [zero, zero, zero]),
    }
    samples = {
        what: _residuals(s, round, dict(zip(sites, rows, strict=True)))
        for round, (what, (sites, rows)) in enumerate(splits.items(), 1)
    }
    for what, error in samples.items():
        # Variance of an estimate from n values of (nearly) normal errors: 2 / n. Each limit is passed by chance at most
        # twice in 10^9: six deviations, and a distance of 3.3.
        assert abs(error.var() / (3 * VARIANCE) - 1) < 6 * math.sqrt(2 / error.size), what
        assert abs(error.mean()) < 6 * math.sqrt(3 * VARIANCE / error.size), what
        assert _distance(error, samples["zero"]) < 3.3 * math.sqrt(2 / error.size), what
    more = _residuals(s, 9, dict.fromkeys(s.names, zero))
    assert abs(more.var() / (6 * VARIANCE) - 1) < 6 * math.sqrt(2 / more.size)
    # Negative control: the same distance tells three members from six.
    assert _distance(more, samples["zero"]) > 3.3 * math.sqrt(2 / more.size)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov; on integers its critical values are conservative."""
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    counts = [np.bincount(x - low, minlength=high - low + 1).cumsum() / x.size for x in (a, b)]
    return float(np.abs(counts[0] - counts[1]).max())


def test_opened_errors_are_not_correlated_with_any_sites_vector(session):
    s = session("keysum", 4, length=8 * N, bound=1 << 22)
    draw = np.random.default_rng(4)
    rows = draw.integers(-(1 << 19), 1 << 19, (4, 8 * N))
    error = _residuals(s, 1, dict(zip(s.names, rows, strict=True)))
    per_value = [error.reshape(-1, N).repeat(choose(s.spec).per_coefficient, axis=0).reshape(-1)[: 8 * N]]
    for row in rows:
        assert abs(np.corrcoef(per_value[0], row)[0, 1]) < 6 / math.sqrt(error.size)
