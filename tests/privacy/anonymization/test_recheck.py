"""The verifier of written files must not be fooled: every tampering is found."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.common.errors import AnonymityError, UsageError
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.recheck import recheck, require

CITY = Hierarchy.from_rows([["a", "n", "*"], ["b", "n", "*"], ["c", "s", "*"]])
SPEC = TableSpec((QuasiIdentifier("age", numeric=True), QuasiIdentifier("city", CITY)), (Sensitive("ill"),))
MODELS = [KAnonymity(2), DistinctL(2), TCloseness(0.3)]
GOOD = [("[20,29]", "n", "flu"), ("[20,29]", "n", "cold"), ("35", "a|c", "flu"), ("35", "a|c", "cold")]


def write(path, rows, names=("age", "city", "ill")):
    if path.suffix == ".csv":
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([names, *rows])
    else:
        pq.write_table(pa.table([list(c) for c in zip(*rows, strict=True)], names=list(names)), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_good_file(tmp_path, kind):
    found = require(write(tmp_path / f"r.{kind}", GOOD), SPEC, MODELS, original_rows=5, suppression_limit=0.2)
    assert (found.rows, found.classes, found.met) == (4, 2, True)
    assert [f.worst for f in found.findings] == [2, 2, 0]


TAMPERED = {
    "one row less": (GOOD[:-1], "k-anonymity .* fails in 1 of 2 classes"),
    "value changed": ([*GOOD[:-1], ("35", "a|c", "flu")], "l-diversity .* fails in 1"),
    "raw number in a class": ([*GOOD[:-1], ("36", "a|c", "cold")], "k-anonymity .* fails in 2 of 3"),
    "foreign value": ([*GOOD, ("35", "a|x", "flu"), ("35", "a|x", "cold")], "'city': 1 different cells"),
    "twice in a set": ([*GOOD, ("35", "a|a", "flu"), ("35", "a|a", "cold")], "'city': 1 different cells"),
    "text for a number": ([*GOOD, ("old", "n", "flu"), ("old", "n", "cold")], "'age': 1 different cells"),
    "interval backwards": ([*GOOD, ("[9,2]", "n", "flu"), ("[9,2]", "n", "cold")], "'age': 1 different cells"),
    "empty label": ([*GOOD, ("", "n", "flu"), ("", "n", "cold")], "'age': 1 different cells"),
}


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tampering_is_found(tmp_path, how, kind):
    rows, words = TAMPERED[how]
    with pytest.raises(AnonymityError, match=words):
        require(write(tmp_path / f"r.{kind}", rows), SPEC, MODELS)


def test_closeness_is_relative_to_the_released_rows(tmp_path):
    rows = [("20", "n", "flu")] * 2 + [("35", "n", "cold")] * 2
    found = recheck(write(tmp_path / "r.csv", rows), SPEC, [TCloseness(0.4)])
    assert not found.met
    assert (found.findings[0].failing, found.findings[0].worst) == (2, 0.5)


def test_suppression_is_counted(tmp_path):
    path = write(tmp_path / "r.csv", GOOD)
    with pytest.raises(AnonymityError, match="2 of 6 rows are suppressed, more than the limit 0.1"):
        recheck(path, SPEC, MODELS, original_rows=6, suppression_limit=0.1)
    with pytest.raises(AnonymityError, match="1 rows more"):
        recheck(path, SPEC, MODELS, original_rows=3)


def test_unreadable_files(tmp_path):
    with pytest.raises(AnonymityError, match="cannot be read"):
        recheck(tmp_path / "none.csv", SPEC, MODELS)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(AnonymityError, match="cannot be read"):
        recheck(tmp_path / "bad.parquet", SPEC, MODELS)
    with pytest.raises(AnonymityError, match="columns are not"):
        recheck(write(tmp_path / "c.csv", [("1", "n", "x", "me")], ("age", "city", "ill", "name")), SPEC, MODELS)
    with pytest.raises(AnonymityError, match="no rows"):
        recheck(write(tmp_path / "e.csv", []), SPEC, MODELS)
    with pytest.raises(UsageError, match="neither"):
        recheck(tmp_path / "r.json", SPEC, MODELS)
