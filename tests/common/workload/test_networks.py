"""Networks by name: sizes known before they are built, the same values everywhere, vectors that fit exactly."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.initial import normals
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, flatten, predict, unflatten, use_base

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
        "import hashlib; from fedveil.common.workload.torch.networks import build, flatten\n"
        "from fedveil.common.workload.model import ModelSpec\n"
        "m = build(ModelSpec(name='mlp', inputs=50, classes=3, hidden=(40, 30), seed=7))\n"
        "print(hashlib.sha256(flatten(m).tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hashlib.sha256(first.tobytes()).hexdigest()
    first_layer = next(build(spec).parameters()).detach().numpy()
    assert first_layer.std() * 50**0.5 == pytest.approx(1, abs=0.1)
    assert not flatten(build(ModelSpec(name="logistic", inputs=50, classes=3))).any()


def test_initial_values_are_integers_of_a_hash_and_correctly_rounded() -> None:
    """In plain Python, and as a known answer: no machine may come to other bits."""
    data = hashlib.shake_256(b"fedveil/initial/1|7|parameter 0|0").digest(24 * 1000)
    sums = [sum(int.from_bytes(data[24 * i + 2 * j :][:2], "little") for j in range(12)) for i in range(1000)]
    values = normals(1000, 25, 7, "parameter 0")
    np.testing.assert_array_equal(values, np.array([(n - 393210) / (65536 * 5) for n in sums]).astype(np.float32))
    known = "89775f1e81f79339718e388071ad3966ff5ca4d63008f45905ae9affe924ce41"
    assert hashlib.sha256(values.tobytes()).hexdigest() == known
    many = normals((1 << 18) + 1000, 1, 7, "parameter 1").astype(float)  # of two calls
    assert not np.array_equal(many[:1000], many[1 << 18 :])
    assert abs(many.mean()) < 5 / many.size**0.5
    assert abs(many.std() - 1) < 5 / (2 * many.size) ** 0.5
    assert np.abs(many).max() <= 6


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


@pytest.mark.parametrize(
    ("spec", "size", "frozen"),
    [
        (("resnet", 3 * 64, (3, 4, 4, 8)), 1704, 0),
        (("resnet", 64, (1, 6)), 766, 0),
        (("transformer", 7, (20, 8, 2, 2)), (20 + 7) * 8 + 2 * (12 * 64 + 9 * 8 + 4 * 8) + 16 + 36, 0),
        (("lstm", 7, (20, 5, 6)), 100 + 6 * 24 + 6 * 24 + 7 * 4, 0),
        (("lora-mlp", 6, (2, 5)), 2 * (6 + 5 + 5 + 4), 7 * 5 + 6 * 4),
        (("lora-transformer", 7, (2, 20, 8, 2, 2)), 2 * (2 * (32 + 16 + 40 + 40) + 12), 2012),
    ],
)
def test_sizes_of_the_larger_networks(spec: tuple[Any, int, tuple[int, ...]], size: int, frozen: int) -> None:
    name, inputs, hidden = spec
    made = ModelSpec(name=name, inputs=inputs, classes=4, hidden=hidden, seed=3)
    model = build(made)
    assert (made.parameters, made.frozen) == (size, frozen)
    assert flatten(model).size == size
    assert sum(p.numel() for p in model.parameters()) == size + frozen
    X = np.random.default_rng(0).integers(0, 20, (5, inputs)).astype(np.float32)
    p = predict(model, X)
    assert p.shape == (5, 4)
    alone = np.concatenate([predict(model, X[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(p, alone, atol=1e-6)
    values = np.random.default_rng(1).normal(size=size).astype(np.float32)
    unflatten(model, values)
    np.testing.assert_array_equal(flatten(model), values)


@pytest.mark.parametrize(
    ("name", "inputs", "hidden", "reason"),
    [
        ("resnet", 64, (), "image's channels"),
        ("resnet", 64, (2, 4), "image's channels"),
        ("resnet", 63, (1, 4), "square"),
        ("resnet", 36, (1, 4, 4, 4), "halve"),
        ("transformer", 8, (9, 8, 2), "a vocabulary"),
        ("transformer", 8, (9, 8, 3, 1), "not divisible"),
        ("transformer", 8, (9, 8, 2, 257), "256 blocks"),
        ("lstm", 8, (9, 8), "an embedding width"),
        ("lstm", 8, (9, 1 << 17, 2), "units"),
        ("lora-mlp", 8, (), "a rank"),
        ("lora-mlp", 8, (2,), "at least one hidden"),
        ("lora-mlp", 8, (4097, 8), "rank"),
        ("lora-transformer", 8, (2, 9, 8, 3, 1), "not divisible"),
        ("transformer", 8, (1 << 24, 1 << 16, 2, 1), "2\\^31"),
    ],
)
def test_inconsistent_larger_networks_are_never_built(name: Any, inputs, hidden, reason) -> None:
    with pytest.raises(ModelError, match=reason):
        build(ModelSpec(name=name, inputs=inputs, classes=3, hidden=hidden))


def test_padding_and_its_length_change_nothing() -> None:
    for spec in (
        ModelSpec(name="transformer", inputs=6, classes=3, hidden=(20, 8, 2, 2), seed=2),
        ModelSpec(name="lstm", inputs=6, classes=3, hidden=(20, 5, 6), seed=2),
    ):
        model = build(spec)
        with torch.no_grad():
            table = model.get_submodule("tokens").get_parameter("weight")
            X = np.array([[3, 4, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32)
            before = predict(model, X)
            table[0] += 5  # what padding looks like must not matter
        after = predict(model, X)
        assert np.isfinite(before).all()
        np.testing.assert_allclose(before[0], after[0], atol=1e-6)
        assert not np.allclose(before[0], predict(model, np.array([[4, 4, 5, 0, 0, 0]], np.float32))[0])


@pytest.mark.parametrize("bad", [-1, 20, 0.5, np.nan, np.inf, 1e30])
def test_tokens_that_do_not_exist_are_refused_before_the_table_is_read(bad) -> None:
    model = build(ModelSpec(name="lstm", inputs=3, classes=3, hidden=(20, 5, 6)))
    with pytest.raises(ModelError, match="token ids below 20"):
        predict(model, np.array([[1, bad, 2]], np.float32))


def test_adapters_start_as_their_base_and_leave_it_alone(tmp_path) -> None:
    base = build(ModelSpec(name="mlp", inputs=6, classes=3, hidden=(5,), seed=9))
    unflatten(base, np.random.default_rng(4).normal(size=53).astype(np.float32))
    path = tmp_path / "base.npy"
    np.save(path, flatten(base))
    spec = ModelSpec(name="lora-mlp", inputs=6, classes=3, hidden=(2, 5), seed=1, base=use_base(path))
    assert spec.base == hashlib.sha256(path.read_bytes()).hexdigest()
    model = build(spec)
    X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.testing.assert_allclose(predict(model, X), predict(base, X), atol=1e-7)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    unflatten(model, np.ones(spec.parameters, np.float32))
    assert all(
        torch.equal(a, b) for a, b in zip(frozen, (p for p in model.parameters() if not p.requires_grad), strict=True)
    )
    assert not np.allclose(predict(model, X), predict(base, X))


def test_a_base_file_is_checked(tmp_path) -> None:
    spec = ModelSpec(name="lora-mlp", inputs=6, classes=3, hidden=(2, 5), base="0" * 64)
    with pytest.raises(ModelError, match="no file with the base"):
        build(spec)
    path = tmp_path / "base.npy"
    np.save(path, np.zeros(7, np.float32))
    with pytest.raises(ModelError, match="holds 7 values"):
        build(spec.model_copy(update={"base": use_base(path)}))
    for content in (np.zeros((2, 2), np.float32), np.zeros(3), np.array([np.nan], np.float32), np.array([None])):
        np.save(path, content, allow_pickle=True)
        with pytest.raises(ModelError):
            use_base(path)
    with pytest.raises(ModelError, match="cannot be read"):
        use_base(tmp_path / "missing.npy")
    with pytest.raises(ModelError, match="only adapters"):
        build(ModelSpec(name="mlp", inputs=6, classes=3, hidden=(5,), base="0" * 64))


def test_a_spec_without_a_base_is_written_as_before_there_were_bases() -> None:
    spec = ModelSpec(name="mlp", inputs=6, classes=3, hidden=(5,))
    assert set(spec.model_dump(mode="json")) == {"name", "inputs", "classes", "hidden", "seed"}
    with_base = ModelSpec(name="lora-mlp", inputs=6, classes=3, hidden=(2, 5), base="a" * 64)
    for s in (spec, with_base):
        assert ModelSpec.model_validate_json(s.model_dump_json()) == s
