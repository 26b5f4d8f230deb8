"""The privacy plan: every number that decides privacy, in one frozen value that is consistent or refused.

The plan is made once (:func:`make_plan`), hashed, signed by every participant before the first round, and its
hash travels in every message. A site never takes a number from a message: it takes the plan it signed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

from pydantic import ValidationError

from fedveil.common import canonical
from fedveil.common.errors import PlanError, WireError
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy import plan_rules as rules
from fedveil.privacy.dp import calibrate
from fedveil.privacy.dp.accounting import PLANNED_OVERFLOW
from fedveil.privacy.dp.events import MIN_NOISE_MULTIPLIER
from fedveil.privacy.grid import choose
from fedveil.privacy.plan_figures import Mode, Optimizer, PlanFigures, Sum, Unit, Workload, clips_per_site, room_of

__all__ = ["MOST_BY_DEFAULT", "Mode", "Optimizer", "PrivacyPlan", "Sum", "Unit", "Workload", "from_json", "make_plan"]

MOST_BY_DEFAULT = 10**7  # more places at one site cost so much in sensitivity that they have to be asked for
_LEAST_EPSILON = 1e-3  # that is proposed where δ alone covers everything
_EPSILONS = (*(float(f"{d}e{k}") for k in range(-3, 3) for d in (1, 2, 5)), calibrate.MAX_EPSILON)


class PrivacyPlan(PlanFigures):
    """See the module's text. Build it with :func:`make_plan`; check a received one with :meth:`check`."""

    def check(self) -> PrivacyPlan:
        """This plan, if it is consistent; otherwise :class:`PlanError` with the nearest consistent one."""
        rules.check(self)
        return self


def from_json(value: Any) -> PrivacyPlan:
    """Parse and check a plan from elsewhere; :class:`PlanError` for anything malformed or inconsistent."""
    if isinstance(value, dict) and value.get("v") == 1:
        raise PlanError("this plan is of version 1", hint="fedveil 0.1 reads it, and verifies reports on it")
    try:
        return _parsed(canonical.dumps(value))
    except WireError as e:
        raise PlanError(f"the plan is malformed: {e.message}") from None
    except ValidationError as e:
        raise PlanError(f"the plan is malformed in: {_where(e)}") from None


@lru_cache(maxsize=8)  # every virtual site of a process is shown the same plan
def _parsed(data: bytes) -> PrivacyPlan:
    return PrivacyPlan.model_validate_json(data).check()


def _where(error: ValidationError) -> str:
    """The names of the wrong fields; cut, because an unknown field's name is its sender's choice."""
    return ", ".join(sorted({".".join(map(str, x["loc"]))[:64] for x in error.errors(include_input=False)}))[:512]


