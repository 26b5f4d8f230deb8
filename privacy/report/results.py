"""An empirical audit's results as a run's folder holds them (``audit.json``): shape, bounds, and the sentences drawn.

They are evidence beside the claim, from whoever made the audit, and not recomputed: a report repeats them, and a
verifier checks that it repeats them. Known parts are ``conformance`` (the noise that the opened sums had) and
``one_run`` (a lower bound of ε, from one training run); others are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedveil.common import canonical
from fedveil.common.errors import VerificationError
from fedveil.privacy.report import fields
from fedveil.privacy.report.catalogue import Speaker

AUDIT = "audit.json"
LIMIT = 1 << 20
_CONFORMANCE = ("measured_noise_multiplier", "low", "high", "claimed_noise_multiplier", "confidence")
_ONE_RUN = ("epsilon_lower", "confidence")


def checked(value: Any) -> dict[str, Any]:
    """An audit's results, if they are an object of version 1 whose known parts hold the numbers they must.

    ``conformance``: ``measured_noise_multiplier, low, high, claimed_noise_multiplier, confidence`` (numbers) and
    ``passed`` (bool). ``one_run``: ``epsilon_lower, confidence``. Either may be missing or null.

    Raises:
        VerificationError: another shape, or a number out of bounds.
    """
    found = fields.mapping(value, AUDIT)
    fields.integer(found, "v", AUDIT, low=1, high=1)
    if len(canonical.dumps(found)) > LIMIT:
        raise VerificationError(f"{AUDIT} is over the limit of {LIMIT} bytes")
    for part, numbers in (("conformance", _CONFORMANCE), ("one_run", _ONE_RUN)):
        if found.get(part) is None:
            continue
        where = f"{AUDIT}: {part}"
        body = fields.mapping(found[part], where)
        for name in numbers:
            fields.number(body, name, where, high=1.0 if name == "confidence" else 1e9)
        if part == "conformance" and type(body.get("passed")) is not bool:
            raise VerificationError(f"{where}: passed is neither true nor false")
    return found


def empirical(audit: Mapping[str, Any] | None, say: Speaker) -> list[str]:
    """The known results in words; none if no audit is attached."""
    out: list[str] = []
    if c := (audit or {}).get("conformance"):
        numbers = {k: f"{c[k]:.4g}" for k in _CONFORMANCE} | {"confidence": f"{100 * c['confidence']:g}"}
        out.append(say("audit.noise", **numbers))
        out.append(say("audit.passed" if c["passed"] else "audit.failed"))
    if o := (audit or {}).get("one_run"):
        values = {"epsilon": f"{o['epsilon_lower']:.4g}", "confidence": f"{100 * o['confidence']:g}"}
        out.append(say("audit.one_run", **values))
    return out
