"""SEAL through its wrapper, and what a site keeps: known answers, no stray files, write-once, crashes."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fedveil.common.errors import SecureSumError, StoreError
from fedveil.privacy.secagg import _ring, _seal, lattice
from fedveil.privacy.secagg.params import N, Q
from fedveil.privacy.secagg.store import DirectoryStore, MemoryStore

# ---- SEAL


def test_seal_is_refused_when_a_product_a_layout_or_a_version_is_not_the_pinned_one(monkeypatch):
    made = _seal.Engine(46)
    _seal._self_test(made)
    with monkeypatch.context() as m:
        m.setattr(made, "multiply", lambda a, s: _seal.Engine.multiply(made, a, np.roll(s, 1)))
        with pytest.raises(SecureSumError, match="product"):
            _seal._self_test(made)
    with monkeypatch.context() as m:
        m.setattr(made, "inverse", lambda a: _seal.Engine.inverse(made, a[:, ::-1].copy()))
        with pytest.raises(SecureSumError, match="transform"):
            _seal._self_test(made)
    with monkeypatch.context() as m:
        m.setattr(made, "decrypt", lambda d, c0, c1: _seal.Engine.decrypt(made, d, c0, c1) ^ np.uint64(1))
        with pytest.raises(SecureSumError, match="decryption"):
            _seal._self_test(made)
    with monkeypatch.context() as m:
        m.setattr(_seal, "VERSION", "0.3.17")
        _seal._tenseal.cache_clear()
        with pytest.raises(SecureSumError, match="exactly"):
            _seal.Engine(46)
    _seal._tenseal.cache_clear()


def test_an_opening_that_seal_decrypts_otherwise_is_refused(session, monkeypatch):
    s = session("keysum", 3, length=10)
    real = _seal.Engine.decrypt
    monkeypatch.setattr(_seal.Engine, "decrypt", lambda e, d, c0, c1: real(e, d, c0, c1) ^ np.uint64(4))
    with pytest.raises(SecureSumError, match="SEAL's decryption differs"):
        s.sum(1, dict.fromkeys(s.names, np.zeros(10, np.int64)))


@pytest.mark.parametrize("blocks", [1, 2, 15, 16, 17, 33])
def test_products_and_sums_of_any_number_of_blocks(blocks):
    e = _seal.engine(46)
    a = lattice.PublicPolynomials("00" * 32, 0, "n").take(blocks)
    s = np.zeros(N, np.int64)
    s[1] = -2
    p = e.inverse(a)
    expected = np.concatenate([-p[:, -1:].astype(object), p[:, :-1].astype(object)], axis=1) * -2 % Q
    assert np.array_equal(e.multiply(a, s), expected)
    total = np.zeros_like(p)
    for part in (p, p, a):
        e.add_into(total, part)
    assert np.array_equal(total, (2 * p.astype(object) + a) % Q)


def test_two_contributions_that_cancel_do_not_stop_the_sum():
    e = _seal.engine(46)
    a = lattice.PublicPolynomials("00" * 32, 0, "n").take(17)
    total = a.copy()
    e.add_into(total, np.uint64(Q) - a)
    assert not total.any()


def test_the_ring_takes_what_seal_can_read_and_nothing_else():
    e, s = _seal.engine(46), np.ones(N, np.int64)
    a = lattice.PublicPolynomials("00" * 32, 0, "n").take(4)
    strided = np.repeat(a, 2, axis=0)[::2]
    assert not strided.flags.c_contiguous
    assert np.array_equal(e.multiply(strided, s), e.multiply(a, s))
    assert np.array_equal(e.inverse(strided), e.inverse(a))
    for wrong in (a[0], a[:, :-1], a[None]):
        with pytest.raises(SecureSumError, match="shape"):
            e.multiply(wrong, s)
        with pytest.raises(SecureSumError, match="shape"):
            e.inverse(wrong)
    for total, part in ((a.copy(), a[:3]), (strided, a), (cast(Any, a.astype(np.int64)), a)):
        with pytest.raises(SecureSumError, match="cannot be added"):
            e.add_into(total, part)


def test_a_library_without_seals_functions_is_refused():
    with pytest.raises(SecureSumError, match="lacks a function"):
        _ring.Ring(ctypes.CDLL(None))


def test_no_key_and_no_plaintext_passes_a_file_outside_the_store(session, monkeypatch, tmp_path):
    """Every path SEAL reads or writes is an anonymous memory file; Python itself writes below the store only."""
    engine = _seal.engine(46)
    real, paths, written, active = engine._sa, [], [], [True]

    def recording(name):
        base = getattr(real, name)

        def save(self, path):
            paths.append(path)
            base.save(self, path)

        def load(self, context, path):
            paths.append(path)
            base.load(self, context, path)

        return type(name, (base,), {"save": save, "load": load})

    recorded = {n: recording(n) for n in ("Ciphertext", "Plaintext", "SecretKey")}
    monkeypatch.setattr(engine, "_sa", SimpleNamespace(**{**vars(real), **recorded}))

    def hook(event, args):
        if active and event == "open" and isinstance(args[0], str | bytes) and args[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(os.fsdecode(args[0]))

    sys.addaudithook(hook)
    s = session("keysum", 3, length=N, stores={f"site-{i}": DirectoryStore(tmp_path / f"site-{i}") for i in range(3)})
    s.sum(1, dict.fromkeys(s.names, np.ones(N, np.int64)))
    active.clear()
    assert len(paths) >= 4
    assert all(p.startswith("/proc/self/fd/") for p in paths)
    assert written
    assert all(p.startswith(str(tmp_path)) for p in written)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files
    assert {p.stat().st_mode & 0o777 for p in files} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o700}
    # What is at rest and secret is the X25519 key alone.
    kinds = {"-".join(p.name.split("-")[2:]) for p in files}
    assert kinds == {"x25519", "joins", "contribution-1", "spent-1", "agreed-1", "answer-1", "fingerprint-1"}


# ---- the store


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_a_store_writes_once(kind, tmp_path):
    store = MemoryStore() if kind == "memory" else DirectoryStore(tmp_path / "s")
    assert store.get("a") is None
    store.put("a", b"1")
    store.put("a", b"1")
    with pytest.raises(SecureSumError, match="other bytes"):
        store.put("a", b"2")
    assert store.get("a") == b"1"
    store.erase("a")
    store.erase("a")
    assert store.get("a") is None
    store.put("a", b"2")
    for name in ("", "../x", "A", "a/b", ".a", "a" * 161):
        with pytest.raises(SecureSumError, match="name"):
            store.put(name, b"")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path / "s")

    def fail(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match="No space"):
            store.put("a", b"1")
    assert list((tmp_path / "s").iterdir()) == []
    store.put("a", b"2")
    assert DirectoryStore(tmp_path / "s").get("a") == b"2"


def test_erasing_also_removes_what_a_crash_left_of_a_write(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path / "s")

    def die(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "link", die)
        m.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)
        with pytest.raises(KeyboardInterrupt):
            store.put("key", b"secret")
    (left,) = (tmp_path / "s").iterdir()
    assert left.read_bytes() == b"secret"
    assert store.get("key") is None
    store.put("keys", b"another name")
    store.erase("key")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["keys"]


def test_a_crash_between_the_two_marks_of_a_contribution_does_not_free_the_round(session):
    s = session("keysum", 2, length=2)
    name, store = s.names[0], s.stores[s.names[0]]
    first = s.site(name).contribute(1, "n", np.array([1, 2]))
    store.erase(f"{s.spec.session}-0-spent-1")
    again = s.fresh(name)
    assert again.contribute(1, "n", np.array([5, 5])) == first
    again.contribute(2, "n", np.array([1, 2]))
    with pytest.raises(SecureSumError, match="over"):
        s.fresh(name).contribute(1, "n", np.array([5, 5]))


def test_a_damaged_store_is_an_error_not_a_second_contribution(session):
    s = session("keysum", 2, length=2)
    name, store = s.names[0], s.stores[s.names[0]]
    s.site(name).contribute(1, "n", np.array([1, 2]))
    entry = f"{s.spec.session}-0-contribution-1"
    for damaged in (store.get(entry)[:-1], b"", b"\xff" * 50):
        store.erase(entry)
        store.put(entry, damaged)
        with pytest.raises(SecureSumError, match="damaged"):
            s.fresh(name).contribute(1, "n", np.array([5, 5]))


def test_names_are_listed_by_prefix_and_unfinished_writes_are_not(tmp_path):
    for store in (MemoryStore(), DirectoryStore(tmp_path / "s")):
        for name in ("a-2", "a-10", "b-1"):
            store.put(name, b"x")
        if isinstance(store, DirectoryStore):
            (tmp_path / "s" / ".a-3.0123456789abcdef").write_bytes(b"half")
        assert store.names("a-") == ["a-10", "a-2"]
        assert store.names("") == ["a-10", "a-2", "b-1"]
        assert store.names("c") == []


# ---- what stays on disk


def _contributions(stores) -> set[str]:
    return {n for store in stores.values() for n in store.names("") if "-contribution-" in n}


@pytest.mark.parametrize("protocol", ["keysum", "sharedkey"])
@pytest.mark.parametrize("restart", ["never", "before the end", "in between"])
def test_no_contribution_outlives_its_session(session, tmp_path, protocol, restart):
    stores = {f"site-{i}": DirectoryStore(tmp_path / str(i)) for i in range(3)}
    s = session(protocol, 3, threshold=2, stores=stores, restart=restart == "in between")
    for round in (3, 5):
        s.sum(round, dict.fromkeys(s.names, np.ones(10, np.int64)))
        assert {n.rsplit("-", 1)[1] for n in _contributions(stores)} == {str(round)}
    for name in s.names:
        site = s.site(name) if restart == "never" else s.fresh(name)
        site.end()
        site.end()
    assert not _contributions(stores)
    assert all(any("-spent-5" in n for n in store.names("")) for store in stores.values())


def test_what_a_crash_left_of_an_older_round_or_of_an_ended_session_is_dropped_when_the_site_starts_again(session):
    s = session("keysum", 2)
    name = s.names[0]
    store = s.stores[name]
    s.collect(2, {name: np.ones(10, np.int64)})
    [kept] = store.names(f"{s.spec.session}-0-contribution-")
    data = store.get(kept)
    store.put(kept[:-1] + "1", data)  # the newer one was kept, the older one not yet dropped
    again = s.fresh(name)
    assert _contributions({name: store}) == {kept}
    assert again.replay(2) is not None
    with pytest.raises(SecureSumError, match="is over"):
        again.contribute(1, "n", np.ones(10, np.int64))
    again.end()
    store.put(kept, data)  # the session was ended, the contribution not yet dropped
    s.fresh(name)
    assert not _contributions({name: store})


@pytest.mark.parametrize("protocol", ["keysum", "sharedkey", "plain", "none"])
@pytest.mark.parametrize("length", [1, 10, 2 * N + 1, 20 * N])
def test_an_int32_vector_gives_the_sum_of_the_int64_one(session, protocol, length):
    s = session(protocol, 3, threshold=2, length=length)
    draw = np.random.default_rng(length)
    wide = {n: draw.integers(-300, 301, length) for n in s.names}
    narrow = {s.names[0]: wide[s.names[0]], s.names[1]: wide[s.names[1]].astype(np.int32)}
    narrow[s.names[2]] = np.repeat(wide[s.names[2]].astype(np.int32), 2)[::2]
    given = {n: v.copy() for n, v in narrow.items()}
    opened, _ = s.sum(1, narrow)
    assert opened.dtype == np.int64
    assert np.array_equal(opened, sum(wide.values()))
    assert all(np.array_equal(narrow[n], given[n]) for n in s.names)


@pytest.mark.parametrize("kind", [np.int16, np.uint32, np.uint64, np.float32, np.bool_, ">i4"])
def test_vectors_of_other_types_are_refused(session, kind):
    s = session("keysum", 2)
    s.server.start_round(1, "n")
    with pytest.raises(SecureSumError, match="int64 or int32"):
        s.site(s.names[0]).contribute(1, "n", np.ones(10, kind))
