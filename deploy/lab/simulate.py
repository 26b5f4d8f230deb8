"""``fedveil simulate``: one server and many virtual clients on this machine, with one command."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common import canonical
from fedveil.common.errors import UsageError
from fedveil.deploy.lab import recipes
from fedveil.deploy.lab.choices import CHOICES, NETWORKS
from fedveil.deploy.lab.outcomes import SUMMARY, Outcome, raise_for_ending, show, write_summary
from fedveil.deploy.lab.recipes import Recipe

if TYPE_CHECKING:
    from fedveil.common.units import SiteId
    from fedveil.deploy.lab import virtual_sites
    from fedveil.deploy.lab.sites import Sites
    from fedveil.privacy.plan import PrivacyPlan
    from fedveil.server.job import Progress


Prepare = Callable[["Config"], "tuple[Config, Sites, PrivacyPlan]"]


@dataclass(frozen=True)
class Config:
    """One simulation, as its run folder records it. ``fedveil simulate --help`` says the same of its options.

    Attributes:
        clients: number of sites; like the next three and ``by``, what :func:`fedveil.split` decides.
        dataset: the records in a word.
        target: the column with the class.
        test: share of the records that is held out.
        epsilon: ε of the run.
        delta: δ of the run.
        mode: ``distributed``, ``local`` or ``client``.
        sum: ``keysum``, ``sharedkey``, ``plain`` (SIMULATED), or ``none`` (mode ``local``).
        engine: ``inprocess`` or ``ray``.
        by: how the records are dealt out.
        colluders: t, sites that may work together; None: a sixth, at least 1.
        dropouts: d, sites that may be missing from a round; None: a sixth, at least 1 (0 of three).
        steps: secure sums; None, here and below: what is proposed.
        seed: of the split and of the first weights. Noise is never seeded.
        force: allow mode ``client`` below 1000 clients.
        cap: cap (ε) of each client's ledger; None: what the plan needs.
        drop_rate: chance that a client misses a round.
        reveal_to: who reads the sums: ``server`` or ``sites``.
        committee: number of helpers that open the sums; 0: all sites, up to 200.
        network: ``logistic``, ``mlp``, ``cnn``, ``resnet``, ``transformer``, ``lstm``, ``lora-mlp`` or
            ``lora-transformer``.
        hidden: sizes of the network.
        learning_rate: of the server's step.
        momentum: of the server's step.
        clip: L2 bound of a record's gradient, or of a client's update.
        sample_rate: chance of a record to enter a step.
        local_steps: local steps per round, in mode ``client``.
        noise_multiplier: σ instead of ε; ε then follows from it.
    """

    clients: int = 20
    dataset: str = "digits"
    target: str | None = None
    test: float = 0.2
    epsilon: float = 1.0
    delta: float = 1e-5
    mode: str = "distributed"
    sum: str = "keysum"
    engine: str = "inprocess"
    by: str = "iid"
    colluders: int | None = None
    dropouts: int | None = None
    steps: int | None = None
    seed: int = 0
    force: bool = False
    cap: float | None = None
    drop_rate: float = 0.0
    reveal_to: str = "server"
    committee: int = 0
    network: str | None = None
    hidden: tuple[int, ...] | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    clip: float | None = None
    sample_rate: float | None = None
    local_steps: int | None = None
    noise_multiplier: float | None = None


def sizes(text: str | None) -> tuple[int, ...] | None:
    """The sizes in ``64,32``; None for None.

    Raises:
        UsageError: other text.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
        raise UsageError(f"--hidden {text[:64]!r} holds no sizes", hint="whole numbers with commas, for example 64,32")
    return tuple(map(int, parts))


def recipe(config: Config, sites: Sites) -> Recipe:
    """The hyper-parameters for ``config``: those that it names, else the data set's, else what is proposed for it."""
    found = recipes.bundled(config.dataset, config.epsilon)
    if found is None:
        found = recipes.propose(
            records=sites.records, inputs=sites.inputs, classes=sites.classes, epsilon=config.epsilon,
            delta=config.delta, parameters=_size(config, sites),
        )  # fmt: skip
    if config.network is not None and config.hidden is None:
        found = found.changed(hidden=recipes.usual_hidden(config.network, sites.inputs))
    if config.mode == "client":
        found = found.changed(local_steps=5)
    return found.changed(
        network=config.network, hidden=config.hidden, learning_rate=config.learning_rate, momentum=config.momentum,
        clip=config.clip, sample_rate=config.sample_rate, steps=config.steps, local_steps=config.local_steps,
    )  # fmt: skip


def _size(config: Config, sites: Sites) -> int:
    """D of the network that ``config`` names; 0 if it names none."""
    from fedveil.common.workload.model import ModelSpec

    if config.network is None:
        return 0
    hidden = recipes.usual_hidden(config.network, sites.inputs) if config.hidden is None else config.hidden
    spec = ModelSpec(name=config.network, inputs=sites.inputs, classes=sites.classes, hidden=hidden)  # type: ignore[arg-type]
    return 0 if spec.problem() else spec.parameters


