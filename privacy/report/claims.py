"""The claimed numbers against the verifier's own accountants (:mod:`fedveil.privacy.report.recompute`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields
from fedveil.common.errors import VerificationError
from fedveil.privacy.dp.events import MAX_LOSS, SampledGaussian
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report import recompute
from fedveil.privacy.report.history import History
from fedveil.privacy.report.prices import Prices
from fedveil.privacy.stats_document import STATISTICS, document

_CLOSE, _NAMED = 1e-6, 8
_OVER, _UNDER, _TINY = 1e-5, 1e-2, 5e-3  # how far the third accountant may be over and under the claim
_STEP_SLACK = 1e-11  # what a builder may add to each step's divergence for rounding
_STATISTICS_LIMIT = 1 << 25
_NO_DISTRIBUTION, _NO_EXP = 600.0, 700.0


def pld(claim: dict[str, Any], plan: Prices) -> str:
    """The claimed ε is not below what PLD gives for all planned steps, nor a different number."""
    q, sigma = plan.rate, plan.noise
    own = recompute.by_pld(q, sigma, plan.steps, plan.left(plan.steps))
    claimed = fields.number(claim, "epsilon", "claim", high=1e6)
    if claim.get("delta") != plan.delta:
        raise VerificationError(f"delta = {claim.get('delta')!r} is claimed, the plan says {plan.delta:g}")
    if claimed < own - _CLOSE:
        raise VerificationError(f"epsilon = {claimed:.6f} is claimed, but the journals give {own:.6f}")
    if claimed > own + _CLOSE * max(1.0, own):
        raise VerificationError(f"epsilon = {claimed:.6f} is claimed, which is not the {own:.6f} of this plan")
    if q == 1 and (exact := recompute.gaussian_delta(sigma, plan.steps, claimed)) > plan.delta * (1 + _CLOSE):
        raise VerificationError(f"the closed form gives delta = {exact:.3g} at the claimed epsilon")
    return f"claimed {claimed:.6f}, recomputed {own:.6f}" + (", closed form agrees" if q == 1 else "")


def rdp(claim: dict[str, Any], plan: Prices) -> str:
    """The second accountant: the report's value by it is one that the verifier's own table of orders allows.

    How it compares with the first says nothing. Both are upper bounds, and either can be the smaller one (PLD's grid
    overcounts many small steps, RDP a few rare ones).
    """
    q, sigma = plan.rate, plan.noise
    stated = fields.number(claim, "epsilon_rdp", "claim", high=1e9)
    return f"stated {stated:.6f}, bounded by {_between(stated, 'epsilon', q, sigma, plan):.6f}"


def fourier(claim: dict[str, Any], plan: Prices) -> str:
    """The third accountant: the claim is not below its ε, and not far above.

    Both it and PLD round the losses up. Its grid is the finer one, so an honest claim is the larger number, by little:
    under 0.2 % where the grids are as fine as a step's loss, more only where all steps together lose next to nothing.
    """
    claimed = fields.number(claim, "epsilon", "claim", high=1e6)
    own = recompute.by_fourier(((plan.rate, plan.noise, plan.steps),), plan.left(plan.steps))
    if claimed < own * (1 - _OVER) - _CLOSE:
        raise VerificationError(f"epsilon = {claimed:.6f} is claimed, the third accountant gives {own:.6f}")
    if claimed > own * (1 + _UNDER) + _TINY:
        raise VerificationError(f"epsilon = {claimed:.6f} is claimed, far above the third accountant's {own:.6f}")
    return f"claimed {claimed:.6f}, by the third accountant {own:.6f}"


def replace_one(claim: dict[str, Any], plan: Prices) -> str:
    """ε under the other relation: one record replaced by another."""
    q, sigma = plan.rate, plan.noise
    stated = fields.number(claim, "replace_one_epsilon", "claim", high=1e12)
    if claim.get("replace_one_accountant") == "RDP":
        if stated <= _NO_DISTRIBUTION:
            raise VerificationError(f"epsilon with one record replaced is {stated:.6f} by RDP, where PLD must be used")
        return f"stated {stated:.6f}: no protection to speak of"
    # Two records can pull in opposite directions: twice the distance under the same noise, and four times the loss.
    if (lost := plan.steps * SampledGaussian(q, sigma / 2).loss) > 4 * MAX_LOSS:
        raise VerificationError(f"the mean privacy loss with one record replaced, {lost:.4g}, is too large for PLD")
    own = recompute.by_pld_replacing(q, sigma, plan.steps, plan.left(plan.steps))
    if abs(stated - own) > _CLOSE * max(1.0, own):
        raise VerificationError(f"epsilon with one record replaced is stated as {stated:.6f}, it is {own:.6f}")
    # Twice the distance under the same noise: the closed form at σ/2.
    if q == 1 and stated < _NO_EXP and recompute.gaussian_delta(sigma / 2, plan.steps, stated) > plan.delta * 1.000001:
        raise VerificationError("the closed form gives a larger delta where one record is replaced")
    bound = recompute.replacing_bound(q, sigma, plan.steps, plan.left(plan.steps))
    return f"stated {stated:.6f}, recomputed {own:.6f}, by RDP at most {bound:.6f}"


def fallback(claim: dict[str, Any], plan: Prices) -> str:
    """ε when a site can count on nothing but its own share of the noise."""
    q, sigma = plan.rate, plan.own_noise
    stated = fields.number(claim, "fallback_epsilon", "claim", high=1e12)
    if claim.get("fallback_accountant") == "RDP":
        return f"stated {stated:.6f}, recomputed by RDP: at most {_between(stated, 'the fallback', q, sigma, plan):.6f}"
    if (lost := plan.steps * SampledGaussian(q, sigma).loss) > 4 * MAX_LOSS:
        raise VerificationError(f"the mean privacy loss under one's own share alone, {lost:.4g}, is too large for PLD")
    own = recompute.by_pld(q, sigma, plan.steps, plan.left(plan.steps))
    if abs(stated - own) > _CLOSE * max(1.0, own):
        raise VerificationError(f"the fallback is stated as {stated:.6f}, it is {own:.6f}")
    return f"stated {stated:.6f}, recomputed {own:.6f}"


def groups(payload: dict[str, Any], plan: Prices) -> str:
    """ε of several units of one person, and of an original record that moves several released ones.

    None is below what the third accountant makes of a mixture of Gaussians with binomial weights, nor, where the
    builder found that mixture too wide and took RDP, below what a table of orders can give.
    """
    claim = fields.mapping(payload.get("claim"), "claim")
    rows = claim.get("groups")
    if not isinstance(rows, list) or len(rows) > _NAMED:
        raise VerificationError("the groups of one person are not listed")
    said = []
    for row in rows:
        entry = fields.mapping(row, "groups")
        size = fields.integer(entry, "size", "groups", low=2, high=1 << 10)
        said.append(_group(entry.get("epsilon"), size, plan, rdp=entry.get("accountant") == "RDP"))
    for site, entry in fields.mapping(payload.get("sites"), "sites").items():
        table = (entry or {}).get("anonymisation") or {}
        factor, stated = table.get("stability_factor"), table.get("epsilon_of_original_record")
        if stated is not None:
            if type(factor) is not int or not 1 <= factor <= 1 << 30:
                raise VerificationError(f"{site} states an epsilon of original records without a factor")
            _group(stated, factor, plan)
    return ", ".join(said) + " by the third accountant"


def _group(stated: Any, size: int, plan: Prices, *, rdp: bool = False) -> str:
    """``rdp``: it is said to be by RDP. Where the third accountant cannot hold a group's loss, nothing else could."""
    found = fields.number({"epsilon": stated}, "epsilon", f"a group of {size}", high=1e12)
    given = plan.rate, plan.noise, plan.steps, plan.left_for(size)
    if given[-1] <= 0:
        raise VerificationError(f"a step has no places for a group of {size}, yet its epsilon is stated")
    try:
        own = recompute.group_range(*given, size) if rdp else recompute.by_group(*given, size)
    except VerificationError:
        own = recompute.group_range(*given, size)
    if found < own * (1 - _OVER) - _CLOSE:
        raise VerificationError(f"epsilon of a group of {size} is stated as {found:.6f}, it is at least {own:.6f}")
    return f"{size} units: stated {found:.6f}, {own:.6f}"


