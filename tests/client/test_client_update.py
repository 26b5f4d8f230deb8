"""A client's update: passes in batches, FedProx, and a sample that only the client knows."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.client import round as line
from fedveil.client import together, train
from fedveil.client.app import make_app as client_app
from fedveil.client.train import client_updates, clipper, site_sum
from fedveil.common.errors import PlanError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, flatten, trainable
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.lab.together import TogetherGrid
from fedveil.deploy.transport.inprocess import InprocessGrid, run_on
from fedveil.privacy import norm_cap
from fedveil.privacy.dp.clipping import passes
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report import prices
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

MLP = ModelSpec(name="mlp", inputs=5, classes=3, hidden=(4,))
RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(11, 5)).astype(np.float32), RNG.integers(0, 3, 11)


def plan_of(**changes: Any) -> PrivacyPlan:
    optimizer = Optimizer(learning_rate=0.2, proximal=changes.pop("proximal", 0.0))
    given = {
        "mode": "client", "sum": "plain", "sites": 20, "records": 400, "noise_multiplier": 1.0, "steps": 4,
        "clip": 100.0, "contract_hash": "c" * 64, "model": MLP, "optimizer": optimizer, "few_clients": True,
    }  # fmt: skip
    return make_plan(**given | changes)


def by_hand(plan: PrivacyPlan) -> np.ndarray:
    """The same descent with autograd, record by record in double precision."""
    model = build(MLP).double()
    start = torch.cat([p.detach().reshape(-1).clone() for p in trainable(model)])
    batches = -(-len(X) // plan.local_batch) if plan.local_batch else 1
    for _ in range(plan.local_steps):
        for first in range(batches):
            rows = range(first, len(X), batches)
            losses = [
                nn.functional.cross_entropy(model(torch.from_numpy(X[[r]]).double()), torch.from_numpy(Y[[r]]))
                for r in rows
            ]
            slopes = torch.autograd.grad(torch.stack(losses).mean(), trainable(model))
            slope = torch.cat([s.reshape(-1) for s in slopes])
            now = torch.cat([p.detach().reshape(-1) for p in trainable(model)])
            after = now - plan.optimizer.learning_rate * (slope + plan.optimizer.proximal * (now - start))
            nn.utils.vector_to_parameters(after, trainable(model))
    return (start - torch.cat([p.detach().reshape(-1) for p in trainable(model)])).numpy()


@pytest.mark.parametrize("engine", ["numpy", "closed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"local_steps": 3},
        {"local_steps": 3, "local_batch": 4},
        {"local_steps": 2, "local_batch": 1},
        {"local_steps": 3, "local_batch": 64},
        {"local_steps": 4, "local_batch": 3, "proximal": 2.0},
    ],
    ids=str,
)
def test_updates_are_those_of_plain_descent(engine, changes):
    plan = plan_of(**changes)
    found = site_sum(clipper(MLP, engine, "cpu", "float64"), plan, flatten(build(MLP)), X, Y, 20)
    np.testing.assert_allclose(found, by_hand(plan), rtol=1e-9, atol=1e-12)


def test_the_proximal_term_holds_an_update_back():
    free, held = (by_hand(plan_of(local_steps=20, proximal=p)) for p in (0.0, 3.0))
    assert np.linalg.norm(held) < 0.7 * np.linalg.norm(free)


@pytest.mark.parametrize(("n", "batch"), [(11, 4), (12, 4), (1, 5), (5, 5), (7, 0), (0, 3)])
def test_a_pass_takes_each_record_once_in_batches_that_differ_by_one_at_most(n, batch):
    parts = passes(n, 2, batch)
    taken = [list(range(n))[p] for p in parts]
    assert len(parts) == 2 * max(1, -(-n // batch) if batch else 1)
    assert sorted(sum(taken, [])) == sorted(list(range(n)) * 2)
    sizes = {len(t) for t in taken}
    assert max(sizes) - min(sizes) <= 1
    assert not batch or max(sizes) <= batch


class TestSample:
    def test_who_is_not_in_the_sample_adds_zeros_and_the_rate_is_the_plans(self):
        plan = plan_of(sample_rate=0.25, sites=1000, few_clients=False)
        engine, weights = clipper(MLP, "numpy", "cpu"), flatten(build(MLP))
        whole = site_sum(engine, plan_of(sites=1000, few_clients=False), weights, X, Y, 20)
        sums = np.stack([site_sum(engine, plan, weights, X, Y, 20) for _ in range(400)])
        taken = (sums != 0).any(1)
        assert (sums[taken] == whole).all()
        assert 65 <= taken.sum() <= 140, "Binomial(400, 1/4), 4 standard deviations"

    def test_the_update_is_computed_all_the_same(self, monkeypatch):
        """Time must not tell who was sampled."""
        plan, calls = plan_of(sample_rate=0.25, sites=1000, few_clients=False), []
        real = train.client_updates
        monkeypatch.setattr(train, "client_updates", lambda *a: calls.append(1) or real(*a))
        monkeypatch.setattr(train, "poisson_sample", lambda n, rate: np.zeros(n, np.bool_))
        out = site_sum(clipper(MLP, "numpy", "cpu"), plan, flatten(build(MLP)), X, Y, 20)
        assert (len(calls), np.abs(out).max()) == (1, 0.0)

    def test_a_sampled_client_costs_less_and_the_sum_is_divided_by_fewer(self):
        whole, part = plan_of(), plan_of(sample_rate=0.5)
        assert (whole.divisor, part.divisor) == (20, 10)
        assert part.claim < whole.claim
        assert (part.event.sample_rate, part.overflow, part.places(1)) == (0.5, 0.0, 1)

    def test_batches_are_for_clients(self):
        with pytest.raises(PlanError, match="one gradient evaluation"):
            plan_of(mode="distributed", few_clients=False, local_batch=4)


@pytest.mark.parametrize("engine", ["numpy", "closed"])
def test_a_whole_update_is_clipped(engine):
    plan = plan_of(local_steps=30, clip=0.01)
    out = site_sum(clipper(MLP, engine, "cpu", "float64"), plan, flatten(build(MLP)), 50 * X, Y, 20)
    assert 0.0099 < np.linalg.norm(out) <= 0.01


def test_clients_of_one_pass_throw_coins_of_their_own(monkeypatch, tmp_path):
    """Who is not in the sample adds zeros, and is charged like everybody."""
    plan = plan_of(sample_rate=0.5, steps=6, clip=1.0)
    world, asked = virtual_sites.World.make(20), []

    def coins(clients: int, rate: float) -> np.ndarray:
        asked.append((clients, rate))
        return np.arange(clients) % 4 == 0

    seen: list[np.ndarray] = []
    real = together.to_grid
    monkeypatch.setattr(train, "poisson_sample", coins)
    monkeypatch.setattr(together, "to_grid", lambda v, clamp, grid: seen.append(v) or real(v, clamp, grid))
    job = jobs.create(tmp_path / "run", plan, world.roster, world.server, documents={}, durable=False)
    sites = virtual_sites.Kept(
        lambda i: virtual_sites.make_site(
            world.roster, i, world.keys[i], plan, X, Y, job.run, cap=plan.filter_epsilon(), engine="numpy"
        )
    )
    server, _ = server_app(job)
    grid = TogetherGrid(client_app(sites.resolve), world.sites, sites.find, logged=contextlib.nullcontext)
    run_on(server, grid)
    assert asked == [(20, 0.5)] * 6
    for values in seen:
        assert ((values != 0).any(1) == (np.arange(20) % 4 == 0)).all()
    assert {len(sites.find(i).ledger.tally.committed) for i in range(20)} == {6}


def test_nothing_random_is_drawn_before_the_charge(monkeypatch, tmp_path):
    """Charge first, release after: of every noisy step, in messages and in one pass."""
    order: list[str] = []
    monkeypatch.setattr(Ledger, "reserve", _noting(order, "charge", Ledger.reserve))
    for module in (line, together):
        monkeypatch.setattr(module, "discrete_gaussian", _noting(order, "noise", module.discrete_gaussian))
    one_pass = {"mode": "client", "sum": "plain", "few_clients": True, "sites": 4, "records": 44}
    messages = {"mode": "local", "sum": "none", "local_steps": 3, "few_clients": False, "sites": 4, "records": 44}
    for given, noises in ((one_pass, 1), (messages, 4 * 3)):
        order.clear()
        plan = plan_of(**given, steps=1)
        world = virtual_sites.World.make(4)
        job = jobs.create(tmp_path / plan.mode, plan, world.roster, world.server, documents={}, durable=False)
        sites = virtual_sites.Kept(
            lambda i, world=world, plan=plan, job=job: virtual_sites.make_site(
                world.roster, i, world.keys[i], plan, X, Y, job.run, cap=plan.filter_epsilon(), engine="numpy"
            )
        )
        server, _ = server_app(job)
        app = client_app(sites.resolve)
        if noises == 1:
            run_on(server, TogetherGrid(app, world.sites, sites.find, logged=contextlib.nullcontext))
            assert order == ["charge"] * 4 + ["noise"]
        else:
            run_on(server, InprocessGrid(app, world.sites, lambda _: {}))
            assert order == ["charge", "noise", "noise", "noise"] * 4


def _noting(order: list[str], name: str, real: Any) -> Any:
    def noting(*args: Any, **more: Any) -> Any:
        order.append(name)
        return real(*args, **more)

    return noting


def test_clients_are_computed_together_as_alone():
    plan = plan_of(local_steps=2, local_batch=4, proximal=0.5)
    engine = clipper(MLP, "numpy", "cpu", "float64")
    engine.load(flatten(build(MLP)))
    many = client_updates(engine, plan, np.stack([X, X[::-1]]), np.stack([Y, Y[::-1]]))
    np.testing.assert_allclose(many[0], by_hand(plan), rtol=1e-9, atol=1e-12)
    assert not np.allclose(many[0], many[1]), "another order gives other batches"


class TestNoisyLocalSteps:
    """Mode ``local``: a site descends by itself for K noisy steps, and sends the sum of what it took."""

    @pytest.fixture
    def taken(self, monkeypatch, tmp_path):
        """What the site sends for so many steps, the noise of each step replaced by one known vector."""
        noise = np.arange(MLP.parameters) % 7 - 3

        def take(steps: int) -> tuple[PrivacyPlan, np.ndarray]:
            plan = make_plan(
                mode="local", sum="none", sites=4, records=44, noise_multiplier=2.0, steps=3, clip=0.5, model=MLP,
                contract_hash="c" * 64, optimizer=Optimizer(learning_rate=2.0), local_steps=steps, capacity=11,
            )  # fmt: skip
            world = virtual_sites.World.make(4)
            drawn = []
            monkeypatch.setattr(line, "discrete_gaussian", lambda std, n: drawn.append(std) or noise.copy())
            run = jobs.create(
                tmp_path / "run", plan, world.roster, world.server, documents={}, durable=False, engine="inprocess"
            )
            sites = virtual_sites.Kept(
                lambda i: virtual_sites.make_site(
                    world.roster, i, world.keys[i], plan, X, Y, run.run, cap=plan.filter_epsilon(), engine="closed"
                )
            )
            for i in range(4):
                sites.find(i).precision = "float64"
            opened = []
            real = ModelState.after
            monkeypatch.setattr(ModelState, "after", lambda s, p, o: opened.append(o.copy()) or real(s, p, o))
            server, _ = server_app(run)
            run_on(server, InprocessGrid(client_app(sites.resolve), world.sites, lambda _: {}))
            assert drawn == [plan.step_std] * (4 * 3 * steps)
            assert [len(sites.find(i).ledger.tally.committed) for i in range(4)] == [3] * 4
            return plan, opened[0]

        return take

    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_the_sum_is_that_of_a_descent_on_clipped_noisy_gradients(self, taken, steps):
        plan, opened = taken(steps)
        noise = (np.arange(MLP.parameters) % 7 - 3) * plan.grid
        start = flatten(build(MLP)).astype(np.float64)
        total = np.zeros(MLP.parameters)
        engine = clipper(MLP, "closed", "cpu", "float64", places=11)
        for _ in range(steps):
            engine.load((start - 2.0 * total / 11).astype(np.float32))
            total += engine.clipped_sum(X, Y, plan.clip).values + noise
        np.testing.assert_allclose(opened * plan.grid, 4 * total, atol=4 * steps * plan.grid)

    def test_k_steps_cost_what_one_does_with_k_times_the_noise_and_the_reach(self):
        one, many = (self.plan(local_steps=k) for k in (1, 9))
        assert (one.event, one.claim, one.filter_epsilon()) == (many.event, many.claim, many.filter_epsilon())
        # K Gaussian steps at σ·sqrt(K) are one at σ: the noise of each, in units of its own sensitivity
        assert many.step_std * many.grid * 9 / many.sensitivity == pytest.approx(3 * many.noise_multiplier)
        own = prices.read(many.to_json())
        assert (own.sensitivity, own.share) == (pytest.approx(many.sensitivity), pytest.approx(many.share_std))
        assert many.bound >= 4 * 9 * many.clamp / many.grid

    def test_each_steps_own_noise_must_be_wide_on_the_grid(self):
        """A share of the whole round may look wide enough where one step's is not."""
        small = ModelSpec(name="logistic", inputs=3, classes=2)  # so that the grid may be coarse
        plan = self.plan(local_steps=4, noise_multiplier=0.2, clip=1.0, model=small)
        coarse = plan.model_copy(update={"grid": plan.share_std * plan.grid / 119})
        assert coarse.step_std < 64 < coarse.share_std
        with pytest.raises(PlanError, match="too coarse"):
            coarse.check()

    def test_the_norm_cap_allows_k_times_the_length(self):
        one, many = (self.plan(local_steps=k, noise_multiplier=0.3) for k in (1, 9))
        reach = lambda p: norm_cap.cap(p, 4) * p.grid  # noqa: E731
        assert reach(many) == pytest.approx(9 * reach(one), rel=0.02)

    def test_the_verifier_prices_a_sampled_client_by_its_rate_and_without_places(self):
        own = prices.read(plan_of(sample_rate=0.25).to_json())
        assert (own.rate, own.overflow, own.places, own.left(3)) == (0.25, 0.0, 1, own.delta)

    def plan(self, **changes: Any) -> PrivacyPlan:
        given = {"mode": "local", "sum": "none", "sites": 4, "sample_rate": 1.0, "few_clients": False} | changes
        return plan_of(**given)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"sample_rate": 0.5, "local_steps": 2}, "take every record"),
            ({"local_batch": 4}, "take every record"),
            ({"mode": "distributed", "sum": "plain", "local_steps": 2}, "one gradient evaluation"),
        ],
    )
    def test_what_has_no_price_is_refused(self, changes, said):
        with pytest.raises(PlanError, match=said):
            self.plan(**changes)
