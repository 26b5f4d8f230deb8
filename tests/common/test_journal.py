"""The journal: what was written is read back, what was changed is seen, a crash loses only what never counted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedveil.common import canonical, journal
from fedveil.common.errors import JournalError, VerificationError
from fedveil.common.identity import new_signing_key, public_hex, sign
from fedveil.common.journal import DOMAIN, GENESIS, Copy, Head, Journal, Row, parse, verify_rows

KEY = new_signing_key()
PUBLIC = public_hex(KEY)


def clock() -> float:
    return 1_700_000_000.9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "ledger.jsonl"


def write(path: Path, rows: int = 3) -> bytes:
    with Journal.open(path, "site-a", KEY, clock=clock) as j:
        for i in range(rows):
            j.append("note", {"i": i, "text": "é€"})
    return path.read_bytes()


def check(data: bytes) -> list[Row]:
    return verify_rows(parse(data), PUBLIC, owner="site-a")


def forged(row: Row, **changes: object) -> Row:
    """``row`` with changes, its hash made right again, signed by another key."""
    core = {"v": 1} | {k: v for k, v in row.__dict__.items() if k not in ("hash", "sig")} | changes
    digest = canonical.digest(core)
    return Row(
        **{**row.__dict__, **changes, "hash": digest, "sig": sign(new_signing_key(), DOMAIN, digest.encode()).hex()}
    )


def test_what_is_written_is_read_back(path: Path) -> None:
    data = write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    rows = check(data)
    assert [r.body["i"] for r in rows] == [0, 1, 2]
    assert [r.at for r in rows] == [1_700_000_000] * 3
    assert rows[0].prev == GENESIS
    assert b"".join(r.line() for r in rows) == data
    with Journal.open(path, "site-a", KEY) as j:
        assert j.rows == rows
        assert j.head == Head(3, rows[-1].hash)
        assert [r.n for r in j.of_kind("note", "other")] == [0, 1, 2]
        assert j.append("other", {}).prev == rows[-1].hash
    assert len(check(path.read_bytes())) == 4
    assert check(b"") == []


def test_every_single_changed_byte_is_seen(path: Path) -> None:
    """All 8 flips of every byte, through the auditor's way and the site's own."""
    data = write(path, 2)
    for at in range(len(data)):
        for bit in range(8):
            spoilt = bytearray(data)
            spoilt[at] ^= 1 << bit
            with pytest.raises(VerificationError):
                check(bytes(spoilt))
    for at in range(0, len(data), 1):
        spoilt = bytearray(data)
        spoilt[at] ^= 0x20  # also turns a hexadecimal digit into its capital
        path.write_bytes(bytes(spoilt))
        with pytest.raises(JournalError):
            Journal.open(path, "site-a", KEY)
        assert path.read_bytes() == bytes(spoilt)  # kept as evidence


def test_rows_taken_out_moved_or_doubled(path: Path) -> None:
    lines = write(path, 5).splitlines(keepends=True)
    a, b, c, d, e = lines
    for spoilt in (
        [b, c, d, e],
        [a, c, d, e],
        [a, b, d, c, e],
        [a, b, b, c, d, e],
        [a, b, c, d, e, e],
        [e, d, c, b, a],
    ):
        with pytest.raises(VerificationError):
            check(b"".join(spoilt))
    assert len(check(b"".join([a, b, c]))) == 3  # a cut tail shows against a head kept elsewhere, and only there
    for spoilt in (b"\n", a + b"\n" + b, b"".join(lines) + b"\n", b"{}\n", b"[]\n", b"1\n", b"null\n", b"\xff\n"):
        with pytest.raises(VerificationError):
            check(spoilt)


def test_a_second_spelling_of_a_row_is_no_row(path: Path) -> None:
    line = write(path, 1).rstrip(b"\n")
    row = canonical.loads(line)
    for spoilt in (
        line.replace(b'"kind":', b'"kind": '), line.replace(row["sig"].encode(), row["sig"].upper().encode()),
        line.replace("é".encode(), b"\\u00e9"), line.replace(b'"n":0', b'"n":-0'), line.replace(b'"n":0', b'"n":0.0'),
        line.replace(b'"v":1', b'"v":true'), line.replace(b'"n":0', b'"n":0,"n":0'), line + b" ", b" " + line,
        line[:-1] + b',"x":1}',
    ):  # fmt: skip
        assert spoilt != line
        with pytest.raises(VerificationError):
            check(spoilt + b"\n")


def test_a_forged_signature_is_refused(path: Path) -> None:
    write(path)
    rows = check(path.read_bytes())
    other = new_signing_key()
    for spoilt in (
        [rows[0], forged(rows[1]), rows[2]],
        [rows[0], rows[1], forged(rows[2], body={"i": 99})],
        [Row(**{**r.__dict__, "sig": "0" * 128}) for r in rows],
        [Row(**{**r.__dict__, "sig": sign(KEY, "fedveil/other/1", r.hash.encode()).hex()}) for r in rows],
    ):
        with pytest.raises(VerificationError, match="signed|changed|chain"):
            verify_rows(parse(b"".join(r.line() for r in spoilt)), PUBLIC, owner="site-a")
    with pytest.raises(VerificationError, match="row 0 is not signed"):
        verify_rows(rows, public_hex(other), owner="site-a")
    with pytest.raises(VerificationError, match="belongs to"):
        verify_rows(rows, PUBLIC, owner="site-b")


@pytest.mark.parametrize(("owner", "key"), [("site-b", KEY), ("site-a", new_signing_key())])
def test_another_sites_journal_is_not_continued(path: Path, owner, key) -> None:
    data = write(path)
    with pytest.raises(JournalError, match="evidence"):
        Journal.open(path, owner, key)
    assert path.read_bytes() == data


@pytest.mark.parametrize("durable", [True, False])
def test_a_torn_tail_is_dropped_and_recorded_at_every_cut(path: Path, durable) -> None:
    data = write(path, 2)
    ends = [0] + [i + 1 for i, b in enumerate(data) if b == 10]
    near = {e + i for e in ends for i in range(-3, 4)}
    # without fsync at every position; with it, which takes its time, around the ends of rows and at every ninth
    for cut in (c for c in range(len(data) + 1) if not durable or c in near or c % 9 == 0):
        path.write_bytes(data[:cut])
        whole = max(e for e in ends if e <= cut)
        with Journal.open(path, "site-a", KEY, durable=durable) as j:
            rows = ends.index(whole)
            if cut == whole:
                assert j.head.rows == rows
            else:
                assert j.head.rows == rows + 1
                assert (j.rows[-1].kind, j.rows[-1].body) == ("journal.repaired", {"dropped_bytes": cut - whole})
            j.append("after", {})
        after = check(path.read_bytes())
        assert after[-1].kind == "after"
        assert path.read_bytes().startswith(data[:whole])


def test_a_lost_end_of_line_is_no_torn_tail_if_something_else_stands_there(path: Path) -> None:
    """A write that was cut short is a prefix; a row with anything behind it was changed, and its charge must not go."""
    data = write(path, 2)
    for wrong in (b"x", b" ", b"\x00", b"\r", b"\x8a", b"{}", b"\x00" * 512):
        path.write_bytes(data[:-1] + wrong)
        with pytest.raises(JournalError, match="end was changed"):
            Journal.open(path, "site-a", KEY)


def test_one_writer_at_a_time(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedveil.common import identity\n"
        "from fedveil.common.journal import Journal\n"
        "from fedveil.common.errors import JournalError\n"
        "try: Journal.open(Path(sys.argv[1]), 'site-a', identity.new_signing_key())\n"
        "except JournalError as e: print(e.message)"
    )
    with Journal.open(path, "site-a", KEY) as j:
        with pytest.raises(JournalError, match="in use"):
            Journal.open(path, "site-a", KEY)
        out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert "in use by another process" in out.stdout
        j.append("note", {})
    Journal.open(path, "site-a", KEY).close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_cannot_write(path: Path) -> None:
    """The child inherits the lock; two writers would charge the same row twice."""
    with Journal.open(path, "site-a", KEY) as j:
        pid = os.fork()
        if pid == 0:
            try:
                j.append("note", {"from": "child"})
                os._exit(1)
            except JournalError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        j.append("note", {"from": "parent"})
    assert [r.body["from"] for r in check(path.read_bytes())] == ["parent"]


def full(part: int) -> Callable[[int, bytes], int]:
    """A disk that takes ``part`` more bytes."""
    real, left = os.write, [part]

    def write(fd: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, bytes(data)[: left[0]])
        left[0] -= written
        return written

    return write


@pytest.mark.parametrize("part", [0, 1, 100, 300])
def test_a_full_disk(path: Path, monkeypatch, part) -> None:
    write(path, 2)
    j = Journal.open(path, "site-a", KEY)
    with monkeypatch.context() as m:
        m.setattr(journal.os, "write", full(part))
        with pytest.raises(JournalError, match="No space left") as e:
            j.append("note", {"i": 2})
    assert e.value.hint == "free disk space"
    assert j.head.rows == 2
    with pytest.raises(JournalError, match="closed"):  # what reached the disk is unknown: this writer is done
        j.append("note", {"i": 3})
    with Journal.open(path, "site-a", KEY) as again:
        assert [r.kind for r in again.rows] == ["note"] * 2 + (["journal.repaired"] if part else [])


def test_a_disk_that_fails_to_sync(path: Path, monkeypatch) -> None:
    """The row may be there afterwards: then it counts."""
    j = Journal.open(path, "site-a", KEY)
    with monkeypatch.context() as m:
        m.setattr(journal.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(JournalError, match="Input/output"):
            j.append("note", {"i": 0})
    with Journal.open(path, "site-a", KEY) as again:
        assert [r.body for r in again.rows] == [{"i": 0}]


def test_append_is_on_disk_when_it_returns(path: Path, monkeypatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(journal.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd))[1])
    with Journal.open(path, "site-a", KEY) as j:
        for _ in range(3):
            line = len(j.append("note", {}).line())
            assert synced[-1] == path.stat().st_size
            assert synced[-1] % line == 0


def test_rows_have_bounds(path: Path, monkeypatch) -> None:
    with Journal.open(path, "site-a", KEY) as j:
        with pytest.raises(JournalError, match="over the limit"):
            j.append("note", {"x": "y" * journal.MAX_ROW_BYTES})
        j.append("note", {})  # nothing of it reached the file
        monkeypatch.setattr(journal, "MAX_ROWS", 1)
        with pytest.raises(JournalError, match="full"):
            j.append("note", {})
    data = path.read_bytes()
    assert len(check(data)) == 1
    with pytest.raises(VerificationError, match="over the limit"):
        parse(data * 2)
    with pytest.raises(VerificationError, match="well-formed"):
        parse(b'{"x":"' + b"y" * journal.MAX_ROW_BYTES + b'"}\n')


def test_without_durability_the_same_rows_are_written_at_the_end(path: Path, tmp_path: Path) -> None:
    durable = write(path, 4)
    other = tmp_path / "simulated.jsonl"
    with Journal.open(other, "site-a", KEY, durable=False, clock=clock) as j:
        for i in range(4):
            j.append("note", {"i": i, "text": "é€"})
        assert not other.exists()
        with Journal.open(other, "site-a", KEY, durable=False, clock=clock) as second:  # no lock
            assert second.rows == []
    assert other.read_bytes() == durable
    assert other.stat().st_mode & 0o777 == 0o600
    with Journal.open(other, "site-a", KEY, durable=False, clock=clock) as j:
        j.append("more", {})
        j.flush()
        j.flush()
    assert [r.kind for r in check(other.read_bytes())] == ["note"] * 4 + ["more"]


class Shared:
    """A log in memory: what :class:`~fedveil.common.journal.RowLog` promises, and nothing more."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, journal.Unsigned]] = []

    def before(self, owner: str) -> list[journal.Unsigned]:
        return [row for name, row in self.rows if name == owner]

    def note(self, owner: str, row: journal.Unsigned) -> None:
        self.rows.append((owner, row))


