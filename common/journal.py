"""The append-only journal: a hash chain of signed rows, one JSON object a line.

Times never fall: where the clock was set back, a row carries the time of the row before it.

Row ``n`` holds ``{"v", "n", "owner", "at", "kind", "body", "prev", "hash", "sig"}``. ``prev`` is the hash of
row ``n - 1`` (64 zeros before the first). ``hash`` is the SHA-256 of the canonical row without ``hash`` and
``sig``. ``sig`` is the owner's Ed25519 signature of the hash. Whoever holds a later head can see every change,
removal or reordering of earlier rows. A head that is kept elsewhere shows that the last rows were cut off.

``append`` returns after fsync, so that a row that was acted upon survives a crash. A line without its end (power
cut) was never acted upon: opening drops it and records that it did. flock makes sure that there is only one writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical
from fedveil.common.errors import MALFORMED, FedveilError, IdentityError, JournalError, VerificationError
from fedveil.common.files import sync_folder
from fedveil.common.heads import MAX_ROWS, Copy, Head, hexadecimal
from fedveil.common.identity import public_hex, sign, verify

DOMAIN = "fedveil/journal/1"
GENESIS = "0" * 64
MAX_ROW_BYTES = 1 << 21  # the end of a run names the head of every site
_FIELDS = frozenset({"v", "n", "owner", "at", "kind", "body", "prev", "hash", "sig"})


@dataclass(frozen=True)
class Row:
    """One verified or just written row; ``at`` is in whole seconds since 1970 UTC."""

    n: int
    owner: str
    at: int
    kind: str
    body: dict[str, Any]
    prev: str
    hash: str
    sig: str

    def line(self) -> bytes:
        """The canonical line, with its end."""
        return canonical.dumps({"v": 1, **self.__dict__}) + b"\n"


class Unsigned(NamedTuple):
    """What a row says; ``start`` is how its canonical line begins. The journals of a simulation share one."""

    at: int
    kind: str
    body: dict[str, Any]
    start: bytes


class RowLog(Protocol):
    """One file for the rows of many journals that keep theirs in memory: how a simulation survives its process."""

    def before(self, owner: str) -> Iterable[Unsigned]:
        """The rows that ``owner`` noted earlier, in order."""
        ...

    def note(self, owner: str, row: Unsigned) -> None: ...  # noqa: D102 - keep one more


_SHARED = 4
_shared: list[Unsigned] = []  # the latest ones


def unsigned(at: int, kind: str, body: dict[str, Any]) -> Unsigned:
    """A row's content, from the latest ones where it is among them."""
    for known in _shared:
        if known.body is body and (known.at, known.kind) == (at, kind):
            return known
    row = Unsigned(at, kind, body, _start(at, body))
    _shared[:] = [row, *_shared[: _SHARED - 1]]
    return row


def _start(at: int, body: dict[str, Any]) -> bytes:
    return b'{"at":%d,"body":%s,' % (at, canonical.dumps(body))


