"""`make bench-anon`: Adult beside anjana, and ten million rows from Parquet to Parquet; writes docs/bench-anon.md.

Data: the folder named by FEDVEIL_DATA (default ../shared/data), see its README; without it only the generated file is
measured. anjana runs in its own environment in the same run: the Python named by ANJANA_PYTHON, or one made under
build/ with pip. Both are timed in CPU seconds of their process, from table in memory to table in memory, ours as the
median of five. Ratios hold on other machines, seconds do not. `python tests/bench/anon_table.py [output file]`.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedveil.privacy.anonymization.anonymizer import Anonymizer, Method, Outcome
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import Criterion, DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.recheck import recheck
from fedveil.privacy.anonymization.stream import anonymize_parquet

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FEDVEIL_DATA", ROOT.parent / "shared" / "data"))
OUTPUT = ROOT / "docs" / "bench-anon.md"
QUASI = ("age", "workclass", "education", "marital-status", "race", "sex", "native-country")
CASES: dict[str, list[Criterion]] = {
    "2": [KAnonymity(2)],
    "5": [KAnonymity(5)],
    "10": [KAnonymity(10)],
    "5:l3": [KAnonymity(5), DistinctL(3, "occupation")],
    "5:t0.2": [KAnonymity(5), TCloseness(0.2, "occupation")],
}
NAMES = {"2": "k = 2", "5": "k = 5", "10": "k = 10", "5:l3": "k = 5, l = 3", "5:t0.2": "k = 5, t = 0.2"}
METHODS: tuple[Method, ...] = ("optimal", "peel", "mondrian")
ROWS, REPEATS, LIMIT = 10_000_000, 5, 0.05


def adult() -> tuple[pa.Table, TableSpec]:
    """The 30,162 rows and hierarchies of the anonymisation literature."""
    folder = DATA / "adult_hierarchies"
    quasi = [QuasiIdentifier(q, Hierarchy.from_csv(folder / f"adult_hierarchy_{q}.csv", name=q)) for q in QUASI]
    table = pacsv.read_csv(DATA / "adult_arx_30162.csv", parse_options=pacsv.ParseOptions(delimiter=";"))
    return table, TableSpec(tuple(quasi), (Sensitive("occupation"),), (), ("salary-class",))


def ours(table: pa.Table, spec: TableSpec, models: list[Criterion], method: Method) -> tuple[float, Outcome]:
    """Median CPU seconds from table to table, and what was found; the written file is checked once."""
    seconds = []
    engine = Anonymizer(spec, models, method=method, suppression_limit=LIMIT)
    released = engine.fit_transform(table)
    for _ in range(REPEATS):
        start = time.process_time()
        engine = Anonymizer(spec, models, method=method, suppression_limit=LIMIT)
        released = engine.fit_transform(table)
        seconds.append(time.process_time() - start)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "released.parquet"
        pq.write_table(released, path)
        found = recheck(path, spec, models, original_rows=table.num_rows, suppression_limit=LIMIT)
    if not found.met:
        raise SystemExit(f"the released file fails its own criteria: {found}")
    return statistics.median(seconds), engine.outcome


def anjana_python() -> str | None:
    """An interpreter with anjana; None, with a message, where none can be had."""
    if given := os.environ.get("ANJANA_PYTHON"):
        return given
    folder = ROOT / "build" / "anjana"
    python = folder / "bin" / "python"
    if not python.exists():
        made = subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False)
        got = (
            subprocess.run([str(python), "-m", "pip", "install", "-q", "anjana"], check=False)
            if not made.returncode
            else made
        )
        if got.returncode:
            print("anjana cannot be installed: no package index can be reached")
            return None
    return str(python)


def anjana() -> dict[str, dict[str, Any]]:
    """By case what anjana did; empty without it."""
    python = anjana_python()
    if python is None:
        return {}
    script = ROOT / "tests" / "oracles" / "anjana_run.py"
    done = subprocess.run([python, str(script), str(DATA), *CASES], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


def generate(path: Path, rows: int) -> None:
    """Independent skewed columns of Adult's sizes: 27 million possible combinations, 1.4 million of them taken."""
    rng = np.random.default_rng(7)
    sizes = {"workclass": 8, "education": 16, "marital-status": 7, "race": 5, "sex": 2, "native-country": 41}
    writer = None
    for start in range(0, rows, 1 << 20):
        n = min(1 << 20, rows - start)
        columns: dict[str, Any] = {"age": pa.array((17 + 73 * rng.beta(1.6, 3.2, n)).astype(np.int64))}
        for name, size in {**sizes, "occupation": 14}.items():
            p = 1 / np.arange(1, size + 1) ** (2.5 if size == 41 else 1.0)
            words = pa.array([f"{name}-{i:02d}" for i in range(size)])
            index = pa.array(rng.choice(size, n, p=p / p.sum()).astype(np.int32))
            columns[name] = pa.DictionaryArray.from_arrays(index, words).cast(pa.string())
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def stream(source: Path) -> None:
    """The child process: anonymise, print figures as JSON."""
    spec = TableSpec(tuple(QuasiIdentifier(q) for q in QUASI), (Sensitive("occupation"),))
    wall, cpu = time.perf_counter(), time.process_time()
    done = anonymize_parquet(source, source.with_name("out.parquet"), spec, [KAnonymity(10)], method="mondrian")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    o = done.outcome
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "verify": done.seconds["verify"], "rows": o.rows,
                      "classes": o.classes, "ncp": o.ncp, "suppressed": o.suppressed, "cpus": done.cpu}))  # fmt: skip


