"""Committees, wrong answers and their bookkeeping, and helpers that went back in time."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.errors import HelperRefusal, SecureSumError
from fedveil.common.journal import Head
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import params, reed_solomon, shamir
from fedveil.privacy.secagg.committee import colluders, committee, elect
from fedveil.privacy.secagg.keysum_common import sign_header
from fedveil.privacy.secagg.rollback import check_head
from fedveil.privacy.secagg.round_outcomes import Conduct

N_COLUMNS = 64

# ---- the committee's own bound


def test_the_committee_of_the_design_and_one_that_is_too_small():
    found = committee(200, 33, 33, 32)
    assert (found.colluders, found.threshold) == (21, 27)
    with pytest.raises(SecureSumError, match="20 of 200") as e:
        committee(200, 33, 33, 20)
    enough = int(next(w for w in e.value.hint.split() if w.isdigit()))
    assert committee(200, 33, 33, enough).threshold <= enough - 33 * enough // 200


@pytest.mark.parametrize(("n", "c", "m"), [(200, 33, 32), (60, 10, 20), (100, 16, 16), (12, 3, 6)])
def test_the_bound_is_the_hypergeometric_tail_in_exact_fractions(n, c, m):
    def tail(limit: int) -> Fraction:
        ways = (comb(c, k) * comb(n - c, m - k) for k in range(limit + 1, min(c, m) + 1))
        return Fraction(sum(ways), comb(n, m))

    found = colluders(n, c, m)
    assert tail(found) <= Fraction(1, 1 << 40)
    assert found == 0 or tail(found - 1) > Fraction(1, 1 << 40)


def test_the_tail_equals_a_count_over_all_committees():
    n, c, m = 9, 4, 5
    counts = [sum(1 for i in chosen if i < c) for chosen in combinations(range(n), m)]
    for limit in range(5):
        ways = sum(comb(c, k) * comb(n - c, m - k) for k in range(limit + 1, min(c, m) + 1))
        assert ways == sum(1 for x in counts if x > limit)


def test_everybody_is_a_committee_with_all_colluders():
    assert colluders(20, 3, 20) == 3
    assert colluders(20, 0, 7) == 0


@pytest.mark.parametrize(("n", "c", "m"), [(5, 5, 3), (5, -1, 3), (5, 1, 0), (5, 1, 6)])
def test_figures_that_make_no_committee_are_refused(n, c, m):
    with pytest.raises(SecureSumError):
        colluders(n, c, m)


def test_a_seed_elects_one_committee_in_roster_order_and_another_seed_another():
    sites = [SiteId(f"s{i}") for i in range(40)]
    one = elect(sites, 10, b"a" * 32)
    assert one == elect(sites, 10, b"a" * 32)
    assert len(one) == 10
    assert list(one) == sorted(one, key=sites.index)
    assert one != elect(sites, 10, b"b" * 32)
    counts = np.zeros(40)
    for seed in range(400):
        for site in elect(sites, 10, seed.to_bytes(32)):
            counts[sites.index(site)] += 1
    # Each count is binomial(400, 1/4): deviation 8.7.
    assert np.abs(counts - 100).max() < 6 * 8.7
    for size, seed in ((0, b"a" * 32), (41, b"a" * 32), (3, b"short")):
        with pytest.raises(SecureSumError):
            elect(sites, size, seed)


@pytest.mark.parametrize(("helpers", "threshold", "c"), [(32, 26, 33), (20, 18, 33), (32, 16, 0), (32, 33, 0)])
def test_a_threshold_below_the_committees_rule_is_refused(helpers, threshold, c):
    def check(helpers: int, threshold: int, colluders: int) -> None:
        spec: Any = SimpleNamespace(all_helpers=range(helpers), threshold=threshold, colluders=colluders)
        params._check_helpers(spec, 200)

    check(32, 27, 33)
    with pytest.raises(SecureSumError):
        check(helpers, threshold, c)


def test_a_committee_opens_sums_of_all_sites_and_nobody_else_is_asked(session):
    s = session("keysum", 6, length=3, helpers=[1, 3, 4], threshold=2)
    helpers = {s.names[i] for i in (1, 3, 4)}
    vectors = {n: np.array([i, -i, 7]) for i, n in enumerate(s.names)}
    s.collect(1, vectors)
    answers = s.answers()
    assert set(s.server.agree_requests()) == set(s.server.open_requests()) == set(answers) == helpers
    agree, ask = s.server.agree_requests()[s.names[1]], s.server.open_requests()[s.names[1]]
    outsider = s.site(s.names[0])
    with pytest.raises(HelperRefusal, match="not on the committee"):
        outsider.agree(agree)
    with pytest.raises(HelperRefusal):
        outsider.open(ask)
    header = {k: v for k, v in s.site(s.names[1]).agree(agree).header.items() if k != "signature"}
    forged = sign_header(outsider._signing_key, {**header, "site": s.names[0]})
    with pytest.raises(SecureSumError, match="no helper"):
        s.server.add_agreement(s.names[0], Packet(forged))
    for name, packet in answers.items():
        s.server.add_answer(name, packet)
    got, members = s.server.result()
    assert got.tolist() == [15, -15, 42]
    assert members == tuple(s.names)
    assert len(s.site(s.names[0]).replay(1).buffers["shares"]) == 3 * 8208
    with pytest.raises(SecureSumError, match="open already"):
        s.server.open_requests()


@pytest.mark.parametrize("helpers", [(3, 1), (1, 1), (0, 99)])
def test_a_committee_is_distinct_sites_in_roster_order(session, helpers):
    with pytest.raises(Exception, match=r"roster|helpers"):
        session("keysum", 4, helpers=helpers, threshold=2)


def test_sites_that_think_of_other_figures_do_not_sum(session):
    """The helpers, the bound, the threshold: a server that tells them differently to two sites gets no sum."""
    a = session("keysum", 4, length=3)
    b = session("keysum", 4, length=3, bound=999)
    digests = {a.site(a.names[0])._joined().digest, b.site(b.names[0])._joined().digest}
    assert len(digests) == 2
    keys = {n: {"x25519": k} for n, k in a.site(a.names[0])._joined().keys.items()}
    joins = type(a.site(a.names[0])._joined())
    same = {joins(spec, keys).digest for spec in (a.spec, b.spec)}
    assert len(same) == 2


# ---- wrong answers


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.data())
def test_up_to_half_of_the_spare_answers_are_corrected_and_named(n, data):
    threshold = data.draw(st.integers(1, n))
    spare = (n - threshold) // 2
    wrong = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=spare)))
    secret = np.arange(-8, 8)
    rows = shamir.share(secret, threshold, n).astype(np.int64)
    for r in wrong:
        column = data.draw(st.integers(0, 15))
        rows[r, column] = (rows[r, column] + data.draw(st.integers(1, shamir.P - 1))) % shamir.P
    assert reed_solomon.wrong_rows(range(1, n + 1), rows, threshold) == tuple(wrong)


def test_two_hundred_helpers_with_forty_one_liars_in_one_coefficient_each():
    n, threshold = 200, 117
    rows = shamir.share(np.arange(N_COLUMNS), threshold, n).astype(np.int64)
    liars = tuple(range(3, 3 + 41 * 4, 4))
    for i, r in enumerate(liars):
        rows[r, i % N_COLUMNS] = (rows[r, i % N_COLUMNS] + 1 + i) % shamir.P
    assert reed_solomon.wrong_rows(range(1, n + 1), rows, threshold) == liars
    rows[0] = (rows[0] + 1) % shamir.P
    assert reed_solomon.wrong_rows(range(1, n + 1), rows, threshold) is None


def test_wrong_answers_that_hide_from_each_other_are_still_counted_together(monkeypatch):
    """Two liars in two coefficients, and combinations that see one coefficient each: two errors in all."""
    n, threshold = 5, 3
    rows = shamir.share(np.array([7, 8]), threshold, n).astype(np.int64)
    rows[0, 0] = (rows[0, 0] + 1) % shamir.P
    rows[4, 1] = (rows[4, 1] + 1) % shamir.P
    weights = iter([np.array([1, 0]), np.array([0, 1])])
    monkeypatch.setattr(shamir, "uniform", lambda count: next(weights))
    assert reed_solomon.wrong_rows(range(1, n + 1), rows, threshold) is None


@pytest.mark.parametrize("n", [4, 5, 7, 8])
def test_any_wrong_answers_up_to_the_spare_ones_are_noticed_for_certain(n):
    threshold = 3
    honest = shamir.share(np.arange(4), threshold, n).astype(np.int64)
    for count in range(1, n - threshold + 1):
        for wrong in combinations(range(n), count):
            rows = honest.copy()
            rows[list(wrong)] = (rows[list(wrong)] + 1) % shamir.P
            assert reed_solomon.wrong_rows(range(1, n + 1), rows, threshold) != ()


def test_the_decoder_equals_a_search_over_all_polynomials_in_small():
    """Brute force: for every subset of T points, the polynomial through it, and how many points agree."""
    n, threshold = 6, 2
    points = list(range(1, n + 1))
    draw = np.random.default_rng(5)
    for _ in range(60):
        word = shamir.share(np.array([int(draw.integers(0, 99))]), threshold, n).astype(np.int64)[:, 0]
        for r in draw.choice(n, int(draw.integers(0, 4)), replace=False):
            word[r] = int(draw.integers(0, shamir.P))
        best: tuple[int, ...] | None = None
        for chosen in combinations(range(n), threshold):
            known = np.array([[word[c]] for c in chosen])
            others = [r for r in range(n) if r not in chosen]
            through = shamir.interpolate([points[c] for c in chosen], known, [points[r] for r in others])[:, 0]
            wrong = tuple(r for r, v in zip(others, through, strict=True) if v != word[r])
            if len(wrong) <= (n - threshold) // 2:
                best = wrong
        assert reed_solomon.decode(points, word, threshold) == best


@pytest.mark.parametrize("reveal_to", ["server", "sites"])
def test_twelve_sites_open_with_two_liars_who_are_named(session, reveal_to):
    s = session("keysum", 12, length=5, threshold=7, reveal_to=reveal_to)
    s.collect(1, dict.fromkeys(s.names, np.arange(5)))
    answers = s.answers()
    liars = (s.names[2], s.names[5])
    for n, packet in answers.items():
        if n in liars:
            data = bytes([packet.buffers["answer"][0] ^ 1]) + packet.buffers["answer"][1:]
            header = {k: v for k, v in packet.header.items() if k != "signature"} | {"answer": sha256(data)}
            packet = Packet(sign_header(s.site(n)._signing_key, header), {"answer": data})
        s.server.add_answer(n, packet)
    s.vouch()
    assert s.site(s.names[0]).opened(s.server.opened())[0].tolist() == [0, 12, 24, 36, 48]
    assert s.server.suspects == liars


def test_strikes_set_a_helper_aside_and_lost_rounds_are_bounded():
    conduct = Conduct(max_aborts=1, strikes=2)
    a, b = SiteId("a"), SiteId("b")
    conduct.opened(1, [b, a])
    assert conduct.set_aside == ()
    conduct.opened(2, [b, b])
    assert conduct.set_aside == (b,)
    conduct.aborted(3, [a, a])
    assert conduct.left_out == ()
    for again in (3, 1):
        with pytest.raises(SecureSumError, match="forward"):
            conduct.opened(again, [])
    with pytest.raises(SecureSumError, match="plan bears 1"):
        conduct.aborted(4, [a])
    assert (conduct.aborts, conduct.left_out, conduct.set_aside) == (2, (a,), (b,))
    for bad in ((-1, 1), (0, 0)):
        with pytest.raises(SecureSumError):
            Conduct(*bad)


# ---- a helper that went back in time

HASHES = [f"{i:064x}" for i in range(10)]


def _check(rows: int, copies: dict[str, tuple[int, str]], need: int = 2) -> None:
    own = Head(rows, HASHES[rows])
    check_head(own, {SiteId(s): Head(*h) for s, h in copies.items()}, need=need, hash_at=lambda r: HASHES[r])


def test_a_journal_level_with_or_ahead_of_its_copies_may_help():
    _check(5, {"a": (5, HASHES[5]), "b": (3, HASHES[3])})
    _check(5, {"a": (0, "0" * 64), "b": (5, HASHES[5])})


@pytest.mark.parametrize(
    ("copies", "match"),
    [
        ({"a": (5, HASHES[5])}, "1 peers"),
        ({}, "0 peers"),
        ({"a": (6, HASHES[6]), "b": (5, HASHES[5])}, "back in time"),
        ({"a": (5, HASHES[4]), "b": (5, HASHES[5])}, "another one"),
        ({"a": (3, HASHES[4]), "b": (5, HASHES[5])}, "another one"),
    ],
)
def test_a_journal_behind_its_copies_or_on_another_branch_refuses(copies, match):
    with pytest.raises(HelperRefusal, match=match):
        _check(5, copies)
