"""What a simulation keeps in its folder while it is not finished, so that it goes on after its process was killed.

Rule: state only moves forward. The server's journal, every opened sum and the state after it are written as they come.
The rows of all ledgers stand in one file, which is written before a sum of them is. So whatever was opened is charged
in what survives. A round that was charged but whose sum was not opened stays charged: a site that kept its answer
repeats it, every other one refuses, and then the round is lost. No step is drawn a second time. A round of which
nothing was written had reached nobody; it is run.

It survives the process, not a power cut: nothing waits for the disk. The folder ``resume`` also holds the virtual
sites' keys and records, mode 0600. It is removed when the run has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.errors import StoreError, UsageError
from fedveil.common.journal import Row, Unsigned, parse, unsigned, without_torn_end
from fedveil.common.units import SiteId
from fedveil.deploy.lab.kept_stores import Stores
from fedveil.deploy.lab.sites import Sites
from fedveil.deploy.lab.virtual_sites import LEDGERS, World
from fedveil.privacy import plan as plans
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.store import MemoryStore, Store
from fedveil.server import checkpoints

FOLDER, JOURNAL, SO_FAR = "resume", "journal.jsonl", "so-far"
STUDY = "study.json"  # in the folder of several seeds: what was asked for
_KEYS, _RECORDS, _ROWS, _ASKED, _STORES = "signing.keys", "records.npz", "rows.jsonl", "asked.json", "stores.log"
_KEY = 32
_MOST = 1 << 27  # bytes of a line of rows.jsonl


class Rows:
    """The rows of every site's ledger, in one file: see :class:`~fedveil.common.journal.RowLog`.

    A line holds one row's content, and whose it is. Nothing is signed in it: a ledger signs its rows again, with the
    same bytes, when it reads them.
    """

    def __init__(self, path: Path) -> None:
        self._before: dict[str, list[Unsigned]] = defaultdict(list)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._fd)
            raise UsageError(
                f"the run in {path.parents[1]} is under way in another process", hint="wait for it, or stop it first"
            ) from e
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            said = canonical.loads(line, limit=_MOST)
            row = unsigned(said["at"], said["kind"], said["body"])
            for owner in said["owners"]:
                self._before[owner].append(row)
        os.ftruncate(self._fd, whole)
        self._held: list[tuple[Unsigned, list[str]]] = []
        self._holding = False

    def before(self, owner: str) -> Iterable[Unsigned]:
        """The rows that ``owner`` noted before the process ended, in order."""
        return self._before.pop(owner, ())

    def note(self, owner: str, row: Unsigned) -> None:
        """Keep one more row: written when this returns, or at the end of :meth:`together`."""
        if self._held and self._held[-1][0] is row:
            self._held[-1][1].append(owner)
        else:
            self._held.append((row, [owner]))
        if not self._holding:
            self._write()

    @contextmanager
    def together(self) -> Iterator[None]:
        """The rows that are noted in this block are written at its end, those that are the same as one line."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            self._write()

    def _write(self) -> None:
        held, self._held = self._held, []
        lines = [{"at": r.at, "kind": r.kind, "body": r.body, "owners": owners} for r, owners in held]
        data = memoryview(b"".join(canonical.dumps(line) + b"\n" for line in lines))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as e:
            raise StoreError(f"{_ROWS} could not be written: {e.strerror}", hint="free disk space, then resume") from e

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)


