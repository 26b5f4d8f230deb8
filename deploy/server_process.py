"""The server as a process: from ``federation.toml`` to a finished run with its report."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import ServerApp
from numpy.typing import NDArray

from fedveil.client.records.judge import quality
from fedveil.client.records.read import sources
from fedveil.client.records.read.sources import Rules
from fedveil.client.records.release import encode
from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common import contract as contracts
from fedveil.common.contract import DataContract
from fedveil.common.errors import BudgetExhausted, JournalError, RunAborted, TransportError
from fedveil.common.settings import Federation
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits
from fedveil.deploy.enrol.gate import Doorkeeper
from fedveil.deploy.enrol.provision import load_roster, load_tls
from fedveil.deploy.transport.grpc_grid import require_free, serve
from fedveil.privacy import plan as plans
from fedveil.privacy.anonymization import fixed
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.planning import plan_from_settings, warnings
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.report.render import render_report
from fedveil.server import job as jobs
from fedveil.server.app import make_app
from fedveil.server.evaluate import Evaluator
from fedveil.server.job import Job
from fedveil.server.strategy import SecureSumStrategy

DRAIN_S = 30.0
STOPPED = 128 + signal.SIGTERM
# The last row of a journal while the server waits for its sites: nothing is half done.
_WAITING = ("run.open", "run.resumed", "join.refused")
_A_RUN = "give the folder of a run; [federation] runs of federation.toml says where they are"
_LOG = logging.getLogger("fedveil.server")
Refusals = queue.SimpleQueue[tuple[SiteId, str]]
Carry = Callable[[Job, ServerApp, SecureSumStrategy, Refusals], None]


def public_table(path: Path, contract: DataContract) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A table that was declared public, encoded exactly as the sites encode theirs; no criteria apply to it."""
    # Pseudonyms of a public table are compared here and thrown away: any key will do.
    raw = sources.read(path, contract, rules=Rules(secret=os.urandom(32)))
    quality.assess(raw, contract).require()
    return encode.encode(fixed.recode(raw.columns, raw.rows, contract).table, contract)


def start(federation: Federation, run: Path, *, progress: jobs.Progress | None = None) -> Job:
    """Make the plan, open the run folder, serve until the run has ended; returns the ended job.

    Raises:
        FedveilError: the plan is refused, the port is in use, or the run could not begin or was aborted.
    """
    return begin(federation, run, lambda c, n: plan_from_settings(federation, c, n), progress=progress)


def begin(
    federation: Federation,
    run: Path,
    make: Callable[[DataContract, int], PrivacyPlan],
    *,
    attached: dict[str, bytes] | None = None,
    progress: jobs.Progress | None = None,
) -> Job:
    """:func:`start` with any plan: ``make`` is given the contract and the number of sites.

    Args:
        attached: buffers that go to every site with the weights.

    Raises:
        FedveilError: as for :func:`start`.
    """
    require_free(federation.federation.address)
    return conduct(new_job(federation, run, make, attached=attached, progress=progress), _over_grpc(federation))


def resume(federation: Federation, run: Path, *, progress: jobs.Progress | None = None) -> Job:
    """Go on with a run whose server stopped; see :func:`fedveil.server.job.resume`."""
    require_free(federation.federation.address)
    job = known_job(federation, run, progress=progress)
    job.progress("plan", {"warnings": warnings(job.plan)})
    return conduct(job, _over_grpc(federation))


def new_job(
    federation: Federation,
    run: Path,
    make: Callable[[DataContract, int], PrivacyPlan],
    *,
    attached: dict[str, bytes] | None = None,
    progress: jobs.Progress | None = None,
    engine: str = "grpc",
) -> Job:
    """Make the plan and open the run's folder, with everything an auditor will need; see :func:`begin`."""
    f = federation.federation
    roster = load_roster(f.identity)
    contract = contracts.load_signed(f.contract, _pin(f.identity))
    plan = make(contract, len(roster.sites))
    documents: dict[str, Any] = {
        "roster.json": json.loads((f.identity / "roster.json").read_text()),
        "consortium.pub": _pin(f.identity) + "\n",
        "contract.json": json.loads(f.contract.read_text()),
        "config.json": federation.model_dump(mode="json", exclude={"federation": {"identity", "contract", "runs"}}),
    }
    key = identity.load_signing_key(f.identity / "signing.key")
    options = _options(federation, contract, plan, progress)
    options["attached"] = attached or {}
    job = jobs.create(run, plan, roster, key, documents=documents, engine=engine, **options)
    job.progress("plan", {"warnings": warnings(plan)})
    return job


def known_job(federation: Federation, run: Path, *, progress: jobs.Progress | None = None) -> Job:
    """The job of a run's folder, taken up again.

    Raises:
        FedveilError: the folder holds no run, or one that cannot go on.
    """
    f = federation.federation
    roster = load_roster(f.identity)
    contract = contracts.load_signed(f.contract, _pin(f.identity))
    if not (run / "plan.json").exists():
        raise JournalError(f"{run} holds no run", hint=_A_RUN)
    plan = plans.from_json(canonical.loads((run / "plan.json").read_bytes()))
    key = identity.load_signing_key(f.identity / "signing.key")
    return jobs.resume(run, roster, key, **_options(federation, contract, plan, progress))


