"""An empirical audit's results as a run's folder holds them (``audit.json``): shape, bounds, and the sentences drawn.

They are evidence beside the claim, from whoever made the audit, and not recomputed: a report repeats them, and a
verifier checks that it repeats them. Known parts are ``conformance`` (the noise that the opened sums had) and
``one_run`` (a lower bound of ε, from one training run); others are carried along.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedveil.common import canonical
from fedveil.common.errors import VerificationError, WireError
from fedveil.privacy.report import fields
from fedveil.privacy.report.catalogue import Speaker

AUDIT = "audit.json"
LIMIT = 1 << 20
_NOISE = ("measured_noise_multiplier", "claimed_noise_multiplier", "confidence")
_ONE_RUN = ("epsilon_lower_bound", "claimed_epsilon", "confidence")


def checked(value: Any) -> dict[str, Any]:
    """An audit's results, if they are an object of version 1 whose known parts hold what they must.

    ``conformance``: ``measured_noise_multiplier, claimed_noise_multiplier, confidence`` (numbers), ``interval``
    (``[low, high]`` of the measured one), ``passed`` (bool), ``plan_hash``. ``one_run``: ``epsilon_lower_bound,
    claimed_epsilon, confidence``. Either may be missing or null; further parts and fields are carried along.

    Raises:
        VerificationError: another shape, or a number out of bounds.
    """
    found = fields.mapping(value, AUDIT)
    fields.integer(found, "v", AUDIT, low=1, high=1)
    if len(canonical.dumps(found)) > LIMIT:
        raise VerificationError(f"{AUDIT} is over the limit of {LIMIT} bytes")
    for part, numbers in (("conformance", _NOISE), ("one_run", _ONE_RUN)):
        if found.get(part) is None:
            continue
        where = f"{AUDIT}: {part}"
        body = fields.mapping(found[part], where)
        for name in numbers:
            fields.number(body, name, where, high=1.0 if name == "confidence" else 1e9)
        if part == "conformance":
            _conformance(body, where)
    return found


def attach(run: Path, results: Iterable[Path]) -> None:
    """Take audits' results into ``run/audit.json``: each file holds an object with one or more parts.

    Raises:
        VerificationError: a file is missing or malformed; nothing is written.
    """
    whole: dict[str, Any] = {"v": 1}
    for path in results:
        try:
            data = path.read_bytes()
            whole |= fields.mapping(canonical.loads(data, limit=LIMIT), path.name)
        except OSError as e:
            raise VerificationError(f"{path} cannot be read: {e.strerror}") from e
        except WireError as e:
            raise VerificationError(f"{path}: {e.message}") from e
    partial = run / f".{AUDIT}.part"
    partial.write_bytes(canonical.dumps(checked(whole)) + b"\n")
    os.replace(partial, run / AUDIT)


def _conformance(body: Mapping[str, Any], where: str) -> None:
    if type(body.get("passed")) is not bool:
        raise VerificationError(f"{where}: passed is neither true nor false")
    interval = body.get("interval")
    if not isinstance(interval, list) or len(interval) != 2:
        raise VerificationError(f"{where}: the interval is not [low, high]")
    low, high = (fields.number({"end": x}, "end", where, high=1e9) for x in interval)
    if low > high:
        raise VerificationError(f"{where}: the interval is not [low, high]")
    fields.hexadecimal(body, "plan_hash", where)


def empirical(audit: Mapping[str, Any] | None, plan_hash: str, say: Speaker) -> list[str]:
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
        out.append(say("audit.this_plan" if c["plan_hash"] == plan_hash else "audit.other_plan"))
        out.append(say("audit.passed" if c["passed"] else "audit.failed"))
    if o := (audit or {}).get("one_run"):
        numbers = {
            "epsilon": f"{o['epsilon_lower_bound']:.4g}", "claimed": f"{o['claimed_epsilon']:.4g}",
            "confidence": f"{100 * o['confidence']:g}",
        }  # fmt: skip
        held = o["epsilon_lower_bound"] <= o["claimed_epsilon"]
        out.append(say("audit.one_run" if held else "audit.refuted", **numbers))
    return out
