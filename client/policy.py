"""The site's own limits: what a server may ask for. It refuses; it never adjusts a plan silently."""

from __future__ import annotations

from fedveil.common.errors import PolicyRefusal
from fedveil.common.settings import LimitsSection
from fedveil.privacy.plan import PrivacyPlan


def check(plan: PrivacyPlan, limits: LimitsSection) -> None:
    """Raise :class:`PolicyRefusal` naming the first limit that ``plan`` breaks.

    The cap on ε over all runs is not checked here: the ledger enforces it step by step.
    """
    for broken, text in (
        (plan.task not in limits.tasks, f"task {plan.task!r} is not among the tasks this site allows"),
        (plan.mode not in limits.modes, f"mode {plan.mode!r} is not among the modes this site allows"),
        (plan.sum not in limits.sums, f"sum {plan.sum!r} is not among the sums this site allows"),
        (plan.delta > limits.delta, f"delta = {plan.delta:g} is above this site's {limits.delta:g}"),
        (plan.epsilon > limits.max_epsilon, f"epsilon = {plan.epsilon:g} is above this site's {limits.max_epsilon:g}"),
        (
            plan.noise_multiplier < limits.min_noise_multiplier,
            f"noise multiplier {plan.noise_multiplier:g} is below this site's {limits.min_noise_multiplier:g}",
        ),
        (plan.sites < limits.min_sites, f"{plan.sites} sites are fewer than this site's {limits.min_sites}"),
        (
            plan.mode != "local" and plan.honest < limits.min_honest,
            f"{plan.honest} honest shares are fewer than this site's {limits.min_honest}",
        ),
        (
            plan.mode != "local" and plan.colluders < limits.min_colluders,
            f"{plan.colluders} colluding sites are fewer than the {limits.min_colluders} this site wants stood",
        ),
        (plan.committee > 0 and not limits.committee, "this site does not let a committee open sums"),
        (
            plan.fallback > limits.max_fallback_epsilon,
            f"the fallback epsilon {plan.fallback:.3g} is above this site's {limits.max_fallback_epsilon:g}",
        ),
    ):
        if broken:
            raise PolicyRefusal(text, hint="change the plan, or ask the site's owner to change site.toml")
