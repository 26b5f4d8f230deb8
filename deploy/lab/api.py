"""What ``import fedveil`` offers a researcher: simulate, sweep, load, baselines. :func:`split` is beside it."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from fedveil.common.errors import UsageError
from fedveil.deploy.lab import execution, resuming
from fedveil.deploy.lab.resuming import STUDY
from fedveil.deploy.lab.run import BASELINES, Run
from fedveil.deploy.lab.runs import Runs
from fedveil.deploy.lab.simulate import Config, check, make_plan, proposal, run_split
from fedveil.deploy.lab.sites import Sites

_SWEEP = "sweep.json"
_OWN = {"clients", "dataset", "target", "test", "by"}  # these are the records' matter


def simulate(
    network: str | None,
    sites: Sites,
    *,
    out: str | Path | None = None,
    report: bool = True,
    compare: bool = True,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train over the virtual ``sites`` with the platform's own plan, noise, sums and ledgers.

    Args:
        network: ``"logistic"``, ``"mlp"``, ``"cnn"``, ... (:class:`~fedveil.common.workload.model.ModelSpec`); None:
            what fits the number of records.
        sites: what :func:`fedveil.split` gave.
        out: a new folder for the run; by default ``runs/<time>``.
        report: whether to write the privacy report.
        compare: whether to train the baselines too, for :attr:`Run.baselines`.
        quiet: print nothing.
        settings: fields of :class:`~fedveil.deploy.lab.simulate.Config`: ``epsilon``, ``delta``, ``clip``,
            ``sample_rate``, ``steps``, ``learning_rate``, ``momentum``, ``hidden``, ``mode``, ``sum``, ``seed``, ...
            Those that are not given are proposed from public numbers and printed.

    Raises:
        FedveilError: the plan is refused, or the run could not begin. How a run ended is its ``status``.
    """
    config = _config(network, sites, settings)
    folder = Path(out) if out is not None else _new_folder()
    plan = make_plan(config, sites)
    if not quiet:
        print(proposal(config, sites, plan))  # noqa: T201 - what the caller asked to see
    run_split(config, sites, plan, folder, report=report)
    if compare:
        (folder / BASELINES).write_text(json.dumps(_compared(config, sites), indent=1) + "\n")
    return Run(folder)


def resume(folder: str | Path, *, quiet: bool = False, **settings: Any) -> Run:
    """Go on with a simulation that was killed or interrupted, from the folder that it began in, to its end.

    State only moves forward. What a ledger was charged stays charged. A round whose sum was opened is not run again.
    One that was charged and not opened is lost. One of which nothing was written is run. So the ledgers' totals
    are those of a run that nobody stopped. It goes on after its process was killed, not after a power cut. Baselines
    are not trained: :func:`baselines` does that.

    Args:
        folder: of the run. For several seeds: ``fedveil simulate --resume``; for a sweep: :func:`sweep` again.
        quiet: print nothing.
        settings: those that must be the run's own; for a script that names them anyway.

    Raises:
        UsageError: the folder holds no run, one that has ended, one that began with other settings, or one that cannot
            go on (the engine ``ray``).
        FedveilError: the run's files were altered.
    """
    run = Path(folder)
    found = resuming.find(run, settings)
    if not quiet:
        done = sum(row.kind == "round.applied" for row in resuming.rows_of(run))
        print(f"{run}: goes on after {done} of {found.kept.plan.steps} rounds")  # noqa: T201 - what the caller asked to see
    execution.go_on(found)
    return Run(run)


def baselines(sites: Sites, network: str | None = None, **settings: Any) -> dict[str, dict[str, float]]:
    """What the same records give each alone, to a trusted centre, with local DP, without privacy, and by guessing.

    Arguments as for :func:`simulate`.
    """
    return _compared(_config(network, sites, settings), sites)


def load(folder: str | Path) -> Run | Runs:
    """A run, or the runs of several seeds or of a sweep, from its folder.

    Raises:
        UsageError: none of them is there.
    """
    folder = Path(folder)
    if (folder / STUDY).exists():
        return Runs([Run(p.parent) for p in sorted(folder.glob("seed-*/journal.jsonl"))], [])
    if (folder / _SWEEP).exists():
        varied = json.loads((folder / _SWEEP).read_text())["varied"]
        return Runs([Run(p.parent) for p in sorted(folder.glob("*/journal.jsonl"))], varied)
    return Run(folder)


