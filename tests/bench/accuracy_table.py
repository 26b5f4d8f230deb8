"""`make bench-accuracy`: what privacy costs in accuracy, and what a trusted party would save; docs/bench-accuracy.md.

Digits over 5 and 20 sites: the platform's own server and client apps in process. Every charge and share of noise is
real; the sum is in the clear (the same integers as with ``keysum``). Beside it: DP-SGD on the pooled records at the
same total noise, and noise at every site. Heart records of four hospitals: pooled, federated, alone.
`python tests/bench/accuracy_table.py [output file]`; jobs run in as many processes as there are cores.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import accuracy_heart as heart
import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import baselines, datasets, simulate
from fedveil.deploy.lab.baselines import Table
from fedveil.deploy.lab.sites import Sites
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.bundle import MODEL
from fedveil.server.evaluate import Evaluator

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-accuracy.md"
SITES, EPSILONS, DELTA = (5, 20), (1.0, 2.0, 4.0, 8.0), 1e-5
# Noise moves the accuracy most at a small ε; there the means need more seeds.
SEEDS = {1.0: 16, 2.0: 12, 4.0: 6, 8.0: 6}
DRAWS = 2  # of central DP-SGD's noise at every seed: it is cheap, and its mean should not be what varies
CLOSE = 0.01
# Chosen for local DP on other splits (seeds from 100 up): logistic regression, clip 0.5; (steps, learning rate).
LOCAL = {
    (5, 1.0): (30, 1.0), (5, 2.0): (30, 1.0), (5, 4.0): (60, 1.0), (5, 8.0): (120, 1.0),
    (20, 1.0): (60, 0.1), (20, 2.0): (30, 1.0), (20, 4.0): (120, 0.3), (20, 8.0): (60, 1.0),
}  # fmt: skip
HEART_EPSILONS, HEART_SEEDS = (1.0, 3.0, 10.0), 12
# The same for the heart records: (steps, clip, learning rate, momentum); None is training without noise.
TOGETHER = {None: (100, 50.0, 0.1, 0.9), 1.0: (40, 0.5, 1.0, 0.0), 3.0: (40, 0.5, 1.0, 0.9), 10.0: (40, 0.5, 1.0, 0.9)}
ALONE = {None: (50, 50.0, 0.1, 0.9), 1.0: (10, 0.5, 1.0, 0.9), 3.0: (10, 0.5, 3.0, 0.0), 10.0: (40, 0.5, 0.3, 0.9)}
Metrics = dict[str, float]
Weights = NDArray[np.float64]
Row = dict[str, float]


def federated(config: simulate.Config, split: Sites, plan: PrivacyPlan) -> tuple[Metrics, Weights]:
    """The platform: public test metrics and the final weights of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        outcome = simulate.run_split(config, split, plan, folder, report=False, engine="closed")
        return outcome.metrics, np.fromfile(folder / MODEL, "<f4").astype(np.float64)


def digits(sites: int, epsilon: float, seed: int) -> Row:
    """Accuracy of every arrangement on one split of digits."""
    torch.set_num_threads(1)
    split = datasets.load("digits", sites, seed)
    parts = [Table(X, y) for X, y in split.parts]
    pool = Table(np.concatenate([p.X for p in parts]), np.concatenate([p.y for p in parts]))
    out: Row = {}
    for name, tolerance in (("open", 0), ("default", None)):
        config = simulate.Config(
            clients=sites, epsilon=epsilon, sum="plain", seed=seed, colluders=tolerance, dropouts=tolerance
        )
        plan = simulate.make_plan(config, split)
        out[name] = federated(config, split, plan)[0]["accuracy"]
        noise = plan.noise_multiplier * math.sqrt(plan.sites / plan.honest)
        score = Evaluator(plan.network, split.X_test, split.y_test)
        runs = [baselines.dp_sgd(plan, pool, records=split.records, noise=noise) for _ in range(DRAWS)]
        out[f"central {name}"] = statistics.mean(score(w)["accuracy"] for w in runs)
    steps, rate = LOCAL[sites, epsilon]
    model = ModelSpec(name="logistic", inputs=split.inputs, classes=split.classes)
    local = _plan(model, sites, split.records, epsilon, (steps, 0.5, rate, 0.9))
    out["local"] = Evaluator(model, split.X_test, split.y_test)(baselines.local(local, parts))["accuracy"]
    return out


def _plan(
    model: ModelSpec, sites: int, records: int, epsilon: float, recipe: tuple[int, float, float, float]
) -> PrivacyPlan:
    steps, clip, rate, momentum = recipe
    return make_plan(
        sum="plain", sites=sites, records=records, epsilon=epsilon, delta=DELTA, steps=steps, clip=clip, model=model,
        optimizer=Optimizer(learning_rate=rate, momentum=momentum), contract_hash="0" * 64,
    )  # fmt: skip


