"""`make bench-proposal`: where the constants of `fedveil.simulate`'s proposals come from: docs/bench-proposal.md.

Central DP-SGD (what a federation without drop-outs comes to) on digits, diabetes, Adult and a part of MNIST, the last
two where FEDVEIL_DATA or ../shared/data has them. Each table's training records are split again; figures are of the
part that is held out of them, never of the test table. `python tests/bench/proposal_table.py [output file]`, ten
minutes.
"""

from __future__ import annotations

import gzip
import itertools
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import fedveil as fv
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import baselines, recipes
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.server.evaluate import Evaluator

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-proposal.md"
DATA = Path(os.environ.get("FEDVEIL_DATA", Path(__file__).parents[3] / "shared" / "data"))
EPSILONS, SEEDS = (1.0, 4.0), (100, 101, 102)
WANDER, STEPS, FASTEST = (0.6, 1.2, 2.4), (30, 60, 120), (0.25,)


def tables() -> dict[str, fv.Sites]:
    """The training records of each table, all at one site."""
    out = {name: fv.split(name, clients=1) for name in ("digits", "diabetes")}
    if (DATA / "adult_arx_30162.csv").exists():
        import csv

        with (DATA / "adult_arx_30162.csv").open() as f:
            rows = list(csv.DictReader(f, delimiter=";"))
        columns = {name: np.array([r[name] for r in rows]) for name in rows[0]}
        columns["age"] = columns["age"].astype(float)
        out["Adult"] = fv.split(columns, "salary-class", clients=1)
    if (DATA / "mnist_t10k-images-idx3-ubyte.gz").exists():
        X = np.frombuffer(gzip.decompress((DATA / "mnist_t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
        y = np.frombuffer(gzip.decompress((DATA / "mnist_t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
        out["MNIST, 10,000"] = fv.split((X.reshape(-1, 784) / 255.0, y), clients=1)
    return out


def accuracy(sites: fv.Sites, epsilon: float, recipe: recipes.Recipe) -> float:
    """Mean accuracy over the seeds on records that were held out of the training records."""
    found = []
    for seed in SEEDS:
        own = fv.split(sites.pooled(), clients=1, seed=seed)
        plan = make_plan(
            mode="local", sum="none", sites=1, records=own.records, epsilon=epsilon, steps=recipe.steps,
            clip=recipe.clip, sample_rate=recipe.sample_rate, contract_hash="c" * 64,
            model=ModelSpec(name=recipe.network, inputs=own.inputs, classes=own.classes, hidden=recipe.hidden,  # type: ignore[arg-type]
                            seed=0 if recipe.network == "logistic" else seed),
            optimizer=Optimizer(learning_rate=recipe.learning_rate, momentum=recipe.momentum),
        )  # fmt: skip
        weights = baselines.central(plan, [baselines.Table(*own.parts[0])])
        found.append(Evaluator(plan.network, own.X_test, own.y_test)(weights)["accuracy"])
    return statistics.mean(found)


def proposed(sites: fv.Sites, epsilon: float, wander: float, steps: int, fastest: float) -> recipes.Recipe:
    """What would be proposed with these constants."""
    rule = replace(recipes.RULE, wander=wander, steps=((float("inf"), steps),), fastest=fastest)
    known = {"records": sites.records, "inputs": sites.inputs, "classes": sites.classes}
    return recipes.propose(**known, epsilon=epsilon, delta=1e-5, rule=rule)


def main(output: Path) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    start, found = time.perf_counter(), tables()
    cases = list(itertools.product(found, EPSILONS))
    rows = [f"| wander | steps | longest step | {' | '.join(f'{n}, ε = {e:g}' for n, e in cases)} | worst loss |"]
    rows.append("|" + "---|" * (len(cases) + 4))
    all_ = {
        key: [accuracy(found[n], e, proposed(found[n], e, *key)) for n, e in cases]
        for key in itertools.product(WANDER, STEPS, FASTEST)
    }
    best = [max(column) for column in zip(*all_.values(), strict=True)]
    for key, values in sorted(all_.items(), key=lambda item: max(b - v for b, v in zip(best, item[1], strict=True))):
        worst = max(b - v for b, v in zip(best, values, strict=True))
        rows.append(f"| {' | '.join(f'{k:g}' for k in key)} | {' | '.join(f'{v:.3f}' for v in values)} | {worst:.3f} |")
    text = [
        "# What is proposed for a simulation", "",
        f"Written by `make bench-proposal` in {time.perf_counter() - start:.0f} s. Accuracy of central DP-SGD on "
        f"records held out of the training records, mean of {len(SEEDS)} seeds. The test tables were not looked at.",
        "", *rows, "",
        "*Wander* is how far the noise of all steps together may carry the weights. *Longest step* is the learning "
        "rate times the clip at most. *Worst loss* is to the best value of a column; the first line is what "
        "`fedveil.simulate` proposes.", "",
    ]  # fmt: skip
    output.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
