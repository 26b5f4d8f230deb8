"""`make bench-place`: how far one record, or one person, moves a site's sum under weights that a hostile server sends.

Every engine, precision and network that go together, on the product's own path (``fedveil.client.train.site_sum``).
Each draw has new weights: units in identical pairs, which the next layer adds with huge opposite factors, so that what
is left is rounding. The same step is computed twice, with the same coins: with the record at its place, and with that
place empty. Beside it the negative control: places switched off, so that taking the first record out moves all others
by one. Whether that shows depends on the processor and its libraries. So both are done again with a rounding that
depends on a row's place planted into every linear and convolutional layer. Then: whether the time of a step tells how
many records were sampled.

``DRAWS=200 python tests/bench/place_table.py [output file]``; 20 draws by default.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.client import train
from fedveil.common.errors import ModelError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, trainable
from fedveil.privacy.dp.clipping import Clipper, Engine, Precision, problem
from fedveil.privacy.dp.places import EMPTY, seat
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-place.md"
DRAWS = int(os.environ.get("DRAWS", "20"))
HEAD = (
    "network", "engine", "precision", "record", "person", "sensitivity", "holds", "rows alone", "places off", "planted",
    "planted, places off",
)  # fmt: skip
CAPACITY, HELD, ROWS, STEPS = 48, 40, 20, 1000
NETWORKS = {
    "mlp 101-37-19-3": ModelSpec(name="mlp", inputs=101, classes=3, hidden=(37, 19)),
    "mlp 100-64-10": ModelSpec(name="mlp", inputs=100, classes=10, hidden=(64,)),
    "mlp 13-33-2": ModelSpec(name="mlp", inputs=13, classes=2, hidden=(33,)),
    "cnn 12x12 (4, 7)": ModelSpec(name="cnn", inputs=144, classes=3, hidden=(4, 7)),
    "cnn 8x8 (4, 8)": ModelSpec(name="cnn", inputs=64, classes=3, hidden=(4, 8)),
    "resnet 8x8 (5, 7)": ModelSpec(name="resnet", inputs=64, classes=3, hidden=(1, 5, 7)),
    "resnet 8x8 (4, 8)": ModelSpec(name="resnet", inputs=64, classes=3, hidden=(1, 4, 8)),
    "transformer (7 tokens, width 10)": ModelSpec(name="transformer", inputs=7, classes=3, hidden=(11, 10, 2, 1)),
    "transformer (8 tokens, width 16)": ModelSpec(name="transformer", inputs=8, classes=3, hidden=(16, 16, 2, 1)),
    "lstm (7 tokens, 9, 13)": ModelSpec(name="lstm", inputs=7, classes=3, hidden=(11, 9, 13)),
    "lstm (8 tokens, 8, 16)": ModelSpec(name="lstm", inputs=8, classes=3, hidden=(16, 8, 16)),
    "lora-mlp 13-17-3, rank 3": ModelSpec(name="lora-mlp", inputs=13, classes=3, hidden=(3, 17)),
    "lora-mlp 16-32-4, rank 4": ModelSpec(name="lora-mlp", inputs=16, classes=4, hidden=(4, 32)),
}


def hostile(spec: ModelSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    """``(D,)`` weights that cancel: identical pairs of units, added with +A and -A by the next layer."""
    values = [rng.standard_normal(p.shape) / np.sqrt(max(1, p[0].numel())) for p in trainable(build(spec))]
    wide = [i for i, v in enumerate(values) if v.ndim >= 2]
    before, last = wide[-2], wide[-1]
    units = len(values[before])
    order = rng.permutation(units)
    first, second = order[: units // 2], order[units // 2 : 2 * (units // 2)]
    values[before][second] = values[before][first]
    if before + 1 < last and len(values[before + 1]) == units:
        values[before + 1][second] = values[before + 1][first]
    scale = 10.0 ** rng.uniform(9, 16)
    each = values[last].shape[1] // units
    if each * units == values[last].shape[1]:
        factors = np.zeros((len(values[last]), units, each))
        factors[:, first] = rng.standard_normal((len(factors), len(first), each)) * scale
        factors[:, second] = -factors[:, first]
        values[last] = factors.reshape(values[last].shape)
    else:
        values[last] *= scale
    return np.concatenate([v.ravel() for v in values]).astype(np.float32)


def records(spec: ModelSpec, n: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Records of the kind that the network takes."""
    X = rng.integers(0, spec.vocabulary, (n, spec.inputs)) if spec.vocabulary else rng.random((n, spec.inputs))
    return X.astype(np.float32), rng.integers(0, spec.classes, n)


