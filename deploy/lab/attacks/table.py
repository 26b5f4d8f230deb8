"""Every attack on public digits, as a table and a picture: without a defence, with a secure sum, with noise in it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, flatten
from fedveil.deploy.lab.attacks import inversion, membership, views
from fedveil.deploy.lab.attacks.membership import Membership
from fedveil.deploy.lab.datasets import load
from fedveil.privacy.audit.evidence import Part
from fedveil.privacy.dp.accounting import delta_curve
from fedveil.privacy.dp.noise import KeyStream
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.privacy_loss import attack_rate

DEFENCES = ("none", "secure sum", "secure sum with DP")
_SITES = 5


@dataclass(frozen=True)
class Scale:
    """How much is attacked.

    Attributes:
        records: single records, for division and matching. shown: of them in the picture.
        batch: records of each site under the imprint model.
        models: trained for membership, on half of ``members`` records each.
        steps: of each private run for membership.
        epsilon: of the private runs, at δ = 1e-5; a loose and a tight one for membership.
    """

    records: int = 50
    shown: int = 8
    batch: int = 16
    models: int = 24
    members: int = 300
    steps: int = views.STEPS
    epsilon: float = 8.0
    tight: float = 1.0

    @classmethod
    def quick(cls) -> Scale:
        """Seconds instead of a minute."""
        return cls(records=6, shown=6, batch=6, models=6, members=100, steps=20)


@dataclass(frozen=True)
class Row:
    """One attack under one defence: how many of ``of`` records were rebuilt exactly, and the median error."""

    attack: str
    defence: str
    exact: int
    of: int
    error: float


@dataclass(frozen=True)
class Result:
    """Everything found; ``pictures`` holds ``(title, (k, 64) images)``."""

    rows: tuple[Row, ...]
    members: dict[str, Membership]
    bounds: dict[str, float]
    labels_right: float
    epsilon: float
    noise_multiplier: float
    pictures: tuple[tuple[str, NDArray[np.float64]], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Without the pictures."""
        return {
            "v": 1,
            "rebuilt": [asdict(r) for r in self.rows],
            "membership": {k: asdict(m) for k, m in self.members.items()},
            "membership_bounds": self.bounds,
            "labels_right": self.labels_right,
            "epsilon": self.epsilon,
            "noise_multiplier": self.noise_multiplier,
        }

    def table(self) -> str:
        """Both tables, as Markdown."""
        lines = ["| attack | defence | rebuilt exactly | median error per pixel |", "|---|---|---|---|"]
        lines += [
            f"| {r.attack} | {r.defence} | {r.exact / r.of:.0%} ({r.exact} of {r.of}) | {r.error:.2g} |"
            for r in self.rows
        ]
        lines += ["", "| membership of a record (LiRA) | found at 1 % false alarms | at most | AUC | test accuracy |",
                  "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {k} | {m.rate:.1%} | {self.bounds[k]:.1%} | {m.auc:.3f} | {m.accuracy:.3f} |"
            for k, m in self.members.items()
        ]
        return "\n".join(lines)


def run_all(scale: Scale) -> Result:
    """All attacks; about a minute on one core."""
    started = time.process_time()
    split = load("digits", 1, 0)
    X, y = split.parts[0]
    world = views.World(X, y, split.X_test, ModelSpec(name="mlp", inputs=64, classes=10, hidden=(32,), seed=7))
    rows, pictures, labels_right, plan = _single(world, scale)
    more, trap = _imprinted(world, scale)
    members, bounds = _members(world, split.y_test, scale)
    return Result(
        (*rows, *more), members, bounds, labels_right, scale.epsilon, plan.noise_multiplier,
        (*pictures, *trap), time.process_time() - started,
    )  # fmt: skip


