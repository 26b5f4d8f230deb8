"""A run's folder as an auditor receives it: files of bounded size, read once, not yet verified."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields, identity, merkle
from fedveil.common.errors import IdentityError, JournalError, VerificationError, WireError
from fedveil.common.identity import Roster
from fedveil.common.journal import Row, parse, verify_rows
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import results

PLAN, ROSTER, JOINS, CONTRACT = "plan.json", "roster.json", "joins.json", "contract.json"
PIN, JOURNAL, JOURNALS, METRICS, REPORT = "consortium.pub", "journal.jsonl", "journals", "metrics.jsonl", "report.json"
MODEL = "model.f32"  # the final weights, float32 little-endian; may be left out of what an auditor gets
MAX_METRIC_ROWS = 1 << 20
SIMULATED_KEY = "signing.SIMULATED.key"  # the server's, of a simulated run; a real one never lies in a run's folder
_REQUIRED = (PLAN, ROSTER, JOINS, PIN, JOURNAL)
_OPTIONAL = (CONTRACT, METRICS, results.AUDIT)
_LIMITS = {
    PLAN: 1 << 20,
    ROSTER: 1 << 22,
    JOINS: 1 << 25,
    CONTRACT: 1 << 23,
    PIN: 256,
    JOURNAL: 1 << 28,
    METRICS: 1 << 27,
    results.AUDIT: results.LIMIT,
}
_SITE_LIMIT = 1 << 28
_TOTAL_LIMIT = 1 << 31


@dataclass(frozen=True)
class Bundle:
    """The raw files of one run.

    Attributes:
        folder: where they were read.
        files: bytes by name relative to ``folder``; the sites' journals are ``journals/<site>.jsonl``.
    """

    folder: Path
    files: Mapping[str, bytes]

    def json(self, name: str) -> Any:
        """The JSON value of a file.

        Raises:
            VerificationError: it is missing or malformed.
        """
        if name not in self.files:
            raise VerificationError(f"{name} is missing")
        try:
            return canonical.loads(self.files[name], limit=_LIMITS[name])
        except WireError as e:
            raise VerificationError(f"{name}: {e.message}") from e

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of every file."""
        return {name: canonical.sha256_hex(data) for name, data in sorted(self.files.items())}

    @property
    def roots(self) -> dict[str, str]:
        """Merkle root (hex) of every journal, by owner: the leaves are its lines, without their ends."""
        named = {JOURNAL: "server"} | {n: Path(n).stem for n in self.files if n.startswith(f"{JOURNALS}/")}
        return {who: merkle.root(lines(self.files[name])).hex() for name, who in named.items()}

    def audit(self, plan: PrivacyPlan) -> dict[str, Any] | None:
        """The empirical audit's results that lie in the folder, checked against ``plan``; None if there are none."""
        data = self.files.get(results.AUDIT)
        return None if data is None else results.held_against(data, plan).to_json()

    @property
    def pin(self) -> str:
        """The consortium's public key as the server had it."""
        try:
            value = self.files[PIN].decode("ascii").strip()
        except UnicodeDecodeError as e:
            raise VerificationError(f"{PIN} is not text") from e
        return fields.hexadecimal({PIN: value}, PIN, "the consortium's key")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, shapes checked; none if the file is absent."""
        lines = self.files.get(METRICS, b"").split(b"\n")
        if lines.pop():
            raise VerificationError(f"{METRICS} has no end of line: it is cut")
        if len(lines) > MAX_METRIC_ROWS:
            raise VerificationError(f"{METRICS} has more than {MAX_METRIC_ROWS} rows")
        return [_metric_row(i, line) for i, line in enumerate(lines)]

    def server_rows(self, roster: Roster) -> list[Row]:
        """The server's journal, chain and signatures verified."""
        return self._rows(JOURNAL, roster.server.signing_key, "server")

    def site_rows(self, roster: Roster, site: str) -> list[Row]:
        """The ledger of ``site``, chain and signatures verified."""
        return self._rows(journal_name(site), roster.member(site).signing_key, site)

    def _rows(self, name: str, public: str, owner: str) -> list[Row]:
        if name not in self.files:
            raise VerificationError(f"{name} is missing")
        try:
            rows = verify_rows(parse(self.files[name]), public, owner=owner)
        except (VerificationError, JournalError, IdentityError) as e:
            raise VerificationError(f"{name}: {e.message}") from e
        for r in rows:
            # bytes.fromhex takes either case: without this, one byte of a signature could be changed unseen.
            if r.sig != r.sig.lower():
                raise VerificationError(f"{name}: row {r.n} was changed: its signature is not in lower case")
        return rows


