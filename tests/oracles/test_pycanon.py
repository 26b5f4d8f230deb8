"""pycanon as a second opinion on released files. Runs where PYCANON_PYTHON names an interpreter that has it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import (
    AlphaK,
    BetaLikeness,
    DistinctL,
    EntropyL,
    KAnonymity,
    TCloseness,
)
from fedveil.privacy.anonymization.recheck import recheck

PYTHON = os.environ.get("PYCANON_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="PYCANON_PYTHON names no interpreter with pycanon")
AGES = [(str(v), f"[{v // 4 * 4},{v // 4 * 4 + 3}]", f"[{v // 16 * 16},{v // 16 * 16 + 15}]", "*") for v in range(64)]
SPEC = TableSpec((QuasiIdentifier("age", Hierarchy.from_rows(AGES)), QuasiIdentifier("city")), (Sensitive("ill"),))
MODELS = [KAnonymity(2), DistinctL(1), EntropyL(1), TCloseness(1), AlphaK(1, 2), BetaLikeness(99, enhanced=False)]


@pytest.mark.parametrize("method", ["mondrian", "optimal", "peel"])
@pytest.mark.parametrize("seed", [1, 2])
def test_pycanon_reads_the_same_figures(tmp_path, method, seed):
    rng = np.random.default_rng(seed)
    n = 1500
    table = pa.table(
        {
            "age": rng.integers(0, 64, n),
            "city": [f"c{x}" for x in rng.integers(0, 9, n)],
            "ill": [f"i{x}" for x in rng.integers(0, 6, n)],
        }
    )
    engine = Anonymizer(SPEC, [KAnonymity(6), DistinctL(2)], method=method, suppression_limit=0.1)
    out = engine.fit_transform(table)
    path = tmp_path / "r.csv"
    pacsv.write_csv(out.cast(pa.schema([(c, pa.string()) for c in out.column_names])), path)
    script = Path(__file__).with_name("pycanon_run.py")
    done = subprocess.run([PYTHON, script, path, "ill", "age", "city"], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    ours = {f.name: f.worst for f in recheck(path, SPEC, MODELS).findings}
    assert theirs["k"] == ours["k-anonymity"]
    assert theirs["l"] == ours["distinct l-diversity"]
    assert theirs["entropy"] == int(ours["entropy l-diversity"] + 1e-9)
    assert theirs["t"] == pytest.approx(ours["t-closeness"], abs=1e-6)
    assert theirs["alpha"] == pytest.approx(ours["(α,k)-anonymity"], abs=1e-6)
    assert theirs["basic beta"] == pytest.approx(ours["β-likeness"], abs=1e-6)
