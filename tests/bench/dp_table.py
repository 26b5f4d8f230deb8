"""`make bench-dp`: what clipping every record costs, beside plain SGD and Opacus; writes docs/bench-dp.md.

One thread, one process; all candidates take turns, each time in a new order. Each figure is the median over repetitions
of the ratio to the plain step (forward, mean loss, backward in float32) of the same repetition. Opacus runs as its
users run it (float32, its own optimiser's clipping and summing, no noise). Ours returns the float64 sum of the site's
step, empty places and checks included. Ratios hold on other machines, milliseconds do not. `python
tests/bench/dp_table.py [output file]`, two minutes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.privacy.dp.clipping import Clipper, Precision, choose
from fedveil.privacy.dp.places import places_needed, seat
from fedveil.privacy.dp.sampling import poisson_sample

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-dp.md"
MODELS = {
    "MLP 100-64-10": ModelSpec(name="mlp", inputs=100, classes=10, hidden=(64,)),
    "CNN 28x28 (16, 32 channels)": ModelSpec(name="cnn", inputs=784, classes=10, hidden=(16, 32)),
    "Transformer (32 tokens, width 64, 2 blocks)": ModelSpec(
        name="transformer", inputs=32, classes=10, hidden=(1000, 64, 4, 2)
    ),
    "wide MLP 1000-1000-10": ModelSpec(name="mlp", inputs=1000, classes=10, hidden=(1000,)),
    "ResNet 16x16 (8, 16 channels)": ModelSpec(name="resnet", inputs=256, classes=10, hidden=(1, 8, 16)),
    "LSTM (16 tokens, 32, 64)": ModelSpec(name="lstm", inputs=16, classes=10, hidden=(1000, 32, 64)),
    "LoRA MLP 100-256-10, rank 8": ModelSpec(name="lora-mlp", inputs=100, classes=10, hidden=(8, 256)),
}
TARGETS = {"CNN": 1.3, "Tra": 1.7, "wid": 1.7, "LST": 1.7, "LoR": 1.2, "Res": 2.4}
BATCHES = (64, 256)
SECONDS, LEAST, MOST = 12.0, 5, 25
JAX = os.environ.get("JAX_PRIVACY_PYTHON", "")
RATE, OVERFLOW = 0.1, 1e-13  # of the sampled step: a delta of 1e-5 over 100 steps
COLUMNS = (
    "ours, every record, a tenth to spare",
    "ours, sampled",
    "float64 without places",
    "Opacus hooks",
    "Opacus ghost",
)
Step = Callable[[], object]


def plain(spec: ModelSpec, X: torch.Tensor, y: torch.Tensor) -> Step:
    """An ordinary gradient."""
    model = build(spec)

    def step() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()

    return step


def opacus(spec: ModelSpec, X: torch.Tensor, y: torch.Tensor, mode: str) -> Step:
    """Opacus as its documentation uses it, up to the clipped sum; the optimiser's step comes without noise."""
    model = build(spec)
    loader = DataLoader(TensorDataset(X, y), batch_size=len(y))
    made = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6), data_loader=loader,
        noise_multiplier=0.0, max_grad_norm=0.5, grad_sample_mode=mode, criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip
    private, optimiser = cast(nn.Module, made[0]), made[1]
    criterion: Callable[..., torch.Tensor] = made[2] if mode == "ghost" else nn.CrossEntropyLoss()  # type: ignore[assignment]

    def step() -> None:
        optimiser.zero_grad()
        criterion(private(X), y).backward()
        optimiser.step()

    return step


def ours(spec: ModelSpec, X: np.ndarray, y: np.ndarray, precision: Precision, places: int) -> tuple[Clipper, Step]:
    """What a site runs: the engine that the probe picks, over all places of a step, of which ``len(y)`` are taken."""
    clipper = choose(lambda: build(spec), spec.inputs, spec.classes, precision=precision, places=places)
    return clipper, lambda: clipper.clipped_sum(X, y, 0.5, seat(len(y), 1.0, places))


