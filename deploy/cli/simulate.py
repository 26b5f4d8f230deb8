"""``fedveil simulate``: one server and many virtual clients on this machine, with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.deploy.lab.choices import listed


def simulate(
    clients: Annotated[int, typer.Option(help="Number of virtual clients.")] = 20,
    dataset: Annotated[str, typer.Option(help=listed("dataset"))] = "digits",
    epsilon: Annotated[float, typer.Option(help="ε of the run.")] = 1.0,
    delta: Annotated[float, typer.Option(help="δ of the run.")] = 1e-5,
    mode: Annotated[str, typer.Option(help=listed("mode"))] = "distributed",
    sum: Annotated[str, typer.Option(help=listed("sum", plain="SIMULATED", none="mode local"))] = "keysum",
    engine: Annotated[str, typer.Option(help=listed("engine"))] = "inprocess",
    alpha: Annotated[
        float | None, typer.Option(help="Deal out classes unevenly: Dirichlet concentration. By default evenly (IID).")
    ] = None,
    colluders: Annotated[int | None, typer.Option(help="t: sites that may work together.")] = None,
    dropouts: Annotated[int | None, typer.Option(help="d: sites that may be missing from a round.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of secure sums. The dataset has a default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the first model. Noise is never seeded.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of runs, with seeds from --seed up. Their mean is shown.")
    ] = 1,
    cap: Annotated[
        float | None, typer.Option(help="Cap (ε) of every client's ledger. By default what the plan needs.")
    ] = None,
    drop_rate: Annotated[float, typer.Option(help="Chance, 0 to 1, that a client misses a round.")] = 0.0,
    reveal_to: Annotated[
        str, typer.Option(help="Who reads the sums: " + listed("reveal_to", sites="keysum"))
    ] = "server",
    committee: Annotated[int, typer.Option(help="Number of helpers that open the sums; 0: all sites (up to 200).")] = 0,
    force: Annotated[bool, typer.Option(help="Allow mode client below 1000 clients.")] = False,
    out: Annotated[Path | None, typer.Option(help="The new folder of the run or runs. By default runs/<time>.")] = None,
) -> None:
    """Train over many virtual clients in one process. The run's folder then holds a report to check."""
    from fedveil.deploy.lab import simulate as lab

    config = lab.Config(
        clients=clients, dataset=dataset, epsilon=epsilon, delta=delta, mode=mode, sum=sum, engine=engine,
        alpha=alpha, colluders=colluders, dropouts=dropouts, steps=steps, seed=seed, force=force, cap=cap,
        drop_rate=drop_rate, reveal_to=reveal_to, committee=committee,
    )  # fmt: skip
    lab.command(config, seeds, out)
