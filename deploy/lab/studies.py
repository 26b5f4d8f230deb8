"""Studies at the command line: one simulation, or one for each of several seeds; begun, stopped and gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import Interrupted, UsageError
from fedveil.deploy.lab import execution, resuming
from fedveil.deploy.lab.choices import NOT_PRIVATE
from fedveil.deploy.lab.outcomes import SUMMARY, Outcome, raise_for_ending, show, write_summary
from fedveil.deploy.lab.run import Run
from fedveil.deploy.lab.simulate import Config, prepared, proposal, run_split
from fedveil.deploy.watch.display import CONSOLE, Display
from fedveil.privacy.report.bundle import METRICS

if TYPE_CHECKING:
    from fedveil.deploy.lab.sites import Sites
    from fedveil.privacy.plan import PrivacyPlan
    from fedveil.server.job import Progress

Prepare = Callable[[Config], "tuple[Config, Sites, PrivacyPlan]"]


def command(config: Config, seeds: int, out: Path | None, prepare: Prepare = prepared, origin: str = "") -> None:
    """Run ``config`` once for each of ``seeds`` seeds, its own and those after it, and show the outcomes.

    Args:
        prepare: gives the records and the plan of one seed.
        origin: the federation.toml that ``prepare`` reads; empty where it reads none.
        out: the run's folder, or the folder of all seeds' runs; None: ``runs/<time>``.

    Raises:
        RunAborted, BudgetExhausted: one of the runs ended so; the folders are written.
        Interrupted: SIGINT stopped it; the hint says how it goes on.
        FedveilError: the plan is refused, or a run could not begin.
    """
    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / SUMMARY).exists() or (folder / resuming.STUDY).exists():
        raise UsageError(
            f"{folder} holds the runs of several seeds already", hint="go on with --resume, or a new folder with --out"
        )
    for run in (folder, *folder.glob("seed-*")):
        execution.refuse_run(run)
    first = prepare(config)
    if not origin:
        CONSOLE.print(proposal(*first), highlight=False, soft_wrap=True)
    if seeds > 1:
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"config": asdict(config), "seeds": seeds, "origin": origin}
        (folder / resuming.STUDY).write_text(json.dumps(asked, indent=1) + "\n")
    _run_all(config, seeds, folder, lambda one: first if one == config else prepare(one))


def resume(folder: Path, asked: dict[str, Any], prepare: Prepare = prepared, origin: str = "") -> None:
    """Go on with a simulation, or with one over several seeds: seeds that ended are kept, the others are run.

    Args:
        asked: settings that must be those with which it began.
        prepare, origin: as for :func:`command`.

    Raises:
        UsageError: there is nothing to go on with, or it began with other settings.
        RunAborted, BudgetExhausted, Interrupted, FedveilError: as :func:`command`.
    """
    if not (folder / resuming.STUDY).exists():
        found = resuming.find(folder, asked)
        outcome = _gone_on(found, 1, folder)
        show([outcome], folder)
        raise_for_ending([outcome], folder)
        return
    study = json.loads((folder / resuming.STUDY).read_text())
    resuming.refuse_changes(folder, study["config"], asked)
    if study["origin"] != origin:
        raise UsageError(
            f"the runs in {folder} began with --federation {study['origin'] or '(none)'}",
            hint="give the same --federation beside --resume",
        )
    _run_all(Config.from_json(study["config"]), study["seeds"], folder, prepare)


def _run_all(config: Config, seeds: int, folder: Path, prepare: Prepare) -> None:
    outcomes: list[Outcome] = []
    for seed in range(config.seed, config.seed + seeds):
        own = folder if seeds == 1 else folder / f"seed-{seed}"
        outcomes.append(_one(replace(config, seed=seed), seeds, own, folder, prepare))
        if seeds > 1:  # after each seed: these outcomes stay if the next run fails
            write_summary(folder, range(config.seed, seed + 1), outcomes)
    show(outcomes, folder)
    raise_for_ending(outcomes, folder)


def _one(config: Config, seeds: int, run: Path, folder: Path, prepare: Prepare) -> Outcome:
    """The run of one seed: as it ended, or gone on with, or begun."""
    kinds = {row.kind for row in resuming.rows_of(run)}
    if (run / resuming.FOLDER).exists() and "run.open" in kinds:
        return _gone_on(resuming.find(run), seeds, folder)
    if "run.end" in kinds:
        return _ended(run)
    one, records, plan = prepare(config)
    with _shown(asdict(one), seeds, folder, run, plan.steps) as told:
        return run_split(one, records, plan, run, progress=told)


def _gone_on(found: resuming.Unfinished, seeds: int, folder: Path) -> Outcome:
    kept = found.kept
    with _shown(found.config, seeds, folder, kept.run, kept.plan.steps) as told:
        return execution.go_on(found, progress=told)


def _ended(run: Path) -> Outcome:
    """The outcome of a run that has ended, from its folder; its seconds are those of its rounds."""
    found, end = Run(run), next(row.body for row in resuming.rows_of(run) if row.kind == "run.end")
    seconds = sum(json.loads(line)["seconds"] for line in (run / METRICS).read_text().splitlines())
    return Outcome(found.status, found.metrics, end["steps_done"], seconds, found.plan, run, found.not_private)


@contextmanager
def _shown(config: dict[str, Any], seeds: int, folder: Path, run: Path, steps: int) -> Iterator[Progress]:
    """A progress bar around a run. SIGINT leaves what was done so far, and says how to go on."""
    title = f"simulate {config['dataset']}" + (f", seed {config['seed']}" if seeds > 1 else "")
    if config.get("debug_noise_seed") is not None:
        title = f"{NOT_PRIVATE}: {title}"
    try:
        with Display(title, steps) as display, execution.stopping(display.progress, folder) as told:
            yield told
    except Interrupted:
        CONSOLE.print("writing the model, metrics and report of what was done so far ...")
        CONSOLE.print(f"they are in {execution.so_far(run)}", highlight=False)
        raise
