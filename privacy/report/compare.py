"""Compares two parties' copies of journals: it finds a fork, a rewritten row, a tail that was cut.

Each side is a journal's file, a site's ``peers.json`` (the newest signed heads it has seen), or a run's folder. The
first side was held earlier, the second is shown now: it may have more rows, but never fewer or other ones.

A site may own several ledgers, and a ``peers.json`` holds the heads of several: the first row's hash tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields
from fedveil.common.errors import FedveilError, UsageError, VerificationError, WireError
from fedveil.common.journal import GENESIS, Row, parse, verify_rows
from fedveil.privacy.joining import heads_of
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report import claims
from fedveil.privacy.report.bundle import JOURNAL, JOURNALS, REPORT

SAME, CONTINUES, UNKNOWN = "same", "continues", "not comparable"
CUT, FORKED, REWRITTEN, REPLACED, ALTERED = "cut", "forked", "rewritten", "replaced", "altered"
BAD = frozenset({CUT, FORKED, REWRITTEN, REPLACED, ALTERED})
_LIMIT, _PEERS_LIMIT = 1 << 28, 1 << 23


@dataclass(frozen=True)
class Story:
    """One side's knowledge of a journal: its head, and every row's hash where the rows are at hand.

    Attributes:
        ledger: hash of the first row (which journal it is); empty for an empty one.
        fault: the first row that breaks the copy's own chain or signatures, and how; None if none does.
        signed: whether signatures were checked, for which the owner's key is needed; None without rows to check.
    """

    rows: int
    hash: str
    ledger: str
    hashes: tuple[str, ...] | None = None
    fault: tuple[int, str] | None = None
    signed: bool | None = None


@dataclass(frozen=True)
class Finding:
    """The result of comparing two stories of one journal.

    Attributes:
        verdict: ``same`` or ``continues`` (the second side only adds rows), ``not comparable`` (two heads alone), or
            what is wrong: ``cut``, ``forked`` (two consistent copies with other rows at one place: the owner told two
            stories), ``rewritten`` (a row that was seen before is not there), ``replaced`` (another journal under the
            same name), ``altered`` (a copy that breaks its own chain or signatures).
        row: the first row concerned, counted from 0; None where no single row is.
        signatures: False if the rows' signatures were not checked, on one side or both: no key was at hand. Chains of
            hashes alone show that copies differ, not who wrote them. None where there were no rows to check.
    """

    owner: str
    verdict: str
    row: int | None
    detail: str
    signatures: bool | None = None

    @property
    def bad(self) -> bool:
        """Something is wrong."""
        return self.verdict in BAD


def compare(held: Path, shown: Path, public: str | None = None) -> list[Finding]:
    """Compare what was known earlier with what is shown now, journal by journal.

    Args:
        public: the owner's key for the rows of a single journal's file; a folder's roster gives the keys of its own.

    Raises:
        UsageError: a side is none of the known kinds, or both speak of no journal in common.
        VerificationError: a folder or report of a run is malformed.
    """
    key = None if public is None else fields.public_key(public, "the owner's key")
    first, second = stories(held, key), stories(shown, key)
    reports = _two_reports(held, shown)
    # Every run has a server's journal of its own; the sites' ledgers go on from run to run.
    apart = {"server"} if any(f.verdict == UNKNOWN for f in reports) else set[str]()
    common = sorted((first.keys() & second.keys()) - apart)
    if not common and not reports:
        raise UsageError("the two sides have no journal in common", hint="compare copies of one owner's journal")
    return [*reports, *(f for owner in common for f in _of_owner(owner, first[owner], second[owner]))]


def _of_owner(owner: str, held: list[Story], shown: list[Story]) -> Iterator[Finding]:
    """One finding for each ledger of an owner that both sides know."""
    pairs = [(a, b) for a in held for b in shown if a.ledger == b.ledger or not (a.rows and b.rows)]
    if not pairs and all(s.hashes is not None for s in (*held, *shown)):
        pairs = [(held[0], shown[0])]  # two files that are said to be one journal
    if not pairs:
        what = "no ledger is known to both sides: a site may own several, and one may have taken another's place"
        yield Finding(owner, UNKNOWN, None, what)
    for a, b in pairs:
        checked = {s.signed for s in (a, b)} - {None}
        yield replace(_compare(owner, a, b), signatures=all(checked) if checked else None)


def stories(path: Path, public: str | None = None) -> dict[str, list[Story]]:
    """What one side knows, by the journal's owner: of a ``peers.json`` one story for each ledger of a site.

    Raises:
        UsageError: it is none of the known kinds.
    """
    if path.is_dir() or path.name == REPORT:
        return {owner: [story] for owner, story in _of_folder(path if path.is_dir() else path.parent)}
    data = bundles.read_bounded(path, _LIMIT)
    if path.suffix == ".json":
        return _of_peers(data, path.name)
    owner, story = _of_journal(data, public)
    return {owner: [story]}


def _two_reports(held: Path, shown: Path) -> list[Finding]:
    """Two reports of one session say the same, except of their writing; nothing for other sides."""
    paths = [p / REPORT if p.is_dir() else p for p in (held, shown)]
    if any(p.name != REPORT or not p.is_file() for p in paths):
        return []
    payloads = []
    for p in paths:
        try:
            document = canonical.loads(bundles.read_bounded(p, _LIMIT), limit=_LIMIT)
        except WireError as e:
            raise VerificationError(f"{p}: {e.message}") from e
        payload = dict(fields.mapping(fields.mapping(document, REPORT).get("payload"), REPORT))
        payloads.append({k: v for k, v in payload.items() if k not in ("software", "written_at")})
    if payloads[0].get("session") != payloads[1].get("session"):
        return [Finding(REPORT, UNKNOWN, None, "the reports are of two sessions")]
    try:
        claims.same(payloads[0], payloads[1], REPORT)
    except VerificationError as e:
        return [Finding(REPORT, FORKED, None, f"two reports of one session: {e.message}")]
    return [Finding(REPORT, SAME, None, "both reports of the session say the same")]


def _of_folder(folder: Path) -> Iterator[tuple[str, Story]]:
    bundle = bundles.read(folder)
    roster = bundles.open_roster(bundle, bundle.pin)
    keys = {str(m.site): m.signing_key for m in (*roster.sites, roster.server)}
    for name, data in bundle.files.items():
        if name == JOURNAL or name.startswith(f"{JOURNALS}/"):
            owner = "server" if name == JOURNAL else Path(name).stem
            _, story = _of_journal(data, keys[owner], owner)
            yield owner, story


def _of_journal(data: bytes, public: str | None, owner: str | None = None) -> tuple[str, Story]:
    rows: list[Row] = []
    fault: tuple[int, str] | None = None
    whole = data[: data.rfind(b"\n") + 1]
    for i, line in enumerate(bundles.lines(whole)):
        try:
            rows += parse(line + b"\n")
        except VerificationError:
            fault = i, f"row {i} is not a well-formed journal row"
            break
    owner = owner or (rows[0].owner if rows else "")
    fault = _fault(rows, public, owner) or fault
    if fault is None and len(whole) != len(data):
        fault = len(rows), f"row {len(rows)} has no end of line"
    hashes = tuple(r.hash for r in rows)
    head = hashes[-1] if hashes else GENESIS
    return owner, Story(len(rows), head, hashes[0] if hashes else "", hashes, fault, public is not None)


def _fault(rows: list[Row], public: str | None, owner: str) -> tuple[int, str] | None:
    """The first row that breaks the chain or, where the owner's key is given, whose signature does not hold."""
    prev = GENESIS
    for i, r in enumerate(rows):
        core = {"v": 1, "n": r.n, "owner": r.owner, "at": r.at, "kind": r.kind, "body": r.body, "prev": r.prev}
        if (r.n, r.owner, r.prev) != (i, owner, prev):
            return i, f"row {i} does not follow row {i - 1}"
        if canonical.digest(core) != r.hash:
            return i, f"row {i} was changed: its hash differs"
        prev = r.hash
    if public is None:
        return None
    try:
        verify_rows(rows, public, owner=owner)
    except FedveilError as e:
        bad = next((i for i in range(len(rows)) if f"row {i} " in e.message), 0)
        return bad, e.message
    return None


