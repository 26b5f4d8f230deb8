"""The server as a process: from ``federation.toml`` to a finished run with its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.client.ingest import encode, quality, sources
from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common import contract as contracts
from fedveil.common.contract import DataContract
from fedveil.common.errors import BudgetExhausted, JournalError, RunAborted
from fedveil.common.settings import Federation
from fedveil.deploy.provision import load_roster, load_tls
from fedveil.deploy.transport.grpc_grid import serve
from fedveil.privacy import plan as plans
from fedveil.privacy.anonymization import fixed
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.planning import plan_from_settings
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.render import render_report
from fedveil.server import job as jobs
from fedveil.server.app import make_app
from fedveil.server.evaluate import Evaluator
from fedveil.server.job import Job


def public_table(path: Path, contract: DataContract) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A table that was declared public, encoded exactly as the sites encode theirs; no criteria apply to it."""
    raw = sources.read(path, contract)
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
    job = jobs.create(run, plan, roster, key, documents=documents, **options)
    return _serve(job, federation)


def resume(federation: Federation, run: Path, *, progress: jobs.Progress | None = None) -> Job:
    """Go on with a run whose server stopped; see :func:`fedveil.server.job.resume`."""
    f = federation.federation
    roster = load_roster(f.identity)
    contract = contracts.load_signed(f.contract, _pin(f.identity))
    if not (run / "plan.json").exists():
        raise JournalError(f"{run} holds no run")
    plan = plans.from_json(canonical.loads((run / "plan.json").read_bytes()))
    key = identity.load_signing_key(f.identity / "signing.key")
    return _serve(jobs.resume(run, roster, key, **_options(federation, contract, plan, progress)), federation)


def _options(
    federation: Federation, contract: DataContract, plan: PrivacyPlan, progress: jobs.Progress | None
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "join_timeout": federation.run.join_timeout,
        "round_timeout": federation.run.round_timeout,
    }
    if federation.federation.public_test is not None and plan.task == "train":
        X, y = public_table(federation.federation.public_test, contract)
        options["evaluate"] = Evaluator(plan.network, X, y)
    return options | ({"progress": progress} if progress else {})


def _serve(job: Job, federation: Federation) -> Job:
    flwr_adapter.quiet_flower()
    server, strategy = make_app(job)
    f = federation.federation
    try:
        serve(server, address=f.address, tls=load_tls(f.identity), roster=job.roster, grace=federation.run.grace)
    finally:
        job.journal.close()
    build_report(job.run, job.key)
    render_report(job.run / "report.json")
    if strategy.status == jobs.ABORTED:
        raise RunAborted(f"the run in {job.run} was aborted", hint="the last model and the report are in its folder")
    if strategy.status == jobs.EXHAUSTED:
        raise BudgetExhausted(f"the budget is spent; the last model is in {job.run}", hint="a normal ending")
    return job


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
        raise JournalError(f"{run} holds no run: {e.strerror}") from e
    last = canonical.loads(rows[-1]) if rows else {"kind": "", "body": {}}
    ended = last["kind"] == "run.end"
    return {
        "steps": plan["steps"],
        "round": json.loads(lines[-1])["round"] if lines else 0,
        "epsilon": json.loads(lines[-1])["epsilon"] if lines else 0.0,
        "status": last["body"]["status"] if ended else "RUNNING or stopped",
    }


def _pin(folder: Path) -> str:
    return (folder / "consortium.pub").read_text().strip()
