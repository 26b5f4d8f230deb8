"""The sentences of a report. Each follows from the plan alone, so that a verifier can write them again."""

from __future__ import annotations

from fedveil.privacy.plan import PrivacyPlan

SIMULATED = "SIMULATED: every site ran on one machine, in one hand. Nothing real was protected; for study only."


def result(plan: PrivacyPlan) -> str:
    """What a run gives away."""
    return "statistics" if plan.task == "stats" else "model"


def protects(plan: PrivacyPlan) -> str:
    """Whose presence is hidden."""
    return "a whole client with all it holds" if plan.mode == "client" else "every single record of every site"


def against(plan: PrivacyPlan) -> list[str]:
    """From whom, one line each."""
    receiver = f"whoever receives the {result(plan)}" + (", or any model of the run" if plan.task == "train" else "")
    if plan.mode == "local":
        return ["the server", "all other sites, even if they all work together", receiver, "outsiders"]
    if plan.sum == "plain":
        return ["nobody in this run, for the sums were in the clear; a real run would name the server here", receiver]
    if plan.sum == "sharedkey":
        others = [f"{_others(plan)}, as long as the server is not with them"] if plan.colluders else []
        return ["the server, as long as no site works with it", *others, receiver, "outsiders"]
    others = [f"{_others(plan)} working together with it"] if plan.colluders else []
    return ["the server", *others, receiver, "outsiders"]


def claim(plan: PrivacyPlan) -> str:
    """The claim in one sentence."""
    unit = "client" if plan.mode == "client" else "record"
    numbers = f"ε = {plan.claim:.4g} (at δ = {plan.delta:g}) allows"
    if plan.mode == "local":
        return f"Nobody, not even all other participants together, learns more about one {unit} than {numbers}."
    if plan.sum == "plain":
        return f"Whoever receives only the {result(plan)} learns no more about one {unit} than {numbers}."
    if plan.sum == "sharedkey":
        sites = f"nor {_others(plan)} without the server, " if plan.colluders else ""
        return (
            f"Neither the server alone, {sites}nor whoever gets the "
            f"{result(plan)}, learns more about one {unit} than {numbers}."
        )
    if not plan.colluders:
        # A site that takes part knows its own share of the noise: with t = 0 nothing is claimed against it.
        return (
            f"Neither the server by itself, nor an outsider, nor whoever gets the {result(plan)}, learns more about "
            f"one {unit} than {numbers}. Against another site of the run nothing is claimed (t = 0)."
        )
    together = f" together with {_others(plan)}"
    return (
        f"Nobody, not even the server{together}, nor whoever gets the "
        f"{result(plan)}, learns more about one {unit} than {numbers}."
    )


def _others(plan: PrivacyPlan) -> str:
    return "one of the other sites" if plan.colluders <= 1 else f"up to {plan.colluders} of the other sites"


def fallback(plan: PrivacyPlan, epsilon: float) -> str:
    """What remains when the trust above is broken."""
    if plan.mode == "local":
        return "The claim needs no trust in anybody else, so there is no weaker fallback."
    return (
        f"If everybody else were against a site (server, outsiders and all other sites together), its own share of the "
        f"noise still leaves ε = {epsilon:.4g} for its {plan.unit}s."
    )


def replace_one(plan: PrivacyPlan, epsilon: float) -> str:
    """The same promise under the other relation between data sets."""
    return (
        f"ε above compares tables with and without one {plan.unit}. Between tables in which one {plan.unit} is "
        f"replaced by another, the same noise leaves ε = {epsilon:.4g} (at the same δ)."
    )


def attack(rates: list[tuple[float, float]]) -> str:
    """The trade-off curve in plain words."""
    parts = [
        f"with at most {100 * f:g} false alarms in 100, it finds at most {100 * t:.1f} of 100 members" for f, t in rates
    ]
    return "Of any test, however clever, that guesses whether one record took part: " + "; ".join(parts) + "."


