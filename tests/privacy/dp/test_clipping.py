"""Clipped sums against a loop that takes one record at a time, and the bound on one record's influence."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.privacy.dp.definition import reference
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, flatten, trainable, unflatten
from fedveil.privacy.dp.clipping import Clipper, Engine, passes
from fedveil.privacy.dp.places import EMPTY
from fedveil.privacy.dp.rounding import relative

LOGISTIC = ModelSpec(name="logistic", inputs=6, classes=3)
MLP = ModelSpec(name="mlp", inputs=6, classes=3, hidden=(5, 4), seed=3)
CNN = ModelSpec(name="cnn", inputs=64, classes=4, hidden=(3, 2), seed=5)
RESNET = ModelSpec(name="resnet", inputs=3 * 64, classes=3, hidden=(3, 4, 4, 6), seed=6)
TRANSFORMER = ModelSpec(name="transformer", inputs=6, classes=3, hidden=(12, 8, 2, 2), seed=7)
LSTM = ModelSpec(name="lstm", inputs=6, classes=3, hidden=(12, 5, 4), seed=8)
LORA_MLP = ModelSpec(name="lora-mlp", inputs=6, classes=3, hidden=(2, 5, 4), seed=9)
LORA_TEXT = ModelSpec(name="lora-transformer", inputs=6, classes=3, hidden=(2, 12, 8, 2, 1), seed=10)
SPECS = [LOGISTIC, MLP, CNN, RESNET, TRANSFORMER, LSTM, LORA_MLP, LORA_TEXT]
ENGINES: tuple[Engine, ...] = ("closed", "numpy", "book", "vmap", "opacus")
CASES = [
    pytest.param(s, e, id=f"{s.name}-{e}")
    for s in SPECS
    for e in ENGINES
    if not (e in ("closed", "numpy") and s not in (LOGISTIC, MLP, LORA_MLP))
]


def exact(model: nn.Module, engine: Engine, microbatch: int | None = None) -> Clipper:
    return Clipper(model, engine, precision="float64", microbatch=microbatch)


def network(spec: ModelSpec, seed: int = 11) -> nn.Module:
    """With weights that are not zero, so that gradients differ from record to record."""
    model = build(spec)
    unflatten(model, np.random.default_rng(seed).normal(0, 0.5, spec.parameters).astype(np.float32))
    return model


def records(spec: ModelSpec, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if spec.vocabulary:
        ids = rng.integers(0, spec.vocabulary, (n, spec.inputs)).astype(np.float32)
        return ids, rng.integers(0, spec.classes, n)
    scale = 10.0 ** rng.uniform(-3, 2, (n, 1))
    return (rng.normal(0, 1, (n, spec.inputs)) * scale).astype(np.float32), rng.integers(0, spec.classes, n)


def brute(spec: ModelSpec, X: np.ndarray, y: np.ndarray, clip: float, seed: int = 11) -> np.ndarray:
    """The definition: each record's own backward pass, its own norm, its own factor."""
    model = network(spec, seed).double()
    total = np.zeros(spec.parameters)
    parameters = trainable(model)
    for x, label in zip(X, y, strict=True):
        model.zero_grad()
        logits = model(torch.from_numpy(x[None]).double())
        nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        g = np.concatenate([np.zeros(p.numel()) if p.grad is None else p.grad.numpy().ravel() for p in parameters])
        total += g * min(1.0, clip / max(float(np.linalg.norm(g)), 1e-300))
    return total


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_the_sum_is_the_one_of_the_definition(spec, engine, clip) -> None:
    X, y = records(spec, 12)
    out = exact(network(spec), engine).clipped_sum(X, y, clip)
    expected = brute(spec, X, y, clip)
    assert out.values.dtype == np.float64
    assert out.values.shape == (spec.parameters,)
    assert (out.entered, out.excluded) == (12, 0)
    scale = float(np.linalg.norm(expected))
    np.testing.assert_allclose(out.values, expected, rtol=1e-10, atol=1e-11 * scale)
    np.testing.assert_allclose(reference(network(spec), (X, y), clip), expected, rtol=1e-10, atol=1e-11 * scale)


