"""`make bench-mnist`: accuracy on MNIST beside Opacus and pfl-research at the same ε: docs/bench-mnist.md.

The 10,000 images of `FEDVEIL_DATA` or ../shared/data: 2,000 are the test table, the same for everybody. Every method's
hyper-parameters are chosen on a fifth that is held out of the other 8,000, from one grid, with a seed of its own; then
it is trained on all 8,000 with three other seeds. PFL_PYTHON names an interpreter that has pfl; without it that column
is empty. `python tests/bench/mnist_table.py [output file]`, 20 minutes.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedveil as fv
from fedveil.client.train import client_updates, clipper
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.deploy.lab import baselines
from fedveil.deploy.lab.outcomes import standard_error
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.start import start
from fedveil.server.evaluate import Evaluator

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-mnist.md"
DATA = Path(os.environ.get("FEDVEIL_DATA", Path(__file__).parents[3] / "shared" / "data"))
PFL = os.environ.get("PFL_PYTHON", "")
EPSILONS, CLIENT_EPSILONS, DELTA = (2.0, 4.0, 8.0), (4.0, 8.0), 1e-5
SEEDS, CHOOSING = (0, 1, 2), 100
SITES, CLIENTS = 10, 1000
NETWORKS: dict[str, tuple[int, ...]] = {"logistic": (), "mlp": (32,)}


class Choice(NamedTuple):
    """Hyper-parameters of one training; of a client: local steps and their rate too."""

    network: str
    rate: float
    steps: int
    learning_rate: float
    clip: float = 1.0
    local: int = 1

    def __str__(self) -> str:
        local = f", {self.local} local steps" if self.local > 1 else ""
        return (
            f"{self.network}, q = {self.rate:g}, {self.steps} steps, learning rate {self.learning_rate:g}, "
            f"clip {self.clip:g}{local}"
        )


RECORDS = [Choice(n, q, s, r) for n in NETWORKS for q, s in ((0.25, 120), (0.0625, 400)) for r in (0.03, 0.1, 0.3)]
WHOLE_CLIENTS = [
    Choice("logistic", 1.0, s, r, c, k) for s in (15, 40) for k, r in ((1, 0.5), (5, 0.1)) for c in (0.1, 0.3)
]


class Table(NamedTuple):
    """Training records and the ones to score on."""

    X: NDArray[np.float32]
    y: NDArray[np.int64]
    X_test: NDArray[np.float32]
    y_test: NDArray[np.int64]

    def inner(self) -> Table:
        """A fifth of the training records held out of them."""
        cut = len(self.y) * 4 // 5
        return Table(self.X[:cut], self.y[:cut], self.X[cut:], self.y[cut:])

    def sites(self, count: int, seed: int) -> fv.Sites:
        """The training records dealt out by chance."""
        order = np.random.default_rng(seed).permutation(len(self.y))  # noqa: TID251 - public images
        parts = [(self.X[i], self.y[i]) for i in np.array_split(order, count)]
        return fv.Sites(parts, self.X_test, self.y_test, 10, source="MNIST")


def images() -> Table:
    """The 10,000 images in an order of their own; the first 2,000 are for the test."""
    read = lambda name, skip: np.frombuffer(gzip.decompress((DATA / name).read_bytes()), np.uint8, -1, skip)  # noqa: E731
    X = (read("mnist_t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784) / 255.0 - 0.1307) / 0.3081
    y = read("mnist_t10k-labels-idx1-ubyte.gz", 8)
    order = np.random.default_rng(7).permutation(len(y))  # noqa: TID251 - public images
    X, y = X[order].astype(np.float32), y[order].astype(np.int64)
    return Table(X[2000:], y[2000:], X[:2000], y[:2000])


def plan_for(c: Choice, epsilon: float, seed: int, sites: fv.Sites, *, mode: str = "distributed") -> PrivacyPlan:
    """The plan of a run over ``sites``."""
    model = ModelSpec(name=c.network, inputs=784, classes=10, hidden=NETWORKS[c.network], seed=seed)  # type: ignore[arg-type]
    return make_plan(
        mode=mode, sum="plain", sites=len(sites), records=sites.records, epsilon=epsilon, delta=DELTA,  # type: ignore[arg-type]
        steps=c.steps, clip=c.clip, sample_rate=c.rate, capacity=sites.largest, model=model, contract_hash="c" * 64,
        optimizer=Optimizer(learning_rate=c.learning_rate, momentum=0.9 if mode == "distributed" else 0.0),
        local_steps=c.local,
    )  # fmt: skip


def score(plan: PrivacyPlan, table: Table, weights: NDArray[np.float64]) -> float:
    """Accuracy on the test part."""
    return Evaluator(plan.network, table.X_test, table.y_test)(weights)["accuracy"]


def central(table: Table, c: Choice, epsilon: float, seed: int) -> float:
    """Our DP-SGD by one party that has every record."""
    plan = plan_for(c, epsilon, seed, table.sites(SITES, seed))
    return score(plan, table, baselines.central(plan, [baselines.Table(table.X, table.y)]))


def federated(table: Table, c: Choice, epsilon: float, seed: int, *, clients: bool = False) -> float:
    """A whole run of the platform over virtual sites."""
    sites = table.sites(CLIENTS if clients else SITES, seed)
    with tempfile.TemporaryDirectory() as folder:
        run = fv.simulate(
            c.network, sites, epsilon=epsilon, delta=DELTA, sum="plain", mode="client" if clients else "distributed",
            hidden=NETWORKS[c.network], clip=c.clip, sample_rate=c.rate, steps=c.steps, local_steps=c.local,
            learning_rate=c.learning_rate, momentum=0.0 if clients else 0.9, seed=seed, out=Path(folder) / "run",
            report=False, compare=False, quiet=True,
        )  # fmt: skip
        return run.metrics["accuracy"]


def opacus(table: Table, c: Choice, epsilon: float, seed: int) -> float:
    """Opacus as its documentation uses it: its engine, sampler and accountant choose the noise for ε."""
    torch.manual_seed(seed)
    model = build(ModelSpec(name=c.network, inputs=784, classes=10, hidden=NETWORKS[c.network], seed=seed))  # type: ignore[arg-type]
    rows = TensorDataset(torch.from_numpy(table.X), torch.from_numpy(table.y))
    epochs = round(c.steps * c.rate)
    made = PrivacyEngine(accountant="prv").make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=c.learning_rate, momentum=0.9),
        data_loader=DataLoader(rows, batch_size=round(c.rate * len(rows))), target_epsilon=epsilon, target_delta=DELTA,
        epochs=epochs, max_grad_norm=c.clip,
    )  # fmt: skip
    private, optimiser, loader = cast(nn.Module, made[0]), made[1], made[2]
    for _ in range(epochs):
        with BatchMemoryManager(
            data_loader=cast(DataLoader[Any], loader), max_physical_batch_size=256, optimizer=optimiser
        ) as parts:
            for X, y in parts:
                optimiser.zero_grad()
                nn.functional.cross_entropy(private(X), y).backward()
                optimiser.step()
    with torch.no_grad():
        return float((private(torch.from_numpy(table.X_test)).argmax(1).numpy() == table.y_test).mean())


def client_maths(table: Table, c: Choice, epsilon: float, seed: int) -> float:
    """Federated averaging with one noise on the sum of the clipped updates: what pfl and we both compute."""
    sites = table.sites(CLIENTS, seed)
    plan = plan_for(c, epsilon, seed, sites, mode="client")
    each = min(len(y) for _, y in sites.parts)
    X, y = np.stack([X[:each] for X, _ in sites.parts]), np.stack([y[:each] for _, y in sites.parts])
    engine, state, rng = clipper(plan.network, "numpy", "cpu"), start(plan), np.random.default_rng(seed)  # noqa: TID251
    for _ in range(c.steps):
        engine.load(state.weights.astype(np.float32))
        total = client_updates(engine, plan, X, y).sum(0)
        total += rng.normal(size=total.size) * plan.noise_multiplier * c.clip
        state = state.step(plan, total)
    return score(plan, table, state.weights)


def pfl(table: Table, c: Choice, epsilon: float, seed: int) -> float:
    """pfl-research's federated averaging with its Gaussian mechanism at the noise of the same ε."""
    sites = table.sites(CLIENTS, seed)
    plan = plan_for(c, epsilon, seed, sites, mode="client")
    given = {
        "steps": c.steps, "local": c.local, "learning_rate": c.learning_rate, "clip": c.clip,
        "noise": plan.noise_multiplier, "seed": seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        sizes = np.array([len(y) for _, y in sites.parts])
        X, y = (np.concatenate([part[i] for part in sites.parts]) for i in (0, 1))
        np.savez(path, X=X, y=y, sizes=sizes, X_test=table.X_test, y_test=table.y_test)
        command = [PFL, str(Path(__file__).parent / "pfl_accuracy.py"), str(path), json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["accuracy"])


Method = Callable[[Table, Choice, float, int], float]


def chosen(method: Method, grid: list[Choice], table: Table, epsilon: float) -> Choice:
    """The best of the grid on records held out of the training records."""
    return max(grid, key=lambda c: method(table.inner(), c, epsilon, CHOOSING))


def figure(method: Any, table: Table, c: Choice, epsilon: float, **more: Any) -> str:
    """Mean and standard error over the seeds."""
    found = [method(table, c, epsilon, seed, **more) for seed in SEEDS]
    return f"{statistics.mean(found):.3f} ± {standard_error(found):.3f}"


def rows(table: Table) -> tuple[list[str], list[str]]:
    """One line for each unit and ε, and what was chosen for each."""
    lines, choices = [], []
    for epsilon in EPSILONS:
        own, other = (chosen(m, RECORDS, table, epsilon) for m in (central, opacus))
        figures = (
            figure(federated, table, own, epsilon), figure(central, table, own, epsilon),
            figure(opacus, table, other, epsilon),
        )  # fmt: skip
        lines.append(f"| record | {epsilon:g} | {SITES} | {' | '.join(figures)} | - |")
        choices += [f"* record, ε = {epsilon:g}: ours {own}; Opacus {other}"]
        print(lines[-1], choices[-1], flush=True)
    for epsilon in CLIENT_EPSILONS:
        both = chosen(client_maths, WHOLE_CLIENTS, table, epsilon)
        ours = figure(federated, table, both, epsilon, clients=True)
        theirs = figure(pfl, table, both, epsilon) if PFL else "not run"
        lines.append(f"| client | {epsilon:g} | {CLIENTS:,} | {ours} | - | - | {theirs} |")
        choices += [f"* client, ε = {epsilon:g}: {both}"]
        print(lines[-1], choices[-1], flush=True)
    return lines, choices


def page() -> str:
    """The whole document."""
    began, (lines, choices) = time.perf_counter(), rows(images())
    return f"""# MNIST beside Opacus and pfl-research

Written by `make bench-mnist` in {time.perf_counter() - began:.0f} s on a machine with {os.cpu_count()} cores
({platform.machine()}), torch {version("torch")}, Opacus {version("opacus")}, Python {platform.python_version()}.

The 10,000 images of MNIST's test set: 8,000 are trained on, 2,000 are the test table. Accuracy, mean and standard error
over three seeds (first weights, how records are dealt out; noise is never seeded), δ = {DELTA:g}. Each method's
hyper-parameters are the best of {len(RECORDS)} (client: {len(WHOLE_CLIENTS)}) on a fifth that was held out of the
8,000. Choosing them is not charged anywhere: the images are public.

*Federated* is a whole run of the platform, `fv.simulate` with its default trust: nobody counts on the noise of t
colluders and d drop-outs. So the sum holds more noise than its ε needs; with {CLIENTS:,} clients, of whom a sixth may
collude and a sixth be missing, 1.22 times as much. *Central* is our DP-SGD and *Opacus* is Opacus', by one party that
sees every record. pfl trusts its server with every update, and adds one noise.

| unit | ε | sites | federated | central | Opacus | pfl |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

What was chosen:

{chr(10).join(choices)}
"""


def main() -> None:
    """Write the page."""
    warnings.filterwarnings("ignore")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    target.write_text(page())
    print(target)


if __name__ == "__main__":
    main()