@dataclass(frozen=True)
class Kept:
    """The open folder ``resume`` of a run.

    Attributes:
        run: the run's folder.
        plan: the run's.
        rows: the ledgers' rows.
        stores: of the sites.
        resumed: whether the run goes on.
        at: the last round whose sum was opened, and the state after it; None before the first.
    """

    run: Path
    plan: PrivacyPlan
    rows: Rows
    stores: Stores
    resumed: bool = False
    at: tuple[int, bytes] | None = None

    @classmethod
    def new(cls, run: Path, plan: PrivacyPlan, world: World, records: Sites, asked: dict[str, Any]) -> Kept:
        """Keep what a new run needs to go on; ``asked`` is how it is to be carried out."""
        folder = run / FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # of a run that never began
        folder.mkdir(mode=0o700, parents=True)
        keys = (world.consortium, world.server, *world.keys)
        identity.write_secret(folder / _KEYS, b"".join(k.private_bytes_raw() for k in keys))
        _save_records(folder / _RECORDS, records)
        (folder / _ASKED).write_bytes(canonical.dumps(asked))
        return cls(run, plan, Rows(folder / _ROWS), Stores(folder / _STORES))

    def stored(self, site: SiteId) -> Store:
        """What a site keeps of its session. Under ``plain`` it has no secret: all follows from the run's folder."""
        if self.plan.sum != "plain":
            return self.stores.of(site)
        store = MemoryStore()
        if self.resumed:
            store.put("plan", canonical.dumps(self.plan.to_json()))
        if self.at is not None:
            store.put(f"model-{self.at[0]}", self.at[1])
        return store

    def close(self) -> None:
        """Give the files back."""
        self.rows.close()
        self.stores.close()

    def remove(self) -> None:
        """The run has ended, or never began: forget keys, records and rows."""
        shutil.rmtree(self.run / FOLDER)
        shutil.rmtree(self.run / checkpoints.FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class Unfinished:
    """A run that can go on, as its folder says.

    Attributes:
        ended: only the report is missing.
    """

    kept: Kept
    config: dict[str, Any]
    world: World
    records: Sites
    asked: dict[str, Any]
    ended: bool


def find(run: Path, asked: dict[str, Any] | None = None) -> Unfinished:
    """The unfinished run in a folder, which is this process's until :meth:`Kept.close`.

    Args:
        asked: settings that must be those with which it began.

    Raises:
        UsageError: there is none, it has ended, it is under way or cannot go on, or it began with other settings.
        JournalError: its files were altered.
    """
    folder, rows = run / FOLDER, rows_of(run)
    kinds = {r.kind for r in rows}
    if "run.open" not in kinds:
        raise UsageError(f"{run} holds no run that began", hint="begin one: fedveil simulate --out FOLDER")
    if not (folder / _ASKED).exists():
        if ends := [r.body["status"] for r in rows if r.kind == "run.end"]:
            raise UsageError(
                f"the run in {run} has ended ({ends[-1]})",
                hint=f"fedveil.load({str(run)!r}) reads it; name a new folder with --out for another run",
            )
        raise UsageError(
            f"the run in {run} cannot go on: it is not a simulation of this version",
            hint="begin again in a new folder; a real server has 'fedveil server resume'",
        )  # fmt: skip
    how = canonical.loads((folder / _ASKED).read_bytes())
    config = json.loads((run / "config.json").read_text())
    refuse_changes(run, config, asked or {})
    opened = next(r.body for r in rows if r.kind == "run.open")
    if opened.get("debug_noise_seed") != config.get("debug_noise_seed"):
        raise UsageError(f"config.json of {run} was altered", hint="restore the file, or begin a new run")
    part = part_of(run, resumed=True)
    shutil.rmtree(run / LEDGERS, ignore_errors=True)  # they follow from the rows
    return Unfinished(part.kept, config, part.world, part.records, how, "run.end" in kinds)


class Part(NamedTuple):
    """What a process needs to speak for sites of a run: all, or those of one worker."""

    kept: Kept
    world: World
    records: Sites


def part_of(run: Path, name: str = "", *, resumed: bool = False) -> Part:
    """Open the files of a process, from its own beginning or after another one.

    Args:
        name: of the worker, in the names of its files; empty for a run in one process.
        resumed: whether the run goes on. A worker that finds rows goes on in any case.
    """
    folder = run / FOLDER
    plan = plans.from_json(canonical.loads((run / "plan.json").read_bytes()))
    raw = (folder / _KEYS).read_bytes()
    keys = [Ed25519PrivateKey.from_private_bytes(raw[i : i + _KEY]) for i in range(0, len(raw), _KEY)]
    pin = identity.public_hex(keys[0])
    roster = identity.open_roster(canonical.loads((run / "roster.json").read_bytes()), pin)
    applied = [r.body for r in rows_of(run) if r.kind == "round.applied"]
    at = None
    if applied and plan.sum == "plain":
        state = checkpoints.load(run / checkpoints.FOLDER, applied[-1]["checkpoint"])
        at = int(applied[-1]["round"]), state.data
    held = folder / _named(_ROWS, name)
    resumed = resumed or (held.exists() and held.stat().st_size > 0)
    kept = Kept(run, plan, Rows(held), Stores(folder / _named(_STORES, name)), resumed, at)
    return Part(kept, World(keys[0], keys[1], tuple(keys[2:]), roster), _load_records(folder / _RECORDS))


def _named(file: str, name: str) -> str:
    stem, dot, end = file.partition(".")
    return f"{stem}{name}{dot}{end}"


def rows_of(run: Path) -> list[Row]:
    """The server's journal of a run, not verified; no row where there is no journal."""
    path = run / JOURNAL
    return parse(without_torn_end(path.read_bytes())) if path.exists() else []


def refuse_changes(run: Path, held: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise :class:`UsageError` naming every setting that is not the one with which the run in ``run`` began."""
    as_json = json.loads(json.dumps(asked))
    if wrong := [f"{k} = {v!r} (the run has {held.get(k)!r})" for k, v in as_json.items() if held.get(k) != v]:
        raise UsageError(
            f"the run in {run} cannot go on with another config: {', '.join(wrong)[:400]}",
            hint="leave these settings out, or begin a new run with --out",
        )


def _save_records(path: Path, records: Sites) -> None:
    X, y = records.pooled()
    words = {f.name: getattr(records, f.name) for f in fields(Sites) if f.name not in _ARRAYS}
    arrays = {
        "X": X, "y": y, "sizes": np.array([len(part) for _, part in records.parts]), "X_test": records.X_test,
        "y_test": records.y_test, "words": np.frombuffer(json.dumps(words).encode(), np.uint8),
    }  # fmt: skip
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        np.savez(f, **arrays)


_ARRAYS = ("parts", "X_test", "y_test", "again")  # of Sites: what is no word


def _load_records(path: Path) -> Sites:
    with np.load(path, allow_pickle=False) as data:
        words = json.loads(data["words"].tobytes())
        ends = np.cumsum(data["sizes"])[:-1]
        parts = list(zip(np.split(data["X"], ends), np.split(data["y"], ends), strict=True))
        held = {k: tuple(v) if isinstance(v, list) else v for k, v in words.items()}
        return Sites(parts, data["X_test"], data["y_test"], **held)