def _of_peers(data: bytes, name: str) -> dict[str, list[Story]]:
    try:
        found = heads_of(canonical.loads(data, limit=_PEERS_LIMIT))
    except FedveilError as e:
        raise UsageError(
            f"{name} is not a list of journal heads: {e.message}",
            hint="give a journal, a site's peers.json, or the folder of a run",
        ) from e
    return {
        site: [Story(copy.head.rows, copy.head.hash, copy.ledger) for copy in copies.values()]
        for site, copies in found.items()
    }


def _compare(owner: str, held: Story, shown: Story) -> Finding:
    if held.hashes is not None and shown.hashes is None:
        # A head that a peer has seen is evidence about the journal at hand, whichever side it was named on.
        held, shown = shown, held
    for which, story in (("first", held), ("second", shown)):
        if story.fault is not None:
            row, what = story.fault
            other = shown if story is held else held
            differs = _first_difference(held, shown)
            also = "" if differs is None or other.hashes is None else f"; the copies differ from row {differs} on"
            return Finding(owner, ALTERED, row, f"the {which} copy: {what}{also}")
    if held.rows and shown.rows and held.ledger != shown.ledger:
        return Finding(owner, REPLACED, 0, "the first rows differ: these are two journals under one name")
    if held.hashes is not None:
        return _two_journals(owner, held, shown)
    return _head_against(owner, held, shown)


