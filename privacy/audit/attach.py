"""Results beside a run: ``audit.json`` in its folder, read back with every number checked.

The file holds measurements. They are the word of whoever made them: they cannot be recomputed from journals. So an
auditor signs a result with a key of its own; who trusts the result must know that key. A report that holds results says
so, and its signature covers them. Sentences and verdicts are never taken from the file. They are derived from its
numbers again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, fields, identity
from fedveil.common.errors import IdentityError, UsageError, VerificationError, WireError
from fedveil.common.files import replacing
from fedveil.privacy import plan as plans
from fedveil.privacy.audit.evidence import Conformance, Examined, Finding
from fedveil.privacy.audit.one_run import Guesses, Method, OneRun

AUDIT, PLAN = "audit.json", "plan.json"
LIMIT = 1 << 20
MAX_FINDINGS = 64
_TEXT = 512
DOMAIN = "fedveil/audit/1"
PARTS = ("conformance", "one_run")
_FIELDS = {"v", "plan_hash", *PARTS, "signatures"}
Result = Conformance | OneRun


@dataclass(frozen=True)
class Signed:
    """An auditor's signature under one result: an Ed25519 public key and 64 bytes, both in hexadecimal digits."""

    signer: str
    signature: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the public key's 32 bytes: what an auditor publishes."""
        return canonical.sha256_hex(bytes.fromhex(self.signer))


@dataclass(frozen=True)
class Evidence:
    """What was measured of one plan; either part may be missing. ``signatures`` by the part's name; may lack some."""

    plan_hash: str
    conformance: Conformance | None = None
    one_run: OneRun | None = None
    signatures: Mapping[str, Signed] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, Result]:
        """The parts that are there, by name."""
        parts: dict[str, Result | None] = {"conformance": self.conformance, "one_run": self.one_run}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def auditors(self) -> dict[str, str]:
        """The fingerprint of the key that signed each part that is there; empty for an unsigned one."""
        return {n: self.signatures[n].fingerprint if n in self.signatures else "" for n in self.results}

    def to_json(self) -> dict[str, Any]:
        """The content of ``audit.json``, and of a report's field ``audit``."""
        signed = {n: asdict(s) for n, s in self.signatures.items()}
        parts: dict[str, Any] = {name: part.to_json() for name, part in self.results.items()}
        return {"v": 1, "plan_hash": self.plan_hash} | parts | ({"signatures": signed} if signed else {})

    def beside(self, other: Evidence) -> Evidence:
        """These results, and those of ``other`` that are lacking here."""
        parts = {**other.results, **self.results}
        signed = {n: s for n, s in other.signatures.items() if n not in self.results} | dict(self.signatures)
        return replace(self, signatures=signed, **cast(Any, parts))


def evidence_of(plan_hash: str, result: Result, key: Ed25519PrivateKey | None = None) -> Evidence:
    """One result, signed by the auditor whose key is given."""
    name = "conformance" if isinstance(result, Conformance) else "one_run"
    signed: dict[str, Signed] = {}
    if key is not None:
        signature = identity.sign(key, DOMAIN, _statement(plan_hash, name, result)).hex()
        signed[name] = Signed(identity.public_hex(key), signature)
    return replace(Evidence(plan_hash, signatures=signed), **cast(Any, {name: result}))


def _statement(plan_hash: str, name: str, result: Result) -> bytes:
    """What an auditor signs."""
    return canonical.dumps({"v": 1, "plan_hash": plan_hash, "part": name, "result": result.to_json()})


def attach(run: Path, result: Result, key: Ed25519PrivateKey | None = None) -> Path:
    """Write ``result`` into ``RUN/audit.json``, beside what is there of the same plan; returns the file's path.

    Args:
        key: the auditor's own, which signs the result; None leaves it unsigned.

    Raises:
        UsageError: the folder holds no plan.
        VerificationError: the result, or the file that is there, speaks of another plan; or that file is malformed.
    """
    plan_hash = plan_of(run).hash
    if isinstance(result, Conformance) and result.plan_hash != plan_hash:
        raise VerificationError("the examination was of another plan than the run's")
    held = read(run, plan_hash) or Evidence(plan_hash)
    return write(run, evidence_of(plan_hash, result, key).beside(held))


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
    found = Evidence(
        plan_hash,
        None if conformance is None else _conformance(fields.mapping(conformance, "conformance"), plan_hash),
        None if one_run is None else _one_run(fields.mapping(one_run, "one_run")),
        _signatures(body.get("signatures", {})),
    )
    if found.to_json() != body:
        raise VerificationError(f"{AUDIT}: what it says does not follow from its numbers")
    _check_signatures(found)
    return found


def _signatures(value: Any) -> dict[str, Signed]:
    held = fields.mapping(value, "signatures")
    if not held.keys() <= set(PARTS):
        raise VerificationError(f"{AUDIT}: a signature under something else than its results")
    out: dict[str, Signed] = {}
    for name, entry in held.items():
        body, where = fields.mapping(entry, "a signature"), "a signature"
        out[name] = Signed(
            fields.hexadecimal(body, "signer", where), fields.hexadecimal(body, "signature", where, length=128)
        )
    return out


def _check_signatures(found: Evidence) -> None:
    for name, s in found.signatures.items():
        if name not in found.results:
            raise VerificationError(f"{AUDIT}: a signature under a result that is not there")
        try:
            identity.verify(
                s.signer, DOMAIN, _statement(found.plan_hash, name, found.results[name]), bytes.fromhex(s.signature),
                what=f"the auditor of {name}",
            )  # fmt: skip
        except IdentityError as e:
            raise VerificationError(f"{AUDIT}: {e.message}") from e


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
        _examined(fields.mapping(b["examined"], "examined")) if "examined" in b else None,
    )  # fmt: skip


def _examined(b: dict[str, Any]) -> Examined:
    where = "examined"

    def text(key: str) -> str:
        return fields.text(b, key, where, limit=32)

    return Examined(
        text("task"), text("mode"), text("sum"), text("reveal_to"), fields.integer(b, "committee", where),
        text("network"), fields.integer(b, "parameters", where), text("engine"), text("precision"),
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
        number("detects_noise_factor", 1.0) if "detects_noise_factor" in b else None,
    )  # fmt: skip


def _interval(value: Any, where: str, low: float = 0.0) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise VerificationError(f"{where}: an interval is not [low, high]")
    pair = {"low": value[0], "high": value[1]}
    return (
        fields.number(pair, "low", where, low=low, high=1e18),
        fields.number(pair, "high", where, low=low, high=1e18),
    )
