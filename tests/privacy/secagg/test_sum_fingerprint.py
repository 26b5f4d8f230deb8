"""Fingerprints: a known answer, linear whatever the length, exact at the edge of double precision, never equal."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.errors import WireError
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.params import N, Q

CHALLENGES = [c * 64 for c in "0af"]


def uniform(blocks: int) -> np.ndarray:
    return lattice.Uniform(lattice.Stream.fresh()).take(blocks)


def by_integers(challenge: str, x: np.ndarray) -> tuple[int, ...]:
    """The definition, in Python's integers."""
    weights = fingerprints.Weights(challenge)
    v = weights._v.T.astype(np.int64).astype(object)
    u = (weights._u.words(len(x) * fingerprints.ROWS) & fingerprints._MASK_56).reshape(-1, fingerprints.ROWS)
    return tuple(int(k) % Q for k in (u.astype(object) * x.astype(object).dot(v)).sum(0))


def test_q_is_prime():
    """The argument divides by differences modulo q. These bases decide for every number below 3.3 * 10^24."""
    assert fingerprints.Q == Q < 3 * 10**24
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        x, twos = pow(base, (Q - 1) >> 48, Q), 48  # q - 1 = 253 * 2^48
        assert (Q - 1) % (1 << twos) == 0
        seen = [x]
        while len(seen) < twos:
            seen.append(seen[-1] ** 2 % Q)
        assert x == 1 or Q - 1 in seen


def test_the_bound_of_the_soundness_error():
    row = 2.0**-fingerprints._V_BITS + 2.0**-55
    assert row**fingerprints.ROWS < 2.0**-129


@pytest.mark.parametrize("blocks", [1, lattice.CHUNK, lattice.CHUNK + 1])
def test_it_is_the_sum_that_its_definition_says(blocks):
    x = uniform(blocks)
    assert fingerprints.of(CHALLENGES[0], lattice.to_bytes(x)) == by_integers(CHALLENGES[0], x)


@pytest.mark.parametrize("value", [0, 1, Q - 1, 0xFFFFFFFFFFFF])
def test_doubles_are_exact_where_all_products_are_largest(value, monkeypatch):
    x = np.full((2, N), value, np.uint64)
    for sign in (-1, 1):

        class Extreme(fingerprints.Weights):
            def __init__(self, challenge: str, sign: int = sign) -> None:
                super().__init__(challenge)
                self._v = np.full((fingerprints.ROWS, N), sign * 2.0**25)

        monkeypatch.setattr(fingerprints, "Weights", Extreme)
        assert fingerprints.of(CHALLENGES[1], lattice.to_bytes(x)) == by_integers(CHALLENGES[1], x)
        monkeypatch.undo()


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.sampled_from(CHALLENGES), st.integers(2, 5),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_fingerprints_add_up_as_ciphertexts_do_however_they_are_cut(pieces, challenge, members):
    blocks = sum(pieces)
    parts = [uniform(blocks) for _ in range(members)]
    total = parts[0].copy()
    for part in parts[1:]:
        total = lattice.reduce((total + part).view(np.int64))
    found = [fingerprints.of(challenge, lattice.to_bytes(part)) for part in parts]
    weights, at = fingerprints.Weights(challenge), 0
    for piece in pieces:
        some = total[at : at + piece]
        weights.add(weights.part(some, weights.draw(len(some))))
        at += piece
    assert fingerprints.added(found) == weights.sums
    assert fingerprints.from_bytes(fingerprints.to_bytes(weights.sums)) == weights.sums


@given(st.integers(0, 3 * N - 1), st.integers(1, Q - 1), st.sampled_from(CHALLENGES))
@settings(max_examples=25, deadline=None)
def test_no_single_change_goes_unseen_in_any_row(at, by, challenge):
    x = uniform(3)
    before = fingerprints.of(challenge, lattice.to_bytes(x))
    x.reshape(-1)[at] = (int(x.reshape(-1)[at]) + by) % Q
    assert not [k for k, row in enumerate(fingerprints.of(challenge, lattice.to_bytes(x))) if row == before[k]]


def test_weights_follow_from_the_challenge_alone_and_the_two_kinds_differ():
    a, b, c = (fingerprints.Weights(x) for x in (CHALLENGES[0], CHALLENGES[0], CHALLENGES[1]))
    assert np.array_equal(a._v, b._v)
    assert not np.array_equal(a._v, c._v)
    assert (a._v.min(), a._v.max()) >= (-(2.0**25), 0)
    assert a._v.max() < 2.0**25
    assert len(np.unique(a._v)) > 0.99 * a._v.size
    assert not np.array_equal(fingerprints._stream("u", "x").words(8), fingerprints._stream("v", "x").words(8))


@pytest.mark.parametrize("data", [b"", bytes(34), bytes(36), b"\xff" * 35, None, "0" * 35, 7])
def test_garbage_is_no_fingerprint(data):
    with pytest.raises(WireError):
        fingerprints.from_bytes(data)


def test_a_ciphertext_outside_the_ring_has_none():
    with pytest.raises(WireError, match="outside the ring"):
        fingerprints.of(secrets.token_hex(32), b"\xff" * 7 * N)
