"""Attacks on the sum of keys that would open one update, each shown to work where its defence is taken away."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedveil.common.errors import HelperRefusal, SecureSumError
from fedveil.common.journal import Head
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg import lattice, shamir
from fedveil.privacy.secagg.params import N, Q, choose
from fedveil.privacy.secagg.rollback import check_head
from fedveil.privacy.secagg.store import MemoryStore

# ---- helpers that are shown different sets: A, A and B together, B


def _sets(world: Any) -> tuple[list[SiteId], list[SiteId], list[SiteId]]:
    """A and B differ in the two victims only; the adversary knows its own sites' keys."""
    first, second = world.honest[:2]
    return [first, *world.colluders], [first, second, *world.colluders], [second, *world.colluders]


def test_without_the_agreement_different_sets_open_a_small_key(new_world, monkeypatch):
    """n = 9, c = 4, T = 7: thirteen equations and two small keys. The step that is taken away is the agreement."""
    world = new_world(9, 4, 7, 5)
    secret = dict[SiteId, np.ndarray]()
    real = shamir.share

    def recording(s, threshold, n):
        secret[world.names[len(secret)]] = s.copy()
        return real(s, threshold, n)

    monkeypatch.setattr(shamir, "share", recording)
    world.contribute()
    a, both, b = _sets(world)
    # An order of showing for which the relation that is left has no second pair of small keys.
    shown = dict(zip(world.honest, (b, both, a, both, a), strict=True))
    victims = world.honest[:2]

    def answer(helper: SiteId, members: list[SiteId]) -> np.ndarray:
        """What the helper would return, less what the colluders dealt: they know that."""
        return sum((world.share_of(m, helper) for m in members if m in victims), np.zeros(N, np.int64)) % shamir.P

    # Unknown: two polynomials of degree 6 (14 numbers). Rows: the powers of the point, once for each victim.
    rows, right = [], []
    for helper in world.names:
        point = world.names.index(helper) + 1
        power = [pow(point, j, shamir.P) for j in range(7)]
        asked = [a, b] if helper in world.colluders else [shown[helper]]
        for members in asked:
            rows.append([p * (v in members) for v in victims for p in power])
            right.append(answer(helper, members))
    relation, known = _eliminate(np.array(rows, object), np.stack(right))
    # One relation x s_1 + y s_2 = known is left; keys are small, so the likeliest pair is nearly always the right one.
    x, y = relation
    size = np.arange(-18, 19)
    table = (x * size[:, None] + y * size[None, :]) % shamir.P
    chance = -(size[:, None] ** 2 + size[None, :] ** 2)
    hits = 0
    for i in range(300):
        where = np.where(table == known[i], chance, -10_000)
        best = np.unravel_index(np.argmax(where), where.shape)
        hits += size[best[0]] == secret[victims[0]][i] and size[best[1]] == secret[victims[1]][i]
    assert hits > 295


