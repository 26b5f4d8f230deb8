"""``fedveil demo``: the main job on real records, in real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path | None, typer.Option(help="where to lay everything out; default runs/demo-<time>")] = None,
    seed: Annotated[int, typer.Option(help="seed of the split into hospitals")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="repetitions of the comparison")] = 20,
) -> None:
    """Four hospitals, one model, ε = 1: real processes over mTLS, the secure sum, and a report to check."""
    from fedveil.deploy.lab import demo as lab

    lab.demo(folder, seed, seeds)
