"""What can be seen of a run from its folder alone, and a small web server on loopback that shows it.

The monitor is a process of its own: it opens the run's files for reading, takes no lock, and knows no key, so that it
can neither disturb a run nor speak for one. It verifies nothing; its page says so, and names the command that does.

=============  ======================================================================================================
``/``          one page: rounds and their ε, sites, bytes; no script, nothing from elsewhere; reloads itself every 5 s
``/metrics``   the same figures as Prometheus text (exposition format 0.0.4)
``/healthz``   JSON; 200 while the run is waiting, running or has ended, 503 when it has stopped before its end
=============  ======================================================================================================
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, JournalError

STATES = ("waiting", "running", "ended", "stopped", "unreadable")
KEPT_ROUNDS = 2048  # for the curves and the table; the counters go over all of them
MAX_LINE = 1 << 20
MAX_PLAN = 1 << 22
_LOCKS = Path("/proc/locks")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's PROC_PID_INIT_INO: not in a container
_LOG = logging.getLogger("fedveil.monitor")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


class Tail:
    """The whole lines of a file that grows; read again from its start when it was replaced or cut."""

    def __init__(self, path: Path, restart: Callable[[], None]) -> None:
        self._path, self._restart = path, restart
        self._inode, self._offset = 0, 0

    def lines(self) -> Iterator[bytes]:
        """Every line that was completed since the last call, without its end.

        Raises:
            JournalError: the file cannot be read, or has a line of more than MAX_LINE bytes.
        """
        try:
            with self._path.open("rb") as f:
                found = os.fstat(f.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                    self._restart()
                f.seek(self._offset)
                while line := f.readline(MAX_LINE + 1):
                    if len(line) > MAX_LINE:
                        raise JournalError(f"{self._path} has a line of more than {MAX_LINE} bytes")
                    if not line.endswith(b"\n"):
                        break  # it is being written, or was torn by a crash
                    yield line[:-1]
                    self._offset += len(line)  # a line that its reader could not take is read again
        except FileNotFoundError:
            if self._inode:
                self._inode, self._offset = 0, 0
                self._restart()
        except OSError as e:
            raise JournalError(
                f"{self._path} cannot be read: {e.strerror}", hint="run this as the user who runs the server"
            ) from e


@dataclass
class Site:
    """One site as the server's journal shows it; ``refusals`` counts error classes."""

    rounds: int = 0
    last_round: int = 0
    refusals: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Health:
    """One of STATES, and whether a process holds the run's journal (None: unknown)."""

    status: str
    alive: bool | None = None

    @property
    def ok(self) -> bool:
        """False if somebody has to look after the run."""
        return self.status in STATES[:3]


