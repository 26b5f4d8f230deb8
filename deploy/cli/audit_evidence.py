"""``fedveil audit conformance | one-run | attacks``: evidence beside the claim, through the real path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.common import canonical
from fedveil.common.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from fedveil.privacy.audit.attach import Evidence
    from fedveil.privacy.audit.evidence import Conformance
    from fedveil.privacy.audit.one_run import OneRun
    from fedveil.privacy.plan import PrivacyPlan

_RUN = "A run's folder, or its plan.json. By default the plan of a small example."
Run = Annotated[Path | None, typer.Argument(help=_RUN)]
Keep = Annotated[
    bool,
    typer.Option(
        "--attach", help="Keep the result in RUN/audit.json. Then write the report again: 'fedveil audit report'."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print what audit.json holds, as canonical JSON.")]


def conformance(
    run: Run = None,
    rounds: Annotated[int, typer.Option(min=2, max=10_000, help="Number of sums in which the noise is measured.")] = 12,
    inputs: Annotated[
        int, typer.Option(min=16, max=1 << 20, help="Number of features of the audit slab, the made-up records.")
    ] = 2048,
    keep: Keep = False,
    as_json: Json = False,
) -> None:
    """Measure noise, clipping, sampling and ledger of this program against a plan. Exit code 60 if a check fails."""
    from fedveil.deploy.lab.audit.implementation import InProcess
    from fedveil.privacy.audit.attach import Evidence
    from fedveil.privacy.audit.suite import Effort, examine

    plan = _plan(run)
    result = examine(InProcess(), plan, Effort(rounds=rounds, inputs=inputs))
    _keep(run, keep, result)
    if as_json:
        _print_json(Evidence(plan.hash, conformance=result))
    else:
        _show(result)
    if not result.passed:
        raise VerificationError(
            f"{len(result.failed)} checks of the mechanism failed: {', '.join(result.failed)}",
            hint="the program does not do what the plan claims; do not release anything it computes",
        )


def one_run(
    run: Run = None,
    canaries: Annotated[
        int,
        typer.Option(min=10, max=1 << 13, help="Number of canaries: made-up records, each in or out by a coin."),
    ] = 1000,
    steps: Annotated[int, typer.Option(min=0, max=100_000, help="Number of sums; 0: as many as the plan has.")] = 0,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Confidence of the bound.")] = 0.95,
    keep: Keep = False,
    as_json: Json = False,
) -> None:
    """Measure a lower bound of ε in one run with canaries. Exit code 60 if the bound is above the claim."""
    from fedveil.deploy.lab.audit.canaries import Setting
    from fedveil.deploy.lab.audit.canaries import one_run as audit_once
    from fedveil.privacy.audit.attach import Evidence

    plan = _plan(run)
    if keep and steps not in (0, plan.steps):
        raise UsageError("a bound from fewer steps is not evidence about the run", hint="leave out --steps or --attach")
    result = audit_once(plan, Setting(canaries, confidence, steps))
    _keep(run, keep, result)
    if as_json:
        _print_json(Evidence(plan.hash, one_run=result))
    else:
        g = result.guesses
        _print(result.sentence)
        _print(f"{g.right} of {g.made} guesses about {g.canaries} canaries were right; read by: {result.method}")
    if not result.passed:
        raise VerificationError(
            f"the canaries show more than the plan claims: ε ≥ {result.bound:.3g} against {result.claimed:.4g}",
            hint=f"a correct program shows this with a chance of at most {1 - result.confidence:.2g}: measure again",
        )


def attacks(
    out: Annotated[Path, typer.Option(help="Folder for attacks.md, attacks.json and attacks.png.")] = Path("attacks"),
    quick: Annotated[bool, typer.Option(help="Use only a few records and shadow models.")] = False,
) -> None:
    """Attack models trained on public digits: without a defence, with a secure sum, and with noise in the sum."""
    from fedveil.deploy.lab.attacks.table import Scale, run_all, write

    try:  # before the minute that the attacks take
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"the folder {out} cannot be made: {e.strerror}", hint="name another folder with --out") from e
    result = run_all(Scale.quick() if quick else Scale())
    write(result, out)
    _print(result.table())
    _print(f"written to {out / 'attacks.md'} and {out / 'attacks.png'}")


def _keep(run: Path | None, wanted: bool, result: Conformance | OneRun) -> None:
    """Write ``RUN/audit.json`` if asked to, and say what that means for a report that is there already."""
    from fedveil.privacy.audit.attach import attach
    from fedveil.privacy.report.bundle import REPORT, SIMULATED_KEY

    if not wanted:
        return
    if run is None or not run.is_dir():
        raise UsageError("--attach needs a run's folder", hint="name the folder of a finished run before --attach")
    attach(run, result)
    if (run / REPORT).exists():
        key = "" if (run / SIMULATED_KEY).exists() else " --key SERVER/signing.key"
        typer.echo(f"the report is out of date: 'fedveil audit report {run}{key}' writes it again", err=True)


def _plan(run: Path | None) -> PrivacyPlan:
    from fedveil.privacy.audit.attach import plan_of

    if run is not None:
        return plan_of(run)
    from fedveil.common.workload.model import ModelSpec
    from fedveil.privacy.plan import Optimizer, make_plan

    return make_plan(
        sites=5, records=1000, epsilon=4.0, steps=20, clip=0.5, sample_rate=0.25,
        model=ModelSpec(name="logistic", inputs=64, classes=10), optimizer=Optimizer(learning_rate=0.1),
        contract_hash=canonical.digest({"example": "audit"}),
    )  # fmt: skip


def _show(result: Conformance) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fedveil audit conformance", title_justify="left", header_style="bold")
    for name in ("", "check", "measured", "expected", "p-value", "smallest fault it finds"):
        table.add_column(name, overflow="fold")
    for f in result.findings:
        table.add_row(
            "[green]ok[/]" if f.passed else "[bold red]FAILED[/]", f.name, f"{f.measured:.4g}", f"{f.expected:.4g}",
            f"{f.p_value:.2g}", f.detects,
        )  # fmt: skip
    Console(highlight=False).print(table)
    _print(f"{result.sentence} ({result.confidence:.0%} confidence, {result.samples} numbers, sum: {result.sum})")


def _print_json(evidence: Evidence) -> None:
    """What ``audit.json`` holds, and ``fedveil audit report --audit`` takes."""
    sys.stdout.write(canonical.dumps(evidence.to_json()).decode() + "\n")


def _print(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, markup=False, soft_wrap=True)
