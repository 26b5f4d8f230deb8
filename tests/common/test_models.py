"""Networks by name: sizes known before they are built, the same values everywhere, vectors that fit exactly."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.model_spec import ModelSpec
from fedveil.common.models import build, flatten, predict, unflatten

SMALL = st.one_of(
    st.builds(ModelSpec, name=st.just("logistic"), inputs=st.integers(1, 40), classes=st.integers(2, 6)),
    st.builds(
        ModelSpec, name=st.just("mlp"), inputs=st.integers(1, 20), classes=st.integers(2, 5),
        hidden=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple), seed=st.integers(0, 1 << 62),
    ),
    st.builds(
        ModelSpec, name=st.just("cnn"), inputs=st.sampled_from([16, 64, 144]), classes=st.integers(2, 5),
        hidden=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99),
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SMALL)
def test_the_declared_size_is_torchs(spec) -> None:
    assert spec.problem() == ""
    model = build(spec)
    assert spec.parameters == sum(p.numel() for p in model.parameters()) == flatten(model).size
    assert model(torch.zeros(3, spec.inputs)).shape == (3, spec.classes)


def test_known_sizes() -> None:
    assert ModelSpec(name="logistic", inputs=784, classes=10).parameters == 7850
    assert ModelSpec(name="mlp", inputs=64, classes=10, hidden=(32,)).parameters == 65 * 32 + 33 * 10
    assert ModelSpec(name="cnn", inputs=784, classes=10, hidden=(16, 32)).parameters == 416 + 4640 + 32 * 49 * 10 + 10


@settings(max_examples=40, deadline=None)
@given(SMALL, st.integers(0, 99))
def test_flatten_and_unflatten_are_inverse(spec, seed) -> None:
    values = np.random.default_rng(seed).normal(size=spec.parameters).astype(np.float32)
    model = build(spec)
    unflatten(model, values)
    np.testing.assert_array_equal(flatten(model), values)
    wide = build(spec).double()
    unflatten(wide, values)
    np.testing.assert_array_equal(flatten(wide), values)
    X = np.random.default_rng(seed).normal(size=(4, spec.inputs)).astype(np.float32)
    np.testing.assert_allclose(predict(model, X), predict(wide, X), atol=1e-5)
    # registration order: the first values are the first parameter's
    first = next(model.parameters())
    np.testing.assert_array_equal(first.detach().numpy().ravel(), values[: first.numel()])


def test_loading_does_not_keep_hold_of_the_buffer() -> None:
    model = build(ModelSpec(name="logistic", inputs=3, classes=2))
    values = np.ones(8, np.float32)
    unflatten(model, values)
    values[:] = 7
    assert (flatten(model) == 1).all()
    frozen = np.frombuffer(np.arange(8, dtype="<f4").tobytes(), "<f4")  # read-only, as it comes from a message
    unflatten(model, frozen)
    np.testing.assert_array_equal(flatten(model), frozen)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_and_change_nothing(bad) -> None:
    model = build(ModelSpec(name="mlp", inputs=3, classes=2, hidden=(4,), seed=1))
    before = flatten(model).copy()
    values = np.zeros(before.size, np.float32)
    values[-1] = bad
    with pytest.raises(ModelError, match="NaN or an infinity"):
        unflatten(model, values)
    np.testing.assert_array_equal(flatten(model), before)


@pytest.mark.parametrize("shape", [(7,), (9,), (0,), (8, 1), (2, 4), ()])
def test_a_vector_of_another_length_is_refused(shape) -> None:
    model = build(ModelSpec(name="logistic", inputs=3, classes=2))
    with pytest.raises(ModelError, match="model of 8 parameters"):
        unflatten(model, np.zeros(shape, np.float32))


def test_the_initialisation_is_public_and_the_same_everywhere() -> None:
    spec = ModelSpec(name="mlp", inputs=50, classes=3, hidden=(40, 30), seed=7)
    torch.manual_seed(1)
    first = flatten(build(spec))
    torch.manual_seed(2)  # torch's own state does not matter
    np.testing.assert_array_equal(first, flatten(build(spec)))
    assert not np.array_equal(first, flatten(build(spec.model_copy(update={"seed": 8}))))
    code = (
        "import hashlib; from fedveil.common.models import build, flatten\n"
        "from fedveil.common.model_spec import ModelSpec\n"
        "m = build(ModelSpec(name='mlp', inputs=50, classes=3, hidden=(40, 30), seed=7))\n"
        "print(hashlib.sha256(flatten(m).tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hashlib.sha256(first.tobytes()).hexdigest()
    first_layer = next(build(spec).parameters()).detach().numpy()
    assert first_layer.std() * 50**0.5 == pytest.approx(1, abs=0.1)
    assert not flatten(build(ModelSpec(name="logistic", inputs=50, classes=3))).any()


def test_probabilities_are_the_formula() -> None:
    model = build(ModelSpec(name="logistic", inputs=2, classes=2))
    unflatten(model, np.array([1, 2, 3, 4, 0.5, -0.5], np.float32))
    X = np.array([[1.0, -1.0], [0.0, 0.0]], np.float32)
    logits = X.astype(float) @ np.array([[1, 3], [2, 4]]) + [0.5, -0.5]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = predict(model, X)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p, expected, atol=1e-7)
    assert predict(model, X[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ModelSpec(name="logistic", inputs=3, classes=2, hidden=(4,)), "no hidden"),
        (ModelSpec(name="mlp", inputs=3, classes=2), "at least one hidden"),
        (ModelSpec(name="mlp", inputs=3, classes=2, hidden=(4, 0)), "hidden"),
        (ModelSpec(name="mlp", inputs=3, classes=2, hidden=(-5,)), "hidden"),
        (ModelSpec(name="mlp", inputs=3, classes=2, hidden=((1 << 60),)), "hidden"),
        (ModelSpec(name="mlp", inputs=3, classes=2, hidden=(1 << 20, 1 << 20)), "2\\^31"),
        (ModelSpec(name="cnn", inputs=64, classes=2), "two channel counts"),
        (ModelSpec(name="cnn", inputs=64, classes=2, hidden=(3,)), "two channel counts"),
        (ModelSpec(name="cnn", inputs=64, classes=2, hidden=(3, 4, 5)), "two channel counts"),
        (ModelSpec(name="cnn", inputs=60, classes=2, hidden=(3, 4)), "square"),
        (ModelSpec(name="cnn", inputs=36, classes=2, hidden=(3, 4)), "divisible by 4"),
        (ModelSpec(name="cnn", inputs=1, classes=2, hidden=(3, 4)), "divisible by 4"),
    ],
)
def test_an_inconsistent_network_is_never_built(spec, reason) -> None:
    with pytest.raises(ModelError, match=reason):
        build(spec)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "my.module:Net"}, {"inputs": 0}, {"inputs": 1 << 25}, {"inputs": "3"}, {"classes": 1},
        {"classes": True}, {"seed": -1}, {"seed": 1 << 63}, {"hidden": (1,) * 17}, {"hidden": (1.5,)},
        {"code": "import os"},
    ],
)  # fmt: skip
def test_a_spec_has_types_and_bounds(change) -> None:
    values: dict[str, object] = {"name": "mlp", "inputs": 3, "classes": 2, "hidden": (4,)}
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(values | change)


def test_no_network_couples_records() -> None:
    for spec in (
        ModelSpec(name="logistic", inputs=16, classes=2), ModelSpec(name="mlp", inputs=16, classes=2, hidden=(4,)),
        ModelSpec(name="cnn", inputs=16, classes=2, hidden=(2, 2)),
    ):  # fmt: skip
        model = build(spec)
        assert not any("Norm" in type(m).__name__ or isinstance(m, nn.Dropout) for m in model.modules())
        X = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
        together = predict(model, X)
        alone = np.concatenate([predict(model, X[i : i + 1]) for i in range(6)])
        np.testing.assert_allclose(together, alone, atol=1e-6)