class RunView:
    """A run folder, read incrementally: call :meth:`refresh`, then read the fields. Not for several threads at once.

    Attributes:
        plan: ``plan.json``, empty before the run began.
        name: the federation's name from ``config.json``; "" without one.
        engine, simulated, session: from ``run.open``.
        status: how the run ended; "" before.
        ended_metrics: the public test metrics of the final model.
        sites: by name, those that joined and those that were refused.
        applied, aborted: rounds.
        opened: the round under way; 0 between rounds.
        last_event: seconds since 1970 of the last journal row.
        rounds: the last KEPT_ROUNDS lines of ``metrics.jsonl``.
        sent, received, seconds: bytes to and from all sites, and the time that rounds took, over all lines.
        epsilon_opened: ε of all rounds up to the last one of ``metrics.jsonl``; this run charged no site more.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._journal = Tail(run / "journal.jsonl", self._forget_journal)
        self._metrics = Tail(run / "metrics.jsonl", self._forget_metrics)
        self.plan: dict[str, Any] = {}
        self.name = ""
        self._seen = False  # a server's lock was seen at least once
        self._forget_journal()
        self._forget_metrics()

    def _forget_journal(self) -> None:
        self.engine, self.session, self.status = "", "", ""
        self.simulated = False
        self.joined: list[str] = []
        self.sites: dict[str, Site] = {}
        self.applied = self.aborted = self.opened = self.last_event = self.resumed = 0
        self.ended_metrics: dict[str, float] = {}

    def _forget_metrics(self) -> None:
        self.rounds: deque[dict[str, Any]] = deque(maxlen=KEPT_ROUNDS)
        self.sent = self.received = 0
        self.seconds = self.epsilon_opened = 0.0

    def refresh(self) -> None:
        """Read what was written since the last time.

        Raises:
            JournalError: a file cannot be read or is not what a server writes.
        """
        try:
            self._read_documents()
            for line in self._journal.lines():
                self._row(canonical.loads(line))
            for line in self._metrics.lines():
                self._round(json.loads(line))
        except _MALFORMED as e:
            raise JournalError(f"a file of {self.run} is not what a server writes ({type(e).__name__})") from e

    def _read_documents(self) -> None:
        if not self.plan and (document := _document(self.run / "plan.json")):
            config = _document(self.run / "config.json")
            self.name = str(config.get("federation", {}).get("name", "")) if config else ""
            self.plan = document

    def _row(self, row: dict[str, Any]) -> None:
        kind, body = row["kind"], row["body"]
        self.last_event = int(row["at"])
        if kind == "run.open":
            self.engine, self.simulated, self.session = body["engine"], bool(body["simulated"]), body["session"]
        elif kind == "run.joined":
            self.joined = [str(s) for s in body["sites"]]
            for name in self.joined:
                self.sites.setdefault(name, Site())
        elif kind in ("site.refused", "join.refused"):
            self.sites.setdefault(str(body["site"]), Site()).refusals[str(body["code"])] += 1
        elif kind == "round.open":
            self.opened = int(body["round"])
        elif kind == "round.applied":
            self.applied, self.opened = self.applied + 1, 0
            for name in body["members"]:
                site = self.sites.setdefault(str(name), Site())
                site.rounds, site.last_round = site.rounds + 1, int(body["round"])
        elif kind == "round.aborted":
            self.aborted, self.opened = self.aborted + 1, 0
        elif kind == "run.resumed":
            self.resumed += 1
        elif kind == "run.end":
            self.status = str(body["status"])
            self.ended_metrics = {str(k): float(v) for k, v in body["metrics"].items()}

    def _round(self, line: dict[str, Any]) -> None:
        self.rounds.append(
            {
                "round": int(line["round"]),
                "epsilon_opened": float(line["epsilon_opened"]),
                "members": int(line["members"]),
                "metrics": {str(k): float(v) for k, v in line["metrics"].items()},
                "sent": int(line["bytes_sent"]),
                "received": int(line["bytes_received"]),
                "seconds": float(line["seconds"]),
            }
        )
        last = self.rounds[-1]
        self.sent, self.received = self.sent + last["sent"], self.received + last["received"]
        self.seconds, self.epsilon_opened = self.seconds + last["seconds"], last["epsilon_opened"]

    def health(self) -> Health:
        """Where the run stands; call :meth:`refresh` before."""
        if self.status:
            return Health("ended")
        if not self.session:
            return Health("waiting")
        alive = held(self.run / "journal.jsonl")
        if alive is False and not (self._seen or sees_every_process()):
            alive = None
        self._seen = self._seen or alive is True
        return Health("stopped" if alive is False else "running", alive)

    def quiet_for(self, now: float | None = None) -> float:
        """Seconds since the last row of the journal, by this machine's clock; 0 before the first one."""
        at = time.time() if now is None else now
        return max(0.0, at - self.last_event) if self.last_event else 0.0


def held(path: Path, locks: Path = _LOCKS) -> bool | None:
    """Whether a process that we can see holds a lock on ``path``, by the kernel's list; None where there is no list.

    Nothing is locked to find out: a lock of ours, however short, could stop a server that starts at that moment.
    Only inode numbers are compared, since some file systems show another device number there.
    """
    try:
        rows = [line.split() for line in locks.read_text().splitlines()]
        inode = str(path.stat().st_ino)
    except OSError:
        return None
    return any("FLOCK" in row and any(w.rpartition(":")[2] == inode and w.count(":") == 2 for w in row) for row in rows)