@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_float32_is_the_same_up_to_its_rounding_and_as_strictly_bounded(spec, engine) -> None:
    X, y = records(spec, 12)
    if not spec.vocabulary:
        X /= 10
    for clip in (1e-3, 0.5):
        out = Clipper(network(spec), engine).clipped_sum(X, y, clip)
        expected = brute(spec, X, y, clip)
        assert np.linalg.norm(out.values - expected) <= 1e-3 * np.linalg.norm(expected)
        alone = Clipper(network(spec), engine).clipped_sum(X[:1], y[:1], clip)
        assert np.linalg.norm(alone.values) <= clip


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 12), microbatch=st.integers(1, 8), engine=st.sampled_from(ENGINES), seed=st.integers(0, 99))
def test_every_batch_size_in_every_microbatch(n, microbatch, engine, seed) -> None:
    X, y = records(MLP, n, seed)
    out = exact(network(MLP), engine, microbatch=microbatch).clipped_sum(X, y, 0.1)
    assert (out.entered, out.excluded) == (n, 0)
    np.testing.assert_allclose(out.values, brute(MLP, X, y, 0.1), rtol=1e-9, atol=1e-11)


def test_without_clipping_the_definition_is_not_met() -> None:
    """Negative control: the plain sum of gradients is another vector, and longer than its bound."""
    X, y = records(MLP, 12)
    plain, clipped = brute(MLP, X, y, 1e30), brute(MLP, X, y, 1e-3)
    assert np.linalg.norm(plain) > 12 * 1e-3 >= np.linalg.norm(clipped)


SHARED: dict[tuple[str, str], Clipper] = {}
for case in CASES:
    _spec, _engine = cast(tuple[ModelSpec, Engine], case.values)
    SHARED[_spec.name, _engine] = exact(network(_spec), _engine, microbatch=4)
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
    seats = np.array(data.draw(st.permutations([*range(n + 1), *[EMPTY] * 3])))
    empty = np.where(seats == n, EMPTY, seats)
    without, with_ = (clipper.clipped_sum(X, y, clip, at) for at in (empty, seats))
    assert np.linalg.norm(with_.values - without.values) <= clip * (1 + relative(len(seats)))
    assert np.isfinite(with_.values).all()


@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_a_sum_without_clipping_breaks_the_bound(spec, engine) -> None:
    """Negative control of the property above: with a clip out of reach a record moves the sum further than 10^-3."""
    X, y = records(spec, 4)
    clipper = SHARED[spec.name, engine]
    free = clipper.clipped_sum(X, y, 1e30).values - clipper.clipped_sum(X[:-1], y[:-1], 1e30).values
    assert np.linalg.norm(free) > 1e-3


