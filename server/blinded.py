"""The server's part if only the sites can read the sums: it keeps blinded sums and sends every site what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from fedveil.common import canonical
from fedveil.common.errors import JournalError
from fedveil.common.files import write_durably
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.joining import chained
from fedveil.server.job import Job

Ask = Callable[[dict[SiteId, Packet]], dict[SiteId, Packet]]


class BlindedSums:
    """The blinded sums of a run, in its folder, and how far each site has come.

    Args:
        folder: where they are kept; for a resumed run it holds those of the applied rounds.
        session: goes into every message.
        name: the chain's hash so far (the initial model's hash in a new run).
        rounds: the applied rounds, in order.
    """

    def __init__(self, folder: Path, session: str, name: str, rounds: Iterable[int]) -> None:
        self._folder, self._session, self.name = folder, session, name
        self._rounds = list(rounds)
        self._at: dict[SiteId, int] = {}

    def add(self, number: int, packet: Packet) -> str:
        """Keep the sum of one more round; returns the chain's new hash."""
        self.name = chained(self.name, packet)
        write_durably(self._folder / f"{number}.json", canonical.dumps(packet.header))
        write_durably(self._folder / f"{number}.bin", packet.buffers["blinded"])
        self._rounds.append(number)
        return self.name

    def share(self, sites: Iterable[SiteId], ask: Ask) -> None:
        """Ask every site where it stands and send it what it lacks. A site that does not answer is asked next time."""
        behind = {s for s in sites if self._at.get(s, -1) < (self._rounds[-1] if self._rounds else 0)}
        while behind:
            replies = ask({s: self._next(s) for s in behind})
            for site, reply in replies.items():
                before, at = self._at.get(site, -1), reply.header.get("round")
                if reply.header.get("kind") != "applied" or type(at) is not int or at not in (0, *self._rounds):
                    behind.discard(site)  # no answer at all; it is asked again next time
                    continue
                self._at[site] = at
                if self._at[site] <= before or self._missing(site) is None:
                    behind.discard(site)
            behind &= set(replies)

    def _next(self, site: SiteId) -> Packet:
        """The next sum that ``site`` lacks. If it is not known where the site stands: the question."""
        header = {"kind": "apply", "session": self._session}
        number = self._missing(site) if site in self._at else None
        if number is None:
            return Packet(header)
        try:
            inner = canonical.loads((self._folder / f"{number}.json").read_bytes())
            data = (self._folder / f"{number}.bin").read_bytes()
        except OSError as e:
            raise JournalError(f"the blinded sum of round {number} cannot be read") from e
        return Packet({**header, "packet": inner}, {"blinded": data})

    def _missing(self, site: SiteId) -> int | None:
        return next((r for r in self._rounds if r > self._at.get(site, -1)), None)


def blinded_sums(job: Job) -> BlindedSums:
    """The blinded sums of ``job``: none yet, or those whose rounds its journal calls applied before a restart."""
    applied = list(job.journal.of_kind("round.applied"))
    name = applied[-1].body["model_hash"] if applied else job.state.hash
    return BlindedSums(job.run / "blinded", job.session, str(name), (int(r.body["round"]) for r in applied))