def plan_for(spec: ModelSpec, rows: int | None) -> PrivacyPlan:
    """The plan whose sensitivity is the bound."""
    return make_plan(
        sites=4, records=4 * CAPACITY, capacity=CAPACITY, rows_per_person=rows, epsilon=4.0, steps=4, clip=1.0,
        contract_hash="c" * 64, model=spec, optimizer=Optimizer(learning_rate=0.5),
    )  # fmt: skip


def moved(clipper: Clipper, plan: PrivacyPlan, spec: ModelSpec, rng: np.random.Generator) -> float:
    """How far one unit, taken out of its place, moves the site's sum; one draw on the product's own path."""
    persons, n = None, HELD
    if plan.unit == "person":
        persons = np.arange(HELD * ROWS).reshape(HELD, ROWS)
        persons[1::3, 5:] = EMPTY
        n = HELD * ROWS
    X, y = records(spec, n, rng)
    if not spec.vocabulary:
        X[:ROWS] *= np.float32(10.0 ** rng.uniform(0, 6))
    weights, seats = hostile(spec, rng), seat(HELD, plan.sample_rate, plan.places(CAPACITY))
    sums = []
    for own in (seats, np.where(seats == 0, EMPTY, seats)):
        with patch.object(train, "seat", lambda *_, own=own: own):
            sums.append(train.site_sum(clipper, plan, weights, X, y, CAPACITY, persons))
    return float(np.linalg.norm(sums[0] - sums[1]))


def shifted(clipper: Clipper, spec: ModelSpec, rng: np.random.Generator) -> float:
    """The same without places: the first record is taken out, and all others move by one."""
    X, y = records(spec, HELD, rng)
    clipper.load(hostile(spec, rng))
    whole, less = clipper.clipped_sum(X, y, 1.0), clipper.clipped_sum(X[1:], y[1:], 1.0)
    return float(np.linalg.norm(whole.values - less.values))


