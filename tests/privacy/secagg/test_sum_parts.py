"""The parts of the secure sum against independent oracles: sharing, errors, public polynomials, encoding, bounds."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.errors import SecureSumError, WireError
from fedveil.privacy.secagg import keysum_server, keysum_site, lattice, params, residuals, shamir
from fedveil.privacy.secagg.params import KeysumParams, N, Q

# ---- shamir


def test_fewer_shares_than_the_threshold_are_uniform_whatever_the_secret():
    prime, threshold, n = 5, 3, 4
    for points in combinations(range(1, n + 1), threshold - 1):
        for secret in range(prime):
            seen = Counter()
            for rest in product(range(prime), repeat=threshold - 1):
                column = np.array([secret, *rest], np.float64)[:, None]
                shares = shamir.evaluate(column, range(1, n + 1), prime)[:, 0]
                seen[tuple(shares[p - 1] for p in points)] += 1
                for chosen in combinations(range(1, n + 1), threshold):
                    values = shares[[c - 1 for c in chosen]][:, None]
                    assert shamir.interpolate(chosen, values, prime=prime)[0, 0] == secret
            assert set(seen.values()) == {1}
            assert len(seen) == prime ** (threshold - 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.data())
def test_shares_of_a_sum_are_sums_of_shares(n, data):
    threshold = data.draw(st.integers(1, n))
    chosen = data.draw(st.permutations(range(1, n + 1)))[:threshold]
    a, b = (np.array(data.draw(st.lists(st.integers(-8000, 8000), min_size=3, max_size=3))) for _ in range(2))
    total = (shamir.share(a, threshold, n).astype(np.int64) + shamir.share(b, threshold, n)) % shamir.P
    got = shamir.interpolate(chosen, total[[c - 1 for c in chosen]])[0]
    assert np.array_equal(shamir.centred(got), a + b)


def test_share_values_equal_integer_arithmetic_at_the_largest_sizes():
    n = threshold = 200
    coefficients = shamir.uniform(threshold * 5).reshape(threshold, 5)
    got = shamir.evaluate(coefficients.astype(np.float64), [1, 7, n], shamir.P)
    for row, x in zip(got, [1, 7, n], strict=True):
        for column in range(5):
            expected = sum(int(c) * x**j for j, c in enumerate(coefficients[:, column])) % shamir.P
            assert row[column] == expected


def test_too_few_shares_give_another_secret():
    secret = np.full(4096, 7)
    shares = shamir.share(secret, 3, 5)
    wrong = shamir.interpolate([1, 2], shares[:2].astype(np.int64))[0]
    assert np.mean(wrong == 7) < 0.01


@pytest.mark.parametrize(("threshold", "n"), [(0, 3), (4, 3), (2, shamir.P)])
def test_thresholds_that_make_no_sense_are_refused(threshold, n):
    with pytest.raises(SecureSumError):
        shamir.share(np.zeros(1, np.int64), threshold, n)


def test_field_elements_are_uniform_and_nothing_is_folded_over():
    values = shamir.uniform(1 << 18)
    assert 0 <= values.min()
    assert values.max() < shamir.P
    # Reduction modulo P of 16-bit words would hit 0..14 twice as often.
    low = int((values < 15).sum())
    assert abs(low - 15 * values.size / shamir.P) < 7 * math.sqrt(15 * values.size / shamir.P)
    assert _chi_square(np.bincount(values * 64 // shamir.P, minlength=64), np.full(64, values.size / 64)) < 64 + 8 * 12


# ---- errors and public polynomials


def _chi_square(seen, expected) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def _binomial(count: int):
    """Expected histogram of -42..42, the tails beyond +-15 joined."""
    p = np.array([math.comb(84, 42 + v) / 2.0**84 for v in range(-42, 43)])
    return count * np.concatenate([[p[:27].sum()], p[27:58], [p[58:].sum()]])


def _histogram(x):
    return np.bincount(np.clip(x.reshape(-1), -16, 16) + 16, minlength=33)


def test_errors_are_centred_binomial_of_variance_21():
    x = lattice.small(lattice.Stream.fresh(), (64, N))
    # 32 degrees of freedom: mean 32, deviation 8; the limit is passed by chance once in 10^9.
    assert _chi_square(_histogram(x), _binomial(x.size)) < 110
    assert np.abs(x).max() <= params.HALF_BITS
    assert abs(np.mean(x[:, 1:] * x[:, :-1])) < 7 * 21 / math.sqrt(x.size)


def test_the_test_of_errors_sees_a_narrower_a_shifted_and_a_repeated_error():
    x = lattice.small(lattice.Stream.fresh(), (64, N))
    for false in (np.rint(x * 0.9).astype(np.int64), x + (np.arange(N) % 4 == 0), np.repeat(x[:, ::2], 2, axis=1)):
        shifted = _chi_square(_histogram(false), _binomial(false.size)) > 110
        repeated = abs(np.mean(false[:, 1:] * false[:, :-1])) > 7 * 21 / math.sqrt(false.size)
        assert shifted or repeated


def test_the_errors_of_an_opened_sum_have_the_variance_of_its_members(session, monkeypatch):
    def opens(excess: float) -> bool:
        monkeypatch.setattr(residuals, "EXCESS", excess)
        s = session("keysum", 4, length=10)
        try:
            s.sum(1, dict.fromkeys(s.names, np.zeros(10, np.int64)))
        except SecureSumError:
            return False
        return True

    assert opens(1.2)
    assert not opens(0.8)


def test_public_polynomials_equal_a_plain_reading_of_their_definition():
    session, round, nonce = "ab" * 32, 3, "n|1"
    got = lattice.PublicPolynomials(session, round, nonce).take(3)
    key = hashlib.sha256(f"fedveil/keysum/a/1|{session}|{round}|{nonce}".encode()).digest()
    raw = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 4 * N))
    words = (int.from_bytes(raw[i : i + 7], "little") for i in range(0, len(raw), 8))
    expected = [w for w in words if w < Q][: 3 * N]
    assert got.reshape(-1).tolist() == expected


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=10, deadline=None)
def test_public_polynomials_do_not_depend_on_how_they_are_read(pieces):
    one = lattice.PublicPolynomials("00" * 32, 0, "n")
    many = lattice.PublicPolynomials("00" * 32, 0, "n")
    assert np.array_equal(one.take(sum(pieces)), np.concatenate([many.take(k) for k in pieces]))


def test_public_polynomials_differ_by_session_round_and_nonce():
    heads = {
        lattice.PublicPolynomials(s, r, n).take(1)[0, :4].tobytes()
        for s in ("00" * 32, "01" * 32)
        for r in (0, 1)
        for n in ("a", "b")
    }
    assert len(heads) == 8


# ---- encoding and bytes


def _params(k: int, base: int, bits: int = 46) -> KeysumParams:
    return KeysumParams(bits, (Q - 1) >> bits, base, k, 1, -50.0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 3), (2, (1 << 23) - 1), (4, 2047), (1, (1 << 46) - 1)]), st.sampled_from([44, 46]), st.data()
)
def test_the_encoding_is_delta_times_m_modulo_q_for_any_integer(shape, bits, data):
    k, base = shape
    p = _params(k, base, bits)
    extreme = st.sampled_from([0, 1, -1, base // 2, -(base // 2), (1 << 62), -(1 << 62), (1 << 63) - 1])
    values = np.zeros((1, k, N), np.int64)
    for c in range(k):
        values[0, c, :3] = data.draw(st.lists(extreme | st.integers(-(1 << 62), 1 << 62), min_size=3, max_size=3))
    got = lattice.reduce(lattice.encode(values, p))
    for i in range(4):
        assert int(got[0, i]) == p.delta * sum(int(values[0, c, i]) * base**c for c in range(k)) % Q


def test_a_vector_comes_back_from_its_digits_at_both_ends():
    p = _params(3, 31)
    values = np.zeros((2, 3, N), np.int64)
    values[:, :, ::2], values[:, :, 1::3] = 15, -15
    shifted = values[:, 0] + values[:, 1] * 31 + values[:, 2] * 31**2 + lattice.message_offset(p)
    out = np.empty_like(values)
    lattice.unpack_values(shifted.astype(np.uint64), p, out)
    assert np.array_equal(out, values)
    with pytest.raises(SecureSumError, match="bound"):
        lattice.unpack_values(np.full((1, N), 31**3, np.uint64), p, out[:1])


def test_coefficients_take_seven_bytes_and_stay_inside_the_ring():
    c = np.arange(N, dtype=np.uint64)[None] * np.uint64(Q // N)
    c[0, -1] = Q - 1
    data = lattice.to_bytes(c)
    assert len(data) == 7 * N
    assert np.array_equal(lattice.from_bytes(data), c)
    c[0, 5] = Q
    with pytest.raises(WireError):
        lattice.from_bytes(lattice.to_bytes(c))


def _ciphertext_sum(session, monkeypatch, rows, encode=lattice.encode):
    """The sum of the ciphertexts of ``rows`` when secrets and errors are the same in every call."""
    count = iter(range(1000))
    monkeypatch.setattr(lattice.Stream, "fresh", staticmethod(lambda: lattice.Stream(next(count).to_bytes(32))))
    monkeypatch.setattr(lattice, "encode", encode)
    monkeypatch.setattr("secrets.token_hex", lambda size: "cd" * size)
    s = session("keysum", 3, length=N, bound=1 << 30)
    total = np.zeros((1, N), object)
    for name, row in zip(s.names, rows, strict=True):
        total += lattice.from_bytes(s.site(name).contribute(1, "n", row).buffers["ciphertext"])
    return total % Q


def test_what_is_opened_depends_on_the_sum_alone_not_on_its_split(session, monkeypatch):
    target = np.arange(N) - 2000
    even = [target, np.zeros(N, np.int64), np.zeros(N, np.int64)]
    wild = [target + (1 << 55), np.full(N, -(1 << 54)), np.full(N, -(1 << 54))]
    assert np.array_equal(_ciphertext_sum(session, monkeypatch, even), _ciphertext_sum(session, monkeypatch, wild))


def test_an_encoding_that_reduces_its_message_first_would_reveal_the_split(session, monkeypatch):
    real = lattice.encode

    def reduced(values, p):
        return real(values % (1 << p.plain_bits), p)

    target = np.arange(N) - 2000
    even = [target, np.zeros(N, np.int64), np.zeros(N, np.int64)]
    wild = [target + 5000, np.full(N, -2500), np.full(N, -2500)]
    first, second = (_ciphertext_sum(session, monkeypatch, rows, reduced) for rows in (even, wild))
    assert not np.array_equal(first, second)


# ---- parameters


def _spec(
    n=10, threshold=7, min_members=8, length=1 << 20, bound=1 << 20, rounds=1000, colluders=0, helpers=None
) -> Any:
    return SimpleNamespace(
        roster=SimpleNamespace(sites=range(n)),
        all_helpers=range(n if helpers is None else helpers),
        colluders=colluders,
        threshold=threshold,
        min_members=min_members,
        length=length,
        bound=bound,
        rounds=rounds,
    )


@pytest.mark.parametrize(
    ("bound", "k"),
    [
        (0, 4),
        (1447, 4),
        (1448, 3),
        ((1 << 22) - 1, 2),
        (1 << 22, 1),
        ((1 << 45) - 1, 1),
    ],
)
def test_as_many_values_per_coefficient_as_fit(bound, k):
    p = params.choose(_spec(bound=bound))
    assert p.per_coefficient == k
    assert p.base**k <= 1 << p.plain_bits
    assert k == 4 or p.base ** (k + 1) > 1 << p.plain_bits
    assert p.blocks * k * N >= 1 << 20
    assert p.delta << p.plain_bits == Q - 1


def test_upload_is_three_and_a_half_bytes_per_parameter():
    p = params.choose(_spec(bound=(1 << 22) - 1))
    assert p.ciphertext_bytes == 3.5 * (1 << 20)


@pytest.mark.parametrize(
    "change",
    [
        {"bound": 1 << 45},
        {"threshold": 1},
        {"threshold": 5},
        {"threshold": 11},
        {"min_members": 1},
        {"n": 1, "threshold": 1},
        {"n": 201, "threshold": 150},
        {"n": 200, "threshold": 150, "bound": (1 << 45) - 1},
    ],
)
def test_parameters_that_cannot_hold_are_refused(change):
    with pytest.raises(SecureSumError):
        params.choose(_spec(**change))


def test_many_sites_get_a_smaller_plaintext_modulus_and_keep_the_failure_bound():
    few, many = params.choose(_spec()), params.choose(_spec(n=200, threshold=150, length=1 << 26))
    assert (few.plain_bits, many.plain_bits) == (46, 45)
    assert few.failure_log2 < params.MAX_FAILURE_LOG2
    assert many.failure_log2 < params.MAX_FAILURE_LOG2


@pytest.mark.parametrize("n", [5, 20, 60])
def test_the_failure_bound_is_above_the_exact_tail(n):
    p = params.choose(_spec(n=n, threshold=n, length=1, bound=1, rounds=1))
    half, bits = p.delta // 2 - 1, 2 * params.HALF_BITS * n
    tail = sum(math.comb(bits, bits // 2 + e) for e in range(half, bits // 2 + 1)) if half <= bits // 2 else 0
    exact = math.log2(2 * tail) - bits + math.log2(N) + 1 if tail else -math.inf
    assert exact < p.failure_log2
    assert n == 5 or p.failure_log2 < exact / 2


@pytest.mark.parametrize("bits", [44, 45])
def test_the_smaller_plaintext_moduli_open_sums_too(session, monkeypatch, bits):
    real = params.choose
    small = lambda spec: KeysumParams(bits, (Q - 1) >> bits, 3, 4, real(spec).blocks, -50.0)  # noqa: E731
    monkeypatch.setattr(keysum_site, "choose", small)
    monkeypatch.setattr(keysum_server, "choose", small)
    s = session("keysum", 3, length=30, bound=1)
    rows = np.array([[1, -1, 0], [-1, 0, 1], [1, 0, 0]]).repeat(10, axis=1)
    got, _ = s.sum(1, dict(zip(s.names, rows, strict=True)))
    assert np.array_equal(got, rows.sum(0))


@pytest.mark.parametrize(
    "change", [{"bound": 1 << 30}, {"min_members": 1}, {"n": 4096, "rounds": 1 << 30, "bound": 1 << 31}]
)
def test_shared_key_sums_that_would_not_be_exact_are_refused(change):
    params.check_sharedkey(_spec(bound=(1 << 30) - 1))
    with pytest.raises(SecureSumError):
        params.check_sharedkey(_spec(**change))
