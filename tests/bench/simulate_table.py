"""`make bench-simulate`: what many virtual clients cost beside the bare maths and others; in docs/bench-simulate.md.

Every figure is of a process of its own with one thread, in CPU seconds. *Maths* is what a round computes anyhow, for
all clients in vectorised passes of torch: clipped gradients of records, or local descent, and a Gaussian share each. It
has no ledger, no grid and no report. pfl-research runs where PFL_PYTHON names an interpreter that has it, Flower on Ray
where FLOWER_PYTHON does; without them their columns say so. `python tests/bench/simulate_table.py [output file]`, about
ten minutes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-simulate.md"
HERE = Path(__file__).parent
PFL, FLOWER = os.environ.get("PFL_PYTHON", ""), os.environ.get("FLOWER_PYTHON", "")
MANY = 1000  # more clients are too many for one Ray on a small machine
LONG = 1000  # rounds, for the growth of a round


class Case(NamedTuple):
    """One simulation; ``most`` is its target, in CPU seconds a round or, for ``keysum``, in all."""

    name: str
    clients: int
    dataset: str
    mode: str
    sum: str
    steps: int
    most: float | None


PLAIN = (
    Case("trivial (8 records of 4 features), unit record", 1000, "trivial", "distributed", "plain", 10, 0.4),
    Case("digits, MLP of 2,410 weights, unit record", 1000, "digits", "distributed", "plain", 10, None),
    Case("digits, MLP of 2,410 weights, unit client", 1000, "digits", "client", "plain", 10, None),
    Case("trivial, unit client", 10_000, "trivial", "client", "plain", 5, None),
)
KEYSUM = (
    Case("digits, 60 rounds", 20, "digits", "distributed", "keysum", 60, 20),
    Case("digits, 60 rounds", 100, "digits", "distributed", "keysum", 60, 90),
)

_OURS = """
import json, resource, sys, tempfile, time
from pathlib import Path
from fedveil.deploy.lab import simulate
asked, seen = json.loads(sys.argv[1]), []
with tempfile.TemporaryDirectory() as folder:
    note = lambda kind, _: seen.append((kind, time.process_time()))
    done = simulate.run(simulate.Config(**asked), Path(folder) / "run", progress=note, report=json.loads(sys.argv[2]))
