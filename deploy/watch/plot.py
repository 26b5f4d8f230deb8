"""The picture of a run: public metric and ε of the rounds opened."""

from __future__ import annotations

import json
from pathlib import Path


def write_curve(run: Path, *, metric: str | None = None, path: Path | None = None) -> Path:
    """Draw ``metrics.jsonl`` of ``run``.

    Args:
        metric: which public metric; by default all.
        path: where to; by default ``curve.png`` in ``run``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = [x["round"] for x in lines]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    names = sorted({k for x in lines for k in x["metrics"] if metric in (None, k)})
    for name in names:
        axis.plot(rounds, [x["metrics"].get(name, float("nan")) for x in lines], label=f"test {name}")
    axis.set_xlabel("round")
    values = [v for x in lines for k, v in x["metrics"].items() if k in names]
    if all(0 <= v <= 1 for v in values):
        axis.set_ylim(0, 1)
    axis.set_ylabel("public test metric")
    other = axis.twinx()
    opened = [x["epsilon_opened"] for x in lines]
    other.plot(rounds, opened, color="tab:red", linestyle="--", label="ε of the rounds opened")
    other.set_ylabel("ε of the rounds opened (PLD)")
    other.set_ylim(bottom=0)
    handles = [h for a in (axis, other) for h in a.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="lower right")
    path = path or run / "curve.png"
    axis.set_title(f"{', '.join(names) or 'ε'} over {len(lines)} rounds, {run.name}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
