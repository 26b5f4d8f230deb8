"""A small contract and tables that meet it, to be spoilt one cell at a time."""

import csv
import importlib.util
import secrets
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedveil.common.contract import DataContract

HEADER = ["patient", "age", "job", "dose", "grade", "y"]


def small_contract(**changes):
    columns = [
        {"name": "patient", "role": "identifier"},
        {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [50]},
        {"name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c"], "levels": [["a", "b"], ["c"]]},
        {"name": "dose", "role": "feature", "type": "number", "low": -1, "high": 3, "missing": "indicator",
         "missing_codes": ["", "?"]},
        {"name": "grade", "role": "feature", "type": "category", "values": [1, 2, "other"], "unseen": "other"},
        {"name": "y", "role": "target", "type": "number", "low": 0, "high": 10, "threshold": 5},
    ]  # fmt: skip
    base = {"name": "small", "version": "1", "purpose": "a test", "unit": "one row = one record", "k": 5, "l": 2}
    return DataContract.model_validate({**base, "sensitive_target": True, "columns": columns, **changes})


def small_rows(each=6):
    """``each`` rows in each of the four classes, with both outcomes."""
    rows = []
    for age, job in ((20, "a"), (20, "c"), (70, "b"), (70, "c")):
        for i in range(each):
            rows.append([f"p{len(rows):03}", str(age + i), job, str(i / 8), str(1 + i % 2), str(i % 2 * 9)])
    return rows


def write_csv(path, rows, header=None):
    with path.open("w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        if header != []:
            out.writerow(header or HEADER)
        out.writerows(rows)
    return path


@pytest.fixture
def contract():
    return small_contract()


@pytest.fixture
def make():
    return small_contract


@pytest.fixture
def rows():
    return small_rows()


@pytest.fixture
def table(tmp_path):
    """Write rows as CSV and return the path."""
    return lambda rows, header=None, name="t.csv": write_csv(tmp_path / name, rows, header)


@pytest.fixture
def secret():
    return secrets.token_bytes(32)


@pytest.fixture(scope="session")
def released_inputs() -> ModuleType:
    """Inputs of a network out of a released table's labels, as the benches make them."""
    path = Path(__file__).parents[2] / "bench" / "released_inputs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