@contextmanager
def rounds_by_place() -> Iterator[None]:
    """Layers whose last bits depend on a row's place, as some processors' do."""

    def around(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            out = plain(self, x)
            place = torch.arange(len(out)).view(-1, *[1] * (out.dim() - 1))
            at = 1 if isinstance(self, nn.Conv2d) else out.dim() - 1
            unit = torch.arange(out.shape[at]).view([-1 if i == at else 1 for i in range(out.dim())])
            return out * (1 + 2.0**-22 * ((place + unit) % 3 == 0))

        return forward

    with ExitStack() as stack:
        for layer in (nn.Linear, nn.Conv2d):
            stack.enter_context(patch.object(layer, "forward", around(layer.forward)))
        yield


def rows() -> tuple[list[str], bool]:
    """One line for every network, engine and precision, and whether every bound held."""
    lines, held = [], True
    for name, spec in NETWORKS.items():
        plan, person = plan_for(spec, None), plan_for(spec, ROWS)
        for engine in get_args(Engine):
            for precision in get_args(Precision):
                try:
                    clipper = Clipper(build(spec), engine, precision=precision)
                except ModelError:
                    continue  # the engine does not know this network
                rng = np.random.default_rng(7)
                alone = problem(clipper, spec.inputs, CAPACITY) or "yes"
                one = max(moved(clipper, plan, spec, rng) for _ in range(DRAWS))
                off = max(shifted(clipper, spec, rng) for _ in range(DRAWS))
                many = float("nan")
                if engine != "numpy":  # it takes one row for each place
                    many = max(moved(clipper, person, spec, rng) for _ in range(DRAWS))
                planted = planted_off = float("nan")
                if engine not in ("numpy", "vmap"):  # they do not call the layers batch by batch
                    with rounds_by_place():
                        planted = max(moved(clipper, plan, spec, rng) for _ in range(DRAWS))
                        planted_off = max(shifted(clipper, spec, rng) for _ in range(DRAWS))
                ok = one <= plan.sensitivity and not many > person.sensitivity and not planted > plan.sensitivity
                held &= ok and alone == "yes"
                lines.append(
                    f"| {name} | {engine} | {precision} | {one:.6f} | {_cell(many)} "
                    f"| {plan.sensitivity:.4f} | {'yes' if ok else 'NO'} | {alone} | {off:.2f} "
                    f"| {_cell(planted)} | {_cell(planted_off, 2)} |"
                )
                print(lines[-1], flush=True)
    return lines, held


def _cell(value: float, digits: int = 6) -> str:
    return "-" if value != value else f"{value:.{digits}f}"


def times() -> str:
    """Whether the time of a step tells how many records were sampled."""
    spec = NETWORKS["mlp 100-64-10"]
    plan = make_plan(
        sites=4, records=4 * 500, capacity=500, epsilon=4.0, steps=100, clip=1.0, contract_hash="c" * 64, model=spec,
        optimizer=Optimizer(learning_rate=0.5), sample_rate=0.2,
    )  # fmt: skip
    clipper = train.clipper(spec, "auto", "cpu", places=plan.places(500))
    rng = np.random.default_rng(3)
    X, y = records(spec, 500, rng)
    weights = rng.standard_normal(spec.parameters).astype(np.float32)
    sampled, taken = [], []
    drawn = train.seat

    def counted(*given: float) -> NDArray[np.int64]:
        seats = drawn(*given)  # type: ignore[arg-type]
        sampled.append(int((seats >= 0).sum()))
        return seats

    with patch.object(train, "seat", counted):
        for _ in range(STEPS):
            start = time.process_time_ns()
            train.site_sum(clipper, plan, weights, X, y, 500)
            taken.append(time.process_time_ns() - start)
    first, second = (np.argsort(np.argsort(v)) for v in (sampled, taken))
    r, rank = np.corrcoef(sampled, taken)[0, 1], np.corrcoef(first, second)[0, 1]
    return (
        f"Over {STEPS:,} steps (engine {clipper.engine}, {plan.places(500)} places, {min(sampled)} to {max(sampled)} "
        f"records sampled) the correlation of a step's CPU time with the number of sampled records is {r:+.3f} "
        f"(of their ranks {rank:+.3f}); |r| < 0.1: {'yes' if abs(r) < 0.1 and abs(rank) < 0.1 else 'NO'}."
    )


def main() -> None:
    """Write the page; the exit code is 1 if a bound does not hold."""
    torch.set_num_threads(1)
    lines, held = rows()
    said = times()
    print(said)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    target.write_text(f"""# One record under hostile weights

Written by `make bench-place`: {DRAWS} draws of weights and places for each line, {HELD} units at {CAPACITY} places,
clip 1.
*Record* and *person* (up to {ROWS} rows) are the largest distances between two sums that differ in one unit. They must
not be above the plan's sensitivity. *Places off* is the negative control: the same weights, but a record that is taken
out moves all others by one place. *Rows alone* is the test of assumption A1 ([sensitivity](sensitivity.md)).

Whether the control breaks the bound depends on the processor and its libraries: some round a row alike at every place
of these small batches. *Planted*: records once more, with a rounding that depends on a row's place planted into every
linear and convolutional layer. With places the bound holds all the same, without them it breaks.

| {" | ".join(HEAD)} |
|{"---|" * len(HEAD)}
{chr(10).join(lines)}

{said}
""")
    print(target)
    sys.exit(not held or "NO" in said)


if __name__ == "__main__":
    main()