at = [t for kind, t in seen if kind in ("joined", "round")]
print(json.dumps({"status": done.status, "rounds": [b - a for a, b in zip(at, at[1:])], "all": time.process_time(),
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""

_MATHS = """
import json, sys, time
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
clients, per, inputs, classes, hidden, whole, rounds = json.loads(sys.argv[1])
torch.set_num_threads(1)
layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(inputs, classes)]
model = nn.Sequential(*layers)
params = {n: p.detach() for n, p in model.named_parameters()}
X, y = torch.randn(clients, per, inputs), torch.randint(0, classes, (clients, per))
def loss(p, x, t):
    return nn.functional.cross_entropy(functional_call(model, p, (x,)), t)
def clipped(values):
    flat = torch.cat([v.reshape(-1) for v in values])
    return flat * (1 / (flat.norm() + 1e-30)).clamp(max=1)
def client(x, t):
    p = dict(params)
    for _ in range(5):
        p = {n: p[n] - 0.1 * g for n, g in grad(loss)(p, x, t).items()}
    return clipped([params[n] - p[n] for n in p])
def record(x, t):
    return clipped(grad(loss)(params, x[None], t[None]).values())
seconds = []
for _ in range(rounds + 1):
    started, total = time.process_time(), 0
    for x, t in zip(X.split(100), y.split(100)):
        if whole:
            own = vmap(client)(x, t)
        else:
            own = vmap(record)(x.reshape(-1, inputs), t.reshape(-1)).view(len(x), per, -1).sum(1)
        total = total + (own.double() + torch.randn(own.shape, dtype=torch.float64)).sum(0)
    seconds.append(time.process_time() - started)
print(json.dumps({"rounds": seconds[1:]}))
"""


def run(python: str, *arguments: str) -> dict[str, Any]:
    """The last line that a fresh process prints, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def ours(case: Case, *, report: bool = True) -> dict[str, Any]:
    """What one simulation of ours takes."""
    asked = {"clients": case.clients, "dataset": case.dataset, "mode": case.mode, "sum": case.sum, "epsilon": 2.0}
    found = run(sys.executable, "-c", _OURS, json.dumps({**asked, "steps": case.steps}), json.dumps(report))
    if found["status"] != "COMPLETED":
        raise SystemExit(f"{case.name}: {found['status']}")
    return found


def shape(case: Case) -> list[int]:
    """Clients, records of each, inputs, classes, hidden units, whether a client is the unit, rounds."""
    small = case.dataset == "trivial"
    sizes = [8, 4, 2, 0] if small else [max(1, round(1437 / case.clients)), 64, 10, 32]
    return [case.clients, *sizes, int(case.mode == "client"), case.steps]


def theirs(python: str, script: str, case: Case) -> float:
    """Another simulator's seconds a round for the same sizes, 0 where it is not installed; they train whole clients."""
    if not python:
        return 0.0
    return statistics.median(run(python, str(HERE / script), json.dumps(shape(case)))["rounds"])


def plain_rows() -> list[str]:
    """A line for each sum in the clear."""
    rows = []
    for case in PLAIN:
        found, maths = ours(case), run(sys.executable, "-c", _MATHS, json.dumps(shape(case)))
        own, bare = (statistics.median(x["rounds"][1:]) for x in (found, maths))
        rest = (found["all"] - sum(found["rounds"])) / case.clients
        pfl = theirs(PFL, "pfl_rounds.py", case)
        flower = 0.0 if case.clients > MANY else theirs(FLOWER, "flower_rounds.py", case._replace(steps=3))
        most = case.most or pfl / 6
        verdict = f"; ≤ {most:.2g}: {'yes' if own <= most else 'no'}" if most else ""
        rows.append(
            f"| {case.name} | {case.clients:,} | {own:.3f}{verdict} | {bare:.3f} | {own / bare:.1f} "
            f"| {f'{pfl:.2f}' if pfl else '-'} | {f'{flower:.2f}' if flower else '-'} "
            f"| {1e3 * rest:.1f} | {found['rss']:.0f} |"
        )
        print(rows[-1], flush=True)
    return rows


def keysum_rows() -> list[str]:
    """A line for each run with keys, whole runs."""
    rows = []
    for case in KEYSUM:
        found = ours(case)
        rows.append(
            f"| {case.name} | {case.clients} | {found['all']:.1f}; ≤ {case.most:g}: "
            f"{'yes' if found['all'] <= (case.most or 0) else 'no'} | {statistics.median(found['rounds']):.2f} "
            f"| {found['rss']:.0f} |"
        )
        print(rows[-1], flush=True)
    return rows


def growth() -> str:
    """How much longer a round takes in the last tenth of a long run than in the first."""
    tenth = LONG // 10
    found = ours(PLAIN[0]._replace(clients=200, steps=LONG), report=False)["rounds"]
    first, last = (statistics.median(part) for part in (found[:tenth], found[-tenth:]))
    return f"{100 * (last / first - 1):+.1f} % (from {1e3 * first:.1f} to {1e3 * last:.1f} ms; at most +5 %)"


def page() -> str:
    """The whole document."""
    start = time.perf_counter()
    plain, keyed, grown = plain_rows(), keysum_rows(), growth()
    return f"""# Many clients at once

Written by `make bench-simulate` in {time.perf_counter() - start:.0f} s on a machine with {os.cpu_count()} cores
({platform.machine()}), torch {version("torch")}, Python {platform.python_version()}. Everything is measured in a
process with one thread. Times are CPU seconds, the median of a run's rounds.

## The sum in the clear: `--sum plain`

All clients of a process contribute in one pass: clipping, grid and noise are vectorised, every client's checks and
charges are its own ([guide](guide.md)). *Maths* is a round's arithmetic alone, in vectorised torch. *Distance* is ours
divided by it: below 1 the closed form is faster than the library's vectorised gradients. *The rest* is what a run takes
before its first round and after its last one, for each client: keys, statements, the signatures of its ledger, the
checks of the ledger by the server and by the report. pfl-research and Flower on Ray train every client by itself, with
one noise for all (pfl) or without (Flower). The target is the figure named, or a sixth of pfl's. Flower's figure is in
seconds of the clock, on all cores.

| task | clients | a round, s | maths, s | distance | pfl, s | Flower on Ray, s | the rest, ms a client | MiB |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(plain)}

A round of the last tenth of {LONG:,}, compared with one of the first, 200 clients: {grown}.

## The real sum: `--sum keysum`

Every site encrypts, shares its key with all others, signs and helps to open, in one process. What all of them verify is
verified once.

| task | clients | the whole run, s | a round, s | MiB |
|---|---|---|---|---|
{chr(10).join(keyed)}
"""


def main() -> None:
    """Write the page."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    target.write_text(page())
    print(target)


if __name__ == "__main__":
    main()
