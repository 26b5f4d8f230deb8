"""What every method releases under one contract, recorded once: the same rows and spelling, in whatever order."""

import hashlib

import pyarrow.parquet as pq
import pytest

from fedveil.client.records.read.sources import read
from fedveil.client.records.release import anonymize as release
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.contract import DataContract

JOB = [["nurse", "care", "*"], ["medic", "care", "*"], ["clerk", "office", "*"]]
METHODS = ("fixed", "mondrian", "optimal", "peel", "auto")
# By method and ending; "" is the training table of `fedveil data check`.
RECORDED = {
    ("fixed", ".csv"): ("76e236f0f803f7b0", 6, None),
    ("mondrian", ".csv"): ("9eec0cd9df4353e2", 0, None),
    ("optimal", ".csv"): ("e922f003c6553db5", 6, None),
    ("peel", ".csv"): ("e6019abdf6247ccc", 0, None),
    ("auto", ".csv"): ("e6019abdf6247ccc", 0, None),
    ("fixed", ".parquet"): ("8f3dc3ae411847bb", 6, None),
    ("mondrian", ".parquet"): ("1a081186608fbffd", 0, None),
    ("optimal", ".parquet"): ("304678e97114d669", 6, None),
    ("peel", ".parquet"): ("b0ab7bad9100ba68", 0, None),
    ("auto", ".parquet"): ("b0ab7bad9100ba68", 0, None),
    ("fixed", ""): ("87f39c3e3b3dc3c4", 6, None),
}


def agreed():
    columns = [
        {"name": "born", "role": "quasi", "type": "date", "format": "%d.%m.%Y", "low": "1920-01-01",
         "high": "2019-12-31", "levels": "decade", "encoding": "sets"},
        {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "ladder": [[20, 50, 70], [50], []],
         "level": 1, "encoding": "sets", "missing": "indicator"},
        {"name": "job", "role": "quasi", "type": "category", "values": ["nurse", "medic", "clerk"], "hierarchy": JOB,
         "level": 1},
        {"name": "x", "role": "feature", "type": "number", "low": 0, "high": 1, "missing": "indicator"},
        {"name": "ill", "role": "sensitive", "type": "category", "values": ["flu", "a, b", 'say "c"'],
         "missing": "indicator"},
        {"name": "y", "role": "target", "type": "number", "low": 0, "high": 4, "threshold": 0},
    ]  # fmt: skip
    head = {"name": "r", "version": "1", "purpose": "p", "unit": "u", "k": 4, "l": 2, "t": 0.6}
    return DataContract.model_validate({**head, "suppression_limit": 0.5, "columns": columns})


@pytest.fixture
def source(table):
    rows = []
    for i in range(400):
        ill = ("flu", "a, b", 'say "c"', "")[i * 7 % 11 % 4]
        x = "" if i % 31 == 4 else f"{i / 400:.3f}"
        age = "" if i % 9 == 0 else str(i * 37 % 100)
        rows.append([f"{1 + i * 7 % 28}.{1 + i % 12}.{1990 + i * 11 % 29}", age, JOB[i * 5 % 7 % 3][0], x, ill, i % 5])
    return table(rows, ["born", "age", "job", "x", "ill", "y"])


def digest(head, lines):
    return hashlib.sha256("\n".join([head, *sorted(lines)]).encode()).hexdigest()[:16]


def of_text(path):
    head, *lines = path.read_bytes().decode().split("\n")
    return digest(head, lines)


def of_table(path):
    t = pq.read_table(path)
    return digest(str(t.schema.remove_metadata()), [repr(tuple(r.values())) for r in t.to_pylist()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_the_release_is_the_recorded_one(tmp_path, source, method, ending):
    out = tmp_path / f"out{ending}"
    done = release.anonymise(read(source, agreed()), agreed(), method, out)
    found = (of_text if ending == ".csv" else of_table)(out), done.outcome.suppressed, done.stability.factor
    assert found == RECORDED[(method, ending)], (method, ending, found)


def test_the_training_table_is_the_recorded_one(tmp_path, source, secret):
    out = ingest(source, agreed(), tmp_path / "w", secret=secret)
    found = (of_text(out.released), 400 - len(out.y), out.evidence["stability_factor"])
    assert found == RECORDED[("fixed", "")], ("fixed", "", found)
