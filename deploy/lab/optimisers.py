"""The optimiser of a simulation: what is asked for, and rates that are proposed where none is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import PlanError, UsageError
from fedveil.deploy.lab.recipes import RULE, Recipe

if TYPE_CHECKING:
    from fedveil.privacy.plan import Optimizer

_FASTEST = 0.1  # of an adaptive step, in every coordinate


def optimizer(asked: Mapping[str, Any], recipe: Recipe, parameters: int) -> Optimizer:
    """What the plan of a simulation holds.

    Args:
        asked: a simulation's settings by name (:class:`~fedveil.deploy.lab.simulate.Config`).
        parameters: D of the network.

    Raises:
        UsageError, PlanError: a schedule that is none.
    """
    from pydantic import ValidationError

    from fedveil.privacy.plan import Optimizer
    from fedveil.privacy.schedules import table

    given = {
        name: asked[name]
        for name in ("second_moment", "stabiliser", "server_rate", "averaging", "proximal")
        if asked[name] is not None
    }
    rate, name = recipe.learning_rate, asked["optimizer"]
    if name != "sgd" and asked["mode"] == "client":
        given.setdefault("server_rate", adaptive_rate(name, recipe.steps, parameters))
    elif name != "sgd" and asked["learning_rate"] is None:
        rate = adaptive_rate(name, recipe.steps, parameters)
    schedule = table(schedule_of(asked["schedule"]), recipe.steps)
    try:
        return Optimizer(name=name, learning_rate=rate, momentum=recipe.momentum, schedule=schedule, **given)  # type: ignore[arg-type]
    except ValidationError as e:
        said = "; ".join(f"{x['loc'][0]} = {str(x['input'])[:32]} ({x['msg']})" for x in e.errors(include_url=False))
        raise PlanError(f"the optimiser is out of bounds: {said}", hint="a value within its bound") from None


def adaptive_rate(name: str, steps: int, parameters: int) -> float:
    """A rate for an optimiser that divides by the root of the second moment, which under DP is mostly noise.

    Each step then moves a coordinate by about the rate (adagrad: the rate divided by the root of the step's number).
    The walk of all steps in D coordinates gets the length that :data:`~fedveil.deploy.lab.recipes.RULE` allows.
    """
    walk = parameters * (1 + math.log(steps) if name == "adagrad" else steps)
    return float(f"{min(_FASTEST, RULE.wander / math.sqrt(walk)):.2g}")


def schedule_of(text: Any) -> Any:
    """A schedule's name, or the table in ``1:1.0,40:0.1``.

    Raises:
        UsageError: other text.
    """
    if not isinstance(text, str) or ":" not in text:
        return text
    try:
        return tuple((int(step), float(factor)) for step, factor in (pair.split(":") for pair in text.split(",")))
    except ValueError:
        raise UsageError(
            f"--schedule {text[:64]!r} is no schedule", hint="constant, linear, cosine, or for example 1:1.0,40:0.1"
        ) from None