def _two_journals(owner: str, held: Story, shown: Story) -> Finding:
    row = _first_difference(held, shown)
    if row is not None:
        return Finding(owner, FORKED, row, f"both copies are consistent, and differ from row {row} on")
    if shown.rows < held.rows:
        return Finding(
            owner, CUT, shown.rows, f"the second copy ends before row {shown.rows}, the first has {held.rows} rows"
        )
    if shown.rows == held.rows:
        return Finding(owner, SAME, None, f"{held.rows} rows, equal")
    return Finding(owner, CONTINUES, held.rows, f"{shown.rows - held.rows} rows more, from row {held.rows} on")


def _head_against(owner: str, held: Story, shown: Story) -> Finding:
    """A remembered head against a journal, or against another remembered head."""
    if held.rows == shown.rows:
        if held.hash == shown.hash:
            return Finding(owner, SAME, None, f"the head of {held.rows} rows is the same")
        row = max(0, held.rows - 1)
        verdict = FORKED if shown.hashes is None else REWRITTEN
        return Finding(owner, verdict, row, f"row {row} has another hash than the one that was seen")
    if shown.hashes is None:
        return Finding(owner, UNKNOWN, None, f"heads of {held.rows} and {shown.rows} rows; the rows are not at hand")
    if shown.rows < held.rows:
        return Finding(owner, CUT, shown.rows, f"a head of {held.rows} rows was seen; the journal has {shown.rows}")
    if held.rows and shown.hashes[held.rows - 1] != held.hash:
        row = held.rows - 1
        return Finding(owner, REWRITTEN, row, f"row {row}, or one before it, is not the one that was seen")
    return Finding(
        owner, CONTINUES, held.rows, f"goes on for {shown.rows - held.rows} rows after the head that was seen"
    )


def _first_difference(a: Story, b: Story) -> int | None:
    if a.hashes is None or b.hashes is None:
        return None
    return next((i for i, (x, y) in enumerate(zip(a.hashes, b.hashes, strict=False)) if x != y), None)


def to_json(findings: list[Finding]) -> Mapping[str, Any]:
    """A JSON form for programs."""
    return {"v": 1, "ok": not any(f.bad for f in findings), "journals": [dict(f.__dict__) for f in findings]}