def hospitals(seed: int) -> Row:
    """AUC and accuracy of every arrangement on one split of the heart records, on all and on own test rows."""
    torch.set_num_threads(1)
    train, test = heart.load(heart.path()).split(seed)
    model = ModelSpec(name="logistic", inputs=train[0].X.shape[1], classes=2)
    everywhere = Table(np.concatenate([t.X for t in test]), np.concatenate([t.y for t in test]))
    score = Evaluator(model, everywhere.X, everywhere.y)
    own = [Evaluator(model, t.X, t.y) for t in test]
    records = sum(len(t.y) for t in train)
    out: Row = {}

    def note(name: str, metrics: Metrics) -> None:
        out.update({f"{name} {k}": v for k, v in metrics.items()})

    for epsilon in (None, *HEART_EPSILONS):
        plan = _plan(model, len(train), records, epsilon or 1.0, TOGETHER[epsilon])
        weights = (baselines.central if epsilon else baselines.pooled)(plan, train)
        note(f"{epsilon} pooled", score(weights))
        if epsilon:
            split = Sites([(t.X, t.y) for t in train], everywhere.X, everywhere.y, 2)
            config = simulate.Config(clients=len(train), dataset="heart", epsilon=epsilon, sum="plain")
            metrics, weights = federated(config, split, plan)
            note(f"{epsilon} federated", metrics)
        for i, h in enumerate(heart.HOSPITALS):
            note(f"{epsilon} together {h}", own[i](weights))
        alone = _plan(model, len(train), records, epsilon or 1.0, ALONE[epsilon])
        for i, (h, part) in enumerate(zip(heart.HOSPITALS, train, strict=True)):
            noise = alone.noise_multiplier if epsilon else 0.0
            w = baselines.dp_sgd(alone, part, records=len(part.y), noise=noise)
            note(f"{epsilon} {h}", score(w))
            note(f"{epsilon} alone {h}", own[i](w))
    note("majority", baselines.majority(train, everywhere))
    return out


