"""Tanh and pooling in NumPy: torch's own function and gradient, for any bits, and in the copy of one engine alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.privacy.dp.clipping import choose
from fedveil.privacy.dp.clipping.quick_layers import quicken


def quick(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(layer)
    quicken(model)
    return model


def both(layer: nn.Module, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Value and gradient, by the quick layer and by torch's."""
    out = []
    for module in (quick(layer), layer):
        seen = x.clone().requires_grad_()
        y = module(seen)
        weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) % 7 - 3
        out.append((y.detach(), torch.autograd.grad((y * weights).sum(), seen)[0]))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (1, 1, 2, 2), (2, 3, 5, 6), (2, 3, 6, 7), (4, 2, 2)])
@pytest.mark.parametrize("layer", [nn.Tanh(), nn.AvgPool2d(2), nn.AvgPool2d((2, 2), stride=(2, 2))], ids=str)
def test_values_and_gradients_are_torchs(layer, shape, dtype):
    torch.manual_seed(1)
    (y, gradient), (right, slope) = both(layer, 3 * torch.randn(shape, dtype=dtype))
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(gradient, slope)


def test_what_is_laid_out_otherwise_is_read_in_its_order():
    x = torch.randn(2, 6, 8, 4).permute(0, 3, 1, 2)
    for layer in (nn.Tanh(), nn.AvgPool2d(2)):
        (y, gradient), (right, slope) = both(layer, x)
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e-40, -0.0, 3e38])
@pytest.mark.filterwarnings("ignore:overflow")
def test_any_bits_stay_in_their_row(bad):
    x = torch.randn(3, 2, 4, 4)
    x[1] = bad
    for layer in (nn.Tanh(), nn.AvgPool2d(2)):
        y = quick(layer)(x)
        torch.testing.assert_close(y, layer(x), equal_nan=True)
        assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(3), nn.AvgPool2d(2, stride=1), nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3), nn.ReLU(), nn.MaxPool2d(2),
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_stay(layer):
    assert quick(layer)[0] is layer  # type: ignore[index]


def test_only_the_engines_own_copy_is_changed():
    spec = ModelSpec(name="cnn", inputs=64, classes=3, hidden=(4, 6))
    built = build(spec)
    clipper = choose(lambda: built, spec.inputs, spec.classes, engines=("book",), places=6)
    own, given = ([type(m).__name__ for m in model.modules()] for model in (clipper.model, built))
    assert (own.count("_Tanh"), own.count("_Halved")) == (2, 2)
    assert (given.count("Tanh"), given.count("AvgPool2d")) == (2, 2)
