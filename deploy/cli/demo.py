"""``fedveil demo``: the main job on real records, in real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Folder for everything that is made. By default runs/demo-<time>.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into hospitals.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of splits in the comparison.")] = 20,
) -> None:
    """Train one model over four hospitals at ε = 1: real processes, mTLS, a secure sum, a report to check."""
    from fedveil.deploy.lab import demo as lab

    lab.demo(folder, seed, seeds)
