"""When a privacy plan holds together: every rule refuses with the reason and the nearest plan that would pass.

The rules read a plan and nothing else. So a received plan must pass the same rules as one that
:func:`fedveil.privacy.plan.make_plan` makes. Symbols as in :mod:`fedveil.privacy.plan`.
"""

from __future__ import annotations

import math

from fedveil.common import canonical
from fedveil.common.errors import PlanError, SecureSumError
from fedveil.common.settings import MIN_DELTA
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy import schedules
from fedveil.privacy.dp.calibrate import MAX_EPSILON
from fedveil.privacy.dp.events import MAX_LOSS, MIN_NOISE_MULTIPLIER
from fedveil.privacy.grid import MIN_SHARE_STD, MODULUS_BITS
from fedveil.privacy.plan_figures import MAX_CAP, PlanFigures
from fedveil.privacy.secagg import committee as committees
from fedveil.privacy.secagg.params import MAX_HELPERS, MAX_SITES, plaintext

MAX_INFLATION = 0.02
MIN_CLIENTS = 1000
DELTA_PER_STEP = 1e-14


def check(plan: PlanFigures) -> None:
    """Raise :class:`PlanError` for the first rule that ``plan`` breaks, with the nearest consistent plan."""
    if problem := plan.model.problem():
        raise PlanError(f"model {plan.model.name!r}: {problem}")
    _check_trust(plan)
    _check_unit(plan)
    _check_optimizer(plan)
    if isinstance(plan.model, StatsSpec):
        _check_stats(plan, plan.model)
    if plan.delta >= 1 / plan.records:
        raise PlanError(
            f"delta = {plan.delta:g} is not below 1 / {plan.records} declared records",
            hint="at such a delta publishing one whole record would be allowed",
            nearest=_smaller_delta(plan.records),
        )
    _check_rounding(plan)
    _check_cost(plan)
    if plan.claim > plan.epsilon * (1 + 1e-9):
        raise PlanError(
            f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:.6g} cost epsilon = {plan.claim:.4f}, "
            f"more than the {plan.epsilon:g} this plan claims",
            # the ε of this noise: a search for the right noise would let a stranger's plan cost a minute
            nearest={"epsilon": plan.claim} if plan.claim <= MAX_EPSILON else None,
        )
    if plan.inflation > MAX_INFLATION:
        raise PlanError(
            f"grid and rounding widen the sensitivity by {plan.inflation:.1%}, more than {MAX_INFLATION:.0%}",
            hint="make the plan again: its grid follows from its other numbers; or state a smaller capacity",
            nearest=plan.regrid(),
        )
    if plan.step_std < MIN_SHARE_STD:
        raise PlanError(
            f"a share of noise of {plan.step_std:.1f} grid units is too coarse to count as Gaussian",
            hint=f"at least {MIN_SHARE_STD:g} (Kairouz, Liu & Steinke 2021, Theorem 1)",
            nearest=plan.regrid(),
        )
    if 2 * plan.bound + 1 > 1 << MODULUS_BITS:
        raise PlanError(
            f"sums of up to {plan.bound:.3g} grid units do not fit into {MODULUS_BITS} bits",
            nearest=plan.regrid(),
        )
    if plan.sum == "keysum":
        helpers = plan.committee or plan.sites
        try:
            plaintext(plan.sites, helpers, plan.bound, plan.model.parameters, plan.steps)
        except SecureSumError as e:
            many = plan.sites > MAX_SITES or helpers > MAX_HELPERS
            raise PlanError(e.message, hint=e.hint, nearest=None if many else plan.regrid()) from e


