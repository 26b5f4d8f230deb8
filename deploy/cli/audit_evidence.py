"""``fedveil audit conformance | one-run | attacks``: evidence beside the claim, through the real path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.common import canonical
from fedveil.common.errors import IdentityError, UsageError, VerificationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
Key = Annotated[
    Path | None, typer.Option(help="The auditor's own Ed25519 key (PEM, mode 0600), which signs the result.")
]
Json = Annotated[bool, typer.Option("--json", help="Print what audit.json holds, as canonical JSON.")]


def conformance(
    run: Run = None,
    rounds: Annotated[int, typer.Option(min=2, max=10_000, help="Number of sums in which the noise is measured.")] = 12,
    inputs: Annotated[
        int, typer.Option(min=16, max=1 << 20, help="Number of features of the audit slab, the made-up records.")
    ] = 2048,
    engine: Annotated[str, typer.Option(help="Of per-record clipping, as in the sites' site.toml.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32 or float64. By default what the run's ledgers note, else float32.")
    ] = "",
    auditor_key: Key = None,
    keep: Keep = False,
    as_json: Json = False,
) -> None:
    """Measure noise, clipping, sampling and ledger of this program on a plan's own path. Exit code 60 if one fails."""
    from fedveil.deploy.lab.audit.examination import conformance as examined
    from fedveil.privacy.audit.attach import evidence_of
    from fedveil.privacy.audit.suite import Effort

    plan, key = _plan(run), _key(auditor_key)
    result = examined(plan, Effort(rounds=rounds, inputs=inputs), engine, precision or _noted_precision(run))
    _keep(run, keep, result, key)
    if as_json:
        _print_json(evidence_of(plan.hash, result, key))
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
    auditor_key: Key = None,
    keep: Keep = False,
    as_json: Json = False,
) -> None:
    """Measure a lower bound of ε in one run with canaries. Exit code 60 if the bound is above the claim."""
    from fedveil.deploy.lab.audit.canaries import Setting
    from fedveil.deploy.lab.audit.canaries import one_run as audit_once
    from fedveil.privacy.audit.attach import evidence_of

    plan, key = _plan(run), _key(auditor_key)
    if keep and steps not in (0, plan.steps):
        raise UsageError("a bound from fewer steps is not evidence about the run", hint="leave out --steps or --attach")
    result = audit_once(plan, Setting(canaries, confidence, steps))
    _keep(run, keep, result, key)
    if as_json:
        _print_json(evidence_of(plan.hash, result, key))
    else:
        g = result.guesses
        _print(result.sentence)
        _print(f"{g.right} of {g.made} guesses about {g.canaries} canaries were right; read by: {result.method}")
        _print(f"smallest fault this audit finds: {result.smallest_fault}")
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


def _key(path: Path | None) -> Ed25519PrivateKey | None:
    """The auditor's key; the errors say how one is made."""
    from fedveil.common.identity import load_signing_key

    if path is None:
        return None
    try:
        return load_signing_key(path)
    except IdentityError as e:
        how = f"openssl genpkey -algorithm ed25519 -out {path}; chmod 600 {path}"
        raise IdentityError(e.message, hint=how) from e


def _noted_precision(run: Path | None) -> str:
    """The lowest precision that a ledger beside the plan notes for the run's sites; without any, the default."""
    from fedveil.common.journal import parse
    from fedveil.privacy.report.bundle import JOURNALS, read_bounded

    folder = run / JOURNALS if run is not None and run.is_dir() else None
    rows = (r for p in folder.glob("*.jsonl") for r in parse(read_bounded(p, 1 << 28))) if folder is not None else ()
    # A ledger notes any other precision than float64.
    noted = {r.body.get("precision", "float64") for r in rows if r.kind == "plan.accepted"}
    return "float64" if noted == {"float64"} else "float32"


def _keep(run: Path | None, wanted: bool, result: Conformance | OneRun, key: Ed25519PrivateKey | None) -> None:
    """Write ``RUN/audit.json`` if asked to, and say what that means for a report that is there already."""
    from fedveil.privacy.audit.attach import attach
    from fedveil.privacy.report.bundle import REPORT, SIMULATED_KEY

    if not wanted:
        return
    if run is None or not run.is_dir():
        raise UsageError("--attach needs a run's folder", hint="name the folder of a finished run before --attach")
    attach(run, result, key)
    if (run / REPORT).exists():
        server = "" if (run / SIMULATED_KEY).exists() else " --key SERVER/signing.key"
        typer.echo(f"the report is out of date: 'fedveil audit report {run}{server}' writes it again", err=True)


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
    if result.examined is not None:
        _print(result.examined.sentence)
    _print(f"{result.sentence} ({result.confidence:.0%} confidence, {result.samples} numbers, sum: {result.sum})")


def _print_json(evidence: Evidence) -> None:
    """What ``audit.json`` holds, and ``fedveil audit report --audit`` takes."""
    sys.stdout.write(canonical.dumps(evidence.to_json()).decode() + "\n")


def _print(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, markup=False, soft_wrap=True)