def test_a_journal_comes_back_from_a_log_byte_by_byte(path: Path, tmp_path: Path) -> None:
    now = [1000.0]
    log, expected = Shared(), tmp_path / "expected.jsonl"
    for target, kept in ((expected, None), (path, log)):
        now[0] = 1000.0
        j = Journal.open(target, "site-a", KEY, durable=False, log=kept, clock=lambda: now[0])
        j.append("first", {"i": 0})
        j.add("later", {"i": 1})
        now[0] = 900.0  # the clock was set back
        j.add("later", {"i": 2})
        j.append("last", {"x": 0.1})
        if kept is None:
            j.close()  # the other one's process is killed here: nothing is written by it
    assert not path.exists()
    assert [r.kind for _, r in log.rows] == ["first", "later", "later", "last"]
    with Journal.open(path, "site-a", KEY, durable=False, log=log, clock=lambda: now[0]) as again:
        assert len(log.rows) == 4  # what comes from the log is not noted again
        again.append("more", {})
    assert len(log.rows) == 5
    data = path.read_bytes()
    assert data.startswith(expected.read_bytes())
    assert len(check(data)) == 5


def test_a_journal_that_does_not_wait_for_the_disk_is_written_and_locked(path: Path, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(journal.os, "fsync", synced.append)
    with Journal.open(path, "site-a", KEY, sync=False) as j:
        j.append("note", {"i": 1})
        assert len(check(path.read_bytes())) == 1  # there although nothing was flushed or closed
        with pytest.raises(JournalError, match="in use"):
            Journal.open(path, "site-a", KEY)
    before = len(synced)
    with Journal.open(path, "site-a", KEY) as j:  # negative control
        j.append("note", {"i": 2})
    assert len(synced) > before + 1


def test_a_simulation_that_cannot_write_says_so(tmp_path: Path) -> None:
    j = Journal.open(tmp_path / "x" / "ledger", "site-a", KEY, durable=False)
    j.append("note", {})
    (tmp_path / "x").rmdir()
    with pytest.raises(JournalError, match="could not be written"):
        j.close()


def test_times_never_fall_where_the_clock_was_set_back(tmp_path: Path) -> None:
    now = [1000.0]
    with Journal.open(tmp_path / "j", "a", KEY, clock=lambda: now[0]) as journal:
        for now[0] in (1000.0, 990.0, 1001.9, 5.0):
            journal.append("x", {})
        assert journal.ahead == 996.0
        with journal.dated():
            journal.append("x", {})
    with Journal.open(tmp_path / "j", "a", KEY, clock=lambda: 3.0) as journal:
        assert journal.append("x", {}).at == 1001
        assert [r.at for r in journal.rows] == [1000, 1000, 1001, 1001, 1001, 1001]


def test_a_copy_of_a_head_is_its_owners_word_and_nobody_elses(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", "a", KEY) as journal:
        journal.append("x", {})
        copy = journal.copy("d" * 64)
    public = public_hex(KEY)
    assert Copy.from_json(copy.to_json()) == copy
    assert copy.signed_by("a", public)
    assert not copy.signed_by("b", public)
    assert not copy.signed_by("a", public_hex(new_signing_key()))
    for other in (
        copy._replace(head=Head(2, copy.head.hash)), copy._replace(head=Head(1, "e" * 64)),
        copy._replace(ledger="e" * 64), copy._replace(data_set="e" * 64), copy._replace(signature=""),
        copy._replace(signature="ab" * 64), copy._replace(signature=journal.rows[0].sig),
    ):  # fmt: skip
        assert not other.signed_by("a", public)