def _eliminate(rows: np.ndarray, right: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    """Gauss modulo P on the unknowns other than the two keys; what is left speaks of the keys alone."""
    keys = (0, 7)
    order = [c for c in range(rows.shape[1]) if c not in keys]
    rows, right = rows % shamir.P, right.astype(object)
    used = 0
    for column in order:
        pivot = next((r for r in range(used, len(rows)) if rows[r, column]), None)
        if pivot is None:
            continue
        rows[[used, pivot]], right[[used, pivot]] = rows[[pivot, used]], right[[pivot, used]]
        inverse = pow(int(rows[used, column]), -1, shamir.P)
        rows[used], right[used] = rows[used] * inverse % shamir.P, right[used] * inverse % shamir.P
        for r in range(len(rows)):
            if r != used and rows[r, column]:
                factor = rows[r, column]
                rows[r] = (rows[r] - factor * rows[used]) % shamir.P
                right[r] = (right[r] - factor * right[used]) % shamir.P
        used += 1
    left = next(r for r in range(used, len(rows)) if rows[r, keys[0]] or rows[r, keys[1]])
    return (int(rows[left, keys[0]]), int(rows[left, keys[1]])), right[left]


def test_with_the_agreement_at_most_one_of_the_sets_opens_however_the_helpers_are_split(new_world):
    world = new_world(9, 4, 7, 5)
    world.contribute()
    sets = _sets(world)
    requests = [world.announce(s) for s in sets]
    for split in itertools.product(range(3), repeat=5):
        assert sum(4 + split.count(i) >= 7 for i in range(3)) <= 1
    shown = dict(zip(world.honest, (0, 0, 1, 2, 2), strict=True))
    agreements = [dict[SiteId, str]() for _ in sets]
    for i, members in enumerate(sets):
        agreements[i] = {c: world.forge(c, world.digest(members)) for c in world.colluders}
    for helper, i in shown.items():
        agreements[i][helper] = world.sites[helper].agree(requests[i]).header["signature"]
        for other in {0, 1, 2} - {i}:
            for again in (world.sites[helper], world.fresh(helper)):
                with pytest.raises(HelperRefusal, match="other members"):
                    again.agree(requests[other])
    pooled = {s: sig for part in agreements for s, sig in part.items()}
    for helper, shown_set in shown.items():
        for i, members in enumerate(sets):
            for claimed in (agreements[i], pooled, {**pooled, **agreements[i]}):
                with pytest.raises(HelperRefusal):
                    world.sites[helper].open(world.ask(helper, members, claimed))
        assert len(agreements[shown_set]) < 7


def test_once_one_set_opened_the_same_helpers_open_no_other(new_world):
    world = new_world(9, 4, 7, 5)
    world.contribute()
    _, both, b = _sets(world)
    agreements = {c: world.forge(c, world.digest(both)) for c in world.colluders}
    for helper in world.honest[:3]:
        agreements[helper] = world.sites[helper].agree(world.announce(both)).header["signature"]
    for helper in world.honest[:3]:
        world.sites[helper].open(world.ask(helper, both, agreements))
        forged = {c: world.forge(c, world.digest(b)) for c in world.colluders}
        with pytest.raises(HelperRefusal):
            world.sites[helper].open(world.ask(helper, b, forged | agreements))
    # The two helpers that are left and the four colluders stay below T for any other set.
    others = {c: world.forge(c, world.digest(b)) for c in world.colluders}
    for helper in world.honest[3:]:
        others[helper] = world.sites[helper].agree(world.announce(b)).header["signature"]
    for helper in world.honest[3:]:
        with pytest.raises(HelperRefusal, match="threshold"):
            world.sites[helper].open(world.ask(helper, b, others))


@pytest.mark.parametrize("members", [[], [0], [0, 8], [0, 5, 6, 7]])
def test_a_set_of_one_or_of_one_and_colluders_below_the_minimum_is_never_signed(new_world, members):
    world = new_world(9, 4, 7, 5)
    world.contribute()
    for helper in world.honest:
        with pytest.raises(HelperRefusal, match="fewer"):
            world.sites[helper].agree(world.announce([world.names[i] for i in members]))


# ---- c colluding sites with the server


def test_everything_c_sites_and_the_server_hold_leaves_one_key_uniform_but_for_the_sum():
    """Exact, in a field of 5: n = 3, c = 1, T = 3, two honest members, one opened sum.

    The view: the colluder's shares of both keys and the answers of all helpers over the agreed set. Whatever it is,
    every value of the first key is left equally often.
    """
    prime, threshold = 5, 3
    polynomials = list(itertools.product(range(prime), repeat=threshold))
    shares = shamir.evaluate(np.array(polynomials, np.float64).T, (1, 2, 3), prime)  # (points, polynomials)
    views = Counter[tuple[int, ...]]()
    secrets_of = Counter[tuple[tuple[int, ...], int]]()
    for i, first in enumerate(polynomials):
        for j, _ in enumerate(polynomials):
            answers = tuple(int(v) for v in (shares[:, i] + shares[:, j]) % prime)
            view = (int(shares[2, i]), int(shares[2, j]), *answers)
            views[view] += 1
            secrets_of[view, first[0]] += 1
    assert len(views) == prime**4
    for view, count in views.items():
        assert all(secrets_of[view, s] * prime == count for s in range(prime))


def test_one_answer_too_few_leaves_every_update_possible(new_world):
    """T - 1 answers over any set, the colluders' own included: some missing answer leads to any sum of keys."""
    world = new_world(5, 2, 4, 3)
    world.contribute()
    known = np.stack([world.share_of(world.names[0], h) for h in (*world.colluders, world.names[1])])
    points = [world.names.index(h) + 1 for h in (*world.colluders, world.names[1])]
    for guess in (0, 3, -40):
        values = np.vstack([known, np.full((1, N), guess % shamir.P)])
        missing = shamir.interpolate([*points, 0], values, [1])
        back = shamir.interpolate([*points, 1], np.vstack([known, missing]))[0]
        assert (shamir.centred(back) == guess).all()


def test_colluders_and_the_server_open_no_single_site_by_any_request_they_can_write(new_world):
    world = new_world(5, 1, 4, 4)
    world.contribute()
    victim = world.names[0]
    single, full = [victim], world.names
    forged = {s: world.forge(world.colluders[0], world.digest(single)) for s in world.names}
    honest = {s: world.sites[s].agree(world.announce(full)).header["signature"] for s in world.honest}
    for helper in world.honest:
        for members in (single, [victim, *world.colluders], full[:4]):
            for agreements in (forged, honest, {**honest, world.colluders[0]: forged[victim]}):
                with pytest.raises(HelperRefusal):
                    world.sites[helper].open(world.ask(helper, members, agreements))
        # The digest of the honest set with the boxes of another: sizes and hashes give it away.
        request = world.ask(helper, full, honest)
        for shares in (request.buffers["shares"][: messages.BOX_BYTES], request.buffers["shares"][::-1]):
            with pytest.raises(HelperRefusal):
                world.sites[helper].open(Packet(request.header, {"shares": shares}))


# ---- a second plaintext under one key


def test_a_second_plaintext_under_one_key_would_give_the_difference_and_is_refused(new_world, monkeypatch):
    world = new_world(3, 0, 2, 2, length=N)
    values, other = np.zeros(N, np.int64), np.arange(N) % 900
    site = world.sites[world.names[0]]
    fixed = iter(range(100))
    monkeypatch.setattr(lattice.Stream, "fresh", staticmethod(lambda: lattice.Stream(bytes([next(fixed) % 2]) * 32)))
    first = site.contribute(1, "n", values)
    for again in (site, world.fresh(world.names[0])):
        assert again.contribute(1, "n", other) == first
        with pytest.raises(SecureSumError, match="another nonce"):
            again.contribute(1, "m", other)
    # What it would give: the same key, the same errors, so that the difference is delta times the difference of values.
    world.stores[world.names[0]] = MemoryStore()
    forgetful = world.fresh(world.names[0])
    forgetful._session = site._session
    second = forgetful.contribute(1, "n", other)
    a, b = (lattice.from_bytes(p.buffers["ciphertext"]).astype(object) for p in (second, first))
    assert np.array_equal((a - b)[0] % Q, choose(world.spec).delta * other.astype(object) % Q)


# ---- a helper that was restored from a backup


class Backup(MemoryStore):
    """A store whose state can be copied and put back, as a snapshot of a virtual machine is."""

    def copy(self) -> dict[str, bytes]:
        return dict(self._data)

    def restore(self, data: dict[str, bytes]) -> None:
        self._data = dict(data)


def test_a_helper_restored_from_a_backup_would_sign_a_second_set_and_its_journal_stops_it(new_world):
    world = new_world(5, 1, 4, 3)
    name = world.names[0]
    world.stores[name] = store = Backup()
    store.restore(world.sites[name]._store._data)  # type: ignore[attr-defined]
    world.sites[name] = world.fresh(name)
    world.contribute()
    before = store.copy()
    own = Head(3, "3" * 64)
    world.sites[name].agree(world.announce(world.names))
    peers = {s: Head(4, "4" * 64) for s in world.names[1:]}
    with pytest.raises(HelperRefusal, match="other members"):
        world.sites[name].agree(world.announce(world.names[:4]))

    store.restore(before)
    restored = world.fresh(name)
    with pytest.raises(HelperRefusal, match="back in time"):
        check_head(own, peers, need=2, hash_at=lambda rows: str(rows) * 64)
    with pytest.raises(HelperRefusal, match="copies|copy"):
        check_head(own, {}, need=2, hash_at=lambda rows: str(rows) * 64)
    restored.agree(world.announce(world.names[:4]))  # which is why the comparison comes first