def charged(accounting: dict[str, Any], plan: Prices, steps: int) -> str:
    """The most that this run charged to one site: ``steps`` of the plan's, by both accountants."""
    if (found := accounting.get("steps_charged")) != steps:
        raise VerificationError(f"{str(found)[:16]} steps are said to be charged to one site, the ledgers give {steps}")
    q, sigma = plan.rate, plan.noise
    stated = fields.number(accounting, "epsilon_charged_pld", "accounting", high=1e6)
    own = recompute.by_pld(q, sigma, steps, plan.left(steps))
    if abs(stated - own) > _CLOSE * max(1.0, own):
        raise VerificationError(f"epsilon charged to one site is stated as {stated:.6f}, it is {own:.6f}")
    if steps:
        second = fields.number(accounting, "epsilon_charged_rdp", "accounting", high=1e9)
        _between(second, "epsilon charged to one site", q, sigma, plan, steps)
    return f"this run charged one site {steps} steps at most, epsilon = {own:.6f}"


def _between(stated: float, what: str, q: float, sigma: float, plan: Prices, steps: int = 0) -> float:
    """What the verifier's own table of orders bounds ε by; raises where ``stated`` cannot come from a finer one.

    Args:
        steps: composed; by default all that are planned.
    """
    steps = steps or plan.steps
    low, high = recompute.rdp_range(q, sigma, steps, plan.left(steps))
    if not low * (1 - _CLOSE) <= stated <= high + _CLOSE * max(1.0, high) + _STEP_SLACK * steps:
        raise VerificationError(f"{what} by RDP is stated as {stated:.6f}, it is between {low:.6f} and {high:.6f}")
    return high


