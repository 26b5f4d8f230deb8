"""Faults found in other platforms' secure sums, as regression tests: each would show here.

Masks from a few bits of entropy (28 in one, a seeded generator in another); one scalar mask for all coefficients;
one secret at every site; differential-privacy noise that is dropped when secure aggregation is switched on.
"""

from __future__ import annotations

import math
import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.common import identity
from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab.virtual_sites import World as Consortium
from fedveil.deploy.lab.virtual_sites import make_site
from fedveil.privacy.joining import sum_spec
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.secagg import lattice, shamir
from fedveil.privacy.secagg.interface import ServerSum, SiteSum, SumSpec
from fedveil.privacy.secagg.params import N, Q
from fedveil.privacy.secagg.server import server_sum
from fedveil.privacy.secagg.sharedkey_site import SharedKeySite
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import MemoryStore
from fedveil.privacy.start import start

NAMES = [SiteId(f"s{i}") for i in range(3)]
KEYS = {name: new_signing_key() for name in NAMES}


class World:
    """Three joined sites."""

    def __init__(self, protocol: str = "keysum", length: int = N, reveal_to: str = "server") -> None:
        members = tuple(Member(n, public_hex(KEYS[n])) for n in NAMES)
        roster = Roster("faults", Member(SERVER, public_hex(new_signing_key())), members)
        session = secrets.token_hex(32)
        self.spec = SumSpec(protocol, session, "b" * 64, roster, 2, 2, length, 1 << 22, 200, 0, (), reveal_to)
        self.stores = {n: MemoryStore() for n in NAMES}
        self.sites = {n: site_sum(self.spec, n, KEYS[n], self.stores[n]) for n in NAMES}
        self.server: ServerSum = server_sum(self.spec)
        joins = {n: s.join_fields() for n, s in self.sites.items()}
        for n, packet in self.server.begin(joins, {n: s.begin(joins) for n, s in self.sites.items()}).items():
            self.sites[n].receive(packet)


# ---- entropy


def _bytes_asked(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> list[int]:
    asked = list[int]()
    real = os.urandom

    def urandom(size: int) -> bytes:
        asked.append(size)
        return real(size)

    with monkeypatch.context() as m:
        m.setattr(os, "urandom", urandom)
        act()
    return asked


def test_every_contribution_draws_its_keys_from_the_operating_system(monkeypatch):
    """256 bits for the secret, 256 for the errors, and a field element for every share that is not determined."""
    world = World()
    for round in (1, 2):
        asked = _bytes_asked(monkeypatch, lambda r=round: world.sites[NAMES[0]].contribute(r, "n", np.zeros(N, int)))
        assert asked[:2] == [32, 32]
        assert sum(asked[2:]) >= 2 * N * (world.spec.threshold - 1)


def test_seeded_generators_have_no_say(monkeypatch):
    """The same state of every seedable generator in the process, twice: nothing comes out alike."""
    dealt = list[bytes]()
    real = shamir.share
    monkeypatch.setattr(shamir, "share", lambda s, t, n: dealt.append(s.tobytes()) or real(s, t, n))
    ciphertexts = set[bytes]()
    for _ in range(3):
        random.seed(1)
        np.random.seed(1)
        world = World()
        ciphertexts.add(world.sites[NAMES[0]].contribute(1, "n", np.zeros(N, np.int64)).buffers["ciphertext"])
    assert len(set(dealt)) == len(ciphertexts) == 3


def test_two_hundred_keys_show_no_trace_of_a_small_seed_space():
    """With 28 bits of seed, 200 keys would be fine by eye; what is tested is that each key is a full-size draw."""
    keys = np.stack([lattice.small(lattice.Stream.fresh(), (N,)) for _ in range(200)])
    assert len({row.tobytes() for row in keys}) == 200
    # Any two keys agree where two independent draws agree by chance: the sum of squared probabilities, 0.0616.
    agree = [float(np.mean(keys[i] == keys[i + 1])) for i in range(0, 200, 2)]
    chance = sum((math.comb(84, k) / 2.0**84) ** 2 for k in range(85))
    assert abs(np.mean(agree) - chance) < 6 * math.sqrt(chance / (100 * N))


def test_a_forked_process_does_not_repeat_its_parents_stream():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, lattice.Stream.fresh().words(4).tobytes())
        finally:
            os._exit(0)
    mine = lattice.Stream.fresh().words(4).tobytes()
    os.waitpid(child, 0)
    theirs = os.read(read, 64)
    os.close(read)
    os.close(write)
    assert len(theirs) == 32
    assert mine != theirs


# ---- one mask for all coefficients