def sweep(
    network: str | None,
    sites: Sites,
    *,
    seeds: int | Iterable[int] = 1,
    out: str | Path | None = None,
    workers: int | None = None,
    **settings: Any,
) -> Runs:
    """Run every combination of the settings that are lists, over several seeds, on all cores.

    What is in ``out`` from before is not run again, so that a sweep that was stopped goes on: where it was, in the run
    that was under way.

    Args:
        network: as for :func:`simulate`.
        sites: as for :func:`simulate`. A seed decides the first weights, and how the records are dealt out.
        seeds: how many, or which.
        out: the folder of all runs; by default ``runs/<time>``.
        workers: processes; by default one for each core.
        settings: as for :func:`simulate`; a list means each of its values.

    Raises:
        UsageError: nothing to run, or ``out`` holds another sweep.
    """
    varied = [name for name, value in settings.items() if isinstance(value, list)]
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    lists = [settings[name] for name in varied]
    combinations = [dict(zip(varied, values, strict=True)) for values in itertools.product(*lists)]
    if not combinations or not chosen:
        raise UsageError("nothing to run", hint="at least one value of every setting and one seed")
    folder = Path(out) if out is not None else _new_folder()
    todo = [
        (_config(network, sites, {**settings, **own, "seed": seed}), seed) for own in combinations for seed in chosen
    ]
    _claim(folder, varied, [asdict(config) for config, _ in todo])
    names = [_name(config) for config, _ in todo]
    dealt = {seed: replace(sites.again(seed) if sites.again else sites, again=None) for seed in chosen}
    for config, seed in todo:
        make_plan(config, dealt[seed])  # refused before the first run begins
    left = [(c, folder / n, dealt[s]) for (c, s), n in zip(todo, names, strict=True) if not _ended(folder / n)]
    _run_all(left, min(workers or os.cpu_count() or 1, max(1, len(left))))
    return Runs([Run(folder / name) for name in names], varied)


def _run_all(left: list[tuple[Config, Path, Sites]], workers: int) -> None:
    if workers == 1 or len(left) <= 1:
        for job in left:
            _one(*job)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_one, *job) for job in left]
        for job in as_completed(jobs):
            job.result()


def _one(config: Config, folder: Path, sites: Sites) -> None:
    """One run of a sweep: gone on with if it was stopped, else begun."""
    if (folder / resuming.FOLDER).exists() and resuming.rows_of(folder):
        execution.go_on(resuming.find(folder))
        return
    shutil.rmtree(folder, ignore_errors=True)  # its folder has no end, and it cannot go on
    run_split(config, sites, make_plan(config, sites), folder)


def _ended(folder: Path) -> bool:
    if (folder / resuming.FOLDER).exists():
        return False
    return (folder / resuming.JOURNAL).exists() and Run(folder).status != "RUNNING"


def _claim(folder: Path, varied: list[str], configs: list[dict[str, Any]]) -> None:
    """Write what the folder is for; refuse one that is for something else."""
    path, said = folder / _SWEEP, {"varied": varied, "configs": json.loads(json.dumps(configs))}
    if path.exists():
        if json.loads(path.read_text()) != said:
            raise UsageError(f"{folder} holds another sweep", hint="the same settings and seeds, or a new folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=1) + "\n")


def _name(config: Config) -> str:
    """A run's folder in a sweep: its settings by hash, and its seed."""
    text = json.dumps(asdict(replace(config, seed=0)), sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-seed-{config.seed}"


def _config(network: str | None, sites: Sites, settings: dict[str, Any]) -> Config:
    known = {f.name for f in fields(Config)} - _OWN - {"network"}
    if wrong := sorted(set(settings) - known):
        raise UsageError(f"unknown settings: {', '.join(wrong)[:200]}", hint=f"one of {', '.join(sorted(known))}")
    if isinstance(hidden := settings.get("hidden"), list):
        settings = settings | {"hidden": tuple(hidden)}
    if isinstance(pairs := settings.get("schedule"), list):
        settings = settings | {"schedule": tuple(tuple(p) if isinstance(p, list) else p for p in pairs)}
    if {"epsilon", "noise_multiplier"} <= {k for k, v in settings.items() if v is not None}:
        raise UsageError("epsilon follows from noise_multiplier, and this from epsilon", hint="give one of the two")
    config = Config(clients=len(sites), dataset=sites.source, network=network, **sites.dealt, **settings)
    check(config)
    return config


def _compared(config: Config, sites: Sites) -> dict[str, dict[str, float]]:
    from fedveil.deploy.lab import baselines as lab

    parts = [lab.Table(X, y) for X, y in sites.parts if len(y)]
    return lab.compare(make_plan(config, sites), parts, lab.Table(sites.X_test, sites.y_test))


def _new_folder() -> Path:
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")