def curve(claim: dict[str, Any], plan: Prices) -> str:
    """No point of the curve promises more than the accountant; the attack risk follows from the points."""
    points = claim.get("curve")
    if not isinstance(points, list) or not 2 <= len(points) <= 1024:
        raise VerificationError("the curve has no points, or too many")
    for p in points:
        pair = dict(zip("ed", p, strict=True))
        fields.number(pair, "e", "curve", high=1e4)
        fields.number(pair, "d", "curve", high=1)
    exact = recompute.deltas_by_pld(plan.rate, plan.noise, plan.steps, tuple(p[0] for p in points))
    for (e, d), own in zip(points, exact, strict=True):
        if d < min(1.0, own + plan.steps * plan.overflow) * (1 - _CLOSE) - 1e-12:
            raise VerificationError(f"the curve promises delta = {d:.3g} at epsilon = {e:.3f}, it is {own:.3g}")
    rates = claim.get("attack")
    if not isinstance(rates, list) or not rates:
        raise VerificationError("the attack risk is not stated")
    for r in rates:
        fpr, tpr = (fields.number(r, k, "attack", high=1) for k in ("false_positive_rate", "true_positive_rate"))
        if tpr < recompute.detection(points, fpr) - _CLOSE:
            raise VerificationError(f"the attack risk at {fpr:.0%} false alarms is stated too low")
    return f"{len(points)} points; " + ", ".join(
        f"{r['true_positive_rate']:.3f} at {r['false_positive_rate']:g}" for r in rates
    )


def statistics(plan: PrivacyPlan, history: History, folder: Path) -> str:
    """The estimates follow from the opened sum, whose hash the journals hold; nothing to check without their file."""
    if not (folder / STATISTICS).exists():
        return "no file of estimates here"
    if not history.applied:
        raise VerificationError(f"{STATISTICS} speaks of a sum that was never opened")
    found = canonical.loads(bundles.read_bounded(folder / STATISTICS, _STATISTICS_LIMIT))
    sums = bundles.read_bounded(folder / bundles.MODEL, 4 * plan.model.parameters)
    if canonical.sha256_hex(sums) != history.ended.model_hash:
        raise VerificationError(f"{bundles.MODEL} is not the sum that the journals speak of")
    own = document(plan, history.session, len(history.applied[-1].members or ()), sums)
    same(found, canonical.loads(canonical.dumps(own)), STATISTICS)
    return f"{plan.model.parameters} sums of {len(history.applied[-1].members or ())} sites, recomputed"


def same(found: Any, derived: Any, where: str) -> None:
    """Two JSON values are equal, floats to 1e-6; raises naming every place where they are not, up to a few."""
    if odd := list(islice(_differences(found, derived, where), _NAMED + 1)):
        more = "; and more" if len(odd) > _NAMED else ""
        raise VerificationError("; ".join(odd[:_NAMED]) + more)


def _differences(found: Any, derived: Any, where: str) -> Iterator[str]:
    if isinstance(derived, float) and type(found) in (int, float):
        if not math.isclose(found, derived, rel_tol=_CLOSE, abs_tol=1e-9):
            yield f"{where} is {found!r}, the journals give {derived!r}"
    elif isinstance(derived, dict) and isinstance(found, dict):
        for key in sorted(set(found) ^ set(derived)):
            yield f"{where}: {key[:64]!r} is in only one of the report and the derivation"
        for key in sorted(derived.keys() & found.keys()):
            yield from _differences(found[key], derived[key], f"{where}: {key}")
    elif isinstance(derived, list) and isinstance(found, list):
        if len(found) != len(derived):
            yield f"{where} has {len(found)} entries, the journals give {len(derived)}"
            return
        for i, (a, b) in enumerate(zip(found, derived, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif type(found) is not type(derived) or found != derived:
        yield f"{where} is not what the journals give"


# Of every claim: its name, what is compared, the check.
CHECKS = (
    ("epsilon by PLD", "claimed against recomputed: all planned steps at h shares", pld),
    ("epsilon by RDP", "the second accountant bounds the claim", rdp),
    ("epsilon by Fourier", "a third accountant, of fedveil's own: the claim is not below it, and near it", fourier),
    ("replace-one epsilon", "one record replaced by another, by both accountants", replace_one),
    ("fallback epsilon", "a site's own share only", fallback),
    ("privacy curve", "every point of the curve, and the attack risk drawn from it", curve),
)
