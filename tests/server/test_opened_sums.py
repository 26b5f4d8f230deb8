"""How far a site has come: what the server sends to those who are behind, and to one that lies about it."""

from __future__ import annotations

from pathlib import Path

from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg.opened_sum import MAX_SUMS
from fedveil.server.opened_sums import OpenedSums

ROUNDS, SITE = 4 * MAX_SUMS, SiteId("a")


def opened(folder: Path) -> OpenedSums:
    """A resumed run with so many small sums, behind which a site may be."""
    sums = OpenedSums(folder, "5e" * 32, {0: "00" * 32}, durable=False, resumed=True)
    for n in range(1, ROUNDS + 1):
        sums.add(n, Packet({"kind": "sum/opened", "round": n}, {"values": b"1234"}), f"{n:064x}")
    return sums


def shared(folder: Path, answer) -> list[int]:
    """How many sums each message to the site brought, which says of itself what ``answer`` gives."""
    sums, sent = opened(folder), list[int]()

    def ask(packets: dict[SiteId, Packet]) -> dict[SiteId, Packet]:
        brought = packets[SITE].header.get("sums", [])
        sent.append(len(brought))
        at = answer(len(sent), brought[-1]["round"] if brought else 0)
        return {SITE: Packet({"kind": "applied", "round": at, "state": ""})}

    sums.share([SITE], ask)
    return sent


def test_a_site_that_is_behind_gets_all_that_it_lacks(tmp_path) -> None:
    # the last message's worth comes with the next round's request
    assert shared(tmp_path, lambda turn, last: last) == [0, MAX_SUMS, MAX_SUMS, MAX_SUMS]


def test_a_site_that_says_it_moved_a_little_each_time_is_given_up(tmp_path) -> None:
    """Otherwise each such answer would fetch as many sums, or a whole state, again."""
    assert len(shared(tmp_path, lambda turn, last: turn)) == 3


def test_a_site_that_lost_its_state_once_begins_again(tmp_path) -> None:
    sent = shared(tmp_path, lambda turn, last: 0 if turn == 3 else last)
    assert sent == [0, *[MAX_SUMS] * 5]
