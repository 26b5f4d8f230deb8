"""One run at the server: its folder, its journal and its numbers, and how a run goes on after a crash."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical
from fedveil.common.errors import JournalError, WireError
from fedveil.common.files import write_durably
from fedveil.common.identity import SERVER, Roster
from fedveil.common.journal import Journal
from fedveil.common.workload.statistics import EVALUATED, StatsSpec
from fedveil.privacy import plan as plans
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report.states import START
from fedveil.privacy.start import start
from fedveil.server import checkpoints
from fedveil.server.evaluate import Evaluator

COMPLETED, EXHAUSTED, ABORTED, STOPPED = "COMPLETED", "BUDGET_EXHAUSTED", "ABORTED", "STOPPED_EARLY"
Progress = Callable[[str, dict[str, Any]], None]
_AS_IT_WAS = "restore the run's folder as it was, or start a new run"


def _silent(kind: str, facts: dict[str, Any]) -> None:
    """No progress shown."""


@dataclass
class Job:
    """Everything the server app needs.

    Attributes:
        run: the run's folder.
        session: 64 hexadecimal digits, fresh for every run.
        journal: the server's signed journal of this run, open.
        first_round, state, nonce: where to go on. ``nonce`` is set if a round was open at a crash.
        durable: False in the simulator: what is written survives the process, not a power cut (no fsync).
        attached: further buffers that go to every site in a round.
        debug_noise_seed: the noise of this simulation follows from it: the run is NOT PRIVATE, and says so everywhere.
        keep_ciphertexts: whether ``keysum`` keeps every contribution's ciphertext in the run's folder, for an auditor.
        patience, stop_metric: see :class:`fedveil.server.early_stop.EarlyStop`.
        countersigned: whether the report is written at the end of the run and sent to the sites for their signatures.
        stopped: the run ends before its next round, as ABORTED.
        progress: called for events (``joined``, ``round``, ``aborted``, ``end``) with their public numbers.
    """

    run: Path
    session: str
    plan: PrivacyPlan
    roster: Roster
    key: Ed25519PrivateKey
    journal: Journal
    state: ModelState
    evaluate: Evaluator | None = None
    first_round: int = 1
    nonce: str = ""
    joins: dict[str, Any] = field(default_factory=dict)
    join_timeout: float = 300.0
    round_timeout: float = 120.0
    durable: bool = True
    stopped: bool = False
    progress: Progress = _silent
    attached: dict[str, bytes] = field(default_factory=dict)
    countersigned: bool = False
    keep_ciphertexts: bool = False
    patience: int = 0
    stop_metric: str = "accuracy"
    debug_noise_seed: int | None = None

    def checkpoint(self) -> str:
        """Keep the state for a restart; returns its content hash."""
        return checkpoints.save(self.run / checkpoints.FOLDER, self.state, durable=self.durable)

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.debug_noise_seed is not None:
            line = {**line, "not_private": True}
        with (self.run / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(line, allow_nan=False) + "\n")


def create(
    run: Path,
    plan: PrivacyPlan,
    roster: Roster,
    key: Ed25519PrivateKey,
    *,
    documents: dict[str, Any],
    durable: bool = True,
    engine: str = "grpc",
    begun: ModelState | None = None,
    **options: Any,
) -> Job:
    """A new run in the new folder ``run``.

    Args:
        documents: file name -> JSON document or text to keep beside the journal (signed roster, signed contract).
        begun: where training starts, for an examination; None: the plan's public start.
        options: further fields of :class:`Job`.

    Raises:
        JournalError: the folder holds a run already.
    """
    if (run / "journal.jsonl").exists():
        raise JournalError(f"{run} holds a run already", hint="'fedveil server resume' goes on with it")
    run.mkdir(parents=True, exist_ok=True)
    state = begun or start(plan)
    documents = {"plan.json": plan.to_json(), **documents}
    for name, value in documents.items():
        (run / name).write_bytes(value.encode() if isinstance(value, str) else canonical.dumps(value))
    for name, data in options.get("attached", {}).items():
        write_durably(run / f"{name}.f32", data)
    (run / START).write_bytes(state.sent())
    session = secrets.token_hex(32)
    journal = Journal.open(run / "journal.jsonl", SERVER, key, sync=durable)
    body = {
        "session": session,
        "plan_hash": plan.hash,
        "roster_hash": roster.hash,
        "contract_hash": plan.contract_hash,
        "simulated": engine in ("inprocess", "ray"),
        "engine": engine,
        "model_hash": state.hash,
        "state": state.hash if plan.reveal_to == "sites" else state.digest,
    }
    job = Job(run, session, plan, roster, key, journal, state, durable=durable, **options)
    if job.debug_noise_seed is not None:
        body["debug_noise_seed"] = job.debug_noise_seed
    job.journal.append("run.open", {**body, "checkpoint": job.checkpoint()})
    return job


def resume(run: Path, roster: Roster, key: Ed25519PrivateKey, *, durable: bool = True, **options: Any) -> Job:
    """Go on with a run after its server stopped.

    A round that was open is asked for again under the same nonce. Every site then answers with the bytes that it
    kept, and charges nothing. Finished rounds are not touched.

    Raises:
        JournalError: no run, a finished run, or altered files.
    """
    path = run / "journal.jsonl"
    if not path.exists():
        raise JournalError(f"{run} holds no run", hint="give the folder of a run that began")
    journal = Journal.open(path, SERVER, key, sync=durable)
    try:
        return _resumed(run, roster, key, journal, durable=durable, **options)
    except BaseException:
        journal.close()
        raise


def _resumed(run: Path, roster: Roster, key: Ed25519PrivateKey, journal: Journal, **options: Any) -> Job:
    opened = next(journal.of_kind("run.open"), None)
    if opened is None or any(True for _ in journal.of_kind("run.end")):
        raise JournalError(f"the run in {run} has ended or never began", hint="start a new run")
    plan = plans.from_json(_document(run / "plan.json"))
    if plan.hash != opened.body["plan_hash"]:
        raise JournalError(f"{run / 'plan.json'} is not the plan this run was opened with", hint=_AS_IT_WAS)
    if roster.hash != opened.body["roster_hash"]:
        raise JournalError(f"the run in {run} was opened with another roster", hint="start a new run")
    last = opened
    first, nonce = 1, ""
    for row in journal.of_kind("round.open", "round.applied", "round.aborted"):
        if row.kind == "round.open":
            nonce = row.body["nonce"]
        else:
            first, nonce = int(row.body["round"]) + 1, ""
            last = row if row.kind == "round.applied" else last
    state = checkpoints.load(run / checkpoints.FOLDER, last.body["checkpoint"])
    job = Job(run, opened.body["session"], plan, roster, key, journal, state, first_round=first, nonce=nonce, **options)
    if isinstance(plan.model, StatsSpec) and plan.model.metric is not None:
        job.attached[EVALUATED] = (run / f"{EVALUATED}.f32").read_bytes()
    for row in journal.of_kind("run.joined"):
        job.joins = _document(run / "joins.json")
        if canonical.digest(job.joins) != row.body["joins_digest"]:
            raise JournalError(f"{run / 'joins.json'} is not the one that the journal names", hint=_AS_IT_WAS)
    _mend_metrics(run / "metrics.jsonl", first)
    journal.append("run.resumed", {"session": job.session, "round": first})
    return job


def _document(path: Path) -> Any:
    try:
        return canonical.loads(path.read_bytes())
    except (OSError, WireError) as e:
        raise JournalError(f"{path} is missing or damaged", hint=_AS_IT_WAS) from e


def _mend_metrics(path: Path, first: int) -> None:
    """Drop a line that a crash left unfinished, and lines of rounds that will be run again."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").split("\n")[:-1]
    kept = [line for line in lines if json.loads(line)["round"] < first]
    write_durably(path, "".join(f"{line}\n" for line in kept).encode())
