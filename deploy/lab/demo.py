"""``fedveil demo``: the main job on real records, in real processes, and what it is worth beside its alternatives."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table as RichTable

from fedveil.common.errors import DataError, RunAborted, UsageError
from fedveil.deploy.watch.display import CONSOLE, Display

if TYPE_CHECKING:
    from fedveil.privacy.plan import PrivacyPlan

Metrics = dict[str, float]
_POLL = 0.1
_PATIENCE = 120.0
_FEDERATED = "federated (in process, SIMULATED sum)"


@dataclass
class _Processes:
    """The server and the hospitals, their logs, and their ends."""

    server: subprocess.Popen[bytes]
    sites: dict[str, subprocess.Popen[bytes]]
    folder: Path

    def stop(self) -> None:
        for p in (self.server, *self.sites.values()):
            if p.poll() is None:
                p.terminate()
        for p in (self.server, *self.sites.values()):
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()


def demo(folder: Path | None, seed: int, seeds: int) -> None:
    """Lay everything out, run it, compare, and check the report.

    Args:
        folder: where to lay everything out; it must not exist. None: ``runs/demo-<time>``.
        seed: of the split into hospitals.
        seeds: repetitions of the comparison, 1 or more.

    Raises:
        UsageError: the folder cannot be made.
        RunAborted, DataError, VerificationError: a part of the run did not end as it must.
    """
    from fedveil.deploy.lab import demo_hospitals

    started = time.monotonic()
    home = folder or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    try:
        home.mkdir(parents=True)
    except OSError as e:
        raise UsageError(f"{home} cannot be made: {e.strerror}", hint="name a new folder") from e
    port = _free_port()
    demo_hospitals.lay_out(home, port, seed)
    CONSOLE.print(
        f"[bold]{len(demo_hospitals.HOSPITALS)} hospitals[/] with their own tables, keys and limits below {home}\n"
        "keys, certificates and roster: fedveil provision; contract: signed by the consortium", highlight=False,
    )  # fmt: skip
    run = home / "run"
    processes = _launch(home, run)
    try:
        _watch(processes, run)
    finally:
        processes.stop()
    _say_data_checks(home)
    comparison, plan = _compare(seeds)
    _results(run, comparison, plan, seeds)
    _examine(home, run)
    _verify(run)
    CONSOLE.print(f"report: [bold]{run / 'report.html'}[/]\n        {run / 'report.json'}", highlight=False)
    CONSOLE.print(f"{time.monotonic() - started:.0f} seconds in all", highlight=False)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _launch(home: Path, run: Path) -> _Processes:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}

    def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (home / f"{name}.log").open("wb")
        with log:
            return subprocess.Popen(  # noqa: S603 (our own command, fixed arguments)
                [sys.executable, "-m", "fedveil", *arguments], stdout=log, stderr=subprocess.STDOUT, env=env
            )

    server = start("server", "server", "start", str(home / "federation.toml"), "--run", str(run))
    from fedveil.deploy.lab.demo_hospitals import HOSPITALS

    sites = {h: start(h, "client", "run", str(home / h / "site.toml")) for h in HOSPITALS}
    return _Processes(server, sites, home)


def _watch(p: _Processes, run: Path) -> None:
    """Show rounds as the server records them; a hospital that dies is named, and the run goes on."""
    from fedveil.deploy.lab.demo_hospitals import FEDERATED

    metrics, shown, gone = run / "metrics.jsonl", 0, set[str]()
    deadline = time.monotonic() + _PATIENCE
    with Display("1 server + 4 hospitals", FEDERATED.steps) as display:
        display.count(0, "waiting for the hospitals")
        while True:
            over = p.server.poll() is not None
            lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # the last may be half written
            for line in lines[shown:]:
                display.progress("round", json.loads(line))
            shown = len(lines)
            for site, process in p.sites.items():
                if process.poll() not in (None, 0) and site not in gone and not over:
                    gone.add(site)
                    if not lines:
                        raise RunAborted(f"{site} stopped before the run began", hint=_tail(p.folder / f"{site}.log"))
                    CONSOLE.print(f"[yellow]{site} ended (code {process.returncode}); the run goes on without it[/]")
            if over:
                break
            if time.monotonic() > deadline:
                raise RunAborted(f"the run did not end within {_PATIENCE:g} seconds", hint=f"see {p.folder}/*.log")
            time.sleep(_POLL)
    if p.server.returncode != 0:
        raise RunAborted("the server failed", hint=_tail(p.folder / "server.log"))
    for process in p.sites.values():
        process.wait(30)


def _tail(log: Path) -> str:
    lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
    return f"{log}: " + " | ".join(lines[-3:])


def _say_data_checks(home: Path) -> None:
    """Each hospital's own record of what was checked; local, so no count is printed here."""
    from fedveil.deploy.lab.demo_hospitals import HOSPITALS

    for hospital in HOSPITALS:
        lineage = home / hospital / "state" / "data" / "lineage.json"
        if not lineage.exists():
            raise DataError(f"{hospital} left no record of its ingestion", hint=f"see {home / hospital}.log")
        evidence = json.loads(lineage.read_text())["evidence"]
        met = ", ".join(
            f"{name} {c['required']} {'met' if c['met'] else 'NOT MET'}" for name, c in evidence["criteria"].items()
        )
        CONSOLE.print(f"  {hospital}: {met}; quality report stays in {lineage.parent}", highlight=False)