@pytest.mark.parametrize("spec", [TRANSFORMER, LSTM, LORA_TEXT], ids=lambda s: s.name)
@pytest.mark.parametrize("bad", [-1.0, 12.0, 0.5, 1e9])
def test_a_token_that_does_not_exist_stops_nothing(spec, bad) -> None:
    X, y = records(spec, 5)
    clean = SHARED[spec.name, "book"].clipped_sum(X[1:], y[1:], 1.0)
    X[0, 2] = bad
    out = SHARED[spec.name, "book"].clipped_sum(X, y, 1.0)
    assert (out.entered, out.excluded) == (4, 1)
    np.testing.assert_allclose(out.values, clean.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("spec", "engine"), CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_record_without_numbers_is_left_out_and_the_rest_unchanged(spec, engine, bad) -> None:
    X, y = records(spec, 7)
    clean = SHARED[spec.name, engine].clipped_sum(np.delete(X, 3, 0), np.delete(y, 3), 1.0)
    X[3, 2] = bad
    out = SHARED[spec.name, engine].clipped_sum(X, y, 1.0)
    assert (out.entered, out.excluded) == (6, 1)
    np.testing.assert_allclose(out.values, clean.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_overflows_is_left_out(engine) -> None:
    """Finite features, infinite gradient: 0 · NaN would poison the batch."""
    model = network(MLP).double()
    with torch.no_grad():
        next(model.parameters()).mul_(1e300)
        list(model.parameters())[-2].mul_(1e308)
    clipper = exact(model, engine)
    X, y = records(MLP, 5)
    X[2] *= np.float32(1e30) / np.abs(X[2]).max()
    out = clipper.clipped_sum(X, y, 1.0)
    assert out.entered + out.excluded == 5
    assert out.excluded >= 1
    assert np.isfinite(out.values).all()
    assert np.linalg.norm(out.values) <= out.entered


@pytest.mark.parametrize(("spec", "engine"), CASES)
def test_an_empty_batch_and_one_of_unusable_records_give_zero(spec, engine) -> None:
    clipper = SHARED[spec.name, engine]
    X, y = records(spec, 3)
    nothing = clipper.clipped_sum(X[:0], y[:0], 1.0)
    assert (nothing.entered, nothing.excluded) == (0, 0)
    X[:, 0] = np.nan
    refused = clipper.clipped_sum(X, y, 1.0)
    assert (refused.entered, refused.excluded) == (0, 3)
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
    assert (out.entered, out.excluded) == (3, 1)
    np.testing.assert_allclose(out.values, clean.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", [LOGISTIC, MLP])
def test_engines_agree_over_steps(spec) -> None:
    """The same object over many batches: nothing of an earlier one is left in the next."""
    for seed in range(4):
        X, y = records(spec, 3 + 5 * seed, seed)
        for engine in ENGINES:
            values = SHARED[spec.name, engine].clipped_sum(X, y, 0.3).values
            np.testing.assert_allclose(values, brute(spec, X, y, 0.3), rtol=1e-10, atol=1e-12)


def test_new_weights_are_used_at_once() -> None:
    for engine in ENGINES:
        clipper = exact(network(MLP, 1), engine)
        X, y = records(MLP, 4)
        first = clipper.clipped_sum(X, y, 1.0).values
        unflatten(clipper.model, flatten(network(MLP, 2)))
        np.testing.assert_allclose(clipper.clipped_sum(X, y, 1.0).values, brute(MLP, X, y, 1.0, 2), rtol=1e-9)
        assert not np.allclose(first, clipper.clipped_sum(X, y, 1.0).values)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_clips_nothing_is_caught_at_run_time(engine, monkeypatch) -> None:
    clipper = exact(network(MLP), engine)
    honest = clipper.backend.add
    monkeypatch.setattr(clipper.backend, "add", lambda batch, clip, out, **fresh: honest(batch, 1e9, out, **fresh))
    X, y = records(MLP, 8)
    with pytest.raises(ModelError, match="longer than its bound"):
        clipper.clipped_sum(X, y, 1e-3)


@pytest.mark.parametrize("spec", [MLP, LORA_MLP], ids=lambda s: s.name)
def test_descents_are_those_of_plain_autograd_for_each_table(spec) -> None:
    clipper, X, y = exact(network(spec), "numpy"), *records(spec, 12)
    found = clipper.descents(X.reshape(3, 4, -1), y.reshape(3, 4), passes(4, 2), 0.1)
    for table in range(3):
        model = network(spec).double()
        start = torch.cat([p.detach().reshape(-1) for p in trainable(model)])
        for _ in range(2):
            rows = slice(4 * table, 4 * table + 4)
            loss = nn.functional.cross_entropy(model(torch.from_numpy(X[rows]).double()), torch.from_numpy(y[rows]))
            slopes = torch.autograd.grad(loss, trainable(model))
            with torch.no_grad():
                for p, slope in zip(trainable(model), slopes, strict=True):
                    p -= 0.1 * slope
        moved = start - torch.cat([p.detach().reshape(-1) for p in trainable(model)])
        np.testing.assert_allclose(found[table], moved.numpy(), rtol=1e-9, atol=1e-12)


def test_arguments_out_of_bounds_are_refused() -> None:
    X, y = records(LOGISTIC, 2)
    for clip in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ModelError, match="clip"):
            exact(network(LOGISTIC), "closed").clipped_sum(X, y, clip)
    for microbatch in (0, 1025):
        with pytest.raises(ModelError, match="microbatch"):
            exact(network(LOGISTIC), "closed", microbatch=microbatch)
    with pytest.raises(ModelError, match="unknown engine"):
        exact(network(LOGISTIC), "fast")  # type: ignore[arg-type]


def test_no_number_of_records_is_refused() -> None:
    """A limit on the batch would be an edge where one record more changes the sum from everything to nothing."""
    n = (1 << 20) + 1
    X, y = np.ones((n, 6), np.float32), np.zeros(n, np.int64)
    out = exact(network(LOGISTIC), "closed", microbatch=1024).clipped_sum(X, y, 1e-3)
    assert (out.entered, out.excluded) == (n, 0)
    np.testing.assert_allclose(out.values, n * brute(LOGISTIC, X[:1], y[:1], 1e-3), rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_nan_is_selected_away_by_its_bits(engine) -> None:
    """Finite records, NaN in every gradient in single precision: a factor of 0 alone would leave NaN in the sum."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e20)
    X = np.array([[1e-25] * 3, [1e30] * 3, [1e-25] * 3], np.float32)
    out = Clipper(model, engine).clipped_sum(X, np.array([0, 1, 0]), 1.0)
    assert (out.entered, out.excluded) == (0, 3)
    assert not out.values.any()
