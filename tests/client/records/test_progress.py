"""How far reading has come: rows of every source, bytes of a CSV file, and the bar that a terminal shows."""

import io
import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.client.records.judge.profile import profile
from fedveil.client.records.read import files
from fedveil.client.records.read.sources import Rules, read
from fedveil.deploy.cli import data_source

pytestmark = pytest.mark.filterwarnings("error")


def long_csv(path, contract, rows=60_000):
    """Larger than a block, so that reading takes several."""
    names = [c.name for c in contract.columns]
    line = lambda i: f"p{i:06},{i % 100},{'abc'[i % 3]},1.5,{1 + i % 2},{i % 10}\n"  # noqa: E731
    path.write_text(",".join(names) + "\n" + "".join(line(i) for i in range(rows)))
    return rows, path.stat().st_size


def test_rows_and_bytes_of_a_csv_grow_to_the_whole(contract, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "t.csv"
    rows, size = long_csv(path, contract)
    seen = []
    read(path, contract, rules=Rules(progress=lambda *now: seen.append(now)))
    assert len(seen) > 5
    assert seen[-1] == (rows, size)
    for (r, b), (r2, b2) in itertools.pairwise(seen):
        assert r < r2
        assert b <= b2
    # Within a block or two of the rows' own share, although the reader is far ahead of them.
    assert all(abs(b / size - r / rows) * size < 2 * files.BLOCK_BYTES for r, b in seen)
    again = []
    profile(path, progress=lambda *now: again.append(now))
    assert again[-1] == (rows, size)


def test_other_encodings_count_the_files_own_bytes(contract, tmp_path, rows):
    path = tmp_path / "t.csv"
    text = "\n".join([",".join(c.name for c in contract.columns), *map(",".join, rows), ""])
    path.write_bytes(text.encode("utf-16"))
    seen = []
    assert read(path, contract, rules=Rules(progress=lambda *now: seen.append(now))).rows == len(rows)
    assert seen[-1] == (len(rows), path.stat().st_size)


def test_parquet_counts_rows(contract, tmp_path, rows):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({c.name: [r[i] for r in rows] for i, c in enumerate(contract.columns)}), path)
    seen = []
    read(path, contract, rules=Rules(progress=lambda *now: seen.append(now)))
    assert seen[-1] == (len(rows), 0)
    assert data_source.total_of(path) == (len(rows), False)


def test_totals(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    (tmp_path / "t.parquet").write_text("no parquet")
    assert data_source.total_of(tmp_path / "t.csv") == (8, True)
    for unknown in (tmp_path / "t.parquet", tmp_path / "absent.csv", tmp_path / "t.ndjson", "a query"):
        assert data_source.total_of(unknown) == (None, False)


def test_the_bar_shows_the_share_of_the_file(tmp_path, monkeypatch):
    import rich.console

    screen = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **_: real(file=screen, force_terminal=True, width=100, color_system=None)
    )
    (tmp_path / "t.csv").write_bytes(b"x" * 1000)
    with data_source.progress_of(tmp_path / "t.csv") as progress:
        progress(1234, 250)
    shown = screen.getvalue()
    assert "25%" in shown
    assert "1,234 rows" in shown


@pytest.mark.parametrize("block", [1 << 12, 5000, 1 << 14, 1 << 20])
@pytest.mark.parametrize("tail", ["", "\n" * 10_000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_end_is_the_whole_file(contract, tmp_path, monkeypatch, block, tail, encoding):
    """Of a file in another encoding the reader gives fewer batches than it reads blocks."""
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    path = tmp_path / "t.csv"
    rows, _ = long_csv(path, contract, 2000)
    path.write_bytes((path.read_text() + tail).encode(encoding))
    seen = []
    read(path, contract, rules=Rules(progress=lambda *now: seen.append(now)))
    assert seen[-1] == (rows, path.stat().st_size)
    assert [b for _, b in seen] == sorted(b for _, b in seen)
