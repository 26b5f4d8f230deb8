"""`make bench-round`: a private round beside a plain one, and where its time goes; writes docs/bench-round.md.

Private: the product's own path in one process, four virtual sites and the server, every message included: clipping,
noise, ledger rows, encryption under the sum of keys, agreement, opening, fingerprints, and the sites' own step. Plain:
Flower's own FedAvg with one step of SGD at each site, the same network, records and in-process engine. Bare: the same
arithmetic without any message. All take turns in one run; figures are medians of rounds, wall seconds. What a
simulation leaves out is fsync, TLS and the network: see docs/bench-transport.md. ``python tests/bench/round_table.py
[output file]``, five minutes.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedveil.client import own_model
from fedveil.client import round as line
from fedveil.client.app import make_app as client_app
from fedveil.common import flwr_adapter
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-round.md"
SITES, ROUNDS, TURNS = 4, 3, 2
FEATURES = 64
MODELS = {
    "MLP, 1M": ModelSpec(name="mlp", inputs=FEATURES, classes=2, hidden=(700, 1330)),
    "MLP, 11M": ModelSpec(name="mlp", inputs=FEATURES, classes=2, hidden=(2600, 4160)),
    "ResNet 16x16, 11M": ModelSpec(name="resnet", inputs=768, classes=2, hidden=(3, 96, 192, 384, 768)),
}
CASES = (("MLP, 1M", 64, 2.0), ("MLP, 11M", 64, 2.5), ("ResNet 16x16, 11M", 64, 2.5), ("MLP, 1M", 1000, None))
REST = 0.15  # of a round with 1,000 records a site, beyond the clipped sum
Tables = list[tuple[np.ndarray, np.ndarray]]
# (what, whose function, its name); the clipped sum and the noise are looked up where a round is answered
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("clipped sum", line, "site_sum"),
    ("noise", line, "discrete_gaussian"),
    ("to the grid", line, "to_grid"),
    ("encrypt, share, sign, keep", KeysumSite, "contribute"),
    ("fingerprint", KeysumSite, "fingerprint"),
    ("add at the server", KeysumServer, "add"),
    ("open at the server", KeysumServer, "fingerprint_requests"),
    ("verify the opened sum", KeysumSite, "opened"),
    ("step the model", own_model, "_stepped"),
)


def plan_of(model: ModelSpec, records: int) -> PrivacyPlan:
    """Every record in every step, a tenth more places than records."""
    return make_plan(
        sites=SITES, records=SITES * records, capacity=records + records // 10, epsilon=8.0, steps=ROUNDS + 1,
        clip=1.0, sample_rate=1.0, contract_hash="c" * 64, optimizer=Optimizer(learning_rate=0.1), model=model,
    )  # fmt: skip


def tables(model: ModelSpec, records: int) -> Tables:
    """Made-up records of every site."""
    rng = np.random.default_rng(0)
    return [(rng.random((records, model.inputs), np.float32), rng.integers(0, 2, records)) for _ in range(SITES)]


@contextmanager
def timed(taken: dict[str, float]) -> Iterator[None]:
    """Adds up the time within each of :data:`PARTS`."""

    def around(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **named)
            finally:
                taken[what] = taken.get(what, 0.0) + time.perf_counter() - start

        return run

    with ExitStack() as stack:
        for what, owner, name in PARTS:
            stack.enter_context(patch.object(owner, name, around(what, getattr(owner, name))))
        yield


def private(plan: PrivacyPlan, data: Tables) -> tuple[list[float], dict[str, float]]:
    """Seconds of each round but the first, and of its parts (of all sites together, per round)."""
    marks: list[float] = []
    taken: dict[str, float] = {}

    def progress(kind: str, body: dict[str, Any]) -> None:
        if kind == "round":
            marks.append(time.perf_counter())
            if len(marks) == 1:
                taken.clear()  # the first round builds engines and tables

    with tempfile.TemporaryDirectory() as scratch, timed(taken):
        world, home = virtual_sites.World.make(SITES), Path(scratch)
        job = jobs.create(
            home / "run", plan, world.roster, world.server, documents=world.documents(), durable=False,
            engine="inprocess", progress=progress,
        )  # fmt: skip
        server, _ = server_app(job)
        sites = virtual_sites.Kept(
            lambda i: virtual_sites.make_site(
                world.roster, i, world.keys[i], plan, *data[i], home, cap=plan.filter_epsilon()
            )
        )
        run_inprocess(server, client_app(sites.resolve), world.sites, lambda _: {})
        sites.close()
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    return seconds, {what: total / len(seconds) for what, total in taken.items()}


def bare(plan: PrivacyPlan, data: Tables) -> list[float]:
    """Seconds of each round of the same arithmetic: a gradient a site, averaged and stepped. No message, no privacy."""
    model = build(plan.network)
    parameters = list(model.parameters())
    given = [(torch.from_numpy(X), torch.from_numpy(y)) for X, y in data]
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        updates = []
        for X, y in given:
            gradients = torch.autograd.grad(nn.functional.cross_entropy(model(X), y), parameters)
            updates.append(torch.cat([g.reshape(-1) for g in gradients]))
        step, at = torch.stack(updates).mean(0), 0
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * step[at : at + p.numel()].view_as(p)
                at += p.numel()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


class _Timed(FedAvg):
    """Federated averaging that notes the time after each round."""

    at: list[float]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """As Flower's."""
        out = super().aggregate_train(server_round, replies)
        self.at.append(time.perf_counter())
        return out


