"""An empirical audit's results as a run's folder holds them (``audit.json``), and the sentences drawn from them.

They are evidence beside the claim: the word of whoever made and signed the audit, not recomputed. A report repeats
them. A verifier checks that it repeats them, that they are about this run's plan, and that their verdicts follow from
their numbers. ``conformance`` is the noise that the opened sums had, ``one_run`` a lower bound of ε from one training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedveil.common.errors import VerificationError
from fedveil.privacy.audit import attach as evidence
from fedveil.privacy.audit import consistency
from fedveil.privacy.audit.attach import AUDIT as AUDIT
from fedveil.privacy.audit.attach import LIMIT, PARTS, Evidence, Signed
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report.catalogue import Speaker


def held_against(data: bytes, plan: PrivacyPlan) -> Evidence:
    """What ``audit.json`` holds, read by :func:`fedveil.privacy.audit.attach.parse` and checked against the plan.

    Raises:
        VerificationError: malformed; what it says does not follow from its numbers; of another plan, of other claims
            than the plan makes, or with checks left out.
    """
    found = evidence.parse(data, plan.hash)
    if found.conformance is not None:
        consistency.conformance(found.conformance, plan)
    if found.one_run is not None:
        consistency.single_run(found.one_run, plan)
    return found


def attach(run: Path, results: Iterable[Path]) -> None:
    """Take audits' results into ``run/audit.json``; each file is what an audit printed with ``--json``.

    Raises:
        VerificationError: a file is missing or malformed, or of another plan than the run's; nothing is written.
    """
    plan = evidence.plan_of(run)
    whole = Evidence(plan.hash)
    for path in results:
        whole = held_against(_read(path), plan).beside(whole)
    evidence.write(run, whole)


def require_auditor(audit: Any, fingerprint: str) -> str:
    """Every attached result is signed by the key with this fingerprint, and there is one; what was found, in words.

    Raises:
        VerificationError: none is attached, or one is unsigned or signed by another key.
    """
    found = auditors(audit)
    if not found:
        raise VerificationError("no audit is attached", hint="ask the auditor for its result")
    for part, by in found.items():
        if by != fingerprint.lower():
            whose = f"signed by the key {by[:16]}..." if by else "unsigned"
            raise VerificationError(f"the attached audit ({part.replace('_', '-')}) is {whose}, not by the key given")
    return f"{', '.join(found).replace('_', '-')}, by the key {fingerprint[:16]}..."


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(LIMIT + 1)
    except OSError as e:
        raise VerificationError(
            f"{path} cannot be read: {e.strerror}", hint="check the path and its permissions"
        ) from e
    if len(data) > LIMIT:
        raise VerificationError(f"{path.name} is over the limit of {LIMIT} bytes")
    return data


def empirical(audit: Mapping[str, Any] | None, say: Speaker) -> list[str]:
    """The known results in words; none if no audit is attached."""
    out: list[str] = []
    if c := (audit or {}).get("conformance"):
        low, high = c["interval"]
        out.append(
            say(
                "audit.noise",
                measured=f"{c['measured_noise_multiplier']:.4g}", low=f"{low:.4g}", high=f"{high:.4g}",
                claimed=f"{c['claimed_noise_multiplier']:.4g}", confidence=f"{100 * c['confidence']:g}",
            )
        )  # fmt: skip
        out.append(say("audit.this_plan"))
        if path := c.get("examined"):
            out.append(say("audit.path", **{k: path[k] for k in ("network", "parameters", "engine", "precision")}))
        out.append(say("audit.passed" if c["passed"] else "audit.failed"))
        out.append(_signed("conformance", audit, say))
    if o := (audit or {}).get("one_run"):
        numbers = {
            "epsilon": f"{o['epsilon_lower_bound']:.4g}", "claimed": f"{o['claimed_epsilon']:.4g}",
            "confidence": f"{100 * o['confidence']:g}",
        }  # fmt: skip
        held = o["epsilon_lower_bound"] <= o["claimed_epsilon"]
        out.append(say("audit.one_run" if held else "audit.refuted", **numbers))
        if (factor := o.get("detects_noise_factor")) is not None:
            out.append(say("audit.detects", factor=f"{factor:.3g}") if factor else say("audit.blind"))
        out.append(_signed("one_run", audit, say))
    return out


def auditors(audit: Mapping[str, Any] | None) -> dict[str, str]:
    """The SHA-256 fingerprint of the key that signed each result, empty for an unsigned one; of checked results."""
    held = audit or {}
    signed = held.get("signatures", {})
    return {n: Signed(**signed[n]).fingerprint if n in signed else "" for n in PARTS if held.get(n)}


def _signed(name: str, audit: Mapping[str, Any] | None, say: Speaker) -> str:
    by = auditors(audit).get(name, "")
    return say("audit.signed", fingerprint=by) if by else say("audit.unsigned")