def _compare(seeds: int) -> tuple[dict[str, list[Metrics]], PrivacyPlan]:
    """The federated model and its alternatives over ``seeds`` fresh splits, in this process."""
    from fedveil.deploy.lab import baselines, demo_hospitals, virtual_sites
    from fedveil.server.evaluate import Evaluator

    X, y = demo_hospitals.encoded(demo_hospitals.records())
    out: dict[str, list[Metrics]] = {}
    plans = {name: _plan(r) for name, r in _recipes().items()}
    virtual_sites.fit_threads(plans["federated"].model.parameters)
    with Display("comparison", seeds) as display:
        display.count(0, "the first split")
        for seed in range(seeds):
            s = demo_hospitals.split(seed)
            parts = [baselines.Table(X[i], y[i]) for i in s.hospitals]
            test = baselines.Table(X[s.public], y[s.public])
            score = Evaluator(plans["federated"].network, test.X, test.y)
            alone = [score(w) for w in baselines.alone(plans["alone"], parts)]
            row: dict[str, Metrics] = {
                "pooled, no privacy": score(baselines.pooled(plans["pooled"], parts)),
                "central DP (everybody trusts one party)": score(baselines.central(plans["federated"], parts)),
                _FEDERATED: _federated(plans["federated"], parts, test),
                "local DP (all noise at every hospital)": score(baselines.local(plans["local"], parts)),
                "each hospital alone, DP": {k: statistics.mean(m[k] for m in alone) for k in alone[0]},
                "majority class": baselines.majority(parts, test),
            }
            for name, metrics in row.items():
                out.setdefault(name, []).append(metrics)
            display.count(seed + 1, f"split {seed}: federated accuracy {row[_FEDERATED]['accuracy']:.3f}")
    return out, plans["federated"]


def _recipes():
    from fedveil.deploy.lab import demo_hospitals as w

    return {"federated": w.FEDERATED, "local": w.LOCAL, "alone": w.ALONE, "pooled": w.POOLED}


def _plan(recipe) -> PrivacyPlan:
    from fedveil.common.workload.model import ModelSpec
    from fedveil.deploy.lab import demo_hospitals
    from fedveil.privacy.plan import Optimizer, make_plan

    agreed = demo_hospitals.contract()
    return make_plan(
        sum="plain", sites=len(demo_hospitals.HOSPITALS), records=331, epsilon=demo_hospitals.EPSILON,
        delta=demo_hospitals.DELTA, steps=recipe.steps, clip=recipe.clip,
        model=ModelSpec(name="logistic", inputs=agreed.width, classes=agreed.classes),
        optimizer=Optimizer(learning_rate=recipe.learning_rate, momentum=recipe.momentum), contract_hash=agreed.hash,
    )  # fmt: skip