def tuning(earlier: dict[str, int]) -> str:
    """Whether hyper-parameter trials were counted."""
    n = max(earlier.values(), default=0)
    if n == 0:
        return "No earlier session was charged to any of these ledgers: this run was not tuned on the private records."
    return (
        f"Every trial on private records is a session of its own and is charged: up to {n} earlier sessions stand in "
        "these ledgers. ε above is this run's alone; the filter's ε per site covers all of them."
    )


def public_data(plan: PrivacyPlan) -> list[str]:
    """What was used without being charged, because it is public."""
    shared = [
        "the data contract: columns, bounds, categories and levels; none of them was taken from the records",
        f"the declared number of records, {plan.records}: a constant of the plan, not a count",
    ]
    if plan.task == "stats":
        return [
            *shared,
            "which statistics were asked for; the weights of a model that was evaluated (charged where it was trained)",
        ]
    return [
        *shared,
        "the initial weights, drawn from a public seed",
        "the table on which the metrics of this report were computed; it belongs to no site",
    ]


def covered(plan: PrivacyPlan) -> list[str]:
    """What ε speaks of."""
    return [
        f"all {plan.steps} planned steps, aborted ones included, at exactly {plan.honest} honest shares of noise",
        "all statistics together (one joint sensitivity), and anything computed from them"
        if plan.task == "stats"
        else "every model of the run, the final one included, and anything computed from them",
        f"adding or removing one {plan.unit} of the released tables",
    ]


def not_covered(plan: PrivacyPlan, missing: list[str]) -> list[str]:
    """What ε does not speak of."""
    out = [
        f"several {plan.unit}s that belong to one person, at one site or at many: they compose to more than ε",
        "who took part, when, in how many rounds; the plan, the contract and the declared number of records",
        "that a table met its criteria or a site refused: one bit each, not counted in ε",
        "when answers leave (timing), and what a site publishes elsewhere from the same records",
        "wrong or malicious inputs: a site can spoil the model within the clip; that harms accuracy, not privacy",
        "whether a site's program added the noise it was charged for: journals prove the charge, and "
        "nothing in this report measures the noise",
        "what the server alone writes: that these were the members of a sum, and the metrics on the public table",
        f"conclusions about people in general: the {result(plan)} should teach them, with or without one record",
    ]
    if missing:
        out.insert(0, f"the ledgers of {', '.join(missing)}: not delivered, so their earlier spending is not shown")
    return out


def deviations(plan: PrivacyPlan, simulated: bool) -> list[str]:
    """Where the program differs from the mathematics, known and stated."""
    share = f"{plan.share_std:.0f}"
    out = [
        f"The noise is discrete Gaussian on an integer grid ({share} grid units per share) and is accounted as "
        "continuous Gaussian (Kairouz, Liu & Steinke 2021 bound the difference).",
        "Bernoulli trials compare 53 random bits with a double instead of exact rationals (below 1e-6 in ε over "
        "10^9 coordinates).",
        "Gradients are clipped in floating point; the sensitivity is widened by a relative 1e-6 for that.",
    ]
    if plan.event.sample_rate < 1:
        out.append(
            "The Gaussian privacy loss distribution for Poisson-sampled discrete noise is a numerical model, "
            "not a theorem (for q = 1 it is proven). Sampling probabilities are exact to 2^-64."
        )
    if plan.sum == "keysum":
        out.append(
            "The security of the secure sum rests on an argument (Ring-LWE with hints: the sum of the keys and of the "
            "errors is revealed), not on a complete proof."
        )
    if plan.sum == "sharedkey":
        out.append(
            "WEAK SUM: all sites hold one decryption key. One curious site working with the server reads every "
            "update; then only the fallback ε holds."
        )
    if plan.sum == "none":
        out.append("There is no secure sum: the server sees every update, protected by the site's own noise alone.")
    if plan.sum == "plain":
        out.append("The sums of this run were computed in the clear.")
    if plan.mode == "client" and plan.few_clients:
        out.append("Fewer clients than this mode is meant for were insisted upon: the noise may drown the model.")
    if simulated:
        out.insert(0, SIMULATED)
    return out
