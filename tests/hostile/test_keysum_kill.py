"""kill -9 at any moment: afterwards a site promises what it promised before, and nothing else."""

from __future__ import annotations

import os
import secrets
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedveil.common.canonical import digest
from fedveil.common.errors import HelperRefusal, SecureSumError
from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import DirectoryStore

NAMES = [SiteId(f"s{i}") for i in range(4)]
KEYS = {name: new_signing_key() for name in NAMES}
LENGTH = 50_000


class World:
    """Four joined sites with their state on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        members = tuple(Member(n, public_hex(KEYS[n])) for n in NAMES)
        roster = Roster("kill", Member(SERVER, public_hex(new_signing_key())), members)
        self.spec = SumSpec("keysum", secrets.token_hex(32), "b" * 64, roster, 3, 3, LENGTH, 1000, 100)
        self.sites = {n: self.fresh(n) for n in NAMES}
        self.server = KeysumServer(self.spec)
        joins = {n: s.join_fields() for n, s in self.sites.items()}
        self.server.begin(joins, {n: s.begin(joins) for n, s in self.sites.items()})

    def fresh(self, name: SiteId) -> KeysumSite:
        """The site as a new process finds it."""
        return KeysumSite(self.spec, name, KEYS[name], DirectoryStore(self.path / name))

    def collect(self, round: int) -> tuple[Packet, Packet]:
        """A round's announcement, and one that leaves the last site out."""
        self.server.start_round(round, "n")
        for n in NAMES:
            self.server.add(n, self.sites[n].contribute(round, "n", np.ones(LENGTH, np.int64)))
        full = self.server.agree_requests()[NAMES[0]]
        return full, Packet({**full.header, "members": full.header["members"][:-1]})


def killed(act: Callable[[], Packet], after: float | None) -> str:
    """Run ``act`` in a process that is killed ``after`` seconds; what it had said by then: a digest, or nothing.

    None waits until it has said it.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            packet = act()
            os.write(write, _name(packet).encode())
            time.sleep(600)
        finally:
            os._exit(0)
    os.close(write)
    if after is None:
        select.select([read], [], [])
    else:
        time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = os.read(read, 64).decode()  # the writing end is closed: nothing, or all of it
    os.close(read)
    return said


def _name(packet: Packet) -> str:
    return digest([packet.header, {k: messages.canonical.sha256_hex(v) for k, v in packet.buffers.items()}])


DELAYS = [0.0, 0.002, 0.004, 0.006, 0.008, 0.012, 0.02, None]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_contribution_is_the_same_before_and_after_or_was_never_made(world):
    said = list[str]()
    for round, after in enumerate(DELAYS, 1):
        before = killed(lambda r=round: world.fresh(NAMES[0]).contribute(r, "n", np.zeros(LENGTH, np.int64)), after)
        said.append(before)
        again = world.fresh(NAMES[0])
        held = again.replay(round)
        if before:
            assert held is not None
            assert _name(held) == before
        packet = again.contribute(round, "n", np.ones(LENGTH, np.int64))
        assert held is None or packet == held
        with pytest.raises(SecureSumError, match="another nonce"):
            world.fresh(NAMES[0]).contribute(round, "m", np.ones(LENGTH, np.int64))
    assert said[-1]


def test_a_helper_that_signed_one_set_signs_no_other_after_it_was_killed(world):
    said = list[str]()
    for round, after in enumerate(DELAYS, 1):
        full, fewer = world.collect(round)
        said.append(killed(lambda p=full: world.fresh(NAMES[0]).agree(p), after))
        again = world.fresh(NAMES[0])
        if said[-1]:
            with pytest.raises(HelperRefusal, match="other members"):
                again.agree(fewer)
            assert _name(again.agree(full)) == said[-1]
        else:
            signed = sum(_signs(world, request) for request in (fewer, full))
            assert signed == 1
    assert said[-1]


def _signs(world: World, request: Packet) -> bool:
    try:
        world.fresh(NAMES[0]).agree(request)
    except HelperRefusal:
        return False
    return True


def test_an_answer_is_the_same_before_and_after(world):
    said = ""
    for round, after in enumerate((0.0, 0.003, None), 1):
        full, _ = world.collect(round)
        for n in NAMES:
            world.server.add_agreement(n, world.fresh(n).agree(full))
        request = world.server.open_requests()[NAMES[0]]
        said = killed(lambda p=request: world.fresh(NAMES[0]).open(p), after)
        answer = world.fresh(NAMES[0]).open(request)
        assert not said or _name(answer) == said
        assert world.fresh(NAMES[0]).open(request) == answer
    assert said