def _federated(plan: PrivacyPlan, parts, test) -> Metrics:
    """The same server and client apps, in process; the sum in the clear, the noise shares as in the live run."""
    from fedveil.deploy.lab import simulate
    from fedveil.deploy.lab.sites import Sites

    split = Sites([(p.X, p.y) for p in parts], test.X, test.y, 2)
    config = simulate.Config(clients=len(parts), dataset="diabetes", sum="plain")
    with tempfile.TemporaryDirectory() as scratch:
        return simulate.run_split(config, split, plan, Path(scratch) / "run", report=False, engine="closed").metrics


def _results(run: Path, comparison: dict[str, list[Metrics]], plan: PrivacyPlan, seeds: int) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    table = RichTable(title=f"public quarter: live run, and mean ± standard error over {seeds} splits")
    for column in ("", "accuracy", "AUC"):
        table.add_column(column, justify="left" if not column else "right")
    live = last["metrics"]
    table.add_row(
        f"[bold]federated, live (one split, {last['members']} hospitals in the last sum)[/]",
        f"[bold]{live['accuracy']:.3f}[/]", f"[bold]{live['auc']:.3f}[/]",
    )  # fmt: skip
    for name, values in comparison.items():
        table.add_row(name, *(_spread([m[k] for m in values]) for k in ("accuracy", "auc")))
    CONSOLE.print(table)
    sent, received = (sum(r[k] for r in rows) for k in ("bytes_sent", "bytes_received"))
    CONSOLE.print(
        f"every patient: ε = {plan.claim:.3f} at δ = {plan.delta:g} against the server, outsiders and any "
        f"{plan.colluders} hospital; fallback ε = {plan.fallback:.2f} if everybody else colludes\n"
        f"on the wire: {sent / 1e6:.2f} MB to the hospitals, {received / 1e6:.2f} MB from them, in {len(rows)} rounds",
        highlight=False,
    )  # fmt: skip


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _examine(home: Path, run: Path) -> None:
    """What an auditor would do: measure this program under the run's plan, and sign the result with a key of its own.

    The server writes the report again with the result in it, and every hospital verifies and signs that one.
    """
    from fedveil.common import identity
    from fedveil.deploy.lab.audit.examination import conformance
    from fedveil.deploy.lab.demo_hospitals import ENGINE, HOSPITALS
    from fedveil.privacy.audit.attach import attach, plan_of
    from fedveil.privacy.audit.suite import Effort
    from fedveil.privacy.report import signatures
    from fedveil.privacy.report.build import build_report
    from fedveil.privacy.report.bundle import REPORT
    from fedveil.privacy.report.countersign import see, sign
    from fedveil.privacy.report.render import render_report

    key = identity.new_signing_key()
    identity.save_signing_key(home / "auditor" / "signing.key", key)
    result = conformance(plan_of(run), Effort(rounds=6, wide=1 << 13, keys=256), ENGINE)
    attach(run, result, key)
    build_report(run, identity.load_signing_key(home / "pki" / "server" / "signing.key"))
    seen = see(run / REPORT, (home / "pki" / "consortium" / "consortium.pub").read_text().strip())
    for hospital in HOSPITALS:
        own = identity.load_signing_key(home / "pki" / "sites" / hospital / "signing.key")
        ledger = (home / hospital / "state" / "ledger.jsonl").read_bytes()
        signatures.keep(run, dict([sign(seen, own, ledger)]))
    render_report(run / REPORT)
    CONSOLE.print(
        f"fedveil audit conformance: {len(result.findings) - len(result.failed)} of {len(result.findings)} checks "
        f"passed; {result.sentence}\n{result.examined.sentence if result.examined else ''}", highlight=False,
    )  # fmt: skip


def _verify(run: Path) -> None:
    """What an auditor would run; a failure fails the demo."""
    from fedveil.privacy.report.verify import verify_report

    verification = verify_report(run / "report.json")
    verification.raise_for_failure()
    signed = f"signed by {len(verification.countersigned)} of {verification.sites} hospitals"
    CONSOLE.print(f"fedveil audit verify: {len(verification.checks)} checks passed; {signed}", highlight=False)
    for part, fingerprint in verification.auditors.items():
        CONSOLE.print(f"attached audit, {part}: signed by the auditor's key {fingerprint[:16]}...", highlight=False)
