"""The site's own limits: what a server may ask for, and when. It refuses; it never adjusts a plan silently."""

from __future__ import annotations

import datetime
import logging
import zoneinfo
from functools import lru_cache

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, PolicyRefusal
from fedveil.common.settings import WEEK, LimitsSection, window
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy.plan import PrivacyPlan

_LOG = logging.getLogger("fedveil.client")
_HINT = "change the plan, or ask the site's owner to change site.toml"


def check(plan: PrivacyPlan, limits: LimitsSection) -> None:
    """Raise :class:`PolicyRefusal` naming the first limit that ``plan`` breaks.

    The cap on ε over all runs is not checked here: the ledger enforces it step by step.
    """
    if text := _broken(plan, limits):  # type: ignore[arg-type]  # frozen pydantic models are hashable
        raise PolicyRefusal(text, hint=_HINT)


def check_hours(limits: LimitsSection, now: datetime.datetime | None = None) -> None:
    """Raise :class:`PolicyRefusal` outside the site's working hours.

    Args:
        now: with a time zone; by default the machine's clock.
    """
    if not limits.hours and set(limits.days) == set(WEEK):
        return
    local = (now or datetime.datetime.now(datetime.UTC)).astimezone(zoneinfo.ZoneInfo(limits.timezone))
    day = local.date()
    inside = True
    if limits.hours:
        first, last = window(limits.hours)
        at = local.time()
        inside = first <= at < last if first < last else at >= first or at < last
        if first > last and at < last:  # after midnight the window is the one that began the evening before
            day -= datetime.timedelta(days=1)
    if not inside or WEEK[day.weekday()] not in limits.days:
        raise PolicyRefusal(
            f"this site takes part only on {', '.join(limits.days)}, {limits.hours or 'all day'} ({limits.timezone})",
            hint="start or resume the run in that time",
        )


def check_contract(contract: DataContract, limits: LimitsSection) -> None:
    """Raise :class:`AnonymityError` for a data contract that asks for less anonymity than the site's floor."""
    for broken, text in (
        (contract.k < limits.min_k, f"k = {contract.k} is below this site's minimum, {limits.min_k}"),
        (contract.l < limits.min_l, f"l = {contract.l} is below this site's minimum, {limits.min_l}"),
        (
            limits.max_t is not None and (contract.t is None or contract.t > limits.max_t),
            f"t = {contract.t} is not within this site's maximum, {limits.max_t}",
        ),
    ):
        if broken:
            raise AnonymityError(
                f"the data contract's {text}", hint="agree on another contract, or change [limits] in site.toml"
            )


def tell_of_a_short_budget(plan: PrivacyPlan, affordable: int) -> None:
    """Say in the site's own log, and nowhere else, that its ledger will stop it before the plan is carried out.

    This is no reason to refuse, because a spent budget is a normal ending. A cap that equals the plan's ε is already
    too small: a filter over runs that may depend on each other counts more than the accountant of one run.
    """
    if affordable < plan.steps and _LOG.isEnabledFor(logging.INFO):
        _LOG.info(
            "the budget pays for %d of the plan's %d steps: this site will stop there; all steps need %.4g left under "
            "the cap, not %.4g ('fedveil plan' shows this before a run)",
            affordable, plan.steps, plan.filter_epsilon(), plan.epsilon,
        )  # fmt: skip


def metrics_of(spec: StatsSpec) -> tuple[str, ...]:
    """The names of the statistics that a spec opens, as ``[limits] metrics`` lists them."""
    found = ["count"]
    if any(c.moments for c in spec.columns):
        found.append("mean")
    if any(c.moments == 2 for c in spec.columns):
        found.append("variance")
    if any(c.histogram for c in spec.columns):
        found.append("histogram")
    if spec.metric is not None:
        found += ["accuracy", "confusion"] if spec.metric.confusion else ["accuracy"]
    return tuple(found)


@lru_cache(maxsize=256)
def _broken(plan: PrivacyPlan, limits: LimitsSection) -> str:
    """The first limit that the plan breaks, in words; empty if none. Called again for every answer."""
    per_run = min(limits.max_epsilon, limits.max_epsilon_per_run or limits.max_epsilon)
    shared = plan.mode != "local"
    for broken, text in (
        (plan.task not in limits.tasks, f"task {plan.task!r} is not among the tasks this site allows"),
        (plan.mode not in limits.modes, f"mode {plan.mode!r} is not among the modes this site allows"),
        (plan.sum not in limits.sums, f"sum {plan.sum!r} is not among the sums this site allows"),
        (plan.delta > limits.delta, f"delta = {plan.delta:g} is above this site's limit, {limits.delta:g}"),
        (plan.epsilon > per_run, f"epsilon = {plan.epsilon:g} is above this site's limit for one run, {per_run:g}"),
        (
            plan.noise_multiplier < limits.min_noise_multiplier,
            f"noise multiplier {plan.noise_multiplier:g} is below this site's minimum, {limits.min_noise_multiplier:g}",
        ),
        (plan.sites < limits.min_sites, f"{plan.sites} sites are fewer than this site's minimum, {limits.min_sites}"),
        (
            shared and plan.honest < limits.min_honest,
            f"{plan.honest} honest shares are fewer than this site's minimum, {limits.min_honest}",
        ),
        (
            shared and plan.colluders < limits.min_colluders,
            f"the plan withstands t = {plan.colluders} colluders, this site asks for {limits.min_colluders} or more",
        ),
        (plan.committee > 0 and not limits.committee, "this site does not let a committee open sums"),
    ):
        if broken:
            return text
    return _unlisted(plan, limits) or _fallback(plan, limits)


def _unlisted(plan: PrivacyPlan, limits: LimitsSection) -> str:
    if limits.plans and plan.hash not in limits.plans:
        return f"the plan {plan.hash} is not among the plans this site allows"
    if limits.models and plan.workload_hash not in limits.models:
        return f"the model {plan.model.name!r} ({plan.workload_hash}) is not among the models this site allows"
    if isinstance(plan.model, StatsSpec):
        asked = [m for m in metrics_of(plan.model) if m not in limits.metrics]
        if asked:
            return f"statistic {asked[0]!r} is not among the metrics this site allows"
    return ""


def _fallback(plan: PrivacyPlan, limits: LimitsSection) -> str:
    """Checked last, because it needs an accountant."""
    if plan.fallback > limits.max_fallback_epsilon:
        return f"the fallback epsilon {plan.fallback:.3g} is above this site's limit, {limits.max_fallback_epsilon:g}"
    return ""