def sees_every_process(namespace: Path = _PID_NAMESPACE) -> bool:
    """False in a container, where the list of locks leaves out those of processes elsewhere."""
    try:
        return os.readlink(namespace) == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def _document(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; {} while it is not there or not whole."""
    try:
        with path.open("rb") as f:
            found = json.loads(f.read(MAX_PLAN))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def metrics_text(view: RunView, health: Health) -> str:
    """Prometheus text of what ``view`` shows: public figures only, each with HELP and TYPE."""
    out = _Exposition()
    p = view.plan
    labels = {"federation": view.name, "session": view.session[:12], "engine": view.engine}
    out.add("run_info", "gauge", "The run that the other figures are of.", 1, labels)
    for state in STATES:
        out.add("run_status", "gauge", "1 for where the run stands.", int(health.status == state), {"status": state})
    if health.alive is not None:
        out.add("server_alive", "gauge", "1 if a process holds the run's journal.", int(health.alive))
    out.add("last_event_timestamp_seconds", "gauge", "Time of the journal's last row.", view.last_event)
    if p:
        out.add("rounds_planned", "gauge", "Secure sums that the plan allows.", int(p["steps"]))
        out.add("epsilon_planned", "gauge", "Epsilon of the whole plan.", float(p["epsilon"]))
        out.add("delta", "gauge", "Delta of both epsilons.", float(p["delta"]))
        out.add("sites_planned", "gauge", "Sites of the plan.", int(p["sites"]))
    opened = "Epsilon of the rounds opened so far; this run charged no site more."
    out.add("epsilon_opened", "gauge", opened, view.epsilon_opened)
    out.add("rounds_total", "counter", "Rounds that are over.", view.applied, {"outcome": "applied"})
    out.add("rounds_total", "counter", "Rounds that are over.", view.aborted, {"outcome": "aborted"})
    out.add("server_resumed_total", "counter", "Times that a stopped server went on.", view.resumed)
    out.add("bytes_total", "counter", "Encoded messages of all rounds.", view.sent, {"direction": "to_sites"})
    out.add("bytes_total", "counter", "Encoded messages of all rounds.", view.received, {"direction": "from_sites"})
    out.add("round_seconds_total", "counter", "Time that rounds took.", view.seconds)
    for name, site in sorted(view.sites.items()):
        out.add("site_rounds_total", "counter", "Sums that a site was part of.", site.rounds, {"site": name})
        for code, count in sorted(site.refusals.items()):
            labels = {"site": name, "code": code}
            out.add("site_refusals_total", "counter", "Errors and refusals of a site, by class.", count, labels)
    for name, value in sorted((view.ended_metrics or _last_metrics(view)).items()):
        out.add("public_test_metric", "gauge", "The model on the public test table.", value, {"metric": name})
    return out.text()


def _last_metrics(view: RunView) -> dict[str, float]:
    return view.rounds[-1]["metrics"] if view.rounds else {}


class _Exposition:
    """Groups samples under their name, as the format wants it."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, help_: str, value: float, labels: dict[str, str] | None = None) -> None:
        name = f"fedveil_{name}"
        family = self._families.setdefault(name, [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"])
        inside = ",".join(f'{k}="{_escaped(v)}"' for k, v in (labels or {}).items())
        family.append(f"{name}{{{inside}}} {value!r}" if inside else f"{name} {value!r}")

    def text(self) -> str:
        return "".join(f"{line}\n" for family in self._families.values() for line in family)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def refreshed(view: RunView) -> Health:
    """Refresh and judge. If the folder cannot be read, the log says why."""
    try:
        view.refresh()
    except FedveilError as e:
        _LOG.error("%s", e)
        return Health("unreadable")
    return view.health()
