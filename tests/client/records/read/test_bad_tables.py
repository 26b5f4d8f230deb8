"""Every bad table: the error names code, column, count and remedy; no error, log, output or report repeats a value."""

import html
import logging
import re
import traceback

import pytest

from fedveil.client.records.read.sources import Dialect, Rules
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, DataError

WORD, NUMBER, PART = "canarysmith", "7373.7373", "7373"
HEADER = ["patient", "age", "job", "dose", "grade", "born", "y"]


def contract(**columns):
    base = [
        {"name": "patient", "role": "identifier"},
        {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [50], "unit": "years"},
        {"name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c"], "levels": [["a", "b"], ["c"]]},
        {"name": "dose", "role": "feature", "type": "number", "low": 1, "high": 300, "unit": "mg/dl",
         "missing": "indicator", "missing_codes": ["", "?", 0]},
        {"name": "grade", "role": "feature", "type": "category", "values": [1, 2, "other"], "unseen": "other"},
        {"name": "born", "role": "feature", "type": "date", "format": "%d.%m.%Y", "low": "1900-01-01",
         "high": "2025-12-31"},
        {"name": "y", "role": "target", "type": "category", "values": ["no", "yes"]},
    ]  # fmt: skip
    top = columns.pop("top", {})
    out = [{**c, **columns.pop(c["name"], {})} for c in base]
    assert not columns
    frame = {"name": "bad", "version": "1", "purpose": "a test", "unit": "one row = one record", "k": 5}
    return DataContract.model_validate({**frame, "columns": out, **top})


def good(each=15):
    rows = []
    for age, job in ((20, "a"), (20, "c"), (70, "b"), (70, "c")):
        for i in range(each):
            rows.append([f"{WORD}{len(rows)}", str(age + i), job, str(100 + i / 8), str(1 + i % 2),
                         f"{13 + i}.02.1960", ("no", "yes")[i % 2]])  # fmt: skip
    return rows


def cells(column, value, n=1):
    at = HEADER.index(column)
    return lambda rows: [[*r[:at], value, *r[at + 1 :]] if i < n else r for i, r in enumerate(rows)]


def each_row(column, make):
    at = HEADER.index(column)
    return lambda rows: [[*r[:at], make(i), *r[at + 1 :]] for i, r in enumerate(rows)]


ALL = 60
# name: (change, contract changes, words of the message, words of the remedy)
BAD = {
    "value outside bounds": (cells("age", NUMBER, 3), {},
                             "range: column 'age': 3 cells are out of the public bounds", "wider"),
    "age 430": (cells("age", "430"), {}, "range: column 'age': 1 cells", "typing errors"),
    "wrong unit": (each_row("dose", lambda i: f"{5 + i / 7373:.6f}"), {"dose": {"low": 90}},
                   "range: column 'dose': 60 cells", r"cholesterol in mmol/l: declare a correction"),
    "mixed types": (cells("age", WORD, 7), {}, "type: column 'age': 7 .*not numbers", "missing code"),
    "dates in a number": (cells("age", "03/04/7373", 2), {}, "type: column 'age': 2 .*look like dates", "format"),
    "ambiguous dates": (cells("born", "03/04/1973", 4), {},
                        "type: column 'born': 4 .*not dates of the declared", "format"),
    "impossible date": (cells("born", "31.02.1973"), {}, "type: column 'born': 1 ", "correct them"),
    "date out of bounds": (cells("born", "01.01.7373"), {}, "range: column 'born': 1 cells", "bounds"),
    "nan": (cells("dose", "NaN", 2), {}, "type: column 'dose': 2 .*NaN or infinite", "missing code"),
    "infinity": (cells("dose", "1e7373"), {}, "type: column 'dose': 1 .*NaN or infinite", "missing code"),
    "missing": (cells("job", "", 6), {}, "missing: column 'job': 6 cells have no value", "fill"),
    "all missing": (cells("job", "", ALL), {}, "missing: column 'job': 60 cells have no value .every row", "indicator"),
    "unseen": (cells("job", WORD, 2), {}, "value: column 'job': 2 cells are not among", "'other'"),
    "too many for other": (cells("grade", WORD, 9), {},
                           "other: column 'grade': 9 cells were taken for 'other'", "limit is 0.05"),
    "e-mail in a category": (cells("grade", f"{WORD}@example.org"), {},
                             r"identifier: column 'grade': 1 cells look like identifiers .email", "role 'identifier'"),
    "card in a category": (cells("job", "4111 1111 1111 1111"), {},
                           r"payment-card", "role 'identifier'"),
    "near-unique numbers": (each_row("dose", lambda i: str(100 + i)), {},
                            "identifier: column 'dose': 60 cells are whole numbers and nearly all different",
                                "reviewed"),
    "target out of classes": (cells("y", WORD), {}, "value: column 'y': 1 cells", "correct"),
}  # fmt: skip


def everything_said(error):
    parts, seen = [], error
    while seen is not None:
        parts += [str(seen), repr(seen), repr(seen.args), repr(getattr(seen, "__dict__", {}))]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(parts + traceback.format_exception(error))