def _options(
    federation: Federation, contract: DataContract, plan: PrivacyPlan, progress: jobs.Progress | None
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "join_timeout": federation.run.join_timeout,
        "round_timeout": federation.run.round_timeout,
        "countersigned": True,
        "keep_ciphertexts": federation.run.keep_ciphertexts,
        "patience": federation.run.patience,
        "stop_metric": federation.run.stop_metric,
    }
    if federation.federation.public_test is not None and plan.task == "train":
        X, y = public_table(federation.federation.public_test, contract)
        options["evaluate"] = Evaluator(plan.network, X, y)
    return options | ({"progress": progress} if progress else {})


def _over_grpc(federation: Federation) -> Carry:
    def carry(job: Job, server: ServerApp, strategy: SecureSumStrategy, refusals: Refusals) -> None:
        f = federation.federation
        serve(
            server,
            address=f.address,
            tls=load_tls(f.identity),
            roster=job.roster,
            grace=federation.run.grace,
            limits=reply_limits(job.plan),
            gate=Doorkeeper(f.identity, kept=job.run.parent),
            report=lambda site, what: refusals.put((site, what)),
        )

    return carry


def conduct(job: Job, carry: Carry) -> Job:
    """Run the job from its first exchange to its rendered report.

    Args:
        carry: runs the ServerApp over a transport until it returns; what that transport refuses goes into the queue.

    Raises:
        FedveilError: from ``carry``; the run was aborted; the budget is spent.
    """
    flwr_adapter.quiet_flower()
    server, strategy = make_app(job)
    refusals: Refusals = queue.SimpleQueue()
    try:
        with _watched(job, refusals):
            carry(job, server, strategy, refusals)
    finally:
        job.journal.close()
    if not (job.run / REPORT).exists():  # it could not be offered to the sites; this raises the reason
        build_report(job.run, job.key)
    render_report(job.run / REPORT)
    if strategy.status == jobs.ABORTED:
        raise RunAborted(f"the run in {job.run} was aborted", hint="the last model and the report are in its folder")
    if strategy.status == jobs.EXHAUSTED:
        raise BudgetExhausted(f"the budget is spent; the last model is in {job.run}", hint="a normal ending")
    return job


def reply_limits(plan: PrivacyPlan) -> Limits:
    """The largest size of an honest site's reply: a contribution with its shares, or a ledger."""
    each = 80 if plan.sum == "sharedkey" else 8
    return Limits(buffers=(64 << 20) + each * plan.model.parameters + (16 << 10) * plan.sites)


@contextmanager
def _watched(job: Job, refusals: Refusals) -> Iterator[None]:
    """While inside: after every round, journal what the transport refused; on SIGTERM, stop when the round is over.

    A run that has ended is not stopped any more, unless its report takes longer than DRAIN_S seconds.

    A stop raises ``SystemExit(143)``, at most DRAIN_S seconds after the signal. The sites are told nothing and dial
    again; ``fedveil server resume`` goes on. The journal belongs to the app's thread, which is this one.
    """
    told, stopping = job.progress, threading.Event()

    def progress(kind: str, facts: dict[str, Any]) -> None:
        told(kind, facts)
        if kind == "end":
            return  # its journal is closed
        while not refusals.empty():
            site, what = refusals.get()
            body = {"session": job.session, "site": site, "code": TransportError.__name__, "reason": what}
            job.journal.append("site.refused", body)
        if stopping.is_set():
            raise SystemExit(STOPPED)

    def stop(number: int, _: object) -> None:
        # A row is on disk before it is in ``rows``. A signal may come between, so stop at once only in a sure wait.
        if number == signal.SIGALRM or not job.journal.rows or job.journal.rows[-1].kind in _WAITING:
            raise SystemExit(STOPPED)
        _LOG.warning("stopping when this round, or the report, is over; in %g seconds at most", DRAIN_S)
        stopping.set()
        signal.setitimer(signal.ITIMER_REAL, DRAIN_S)

    job.progress = progress
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def status(run: Path) -> dict[str, Any]:
    """Where a run stands, from its folder alone.

    Raises:
        JournalError: the folder holds no run.
    """
    metrics = run / "metrics.jsonl"
    try:
        plan = canonical.loads((run / "plan.json").read_bytes())
        # What follows the last end of line is being written, or was torn by a crash.
        rows = (run / "journal.jsonl").read_bytes().split(b"\n")[:-1]
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    except OSError as e:
        raise JournalError(f"{run} holds no run: {e.strerror}", hint=_A_RUN) from e
    last = canonical.loads(rows[-1]) if rows else {"kind": "", "body": {}}
    ended = last["kind"] == "run.end"
    return {
        "steps": plan["steps"],
        "round": json.loads(lines[-1])["round"] if lines else 0,
        "epsilon_opened": json.loads(lines[-1])["epsilon_opened"] if lines else 0.0,
        "status": last["body"]["status"] if ended else "RUNNING or stopped",
    }


def _pin(folder: Path) -> str:
    return (folder / "consortium.pub").read_text().strip()
