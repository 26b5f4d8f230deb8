"""Results beside a run: ``audit.json`` in its folder, read back with every number checked.

The file holds measurements. They are the word of whoever made them: they cannot be recomputed from journals. A report
that holds them says so, and its signature covers them. Sentences and verdicts are never taken from the file. They are
derived from its numbers again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fedveil.common import canonical, fields
from fedveil.common.errors import UsageError, VerificationError, WireError
from fedveil.common.files import replacing
from fedveil.privacy import plan as plans
from fedveil.privacy.audit.evidence import Conformance, Finding
from fedveil.privacy.audit.one_run import Guesses, Method, OneRun

AUDIT, PLAN = "audit.json", "plan.json"
LIMIT = 1 << 20
MAX_FINDINGS = 64
_TEXT = 512
_FIELDS = {"v", "plan_hash", "conformance", "one_run"}


@dataclass(frozen=True)
class Evidence:
    """What was measured of one plan; either part may be missing."""

    plan_hash: str
    conformance: Conformance | None = None
    one_run: OneRun | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``audit.json``, and of a report's field ``audit``."""
        parts = {"conformance": self.conformance, "one_run": self.one_run}
        return {"v": 1, "plan_hash": self.plan_hash} | {k: p.to_json() for k, p in parts.items() if p is not None}


def attach(run: Path, result: Conformance | OneRun) -> Path:
    """Write ``result`` into ``RUN/audit.json``, beside what is there of the same plan; returns the file's path.

    Raises:
        UsageError: the folder holds no plan.
        VerificationError: the result, or the file that is there, speaks of another plan; or that file is malformed.
    """
    plan_hash = plan_of(run).hash
    held = read(run, plan_hash) or Evidence(plan_hash)
    if isinstance(result, Conformance):
        if result.plan_hash != plan_hash:
            raise VerificationError("the examination was of another plan than the run's")
        held = Evidence(plan_hash, result, held.one_run)
    else:
        held = Evidence(plan_hash, held.conformance, result)
    return write(run, held)


def write(run: Path, held: Evidence) -> Path:
    """Write ``RUN/audit.json`` anew; returns the file's path."""
    with replacing(run / AUDIT) as part:
        part.write_bytes(canonical.dumps(held.to_json()) + b"\n")
    return run / AUDIT


def read(run: Path, plan_hash: str) -> Evidence | None:
    """What ``RUN/audit.json`` holds; None without such a file. See :func:`parse` for errors."""
    path = run / AUDIT
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > LIMIT:
        raise VerificationError(f"{AUDIT} is not a plain file of at most {LIMIT} bytes")
    return parse(path.read_bytes(), plan_hash)


def parse(data: bytes, plan_hash: str) -> Evidence:
    """Evidence from its file.

    Raises:
        VerificationError: malformed, out of bounds, or of another plan than ``plan_hash``.
    """
    try:
        body = fields.mapping(canonical.loads(data, limit=LIMIT), AUDIT)
    except WireError as e:
        raise VerificationError(f"{AUDIT}: {e.message}") from e
    if type(body.get("v")) is not int or not {"v", "plan_hash"} <= set(body) <= _FIELDS:
        raise VerificationError(f"{AUDIT} has other fields than its format, version 1")
    if fields.hexadecimal(body, "plan_hash", AUDIT) != plan_hash:
        raise VerificationError(f"{AUDIT} speaks of another plan than the run's")
    conformance, one_run = body.get("conformance"), body.get("one_run")
    evidence = Evidence(
        plan_hash,
        None if conformance is None else _conformance(fields.mapping(conformance, "conformance"), plan_hash),
        None if one_run is None else _one_run(fields.mapping(one_run, "one_run")),
    )
    if evidence.to_json() != body:
        raise VerificationError(f"{AUDIT}: what it says does not follow from its numbers")
    return evidence


def plan_of(run: Path) -> plans.PrivacyPlan:
    """The plan of a run's folder, or of a plan file.

    Raises:
        UsageError: there is none, or the file is no JSON. PlanError: it does not hold.
    """
    path = run / PLAN if run.is_dir() else run
    if not path.is_file() or path.stat().st_size > LIMIT:
        raise UsageError(f"{path} holds no plan", hint="give a run's folder, or its plan.json")
    try:
        return plans.from_json(canonical.loads(path.read_bytes(), limit=LIMIT))
    except WireError as e:
        raise UsageError(f"{path} holds no plan: {e.message}", hint="give a run's folder, or its plan.json") from e


def _conformance(b: dict[str, Any], plan_hash: str) -> Conformance:
    where = "conformance"
    findings = b.get("findings")
    if not isinstance(findings, list) or not 1 <= len(findings) <= MAX_FINDINGS:
        raise VerificationError(f"{where}: findings is not a list of 1..{MAX_FINDINGS}")
    low, high = _interval(b.get("interval"), where)

    def number(key: str, top: float = 1e9) -> float:
        return fields.number(b, key, where, high=top)

    return Conformance(
        plan_hash, fields.text(b, "sum", where, limit=32), number("claimed_noise_multiplier"),
        number("measured_noise_multiplier"), low, high, number("confidence", 1.0),
        fields.integer(b, "samples", where), tuple(_finding(fields.mapping(f, "finding")) for f in findings),
    )  # fmt: skip


def _finding(b: dict[str, Any]) -> Finding:
    where = "finding"

    def text(key: str) -> str:
        return fields.text(b, key, where, limit=_TEXT)

    def number(key: str, low: float, high: float) -> float:
        return fields.number(b, key, where, low=low, high=high)

    return Finding(
        text("name"), text("asks"), number("p_value", 0.0, 1.0), number("alpha", 0.0, 1.0),
        number("measured", -1e18, 1e18), number("expected", -1e18, 1e18), fields.integer(b, "samples", where),
        text("detects"), None if b.get("interval") is None else _interval(b["interval"], where, -1e18),
    )  # fmt: skip


def _one_run(b: dict[str, Any]) -> OneRun:
    where = "one_run"
    method = b.get("method")
    if method not in get_args(Method):
        raise VerificationError(f"{where}: an unknown method")
    counts = [fields.integer(b, key, where, high=1 << 32) for key in ("canaries", "guesses", "right")]
    try:
        guesses = Guesses(*counts)
    except UsageError as e:
        raise VerificationError(f"{where}: {e.message}") from e

    def number(key: str, top: float) -> float:
        return fields.number(b, key, where, high=top)

    return OneRun(
        number("epsilon_lower_bound", 1e6), number("confidence", 1.0), number("delta", 1.0), cast(Method, method),
        guesses, number("claimed_epsilon", 1e9),
    )  # fmt: skip


def _interval(value: Any, where: str, low: float = 0.0) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise VerificationError(f"{where}: an interval is not [low, high]")
    pair = {"low": value[0], "high": value[1]}
    return (
        fields.number(pair, "low", where, low=low, high=1e18),
        fields.number(pair, "high", where, low=low, high=1e18),
    )
