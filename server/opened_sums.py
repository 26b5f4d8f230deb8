"""The opened sums of a run, kept in its folder: every site steps its own model on them, and is sent what it lacks.

A site that lacks more sums than one message brings is sent the whole state instead, with the signed headers of the
last round whose members named it. Sums come where there are no such headers: contributions are not signed, only the
sites can read the sums, or fewer than t + d + 1 members were in the round.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedveil.common import canonical
from fedveil.common.errors import JournalError, WireError
from fedveil.common.files import write, write_durably
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.privacy.joining import chained
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.secagg.named_state import NAMED, WHOLE, pack
from fedveil.privacy.secagg.opened_sum import BUFFERS, FOLDER, MAX_SUMS, with_sums
from fedveil.server import checkpoints
from fedveil.server.job import Job

Ask = Callable[[dict[SiteId, Packet]], dict[SiteId, Packet]]
NAMED_FILE = "named.json"  # of a run's folder: the signed headers of the last round whose members are enough
_BYTES = 1 << 28  # of sums in one message; a single larger one goes alone
_HEADER_BYTES = Limits.header * 3 // 4  # of their members' names


class OpenedSums:
    """What was opened so far, and how far each site has come at least.

    Args:
        folder: where the sums are kept; for a resumed run it holds those of the applied rounds.
        session: goes into every message.
        states: the name of the model state after round 0 (the start) and after every applied round, in order.
        durable: False in the simulator (no fsync).
        resumed: it is not known where the sites stand.
        quorum: so many members must have named a state that is sent as a whole; 0: none is.
        whole: gives a state by its name; it is asked for that of the last round that was closed.
    """

    def __init__(
        self,
        folder: Path,
        session: str,
        states: dict[int, str],
        *,
        durable: bool,
        resumed: bool,
        quorum: int = 0,
        whole: Callable[[str], ModelState] | None = None,
    ) -> None:
        self._folder, self._session, self._states, self._durable = folder, session, states, durable
        self._numbers = list(states)  # of the rounds that were opened, 0 for the start
        self._unknown = -1 if resumed else 0
        self._quorum, self._whole = quorum, whole
        self._named: dict[str, Any] | None = self._read_named()
        self._at: dict[SiteId, int] = {}
        self._latest: tuple[int, Packet] | None = None

    @property
    def state(self) -> str:
        """The name of the model state after the last opened sum."""
        return self._states[self._last]

    def add(self, number: int, packet: Packet, state: str = "") -> str:
        """Keep the sum of one more round, on disk when this returns.

        Args:
            state: the state after it. Empty where the server does not know it: the chain of sums names it.

        Returns:
            The digest of the sum.
        """
        write(self._folder / f"{number}.json", canonical.dumps(packet.header), durable=self._durable)
        write(self._folder / f"{number}.bin", packet.buffers[BUFFERS[packet.kind]], durable=self._durable)
        before, self._latest = self.state, (number, packet)
        self._states[number] = state or chained(before, packet)
        self._numbers.append(number)
        return chained("", packet)

    def close(self, number: int, nonce: str, headers: Sequence[dict[str, Any]]) -> None:
        """Keep the signed headers of a round's members, which name the state before it; on disk when this returns.

        Nothing is kept in the simulator, where a state is not on disk either, nor of too few members.
        """
        if self._durable and self._whole is not None and 0 < self._quorum <= len(headers):
            self._named = pack(number, nonce, headers)
            write_durably(self._folder.parent / NAMED_FILE, canonical.dumps(self._named))

    def packets(
        self, sites: Iterable[SiteId], header: dict[str, Any], buffers: dict[str, bytes] | None = None
    ) -> dict[SiteId, Packet]:
        """A message for each site, with the sums that it may lack and the name of the state after them.

        Where not all fit, they are the latest. Sites that lack the same share one packet.
        """
        made: dict[int, Packet] = {}
        out: dict[SiteId, Packet] = {}
        for site in sites:
            at = max(self._at.get(site, self._unknown), 0)
            if at not in made:
                sums = [self._sum(n) for n in self._missing(at)[-self._fits :]]
                made[at] = with_sums({**header, "state": self.state}, buffers or {}, sums)
            out[site] = made[at]
        return out

    def share(self, sites: Iterable[SiteId], ask: Ask) -> None:
        """Ask the sites whose place is not known where they stand, and send what does not fit into one message.

        A site that does not answer is asked before the next round again.
        """
        fits = self._fits
        behind = {s for s in sites if self._far(s, fits)}
        stuck = set[SiteId]()
        while behind:
            sent = {s: self._next(self._at.get(s, self._unknown)) for s in behind}
            replies = ask({s: packet for s, (packet, _) in sent.items()})
            for site, reply in replies.items():
                at = reply.header.get("round")
                if reply.header.get("kind") != "applied" or type(at) is not int or at < 0:
                    behind.discard(site)
                    continue
                self._at[site] = at = max(n for n in self._states if n <= at)  # rounds without a sum may follow it
                if at < sent[site][1]:  # its state was lost: once more, from where it stands
                    (behind.discard if site in stuck else stuck.add)(site)
            behind = {s for s in behind & set(replies) if self._far(s, fits)}

    def reached(self, sites: Iterable[SiteId]) -> None:
        """These sites named the present state."""
        self._at.update(dict.fromkeys(sites, self._last))

    def lost(self, site: SiteId) -> None:
        """This site's state is not the one that it should have: it is asked again."""
        self._at[site] = -1

    @property
    def _last(self) -> int:
        return self._numbers[-1]

    @property
    def _fits(self) -> int:
        """How many sums go into one message: all of a run are of one size."""
        if not self._last:
            return MAX_SUMS
        packet = self._sum(self._last)
        size, named = sum(map(len, packet.buffers.values())), len(canonical.dumps(packet.header))
        return max(1, min(MAX_SUMS, _BYTES // size, _HEADER_BYTES // named))

    def _missing(self, at: int) -> list[int]:
        return self._numbers[bisect_right(self._numbers, at) :]

    def _far(self, site: SiteId, fits: int) -> bool:
        at = self._at.get(site, self._unknown)
        return at < 0 or len(self._numbers) - bisect_right(self._numbers, at) > fits

    def _next(self, at: int) -> tuple[Packet, int]:
        """A later state or the first sums after ``at``, and the round that they lead to.

        If it is not known where the site stands: the question.
        """
        header = {"kind": "apply", "session": self._session}
        if at < 0:
            return Packet(header), at
        if (brought := self._state_after(at)) is not None:
            named, state = brought
            packet = Packet({**header, "state": state.digest, "sums": [], NAMED: named}, {WHOLE: state.data})
            return packet, max(n for n in self._states if n < named["round"])
        numbers = self._missing(at)[: self._fits]
        sums = [self._sum(n) for n in numbers]
        return with_sums({**header, "state": self._states[numbers[-1]]}, {}, sums), numbers[-1]

    def _state_after(self, at: int) -> tuple[dict[str, Any], ModelState] | None:
        """The newest state that enough members named, with what they signed; None if it is not later than ``at``."""
        if self._named is None or self._whole is None or self._named["round"] - 1 <= at:
            return None
        name = self._named["members"][0]["state"]
        if name == self._states[max(n for n in self._states if n <= at)]:
            return None  # only rounds without a sum lie between
        try:
            state = self._whole(name)
        except JournalError:  # a checkpoint of long ago: since then, no round had enough members
            return None
        return (self._named, state) if state.length <= Limits().buffers else None

    def _read_named(self) -> dict[str, Any] | None:
        path = self._folder.parent / NAMED_FILE
        if not self._quorum or not path.exists():
            return None
        try:
            return canonical.loads(path.read_bytes())
        except (OSError, WireError) as e:
            raise JournalError(f"{path} is damaged", hint="remove it: sites that are late then get sums") from e

    def _sum(self, number: int) -> Packet:
        if self._latest is not None and number == self._latest[0]:
            return self._latest[1]
        try:
            header = canonical.loads((self._folder / f"{number}.json").read_bytes())
            packet = Packet(header, {BUFFERS[header["kind"]]: (self._folder / f"{number}.bin").read_bytes()})
        except OSError as e:
            raise JournalError(f"the opened sum of round {number} cannot be read", hint="restore the folder") from e
        if number == self._last:
            self._latest = number, packet
        return packet


def opened_sums(job: Job) -> OpenedSums:
    """The opened sums of ``job``: none yet, or those whose rounds its journal calls applied before a restart."""
    start = next(job.journal.of_kind("run.open"))
    applied = list(job.journal.of_kind("round.applied"))
    if not all("state" in row.body for row in (start, *applied)):
        raise JournalError(f"the run in {job.run} was begun by an older version", hint="begin a new run")
    states = {0: str(start.body["state"])} | {int(r.body["round"]): str(r.body["state"]) for r in applied}
    resumed = any(True for _ in job.journal.of_kind("run.resumed"))
    return OpenedSums(
        job.run / FOLDER, job.session, states, durable=job.durable, resumed=resumed,
        quorum=job.plan.quorum if job.plan.reveal_to == "server" else 0,
        whole=lambda name: checkpoints.load(job.run / checkpoints.FOLDER, name),
    )  # fmt: skip