def _single(world: views.World, s: Scale):
    """One record for each of five sites: division and matching of what the server sees of the first."""
    spec, weights = world.spec, flatten(build(world.spec))
    plan = views.one_step_plan(spec, _SITES, _SITES, s.epsilon)
    seen: dict[str, list[NDArray[np.float64]]] = {d: [] for d in DEFENCES}
    for i in range(s.records):
        parts: list[Part] = [(world.X[j : j + 1], world.y[j : j + 1]) for j in range(i * _SITES, (i + 1) * _SITES)]
        seen["none"].append(views.gradient(spec, weights, parts[0]))
        seen["secure sum"].append(views.exact_sum(spec, weights, parts))
        seen["secure sum with DP"].append(views.opened(plan, weights, parts))
    records = world.X[: s.records * _SITES : _SITES]
    rows, pictures = [], [("the records", records[: s.shown].astype(np.float64))]
    for defence in DEFENCES:
        divided = np.stack([inversion.best(spec, g) for g in seen[defence]])
        rows.append(_row("division, one record per site", defence, divided, records))
        pictures.append((f"division, {_worded(defence)}", divided[: s.shown]))
    for defence in DEFENCES:
        matched = np.stack([inversion.idlg(spec, g) for g in seen[defence][: s.shown]])
        rows.append(_row("matching (iDLG), one record per site", defence, matched, records[: s.shown]))
        pictures.append((f"iDLG, {_worded(defence)}", matched))
    right = [inversion.label(spec, g) == k for g, k in zip(seen["none"], world.y[::_SITES], strict=False)]
    return rows, pictures, float(np.mean(right)), plan


def _row(attack: str, defence: str, found: NDArray[np.float64], records: NDArray[np.float32]) -> Row:
    off = ((np.clip(found, 0, 1) - records) ** 2).mean(1)  # every attacker knows what a pixel may be
    return Row(attack, defence, int((off < inversion.EXACT).sum()), len(records), float(np.median(off)))


def _worded(defence: str) -> str:
    return "no defence" if defence == "none" else defence


def _imprinted(world: views.World, s: Scale):
    """A server that sends a network made for stealing: every site's batch at once."""
    spec = ModelSpec(name="mlp", inputs=64, classes=10, hidden=(256,), seed=7)
    weights = inversion.imprint(spec, world.X_public)
    parts: list[Part] = [
        (world.X[i : i + s.batch], world.y[i : i + s.batch]) for i in range(0, _SITES * s.batch, s.batch)
    ]
    plan = views.one_step_plan(spec, _SITES, _SITES * s.batch, s.epsilon)
    everyone = world.X[: _SITES * s.batch]
    views_ = {
        "none": (views.gradient(spec, weights, parts[0]), parts[0][0]),
        "secure sum": (views.exact_sum(spec, weights, parts), everyone),
        "secure sum with DP": (views.opened(plan, weights, parts), everyone),
    }
    rows, pictures = [], []
    for defence, (seen, records) in views_.items():
        found = inversion.candidates(spec, seen)
        off = inversion.errors(found, records)
        title = f"imprint, {len(records)} records in what is seen"
        rows.append(Row(title, defence, int((off < inversion.EXACT).sum()), len(records), float(np.median(off))))
        shown = [found[int(np.argmin(((found - x) ** 2).mean(1)))] for x in everyone[: s.shown]]
        pictures.append((f"imprint, {_worded(defence)}", np.stack(shown)))
    return rows, [("the imprinted records", everyone[: s.shown].astype(np.float64)), *pictures]


