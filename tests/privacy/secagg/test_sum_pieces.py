"""The sum of keys in chunks over threads: the same bytes for any number of threads, and at every border of a chunk."""

from __future__ import annotations

import secrets
import threading

import numpy as np
import pytest

from fedveil.common import threads
from fedveil.common.wire import sha256
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.params import N, choose

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
