"""How a simulation is carried out: begun, gone on with, stopped, and what it leaves."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.client.app import make_app as client_app
from fedveil.common import flwr_adapter
from fedveil.common.errors import FedveilError, Interrupted, UsageError
from fedveil.deploy.lab import resuming, seeded_noise, virtual_sites, weights
from fedveil.deploy.lab.outcomes import Outcome
from fedveil.deploy.lab.resuming import JOURNAL, SO_FAR, Kept
from fedveil.deploy.lab.run import Run
from fedveil.privacy.planning import warnings
from fedveil.privacy.report.bundle import MODEL
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app
from fedveil.server.evaluate import Evaluator

if TYPE_CHECKING:
    from fedveil.common.units import SiteId
    from fedveil.deploy.lab.sites import Sites
    from fedveil.deploy.lab.virtual_sites import World
    from fedveil.privacy.plan import PrivacyPlan
    from fedveil.server.job import Job, Progress

_STOPPING = ("patience", "stop_metric")


@dataclass(frozen=True)
class _Task:
    """One simulation under way: its folder, settings, consortium, plan and records; how it is asked to be done."""

    out: Path
    config: dict[str, Any]
    world: World
    plan: PrivacyPlan
    records: Sites
    asked: dict[str, Any]
    kept: Kept

    @property
    def seed(self) -> int | None:
        return self.config.get("debug_noise_seed")

    @property
    def cap(self) -> float:
        return self.config["cap"] or self.plan.filter_epsilon()


def refuse_run(out: Path) -> None:
    """Raise :class:`UsageError` where ``out`` holds a run."""
    if (out / JOURNAL).exists():
        how = "go on with it by --resume" if (out / resuming.FOLDER).exists() else "read it with fedveil.load()"
        raise UsageError(f"{out} holds a run already", hint=f"{how}, or name a new folder with --out")


def make_folder(out: Path) -> None:
    """Make the folder of a new run; :class:`UsageError` where it holds one or cannot be made."""
    refuse_run(out)
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} holds other files", hint="name a new folder with --out: a run's folder is its own")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"no folder can be made at {out}: {e.strerror}", hint="name another folder with --out") from e


def begin(
    config: dict[str, Any],
    plan: PrivacyPlan,
    records: Sites,
    out: Path,
    asked: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Run ``plan`` over ``records`` into the new folder ``out``.

    Args:
        config: of the simulation, as ``config.json`` holds it.
        asked: ``report`` (whether to write it), ``engine`` (that computes the clipped sums).

    Raises:
        FedveilError: the run could not begin; nothing that is secret stays.
    """
    world = virtual_sites.World.make(len(records))
    if config["engine"] == "ray":
        from fedveil.deploy.lab.ray_sites import workers_for

        asked = asked | {"workers": workers_for(world)}
    kept = Kept.new(out, plan, world, records, asked)
    task = _Task(out, config, world, plan, records, asked, kept)
    options: dict[str, Any] = {"progress": progress} if progress else {}
    options |= {name: config[name] for name in _STOPPING}
    job = jobs.create(
        out, plan, world.roster, world.server, documents={**world.documents(), "config.json": config},
        durable=False, engine=config["engine"], debug_noise_seed=task.seed,
        evaluate=Evaluator(plan.network, records.X_test, records.y_test), **options,
    )  # fmt: skip
    try:
        return _carried_out(task, job)
    except FedveilError:
        if not job.joins:
            kept.remove()
        raise
    finally:
        job.journal.close()
        kept.close()


def go_on(found: resuming.Unfinished, *, progress: Progress | None = None, stopped: bool = False) -> Outcome:
    """Go on with a simulation that was killed or interrupted, to its end. See :mod:`fedveil.deploy.lab.resuming`.

    Args:
        found: what :func:`~fedveil.deploy.lab.resuming.find` gave.
        stopped: end it before its next round.

    Raises:
        FedveilError: its files were altered, or the run could not begin.
    """
    run, plan = found.kept.run, found.kept.plan
    task = _Task(run, found.config, found.world, plan, found.records, found.asked, found.kept)
    shutil.rmtree(run / SO_FAR, ignore_errors=True)
    try:
        if found.ended:
            _run_over_ray(task, None)
            return _finished(task, 0.0, {}, _sites(task))
        options: dict[str, Any] = {"progress": progress} if progress else {}
        options |= {name: found.config[name] for name in _STOPPING}
        evaluate = Evaluator(plan.network, found.records.X_test, found.records.y_test)
        job = jobs.resume(
            run, found.world.roster, found.world.server, durable=False, stopped=stopped, evaluate=evaluate,
            debug_noise_seed=task.seed, **options,
        )  # fmt: skip
        with closing(job.journal):
            return _carried_out(task, job)
    finally:
        found.kept.close()


def so_far(run: Path) -> Path:
    """What an interrupted run has given until now: a copy of it, in its folder, that ends here.

    The copy has a model, metrics and a report that verifies, as of a run that was ABORTED. The run itself can go on.
    """
    shutil.rmtree(run / SO_FAR, ignore_errors=True)
    shutil.copytree(run, run / SO_FAR, ignore=lambda folder, names: [SO_FAR] if Path(folder) == run else [])
    go_on(resuming.find(run / SO_FAR), stopped=True)
    return run / SO_FAR


