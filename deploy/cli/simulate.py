"""``fedveil simulate``: one server and many virtual clients on this machine, with one command."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.common.errors import UsageError
from fedveil.deploy.lab.choices import NETWORKS, listed

if TYPE_CHECKING:
    from fedveil.deploy.lab.simulate import Config
    from fedveil.deploy.lab.sites import Sites
    from fedveil.deploy.lab.studies import Prepare
    from fedveil.privacy.plan import PrivacyPlan

_DATA, _TRAINING = "Records", "Training (by default the data set's recipe, or what is proposed and printed)"
_PRIVACY, _RUN = "Privacy and trust", "The run"
_CLIENTS = 20
_OF_A_REHEARSAL = {
    "federation", "clients", "dataset", "by", "test", "seed", "seeds", "out", "resume", "engine", "drop_rate", "cap",
    "debug_noise_seed", "force",
}  # fmt: skip


def _option(panel: str, help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **more)


def simulate(
    ctx: typer.Context,
    clients: Annotated[int, _option(_DATA, "Number of virtual clients.")] = _CLIENTS,
    dataset: Annotated[str, _option(_DATA, listed("dataset") + ", or a .csv or .parquet file.")] = "digits",
    target: Annotated[str | None, _option(_DATA, "Column of a file that holds the class.")] = None,
    by: Annotated[
        str,
        _option(_DATA, "How records are dealt out: iid, dirichlet:0.3, shards:2, quantity:0.5, or column:NAME."),
    ] = "iid",
    test: Annotated[float, _option(_DATA, "Share of a file's records held out as the public test table.")] = 0.2,
    federation: Annotated[
        Path | None,
        _option(
            _DATA,
            "Rehearse this federation.toml: plan, network and optimiser are its own, the table (--dataset FILE, or its "
            "public_test) is encoded by its contract.",
        ),
    ] = None,
    network: Annotated[str | None, _option(_TRAINING, ", ".join(NETWORKS) + ".")] = None,
    hidden: Annotated[str | None, _option(_TRAINING, "Sizes of the network, for example 64,32.")] = None,
    steps: Annotated[int | None, _option(_TRAINING, "Number of secure sums.")] = None,
    optimizer: Annotated[str, _option(_TRAINING, listed("optimizer"))] = "sgd",
    learning_rate: Annotated[
        float | None, _option(_TRAINING, "Of the server's step; in mode client of the clients' descent.")
    ] = None,
    momentum: Annotated[float | None, _option(_TRAINING, "Of the server's step.")] = None,
    second_moment: Annotated[float | None, _option(_TRAINING, "beta_2 of adam and yogi (0.99).")] = None,
    stabiliser: Annotated[float | None, _option(_TRAINING, "Added to the root of the second moment (1e-8).")] = None,
    schedule: Annotated[
        str, _option(_TRAINING, "constant, linear, cosine, or factors of the rate from a step on: 1:1.0,40:0.1.")
    ] = "constant",
    averaging: Annotated[
        float | None, _option(_TRAINING, "Decay of an average of the weights, which is then the model.")
    ] = None,
    clip: Annotated[float | None, _option(_TRAINING, "L2 bound of a record's gradient, or a client's update.")] = None,
    sample_rate: Annotated[
        float | None, _option(_TRAINING, "Chance of a record (mode client: a client) to enter a step.")
    ] = None,
    local_steps: Annotated[
        int | None,
        _option(_TRAINING, "Mode client: passes over a client's records per round. Mode local: noisy steps."),
    ] = None,
    local_batch: Annotated[int, _option(_TRAINING, "Mode client: records of a local step; 0: all of them.")] = 0,
    server_rate: Annotated[
        float | None,
        _option(_TRAINING, "Mode client: of the step on the averaged updates (1; others than sgd: small)."),
    ] = None,
    proximal: Annotated[
        float | None, _option(_TRAINING, "Mode client: FedProx's pull towards the round's start (0).")
    ] = None,
    patience: Annotated[
        int, _option(_TRAINING, "End after so many rounds without a better --stop-metric; 0: never.")
    ] = 0,
    stop_metric: Annotated[str, _option(_TRAINING, listed("stop_metric", auc="two classes"))] = "accuracy",
    epsilon: Annotated[float, _option(_PRIVACY, "ε of the run.")] = 1.0,
    noise_multiplier: Annotated[float | None, _option(_PRIVACY, "σ instead of ε; ε then follows from it.")] = None,
    delta: Annotated[float, _option(_PRIVACY, "δ of the run.")] = 1e-5,
    mode: Annotated[str, _option(_PRIVACY, listed("mode"))] = "distributed",
    sum: Annotated[str, _option(_PRIVACY, listed("sum", plain="SIMULATED", none="mode local"))] = "keysum",
    colluders: Annotated[int | None, _option(_PRIVACY, "t: sites that may work together.")] = None,
    dropouts: Annotated[int | None, _option(_PRIVACY, "d: sites that may be missing from a round.")] = None,
    reveal_to: Annotated[
        str, _option(_PRIVACY, "Who reads the sums: " + listed("reveal_to", sites="keysum"))
    ] = "server",
    committee: Annotated[int, _option(_PRIVACY, "Number of helpers that open the sums; 0: all sites (up to 200).")] = 0,
    cap: Annotated[
        float | None, _option(_PRIVACY, "Cap (ε) of every client's ledger. By default what the plan needs.")
    ] = None,
    force: Annotated[bool, _option(_PRIVACY, "Allow mode client below 1000 clients.")] = False,
    engine: Annotated[str, _option(_RUN, listed("engine"))] = "inprocess",
    drop_rate: Annotated[float, _option(_RUN, "Chance, 0 to 1, that a client misses a round.")] = 0.0,
    seed: Annotated[int, _option(_RUN, "Seed of the split and of the first model. Noise is never seeded.")] = 0,
    seeds: Annotated[int, _option(_RUN, "Number of runs, with seeds from --seed up. Their mean is shown.", min=1)] = 1,
    out: Annotated[Path | None, _option(_RUN, "The new folder of the run or runs. By default runs/<time>.")] = None,
    resume: Annotated[
        Path | None,
        _option(_RUN, "Go on with the run or runs in this folder, which were stopped or killed, with their settings."),
    ] = None,
    debug_noise_seed: Annotated[
        int | None,
        _option(_RUN, "NOT PRIVATE, for debugging: noise, sampling and places follow from this seed, so runs repeat."),
    ] = None,
) -> None:
    """Train over many virtual clients in one process. The run's folder then holds a report to check."""
    chosen = locals()
    from fedveil.deploy.lab import simulate as lab
    from fedveil.deploy.lab import studies

    config = lab.Config(**{f.name: chosen[f.name] for f in fields(lab.Config)} | {"hidden": lab.sizes(hidden)})
    given = {p for p in ctx.params if (source := ctx.get_parameter_source(p)) and source.name == "COMMANDLINE"}
    if {"epsilon", "noise_multiplier"} <= given:
        raise UsageError("epsilon follows from noise_multiplier, and this from epsilon", hint="give one of the two")
    if federation is not None and (other := sorted(given - _OF_A_REHEARSAL)):
        raise UsageError(
            f"federation.toml decides {', '.join(other)[:200]}", hint="leave these out, or change the file"
        )
    prepare = lab.prepared
    if federation is not None:
        prepare = _rehearsed(federation, clients if "clients" in given else None)
    origin = "" if federation is None else str(federation)
    if resume is None:
        studies.command(config, seeds, out, prepare, origin)
        return
    if "out" in given or "seeds" in given:
        raise UsageError("--resume goes on in its own folder, with its own seeds", hint="leave out --out and --seeds")
    asked = {name: value for name, value in asdict(config).items() if name in given}
    studies.resume(resume, asked, prepare, origin)


def _rehearsed(path: Path, clients: int | None) -> Prepare:
    """The settings of a real run over virtual sites: as many as the roster has, or as ``--clients`` says."""
    from fedveil.common import settings as tomls
    from fedveil.deploy.cli.plan import contract_of, roster_size
    from fedveil.deploy.lab import rehearsal
    from fedveil.privacy.planning import plan_from_settings

    settings = tomls.load(path, tomls.Federation)
    contract, _ = contract_of(settings)
    count = clients or roster_size(settings)

    def prepared(config: Config) -> tuple[Config, Sites, PrivacyPlan]:
        table = Path(config.dataset) if "." in config.dataset else None
        sites = rehearsal.sites_for(
            settings, contract, table, clients=count, by=config.by, seed=config.seed, test=config.test
        )
        return rehearsal.config_for(settings, config, sites), sites, plan_from_settings(settings, contract, count)

    return prepared
