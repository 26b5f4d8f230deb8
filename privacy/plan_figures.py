"""The fields of a privacy plan and the figures that follow from them.

Symbols: n sites, t colluders, d drop-outs, h = n - t - d honest shares, T the number of answers that open a sum,
q sample rate, S steps, C clip, σ noise multiplier, γ grid width, R clamp, D parameters, N the declared
number of units (records, or persons; a public constant: never the length of a data set), K the largest capacity of a
site (units that it may ever hold: public too), P places of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedveil.common import canonical
from fedveil.common.errors import PlanError
from fedveil.common.settings import MAX_SCHEDULE, MIN_DELTA, OptimizerName, Schedule
from fedveil.common.units import MAX_SITES
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy.dp import calibrate
from fedveil.privacy.dp.accounting import PLANNED_OVERFLOW, Filter, best_order, epsilon_pld, epsilon_replace_one
from fedveil.privacy.dp.events import MIN_SAMPLE_RATE, SampledGaussian
from fedveil.privacy.dp.places import places_needed
from fedveil.privacy.dp.rounding import ON_GRID, relative
from fedveil.privacy.grid import MODULUS_BITS, choose, largest_sum
from fedveil.privacy.secagg import committee as committees
from fedveil.privacy.secagg.params import modulus_bits

Mode = Literal["distributed", "local", "client"]
Sum = Literal["keysum", "sharedkey", "plain", "none"]
Unit = Literal["record", "person", "client"]
Workload = Annotated[ModelSpec | StatsSpec, Field(discriminator="name")]

MAX_CAP = 1e6  # of a ledger that could carry a plan


class Optimizer(BaseModel):
    """How the model moves on the opened sums, the same at server, sites and auditor: post-processing, without a price.

    Attributes:
        name: ``sgd`` with momentum; or ``adam`` (Kingma & Ba, ICLR 2015), ``yogi`` (Zaheer et al., NeurIPS 2018),
            ``adagrad`` (Duchi et al., JMLR 2011), as federated optimisers (Reddi et al., ICLR 2021).
        learning_rate: of the step on the averaged sum; in mode ``client`` of the descent at each client.
        momentum: of the first moment: of ``sgd`` the velocity's; of the others beta_1.
        second_moment: beta_2 of ``adam`` and ``yogi``.
        stabiliser: what is added to the root of the second moment.
        server_rate: mode ``client``: of the server's step on the averaged updates.
        schedule: pairs (step, factor), in order: from this step on the rate of the step on the sums is so many times as
            large. Before the first pair: 1.
        averaging: if above 0, the model that is evaluated and given out is an exponential average of the weights. After
            step k it keeps min(averaging, (1 + k) / (10 + k)) of itself.
        proximal: mode ``client``: FedProx (Li et al., MLSys 2020): each local step also goes so far back towards the
            round's start, times the learning rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: OptimizerName = "sgd"
    learning_rate: float = Field(gt=0, le=1e6)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    second_moment: float = Field(default=0.99, gt=0, lt=1)
    stabiliser: float = Field(default=1e-8, gt=0, le=1)
    server_rate: float = Field(default=1.0, gt=0, le=1e6)
    schedule: Schedule = Field(default=(), max_length=MAX_SCHEDULE)
    averaging: float = Field(default=0.0, ge=0, lt=1)
    proximal: float = Field(default=0.0, ge=0, le=1e6)

    @property
    def moments(self) -> int:
        """How many vectors a state holds beside the weights (and their average)."""
        return 1 if self.name == "sgd" else 2

    def factor(self, step: int) -> float:
        """By how much the schedule multiplies the rate of a step, counted from 1."""
        return next((factor for first, factor in reversed(self.schedule) if first <= step), 1.0)


