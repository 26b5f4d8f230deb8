"""From ``federation.toml`` and the data contract to the privacy plan, and what a planner wants to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedveil.common.contract import DataContract
from fedveil.common.errors import PlanError
from fedveil.common.settings import Federation
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy import schedules
from fedveil.privacy.dp.accounting import Filter, best_order, epsilon_rdp
from fedveil.privacy.grid import MODULUS_BITS
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.tally import Tally

COEFFICIENT_BYTES = 7  # a ciphertext coefficient of the secure sum: 56 bits
HIGH_EPSILON = 10.0
HIGH_FALLBACK = 1000.0  # what a site accepts unless its owner says otherwise
NOISY = 1.0


def plan_from_settings(
    federation: Federation, contract: DataContract, sites: int, *, noise_multiplier: float | None = None
) -> PrivacyPlan:
    """The plan of a run: settings decide what is asked for, the contract the model's inputs and classes.

    Args:
        federation: ``federation.toml``.
        contract: the agreed contract; its hash goes into the plan.
        sites: number of sites on the roster.
        noise_multiplier: σ to plan with; ε then follows from it, and what the settings say of either is ignored.

    Raises:
        PlanError: with the reason and the nearest consistent plan.
    """
    p, m = federation.privacy, federation.model
    return make_plan(
        mode=p.mode,
        sum=p.sum,
        sites=sites,
        records=p.records,
        epsilon=p.epsilon if noise_multiplier is None else None,
        noise_multiplier=p.noise_multiplier if noise_multiplier is None else noise_multiplier,
        delta=p.delta,
        steps=p.steps,
        clip=p.clip,
        model=ModelSpec(name=m.name, inputs=contract.width, classes=contract.classes, hidden=m.hidden, seed=m.seed),
        optimizer=optimizer_of(federation),
        contract_hash=contract.hash,
        capacity=p.capacity,
        rows_per_person=None if p.mode == "client" else contract.rows_per_person,
        sample_rate=p.sample_rate,
        local_steps=p.local_steps,
        local_batch=p.local_batch,
        reveal_to=p.reveal_to,
        few_clients=p.few_clients,
        committee=p.committee,
        committee_seed=p.committee_seed,
        colluders=p.colluders,
        dropouts=p.dropouts,
    )


def optimizer_of(federation: Federation) -> Optimizer:
    """What the settings say of the optimiser, as a plan holds it: a schedule is a table there.

    Raises:
        PlanError: the schedule is no table.
    """
    said = federation.optimizer.model_dump()
    return Optimizer(**said | {"schedule": schedules.table(said["schedule"], federation.privacy.steps)})


def plan_of_statistics(
    federation: Federation, contract: DataContract, sites: int, spec: StatsSpec, *, epsilon: float | None = None
) -> PrivacyPlan:
    """The plan of a run of statistics: one sum over all records, the clip being the longest vector there can be.

    Args:
        spec: what is asked for (:func:`fedveil.common.workload.statistics.request`).
        epsilon: ε of the run; by default what federation.toml says for a training run: ε, or σ for this one sum.

    Raises:
        PlanError: with the reason and the nearest consistent plan.
    """
    p = federation.privacy
    return make_plan(
        mode=p.mode,
        sum=p.sum,
        sites=sites,
        records=p.records,
        epsilon=p.epsilon if epsilon is None else epsilon,
        noise_multiplier=p.noise_multiplier if epsilon is None else None,
        delta=p.delta,
        steps=1,
        clip=spec.norm_bound,
        model=spec,
        optimizer=Optimizer(learning_rate=1.0, momentum=0.0),  # there is no step; the field is the plan's
        contract_hash=contract.hash,
        capacity=p.capacity,
        rows_per_person=None if p.mode == "client" else contract.rows_per_person,
        colluders=p.colluders,
        dropouts=p.dropouts,
    )


@dataclass(frozen=True)
class Forecast:
    """What a plan will cost and give, before anything runs.

    Attributes:
        filter_epsilon: smallest cap of a site's ledger that carries every planned step.
        noise_per_parameter: standard deviation of the noise in one coordinate of the averaged gradient, divided by
            the clip, when every site answers.
        noise_to_signal: L2 norm of that noise over all parameters, divided by the clip: the averaged gradient is at
            most one clip long.
        bytes_per_parameter: what a site sends per parameter and step under ``keysum``; None for other sums.
        epsilon_replace_one: ε of all steps between data sets that differ in one replaced record.
        places: of a step at a site that holds an even share of the declared records.
        padding: how many places are computed for each record that is sampled there, on average.
        cap, affordable: a cap that was asked about, and the steps of this plan that it carries.
        spent, left: of a ledger that was asked about, ε spent so far, and the steps of this plan that it still carries.
        warnings: sentences.
    """

    plan: PrivacyPlan
    epsilon_rdp: float
    filter_epsilon: float
    noise_per_parameter: float
    noise_to_signal: float
    bytes_per_parameter: float | None
    epsilon_replace_one: float
    places: int
    padding: float
    cap: float | None
    affordable: int | None
    spent: float | None
    left: int | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON form for programs."""
        p = self.plan
        return {
            "plan": p.to_json(),
            "plan_hash": p.hash,
            "epsilon_pld": p.claim,
            "epsilon_rdp": self.epsilon_rdp,
            "epsilon_replace_one": self.epsilon_replace_one,
            "filter_epsilon": self.filter_epsilon,
            "fallback_epsilon": p.fallback,
            "honest": p.honest,
            "members": p.members,
            "threshold": p.threshold,
            "noise_per_parameter": self.noise_per_parameter,
            "noise_to_signal": self.noise_to_signal,
            "bytes_per_parameter": self.bytes_per_parameter,
            "places": self.places,
            "padding": self.padding,
            "cap": self.cap,
            "affordable_steps": self.affordable,
            "ledger_spent": self.spent,
            "ledger_affordable_steps": self.left,
            "warnings": list(self.warnings),
        }