def make_plan(config: Config, sites: Sites) -> PrivacyPlan:
    """The privacy plan of a simulation; the contract's hash stands for the simulated data's description."""
    from fedveil.common.workload.model import ModelSpec
    from fedveil.privacy import plan as plans

    if config.sum == "none" and config.mode != "local":
        raise UsageError("--sum none is for --mode local only", hint="use keysum, sharedkey or plain")
    r = recipe(config, sites)
    contract = canonical.digest({"dataset": config.dataset, "inputs": sites.inputs, "classes": sites.classes})
    return plans.make_plan(
        mode=config.mode, sum=config.sum, sites=len(sites), records=sites.records,  # type: ignore[arg-type]
        epsilon=config.epsilon if config.noise_multiplier is None else None, noise_multiplier=config.noise_multiplier,
        capacity=sites.largest,
        delta=config.delta, steps=r.steps, clip=r.clip, sample_rate=1.0 if config.mode == "client" else r.sample_rate,
        model=ModelSpec(name=r.network, inputs=sites.inputs, classes=sites.classes,  # type: ignore[arg-type]
                        hidden=r.hidden, seed=0 if r.network == "logistic" else config.seed + 7),
        optimizer=plans.Optimizer(learning_rate=r.learning_rate, momentum=r.momentum), contract_hash=contract,
        colluders=config.colluders, dropouts=config.dropouts, few_clients=config.force,
        local_steps=r.local_steps, reveal_to=config.reveal_to,  # type: ignore[arg-type]
        committee=config.committee, committee_seed=secrets.token_hex(32) if config.committee else "",
    )  # fmt: skip


def sites_of(config: Config) -> Sites:
    """The records that ``config`` names, dealt out."""
    from fedveil.deploy.lab.partition import parse
    from fedveil.deploy.lab.split import split

    by = parse(config.by)
    clients = None if isinstance(by, str) else config.clients
    return split(config.dataset, config.target, clients=clients, test=config.test, by=by, seed=config.seed)


def run(config: Config, out: Path, *, progress: Progress | None = None, report: bool = True) -> Outcome:
    """Run one simulation into the folder ``out``.

    Raises:
        FedveilError: the plan is refused, or the run could not begin.
    """
    return run_split(*prepared(config), out, progress=progress, report=report)


def run_split(
    config: Config,
    records: Sites,
    plan: PrivacyPlan,
    out: Path,
    *,
    progress: Progress | None = None,
    report: bool = True,
    engine: str = "auto",
) -> Outcome:
    """Run ``plan`` over ``records``: the server app and the client app on the engine that ``config`` names.

    Raises:
        FedveilError: ``config`` is inconsistent, or the run could not begin.
    """
    from fedveil.client.app import make_app as client_app
    from fedveil.common import flwr_adapter
    from fedveil.deploy.lab import virtual_sites
    from fedveil.privacy.planning import warnings
    from fedveil.server import job as jobs
    from fedveil.server.app import make_app as server_app
    from fedveil.server.evaluate import Evaluator

    check(config)
    _make_folder(out)
    flwr_adapter.quiet_flower()
    if progress:
        progress("plan", {"warnings": warnings(plan)})
    virtual_sites.fit_threads(plan.model.parameters)
    started = time.perf_counter()
    world = virtual_sites.World.make(len(records))
    cap = config.cap or plan.filter_epsilon()
    options: dict[str, Any] = {"progress": progress} if progress else {}
    job = jobs.create(
        out, plan, world.roster, world.server, documents={**world.documents(), "config.json": asdict(config)},
        durable=False, engine=config.engine,
        evaluate=Evaluator(plan.network, records.X_test, records.y_test), **options,
    )  # fmt: skip
    server, _ = server_app(job)
    looked_at: dict[str, float] = {}
    if config.engine == "inprocess":
        from fedveil.deploy.lab import together
        from fedveil.deploy.transport.inprocess import InprocessGrid, run_on

        sites = virtual_sites.Kept(
            lambda i: virtual_sites.make_site(
                world.roster, i, world.keys[i], plan, *records.parts[i], out, cap=cap, engine=engine
            )
        )
        app, lost = client_app(sites.resolve), _losses(config.drop_rate)
        if together.fits(plan):
            grid = together.TogetherGrid(app, world.sites, sites.find, lost=lost)
        else:
            grid = InprocessGrid(app, world.sites, lambda _: {}, drop=_drops(lost))
        with virtual_sites.rare_collections():
            run_on(server, grid)
        if plan.reveal_to == "sites" and job.evaluate is not None:
            # Only the simulation can look into a site: its own model on the public table.
            looked_at = job.evaluate(sites.find(0).model(sites.find(0).session(job.session)).held.state.weights)
        sites.close()
    else:
        from fedveil.deploy.lab.ray_sites import run_over_ray

        run_over_ray(server, world, plan, records, out, cap=cap, engine=engine)
    end = next(job.journal.of_kind("run.end"))
    if report:
        _write_report(out, world)
    body = end.body
    return Outcome(
        body["status"], looked_at or body["metrics"], body["steps_done"], time.perf_counter() - started, plan, out
    )


