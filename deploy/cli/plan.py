"""``fedveil plan``: what a run will cost and give, before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.common import canonical
from fedveil.common.errors import ConfigError, FedveilError, UsageError
from fedveil.common.units import MAX_SITES

if TYPE_CHECKING:
    from fedveil.common.contract import DataContract
    from fedveil.common.settings import Federation
    from fedveil.privacy.planning import Forecast

_ROSTER_LIMIT = 1 << 22


def plan(
    federation: Annotated[Path, typer.Argument(help="The server's federation.toml.")],
    sites: Annotated[
        int | None, typer.Option(min=1, max=MAX_SITES, help="Number of sites, if there is no signed roster yet.")
    ] = None,
    cap: Annotated[
        float | None, typer.Option(help="Cap (ε) of a fresh ledger. Shows how many steps of this plan it can pay for.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="A site's ledger (ledger.jsonl). Shows how many steps it can still pay for.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Plan with this σ. ε then follows from it, and not from the settings.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan and the forecast as JSON.")] = False,
) -> None:
    """Show the privacy plan of federation.toml before a run: noise, steps, ε, fallback ε."""
    from fedveil.common import settings as tomls
    from fedveil.deploy.ledger_file import read_rows, tally_of
    from fedveil.privacy.planning import forecast, plan_from_settings

    if cap is not None and not 0 < cap <= 1000:
        raise UsageError(f"--cap {cap!r} is not a cap", hint="give an epsilon above 0 and up to 1000")
    settings = tomls.load(federation, tomls.Federation)
    contract, signed = contract_of(settings)
    made = plan_from_settings(settings, contract, sites or roster_size(settings), noise_multiplier=noise_multiplier)
    result = forecast(made, cap=cap, ledger=tally_of(read_rows(ledger, None)) if ledger else None)
    if as_json:
        sys.stdout.write(canonical.dumps(result.to_json()).decode() + "\n")
        return
    _show(result, settings, signed)


def _pin(settings: Federation) -> str:
    path = settings.federation.identity / "consortium.pub"
    try:
        with path.open("rb") as f:
            return f.read(256).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"{path} cannot be read", hint="correct [federation] identity; 'fedveil client join' installs the file"
        ) from e


def contract_of(settings: Federation) -> tuple[DataContract, bool]:
    """The contract, and whether it is signed. A ``.toml`` is a draft: enough to plan with, not to run with."""
    from fedveil.common.contract import DataContract, load_signed

    path = settings.federation.contract
    if path.suffix == ".toml":
        return DataContract.load(path), False
    return load_signed(path, _pin(settings)), True


def roster_size(settings: Federation) -> int:
    """How many sites the signed roster has; :class:`ConfigError` if there is none."""
    from fedveil.common import identity

    path = settings.federation.identity / "roster.json"
    try:
        with path.open("rb") as f:
            document = canonical.loads(f.read(_ROSTER_LIMIT + 1), limit=_ROSTER_LIMIT)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read", hint="give --sites while there is no roster") from e
    except FedveilError as e:
        raise ConfigError(f"{path}: {e.message}", hint="give --sites while there is no roster") from e
    return len(identity.open_roster(document, _pin(settings)).sites)


def _show(f: Forecast, settings: Federation, signed: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    p, console = f.plan, Console(highlight=False)
    table = Table(
        title=f"Privacy plan of {settings.federation.name!r}", title_justify="left", show_header=False, box=None
    )
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in _rows(f):
        table.add_row(name, value)
    table.add_row("contract", f"{p.contract_hash[:16]}... ({'signed' if signed else 'an unsigned draft'})")
    table.add_row("plan hash", p.hash)
    console.print(table)
    for warning in f.warnings:
        console.print("[bold yellow]warning:[/]", warning, soft_wrap=True)


def _rows(f: Forecast) -> list[tuple[str, str]]:
    p = f.plan
    rows = [
        ("mode, sum", f"{p.mode}, {p.sum}; hides one {p.unit}"),
        ("sites", f"n = {p.sites}, colluders t = {p.colluders}, drop-outs d = {p.dropouts}"),
        ("honest shares", f"h = {p.honest}; a sum has at least {p.members} sites and is opened by T = {p.threshold}"),
        ("steps", f"{p.steps} at sample rate q = {p.sample_rate:g}, divisor {p.divisor:g}, clip {p.clip:g}"),
        (
            "places",
            f"{f.places} in a step of a site with an even share: {f.padding:.2f} for each {p.unit} sampled",
        ),
        ("noise multiplier", f"σ = {p.noise_multiplier:.4f} at h shares"),
        ("ε of the run", f"{p.claim:.4f} by PLD at δ = {p.delta:g} ({f.epsilon_rdp:.4f} by RDP)"),
        ("ledger's cap", f"every site needs ε = {f.filter_epsilon:.4f} or more left to pay for all steps"),
        ("ε, replace one", f"{f.epsilon_replace_one:.4f} between tables in which one {p.unit} is another one"),
        ("fallback ε", f"{p.fallback:.4f} if everybody else works against a site"),
        (
            "model",
            f"{p.model.name}, {p.model.inputs} inputs, {p.model.classes} classes, {p.model.parameters} parameters",
        ),
        (
            "noise to signal",
            f"{f.noise_per_parameter:.2e} clips per parameter, {f.noise_to_signal:.4f} clips over all, in each step",
        ),
    ]
    if f.bytes_per_parameter is not None:
        rows.append(("upload", f"{f.bytes_per_parameter:.2f} bytes per parameter and step, and the shares"))
    if f.cap is not None:
        rows.append((f"a cap of {f.cap:g}", f"pays for {f.affordable} of these steps"))
    if f.left is not None:
        rows.append(("the ledger", f"has spent ε = {f.spent:.4f} and still pays for {f.left} of these steps"))
        rows.append(("", "its chain holds; 'fedveil ledger verify' checks the signatures"))
    return rows