def forecast(plan: PrivacyPlan, *, cap: float | None = None, ledger: Tally | None = None) -> Forecast:
    """Everything ``fedveil plan`` prints.

    Args:
        plan: a checked plan.
        cap: ε of a site's ledger that has spent nothing yet, at the plan's δ.
        ledger: what a site's ledger adds up to.

    Raises:
        PlanError: no cap carries the plan, or the ledger was opened for another δ or unit.
    """
    f = ledger.filter if ledger else None
    if ledger and f and (f.delta, ledger.unit) != (plan.delta, plan.unit):
        raise PlanError(
            f"the ledger counts each {ledger.unit} at delta = {f.delta:g}, the plan each {plan.unit} at {plan.delta:g}",
            hint="a site refuses such a plan",
        )
    each = _noise_per_parameter(plan)
    share = min(plan.capacity, math.ceil(plan.records / plan.sites))
    fresh = Filter(cap, plan.delta, best_order(cap, plan.delta)) if cap is not None else None
    return Forecast(
        plan,
        epsilon_rdp([(plan.event, plan.steps)], plan.delta),
        plan.filter_epsilon(),
        each,
        each * math.sqrt(plan.model.parameters),
        COEFFICIENT_BYTES / values_per_coefficient(plan.bound) if plan.sum == "keysum" else None,
        plan.claim_replace_one,
        plan.places(share),
        plan.places(share) / (plan.event.sample_rate * (1 if plan.mode == "client" else share)),
        cap,
        fresh.affords(plan.event) if fresh else None,
        ledger.epsilon if ledger else None,
        ledger.affords(plan.event) if f and ledger else None,
        warnings(plan),
    )


def values_per_coefficient(bound: int) -> int:
    """How many sums in ±``bound`` fit side by side into one coefficient of the secure sum (at least 1)."""
    return max(1, math.floor(MODULUS_BITS / math.log2(2 * bound + 1)))


def _noise_per_parameter(plan: PrivacyPlan) -> float:
    total = plan.noise_multiplier * plan.sensitivity * math.sqrt(plan.sites / plan.honest)
    return total / plan.divisor / plan.clip / plan.noisy_steps


def warnings(plan: PrivacyPlan) -> tuple[str, ...]:
    """What somebody should hear before a run of ``plan`` begins, one sentence each."""
    out: list[str] = []
    noise_to_signal = _noise_per_parameter(plan) * math.sqrt(plan.model.parameters)
    if plan.epsilon > HIGH_EPSILON:
        out.append(f"epsilon = {plan.epsilon:g} is more than {HIGH_EPSILON:g}: a formality rather than a protection")
    if plan.fallback > HIGH_FALLBACK:
        out.append(
            f"the fallback epsilon of {plan.fallback:.0f} is above {HIGH_FALLBACK:g}, which sites refuse by default"
        )
    if plan.task == "train" and noise_to_signal > NOISY:
        out.append(
            f"each step's noise is {noise_to_signal:.3g} times the longest possible gradient: more records, a larger "
            "epsilon, fewer parameters or fewer, larger steps"
        )
    if plan.sum == "sharedkey":
        out.append("sum = 'sharedkey': one curious site together with the server reads every update")
    if plan.mode != "local" and plan.colluders == 0:
        out.append("colluders = 0: a site that knows its own share of the noise sees a sum with too little of it")
    return tuple(out)