def check(config: Config) -> None:
    """Raise :class:`UsageError` for what would otherwise show only after a run's folder was made, or never."""
    for name, known in CHOICES.items():
        if name != "dataset" and (chosen := getattr(config, name)) not in known:
            raise UsageError(f"unknown {name} {chosen!r}", hint=f"one of {', '.join(known)}")
    if config.network is not None and config.network not in NETWORKS:
        raise UsageError(f"unknown network {config.network!r}", hint=f"one of {', '.join(NETWORKS)}")
    for wrong, text, hint in (
        (
            not 0 <= config.drop_rate <= 1,
            f"drop rate {config.drop_rate!r} is not a probability",
            "--drop-rate takes a number from 0 to 1",
        ),
        (
            config.drop_rate and config.engine == "ray",
            "the engine 'ray' has no random drop-outs",
            "use --engine inprocess, or leave out --drop-rate",
        ),
        (
            config.cap is not None and not 0 < config.cap < inf,
            f"cap = {config.cap!r} must be positive",
            "--cap takes an epsilon above 0",
        ),
        (not 0 <= config.seed < 1 << 32, f"seed {config.seed} is out of range", "--seed takes 0 to 4294967295"),
    ):
        if wrong:
            raise UsageError(text, hint=hint)


def _make_folder(out: Path) -> None:
    if (out / "journal.jsonl").exists():
        raise UsageError(
            f"{out} holds a run already", hint="name a new folder with --out: a simulation cannot be resumed"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"no folder can be made at {out}: {e.strerror}", hint="name another folder with --out") from e


def _losses(rate: float) -> Callable[[], bool] | None:
    """Random drop-outs for experiments: each contribution is lost with probability ``rate``."""
    return (lambda: secrets.randbelow(1 << 32) < rate * (1 << 32)) if rate else None


def _drops(lost: Callable[[], bool] | None) -> Callable[[SiteId, Any], bool] | None:
    """The same for messages."""
    if lost is None:
        return None

    def drop(site: SiteId, message: Any) -> bool:
        meta = message.metadata
        return meta.message_type == "train.contribute" and not meta.reply_to_message_id and lost()

    return drop


def _write_report(out: Path, world: virtual_sites.World) -> None:
    """The report, signed by every virtual site whose ledger it was made from; and the server's key, for later audits.

    The key speaks for nobody: it was made for this run, whose report says SIMULATED.
    """
    from fedveil.common import identity
    from fedveil.deploy.watch.plot import write_curve
    from fedveil.privacy.report.build import build_report
    from fedveil.privacy.report.bundle import REPORT, SIMULATED_KEY
    from fedveil.privacy.report.render import render_report

    build_report(out, world.server)
    world.countersign(out)
    render_report(out / REPORT)
    identity.save_signing_key(out / SIMULATED_KEY, world.server)
    write_curve(out)


def prepared(config: Config) -> tuple[Config, Sites, PrivacyPlan]:
    """What a simulation needs before it begins; :class:`FedveilError` for what cannot be simulated."""
    check(config)
    sites = sites_of(config)
    return config, sites, make_plan(config, sites)


def command(config: Config, seeds: int, out: Path | None, prepare: Prepare = prepared) -> None:
    """Run ``config`` once for each of ``seeds`` seeds, its own and those after it, and show the outcomes.

    Args:
        prepare: gives the records and the plan of one seed.
        out: the run's folder, or the folder of all seeds' runs; None: ``runs/<time>``.

    Raises:
        RunAborted, BudgetExhausted: one of the runs ended so; the folders are written.
        FedveilError: the plan is refused, or a run could not begin.
    """
    from fedveil.deploy.watch.display import Display

    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / SUMMARY).exists():
        raise UsageError(f"{folder} holds the runs of several seeds already", hint="name a new folder with --out")
    outcomes: list[Outcome] = []
    for seed in range(config.seed, config.seed + seeds):
        own = folder if seeds == 1 else folder / f"seed-{seed}"
        title = f"simulate {config.dataset}" + (f", seed {seed}" if seeds > 1 else "")
        one, records, plan = prepare(replace(config, seed=seed))
        with Display(title, plan.steps) as display:
            outcomes.append(run_split(one, records, plan, own, progress=display.progress))
        if seeds > 1:  # after each seed: these outcomes stay if the next run fails
            write_summary(folder, range(config.seed, seed + 1), outcomes)
    show(outcomes, folder)
    raise_for_ending(outcomes, folder)