@pytest.mark.parametrize("reveal_to", ["server", "sites"])
def test_every_coefficient_has_a_mask_of_its_own(reveal_to):
    """A ciphertext of zeros and its neighbours' differences are uniform; a scalar mask makes the latter small."""
    world = World(length=16 * N, reveal_to=reveal_to)
    packet = world.sites[NAMES[0]].contribute(1, "n", np.zeros(16 * N, np.int64))
    c = lattice.from_bytes(packet.buffers["ciphertext"]).reshape(-1).astype(np.int64)
    for sample in (c, np.diff(c) % Q, (c[N:] - c[:-N]) % Q):
        assert _uniform(sample)
    scalar = (np.int64(123456789) + np.arange(c.size) % 7) % Q
    assert not _uniform(scalar)
    assert not _uniform(np.diff(scalar) % Q)


def _uniform(x: np.ndarray) -> bool:
    counts = np.bincount((x.astype(np.float64) * 64 / Q).astype(int), minlength=64)
    expected = x.size / 64
    # Differences of neighbours are not independent of each other: twice the spread of 63 degrees of freedom.
    return float(((counts - expected) ** 2 / expected).sum()) < 63 + 12 * math.sqrt(2 * 63)


# ---- one secret at every site


def test_what_one_site_stores_opens_no_other_sites_vector():
    """Nothing secret is common to two stores, and no key that a site can derive opens another's contribution."""
    world = World()
    for n in NAMES:
        world.sites[n].contribute(1, "n", np.arange(N))
    held = {n: set(world.stores[n]._data.values()) for n in NAMES}
    public = {b"spent", world.stores[NAMES[0]].get(f"{world.spec.session}-0-joins")}
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert held[NAMES[a]] & held[NAMES[b]] <= public


def test_the_shared_key_mode_does_have_that_fault_and_says_so():
    world = World("sharedkey", length=3)
    victim = world.sites[NAMES[1]].contribute(1, "n", np.array([5, -6, 7]))
    curious = world.sites[NAMES[2]]
    assert isinstance(curious, SharedKeySite)
    assert curious._engine().decrypt(victim.buffers["ciphertexts"], 3).tolist() == [5, -6, 7]
    assert "reads every site's vector" in str(SharedKeySite.__doc__)


# ---- noise that is dropped on the way into the secure sum


def _plan(sum_: str) -> PrivacyPlan:
    return make_plan(
        sum=sum_,  # type: ignore[arg-type]
        sites=4, records=400, epsilon=1.0, steps=4, clip=1.0, model=ModelSpec(name="logistic", inputs=2000, classes=2),
        optimizer=Optimizer(learning_rate=0.1), contract_hash="c" * 64,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["keysum", "sharedkey", "plain"])
def test_the_noise_of_the_plan_is_in_the_opened_sum_under_every_protocol(protocol, tmp_path: Path):
    """Sites without a single record, driven through the real line of a round: what is opened is their noise."""
    plan = _plan(protocol)
    world = Consortium.make(4)
    X, y = np.zeros((0, 2000), np.float32), np.zeros(0, np.int64)
    sites = [make_site(world.roster, i, world.keys[i], plan, X, y, tmp_path, cap=50.0) for i in range(4)]
    session = secrets.token_hex(32)
    request = {"kind": "join", "session": session, "plan": plan.to_json(), "roster_hash": world.roster.hash}
    request["contract_hash"] = plan.contract_hash
    statements = {s.id: line.join(s, Packet(request)).header["statement"] for s in sites}
    begin = Packet({"kind": "begin", "session": session, "joins": statements})
    replies = {s.id: line.begin(s, begin) for s in sites}
    server = server_sum(sum_spec(plan, session, world.roster))
    fields = {site: document["payload"]["fields"] for site, document in statements.items()}
    for site, packet in server.begin(fields, replies).items():
        _half(sites, site, session).receive(packet)
    header = {"kind": "contribute", "session": session, "round": 1, "plan_hash": plan.hash, "nonce": "n"}
    header["state"] = start(plan).digest
    server.start_round(1, "n", header["state"])
    for s in sites:
        server.add(s.id, line.contribute(s, Packet(header)))
    for site, packet in server.agree_requests().items():
        server.add_agreement(site, _half(sites, site, session).agree(packet))
    for site, packet in server.open_requests().items():
        server.add_answer(site, _half(sites, site, session).open(packet))
    opened, members = server.result()
    assert len(members) == 4
    ratio = float(np.mean(opened.astype(np.float64) ** 2)) / (4 * plan.share_std**2)
    # 4002 coordinates: the ratio's deviation is sqrt(2 / 4002) = 0.022. Without one site's share it would be 0.75.
    assert abs(ratio - 1) < 6 * math.sqrt(2 / opened.size)


def _half(sites: list[Any], site: SiteId, session: str) -> SiteSum:
    return next(s for s in sites if s.id == site).session(session).sum


def test_the_key_that_signs_is_not_one_that_decrypts():
    """A site's long-lived signing key opens nothing: boxes are sealed for keys of one session only."""
    world = World()
    joins = {n: s.join_fields()["x25519"] for n, s in world.sites.items()}
    again = {n: s.join_fields()["x25519"] for n, s in World().sites.items()}
    assert not set(joins.values()) & set(again.values())
    assert not set(joins.values()) & {identity.public_hex(k) for k in KEYS.values()}
