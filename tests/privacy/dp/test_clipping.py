"""Clipped sums against a loop that takes one record at a time, and the bound on one record's influence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.model_spec import ModelSpec
from fedveil.common.models import build, flatten, unflatten
from fedveil.privacy.dp.clipping import FLOAT_SLACK, Clipper, choose, refuse_coupled
from fedveil.privacy.dp.clipping.core import BACKENDS

LOGISTIC = ModelSpec(name="logistic", inputs=6, classes=3)
MLP = ModelSpec(name="mlp", inputs=6, classes=3, hidden=(5, 4), seed=3)
CNN = ModelSpec(name="cnn", inputs=64, classes=4, hidden=(3, 2), seed=5)
CASES = [
    (LOGISTIC, "opacus"), (LOGISTIC, "closed"), (MLP, "opacus"), (MLP, "closed"), (MLP, "book"), (CNN, "opacus"),
    (CNN, "book"), (CNN, "vmap"), (CNN, "ghost"),
]  # fmt: skip


def network(spec: ModelSpec, seed: int = 11) -> nn.Module:
    """With weights that are not zero, so that gradients differ from record to record."""
    model = build(spec)
    unflatten(model, np.random.default_rng(seed).normal(0, 0.5, spec.parameters).astype(np.float32))
    return model


def records(spec: ModelSpec, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 2, (n, 1))
    return (rng.normal(0, 1, (n, spec.inputs)) * scale).astype(np.float32), rng.integers(0, spec.classes, n)


def brute(spec: ModelSpec, X: np.ndarray, y: np.ndarray, clip: float, seed: int = 11) -> np.ndarray:
    """The definition: each record's own backward pass, its own norm, its own factor."""
    model = network(spec, seed).double()
    total = np.zeros(spec.parameters)
    for x, label in zip(X, y, strict=True):
        model.zero_grad()
        logits = model(torch.from_numpy(x[None]).double())
        nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        g = np.concatenate([p.grad.numpy().ravel() for p in model.parameters() if p.grad is not None])
        total += g * min(1.0, clip / max(float(np.linalg.norm(g)), 1e-300))
    return total


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_the_sum_is_the_one_of_the_definition(spec, engine, clip) -> None:
    X, y = records(spec, 12)
    out = Clipper(network(spec), engine).clipped_sum(X, y, clip)
    expected = brute(spec, X, y, clip)
    assert out.values.dtype == np.float64
    assert out.values.shape == (spec.parameters,)
    assert (out.records, out.excluded) == (12, 0)
    np.testing.assert_allclose(out.values, expected, rtol=1e-10, atol=1e-12 * clip)


def test_without_clipping_the_definition_is_not_met() -> None:
    """Negative control: the plain sum of gradients is another vector, and longer than its bound."""
    X, y = records(MLP, 12)
    plain, clipped = brute(MLP, X, y, 1e30), brute(MLP, X, y, 1e-3)
    assert np.linalg.norm(plain) > 12 * 1e-3 >= np.linalg.norm(clipped)


SHARED = {(s.name, e): Clipper(network(s), e) for s, e in CASES}  # type: ignore[arg-type]
HOSTILE = st.sampled_from([0.0, -0.0, 1.0, 1e-30, 1e10, -1e20, 3e38, -3.4e38, float("nan"), float("inf"), 1e-45])


