"""A canary value is planted where each failure looks; no exception, log, output or evidence may repeat it."""

import json
import logging
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.client.records.release.pipeline import ingest
from fedveil.common.errors import DataError

TEXT, NUMBER = "CANARYsmith", "7373.7373"


def _cell(column, value):
    def change(rows):
        rows[4][column] = value
        return rows, None

    return change


def _lonely(rows):
    # A class of one row whose exact age and dose are canaries: k fails.
    return [*(r for r in rows if int(r[1]) < 50), [TEXT, "73.73737", "c", "0.73737", "1", "0"]], None


def _uniform(rows):
    return [[r[0], r[1], r[2], "0.73737", r[4], "7.3737"] for r in rows], None


CASES = {
    "unparsable number": _cell(1, TEXT),
    "unparsable number with digits": _cell(3, NUMBER + "x"),
    "out of bounds": _cell(1, NUMBER),
    "target out of bounds": _cell(5, NUMBER),
    "unseen category": _cell(2, TEXT),
    "infinite": _cell(1, "1e7373"),
    "missing beside an identifier": lambda rows: ([[TEXT, "", *r[2:]] for r in rows], None),
    "ragged row": lambda rows: ([*rows, [TEXT, NUMBER]], None),
    "no header line": lambda rows: ([[TEXT, NUMBER, "a", "0", "1", "1"], *rows], []),
    "value in the header": lambda rows: (rows, [TEXT, "age", "job", "dose", "grade", "y"]),
    "value twice in the header": lambda rows: (rows, [TEXT, TEXT, "job", "dose", "grade", "y"]),
    "k fails": _lonely,
    "l fails": _uniform,
    "unclosed quote in the header": lambda rows: (rows, ["patient", "age\n" + TEXT, "job", "dose", "grade", "y"]),
}


def everything_said(error):
    """All texts a handler could print or send: message, hint, representation, chained errors, traceback."""
    parts, seen = [], error
    while seen is not None:
        parts += [str(seen), repr(seen), repr(seen.args), repr(getattr(seen, "__dict__", {}))]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(parts + traceback.format_exception(error))


def assert_silent(text):
    for canary in (TEXT, "7373", "73737", "73.7"):
        assert canary not in text


@pytest.mark.parametrize("how", CASES)
def test_csv_failures_repeat_no_value(contract, rows, table, tmp_path, secret, caplog, capfd, how):
    caplog.set_level(logging.DEBUG)
    path = table(*CASES[how](rows))
    assert any(c in path.read_text() for c in (TEXT, "7373", "73737"))
    with pytest.raises(DataError) as e:
        ingest(path, contract, tmp_path / "w", secret=secret)
    assert_silent(everything_said(e.value))
    assert_silent(caplog.text)
    assert_silent("".join(capfd.readouterr()))
    for report in (tmp_path / "w").glob("quality.*"):
        assert_silent(report.read_text())


@pytest.mark.parametrize("kind", ["text", "bytes", "list", "decimal"])
def test_parquet_failures_repeat_no_value(contract, tmp_path, secret, kind):
    age = {"text": pa.array([TEXT]), "bytes": pa.array([TEXT.encode()]), "list": pa.array([[TEXT]]),
           "decimal": pa.array([NUMBER]).cast(pa.decimal128(12, 4))}[kind]  # fmt: skip
    rest = {"job": pa.array(["a"]), "dose": pa.array([0.0]), "grade": pa.array([1]), "y": pa.array([1.0])}
    pq.write_table(pa.table({"age": age, **rest}), tmp_path / "t.parquet")
    with pytest.raises(DataError) as e:
        ingest(tmp_path / "t.parquet", contract, tmp_path / "w", secret=secret)
    assert_silent(everything_said(e.value))


def test_success_says_nothing_either(contract, rows, table, tmp_path, secret, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    rows[0][0], rows[0][3] = TEXT, "0.73737"
    out = ingest(table(rows), contract, tmp_path / "w", secret=secret)
    assert "0.73737" in out.released.read_text()  # a feature: released by the contract, at the site
    for text in (json.dumps(out.evidence), repr(out), caplog.text, *capfd.readouterr()):
        assert_silent(text)
    for name in ("quality.json", "quality.html", "lineage.json"):
        assert_silent((tmp_path / "w" / name).read_text())


def test_the_detector_detects():
    """Negative control: a careless chained exception is caught by the same check."""
    try:
        try:
            float(TEXT)
        except ValueError as inner:
            raise DataError("not a number") from inner
    except DataError as e:
        with pytest.raises(AssertionError):
            assert_silent(everything_said(e))