def _members(world: views.World, y_public: NDArray[np.int64], s: Scale):
    """Membership without a defence and for two private runs. A tenth of the labels is wrong, to be memorised."""
    stream = KeyStream()
    X, y = world.X[: s.members], world.y[: s.members].copy()
    wrong = stream.uniform(len(y)) < 0.1
    y[wrong] = stream.below(10, int(wrong.sum()))
    inside = membership.halves(s.models, len(y))
    settings: dict[str, PrivacyPlan | None] = {"none": None}
    for epsilon in (s.epsilon, s.tight):
        settings[f"DP, ε = {epsilon:g}"] = _training(world.spec, len(y) // 2, s.steps, epsilon)
    found, bounds = {}, {}
    for name, plan in settings.items():
        models = [
            membership.trained_openly(world.spec, X[m], y[m])
            if plan is None
            else membership.trained_privately(plan, X[m], y[m])
            for m in inside
        ]
        seen = np.stack([membership.logits(world.spec, w, X, y) for w in models])
        outside = [np.mean(membership.logits(world.spec, w, world.X_public, y_public) > 0) for w in models]
        found[name] = membership.judge(*membership.lira(seen, inside), float(np.mean(outside)))
        bounds[name] = 1.0 if plan is None else _bound(plan)
    return found, bounds


def _training(spec: ModelSpec, records: int, steps: int, epsilon: float) -> PrivacyPlan:
    return make_plan(
        sites=_SITES, records=records, epsilon=epsilon, steps=steps, clip=0.5, model=spec, sum="plain",
        optimizer=Optimizer(learning_rate=0.4), contract_hash="0" * 64,
    )  # fmt: skip


def _bound(plan: PrivacyPlan) -> float:
    """The most true positives at 1 % false ones that the plan's privacy curve allows anybody."""
    points = delta_curve([(plan.event, plan.steps)], np.linspace(0, 3 * plan.claim, 60).tolist())
    return attack_rate(points, membership.FALSE_ALARMS)


def write(result: Result, folder: Path) -> None:
    """``attacks.md``, ``attacks.json`` and ``attacks.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attacks.json").write_bytes(canonical.dumps(result.to_json()) + b"\n")
    (folder / "attacks.md").write_text(_page(result), encoding="utf-8")
    _draw(result, folder / "attacks.png")


def _page(r: Result) -> str:
    return "\n".join([
        "# Attacks", "",
        "`fedveil audit attacks` shows what a curious server learns about records (scikit-learn's digits). It compares "
        "three views: no defence (a site's own gradient), a secure sum (the exact sum of five sites), and this program "
        f"(the opened sum, noise included). The last is one step of a run with ε = {r.epsilon:g} in {views.STEPS} "
        f"steps, with noise multiplier {r.noise_multiplier:.2f}.", "",
        "![The records and what each attack makes of them](attacks.png)", "",
        r.table(), "",
        "**Division.** A record's gradient in the first layer is the record times a number. That number is the bias's "
        "gradient. **Matching (iDLG).** The class follows from the last layer's signs (right for "
        f"{r.labels_right:.0%} of the single records). Then the attacker searches for a record whose gradient is the "
        "one seen. **Imprint.** The server sends a network in which each unit answers to one narrow band of the "
        "records. So a sum over many records, and over all sites, can be taken apart again. A secure sum alone does "
        "not help against it. The noise inside does.", "",
        f"Rebuilt exactly: a mean square error per pixel below {inversion.EXACT:g}, pixels in 0..1. \"At most\": what "
        "the run's whole privacy curve allows anybody, whatever the attack (100 % without a defence). The models of "
        "the membership table train on few records, a tenth of them with a wrong label, so that there is something to "
        "memorise. The table speaks of leaks. Its accuracies say nothing about larger data.", "",
        f"About {r.seconds:.0f} s of CPU.", "",
    ])  # fmt: skip


def _draw(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, columns = len(result.pictures), max(len(images) for _, images in result.pictures)
    figure, axes = plt.subplots(
        rows, columns + 1, figsize=(0.62 * columns + 2.6, 0.66 * rows), layout="constrained",
        gridspec_kw={"width_ratios": [4.2, *([1] * columns)]}, squeeze=False,
    )  # fmt: skip
    for line, (title, images) in zip(axes, result.pictures, strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(1.0, 0.5, title, ha="right", va="center", fontsize=8, transform=line[0].transAxes)
        for axis, image in zip(line[1:], images, strict=False):
            axis.imshow(np.clip(image.reshape(8, 8), 0, 1), cmap="gray_r", vmin=0, vmax=1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
