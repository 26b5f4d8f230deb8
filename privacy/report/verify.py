"""The verifier: everything a report claims, computed again from the signed journals that lie beside it.

Needs the ``audit`` extra alone: no model, no data, no network, no server. It trusts one thing, the consortium's
public key; unless that key is given, it is taken from the bundle, and the result says so.

What a passed verification means, and what not: the journals are complete and in order, every site signed this plan
and charged its ledger for every sum it was part of (as far as its ledger was handed over: up to d may be missing,
and are named), and the numbers of the report follow from them. It does not mean that a site's program drew the
noise: journals prove the charge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedveil.common.errors import MALFORMED, FedveilError, VerificationError
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.checks import Audit, NotReached

_PLD, _RDP, _FOURIER, _FILTER, _CLOSED = "pld", "rdp", "fourier", "filter", "closed"
# Which accountant a check's numbers come from; the others compare bytes, hashes and order.
_ACCOUNTANTS = {
    "epsilon by PLD": (_PLD, _CLOSED),
    "epsilon by RDP": (_RDP, _PLD),
    "epsilon by Fourier": (_FOURIER,),
    "replace-one epsilon": (_PLD, _RDP, _CLOSED),
    "fallback epsilon": (_PLD, _RDP),
    "privacy curve": (_PLD,),
    "group epsilon": (_FOURIER, _RDP),
    "budgets": (_FILTER, _FOURIER),
    "metrics file": (_PLD,),
}
_LEDGER = "ledger of "


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: stable name, by which a failure is reported.
        compared: what was compared with what.
        passed: whether it holds.
        detail: the numbers, or the reason of the failure; several reasons are separated by semicolons.
        accountants: what the numbers were recomputed with (keys of the catalogue's section ``accountant``); empty
            where none is recomputed.
    """

    name: str
    compared: str
    passed: bool
    detail: str
    accountants: tuple[str, ...] = ()

    def named(self, say: Speaker) -> str:
        """The name in a language of the catalogue."""
        if self.name.startswith(_LEDGER):
            return say("checked.ledger_of", site=self.name.removeprefix(_LEDGER))
        return say("checked." + self.name.replace(" ", "_").replace("-", "_"))


@dataclass(frozen=True)
class Verification:
    """The result: every check in the order in which it was made.

    Attributes:
        claim: the claimed sentence; empty unless every check passed.
        simulated: the run protected nobody (it was a study on one machine).
        pinned: the roster was checked under a key of the consortium that was given, not taken from the bundle.
        countersigned: the sites that signed this very report after verifying it.
        sites: how many sites the roster has.
        auditors: for each attached result of an empirical audit, the SHA-256 fingerprint of the key that signed it,
            empty where nobody did; nothing unless every check passed.
    """

    checks: tuple[Check, ...]
    claim: str
    simulated: bool
    pinned: bool
    countersigned: tuple[str, ...] = ()
    sites: int = 0
    auditors: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every check passed."""
        return all(c.passed for c in self.checks)

    @property
    def passed(self) -> int:
        """How many checks passed."""
        return sum(c.passed for c in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, in order."""
        return [c for c in self.checks if not c.passed]

    @property
    def accountants(self) -> list[str]:
        """What the privacy figures were recomputed with, in English, each once."""
        return self.accountants_in(Speaker("en"))

    def accountants_in(self, say: Speaker) -> list[str]:
        """The same in a language of the catalogue."""
        used = dict.fromkeys(a for c in self.checks for a in c.accountants)
        return [say(f"accountant.{a}", version=version("dp-accounting")) for a in used]

    @property
    def failed(self) -> Check | None:
        """The first check that failed."""
        return next((c for c in self.checks if not c.passed), None)

    def raise_for_failure(self) -> None:
        """Raise :class:`VerificationError` naming the first check that failed, if one did."""
        if bad := self.failed:
            raise VerificationError(
                f"{bad.name}: {bad.detail}", hint="do not rely on this report; ask the consortium for the journals"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON form for programs."""
        return {
            "v": 2,
            "ok": self.ok,
            "passed": self.passed,
            "mismatches": [{"check": c.name, "detail": c.detail} for c in self.failures],
            "accountants": self.accountants,
            "countersigned": list(self.countersigned),
            "sites": self.sites,
            "auditors": dict(self.auditors),
            "claim": self.claim,
            "simulated": self.simulated,
            "consortium_key_pinned": self.pinned,
            "checks": [{**c.__dict__, "accountants": list(c.accountants)} for c in self.checks],
        }


def verify_report(
    report: Path, *, consortium_key: str | None = None, require_signatures: int = 0, auditor: str | None = None
) -> Verification:
    """Check ``report.json`` against the files beside it.

    Args:
        report: the report; its folder is the bundle.
        consortium_key: the consortium's Ed25519 public key, 64 hexadecimal digits, from a source other than the bundle.
            None takes the bundle's, and the result says so; anything else that is no key fails the roster's check.
        require_signatures: how many sites must have signed this very report.
        auditor: SHA-256 fingerprint (hex) of an auditor's key: an audit must be attached, and signed by that key.

    Returns:
        A :class:`Verification`; nothing in the files makes this function raise.
    """
    return examined(report, consortium_key=consortium_key, require_signatures=require_signatures, auditor=auditor)[0]


def examined(
    report: Path, *, consortium_key: str | None = None, require_signatures: int = 0, auditor: str | None = None
) -> tuple[Verification, Audit]:
    """:func:`verify_report`, and what was read for it: later steps must use this and not read the files again."""
    audit = Audit(report, consortium_key, require_signatures, auditor)
    checks: list[Check] = []
    for name, compared, step in audit.steps():
        checks.append(_run(name, compared, step))
    ok = all(c.passed for c in checks)
    sites = 0 if audit.roster is None else len(audit.roster.sites)
    claim, signed = (audit.claim, audit.auditors) if ok else ("", {})
    found = Verification(tuple(checks), claim, audit.simulated, audit.pinned, audit.countersigned, sites, signed)
    return found, audit


def _run(name: str, compared: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, compared, True, step(), _ACCOUNTANTS.get(name, ()))
    except NotReached as e:
        return Check(name, compared, False, f"could not be checked, because this failed before: {e}")
    except FedveilError as e:
        return Check(name, compared, False, e.message)
    except (*MALFORMED, MemoryError) as e:
        return Check(name, compared, False, f"malformed ({type(e).__name__})")
