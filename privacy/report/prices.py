"""What a plan's steps cost, from the raw numbers of ``plan.json``: the verifier's own arithmetic.

The code that charged asked :class:`fedveil.privacy.plan_figures.PlanFigures`. A mistake there stands in every ledger
and in the report alike. So nothing here is taken from it, from a plan object or from a network's own count of its
parameters: only the file's numbers and these formulas (symbols as there)::

    h = n - t - d    (1 in mode local)          q = sample_rate
    β = δ·10^-6 / S  (0 for q = 1, and in mode client, where P = 1)
    P: the fewest places that K - 1 others outgrow with at most β
    Δ = C·(1 + ρ) + √D·γ·(1 + 2^-6),  ρ = 2·m·d·u / (1 - d·u),  m = P + 1024,  u = 2^-53,
    d = min(m, 2^20) + ⌈m / 1024⌉ + 4
    (in mode local: Δ times K = local_steps, for as many noisy steps)
    one site's share of the noise, in grid units: σ·Δ / (γ·√h)

(docs/sensitivity.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedveil.common import fields
from fedveil.common.errors import VerificationError

_ASIDE = 1e-6  # the part of δ for samples that outgrow their places
TOGETHER = 5  # units of one group that a step has places for
_CLOSE = 1e-9
_WHERE = "plan.json"


@dataclass(frozen=True)
class Prices:
    """The numbers that a claim is made of.

    Attributes:
        rate, noise: q and σ of one step.
        honest: h, how many shares of noise are counted on.
        members: n - d, the fewest sites of a sum.
        repeats: K, the noisy steps that a site adds up in a round.
        parameters: D, counted from the layers that the plan names; None for a workload that is not known here.
        sensitivity: Δ, of one site's sum on the grid, in the clip's unit; None without D.
        share: standard deviation of one site's noise in grid units; None without D.
    """

    mode: str
    sites: int
    colluders: int
    dropouts: int
    steps: int
    delta: float
    rate: float
    noise: float
    honest: int
    members: int
    clip: float
    grid: float
    records: int
    capacity: int
    parameters: int | None
    repeats: int = 1

    @property
    def overflow(self) -> float:
        """The chance that a step's sample outgrows its places."""
        return 0.0 if self.rate == 1 or self.mode == "client" else _ASIDE * self.delta / self.steps

    def left(self, steps: int) -> float:
        """δ without the chance that one of so many samples outgrew its places."""
        return self.delta - steps * self.overflow

    def left_for(self, units: int) -> float:
        """δ for so many units that come together: places are made for :data:`TOGETHER`; for more nothing is left."""
        return self.left(self.steps) if not self.overflow or units <= TOGETHER else 0.0

    @property
    def places(self) -> int:
        """P, at a site of the largest capacity."""
        return 1 if self.mode == "client" else _places(self.capacity, self.rate, self.overflow)

    @property
    def sensitivity(self) -> float | None:
        """See the class."""
        if not self.parameters:
            return None
        most = self.places + 1024
        lost = (min(most, 1 << 20) + -(-most // 1024) + 4) * 2.0**-53
        wide = math.sqrt(self.parameters) * self.grid * (1 + 2.0**-6)
        return self.repeats * (self.clip * (1 + 2 * most * lost / (1 - lost)) + wide)

    @property
    def share(self) -> float | None:
        """See the class."""
        wide = self.sensitivity
        return None if wide is None else self.noise * wide / (self.grid * math.sqrt(self.honest))

    @property
    def own_noise(self) -> float:
        """σ of a site's own share alone."""
        return self.noise / math.sqrt(self.honest)

    def realised(self, members: int) -> float:
        """σ of a sum of so many sites, t of which are ruled out (none in mode ``local``)."""
        left = members if self.mode == "local" else members - self.colluders
        return self.noise * math.sqrt(max(left, 0) / self.honest)


def read(value: Any) -> Prices:
    """The prices of a plan, from its JSON.

    Raises:
        VerificationError: a number is missing or out of bounds, or no honest share is left.
    """
    p = fields.mapping(value, _WHERE)
    whole = lambda key, low=0: fields.integer(p, key, _WHERE, low=low)  # noqa: E731
    real = lambda key, high=1e12: fields.number(p, key, _WHERE, low=5e-324, high=high)  # noqa: E731
    mode, n, t, d = fields.text(p, "mode", _WHERE), whole("sites", 1), whole("colluders"), whole("dropouts")
    honest = 1 if mode == "local" else n - t - d
    if honest < 1 or n - d < 1:
        raise VerificationError(f"{_WHERE}: {n} sites, {t} colluders and {d} drop-outs leave no honest share of noise")
    return Prices(
        mode=mode, sites=n, colluders=t, dropouts=d, steps=whole("steps", 1), delta=real("delta", 1),
        rate=real("sample_rate", 1), noise=real("noise_multiplier"), honest=honest,
        members=n - d, clip=real("clip"), grid=real("grid"), records=whole("records", 1),
        capacity=whole("capacity", 1), repeats=whole("local_steps", 1) if mode == "local" else 1,
        parameters=_parameters(fields.mapping(p.get("model"), f"{_WHERE}: model")),
    )  # fmt: skip


def charge(prices: Prices, event: Any) -> str:
    """What is wrong with the event of a ledger's row as the price of one step; empty if nothing is."""
    if not isinstance(event, dict) or event.get("event") != "sampled-gaussian":
        return "it is no sampled Gaussian"
    own = {"sample_rate": prices.rate, "noise_multiplier": prices.noise, "overflow": prices.overflow}
    for key, value in own.items():
        if not _same(event.get(key, 0.0), value):
            return f"{key} = {str(event.get(key))[:32]}, {_WHERE} gives {value:.9g}"
    return ""


def stated(payload: Mapping[str, Any], prices: Prices) -> str:
    """The report's figures of trust and mechanism are the ones that follow from the plan's numbers.

    Raises:
        VerificationError: naming every one that does not.
    """
    p = prices
    divisor = p.rate * (p.sites if p.mode == "client" else p.records)
    own: dict[str, dict[str, float | None]] = {
        "trust": {
            "sites": p.sites, "colluders": p.colluders, "dropouts": p.dropouts, "honest": p.honest,
            "members": p.members,
        },
        "mechanism": {
            "clip": p.clip, "grid": p.grid, "noise_multiplier": p.noise, "sample_rate": p.rate,
            "fallback_noise_multiplier": p.own_noise, "records_declared": p.records, "divisor": divisor,
            "sensitivity": p.sensitivity, "share_std_in_grid_units": p.share,
        },
        "steps": {"planned": p.steps}, "model": {"parameters": p.parameters},
    }  # fmt: skip
    wrong = []
    for part, figures in own.items():
        found = fields.mapping(payload.get(part), f"the report's {part}")
        wrong += [
            f"{part}: {key} is stated as {str(found.get(key))[:32]}, {_WHERE} gives {value:.9g}"
            for key, value in figures.items()
            if value is not None and not _same(found.get(key), value)
        ]
    if wrong:
        raise VerificationError("; ".join(wrong))
    counted = "not counted here" if p.parameters is None else f"{p.parameters}"
    share = "" if p.share is None else f", a share of noise {p.share:.6g} grid units"
    return f"q = {p.rate:g}, sigma = {p.noise:.6g}, h = {p.honest}, D = {counted}{share}"


def _places(capacity: int, rate: float, overflow: float) -> int:
    """The fewest places, by doubling steps down from K, for which Chernoff's exponent is large enough."""
    if rate == 1 or capacity < 2:
        return capacity
    others, needed = capacity - 1, -math.log(overflow) + 1e-3 + (capacity - 1) * 4e-16

    def enough(places: int) -> bool:
        if places >= capacity:
            return True
        a = places / others
        if a <= rate:
            return False
        rest = 0.0 if places == others else (1 - a) * math.log((1 - a) / (1 - rate))
        return others * (a * math.log(a / rate) + rest) >= needed

    places, step = capacity, 1 << capacity.bit_length()
    while step:
        if places - step >= 1 and enough(places - step):
            places -= step
        else:
            step >>= 1
    return min(capacity, places + TOGETHER - 1)


def _same(found: Any, own: float) -> bool:
    return type(found) in (int, float) and math.isclose(found, own, rel_tol=_CLOSE)


# -- how many numbers a sum has ---------------------------------------------------------------------------------------


def _parameters(model: Mapping[str, Any]) -> int | None:
    """D, by adding up the layers; None for a name that is not known here."""
    name, where = fields.text(model, "name", _WHERE), f"{_WHERE}: model"
    if name == "stats":
        return _answers(model)
    inputs, classes = (fields.integer(model, key, where, low=1, high=1 << 24) for key in ("inputs", "classes"))
    hidden = model.get("hidden", [])
    if (
        not isinstance(hidden, list)
        or len(hidden) > 16
        or any(type(x) is not int or not 1 <= x <= 1 << 24 for x in hidden)
    ):
        raise VerificationError(f"{where}: hidden is not a short list of whole numbers")
    try:
        return _network(name, inputs, classes, hidden)
    except (ValueError, IndexError) as e:
        raise VerificationError(f"{where}: {name[:32]} has another number of hidden values") from e


def _network(name: str, inputs: int, classes: int, hidden: list[int]) -> int | None:
    if name.startswith("lora-"):
        rank, *inner = hidden
        return rank * sum(n * (i + o) for n, i, o in _dense(name.removeprefix("lora-"), inputs, classes, inner))
    if name in ("logistic", "mlp"):
        return _affine(*_dense(name, inputs, classes, hidden))
    if name == "cnn":
        a, b = hidden
        return a * (5 * 5 + 1) + b * (3 * 3 * a + 1) + _affine((1, b * (math.isqrt(inputs) // 4) ** 2, classes))
    if name == "resnet":
        channels, *stages = hidden
        total = stages[0] * (3 * 3 * channels) + 2 * stages[0]  # the first convolution, and a norm's scale and shift
        for i, (before, now) in enumerate(zip([stages[0], *stages], stages, strict=False)):
            skip = before * now if i or before != now else 0
            total += 3 * 3 * now * (before + now) + 2 * 2 * now + skip
        return total + _affine((1, stages[-1], classes))
    if name == "transformer":
        vocabulary, width, _, blocks = hidden
        norms = 2 * width * (2 * blocks + 1)
        return (vocabulary + inputs) * width + norms + _affine(*_dense(name, inputs, classes, hidden))
    if name == "lstm":
        vocabulary, width, units = hidden
        gates = 4 * units * (width + units + 1)
        return vocabulary * width + gates + _affine((1, units, classes))
    return None


def _dense(name: str, inputs: int, classes: int, hidden: list[int]) -> list[tuple[int, int, int]]:
    """How many dense layers of which inputs and outputs there are."""
    if name == "transformer":
        _, width, _, blocks = hidden
        block = [(blocks, width, wide * width) for wide in (3, 1, 4)]
        return [*block, (blocks, 4 * width, width), (1, width, classes)]
    widths = [inputs, *hidden, classes]
    return [(1, i, o) for i, o in pairwise(widths)]


def _affine(*layers: tuple[int, int, int]) -> int:
    return sum(n * (i + 1) * o for n, i, o in layers)


def _answers(spec: Mapping[str, Any]) -> int:
    """How many numbers are asked for: the count, and what is asked about each column and about a model."""
    where, total = f"{_WHERE}: model", 1
    columns = spec.get("columns", [])
    if not isinstance(columns, list):
        raise VerificationError(f"{where}: columns is not a list")
    for column in columns:
        c = fields.mapping(column, f"{where}: a column")
        moments, missing = fields.integer(c, "moments", where, high=2), bool(c.get("missing"))
        total += moments + (missing if moments else 0)
        if c.get("histogram"):
            labels, cuts = c.get("labels", ()), c.get("cuts", ())
            total += (len(labels) or len(cuts) + 1) + missing
    metric = spec.get("metric")
    if metric is not None:
        classes = fields.integer(spec, "classes", where, low=2)
        total += 1 + (classes**2 if fields.mapping(metric, where).get("confusion") else 0)
    return total
