"""SEAL behind its wall, and what a site keeps: known answers, no stray files, write-once, crashes."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fedveil.common.errors import SecureSumError
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
    assert kinds == {"x25519", "joins", "contribution-1", "spent-1", "agreed-1", "answer-1"}


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
        with pytest.raises(SecureSumError, match="No space"):
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
