"""The rounds of a run: who was in each sum, how much noise it held, which model it started from and gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedveil.common import fields
from fedveil.common.errors import VerificationError
from fedveil.common.identity import Roster
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report.history import COMPLETED, History
from fedveil.privacy.report.prices import Prices


def sums(plan: Prices, roster: Roster, h: History) -> str:
    """Not more rounds than planned; every sum of enough members of the roster, with the noise that they give.

    Raises:
        VerificationError: naming the round.
    """
    if len(h.rounds) > plan.steps:
        raise VerificationError(f"{len(h.rounds)} rounds were opened, {plan.steps} steps were planned")
    if h.ended.status == COMPLETED and len(h.rounds) != plan.steps:
        raise VerificationError(f"the run is said to be complete after {len(h.rounds)} of {plan.steps} steps")
    known, fewest = {m.site for m in roster.sites}, plan.sites
    if strange := next((r.site for r in h.refusals if r.site and r.site not in known), None):
        raise VerificationError(f"a refusal is said to be of {strange!r}, who is not on the roster")
    for r in h.rounds:
        if r.members is not None and not known.issuperset(r.members):
            raise VerificationError(f"round {r.number} names a member that is not on the roster")
        if r.outcome != "applied" or r.members is None:
            continue
        if len(r.members) < plan.members:
            raise VerificationError(f"the sum of round {r.number} has {len(r.members)} sites, fewer than n - d")
        sigma = plan.realised(len(r.members))
        if r.noise_multiplier is None or abs(r.noise_multiplier - sigma) > 1e-9 * sigma:
            raise VerificationError(
                f"round {r.number} states another realised noise than its {len(r.members)} sites give"
            )
        fewest = min(fewest, len(r.members))
    return f"{len(h.rounds)} of {plan.steps} steps; at least {fewest} of {plan.sites} sites in every sum"


def models(h: History, payload: Mapping[str, Any], folder: Path) -> str:
    """Every round starts from the model before it, in the journal and in the report; the last one is the file's.

    A round that was aborted, or that the run's end interrupted, leaves the model as it was.

    Raises:
        VerificationError: naming the round.
    """
    now, stated = h.model_hash, payload.get("rounds")
    if not isinstance(stated, list) or len(stated) != len(h.rounds):
        raise VerificationError("the report does not list the rounds of the server's journal")
    for r, row in zip(h.rounds, stated, strict=True):
        if r.model_in != now:
            raise VerificationError(f"round {r.number} does not start from the model before it")
        if fields.mapping(row, f"round {r.number} of the report").get("model_hash") != r.model_out:
            raise VerificationError(f"the report names another model after round {r.number} than the server's journal")
        now = r.model_out or now
    if h.ended.model_hash != now:
        raise VerificationError("the model at the end is not the one that the last round gave")
    if payload["hashes"]["model"] != now:
        raise VerificationError("the report names another final model than the server's journal")
    found = bundles.file_digest(folder / bundles.MODEL)
    if found not in (None, now):
        raise VerificationError(f"{bundles.MODEL} is not the model that the journals and the report speak of")
    file = "its file too" if found == now else "no model file here"
    return f"{len(h.applied)} models, the final one {now[:16]}..., {file}"
