"""Optimisers on opened sums, against torch's own and formulas written out; schedules; averages; what a state holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common.errors import PlanError, RunAborted, StoreError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, StatsSpec
from fedveil.privacy import optimiser, schedules
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

D, STEPS = 8, 12


def plan_of(**more: Any) -> PrivacyPlan:
    changes = {key: more.pop(key) for key in ("mode", "few_clients", "steps", "sum") if key in more}
    given = {
        "sum": "plain", "sites": 4, "records": 40, "epsilon": 2.0, "steps": STEPS, "clip": 1.0,
        "contract_hash": "c" * 64, "model": ModelSpec(name="logistic", inputs=3, classes=2),
        "optimizer": Optimizer(**{"learning_rate": 0.1, **more}),
    } | changes  # fmt: skip
    return make_plan(**given)


def walk(plan: PrivacyPlan, gradients: np.ndarray) -> list[ModelState]:
    """The states after each averaged gradient."""
    state = ModelState.start(np.linspace(-1, 1, D, dtype=np.float32), plan.optimizer)
    return [state := state.step(plan, g * plan.divisor) for g in gradients]


def by_torch(make: Any, gradients: np.ndarray, rates: list[float] | None = None) -> np.ndarray:
    weights = torch.nn.Parameter(torch.from_numpy(np.linspace(-1, 1, D, dtype=np.float32)).double())
    one = make([weights])
    for i, g in enumerate(gradients):
        if rates:
            one.param_groups[0]["lr"] = rates[i]
        weights.grad = torch.from_numpy(g.copy())
        one.step()
    return weights.detach().numpy()


GRADIENTS = np.random.default_rng(0).normal(size=(STEPS, D)) * np.array([1e-6, 1e-3, 1, 1, 1, 10, 100, 1e4])


@pytest.mark.parametrize(
    ("given", "make"),
    [
        ({"momentum": 0.9}, lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9)),
        (
            {"name": "adam", "momentum": 0.8, "second_moment": 0.95, "stabiliser": 1e-3},
            lambda w: torch.optim.Adam(w, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
        ),
        ({"name": "adagrad", "momentum": 0.0, "stabiliser": 0.01}, lambda w: torch.optim.Adagrad(w, lr=0.1, eps=0.01)),
    ],
    ids=["sgd", "adam", "adagrad"],
)
def test_steps_are_torchs(given, make):
    found = walk(plan_of(**given), GRADIENTS)[-1].weights
    np.testing.assert_allclose(found, by_torch(make, GRADIENTS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adam", "yogi", "adagrad"])
def test_the_bits_are_those_of_the_operations_in_their_order(name):
    """Server, sites and auditor may be of different versions: no operation may change places."""
    plan = plan_of(name=name, averaging=0.9)
    b1, b2 = 0.9, 0.99 if name in ("adam", "yogi") else 0.0
    w, m, v = np.linspace(-1, 1, D, dtype=np.float32).astype(float), np.zeros(D), np.zeros(D)
    average = w
    for k, g in enumerate((g * plan.divisor for g in GRADIENTS), 1):
        g = g / plan.divisor
        if name == "sgd":
            m = m * b1 + g
            w = w - m * 0.1
        else:
            m = m * b1 + (1 - b1) * g
            square = g * g
            if name == "adam":
                v = v * 0.99 + (1 - 0.99) * square
            elif name == "yogi":
                v = v - (1 - 0.99) * np.sign(v - square) * square
            else:
                v = v + square
            first, second = (1 / (1 - optimiser._power(b, k)) for b in (b1, b2))
            w = w - m * (0.1 * first) / (np.sqrt(v * second) + 1e-8)
        kept = min(0.9, (1 + k) / (10 + k))
        average = average * kept + (1 - kept) * w
    found = walk(plan, GRADIENTS)[-1]
    assert found.weights.tobytes() == w.tobytes()
    assert found.result.tobytes() == average.tobytes()
    assert [x.tobytes() for x in found.moments] == [x.tobytes() for x in (m, v)[: len(found.moments)]]


def test_yogi_written_out():
    weights, m, v = np.linspace(-1, 1, D, dtype=np.float32).astype(float), np.zeros(D), np.zeros(D)
    for k, g in enumerate(GRADIENTS, 1):
        m = 0.9 * m + 0.1 * g
        v = np.array(
            [b - 0.01 * math.copysign(1.0, b - x * x) * x * x if b != x * x else b for b, x in zip(v, g, strict=True)]
        )
        weights = weights - 0.1 * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.99**k)) + 1e-8)
    np.testing.assert_allclose(walk(plan_of(name="yogi"), GRADIENTS)[-1].weights, weights, rtol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam", "yogi", "adagrad"])
def test_a_schedule_multiplies_the_rate_from_its_step_on(name):
    plan = plan_of(name=name, schedule=((3, 0.5), (7, 0.25)))
    assert [plan.optimizer.factor(k) for k in (1, 2, 3, 6, 7, 12)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    plainly, slower = walk(plan_of(name=name), GRADIENTS), walk(plan, GRADIENTS)
    moved = lambda states, k: states[k].weights - states[k - 1].weights  # noqa: E731
    np.testing.assert_array_equal(plainly[1].weights, slower[1].weights)
    np.testing.assert_allclose(moved(slower, 2), 0.5 * moved(plainly, 2), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(moved(slower, 6), 0.25 * moved(plainly, 6), rtol=1e-6, atol=1e-12)


def test_the_model_is_the_average_where_the_plan_says_so():
    states = walk(plan_of(averaging=0.9), GRADIENTS)
    average = np.linspace(-1, 1, D, dtype=np.float32).astype(float)
    for k, state in enumerate(states, 1):
        kept = min(0.9, (1 + k) / (10 + k))
        average = kept * average + (1 - kept) * state.weights
        np.testing.assert_allclose(state.result, average, rtol=1e-13)
        assert state.model() == average.astype("<f4").tobytes() != state.sent()
        assert state.sent() == state.weights.astype("<f4").tobytes(), "gradients are taken at the last weights"
    assert walk(plan_of(), GRADIENTS)[-1].weights.tolist() == states[-1].weights.tolist()
    plainly = walk(plan_of(), GRADIENTS)[-1]
    assert plainly.model() == plainly.sent()


@pytest.mark.parametrize("name", ["sgd", "adam", "yogi", "adagrad"])
@pytest.mark.parametrize("averaging", [0.0, 0.5])
def test_a_state_goes_on_from_its_bytes_and_in_chunks_to_the_same_bits(name, averaging, monkeypatch):
    plan = plan_of(name=name, averaging=averaging)
    whole = walk(plan, GRADIENTS)
    state = ModelState.load(ModelState.load(whole[4].data).data)
    assert (state.digest, state.hash, state.length) == (whole[4].digest, whole[4].hash, len(whole[4].data))
    monkeypatch.setattr(optimiser, "_CHUNK", 3)
    for g in GRADIENTS[5:]:
        state = state.step(plan, g * plan.divisor)
    assert state.data == whole[-1].data
    assert state.fits(whole[0])
    for other in ("sgd", "adam"):
        for also in (0.0, 0.5):
            strange = ModelState.start(np.zeros(D, np.float32), plan_of(name=other, averaging=also).optimizer)
            same = (other == "sgd") == (name == "sgd") and also == averaging
            assert state.fits(strange) == same
    for cut in range(0, len(state.data), 7):
        with pytest.raises(StoreError):
            ModelState.load(state.data[:cut])


@given(st.binary(max_size=400))
def test_no_other_bytes_are_a_state(data):
    head = b"fedveil/state/2\n"
    with pytest.raises(StoreError):
        ModelState.load(data if not data.startswith(head) else b"x" + data)
    with pytest.raises(StoreError):  # a head that names more vectors than there are optimisers
        ModelState.load(head + (1).to_bytes(8, "little") * 2 + (3).to_bytes(8, "little") + bytes(8 + 8 * 4))


@pytest.mark.parametrize("name", ["sgd", "adam", "yogi", "adagrad"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_moves_nothing(name, bad):
    plan = plan_of(name=name)
    state = ModelState.start(np.zeros(D, np.float32), plan.optimizer)
    with np.errstate(all="ignore"), pytest.raises(RunAborted, match="diverged"):
        state.step(plan, np.full(D, bad))


def test_zero_sums_move_no_optimiser():
    for name in ("sgd", "adam", "yogi", "adagrad"):
        states = walk(plan_of(name=name), np.zeros((3, D)))
        assert states[-1].weights.tolist() == np.linspace(-1, 1, D, dtype=np.float32).astype(float).tolist()


class TestServerRate:
    def test_updates_are_applied_at_the_servers_rate(self):
        given = {"mode": "client", "few_clients": True, "momentum": 0.0}
        once, half = (walk(plan_of(**given, server_rate=r), GRADIENTS[:1])[0].weights for r in (1.0, 0.5))
        start = np.linspace(-1, 1, D, dtype=np.float32)
        np.testing.assert_allclose(start - half, 0.5 * (start - once), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("given", [{"server_rate": 0.5}, {"proximal": 0.1}])
    def test_it_is_for_updates_alone(self, given):
        with pytest.raises(PlanError, match="for mode 'client'"):
            plan_of(**given)


class TestSchedules:
    @pytest.mark.parametrize("name", ["linear", "cosine"])
    @pytest.mark.parametrize("steps", [1, 2, 10, 64, 65, 1000])
    def test_tables_fall_from_one_and_stay_short(self, name, steps):
        table = schedules.table(name, steps)
        factors = [factor for _, factor in table]
        assert table[0] == (1, 1.0)
        assert len(table) <= 64
        assert factors == sorted(factors, reverse=True)
        assert min(factors) >= 0.01
        assert schedules.problem(table, steps) == ""
        half = plan_of(schedule=table, steps=steps).optimizer.factor(steps // 2 + 1)
        assert half == pytest.approx(0.5, abs=0.02) or steps < 10

    def test_constant_is_no_table(self):
        assert schedules.table("constant", 10) == ()
        assert schedules.table([[1, 1], [4, 0.1]], 10) == ((1, 1.0), (4, 0.1))

    @pytest.mark.parametrize(
        "wrong", ["steep", [[1]], [[1.5, 0.1]], [[float("inf"), 1]], [[float("nan"), 1]], [["a", 1]], None, 3]
    )
    def test_what_is_no_schedule(self, wrong):
        with pytest.raises(PlanError, match="schedule"):
            schedules.table(wrong, 10)

    @pytest.mark.parametrize("wrong", [((0, 1.0),), ((2, 1.0), (2, 0.5)), ((13, 0.5),), ((1, 0.0),), ((1, 2000.0),)])
    def test_a_plan_with_a_table_that_does_not_fit_is_refused(self, wrong):
        with pytest.raises(PlanError, match="schedule"):
            plan_of(schedule=wrong)


def test_statistics_have_no_optimiser():
    column = ColumnStats(column="x", source="number", at=0, low=0.0, high=1.0, moments=1)
    spec = StatsSpec(inputs=1, classes=2, columns=(column,))
    with pytest.raises(PlanError, match="no optimiser"):
        make_plan(
            sites=4, records=40, epsilon=1.0, steps=1, clip=spec.norm_bound, model=spec, contract_hash="c" * 64,
            optimizer=Optimizer(learning_rate=1.0, name="adam"),
        )  # fmt: skip