class Journal:
    """The writer's side. Use :meth:`open`; close it, or use it as a context manager."""

    def __init__(
        self, path: Path, owner: str, key: Ed25519PrivateKey, *, durable: bool, clock: Callable[[], float]
    ) -> None:
        self.path, self.owner, self._rows = path, owner, list[Row]()
        self._key, self._durable, self._clock = key, durable, clock
        self._sync, self._log = True, cast(RowLog | None, None)
        self._fd: int | None = None
        self._pid = os.getpid()
        self._waiting: list[Unsigned] = []
        self._pending: list[bytes] = []
        self._head = Head(0, GENESIS)
        self._at: int | None = None
        self.failed: JournalError | None = None  # set once a row could not be written: nothing more will be

    @classmethod
    def open(
        cls,
        path: Path,
        owner: str,
        key: Ed25519PrivateKey,
        *,
        durable: bool = True,
        sync: bool = True,
        log: RowLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Journal:
        """Open or create ``path``. Every row is verified. An unfinished last line is dropped, and that is recorded.

        Args:
            durable: False keeps new rows in memory until :meth:`flush`, without fsync, lock or open file, and lets
                :meth:`add` sign them later. That is for the simulator, where nothing real is protected.
            sync: False writes every row at once, but does not wait for the disk: it survives the process, not a power
                cut. For the simulator too.
            log: keeps the new rows of a journal that is not durable. ``path`` is not read then: the rows come from it.

        Raises:
            JournalError: the file is in use, or not this owner's, or altered.
        """
        self = cls(path, owner, key, durable=durable, clock=clock)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sync = sync
        if log is not None:
            for row in log.before(owner):
                self._append(row)
            self._log = log
            return self
        if not durable:
            if torn := self._load(path.read_bytes() if path.exists() else b""):
                os.truncate(path, path.stat().st_size - torn)
                self.append("journal.repaired", {"dropped_bytes": torn})
            return self
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._lock()
            torn = self._load(_read_all(self._fd))
            if torn:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - torn)
                self.append("journal.repaired", {"dropped_bytes": torn})
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise
        return self

    def append(self, kind: str, body: dict[str, Any]) -> Row:
        """Sign and write one row; it is on disk when this returns (if durable)."""
        self._sign_waiting()
        row = unsigned(self._now(), kind, body)
        if self._log is not None:
            self._log.note(self.owner, row)
        return self._append(row)

    def add(self, kind: str, body: dict[str, Any]) -> None:
        """As :meth:`append`, for a row that nobody looks at yet. A journal that is not durable signs it when somebody
        does. ``body`` is not written to any more: the journals of a simulation share it.
        """
        row = unsigned(self._now(), kind, body)
        if self._durable:
            self._append(row)
            return
        if self._log is not None:
            self._log.note(self.owner, row)
        self._waiting.append(row)

    def _now(self) -> int:
        return int(self._clock()) if self._at is None else self._at

    def _sign_waiting(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for row in waiting:
                self._append(row)

    def _append(self, row_: Unsigned) -> Row:
        head, kind, at, start = self._head, row_.kind, row_.at, row_.start
        if head.rows >= MAX_ROWS:
            raise JournalError(f"{self.path} is full", hint=f"a journal holds at most {MAX_ROWS} rows")
        if self._rows and self._rows[-1].at > at:
            at = self._rows[-1].at
            start = _start(at, row_.body)
        rest = canonical.dumps({"kind": kind, "n": head.rows, "owner": self.owner, "prev": head.hash, "v": 1})[1:]
        digest = hashlib.sha256(start + rest).hexdigest()
        signature = sign(self._key, DOMAIN, digest.encode()).hex()
        row = Row(head.rows, self.owner, at, kind, row_.body, head.hash, digest, signature)
        # The canonical line, put together: its keys in order are those above with "hash" and "sig" between them.
        line = b'%s"hash":"%s",%s"sig":"%s","v":1}\n' % (start, digest.encode(), rest[:-6], signature.encode())
        if len(line) > MAX_ROW_BYTES:
            raise JournalError(f"a row of {len(line)} bytes is over the limit of {MAX_ROW_BYTES}")
        if self._durable:
            if self._fd is None:
                raise JournalError(f"{self.path} is closed")
            if os.getpid() != self._pid:
                raise JournalError(
                    f"{self.path} was opened by another process",
                    hint="open a journal in the process that writes to it, after the fork",
                )
            try:
                _write_all(self._fd, line)
                if self._sync:
                    os.fsync(self._fd)
            except OSError as e:
                # What reached the disk is unknown: this writer stops here, and the next one repairs the tail.
                self.close()
                self.failed = JournalError(f"{self.path} could not be written: {e.strerror}", hint="free disk space")
                raise self.failed from e
        else:
            self._pending.append(line)
        self._rows.append(row)
        self._head = Head(row.n + 1, digest)
        return row

    @property
    def rows(self) -> list[Row]:
        """Every row, in order."""
        self._sign_waiting()
        return self._rows

    @property
    def length(self) -> int:
        """How many rows there are."""
        return self._head.rows + len(self._waiting)

    @property
    def head(self) -> Head:
        """Row count and last hash."""
        self._sign_waiting()
        return self._head

    def copy(self, data_set: str) -> Copy:
        """The head for others to keep, signed; the journal must have a row."""
        return Copy(self.head, self.rows[0].hash, data_set).by(self.owner, self._key)

    @property
    def ahead(self) -> float:
        """Seconds by which the last row is dated later than this machine's clock; 0 where it is not."""
        return max(0.0, self.rows[-1].at - self._clock()) if self.rows else 0.0

    def of_kind(self, *kinds: str) -> Iterator[Row]:
        """The rows whose kind is one of ``kinds``, in order."""
        return (r for r in self.rows if r.kind in kinds)

    @contextmanager
    def dated(self) -> Iterator[None]:
        """Rows written in this block carry the time of its start, so they do not say how long the work took."""
        before, self._at = self._at, int(self._clock())
        try:
            yield
        finally:
            self._at = before

    def flush(self) -> None:
        """Write what a non-durable journal holds back."""
        self._sign_waiting()
        if self._pending:
            pending, self._pending = self._pending, []
            try:
                with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as f:
                    f.writelines(pending)
            except OSError as e:
                raise JournalError(f"{self.path} could not be written: {e.strerror}", hint="free disk space") from e

    def close(self) -> None:
        """Flush and release the lock."""
        self.flush()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        if self._fd is None:
            raise JournalError(f"{self.path} is closed")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise JournalError(
                f"{self.path} is in use by another process",
                hint="stop that process first: only one at a time may write to a journal",
            ) from e

    def _load(self, data: bytes) -> int:
        """Verify the complete lines into ``rows``; returns the length of a torn last line."""
        try:
            whole = without_torn_end(data)
            self._rows = verify_rows(parse(whole), public_hex(self._key), owner=self.owner)
        except FedveilError as e:
            raise JournalError(f"{self.path}: {e.message}", hint="keep the file as evidence; do not edit it") from e
        if self._rows:
            self._head = Head(len(self._rows), self._rows[-1].hash)
        return len(data) - len(whole)


def parse(data: bytes) -> list[Row]:
    """Rows of a journal file, shapes checked, nothing verified yet."""
    lines = data.split(b"\n")
    if lines.pop():
        raise VerificationError(f"row {len(lines)} has no end of line: the journal is cut")
    if len(lines) > MAX_ROWS:
        raise VerificationError(f"a journal of {len(lines)} rows is over the limit of {MAX_ROWS}")
    return [_row(i, line) for i, line in enumerate(lines)]


def verify_rows(rows: list[Row], public: str, *, owner: str) -> list[Row]:
    """Check numbering, owner, chain and every signature; :class:`VerificationError` names the first bad row."""
    prev = GENESIS
    for i, r in enumerate(rows):
        if r.n != i:
            raise VerificationError(f"row {i} is numbered {r.n}: a row is missing or moved")
        if r.owner != owner:
            raise VerificationError(f"row {i} belongs to {r.owner[:64]!r}, not to {owner!r}")
        if r.prev != prev:
            raise VerificationError(f"row {i} does not follow row {i - 1}: the chain is broken")
        core = {"v": 1, "n": r.n, "owner": r.owner, "at": r.at, "kind": r.kind, "body": r.body, "prev": r.prev}
        if canonical.digest(core) != r.hash:
            raise VerificationError(f"row {i} was changed: its hash differs")
        try:
            verify(public, DOMAIN, r.hash.encode(), bytes.fromhex(r.sig), what=f"row {i}")
        except (IdentityError, ValueError) as e:
            raise VerificationError(f"row {i} is not signed by {owner!r}") from e
        prev = r.hash
    return rows


def _row(i: int, line: bytes) -> Row:
    try:
        if len(line) > MAX_ROW_BYTES:
            raise ValueError
        d = canonical.loads(line)
        if set(d) != _FIELDS or d.pop("v") != 1 or canonical.dumps({"v": 1, **d}) != line:
            raise ValueError
        for name, kind in (("n", int), ("at", int), ("owner", str), ("kind", str), ("body", dict)):
            if type(d[name]) is not kind:
                raise ValueError
        for name, length in (("prev", 64), ("hash", 64), ("sig", 128)):
            # lower case only: otherwise a signature could be written in many ways
            if not hexadecimal(d[name], length):
                raise ValueError
    except (*MALFORMED, FedveilError) as e:
        raise VerificationError(f"row {i} is not a well-formed journal row") from e
    return Row(**d)


def without_torn_end(data: bytes) -> bytes:
    """A journal's complete lines. An unfinished last row (power cut) is left out, as its owner's next start drops it.

    Raises:
        VerificationError: the bytes after the last line are more than an interrupted write can leave.
    """
    end = data.rfind(b"\n") + 1
    if _is_more_than_a_row(data[end:]):
        raise VerificationError("the last row's end was changed")
    return data[:end]


def _is_more_than_a_row(tail: bytes) -> bool:
    """Whether an unfinished line holds a whole row and something after it. An interrupted write cannot leave that."""
    text = tail.decode(errors="replace")
    try:
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except (ValueError, RecursionError):
        return False


def _read_all(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as f:
        f.seek(0)
        return f.read()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