@pytest.mark.parametrize(("spec", "engine"), CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_one_record_moves_the_sum_by_at_most_the_clip(spec, engine, data) -> None:
    """Add-or-remove-one, whatever the record holds: huge, tiny, not a number, or of a class that does not exist."""
    clipper, clip = SHARED[spec.name, engine], data.draw(st.sampled_from([1e-4, 0.1, 1.0, 1e4]))
    n = data.draw(st.integers(0, 5))
    X, y = records(spec, n + 1, data.draw(st.integers(0, 99)))
    values = data.draw(st.lists(HOSTILE | st.floats(-100, 100, width=32), min_size=6, max_size=6))
    X[-1, :6] = values
    y[-1] = data.draw(st.sampled_from([0, 1, 2, -1, -100, 99, 1 << 40]))
    without, with_ = clipper.clipped_sum(X[:-1], y[:-1], clip), clipper.clipped_sum(X, y, clip)
    assert np.linalg.norm(with_.values - without.values) <= clip * (1 + FLOAT_SLACK)
    assert np.isfinite(with_.values).all()
    place = data.draw(st.integers(0, n))  # where the record stands does not matter
    order = np.insert(np.arange(n), place, n)
    moved = clipper.clipped_sum(X[order], y[order], clip)
    np.testing.assert_allclose(moved.values, with_.values, rtol=1e-9, atol=1e-9 * clip)


@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_a_sum_without_clipping_breaks_the_bound(spec, engine) -> None:
    """Negative control of the property above: with a clip out of reach the same records move the sum further."""
    X, y = records(spec, 4)
    X[-1] = 1e4
    clipper = SHARED[spec.name, engine]
    free = clipper.clipped_sum(X, y, 1e30).values - clipper.clipped_sum(X[:-1], y[:-1], 1e30).values
    assert np.linalg.norm(free) > 1.0 * (1 + FLOAT_SLACK)


@pytest.mark.parametrize(("spec", "engine"), CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_record_without_numbers_is_left_out_and_the_rest_unchanged(spec, engine, bad) -> None:
    X, y = records(spec, 7)
    clean = SHARED[spec.name, engine].clipped_sum(np.delete(X, 3, 0), np.delete(y, 3), 1.0)
    X[3, 2] = bad
    out = SHARED[spec.name, engine].clipped_sum(X, y, 1.0)
    assert (out.records, out.excluded) == (6, 1)
    np.testing.assert_array_equal(out.values, clean.values)


@pytest.mark.parametrize("engine", ["opacus", "closed"])
def test_a_gradient_that_overflows_is_left_out(engine) -> None:
    """Finite features, infinite gradient: 0 · NaN would poison the batch, so the sum is taken again."""
    model = network(MLP).double()
    with torch.no_grad():
        next(model.parameters()).mul_(1e300)
        list(model.parameters())[-2].mul_(1e308)
    clipper = Clipper(model, engine)
    X, y = records(MLP, 5)
    X[2] *= np.float32(1e30) / np.abs(X[2]).max()
    out = clipper.clipped_sum(X, y, 1.0)
    assert out.records + out.excluded == 5
    assert out.excluded >= 1
    assert np.isfinite(out.values).all()
    assert np.linalg.norm(out.values) <= out.records * (1 + FLOAT_SLACK)


@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_an_empty_batch_and_one_of_unusable_records_give_zero(spec, engine) -> None:
    clipper = SHARED[spec.name, engine]
    X, y = records(spec, 3)
    nothing = clipper.clipped_sum(X[:0], y[:0], 1.0)
    assert (nothing.records, nothing.excluded) == (0, 0)
    X[:, 0] = np.nan
    refused = clipper.clipped_sum(X, y, 1.0)
    assert (refused.records, refused.excluded) == (0, 3)
    for out in (nothing, refused):
        assert out.values.dtype == np.float64
        np.testing.assert_array_equal(out.values, np.zeros(spec.parameters))


@pytest.mark.parametrize(("spec", "engine"), CASES)
@pytest.mark.parametrize("label", [-1, -100, 4, 1 << 40])
def test_a_class_that_does_not_exist_stops_nothing(spec, engine, label) -> None:
    """It must neither raise (one record would silence its site) nor be taken for another class."""
    X, y = records(spec, 4)
    clean = SHARED[spec.name, engine].clipped_sum(X[:-1], y[:-1], 1.0)
    y[-1] = label
    out = SHARED[spec.name, engine].clipped_sum(X, y, 1.0)
    assert (out.records, out.excluded) == (3, 1)
    np.testing.assert_array_equal(out.values, clean.values)


@pytest.mark.parametrize("spec", [LOGISTIC, MLP])
def test_engines_agree_over_steps(spec) -> None:
    """The same object over many batches: nothing of an earlier one is left in the next."""
    for seed in range(4):
        X, y = records(spec, 3 + 5 * seed, seed)
        a, b = (SHARED[spec.name, e].clipped_sum(X, y, 0.3).values for e in ("opacus", "closed"))
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(a, brute(spec, X, y, 0.3), rtol=1e-10, atol=1e-13)


def test_new_weights_are_used_at_once() -> None:
    for engine in ("opacus", "closed"):
        clipper = Clipper(network(MLP, 1), engine)
        X, y = records(MLP, 4)
        first = clipper.clipped_sum(X, y, 1.0).values
        unflatten(clipper.model, flatten(network(MLP, 2)))
        np.testing.assert_allclose(clipper.clipped_sum(X, y, 1.0).values, brute(MLP, X, y, 1.0, 2), rtol=1e-9)
        assert not np.allclose(first, clipper.clipped_sum(X, y, 1.0).values)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm1d()]
)
def test_batch_norm_is_refused_with_its_replacement(layer) -> None:
    model = nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, 2))
    with pytest.raises(ModelError, match="mixes the records") as e:
        Clipper(model, "opacus")
    assert "GroupNorm" in e.value.hint
    with pytest.raises(ModelError):
        refuse_coupled(nn.Sequential(nn.Sequential(model)))


def test_other_layers_that_keep_running_sums_are_refused() -> None:
    with pytest.raises(ModelError, match="running statistics"):
        Clipper(nn.Sequential(nn.InstanceNorm1d(6, track_running_stats=True, affine=True), nn.Linear(6, 2)), "opacus")
    refuse_coupled(nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
        nn.Sequential(*[nn.Linear(6, 6), nn.Tanh()] * 2, nn.Linear(6, 2)),
        nn.Linear(6, 2),
    ],
    ids=["activation", "ends in tanh", "shared layer", "no chain"],
)
def test_the_closed_form_takes_only_what_it_computes(model) -> None:
    with pytest.raises(ModelError, match="closed form"):
        Clipper(model, "closed")


@pytest.mark.parametrize("spec", [LOGISTIC, MLP, CNN])
def test_choose_takes_an_engine_that_is_right(spec) -> None:
    clipper = choose(lambda: network(spec), spec.inputs, spec.classes)
    X, y = records(spec, 5)
    np.testing.assert_allclose(clipper.clipped_sum(X, y, 0.2).values, brute(spec, X, y, 0.2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["opacus", "closed"])
@pytest.mark.parametrize("factor", [1e3, 1.001])
def test_an_engine_that_clips_too_little_is_caught(engine, factor, monkeypatch) -> None:
    """Negative control: one that clips at another norm fails the probe; far off, the check of every step as well."""
    honest = BACKENDS[engine]

    def faulty(model: nn.Module):
        backend = honest(model)
        return lambda X, y, limit: backend(X, y, replace(limit, clip=limit.clip * factor))

    monkeypatch.setitem(BACKENDS, engine, faulty)
    with pytest.raises(ModelError, match="no engine"):
        choose(lambda: network(MLP), MLP.inputs, MLP.classes, engines=[engine])
    X, y = records(MLP, 8)
    y[:], X[:] = y[0], X[0]  # gradients that all point one way: the bound is tight
    with pytest.raises(ModelError, match="longer than its bound"):
        Clipper(network(MLP), engine).clipped_sum(X, y, 1e-3)
