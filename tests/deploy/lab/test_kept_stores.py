"""The stores of all virtual sites in one file: what was put is there again, whatever byte the process ended at."""

from __future__ import annotations

import random
import stat

import pytest

from fedveil.common.errors import SecureSumError
from fedveil.common.units import SiteId
from fedveil.deploy.lab import kept_stores
from fedveil.deploy.lab.kept_stores import Stores

A, B = SiteId("site-0001"), SiteId("site-0002")


def contents(stores: Stores) -> dict[str, dict[str, bytes]]:
    return {s: {n: stores.of(s).get(n) or b"" for n in stores.of(s).names("")} for s in (A, B)}


def test_a_store_keeps_the_rules_of_every_store(tmp_path):
    stores = Stores(tmp_path / "s")
    a = stores.of(A)
    a.put("key", b"one", b"two")
    a.put("key", b"onetwo")
    with pytest.raises(SecureSumError, match="other bytes"):
        a.put("key", b"x")
    assert stores.of(B).get("key") is None
    a.erase("nothing")
    stores.close()
    assert contents(Stores(tmp_path / "s")) == {A: {"key": b"onetwo"}, B: {}}
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_every_cut_gives_a_state_that_was(tmp_path):
    """An oracle: a dictionary after every step. The file cut at any byte gives one of its states, never a later one."""
    path, rng = tmp_path / "s", random.Random(3)
    stores, held, states = Stores(path), {A: {}, B: {}}, [(0, {A: {}, B: {}})]
    for step in range(30):
        site, name = rng.choice((A, B)), f"n-{rng.randrange(4)}"
        if name in held[site]:
            stores.of(site).erase(name)
            del held[site][name]
        else:
            held[site][name] = bytes([step]) * rng.randrange(20) + b"\n{"
            stores.of(site).put(name, held[site][name])
        states.append((path.stat().st_size, {s: dict(h) for s, h in held.items()}))
    stores.close()
    data = path.read_bytes()
    for cut in range(0, len(data) + 1, 7):
        path.write_bytes(data[:cut])
        again = Stores(path)
        assert contents(again) == [state for size, state in states if size <= cut][-1]
        again.of(A).put("later", b"l")
        again.close()
        last = Stores(path)
        assert contents(last)[A]["later"] == b"l"
        last.close()


def test_the_file_is_written_anew_when_most_of_it_was_erased(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_stores, "_ROOM", 1000)
    stores = Stores(tmp_path / "s")
    stores.of(B).put("kept", b"k" * 50)
    for i in range(100):
        stores.of(A).put(f"n-{i}", bytes(100))
        if i:
            stores.of(A).erase(f"n-{i - 1}")
    assert (tmp_path / "s").stat().st_size < 5000  # 10,000 bytes of values alone were put
    stores.close()
    again = Stores(tmp_path / "s")
    assert contents(again) == {A: {"n-99": bytes(100)}, B: {"kept": b"k" * 50}}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