def make_plan(
    *,
    mode: Mode = "distributed",
    sum: Sum = "keysum",
    sites: int,
    records: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float = 1e-5,
    steps: int,
    clip: float,
    model: Workload,
    optimizer: Optimizer,
    contract_hash: str,
    capacity: int | None = None,
    rows_per_person: int | None = None,
    sample_rate: float = 1.0,
    local_steps: int = 1,
    local_batch: int = 0,
    colluders: int | None = None,
    dropouts: int | None = None,
    few_clients: bool = False,
    reveal_to: Literal["server", "sites"] = "server",
    committee: int = 0,
    committee_seed: str = "",
) -> PrivacyPlan:
    """Derive σ from ε or ε from σ by PLD, the grid from the ciphertext's room, and refuse what cannot hold.

    Args:
        epsilon: ε of all steps; the smallest noise that keeps it is found by bisection.
        noise_multiplier: σ; ε is then what the steps cost. Exactly one of the two is given.
        capacity: the largest capacity of a site; by default all declared records (at most 10^7).
        rows_per_person: given, a unit is a person with up to so many rows, and records and capacity count persons.

    Raises:
        PlanError: with the reason and the nearest consistent plan.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise PlanError("a plan follows from epsilon or from noise_multiplier", hint="give exactly one of the two")
    t, d = rules.default_tolerance(sites) if mode != "local" else (0, max(0, sites - 1) // 3)
    t, d = t if colluders is None else colluders, d if dropouts is None else dropouts
    given: dict[str, Any] = {
        "mode": mode, "sum": sum, "sites": sites, "colluders": t, "dropouts": d, "records": records,
        "unit": "client" if mode == "client" else "record" if rows_per_person is None else "person",
        "capacity": min(records, MOST_BY_DEFAULT) if capacity is None else capacity,
        "rows_per_person": rows_per_person or 1,
        "sample_rate": sample_rate, "steps": steps, "local_steps": local_steps, "local_batch": local_batch,
        "clip": clip, "delta": delta,
        "epsilon": 1.0 if epsilon is None else epsilon,
        "noise_multiplier": 1.0 if noise_multiplier is None else noise_multiplier,
        "model": model, "optimizer": optimizer, "contract_hash": contract_hash, "workload_hash": workload_hash(model),
        "few_clients": few_clients, "reveal_to": reveal_to, "committee": committee,
        "committee_seed": committee_seed,
    }  # fmt: skip
    _check_given(given)
    if problem := model.problem():
        raise PlanError(f"model {model.name!r}: {problem}")
    rules.check_shape(mode, sites, t, d)
    asked = given if noise_multiplier is None else given | {"epsilon": None}
    try:
        derived = _derived(asked)
    except PlanError as e:
        if epsilon is None or e.nearest is not None or (larger := _larger_epsilon(given)) is None:
            raise
        raise PlanError(e.message, hint=e.hint, nearest={"epsilon": larger}) from None
    return PrivacyPlan(**given | derived).check()


def workload_hash(model: Workload) -> str:
    """SHA-256 (hex) of the canonical form of what a plan computes."""
    return canonical.digest(model.model_dump(mode="json"))


def _derived(given: dict[str, Any]) -> dict[str, Any]:
    """What follows from the rest: σ from ε or (``epsilon`` being None) ε from σ, and the grid."""
    mode, sites, steps, model = given["mode"], given["sites"], given["steps"], given["model"]
    rate = given["sample_rate"]
    epsilon, sigma = given["epsilon"], given["noise_multiplier"]
    delta = given["delta"]
    if rate < 1 and mode != "client":  # by the accountants' own arithmetic, so that they find the same number again
        delta -= steps * (PLANNED_OVERFLOW * delta / steps)
    if epsilon is None:
        epsilon = calibrate.epsilon(sigma, delta, rate, steps)
        if epsilon <= 0:
            enough = calibrate.noise_multiplier(_LEAST_EPSILON, delta, rate, steps)
            raise PlanError(
                f"with a noise multiplier of {sigma:g} delta = {given['delta']:g} alone covers {steps} steps",
                hint="less noise: nothing is gained by an epsilon of 0",
                nearest={"noise_multiplier": enough},
            )
    else:
        sigma = calibrate.noise_multiplier(epsilon, delta, rate, steps)
    honest = 1 if mode == "local" else sites - given["colluders"] - given["dropouts"]
    per_site = clips_per_site(mode, given["sample_rate"], given["records"], sites, model, given["clip"])
    share, whole = sigma / math.sqrt(honest), isinstance(model, StatsSpec)
    bits, times = room_of(given["sum"], sites, model.parameters, steps), given["local_steps"] if mode == "local" else 1
    grid, clamp = choose(
        sites, given["clip"], share, model.parameters, steps, per_site, whole=whole, bits=bits, times=times
    )
    return {"epsilon": epsilon, "noise_multiplier": sigma, "grid": grid, "clamp": clamp}


def _larger_epsilon(given: dict[str, Any]) -> float | None:
    """The smallest ε of the steps 1, 2, 5, 10, ... (from 0.001 up) above the one asked for that a plan can have."""
    for larger in (x for x in _EPSILONS if x > given["epsilon"]):
        try:
            _derived(given | {"epsilon": larger})
        except PlanError:
            continue
        return larger
    return None


def _check_given(given: dict[str, Any]) -> None:
    """Bounds and types of what the caller chose, before anything is derived from it."""
    try:
        PrivacyPlan(**given, grid=1.0, clamp=1.0)
    except ValidationError as e:
        wrong = e.errors()
    else:
        return
    nearest: dict[str, object] = {}
    for x in wrong:
        name, context = str(x["loc"][0]), x.get("ctx", {})
        if len(wrong) == 1 and name == "epsilon" and given["epsilon"] <= 0:
            larger = _larger_epsilon(given)
            nearest |= {} if larger is None else {"epsilon": larger}
        elif name == "noise_multiplier" and x["type"] == "greater_than":
            nearest[name] = MIN_NOISE_MULTIPLIER
        elif x["type"] in ("less_than_equal", "greater_than_equal") and x["input"] == x["input"]:  # no NaN
            nearest[name] = context.get("le", context.get("ge"))
    said = "; ".join(
        f"{'.'.join(map(str, x['loc']))[:64]} = {str(x['input'])[:64]} (it {x['msg'].removeprefix('Input ')})"
        for x in wrong
    )
    raise PlanError(
        f"out of bounds: {said}",
        hint="a value within its bound",
        nearest=nearest if len(nearest) == len(wrong) else None,
    )