def adult_lines() -> list[str]:
    """The table beside anjana, and the targets."""
    if not (DATA / "adult_arx_30162.csv").exists():
        return [f"Adult was not measured: {DATA} does not hold it."]
    table, spec = adult()
    theirs = anjana()
    lines = [
        "| criteria | tool | CPU seconds | suppressed | NCP | classes | anjana / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    targets = []
    for case, models in CASES.items():
        other = theirs.get(case)
        if other:
            gone = f"{1 - other['rows'] / table.num_rows:.2%}"
            lines.append(f"| {NAMES[case]} | anjana | {other['seconds']:.2f} | {gone} | | {other['classes']} | |")
        for method in METHODS:
            seconds, o = ours(table, spec, models, method)
            ratio = f"{other['seconds'] / seconds:.0f}x" if other else "-"
            gone = f"{o.suppressed / o.rows:.2%}"
            figures = f"{seconds:.3f} | {gone} | {o.ncp:.4f} | {o.classes} | {ratio}"
            lines.append(f"| {NAMES[case]} | {method} | {figures} |")
            targets += judge(case, method, o, other["seconds"] / seconds if other else None)
    note = [] if theirs else ["", "anjana was not there: no package index could be reached."]
    return [*lines, *note, "", "| target | reached |", "|---|---|", *targets]


def judge(case: str, method: Method, o: Outcome, ratio: float | None) -> list[str]:
    """Rows of the table of targets."""
    out = []
    if method == "optimal" and ratio is not None:
        out.append(f"| optimal (what anjana does) at least 50 times faster, {NAMES[case]} | {ratio:.0f}x |")
    if case != "5":
        return out
    if method == "optimal":
        same = o.node == (3, 1, 1, 0, 0, 0, 1) and o.classes == 399 and round(100 * o.suppressed / o.rows, 2) == 4.83
        out.append(
            f"| optimal, k = 5: node [3,1,1,0,0,0,1], 4.83 % suppressed, 399 classes | {'yes' if same else 'no'} |"
        )
    elif method == "peel":
        out.append(f"| labels (peel), k = 5: NCP at most 0.0300 | {o.ncp:.4f} |")
    else:
        out.append(f"| sets (mondrian), k = 5: NCP at most 0.0172 | {o.ncp:.4f} |")
    return out


def stream_lines() -> list[str]:
    """Ten million rows in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.parquet"
        generate(source, ROWS)
        run = subprocess.run(
            [sys.executable, __file__, "--stream", str(source)], capture_output=True, text=True, check=True
        )
    r = json.loads(run.stdout)
    before, work = r["wall"] - r["verify"], sum(v for n, v in r["cpus"].items() if n != "verify")
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in r["cpus"].items())
    return [
        f"{r['rows']:,} generated rows, Parquet to Parquet, shuffled, k = 10:",
        f"{r['classes']:,} classes, NCP {r['ncp']:.4f}.",
        "",
        "| | rows/s | target |",
        "|---|---|---|",
        f"| per CPU second, file to file | {r['rows'] / work / 1e6:.2f}M | ≥ 0.7M (goal 1M) |",
        f"| per second of wall clock, file to file (the machine was not quiet) | {r['rows'] / before / 1e6:.2f}M | |",
        f"| per second of wall clock, with verification | {r['rows'] / r['wall'] / 1e6:.2f}M | |",
        f"| peak memory | {r['peak']:.2f} GiB | ≤ 1 GiB |",
        "",
        f"CPU seconds: {phases}.",
    ]


def main(output: Path) -> None:
    """Measure and write the page."""
    start = time.perf_counter()
    first, second = adult_lines(), stream_lines()
    head = [
        "# Anonymisation: speed and loss",
        "",
        f"Written by `make bench-anon` in {time.perf_counter() - start:.0f} s on a machine with {os.cpu_count()} cores",
        f"({platform.machine()}), numpy {np.__version__}, pyarrow {pa.__version__},",
        f"Python {platform.python_version()}.",
        "Times are CPU seconds of one process, from table in memory to table in memory, encoding and shuffling",
        "included. At most 5 % of the rows may be suppressed. NCP is the certainty penalty per cell; a suppressed",
        "row counts 1. Every released table was written, read back and re-checked by the independent verifier.",
        "",
        "## Adult (30,162 rows, 7 quasi-identifiers, sensitive: occupation)",
        "",
    ]
    output.write_text("\n".join([*head, *first, "", "## Ten million rows", "", *second]) + "\n")
    print(output.read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stream"]:
        stream(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
