"""A quote that is never closed, and one that swallows lines: rows are not lost without a word."""

import csv
import io
import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedveil.client.records.read import files
from fedveil.client.records.read.quotes import Quotes
from fedveil.client.records.read.sources import Dialect, read
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.errors import DataError


def reference(text, delimiter):
    """The reader's rules, one character at a time: (open at the end, line ends inside quotes, line of the last)."""
    state, breaks, line, last = "start", 0, 1, 0
    i = 0
    while i < len(text):
        c = text[i]
        if state == "quoted":
            if c == '"' and text[i + 1 : i + 2] == '"':
                i += 1
            elif c == '"':
                state = "inside"
            breaks += c == "\n"
        elif state == "start" and c == '"':
            state, last = "quoted", line
        else:
            state = "start" if c in (delimiter, "\n") else "inside"
        line += c == "\n"
        i += 1
    return state == "quoted", breaks, last


@settings(max_examples=400, deadline=None)
@given(st.text('"",\n\na;é', max_size=24), st.lists(st.integers(1, 5), min_size=30, max_size=30),
       st.sampled_from([",", ";"]), st.sampled_from(["utf-8", "utf-16", "utf-16-le"]))  # fmt: skip
@example('a"b\n"', [1] * 30, ",", "utf-8")
@example('x"\n"""\n', [2] * 30, ",", "utf-8")
def test_blocks_of_any_length_give_the_readers_state(text, steps, delimiter, encoding):
    data, quotes = text.encode(encoding), Quotes(delimiter, encoding)
    for at, step in zip(itertools.accumulate(steps, initial=0), [*steps, len(data) + 1], strict=False):
        quotes.feed(data[at : at + step])
    opened, breaks, line = reference(text, delimiter)
    assert (quotes.opened, quotes.breaks, quotes.lines) == (opened, breaks, text.count("\n"))
    assert bool(quotes.held) == opened
    if opened:
        assert quotes.line == line


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.text('"",\n;ab', max_size=5), min_size=2, max_size=3), min_size=1, max_size=5))
def test_what_a_writer_writes_is_closed(rows):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    quotes = Quotes(",", "utf-8")
    quotes.feed(out.getvalue().encode())
    assert not quotes.opened
    assert quotes.breaks == sum(cell.count("\n") for row in rows for cell in row)


COLUMNS = ["age", "job", "dose", "grade", "y", "patient", "note"]


@pytest.fixture
def noted(make):
    return make(columns=[*make().payload["columns"], {"name": "note", "role": "drop"}])


def lines_of(rows, last):
    order = [*COLUMNS[:5], *(c for c in ("note", "patient") if c != last), last]
    cells = [dict(zip(["patient", *COLUMNS[:5]], r, strict=True), note=f"n{i}") for i, r in enumerate(rows)]
    return [",".join(order), *(",".join(c[n] for n in order) for c in cells)]


@pytest.mark.parametrize("last", ["patient", "note"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_a_quote_that_is_never_closed_is_refused(tmp_path, noted, rows, last, encoding):
    """It went wrong once: forty rows became eleven, since nobody reads the column that swallowed the others."""
    lines = lines_of(rows, last)
    head, _, tail = lines[10].rpartition(",")
    lines[10] = f'{head},"{tail}'
    path = tmp_path / "t.csv"
    path.write_bytes("\n".join([*lines, ""]).encode(encoding))
    with pytest.raises(DataError, match="opened on line 11 and never closed") as refused:
        read(path, noted, Dialect(encoding=encoding if encoding == "cp1252" else "auto"))
    assert "twice" in refused.value.hint


def test_an_open_quote_beyond_a_block_is_named(tmp_path, noted, rows, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 10)
    lines = lines_of(rows * 100, "note")
    lines[10] = lines[10].replace(",p0", ',"p0')
    path = tmp_path / "t.csv"
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(DataError, match="opened on line 11 is not closed within"):
        read(path, noted)
    lines[900] = lines[900].replace(",p", '",p')  # whether it is closed somewhere, nobody has looked
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(DataError, match="opened on line 11 is not closed within"):
        read(path, noted)
    lines = lines_of(rows, "note")
    path.write_text("\n".join([*lines[:5], lines[5] + "x" * 5000, *lines[6:], ""]))
    with pytest.raises(DataError, match="a line of more than"):
        read(path, noted)


def test_lines_inside_quotes_are_counted_and_told(tmp_path, noted, rows, secret):
    lines = lines_of(rows * 3, "note")
    lines[10] = lines[10].replace(",n9", ',"n9')
    lines[17] = lines[17].replace(",n16", ',n16"')
    path = tmp_path / "t.csv"
    path.write_text("\n".join([*lines, ""]))
    raw = read(path, noted)
    assert (raw.rows, raw.tally.breaks) == (len(rows) * 3 - 7, 7)
    notes = ingest(path, noted, tmp_path / "w", secret=secret).report.notes
    assert any(n.startswith("7 line ends are inside quoted cells") for n in notes)
    path.write_text("\n".join([*lines_of(rows, "note"), ""]))
    assert not any("line ends" in n for n in ingest(path, noted, tmp_path / "w", secret=secret).report.notes)


def test_a_category_never_holds_a_line_end(tmp_path, contract, rows):
    """``grade`` takes what it does not know for "other": without this, swallowed rows would be one such value."""
    cells = [r[:4] + [f'"{r[4]}\n{r[4]}"'] + r[5:] if i == 3 else r for i, r in enumerate(rows)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([",".join(["patient", *COLUMNS[:5]]), *(",".join(r) for r in cells), ""]))
    with pytest.raises(DataError, match="'grade': at least 1 cells hold a line end"):
        read(path, contract)


def test_a_source_without_quotes_may_hold_line_ends(tmp_path, contract, rows):
    """It went wrong once: free text of a Parquet file, which counts as "other", was refused for a fault of CSV."""
    cells = [r[:4] + ["two\nlines"] + r[5:] if i == 3 else r for i, r in enumerate(rows)]
    names = ["patient", *COLUMNS[:5]]
    table = pa.table({n: [r[i] for r in cells] for i, n in enumerate(names)})
    pq.write_table(table, tmp_path / "t.parquet")
    raw = read(tmp_path / "t.parquet", contract)
    assert raw.tally.columns["grade"].other >= 1


@pytest.mark.parametrize(
    ("data", "words", "remedy"),
    [
        ("patient,age,job,dose,grade,y", "a header but no rows", "with its rows"),
        ("patient,age,job,dose,grade,y\n", "a header but no rows", "with its rows"),
        ("\nage,job\n1,a\n", "no readable header", "first line is empty"),
        ("age,job,dose,grade,y\n1,a,0,1,0\n".encode("utf-16-le"), "NUL characters", "utf-16-le"),
        ("age,job,dose,grade,y\n1,a,0,1,0\n".encode("utf-32-be"), "NUL characters", "as UTF-8"),
    ],
)
def test_the_remedy_fits_the_fault(tmp_path, contract, data, words, remedy):
    path = tmp_path / "t.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError, match=words) as refused:
        read(path, contract)
    assert remedy in refused.value.hint
