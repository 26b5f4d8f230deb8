"""The sum of keys in chunks over threads: the same bytes for any number of threads, and at every border of a chunk."""

from __future__ import annotations

import secrets
import threading

import numpy as np
import pytest

from fedveil.common import threads
from fedveil.common.wire import sha256
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import lattice, verification
from fedveil.privacy.secagg.keysum_opening import Opening
from fedveil.privacy.secagg.params import N, Q, choose

CHUNK = 2  # blocks, of two values a coefficient
BOUND = (1 << 22) - 1
BORDERS = [1, 2 * N * CHUNK - 1, 2 * N * CHUNK, 2 * N * CHUNK + 1, 2 * N * CHUNK * 3 + 5]


def fixed_streams(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Keys by number instead of the operating system's; returns who drew each."""
    drawn: list[threading.Thread] = []

    def fresh() -> lattice.Stream:
        drawn.append(threading.current_thread())
        return lattice.Stream(len(drawn).to_bytes(32))

    monkeypatch.setattr(lattice.Stream, "fresh", staticmethod(fresh))
    return drawn


@pytest.mark.parametrize("reveal_to", ["server", "sites"])
@pytest.mark.parametrize("length", BORDERS)
def test_the_ciphertext_does_not_depend_on_the_number_of_threads(session, monkeypatch, length, reveal_to) -> None:
    monkeypatch.setattr(lattice, "CHUNK", CHUNK)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "ab" * size)
    s = session("keysum", 2, length=length, bound=BOUND, reveal_to=reveal_to, min_members=2)
    values = np.arange(length, dtype=np.int64) * 7919 % 4001 - 2000
    seen = set[bytes]()
    for i, count in enumerate((1, 2, 3)):
        monkeypatch.setattr(threads, "_count", [count])
        drawn = fixed_streams(monkeypatch)
        data, digest = s.site(s.names[i % 2])._encrypt(1, "n", values, lattice.small(lattice.Stream(bytes(32)), (N,)))
        if reveal_to == "server":  # a blinding is its site's own
            seen.add(data)
        assert digest == sha256(data)
        assert len(drawn) == -(-choose(s.spec).blocks // CHUNK)
        assert set(drawn) == {threading.main_thread()}, "keys are drawn in order, not by whoever comes first"
    assert len(seen) == (1 if reveal_to == "server" else 0)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_the_ciphertext_without_its_errors_does_not_depend_on_the_chunk(session, monkeypatch, chunk) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda size: "ab" * size)
    s = session("keysum", 2, length=BORDERS[-1], bound=BOUND)
    secret, values = lattice.small(lattice.Stream(bytes(32)), (N,)), np.arange(BORDERS[-1]) % 99 - 40
    monkeypatch.setattr(lattice, "small", lambda stream, shape: np.zeros(shape, np.int64))
    whole, _ = s.site(s.names[0])._encrypt(1, "n", values, secret)
    monkeypatch.setattr(lattice, "CHUNK", chunk)
    monkeypatch.setattr(threads, "_count", [2])
    assert s.site(s.names[0])._encrypt(1, "n", values.astype(np.int32), secret)[0] == whole


def test_chunks_have_errors_of_their_own_and_would_share_them_under_one_key(session, monkeypatch) -> None:
    monkeypatch.setattr(lattice, "CHUNK", 1)
    s = session("keysum", 2, length=4 * N, bound=BOUND)
    zeros = np.zeros(4 * N, np.int64)
    drawn: list[np.ndarray] = []
    small = lattice.small
    monkeypatch.setattr(lattice, "small", lambda *given: drawn.append(small(*given)) or drawn[-1])
    s.site(s.names[0])._encrypt(1, "n", zeros, zeros[:N] + 1)
    assert len(drawn) == 2
    assert (drawn[0] == drawn[1]).mean() < 0.2
    monkeypatch.setattr(lattice.Stream, "fresh", staticmethod(lambda: lattice.Stream(bytes(32))))  # negative control
    s.site(s.names[0])._encrypt(1, "n", zeros, zeros[:N] + 1)
    assert np.array_equal(drawn[2], drawn[3])


