"""Several runs compared: means and standard errors over seeds, as table, picture and text for a paper."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedveil.common.errors import UsageError
from fedveil.deploy.lab.outcomes import standard_error
from fedveil.deploy.lab.run import Run, as_html


class Runs(Sequence[Run]):
    """Runs that differ in some settings, each over one or more seeds.

    Args:
        runs: in any order.
        varied: by name the settings in which they differ, as each run's :attr:`Run.config` holds them.
    """

    def __init__(self, runs: Sequence[Run], varied: Sequence[str]) -> None:
        self._runs, self.varied = list(runs), tuple(v for v in varied if v != "seed")
        if not self._runs:
            raise UsageError("no runs to compare", hint="a sweep over at least one value and one seed")

    def __getitem__(self, at: Any) -> Any:
        return self._runs[at]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def groups(self) -> dict[tuple[Any, ...], list[Run]]:
        """The runs of each combination of the varied settings, in the order of their first run."""
        out: dict[tuple[Any, ...], list[Run]] = {}
        for run in self._runs:
            out.setdefault(tuple(_hashable((run.config or run.settings).get(name)) for name in self.varied), []).append(
                run
            )
        return out

    @property
    def metrics(self) -> list[str]:
        """The metrics that every run has."""
        return [m for m in self._runs[0].metrics if all(m in run.metrics for run in self._runs)]

    def table(self) -> list[dict[str, Any]]:
        """One row for each combination: settings, number of seeds, mean and standard error of each metric."""
        rows: list[dict[str, Any]] = []
        for values, runs in self.groups().items():
            row: dict[str, Any] = {**dict(zip(self.varied, values, strict=True)), "seeds": len(runs)}
            for metric in self.metrics:
                found = [run.metrics[metric] for run in runs]
                row[metric] = statistics.mean(found)
                row[f"{metric} s.e."] = standard_error(found) if len(found) > 1 else None
            ended = {run.status for run in runs}
            rows.append(row if ended == {"COMPLETED"} else row | {"ended": ", ".join(sorted(ended))})
        return rows

    def to_csv(self, path: str | Path | None = None) -> str:
        """The table as CSV; written to ``path`` if there is one."""
        rows, out = self.table(), io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return _written(out.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The table as JSON; written to ``path`` if there is one."""
        return _written(json.dumps(self.table(), indent=1) + "\n", path)

    def to_latex(self, path: str | Path | None = None) -> str:
        """The table for a paper, mean ± standard error, needs booktabs; written to ``path`` if there is one."""
        names = [*self.varied, *self.metrics]
        lines = [rf"\begin{{tabular}}{{{'l' * len(self.varied)}{'r' * len(self.metrics)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, names)) + r" \\", r"\midrule"]
        for row in self.table():
            cells = [_latex(str(row[name])) for name in self.varied]
            for metric in self.metrics:
                error = row[f"{metric} s.e."]
                cells.append(f"${row[metric]:.4f}" + (rf" \pm {error:.4f}$" if error is not None else "$"))
            lines.append(" & ".join(cells) + r" \\")
        return _written("\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""]), path)

    def plot(self, metric: str | None = None, *, path: str | Path = "sweep.png") -> Path:
        """Draw a metric, mean and standard error, over the first varied setting; a line for each of the others' values.

        Where nothing but the seed was varied, it is drawn over the rounds, a line for each run.

        Raises:
            UsageError: no such metric.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        metric = metric or next(iter(self.metrics), "")
        if metric not in self.metrics:
            raise UsageError(f"not every run has a metric {metric!r}", hint=f"one of {', '.join(self.metrics)}")
        first, *others = self.varied or ("round",)
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in self.table() if self.varied else ():
            lines.setdefault(", ".join(f"{n} = {row[n]}" for n in others), []).append(row)
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for label, rows in lines.items():
            x = [row[first] for row in rows]
            errors = [row[f"{metric} s.e."] or 0.0 for row in rows]
            axis.errorbar(x, [row[metric] for row in rows], yerr=errors, marker="o", capsize=3, label=label or None)
        for run in () if self.varied else self._runs:
            axis.plot([r["round"] for r in run.history], [r[metric] for r in run.history], label=run.folder.name)
        axis.set_xlabel("ε" if first == "epsilon" else first)
        axis.set_ylabel(f"{metric} on the public table")
        what = f"mean and standard error over {self.table()[0]['seeds']} seeds" if self.varied else "each seed's run"
        axis.set_title(f"{metric}, {what}")
        if others or not self.varied:
            axis.legend()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return Path(path)

    def __repr__(self) -> str:
        rows = self.table()
        names = list(dict.fromkeys(k for row in rows for k in row))
        cells = [names, *([_short(row.get(n)) for n in names] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)

    def _repr_html_(self) -> str:
        return as_html(self.table())


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _latex(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("ε", r"$\varepsilon$")


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
