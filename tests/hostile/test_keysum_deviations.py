"""Sites that deviate and messages that are cut, swapped or old, in the sum of keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedveil.common.errors import HelperRefusal, ProtocolError, SecureSumError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg import lattice, shamir
from fedveil.privacy.secagg.params import N

# ---- sites that deviate


def _open(world: Any) -> tuple[np.ndarray, tuple[SiteId, ...]]:
    world.server.start_round(1, "n")
    for s, p in world.packets.items():
        world.server.add(s, p)
    for s, request in world.server.agree_requests().items():
        world.server.add_agreement(s, world.sites[s].agree(request))
    for s, request in world.server.open_requests().items():
        world.server.add_answer(s, world.sites[s].open(request))
    return world.server.result()


@pytest.mark.parametrize("degree", [4, 5])
def test_a_key_shared_at_too_high_a_degree_spoils_the_round_and_opens_nothing(new_world, monkeypatch, degree):
    world = new_world(5, 0, 3, 3)
    real = shamir.share
    monkeypatch.setattr(shamir, "share", lambda s, t, n: real(s, degree, n))
    world.packets = {world.names[0]: world.sites[world.names[0]].contribute(1, "n", np.arange(6))}
    monkeypatch.undo()
    world.packets |= {s: world.sites[s].contribute(1, "n", np.arange(6)) for s in world.names[1:]}
    with pytest.raises(SecureSumError, match="wrong"):
        _open(world)


def test_a_key_shared_at_too_low_a_degree_harms_only_its_owner(new_world, monkeypatch):
    world = new_world(5, 0, 3, 3)
    real = shamir.share
    monkeypatch.setattr(shamir, "share", lambda s, t, n: real(s, 1, n))
    world.packets = {world.names[0]: world.sites[world.names[0]].contribute(1, "n", np.arange(6))}
    monkeypatch.undo()
    world.packets |= {s: world.sites[s].contribute(1, "n", np.arange(6)) for s in world.names[1:]}
    assert _open(world)[0].tolist() == [0, 5, 10, 15, 20, 25]


def test_garbage_as_a_ciphertext_spoils_the_round_and_is_seen(new_world):
    world = new_world(5, 0, 3, 3)
    world.contribute()
    name = world.names[2]
    data = lattice.to_bytes(lattice.Uniform(lattice.Stream.fresh()).take(1))
    packet = world.packets[name]
    # The boxes are bound to the ciphertext, so the site makes them anew; its share of everything else is in order.
    context = messages.box_context(1, "n", sha256(data))
    share = np.zeros(N, "<u2").tobytes()
    boxes = [world.sites[name]._session.seal(s, context, share) for s in world.names]
    header = {k: v for k, v in packet.header.items() if k != "signature"}
    header |= {"ciphertext": sha256(data), "shares": [sha256(b) for b in boxes]}
    false = Packet(messages.sign_header(world.keys[name], header), {"ciphertext": data, "shares": b"".join(boxes)})
    world.packets[name] = false
    world.stores[name].erase(f"{world.spec.session}-2-contribution-1")
    world.sites[name]._contributions.keep(2, false)  # not asked about the round again
    world.server.start_round(1, "n")
    for s, p in world.packets.items():
        world.server.add(s, p)
    requests = world.server.agree_requests()
    helpers = [s for s in world.names if s != name]
    for s in helpers:
        world.server.add_agreement(s, world.sites[s].agree(requests[s]))
    for s, request in world.server.open_requests().items():
        world.server.add_answer(s, world.sites[s].open(request))
    with pytest.raises(SecureSumError, match="wrong"):
        world.server.result()


def test_shares_outside_the_field_or_that_do_not_open_are_refused_by_the_helper(new_world):
    world = new_world(5, 0, 3, 3)
    name = world.names[0]
    for share in (np.full(N, 65535, "<u2").tobytes(), bytes(2 * N)):
        world = new_world(5, 0, 3, 3)
        world.contribute()
        packet = world.packets[name]
        bound = packet.header["ciphertext"] if share[0] else "0" * 64
        boxes = [world.sites[name]._session.seal(s, messages.box_context(1, "n", bound), share) for s in world.names]
        header = {k: v for k, v in packet.header.items() if k != "signature"} | {"shares": [sha256(b) for b in boxes]}
        world.packets[name] = Packet(
            messages.sign_header(world.keys[name], header), {**packet.buffers, "shares": b"".join(boxes)}
        )
        helper = world.names[1]
        agreements = {}
        for s in world.names[1:]:
            agreements[s] = world.sites[s].agree(world.announce(world.names)).header["signature"]
        with pytest.raises(HelperRefusal, match="outside the field|does not open"):
            world.sites[helper].open(world.ask(helper, world.names, agreements))


# ---- messages that were half sent, are oversize, or of an older label


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.999])
def test_half_a_message_is_no_contribution_and_the_whole_one_still_is(new_world, cut):
    world = new_world(5, 0, 3, 3)
    world.contribute()
    world.server.start_round(1, "n")
    name, packet = world.names[0], world.packets[world.names[0]]
    for part in packet.buffers:
        data = packet.buffers[part]
        for half in (data[: int(len(data) * cut)], data + data[:1], data * 3):
            with pytest.raises(ProtocolError):
                world.server.add(name, Packet(packet.header, {**packet.buffers, part: half}))
    fields = list(packet.header)
    for field in fields:
        with pytest.raises(ProtocolError):
            world.server.add(name, Packet({k: v for k, v in packet.header.items() if k != field}, packet.buffers))
    assert world.server.members == ()
    world.server.add(name, packet)
    assert world.server.members == (name,)


def test_a_site_that_crashed_half_way_made_no_contribution_and_makes_one(new_world, monkeypatch):
    world = new_world(3, 0, 2, 2)
    name = world.names[0]
    with monkeypatch.context() as m:
        m.setattr(messages, "sign_header", _crash)
        with pytest.raises(KeyboardInterrupt):
            world.sites[name].contribute(1, "n", np.arange(6))
    assert world.fresh(name).replay(1) is None
    world.contribute()
    assert _open(world)[0].tolist() == [0, 3, 6, 9, 12, 15]


def _crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_old_label_for_the_public_polynomials_is_refused_by_everybody(new_world):
    """A server that repeats a round's label would get two ciphertexts under the same public polynomials."""
    world = new_world(5, 0, 3, 3)
    world.contribute(3)
    site, name = world.sites[world.names[0]], world.names[0]
    for round, nonce in ((3, "m"), (2, "n")):
        if round == 2:
            with pytest.raises(HelperRefusal):
                site.agree(Packet({**world.announce(world.names, 3).header, "round": round}))
        else:
            with pytest.raises(SecureSumError):
                site.contribute(round, nonce, np.arange(6))
    world.server.start_round(4, "n")
    with pytest.raises(SecureSumError, match="round"):
        world.server.add(name, world.packets[name])
    with pytest.raises(SecureSumError, match="forward"):
        world.server.start_round(3, "n")


def test_rounds_that_are_swapped_in_flight_are_refused_on_both_sides(new_world):
    world = new_world(5, 0, 3, 3)
    world.contribute(1)
    one = dict(world.packets)
    world.contribute(2)
    two = dict(world.packets)
    world.server.start_round(2, "n")
    for s in world.names:
        with pytest.raises(SecureSumError, match="another round"):
            world.server.add(s, one[s])
        world.server.add(s, two[s])
    request = world.server.agree_requests()[world.names[0]]
    for round in (1, 3):
        with pytest.raises(HelperRefusal, match="another round"):
            world.sites[world.names[0]].agree(Packet({**request.header, "round": round}))


def test_a_wrong_roster_is_refused_even_if_every_name_is_on_it(new_world):
    world, other = new_world(5, 0, 3, 3), new_world(4, 0, 3, 3)
    world.contribute()
    other.contribute()
    request = world.announce(world.names)
    forged = {**request.header, "session": other.spec.session}
    for packet in (request, Packet(forged)):
        with pytest.raises(HelperRefusal):
            other.sites[other.names[0]].agree(packet)