class PlanFigures(BaseModel):
    """The fields of a plan, each in its own bounds, and what follows from them. It may still be inconsistent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    v: Literal[2] = 2
    mode: Mode
    unit: Unit
    sum: Sum
    adjacency: Literal["add-or-remove-one"] = "add-or-remove-one"
    sites: int = Field(ge=1, le=MAX_SITES)
    colluders: int = Field(ge=0)
    dropouts: int = Field(ge=0)
    records: int = Field(ge=1, le=1 << 48)
    capacity: int = Field(ge=1, le=1 << 48)
    rows_per_person: int = Field(default=1, ge=1, le=1 << 16)
    sample_rate: float = Field(ge=MIN_SAMPLE_RATE, le=1)
    steps: int = Field(ge=1, le=1 << 20)
    local_steps: int = Field(default=1, ge=1, le=1 << 16)
    local_batch: int = Field(default=0, ge=0, le=1 << 16)
    clip: float = Field(ge=1e-6, le=1e9)
    noise_multiplier: float = Field(gt=0, le=calibrate.MAX_NOISE_MULTIPLIER)
    epsilon: float = Field(gt=0, le=calibrate.MAX_EPSILON)
    delta: float = Field(ge=MIN_DELTA, le=0.01)
    grid: float = Field(gt=0, le=1e6)
    clamp: float = Field(gt=0, le=1e12)
    model: Workload
    workload_hash: str = Field(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")
    optimizer: Optimizer
    contract_hash: str = Field(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")
    few_clients: bool = False
    reveal_to: Literal["server", "sites"] = "server"
    committee: int = Field(default=0, ge=0, le=200)
    committee_seed: str = Field(default="", pattern="^([0-9a-f]{64})?$")

    @property
    def task(self) -> Literal["train", "stats"]:
        """What the sums are for: gradients of a network, or statistics."""
        return "stats" if isinstance(self.model, StatsSpec) else "train"

    @property
    def network(self) -> ModelSpec:
        """The network that is trained; :class:`PlanError` in a plan of statistics."""
        if isinstance(self.model, StatsSpec):
            raise PlanError("a plan of statistics trains no network")
        return self.model

    @property
    def simulated(self) -> bool:
        """True when the sum is not protected at all: results are for study only."""
        return self.sum == "plain"

    @property
    def honest(self) -> int:
        """h: how many shares of noise the claim counts on. One (a site's own) in mode ``local``."""
        return 1 if self.mode == "local" else self.sites - self.colluders - self.dropouts

    @property
    def members(self) -> int:
        """n - d: a sum of fewer sites is never opened."""
        return self.sites - self.dropouts

    @property
    def quorum(self) -> int:
        """t + d + 1: what so many distinct sites have signed, at least one honest site has signed."""
        return self.colluders + self.dropouts + 1

    @property
    def threshold(self) -> int:
        """T = floor((n + t) / 2) + 1: two sets can never both gather so many answers; a committee has its own."""
        if self.committee:
            return committees.committee(self.sites, self.colluders, self.dropouts, self.committee).threshold
        return (self.sites + self.colluders) // 2 + 1

    @property
    def noisy_steps(self) -> int:
        """K: so many gradient steps a site takes in a round by itself, each with noise of its own (mode ``local``).

        What it sends is their sum. Each is a Gaussian mechanism over all records, at σ·sqrt(K): together they cost what
        one costs at σ, which is :attr:`event`. 1 in other modes.
        """
        return self.local_steps if self.mode == "local" else 1

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of one site's sum on the grid, in the gradient's unit: C + sqrt(D)·γ, and what rounding adds.

        Of a round of several noisy steps: so many times as large. The proof is in ``docs/sensitivity.md``.
        """
        rounded = math.sqrt(self.model.parameters) * self.grid * ON_GRID
        return self.noisy_steps * (self.clip * (1 + relative(self.places(self.capacity))) + rounded)

    @property
    def overflow(self) -> float:
        """The chance, over all steps, that a site's sample outgrows its places; taken off δ. 0 without sampling."""
        sampled = self.mode != "client" and self.sample_rate < 1
        return PLANNED_OVERFLOW * self.delta if sampled else 0.0

    def places(self, capacity: int) -> int:
        """P: how many places a step has at a site of this capacity; one for a whole client."""
        if self.mode == "client":
            return 1
        return places_needed(capacity, self.sample_rate, self.overflow / self.steps)

    @property
    def inflation(self) -> float:
        """How much the grid adds to the clip: sensitivity / (K·C) - 1."""
        return self.sensitivity / (self.noisy_steps * self.clip) - 1

    @property
    def share_std(self) -> float:
        """Standard deviation of one site's share of the noise, in grid units: σ·sensitivity / (γ·sqrt(h))."""
        return self.noise_multiplier * self.sensitivity / (self.grid * math.sqrt(self.honest))

    @property
    def step_std(self) -> float:
        """The same for one of a round's noisy steps."""
        return self.share_std / math.sqrt(self.noisy_steps)

    @property
    def bound(self) -> int:
        """Largest absolute coordinate of an opened sum, in grid units, except with probability 2^-40 per run.

        Exceeding it garbles a coordinate of the result; it never weakens privacy.
        """
        draws = self.model.parameters * self.steps
        return largest_sum(self.sites * self.noisy_steps, self.sites, self.clamp, self.grid, self.share_std, draws)

    @property
    def divisor(self) -> float:
        """What the opened sum is divided by: q·N, in mode ``client`` q times the number of clients."""
        return self.sample_rate * (self.sites if self.mode == "client" else self.records)

    @property
    def event(self) -> SampledGaussian:
        """What one step costs a unit (a record, a person or a client), at exactly h honest shares."""
        return SampledGaussian(self.sample_rate, self.noise_multiplier, self.overflow / self.steps)

    @property
    def fallback_event(self) -> SampledGaussian:
        """What one step costs when every other participant is against the site: its own share only."""
        e = self.event
        return SampledGaussian(e.sample_rate, self.noise_multiplier / math.sqrt(self.honest), e.overflow)

    @property
    def claim(self) -> float:
        """ε of all planned steps by PLD: what the plan claims, recomputed."""
        return epsilon_pld([(self.event, self.steps)], self.delta)

    @property
    def claim_replace_one(self) -> float:
        """ε of all planned steps when one unit is replaced by another, which counts as neither added nor removed."""
        return epsilon_replace_one([(self.event, self.steps)], self.delta)

    @property
    def fallback(self) -> float:
        """ε when all trust is broken; finite, because every site adds a share of its own."""
        return epsilon_pld([(self.fallback_event, self.steps)], self.delta)

    def filter_epsilon(self) -> float:
        """The smallest cap under which a site's RDP filter carries every planned step (to a relative 1e-10).

        Raises:
            PlanError: no cap up to 10^6 does.
        """
        low, high = 0.0, self.epsilon
        while not self.carried(high):
            low, high = high, 2 * high
            if high > MAX_CAP:
                raise PlanError("no cap of a site's ledger carries this plan", hint="a larger noise, or fewer steps")
        while high - low > 1e-10 * high and high > 1e-9:  # below that any cap does
            mid = (low + high) / 2
            low, high = (low, mid) if self.carried(mid) else (mid, high)
        return high

    def carried(self, cap: float) -> bool:
        """Whether a fresh ledger with this cap carries every planned step."""
        return Filter(cap, self.delta, best_order(cap, self.delta)).affords(self.event) >= self.steps

    def realised_noise_multiplier(self, members: int) -> float:
        """σ of a sum in which ``members`` sites took part and t of them are ruled out: information, no claim."""
        honest = members if self.mode == "local" else members - self.colluders
        return self.noise_multiplier * math.sqrt(max(honest, 0) / self.honest)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical plan: what every participant signs."""
        return _digest(self)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON form."""
        return self.model_dump(mode="json")

    def regrid(self) -> dict[str, object]:
        """The grid and clamp that :func:`make_plan` would choose for this plan's other numbers."""
        share, D = self.noise_multiplier / math.sqrt(self.honest), self.model.parameters
        per_site = clips_per_site(self.mode, self.sample_rate, self.records, self.sites, self.model, self.clip)
        bits = room_of(self.sum, self.sites, D, self.steps)
        grid, clamp = choose(
            self.sites,
            self.clip,
            share,
            D,
            self.steps,
            per_site,
            whole=self.task == "stats",
            bits=bits,
            times=self.noisy_steps,
        )
        return {"grid": grid, "clamp": clamp}


@lru_cache(maxsize=64)
def _digest(plan: PlanFigures) -> str:
    return canonical.digest(plan.to_json())


def room_of(sum_: str, sites: int, D: int, steps: int) -> Callable[[int], int]:
    """What a sum can offer: values per coefficient -> log2 of the modulus."""
    if sum_ != "keysum":
        return lambda values: MODULUS_BITS
    return lambda values: modulus_bits(sites, D, steps, values)


def clips_per_site(mode: Mode, sample_rate: float, records: int, sites: int, model: Workload, clip: float) -> float:
    """How many clips long one site's sum may ordinarily be in one coordinate: twice its even share of the records.

    For statistics, each coordinate is at most 1 per record: as many clips as if one site had all the declared records.
    """
    if isinstance(model, StatsSpec):
        return records / clip * (1 + 2.0**-40)  # rounding must not leave a clamp below the records
    return 1.0 if mode == "client" else max(1.0, 2 * sample_rate * records / sites)