def journal_name(site: str) -> str:
    """The file of a site's ledger, relative to the run's folder."""
    return f"{JOURNALS}/{site}.jsonl"


def lines(data: bytes) -> list[bytes]:
    """The complete lines of a journal's file: the leaves of its Merkle tree."""
    return data.split(b"\n")[:-1]


def read(run: Path) -> Bundle:
    """Read a run's folder.

    Raises:
        VerificationError: a file is missing, not a plain file, or over its limit; or a journal is a stranger's.
    """
    files = {name: read_bounded(run / name, _LIMITS[name]) for name in _REQUIRED}
    files |= {name: read_bounded(run / name, _LIMITS[name]) for name in _OPTIONAL if (run / name).exists()}
    total = sum(map(len, files.values()))
    folder = run / JOURNALS
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix != ".jsonl":
            raise VerificationError(f"{JOURNALS} holds a file that is not a site's journal")
        data = read_bounded(path, _SITE_LIMIT)
        total += len(data)
        if total > _TOTAL_LIMIT:
            raise VerificationError(f"the files together are over the limit of {_TOTAL_LIMIT} bytes")
        files[f"{JOURNALS}/{path.name}"] = data
    return Bundle(run, files)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most ``limit`` bytes; everything else is a :class:`VerificationError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise VerificationError(f"{path.name} is not a plain file")
        with path.open("rb") as f:
            data = f.read(limit + 1)
    except FileNotFoundError as e:
        raise VerificationError(
            f"{path.name} is missing", hint="a report is checked beside the files of its run"
        ) from e
    except OSError as e:
        raise VerificationError(f"{path.name} cannot be read: {e.strerror}") from e
    if len(data) > limit:
        raise VerificationError(f"{path.name} is over the limit of {limit} bytes")
    return data


def file_digest(path: Path) -> str | None:
    """SHA-256 (hex) of a plain file of any size, read in pieces; None if there is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise VerificationError(f"{path.name} is not a plain file")
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise VerificationError(f"{path.name} cannot be read: {e.strerror}") from e


def open_roster(bundle: Bundle, consortium_key: str) -> Roster:
    """The roster, once the consortium's signature holds and no journal is of a site outside it."""
    try:
        roster = identity.open_roster(bundle.json(ROSTER), consortium_key)
    except (IdentityError, WireError) as e:
        raise VerificationError(f"{ROSTER}: {e.message}") from e
    known = {journal_name(m.site) for m in roster.sites}
    for name in bundle.files:
        if name.startswith(f"{JOURNALS}/") and name not in known:
            raise VerificationError(f"{name[:128]!r} is the journal of a site that is not on the roster")
    return roster


def _metric_row(i: int, line: bytes) -> dict[str, Any]:
    where = f"{METRICS} row {i}"
    try:
        row = fields.mapping(canonical.loads(line, limit=1 << 20), where)
    except WireError as e:
        raise VerificationError(f"{where}: {e.message}") from e
    out: dict[str, Any] = {
        "round": fields.integer(row, "round", where, low=1, high=1 << 20),
        "epsilon_opened": fields.number(row, "epsilon_opened", where, high=1e6),
        "metrics": fields.metrics(row.get("metrics", {}), where),
    }
    for key in ("bytes_sent", "bytes_received", "seconds"):
        out[key] = fields.number(row, key, where) if key in row else None
    return out