def without_places(spec: ModelSpec, X: np.ndarray, y: np.ndarray) -> tuple[Clipper, Step]:
    """What a site ran by default before places: double precision, the sampled records one after the other."""
    clipper = choose(lambda: build(spec), spec.inputs, spec.classes, precision="float64", places=len(y))

    def step() -> None:
        sample = poisson_sample(len(y), 1.0)
        clipper.clipped_sum(X[sample], y[sample], 0.5)

    return clipper, step


def ratios(steps: dict[str, Step]) -> tuple[float, dict[str, float], int]:
    """(milliseconds of the plain step, ratio of every other, repetitions)."""
    for name, step in list(steps.items()):
        try:
            step()
        except NotImplementedError:  # Opacus' ghost clipping knows no layer that is used twice
            del steps[name]
    taken: dict[str, list[float]] = {name: [] for name in steps}
    start, names, order = time.perf_counter(), list(steps), random.Random(0)
    while len(taken["plain"]) < LEAST or (time.perf_counter() - start < SECONDS and len(taken["plain"]) < MOST):
        order.shuffle(names)  # what a step leaves in the caches is its follower's luck or bad luck
        for name in names:
            before = time.process_time()
            steps[name]()
            taken[name].append(time.process_time() - before)
    base = taken["plain"]
    others = {
        n: statistics.median(a / b for a, b in zip(t, base, strict=True)) for n, t in taken.items() if n != "plain"
    }
    return 1e3 * statistics.median(base), others, len(base)


