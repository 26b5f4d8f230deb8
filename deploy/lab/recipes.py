"""Hyper-parameters for a simulation that names none: what was found on bundled data, and a proposal for any other.

Everything here was chosen on held-out parts of training records, never on a test table.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

from fedveil.common.errors import PlanError, UsageError


@dataclass(frozen=True)
class Recipe:
    """What decides a training run besides data and ε.

    Attributes:
        network: a name that :class:`~fedveil.common.workload.model.ModelSpec` knows.
        hidden: what that class says for the network.
        why: in a sentence, for those that were proposed.
    """

    network: str
    hidden: tuple[int, ...]
    learning_rate: float
    clip: float
    sample_rate: float
    steps: int
    momentum: float = 0.9
    local_steps: int = 1
    why: str = ""

    def changed(self, **given: Any) -> Recipe:
        """This recipe with what is given and not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def __str__(self) -> str:
        shown = {
            k: v for k, v in asdict(self).items() if k not in ("why", "local_steps" if self.local_steps == 1 else "")
        }
        return ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in shown.items())


# Central DP-SGD's best values on digits (seeds from 100 up); a large sample rate and few steps matter most.
_DIGITS = {
    1.5: Recipe("mlp", (32,), 0.4, 0.5, 1.0, 60),
    3.0: Recipe("mlp", (32,), 0.4, 0.5, 1.0, 60),
    inf: Recipe("mlp", (32,), 0.2, 1.0, 1.0, 150),
}
_TRIVIAL = Recipe("logistic", (), 0.1, 1.0, 1.0, 3)
_DIABETES = Recipe("logistic", (), 1.0, 0.5, 1.0, 20)  # the demo's


def bundled(dataset: str, epsilon: float) -> Recipe | None:
    """The recipe of a bundled data set; None for any other."""
    if dataset == "digits":
        return next((r for limit, r in _DIGITS.items() if epsilon <= limit), _TRIVIAL)  # none for NaN
    return {"diabetes": _DIABETES, "trivial": _TRIVIAL}.get(dataset)


_HIDDEN: dict[str, tuple[int, ...]] = {"logistic": (), "mlp": (32,), "cnn": (16, 32), "lora-mlp": (8, 64)}


def usual_hidden(network: str, inputs: int) -> tuple[int, ...]:
    """What :class:`~fedveil.common.workload.model.ModelSpec` needs as ``hidden`` where nobody says it.

    Raises:
        UsageError: the network has no usual size.
    """
    if network == "resnet" and round(inputs**0.5) ** 2 == inputs:
        return 1, 8, 16
    if network not in _HIDDEN:
        raise UsageError(f"the network {network!r} needs its sizes", hint=f"hidden = {_NEEDED[network]}")
    return _HIDDEN[network]


_NEEDED = {
    "resnet": "image channels (1 or 3), then the width of each stage",
    "transformer": "vocabulary, width, heads, blocks",
    "lstm": "vocabulary, embedding width, units",
    "lora-transformer": "rank, vocabulary, width, heads, blocks",
}


@dataclass(frozen=True)
class Rule:
    """The constants of :func:`propose`; docs/bench-proposal.md shows where they come from.

    Attributes:
        steps: (largest ε, number of steps), in order.
        whole: up to so many records a step takes all of them.
        batch: expected records of a step beyond that.
        few: below so many records the network is linear.
        wander: how far the noise of all steps together may carry the weights, in L2 norm.
        fastest: the longest step: learning rate times clip.
    """

    steps: tuple[tuple[float, int], ...] = ((inf, 60),)
    whole: int = 20_000
    batch: int = 8192
    few: int = 2000
    wander: float = 2.4
    fastest: float = 0.25


RULE = Rule()


def propose(
    *, records: int, inputs: int, classes: int, epsilon: float, delta: float, parameters: int = 0, rule: Rule = RULE,
    steps: int | None = None, rate: float | None = None, clip: float | None = None, momentum: float | None = None,
) -> Recipe:  # fmt: skip
    """Hyper-parameters for ``records`` records in all, from public numbers alone.

    Few steps over many records: that is where DP-SGD gets most for its ε. The learning rate keeps the sum of all noise
    (a random walk of ``steps`` steps in D dimensions) within a fixed length.

    Args:
        parameters: D of the network, if it is known; by default that of the network proposed.
        steps, rate, clip, momentum: what was chosen already; the others are proposed for it.
    """
    from fedveil.privacy.dp.calibrate import noise_multiplier

    if not 0 < epsilon < inf:
        raise PlanError(f"epsilon = {epsilon!r} is not a budget", hint="a number above 0, such as 1 or 8")
    network, hidden = ("logistic", ()) if records < rule.few else ("mlp", (32,))
    widths = (inputs, *hidden, classes)
    size = parameters or sum(a * b + b for a, b in pairwise(widths))
    steps = steps or next(n for limit, n in rule.steps if epsilon <= limit)
    rate = rate or (1.0 if records <= rule.whole else round(rule.batch / records, 4))
    sigma = noise_multiplier(epsilon, delta, rate, steps)
    momentum, clip = 0.9 if momentum is None else momentum, clip or 0.5
    # Momentum makes each step's part 1 / (1 - momentum) times as long.
    walk = sigma * math.sqrt(steps * size) / (rate * records) / (1 - momentum)
    length = min(rule.fastest, rule.wander / walk)
    rate_of_learning = float(f"{length / clip:.2g}")
    return Recipe(
        network, hidden, rate_of_learning, clip, rate, steps, momentum,
        why=f"noise multiplier {sigma:.3g} over {size:,} parameters: all noise together moves the weights by about "
        f"{length * walk:.2g}",
    )  # fmt: skip