def assert_silent(text):
    for canary in (WORD, PART, "4111", "03/04"):
        assert canary not in text


@pytest.mark.parametrize("case", BAD)
def test_bad_cells(table, tmp_path, secret, caplog, capfd, case):
    caplog.set_level(logging.DEBUG)
    change, changed, words, remedy = BAD[case]
    path = table(change(good()), HEADER)
    with pytest.raises(DataError) as e:
        ingest(path, contract(**changed), tmp_path / "w", secret=secret)
    assert re.search(words, e.value.message), e.value.message
    assert re.search(remedy, e.value.hint), e.value.hint
    for text in (everything_said(e.value), caplog.text, *capfd.readouterr()):
        assert_silent(text)
    reports = list((tmp_path / "w").glob("quality.*"))
    assert len(reports) == 2
    for report in reports:
        assert_silent(report.read_text())
        assert e.value.hint.partition(";")[0] in html.unescape(report.read_text())
    assert not (tmp_path / "w" / "released.csv").exists()


def test_the_good_table_is_good(table, tmp_path, secret):
    """Negative control: what the cases above change is all that is wrong with them."""
    assert ingest(table(good(), HEADER), contract(), tmp_path / "w", secret=secret).X.shape[0] == ALL


def renamed(old, new):
    return [new if h == old else h for h in HEADER]


FORMS = {
    "missing column": (lambda r: [x[:-1] for x in r], HEADER[:-1],
                       "columns of the contract are missing: 'y'", "export"),
    "duplicate column": (lambda r: [[*x, x[1]] for x in r], [*HEADER, "age"], "appear twice: 'age'", "keep one"),
    "extra column": (lambda r: [[*x, WORD] for x in r], [*HEADER, WORD],
                     "1 columns are not in the contract, at positions 8", "role 'drop'"),
    "value as header": (lambda r: r, renamed("age", NUMBER), "positions 2", "header"),
    "header only": (lambda r: [], HEADER, "has a header but no rows", ""),
    "ragged": (lambda r: [*r, [WORD, NUMBER]], HEADER, "1 rows have another number of cells", "quote"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_bad_forms(table, tmp_path, secret, caplog, case):
    caplog.set_level(logging.DEBUG)
    change, header, words, remedy = FORMS[case]
    with pytest.raises(DataError, match=words) as e:
        ingest(table(change(good()), header), contract(), tmp_path / "w", secret=secret)
    assert remedy in e.value.hint
    assert_silent(everything_said(e.value) + caplog.text)


def test_empty_file_and_one_row(table, tmp_path, secret):
    (tmp_path / "e.csv").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        ingest(tmp_path / "e.csv", contract(), tmp_path / "w", secret=secret)
    with pytest.raises(AnonymityError, match="k = 5 is more than the 1 rows") as e:
        ingest(table(good()[:1], HEADER), contract(), tmp_path / "w", secret=secret)
    assert "at least k rows" in e.value.hint
    assert_silent(everything_said(e.value))


def test_zero_rows_after_consent(table, tmp_path, secret):
    agreed = contract(top={"consent": {"column": "job", "granted": ["d"]}})
    with pytest.raises(DataError, match="of 60 rows, 60 lack consent"):
        ingest(table(good(), HEADER), agreed, tmp_path / "w", secret=secret)


def test_a_column_called_after_an_identifier(table, tmp_path, secret):
    named = contract(dose={"name": "phone"})
    with pytest.raises(DataError, match="identifier: column 'phone': 60 cells are called after telephone numbers"):
        ingest(table(good(), renamed("dose", "phone")), named, tmp_path / "w", secret=secret)
    reviewed = contract(dose={"name": "phone", "reviewed": True})
    ingest(table(good(), renamed("dose", "phone")), reviewed, tmp_path / "w", secret=secret)


def test_what_is_allowed_and_worth_knowing(table, tmp_path, secret):
    rows = each_row("born", lambda i: f"{1 + i % 12:02d}.0{1 + i % 9}.1970")(
        cells("grade", "1", ALL)(cells("dose", "0", ALL)(good()))
    )
    notes = ingest(table(rows, HEADER), contract(), tmp_path / "w", secret=secret).report.notes
    assert "column 'dose' has no value in any row" in notes  # Switzerland's cholesterol: 0 is declared to be no value
    assert "column 'grade' is constant" in notes
    assert any("every day could be a month" in n for n in notes)


def test_decimal_commas_without_a_declaration(table, tmp_path, secret):
    rows = [[r[0], r[1], r[2], r[3].replace(".", ","), *r[4:]] for r in good()]
    path = table(rows, HEADER)
    with pytest.raises(DataError, match="type: column 'dose': .*decimal comma has to be declared") as e:
        ingest(path, contract(), tmp_path / "w", secret=secret)
    assert_silent(everything_said(e.value))
    ingest(path, contract(), tmp_path / "w", secret=secret, dialect=Dialect(decimal=","), rules=Rules())
