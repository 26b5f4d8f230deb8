"""When a privacy plan holds together: every rule refuses with the reason and the nearest plan that would pass.

The rules read a plan and nothing else, so that a received plan is held to what :func:`fedveil.privacy.plan.make_plan`
would have made. Symbols as in :mod:`fedveil.privacy.plan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedveil.common.errors import PlanError, SecureSumError
from fedveil.common.stats_spec import StatsSpec
from fedveil.privacy.dp.calibrate import MAX_EPSILON
from fedveil.privacy.grid import MIN_SHARE_STD, MODULUS_BITS
from fedveil.privacy.secagg import committee as committees

if TYPE_CHECKING:
    from fedveil.privacy.plan import PrivacyPlan

MAX_INFLATION = 0.02
MIN_CLIENTS = 1000


def check(plan: PrivacyPlan) -> None:
    """Raise :class:`PlanError` for the first rule that ``plan`` breaks, with the nearest consistent plan."""
    if problem := plan.model.problem():
        raise PlanError(f"model {plan.model.name!r}: {problem}")
    _check_trust(plan)
    if isinstance(plan.model, StatsSpec):
        _check_stats(plan, plan.model)
    if plan.delta >= 1 / plan.records:
        raise PlanError(
            f"delta = {plan.delta:g} is not below 1 / {plan.records} declared records",
            hint="at such a delta publishing one whole record would be allowed",
            nearest={"delta": _round_down(0.1 / plan.records)},
        )
    if plan.claim > plan.epsilon * (1 + 1e-9):
        raise PlanError(
            f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:.6g} cost epsilon = {plan.claim:.4f}, "
            f"more than the {plan.epsilon:g} this plan claims",
            # the price as it is: a search for the noise would let a stranger's plan cost a minute
            nearest={"epsilon": plan.claim} if plan.claim <= MAX_EPSILON else None,
        )
    if plan.inflation > MAX_INFLATION:
        raise PlanError(
            f"the grid widens the sensitivity by {plan.inflation:.1%}, more than {MAX_INFLATION:.0%}",
            hint="a finer grid or fewer parameters",
            nearest=plan.regrid(),
        )
    if plan.share_std < MIN_SHARE_STD:
        raise PlanError(
            f"a share of noise of {plan.share_std:.1f} grid units is too coarse to count as Gaussian",
            hint=f"at least {MIN_SHARE_STD:g} (Kairouz, Liu & Steinke 2021, Theorem 1)",
            nearest=plan.regrid(),
        )
    if 2 * plan.bound + 1 > 1 << MODULUS_BITS:
        raise PlanError(
            f"sums of up to {plan.bound:.3g} grid units do not fit into {MODULUS_BITS} bits",
            nearest=plan.regrid(),
        )


def default_tolerance(sites: int) -> tuple[int, int]:
    """The default ``(colluders, dropouts)``: both max(1, n // 6) from four sites up; three sites stand no drop-out.

    Raises:
        PlanError: fewer than three sites (with two, each would know the other's sum).
    """
    if sites < 3:
        raise PlanError(
            f"a secure sum of {sites} sites tells each what the others sent",
            hint="three sites at least, or mode 'local'",
            nearest={"sites": 3},
        )
    t = max(1, sites // 6)
    return (1, 0) if sites == 3 else (t, t)


def check_shape(mode: str, n: int, t: int, d: int) -> None:
    """Numbers of sites, colluders and drop-outs that can work; :class:`PlanError` with ones that do."""
    if mode == "local":
        if not (0 <= t < n and 0 <= d and n - d >= (n + t) // 2 + 1):
            raise PlanError(f"colluders = {t}, dropouts = {d} with {n} sites", nearest={"colluders": 0, "dropouts": 0})
        return
    default_tolerance(n)
    if t < 0 or d < 0 or n - d < 1:
        raise PlanError(f"colluders = {t}, dropouts = {d} with {n} sites", nearest={"colluders": 0, "dropouts": 0})
    h, T = n - t - d, (n + t) // 2 + 1
    if h < 2 or h <= t or n - d < T:
        best = min(t, max(0, (n - 2) // 3))
        fits = [x for x in range(d, -1, -1) if n - best - x >= max(2, best + 1) and n - x >= (n + best) // 2 + 1]
        raise PlanError(
            f"{n} sites with {t} colluders and {d} drop-outs leave {h} honest shares and need {T} answers of {n - d}",
            hint="at least two honest shares, more than the colluders, and no more answers than survivors",
            nearest={"colluders": best, "dropouts": fits[0]},
        )


def _check_trust(plan: PrivacyPlan) -> None:
    check_shape(plan.mode, plan.sites, plan.colluders, plan.dropouts)
    if plan.sum == "none" and plan.mode != "local":
        raise PlanError(
            f"mode {plan.mode!r} without a secure sum shows the server every update with a share of the noise only",
            nearest={"sum": "keysum"},
        )
    if plan.sum == "keysum" and plan.sites < 3:
        default_tolerance(plan.sites)
    if plan.reveal_to == "sites" and (plan.sum != "keysum" or plan.task != "train"):
        raise PlanError("only keysum can hide a training's sums from the server", nearest={"reveal_to": "server"})
    if plan.committee:
        _check_committee(plan)
    if plan.mode == "client" and plan.sites < MIN_CLIENTS and not plan.few_clients:
        raise PlanError(
            f"mode 'client' hides a whole client: its noise drowns the model of {plan.sites} clients",
            hint=f"use mode 'distributed', at least {MIN_CLIENTS} clients, or insist with few_clients",
            nearest={"mode": "distributed"},
        )
    if plan.mode != "client" and plan.local_steps != 1:
        raise PlanError(
            "one gradient evaluation per secure sum is what the claim is made for", nearest={"local_steps": 1}
        )


def _check_committee(plan: PrivacyPlan) -> None:
    """Helpers drawn by a seed that nobody could choose (a public beacon, named in the plan before any key is made)."""
    if plan.sum != "keysum" or plan.committee > plan.sites or not plan.committee_seed:
        raise PlanError("a committee needs keysum, at most all sites, and a public seed", nearest={"committee": 0})
    try:
        committees.committee(plan.sites, plan.colluders, plan.dropouts, plan.committee)
    except SecureSumError as e:
        raise PlanError(e.message, hint=e.hint, nearest={"committee": 0}) from e


def _check_stats(plan: PrivacyPlan, spec: StatsSpec) -> None:
    """One sum over every record, whole: a clip or a clamp that cuts would bias every estimate unseen."""
    nearest: dict[str, object] = {}
    if (plan.steps, plan.sample_rate) != (1, 1.0) or plan.mode == "client":
        nearest |= {"steps": 1, "sample_rate": 1.0, "mode": "distributed"}
    if plan.clip < spec.norm_bound:
        nearest["clip"] = spec.norm_bound
    if plan.clamp < plan.records:
        nearest["clamp"] = float(plan.records)
    if nearest:
        raise PlanError(
            f"statistics are one sum of whole records (up to {spec.norm_bound:.4f} long) over all "
            f"{plan.records} declared ones; this plan cuts or samples them",
            nearest=nearest,
        )


def _round_down(x: float) -> float:
    digits = f"{x:.0e}"
    return float(digits) if float(digits) <= x else x / 2