@contextmanager
def stopping(progress: Progress, run: Path) -> Iterator[Progress]:
    """``progress`` for a run that ends with :class:`Interrupted` after the round in which SIGINT came.

    A second SIGINT ends the process at once. The run can go on in both cases.
    """
    import signal

    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before)
        progress("stopping", {})

    def told(kind: str, facts: dict[str, Any]) -> None:
        progress(kind, facts)
        if came and kind in ("joined", "round"):
            raise Interrupted(f"the run in {run} was stopped", hint=f"go on with: fedveil simulate --resume {run}")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield told
    finally:
        signal.signal(signal.SIGINT, before)


def _carried_out(task: _Task, job: Job) -> Outcome:
    flwr_adapter.quiet_flower()
    job.progress("plan", {"warnings": warnings(task.plan)})
    virtual_sites.fit_threads(task.plan.model.parameters)
    started = time.perf_counter()
    server, _ = server_app(job)
    looked_at: dict[str, float] = {}
    sites = _sites(task)
    here = not _run_over_ray(task, server)
    if here:
        _run_here(task, job, server, sites)
    if here and task.plan.reveal_to == "sites" and job.evaluate is not None:
        # Only the simulation can look into a site: its own model on the public table.
        looked_at = job.evaluate(sites.find(0).model(sites.find(0).session(job.session)).held.state.result)
    return _finished(task, time.perf_counter() - started, looked_at, sites)


def _sites(task: _Task) -> virtual_sites.Kept:
    return virtual_sites.Kept(
        lambda i: virtual_sites.make_site(
            task.world.roster, i, task.world.keys[i], task.plan, *task.records.parts[i], task.out, cap=task.cap,
            engine=task.asked["engine"], log=task.kept.rows, stored=task.kept.stored,
        )
    )  # fmt: skip


def _run_over_ray(task: _Task, server: Any) -> bool:
    """Run over a Ray cluster, if that is what was asked for; without a server, only have the ledgers written."""
    if task.config["engine"] != "ray":
        return False
    from fedveil.deploy.lab.ray_sites import Asked, run_over_ray

    asked = Asked(task.out.resolve(), task.cap, task.asked["engine"], task.seed, task.asked["workers"])
    run_over_ray(server, asked, task.world, task.plan)
    return True


def _run_here(task: _Task, job: Job, server: Any, sites: virtual_sites.Kept) -> None:
    from fedveil.deploy.lab import together
    from fedveil.deploy.transport.inprocess import InprocessGrid, run_on

    app, lost, names = client_app(sites.resolve), _losses(task.config["drop_rate"], task.seed), task.world.sites
    if task.seed is not None:
        node = {seeded_noise.SEED: task.seed}
        grid = InprocessGrid(seeded_noise.Seeded(app), names, lambda _: node, drop=_drops(lost))
    elif together.fits(task.plan):
        grid = together.TogetherGrid(app, names, sites.find, lost=lost, logged=task.kept.rows.together)
    else:
        grid = InprocessGrid(app, names, lambda _: {}, drop=_drops(lost))
    with virtual_sites.rare_collections():
        run_on(server, grid)


def _finished(task: _Task, seconds: float, looked_at: dict[str, float], sites: virtual_sites.Kept) -> Outcome:
    """Write what follows from the ended run, and forget what it was kept for."""
    if task.config["engine"] != "ray":  # whose workers have written them
        for index in range(task.plan.sites):
            sites.find(index)
        sites.close()
    end = next(row for row in resuming.rows_of(task.out) if row.kind == "run.end").body
    if (task.out / MODEL).exists():
        weights.write(task.out / weights.FILE, Run(task.out).model())
    if task.asked["report"]:
        _write_report(task)
    task.kept.remove()
    metrics = looked_at or end["metrics"]
    return Outcome(end["status"], metrics, end["steps_done"], seconds, task.plan, task.out, task.seed is not None)


def _losses(rate: float, seed: int | None) -> Callable[[], bool] | None:
    """Random drop-outs for experiments: each contribution is lost with probability ``rate``."""
    if not rate:
        return None
    if seed is None:
        return lambda: secrets.randbelow(1 << 32) < rate * (1 << 32)
    return seeded_noise.losses(rate, seed)


def _drops(lost: Callable[[], bool] | None) -> Callable[[SiteId, Any], bool] | None:
    """The same for messages."""
    if lost is None:
        return None

    def drop(site: SiteId, message: Any) -> bool:
        meta = message.metadata
        return meta.message_type == "train.contribute" and not meta.reply_to_message_id and lost()

    return drop


def _write_report(task: _Task) -> None:
    """The report, signed by every virtual site whose ledger it was made from; and the server's key, for later audits.

    The key speaks for nobody: it was made for this run, whose report says SIMULATED. No site signs what says that it
    was not private.
    """
    from fedveil.common import identity
    from fedveil.deploy.watch.plot import write_curve
    from fedveil.privacy.report.build import build_report
    from fedveil.privacy.report.bundle import REPORT, SIMULATED_KEY
    from fedveil.privacy.report.render import render_report

    out = task.out
    build_report(out, task.world.server)
    if task.seed is None:
        task.world.countersign(out)
    render_report(out / REPORT)
    (out / SIMULATED_KEY).unlink(missing_ok=True)
    identity.save_signing_key(out / SIMULATED_KEY, task.world.server)
    write_curve(out)