@pytest.mark.parametrize("count", [1, 3])
def test_a_failure_within_a_chunk_is_the_contributions_and_nothing_is_kept(session, monkeypatch, count) -> None:
    monkeypatch.setattr(lattice, "CHUNK", 1)
    monkeypatch.setattr(threads, "_count", [count])
    s = session("keysum", 2, length=20 * N, bound=BOUND)
    site, calls = s.site(s.names[0]), iter(range(100))
    encode = lattice.encode

    def failing(*given):
        if next(calls) == 4:
            raise MemoryError("no room")
        return encode(*given)

    with monkeypatch.context() as m:
        m.setattr(lattice, "encode", failing)
        with pytest.raises(MemoryError, match="no room"):
            site.contribute(1, "n", np.ones(20 * N, np.int64))
    assert not [t for t in threading.enumerate() if t.name.startswith("fedveil-pieces")]
    assert site.replay(1) is None
    assert site.contribute(1, "n", np.ones(20 * N, np.int64)).buffers["ciphertext"]


@pytest.mark.parametrize("reveal_to", ["server", "sites"])
@pytest.mark.parametrize("length", BORDERS)
def test_a_sum_opens_and_verifies_to_the_same_bytes_for_any_number_of_threads(session, monkeypatch, length, reveal_to):
    monkeypatch.setattr(lattice, "CHUNK", CHUNK)
    s = session("keysum", 3, length=length, bound=BOUND, reveal_to=reveal_to)
    values = {name: np.arange(length, dtype=np.int64) * (i + 1) % 997 - 400 for i, name in enumerate(s.names)}
    opened = s.sum(1, values)
    packet = s.server.opened()
    expected = sum(values.values())
    if reveal_to == "server":
        assert np.array_equal(opened[0], expected)
    opening, group = Opening.parse(s.spec, packet), s.site(s.names[0])._group
    ciphertexts = [s.site(name).replay(1).buffers["ciphertext"] for name in s.names]
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "_count", [count])
        blinds = group.streams(s.spec.session, 1, opening.nonce, tuple(opening.members)) if group else ()
        assert np.array_equal(verification.verify(s.spec, opening, blinds), expected)
        for name, data in zip(s.names, ciphertexts, strict=True):
            assert lattice.examined(data) == (sha256(data), True)
            challenge = opening.challenge(s.spec)
            assert fingerprints.of(challenge, data) == opening.members[name].fingerprint
            assert fingerprints.of_blocks(challenge, lattice.from_bytes(data)) == opening.members[name].fingerprint


@pytest.mark.parametrize("at", [0, N - 1, N, 5 * N - 1])
def test_one_coefficient_outside_the_ring_is_found_wherever_it_is(monkeypatch, at) -> None:
    monkeypatch.setattr(lattice, "CHUNK", CHUNK)
    x = np.full(5 * N, Q - 1, np.uint64)
    assert lattice.examined(lattice.to_bytes(x))[1]  # with the largest there are
    for value in (Q, Q + 1, (1 << 56) - 1):
        x[at] = value
        data = lattice.to_bytes(x)
        assert lattice.examined(data) == (sha256(data), False)
    x[at] = 0
    assert lattice.examined(lattice.to_bytes(x))[1]


def test_chunks_are_packed_in_any_order(monkeypatch) -> None:
    x = np.random.default_rng(3).integers(0, Q, (5, N), np.uint64)
    out = lattice.Packed(5)
    for part in (slice(3, 5), slice(0, 1), slice(1, 3)):
        with out.put(part.start, x[part]) as packed:
            assert bytes(packed) == lattice.to_bytes(x[part])
    assert out.value() == lattice.to_bytes(x) == b"".join(int(c).to_bytes(7, "little") for c in x.reshape(-1))
