"""The demonstration's data: four random hospital splits of scikit-learn's diabetes table pass k = 5, l = 2."""

import numpy as np
import pytest

from fedveil.client.records.release.pipeline import ingest
from fedveil.common.contract import DataContract

BOUNDS = {"bmi": (15, 50), "bp": (40, 160), "s1": (80, 320), "s2": (20, 260), "s3": (10, 120), "s4": (1, 12),
          "s5": (2.5, 7), "s6": (40, 150)}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = datasets.load_diabetes(scaled=False)
    return list(loaded.feature_names), np.column_stack([loaded.data, loaded.target])


def diabetes_contract():
    columns = [
        {"name": "age", "role": "quasi", "type": "number", "unit": "years", "low": 18, "high": 80, "levels": [50]},
        {"name": "sex", "role": "quasi", "type": "category", "values": [1, 2], "levels": [[1], [2]]},
        *({"name": n, "role": "feature", "type": "number", "low": a, "high": b} for n, (a, b) in BOUNDS.items()),
        {"name": "progression", "role": "target", "type": "number", "low": 0, "high": 400, "threshold": 140.5},
    ]
    base = {"name": "diabetes", "version": "1", "purpose": "a demonstration", "unit": "one row = one record"}
    return DataContract.model_validate({**base, "k": 5, "l": 2, "sensitive_target": True, "columns": columns})


@pytest.mark.parametrize("seed", range(3))
def test_four_hospitals_pass_without_suppression(data, tmp_path, secret, seed):
    names, values = data
    contract = diabetes_contract()
    train = np.random.default_rng(seed).permutation(len(values))[:331]
    rows = 0
    for i, part in enumerate(np.array_split(train, 4)):
        lines = [",".join([*names, "progression"])]
        lines += [",".join(f"{v:.6g}" for v in values[r]) for r in part]
        path = tmp_path / f"hospital{i}.csv"
        path.write_text("\n".join(lines) + "\n")
        out = ingest(path, contract, tmp_path / f"work{i}", secret=secret)
        assert out.X.shape == (len(part), 12)
        assert np.abs(out.X).max() <= 1
        assert out.y.sum() == (values[part, -1] > 140.5).sum()
        assert out.evidence["stability_factor"] == 1
        rows += len(out.y)
    assert rows == 331
