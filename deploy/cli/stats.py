"""``fedveil stats``: counts, means, quantiles and accuracies of the sites' own rows, charged like a training step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.common.errors import FedveilError, RunAborted, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedveil.common.contract import DataContract
    from fedveil.common.workload.statistics import MetricSpec, StatsSpec

MAX_QUANTILES = 64  # of a StatsSpec
_METRICS = ("accuracy", "confusion")


def stats(
    settings: Annotated[Path, typer.Argument(help="The server's federation.toml.")],
    column: Annotated[
        list[str] | None, typer.Option(help="A column. May be repeated. By default all that fit.")
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            help="Any of these, with commas between: count, mean, variance, histogram, quantiles, accuracy, confusion."
        ),
    ] = "count,mean,variance",
    epsilon: Annotated[
        float | None, typer.Option(help="ε of all statistics together. By default that of federation.toml.")
    ] = None,
    bins: Annotated[
        int, typer.Option(help="Number of equal bins of a numeric column, for histogram and quantiles.")
    ] = 10,
    quantile: Annotated[
        list[float] | None, typer.Option(help="A probability. May be repeated. By default 0.25, 0.5 and 0.75.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the run that trained the model, for accuracy and confusion.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="The new folder of this run. By default <runs>/<time>-stats.")
    ] = None,
) -> None:
    """Ask all sites for statistics of their rows in one secure sum. Each site must allow the task 'stats'."""
    from fedveil.common import canonical, log
    from fedveil.common import settings as files
    from fedveil.deploy import server_process
    from fedveil.deploy.watch.display import Display
    from fedveil.privacy.planning import plan_of_statistics
    from fedveil.privacy.stats_document import STATISTICS

    log.to_stderr()
    wanted = [w.strip() for w in what.split(",") if w.strip()]
    _check(wanted, quantile or ())
    metric, attached = _evaluated(wanted, model)
    federation = files.load(settings, files.Federation)
    folder = run or federation.federation.runs / time.strftime("%Y%m%d-%H%M%S-stats")
    if (folder / "journal.jsonl").exists():
        raise UsageError(
            f"{folder} holds a run already", hint="name a new folder with --run: statistics have a run of their own"
        )

    def ask(contract: DataContract) -> StatsSpec:
        from fedveil.common.workload.statistics import DEFAULT_QUANTILES, request

        probabilities = quantile or DEFAULT_QUANTILES
        return request(contract, wanted, columns=column or (), bins=bins, quantiles=probabilities, metric=metric)

    with Display(f"{federation.federation.name}: statistics", 1) as display:
        server_process.begin(
            federation, folder, lambda c, n: plan_of_statistics(federation, c, n, ask(c), epsilon=epsilon),
            attached=attached, progress=display.progress,
        )  # fmt: skip
    path = folder / STATISTICS
    if not path.exists():
        raise RunAborted("no sum was opened; the sites that answered are charged", hint=f"see {folder / 'report.html'}")
    show(canonical.loads(path.read_bytes()))
    typer.echo(f"estimates: {path}\nreport: {folder / 'report.html'}")


def _check(wanted: list[str], quantiles: Sequence[float]) -> None:
    """Raise :class:`UsageError` for a wish without a meaning; an empty one would be run, and charged."""
    if not wanted:
        raise UsageError("--what names no statistic", hint="for example --what count,mean")
    if len(quantiles) > MAX_QUANTILES or not all(0 < q < 1 for q in quantiles):
        raise UsageError(
            "a --quantile is a probability above 0 and below 1",
            hint=f"at most {MAX_QUANTILES} of them: 0.5 is the median",
        )


def _evaluated(wanted: list[str], folder: Path | None) -> tuple[MetricSpec | None, dict[str, bytes]]:
    """The model of a finished training run, and its weights as every site receives them."""
    if not set(wanted) & set(_METRICS):
        return None, {}
    if folder is None:
        raise UsageError(
            "accuracy and confusion need --model", hint="give the folder of the run that trained the model"
        )
    from fedveil.common import canonical
    from fedveil.common.workload.statistics import EVALUATED, MetricSpec
    from fedveil.privacy import plan as plans

    try:
        network = plans.from_json(canonical.loads((folder / "plan.json").read_bytes())).network
        weights = (folder / "model.f32").read_bytes()
    except OSError as e:
        raise UsageError(
            f"{folder} holds no finished run: {e.strerror}", hint="--model takes a folder with plan.json and model.f32"
        ) from e
    except FedveilError as e:
        raise UsageError(
            f"{folder / 'plan.json'} is not the plan of a training run: {e.message}",
            hint="--model takes the folder of a finished training run",
        ) from e
    if len(weights) != 4 * network.parameters:
        raise UsageError(
            f"{folder / 'model.f32'} is not the model of its plan", hint="--model takes the folder as the run left it"
        )
    spec = MetricSpec(network=network, model_hash=canonical.sha256_hex(weights), confusion="confusion" in wanted)
    return spec, {EVALUATED: weights}


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the estimates of ``statistics.json`` with their standard errors (of the noise alone)."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    title = f"ε = {found['epsilon']:.4f} at δ = {found['delta']:g} for one {found['unit']}, {found['sites']} sites"
    table = Table(title=title, title_justify="left")
    for name, justify in (("column", "left"), ("statistic", "left"), ("estimate", "right"), ("±", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    _row(table, "", "count", found["count"])
    for name, c in found["columns"].items():
        _column(table, f"{name} [{c['unit']}]" if c["unit"] else name, c)
    _metrics(table, found["metrics"])
    console.print(table)
    console.print("± is one standard error of the noise. * was moved into the possible range.", style="dim")


def _column(table: Table, name: str, c: dict[str, Any]) -> None:
    for key in ("present", "mean", "variance", "std"):
        if key in c:
            _row(table, name, key, c[key])
    for q in c.get("quantiles", ()):
        _row(table, name, f"quantile {q['p']:g} (bin of {q['resolution']:.4g})", q)
    if (h := c.get("histogram")) is None:
        return
    for label, count in zip(h["bins"], h["noisy"], strict=True):
        text = label if isinstance(label, str) else f"{label[0]:.4g} to {label[1]:.4g}"
        _row(table, name, text, {"estimate": count, "standard_error": h["standard_error"]})
    if "missing" in h:
        _row(table, name, "missing", {"estimate": h["missing"]["noisy"], "standard_error": h["standard_error"]})


def _metrics(table: Table, metrics: dict[str, Any]) -> None:
    if "accuracy" in metrics:
        _row(table, "", "accuracy", metrics["accuracy"])
    for i, counts in enumerate(metrics.get("confusion", {}).get("noisy", ())):
        for j, count in enumerate(counts):
            error = metrics["confusion"]["standard_error"]
            _row(table, "", f"class {i} predicted as {j}", {"estimate": count, "standard_error": error})


def _row(table: Table, column: str, name: str, value: dict[str, Any] | None) -> None:
    from rich.text import Text

    if value is None or value["estimate"] is None:
        table.add_row(Text(column), Text(name), "lost in the noise", "")
        return
    star = "*" if value.get("projected") else ""
    table.add_row(Text(column), Text(name), f"{value['estimate']:.5g}{star}", f"{value['standard_error']:.2g}")
