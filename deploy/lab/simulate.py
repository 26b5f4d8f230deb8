"""``fedveil simulate``: one server and many virtual clients on this machine, with one command."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common import canonical
from fedveil.common.errors import UsageError
from fedveil.deploy.lab import recipes
from fedveil.deploy.lab.choices import CHOICES, NETWORKS
from fedveil.deploy.lab.optimisers import optimizer
from fedveil.deploy.lab.outcomes import Outcome
from fedveil.deploy.lab.recipes import Recipe

if TYPE_CHECKING:
    from fedveil.deploy.lab.sites import Sites
    from fedveil.privacy.plan import PrivacyPlan
    from fedveil.server.job import Progress


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
        learning_rate: of the server's step; in mode ``client`` of the clients' descent.
        momentum: of the server's step.
        clip: L2 bound of a record's gradient, or of a client's update.
        sample_rate: chance of a record (mode ``client``: a client) to enter a step.
        local_steps: mode ``client``: passes over a client's records per round; ``local``: noisy steps per round.
        local_batch: mode ``client``: records of a local step; 0: all of a client's.
        optimizer: ``sgd``, ``adam``, ``yogi`` or ``adagrad``; what each does: ``docs/optimisers.md``.
        second_moment: beta_2 of ``adam`` and ``yogi``; None, here and below: what a plan has by default.
        stabiliser: what is added to the root of the second moment.
        server_rate: mode ``client``: of the step on the averaged updates.
        schedule: ``constant``, ``linear``, ``cosine``, or pairs (step, factor of the rate).
        averaging: decay of an average of the weights, which is then the model.
        proximal: mode ``client``: FedProx's pull towards the round's start.
        patience: end after so many rounds without a better ``stop_metric``; 0: never.
        stop_metric: ``accuracy``, or ``auc`` for two classes.
        noise_multiplier: σ instead of ε; ε then follows from it.
        debug_noise_seed: NOT PRIVATE: noise, samples and places follow from it, so that a run repeats.
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
    local_batch: int = 0
    optimizer: str = "sgd"
    second_moment: float | None = None
    stabiliser: float | None = None
    server_rate: float | None = None
    schedule: str | tuple[tuple[float, ...], ...] = "constant"
    averaging: float | None = None
    proximal: float | None = None
    patience: int = 0
    stop_metric: str = "accuracy"
    noise_multiplier: float | None = None
    debug_noise_seed: int | None = None

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> Config:
        """The config that ``config.json`` holds.

        Raises:
            UsageError: it is another version's.
        """
        known = {f.name for f in fields(cls)}
        if other := sorted(set(held) ^ known):
            raise UsageError(
                f"config.json is of another version: {', '.join(other)[:200]}", hint="begin again in a new folder"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in held.items()})


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
            delta=config.delta, parameters=_size(config, sites), steps=config.steps, rate=config.sample_rate,
            clip=config.clip, momentum=config.momentum,
        )  # fmt: skip
    if config.network is not None and config.hidden is None:
        found = found.changed(hidden=recipes.usual_hidden(config.network, sites.inputs))
    if config.mode == "client":  # a rate of sampling is then one of clients: nobody but the caller knows it
        found = found.changed(local_steps=5, sample_rate=1.0)
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
    model = ModelSpec(
        name=r.network, inputs=sites.inputs, classes=sites.classes, hidden=r.hidden,  # type: ignore[arg-type]
        seed=0 if r.network == "logistic" else config.seed + 7,
    )  # fmt: skip
    contract = canonical.digest({"dataset": config.dataset, "inputs": sites.inputs, "classes": sites.classes})
    return plans.make_plan(
        mode=config.mode, sum=config.sum, sites=len(sites), records=sites.records,  # type: ignore[arg-type]
        epsilon=config.epsilon if config.noise_multiplier is None else None, noise_multiplier=config.noise_multiplier,
        capacity=sites.largest,
        delta=config.delta, steps=r.steps, clip=r.clip, sample_rate=r.sample_rate, model=model,
        optimizer=optimizer(asdict(config), r, 0 if model.problem() else model.parameters), contract_hash=contract,
        local_batch=config.local_batch,
        colluders=config.colluders, dropouts=config.dropouts, few_clients=config.force,
        local_steps=r.local_steps, reveal_to=config.reveal_to,  # type: ignore[arg-type]
        committee=config.committee, committee_seed=secrets.token_hex(32) if config.committee else "",
    )  # fmt: skip


def proposal(config: Config, sites: Sites, plan: PrivacyPlan) -> str:
    """The records and the hyper-parameters of a simulation, in words: what was chosen, and what is proposed."""
    o, found = plan.optimizer, recipe(config, sites).changed(learning_rate=plan.optimizer.learning_rate)
    more = "" if o.name == "sgd" else f", optimizer = {o.name}"
    more += f", server_rate = {o.server_rate:g}" if plan.mode == "client" else ""
    usual = o.name == "sgd" and config.learning_rate is None and plan.mode != "client"  # what the reason is about
    return f"{sites!r}\n{found}{more}\n{found.why if usual else ''}".rstrip()


def sites_of(config: Config) -> Sites:
    """The records that ``config`` names, dealt out."""
    from fedveil.deploy.lab.partition import parse
    from fedveil.deploy.lab.split import split

    by = parse(config.by)
    clients = None if isinstance(by, str) else config.clients
    return split(config.dataset, config.target, clients=clients, test=config.test, by=by, seed=config.seed)


def prepared(config: Config) -> tuple[Config, Sites, PrivacyPlan]:
    """What a simulation needs before it begins; :class:`FedveilError` for what cannot be simulated."""
    check(config)
    sites = sites_of(config)
    return config, sites, make_plan(config, sites)


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
    from fedveil.deploy.lab import execution

    check(config)
    execution.make_folder(out)
    asked = {"report": report, "engine": engine}
    return execution.begin(asdict(config), plan, records, out, asked, progress=progress)


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def _is_no(annotation: Any, value: Any) -> bool:
    """Whether a setting's value is of another kind than its annotation says."""
    kinds = str(annotation).split(" | ")
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") not in kinds
    allowed = tuple(t for k in kinds for t in _KINDS.get(k, (tuple,) if k.startswith("tuple") else ()))
    return not isinstance(value, allowed)


def check(config: Config) -> None:
    """Raise :class:`UsageError` for what would otherwise show only after a run's folder was made, or never."""
    if wrong := [
        f"{f.name} = {getattr(config, f.name)!r}"[:80]
        for f in fields(Config)
        if _is_no(f.type, getattr(config, f.name))
    ]:
        raise UsageError(f"not of the kind that a setting has: {', '.join(wrong)}", hint="numbers, names, tuples")
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
        (config.patience < 0, f"patience = {config.patience} is negative", "--patience takes a number of rounds, or 0"),
        (
            config.patience and config.reveal_to == "sites",
            "early stopping needs sums that the server reads",
            "use --reveal-to server, or leave out --patience",
        ),
        (not 0 <= config.seed < 1 << 32, f"seed {config.seed} is out of range", "--seed takes 0 to 4294967295"),
        (
            config.debug_noise_seed is not None and not 0 <= config.debug_noise_seed < 1 << 32,
            f"debug noise seed {config.debug_noise_seed} is out of range",
            "--debug-noise-seed takes 0 to 4294967295",
        ),
    ):
        if wrong:
            raise UsageError(text, hint=hint)
