"""The four hospitals of the UCI heart disease data go in as they are and come out checked, anonymous and alike."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedveil.client.records.read.sources import read
from fedveil.client.records.release.anonymize import anonymise, as_table
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.contract import DataContract
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.data("heart_4hospitals.csv")]
NUMBERS = {
    "trestbps": (50, 250, "mmHg"),
    "chol": (50, 700, "mg/dl"),
    "thalach": (50, 250, "1/min"),
    "oldpeak": (-5, 10, "mm"),
}
CATEGORIES = {"fbs": [0, 1], "restecg": [0, 1, 2], "exang": [0, 1], "slope": [1, 2, 3], "ca": [0, 1, 2, 3],
              "thal": [3, 6, 7], "cp": [1, 2, 3, 4]}  # fmt: skip
MISSING = {"missing": "indicator", "missing_codes": ["?", ""]}


def heart(encoding="labels"):
    columns = [
        {"name": "hospital", "role": "drop"},
        {"name": "age", "role": "quasi", "type": "number", "unit": "years", "low": 20, "high": 90, "levels": [55],
         "encoding": encoding},
        {"name": "sex", "role": "quasi", "type": "category", "values": [0, 1], "levels": [[0, 1]],
         "encoding": encoding},
        # Switzerland writes 0 for every cholesterol, and a resting pressure of 0 is no measurement either.
        *({"name": n, "role": "feature", "type": "number", "low": a, "high": b, "unit": u, "missing": "indicator",
           "missing_codes": ["?", "", 0] if n in ("chol", "trestbps") else ["?", ""]}
          for n, (a, b, u) in NUMBERS.items()),
        *({"name": n, "role": "feature", "type": "category", "values": v, **MISSING} for n, v in CATEGORIES.items()),
        {"name": "num", "role": "target", "type": "number", "low": 0, "high": 4, "threshold": 0},
    ]  # fmt: skip
    base = {"name": "heart", "version": "1", "purpose": "predict heart disease", "unit": "one row is one patient"}
    return DataContract.model_validate({**base, "k": 5, "columns": columns})


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory, data_folder):
    """One CSV file per hospital, its rows as they are in the public file."""
    folder = tmp_path_factory.mktemp("heart")
    with (data_folder / "heart_4hospitals.csv").open(newline="") as f:
        header, *rows = list(csv.reader(f))
    out = {}
    for name in sorted({r[0] for r in rows}):
        out[name] = folder / f"{name}.csv"
        with out[name].open("w", newline="") as f:
            csv.writer(f).writerows([header, *(r for r in rows if r[0] == name)])
    assert len(out) == 4
    return out


def test_four_hospitals_come_out_alike(hospitals, tmp_path, secret):
    contract = heart()
    sizes, widths, positive = {}, set(), {}
    for name, path in hospitals.items():
        out = ingest(path, contract, tmp_path / name, secret=secret)
        verdict = verify(out.released, contract)
        assert verdict.k_met
        assert min(m.rows for m in verdict.classes.values()) >= 5
        assert out.evidence["stability_factor"] == 1
        assert np.abs(out.X).max() <= 1
        sizes[name], positive[name] = len(out.X), out.y.mean()
        widths.add(out.X.shape[1])
        chol = list(contract.feature_names).index("chol=missing")
        if name.startswith("switz"):
            assert "column 'chol' has no value in any row" in out.report.notes
            assert out.X[:, chol].all()
            assert (out.X[:, chol - 1] == 0).all()
    assert sorted(sizes.values()) == [123, 200, 294, 303]
    assert widths == {contract.width}
    assert positive[next(n for n in positive if n.startswith("switz"))] > 0.9


def test_undeclared_zeros_are_refused(hospitals, tmp_path, secret):
    """Without the declaration the same table does not pass: 0 mg/dl is outside every public bound."""
    columns = heart().payload["columns"]
    for c in columns:
        if c["name"] == "chol":
            c["missing_codes"] = ["?", ""]
    strict = DataContract.model_validate({**heart().payload, "columns": columns})
    path = next(p for n, p in hospitals.items() if n.startswith("switz"))
    with pytest.raises(DataError, match="range: column 'chol': 123 cells"):
        ingest(path, strict, tmp_path / "w", secret=secret)


def test_mondrian_gives_the_same_inputs(hospitals, tmp_path, released_inputs):
    contract = heart("sets")
    widths = set()
    for name, path in hospitals.items():
        raw = read(path, contract)
        done = anonymise(raw, contract, "mondrian", tmp_path / f"{name}.parquet")
        assert done.findings.met
        assert done.stability.factor is None
        encoded = released_inputs.encode_released(pq.read_table(done.path), contract)
        assert as_table(raw, contract).num_rows == len(encoded.X)
        widths.add(encoded.X.shape[1])
    assert widths == {contract.width}