def plain(plan: PrivacyPlan, data: Tables) -> list[float]:
    """Seconds of each round of Flower's FedAvg with one step at each site, on the engine that private rounds run on."""
    client, server, model = ClientApp(), ServerApp(), build(plan.network)
    strategy = _Timed(fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
    strategy.at = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        X, y = (torch.from_numpy(t) for t in data[int(context.node_config["partition-id"])])
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimiser.step()
        own = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(content=RecordDict(own), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=ROUNDS + 1)

    run_inprocess(server, client, virtual_sites.World.make(SITES).sites, lambda _: {})
    return [b - a for a, b in zip(strategy.at, strategy.at[1:], strict=False)]


def section(name: str, records: int, most: float | None) -> list[str]:
    """The lines of one case."""
    plan, data = plan_of(MODELS[name], records), tables(MODELS[name], records)
    taken: dict[str, list[float]] = {"bare": [], "plain": [], "private": []}
    parts: list[dict[str, float]] = []
    for _ in range(TURNS):
        taken["bare"] += bare(plan, data)
        taken["plain"] += plain(plan, data)
        seconds, own = private(plan, data)
        taken["private"] += seconds
        parts.append(own)
    alone, flower, whole = (statistics.median(t) for t in taken.values())
    mean = {what: statistics.mean(p.get(what, 0.0) for p in parts) for what, _, _ in PARTS}
    mean["everything else (messages, hashes, ledger rows, state)"] = max(0.0, whole - sum(mean.values()))
    beyond = 1 - mean["clipped sum"] / whole
    verdict = (
        f"Target: ≤ {most}x plain: {'yes' if whole <= most * flower else 'no'}."
        if most
        else f"Beyond the clipped sum: {beyond:.0%} of the round; target ≤ {REST:.0%}: "
        f"{'yes' if beyond <= REST else 'no'}."
    )
    rows = [
        f"## {name}: {plan.model.parameters:,} parameters, {SITES} sites of {records} records", "",
        f"Bare {alone:.3f} s, plain {flower:.3f} s, private {whole:.3f} s a round: **{whole / flower:.1f}x** plain, "
        f"{whole / alone:.1f}x bare. {verdict}", "",
        "| part | s a round, all sites | share |", "|---|---|---|",
    ]  # fmt: skip
    rows += [f"| {what} | {seconds:.3f} | {seconds / whole:.0%} |" for what, seconds in mean.items()]
    print("\n".join(rows), flush=True)
    return [*rows, ""]


def main(output: Path) -> None:
    """Measure, print, write."""
    flwr_adapter.quiet_flower()
    start = time.perf_counter()
    rows: list[str] = []
    for case in CASES:
        rows += section(*case)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    head = [
        "# A private round beside a plain one", "",
        f"Written by `make bench-round` in {time.perf_counter() - start:.0f} s: {os.cpu_count()} cores "
        f"({platform.machine()}), torch {version('torch')} with {torch.get_num_threads()} threads, NumPy "
        f"{version('numpy')}, flwr {version('flwr')}, Python {platform.python_version()}. Wall seconds, medians of "
        f"{ROUNDS * TURNS} rounds; all kinds take turns. The process held {memory} MiB at "
        "most: a server and all sites.", "",
        "*Private* is the whole path of a round in one process (keysum, ledgers, every message). *Plain* is Flower's "
        "own FedAvg on the same in-process engine: weights out, one step of SGD at each site, weights back, averaged. "
        "*Bare* is that arithmetic without messages. Without fsync, TLS and network: those are in "
        "[bench-transport](bench-transport.md). An MLP is the worst case for privacy: each weight costs one "
        "multiplication a record, while noise, encryption and sums cost the same for any weight.", "",
    ]  # fmt: skip
    output.write_text("\n".join([*head, *rows]), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