def jax_privacy(spec: ModelSpec, batch: int) -> float:
    """Milliseconds of jax_privacy's clipped sum of the CNN; 0 where JAX_PRIVACY_PYTHON names no interpreter."""
    if not JAX or spec.name != "cnn":
        return 0.0
    shape = json.dumps([spec.side, *spec.hidden, spec.classes, batch])
    command = [JAX, str(Path(__file__).parent / "jax_step.py"), shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1e3 * json.loads(done.stdout.splitlines()[-1])["private"]


def clipping_rows() -> list[str]:
    """One line for every model and batch size."""
    rows = []
    for name, spec in MODELS.items():
        for batch in BATCHES:
            rng = np.random.default_rng(1)
            tokens = spec.vocabulary
            X = rng.integers(0, tokens, (batch, spec.inputs)) if tokens else rng.normal(0, 1, (batch, spec.inputs))
            X, y = X.astype(np.float32), rng.integers(0, 10, batch)
            tx, ty = torch.from_numpy(X), torch.from_numpy(y)
            places = places_needed(round(batch / RATE), RATE, OVERFLOW)
            whole, step = ours(spec, X, y, "float32", batch + batch // 10)
            sampled, padded = ours(spec, X, y, "float32", places)
            double, before = without_places(spec, X, y)
            steps: dict[str, Step] = {"plain": plain(spec, tx, ty)}
            steps |= dict(zip(COLUMNS, (step, padded, before), strict=False))
            for column, mode in zip(COLUMNS[3:], ("hooks", "ghost"), strict=True):
                steps[column] = opacus(spec, tx, ty, mode)
            base, found, times = ratios(steps)
            ours_, padded_, before_ = (found[c] for c in COLUMNS[:3])
            target = TARGETS.get(name[:3])
            verdict = [] if target is None else [f"≤ {target}: {'yes' if ours_ <= target else 'no'}"]
            verdict.append(f"≤ Opacus: {'yes' if ours_ <= min(found[c] for c in COLUMNS[3:] if c in found) else 'no'}")
            verdict.append(
                f"≤ before: {'yes' if ours_ <= before_ else 'no'}, sampled {'yes' if padded_ <= before_ else 'no'}"
            )
            if other := jax_privacy(spec, batch) / base:
                verdict.append(f"≤ jax_privacy ({other:.2f}): {'yes' if ours_ <= other else 'no'}")
            cells = [f"{found[c]:.2f}" if c in found else "refuses" for c in COLUMNS]
            for i, used in enumerate((whole, sampled, double)):
                cells[i] += f" ({used.engine})"
            cells[1] += f", {places} places"
            rows.append(f"| {name} | {batch} | {base:.2f} ms | {' | '.join(cells)} | {'; '.join(verdict)} | {times} |")
            print(rows[-1], flush=True)
    return rows


def loading_rows() -> list[str]:
    """Poisson batches: ours from arrays, Opacus' DPDataLoader from tensors of the same records."""
    rows = []
    for records, inputs, batch in ((60_000, 784, 256), (10_000, 100, 64)):
        X = np.zeros((records, inputs), np.float32)
        y = np.zeros(records, np.int64)
        data = TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
        loader = DPDataLoader.from_data_loader(DataLoader(data, batch_size=batch))
        theirs, mine = [], []
        batches = iter(loader)
        for _ in range(25):
            before = time.process_time()
            next(batches)
            theirs.append(time.process_time() - before)
            before = time.process_time()
            seats = seat(records, batch / records, places_needed(records, batch / records, OVERFLOW))
            taken = seats[seats >= 0]
            _ = torch.from_numpy(X[taken]), torch.from_numpy(y[taken])
            mine.append(time.process_time() - before)
        ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
        verdict = "yes" if ratio >= 3 else "no"
        rows.append(
            f"| {records:,} x {inputs}, q·N = {batch} | {1e3 * statistics.median(mine):.2f} ms "
            f"| {1e3 * statistics.median(theirs):.2f} ms | {ratio:.1f} | ≥ 3: {verdict} |"
        )
        print(rows[-1], flush=True)
    return rows


def page() -> str:
    """The whole document."""
    start = time.perf_counter()
    rows, loading = clipping_rows(), loading_rows()
    shares = " or ".join(f"{places_needed(round(b / RATE), RATE, OVERFLOW) / b:.1f}" for b in BATCHES)
    return f"""# What clipping every record costs

Written by `make bench-dp` in {time.perf_counter() - start:.0f} s: one thread of a machine with {os.cpu_count()} cores
({platform.machine()}), torch {version("torch")}, Opacus {version("opacus")}, Python {platform.python_version()}.
Times are CPU seconds.

The figures are slowdowns: the time divided by that of one plain gradient (forward, backward, float32) of the same
network and batch. They are medians of interleaved ratios.

- *Ours, every record*: what a site runs by default (float32), with all its records in a step and a capacity that is a
  tenth above them: all places are computed. The probe chooses the engine (named behind the figure).
- *Ours, sampled*: the same where a tenth of the records is drawn. A step then has more places than the batch, and all
  of them are computed. The figure is divided by the plain step of the batch alone.
- *float64 without places*: what the default was before places: double precision, the drawn records only. A
  sampled step has {shares} times as many places as records, and all are computed: that is the price of a shape that no
  record decides. So it is slower than before where double precision costs less than that.
- A network whose plain step takes less than a millisecond is the exception: drawing places, selecting empty ones away
  and checking the sum take about a tenth of a millisecond by themselves, and a tenth more places are computed.
- Opacus computes in float32 throughout, the drawn records only. jax_privacy does too, compiled, in an interpreter of
  its own (JAX_PRIVACY_PYTHON); its time is divided by our plain step.

| network | batch | plain | {" | ".join(COLUMNS)} | targets | repetitions |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

This is the time to draw and gather a Poisson-sampled batch (ours from the operating system's randomness, Opacus' from
torch's):

| records | ours | DPDataLoader | ratio | target |
|---|---|---|---|---|
{chr(10).join(loading)}
"""


def main() -> None:
    """Write the page, in a process whose libraries of linear algebra were all told to use one thread."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S606
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Opacus' hooks and its remark about secure mode
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    text = page()
    target.write_text(text)
    print(target)


if __name__ == "__main__":
    main()