def default_tolerance(sites: int) -> tuple[int, int]:
    """The default ``(colluders, dropouts)``: both max(1, n // 6) from four sites up; three sites allow no drop-out.

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
    """Numbers of sites, colluders and drop-outs that can work; :class:`PlanError` with the nearest ones that do.

    The nearest keep as many of the colluders as can be kept, and then as many of the drop-outs.
    """
    if mode != "local":
        default_tolerance(n)
    if t >= 0 and 0 <= d <= _most_dropouts(mode, n, t):
        return
    best = next((x for x in range(min(t, n), -1, -1) if _most_dropouts(mode, n, x) >= 0), 0)
    nearest: dict[str, object] = {"colluders": best, "dropouts": max(0, min(d, _most_dropouts(mode, n, best)))}
    if mode == "local" or t < 0 or d < 0 or n - d < 1:
        raise PlanError(f"colluders = {t}, dropouts = {d} with {n} sites", nearest=nearest)
    raise PlanError(
        f"{n} sites with {t} colluders and {d} drop-outs leave {n - t - d} honest shares and need {_answers(n, t)} "
        f"answers of {n - d}",
        hint="at least two honest shares, more than the colluders, and no more answers than survivors",
        nearest=nearest,
    )


def _answers(n: int, t: int) -> int:
    return (n + t) // 2 + 1


def _most_dropouts(mode: str, n: int, t: int) -> int:
    """The most drop-outs beside ``t`` colluders: enough answers stay and, except in ``local``, h >= 2 and h > t."""
    answered = n - _answers(n, t)
    return answered if mode == "local" else min(answered, n - t - max(2, t + 1))


def _check_trust(plan: PlanFigures) -> None:
    check_shape(plan.mode, plan.sites, plan.colluders, plan.dropouts)
    if plan.sum == "none" and plan.mode != "local":
        raise PlanError(
            f"mode {plan.mode!r} without a secure sum shows the server every update with a share of the noise only",
            nearest={"sum": "keysum"},
        )
    if plan.sum == "keysum" and plan.sites < 3:
        raise PlanError(
            f"a secure sum of {plan.sites} sites tells each what the others sent",
            hint="in mode 'local' every site's own noise is all that the claim counts on: sum = 'none' will do",
            nearest={"sum": "none"},
        )
    if plan.reveal_to == "sites" and (plan.sum != "keysum" or plan.task != "train"):
        raise PlanError("only keysum can hide a training's sums from the server", nearest={"reveal_to": "server"})
    if plan.committee:
        _check_committee(plan)
    if plan.mode == "client" and plan.sites < MIN_CLIENTS and not plan.few_clients:
        raise PlanError(
            f"mode 'client' hides a whole client: its noise drowns the model of {plan.sites} clients",
            hint=f"use mode 'distributed' or at least {MIN_CLIENTS} clients; or insist: few_clients in [privacy] of "
            "federation.toml, --force of 'fedveil simulate'",
            nearest={"mode": "distributed"},
        )
    if plan.mode == "distributed" and (plan.local_steps, plan.local_batch) != (1, 0):
        raise PlanError(
            "one gradient evaluation per secure sum is what the claim is made for",
            hint="several local steps: mode 'local', where each has the site's own noise, or mode 'client'",
            nearest={"local_steps": 1, "local_batch": 0},
        )
    if plan.mode == "local" and (plan.local_batch or (plan.local_steps > 1 and plan.sample_rate < 1)):
        raise PlanError(
            "noisy steps in mode 'local' take every record: K of them cost what one costs at sigma / sqrt(K)",
            nearest={"local_batch": 0, "sample_rate": 1.0},
        )


def _check_unit(plan: PlanFigures) -> None:
    """What a place holds, and that the plan names what it computes."""
    if plan.workload_hash != canonical.digest(plan.model.model_dump(mode="json")):
        raise PlanError("the plan names another workload than the one it holds", hint="make the plan again")
    if (plan.unit == "client") != (plan.mode == "client"):
        raise PlanError(
            f"mode {plan.mode!r} does not protect one {plan.unit}",
            hint="make the plan again: its unit follows from its mode",
        )
    if plan.unit != "person" and plan.rows_per_person != 1:
        raise PlanError(
            "only a person has several rows", hint="make the plan again from a contract with rows_per_person"
        )
    if plan.capacity > plan.records:
        raise PlanError(
            f"no site can hold {plan.capacity} of {plan.records} declared records", nearest={"capacity": plan.records}
        )


def _check_optimizer(plan: PlanFigures) -> None:
    o = plan.optimizer
    if wrong := schedules.problem(o.schedule, plan.steps):
        raise PlanError(wrong, hint="schedule = 'constant', 'linear' or 'cosine', or pairs within the run's steps")
    if plan.mode != "client" and (o.server_rate, o.proximal) != (1.0, 0.0):
        raise PlanError(
            "server_rate and proximal are for mode 'client', whose sites send updates",
            hint=f"in mode {plan.mode!r} the learning rate is the server's, and no site leaves the common model",
        )
    if plan.task == "stats" and (o.name, o.averaging) != ("sgd", 0.0):
        raise PlanError("statistics take no step, and so have no optimiser", hint="make the plan again")


def _check_rounding(plan: PlanFigures) -> None:
    """Sampled steps are composed by Fourier transforms, whose rounding (some 3e-17 a step) must stay far below δ."""
    needed = DELTA_PER_STEP * plan.steps
    if plan.event.sample_rate == 1 or plan.steps == 1 or plan.delta >= needed:
        return
    raise PlanError(
        f"delta = {plan.delta:g} drowns in the rounding of {plan.steps} composed steps: at least {needed:g}",
        hint="a larger delta, fewer steps, or sample_rate = 1",
        nearest={"delta": needed} if needed < 1 / plan.records else {"steps": max(1, int(plan.delta / DELTA_PER_STEP))},
    )


def _check_cost(plan: PlanFigures) -> None:
    """What a verifier refuses before it computes an ε must be refused here, before anything is charged."""
    if plan.noise_multiplier < MIN_NOISE_MULTIPLIER:
        raise PlanError(
            f"a noise multiplier of {plan.noise_multiplier:g} gives no privacy to speak of",
            nearest={"noise_multiplier": MIN_NOISE_MULTIPLIER},
        )
    if (lost := plan.steps * plan.event.loss) > MAX_LOSS:
        raise PlanError(
            f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:g} may lose {lost:.4g} on average, more "
            f"than the {MAX_LOSS:g} that an accountant computes with",
            hint="more noise, or fewer steps",
            nearest={"steps": int(MAX_LOSS / plan.event.loss)},
        )
    if not plan.carried(MAX_CAP / 2):
        raise PlanError("no cap of a site's ledger carries this plan", hint="a larger noise, or fewer steps")


def _check_committee(plan: PlanFigures) -> None:
    """Helpers drawn by a seed that nobody could choose (a public beacon, named in the plan before any key is made)."""
    if plan.sum != "keysum" or plan.committee > plan.sites or not plan.committee_seed:
        raise PlanError("a committee needs keysum, at most all sites, and a public seed", nearest={"committee": 0})
    try:
        committees.committee(plan.sites, plan.colluders, plan.dropouts, plan.committee)
    except SecureSumError as e:
        raise PlanError(e.message, hint=e.hint, nearest={"committee": 0}) from e


def _check_stats(plan: PlanFigures, spec: StatsSpec) -> None:
    """One sum over every record, uncut: a clip or a clamp that cuts would bias every estimate and not be seen."""
    nearest: dict[str, object] = {}
    if (plan.steps, plan.local_steps, plan.sample_rate) != (1, 1, 1.0) or plan.mode == "client":
        nearest |= {"steps": 1, "local_steps": 1, "sample_rate": 1.0, "mode": "distributed"}
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


def _smaller_delta(records: int) -> dict[str, object]:
    """A δ well below 1 / N: a tenth of it, cut to one digit; fewer records where no δ is small enough."""
    if MIN_DELTA >= 1 / records:
        return {"records": int(0.1 / MIN_DELTA)}
    exponent = math.floor(math.log10(0.1 / records))
    digit = max(1, math.floor(0.1 / records / 10.0**exponent))
    return {"delta": max(MIN_DELTA, float(f"{digit}e{exponent}"))}