# -- what is shown ------------------------------------------------------------------------------------------------


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard error."""
    return f"{statistics.mean(values):{sign}.3f} ± {error(values):.3f}"


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def digits_page(found: dict[tuple[int, float], list[Row]]) -> str:
    """The table of digits."""
    lines = []
    for (sites, epsilon), rows in found.items():
        column = {k: [r[k] for r in rows] for k in rows[0]}
        gaps = [[a - b for a, b in zip(column[x], column[f"central {x}"], strict=True)] for x in ("open", "default")]
        price = statistics.mean(column["open"]) - statistics.mean(column["default"])
        within = all(abs(statistics.mean(g)) <= CLOSE for g in gaps)
        cells = [
            spread(column["central open"]), spread(column["open"]), spread(gaps[0], "+"),
            spread(column["central default"]), spread(column["default"]), spread(gaps[1], "+"),
            f"{price:+.3f}", spread(column["local"]), "yes" if within else "no", str(len(rows)),
        ]  # fmt: skip
        lines.append(f"| {epsilon:g} | {sites} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heart_page(rows: list[Row]) -> str:
    """The tables of the four hospitals."""
    names = [h.capitalize() if h != "va" else "VA" for h in heart.HOSPITALS]
    mean = lambda key: statistics.mean(r[key] for r in rows)  # noqa: E731
    out = []
    for metric, title in (("auc", "AUC"), ("accuracy", "Accuracy")):
        out += [
            f"{title} on the test rows of all four:",
            "",
            f"| ε | pooled, one trusted party | federated | {' | '.join(n + ' alone' for n in names)} |",
            "|---|---|---|---|---|---|---|",
        ]
        for epsilon in (None, *reversed(HEART_EPSILONS)):
            pooled = spread([r[f"{epsilon} pooled {metric}"] for r in rows])
            together = spread([r[f"{epsilon} federated {metric}"] for r in rows]) if epsilon else "the same sums"
            alone = [f"{mean(f'{epsilon} {h} {metric}'):.3f}" for h in heart.HOSPITALS]
            label = f"{epsilon:g}" if epsilon else "none"
            out.append(f"| {label} | {pooled} | {together} | {' | '.join(alone)} |")
        out.append("")
    out += [
        f"Always guessing the commoner class has accuracy {mean('majority accuracy'):.3f} on these rows. The next "
        "table is AUC on each hospital's own test rows. (Switzerland's hold two healthy patients, so its figures mean "
        "little.)",
        "",
        f"| ε | {' | '.join(n + ' together' + ' | alone' for n in names)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for epsilon in (None, *reversed(HEART_EPSILONS)):
        cells = [f"{mean(f'{epsilon} {who} {h} auc'):.3f}" for h in heart.HOSPITALS for who in ("together", "alone")]
        out.append(f"| {f'{epsilon:g}' if epsilon else 'none'} | {' | '.join(cells)} |")
    return "\n".join(out)


def plot(found: dict[tuple[int, float], list[Row]], path: Path) -> None:
    """Accuracy over ε, one panel for each number of sites."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "fedveil"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SITES), figsize=(10, 4), sharey=True, layout="constrained")
    curves = (
        ("central open", "central: one trusted party", "k", "--"),
        ("open", "distributed, t = d = 0", "tab:blue", "-"),
        ("default", "distributed, default t and d", "tab:green", "-"),
        ("local", "local: all noise at every site", "tab:red", "-"),
    )
    for axis, sites in zip(axes, SITES, strict=True):
        for key, label, colour, style in curves:
            values = [[r[key] for r in found[sites, e]] for e in EPSILONS]
            means, errors = [statistics.mean(v) for v in values], [error(v) for v in values]
            axis.errorbar(EPSILONS, means, errors, color=colour, linestyle=style, marker="o", ms=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(EPSILONS, [f"{e:g}" for e in EPSILONS])
        axis.set_xlabel("ε")
        axis.set_title(f"digits, {sites} sites")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on the public test fifth")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(work: Callable[[], tuple[dict[tuple[int, float], list[Row]], list[Row]]], picture: Path) -> str:
    """The whole document; writes the picture beside it."""
    start = time.perf_counter()
    found, rows = work()
    plot(found, picture)
    if rows:
        hearts = HEART_TEXT + heart_page(rows) + "\n"
    else:
        hearts = f"Not run: {heart.path().name} was not found (set FEDVEIL_DATA to its folder).\n"
    return f"""# What privacy costs in accuracy

Written by `make bench-accuracy` in {time.perf_counter() - start:.0f} s on {os.cpu_count()} cores
({platform.machine()}), torch {version("torch")}, dp-accounting {version("dp-accounting")}.
Figures are means ± standard error over seeds. A seed fixes the split and the initial weights. Noise and keys are
fresh.

## Digits

The data are scikit-learn's 8x8 digits: 1,437 records shared out evenly, and 360 public test records. The network has
one hidden layer of 32, with the recipe of `fedveil simulate` (δ = {DELTA:g}).

- *Distributed* is the platform itself: server and sites in one process, with all charges, clipping, grid, clamp and
  shares of noise as in a real run. The sum is in the clear; it is the same integers that `keysum` opens.
- *Central* is DP-SGD on the pooled records by one party that all trust ({DRAWS} draws of the noise for every seed).
- With t = d = 0 the sum carries exactly the noise of central DP-SGD at the same ε.
- The default t and d (5 sites: 1 and 1; 20 sites: 3 and 3) add noise so that ε still holds when t sites collude and d
  are missing. Beside it stands central DP-SGD at that same total noise, σ·sqrt(n/h).
- *Local* adds the whole noise at every site, which platforms without a secure sum offer. It has a recipe of its own:
  logistic regression, chosen on other splits.

{HEAD}
{digits_page(found)}

![accuracy over epsilon]({picture.name})

## Heart disease, four hospitals

{hearts}"""


HEAD = f"""\
| ε | sites | central | distributed, t = d = 0 | difference | central at σ·sqrt(n/h) | distributed, default t, d \
| difference | price of t, d | local | both differences within {CLOSE:g} | seeds |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


HEART_TEXT = f"""\
The data are UCI Heart Disease: Cleveland 303, Hungarian 294, Switzerland 123, VA 200 patients. The target is
`num > 0`. The code of the sites encodes the rows under a data contract (`tests/bench/accuracy_heart.py`): public
bounds for six numbers, one-hot codes for seven columns, an indicator where a value may be missing. `?` means missing,
and so does a cholesterol or blood pressure of 0 (all of Switzerland's cholesterol). Nothing is fitted: no scaler, no
imputation from the data. A stratified quarter of every hospital is the test set. There are {HEART_SEEDS} splits. The
model is logistic regression. Recipes were chosen on other splits, one for training together and one for training
alone at each ε.

*Federated* is `distributed` with the default t = d = 1 of four sites. So h = 2, and its sums hold sqrt(2) times the
noise of the trusted party beside it at the same ε. Without noise a federated step is the same sum as a pooled one.
*Alone* is one hospital's own DP-SGD at the same ε.

"""


def run() -> tuple[dict[tuple[int, float], list[Row]], list[Row]]:
    """All jobs, spread over the cores."""
    cases = list(itertools.product(SITES, EPSILONS))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {(n, e): [pool.submit(digits, n, e, s) for s in range(SEEDS[e])] for n, e in cases}
        more = [pool.submit(hospitals, s) for s in range(HEART_SEEDS)] if heart.path().is_file() else []
        found = {}
        for case, waiting in jobs.items():
            found[case] = [j.result() for j in waiting]
            print(digits_page({case: found[case]}), flush=True)
        if not more:
            print(f"skipped: {heart.path()} was not found (set FEDVEIL_DATA to its folder)", flush=True)
        return found, [j.result() for j in more]


def main() -> None:
    """Write the page and the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    target.write_text(page(run, target.with_suffix(".svg")))
    print(target)


if __name__ == "__main__":
    main()
