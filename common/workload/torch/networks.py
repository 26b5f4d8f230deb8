"""The networks of :mod:`fedveil.common.workload.model`, built with torch, and their flat vectors."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.initial import normals
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.layers import Lstm, ResNet, Tokens, Transformer, adapt

_BASES: dict[str, NDArray[np.float32]] = {}
_NORMS = (nn.LayerNorm, nn.GroupNorm)
_CHUNK = 1024


def build(spec: ModelSpec) -> nn.Module:
    """The network of ``spec`` with its public initialisation (the same bits on every machine), in training mode.

    For ``lora-*`` the base is frozen (``requires_grad`` is off) and the adapters start at a product of zero, so that
    the network starts as its base.

    Raises:
        ModelError: the spec is inconsistent, or names a base file that :func:`use_base` has not been given.
    """
    if problem := spec.problem():
        raise ModelError(f"model {spec.name!r}: {problem}")
    model = _network(spec.inner)
    _initialise(model, spec.seed)
    if spec.rank:
        if spec.base:
            fill(list(model.parameters()), _base(spec))
        for number, adapter in enumerate(adapt(model, spec.rank)):
            _draw(adapter.inward.weight, spec.seed, f"adapter {number}")
            with torch.no_grad():
                adapter.outward.weight.zero_()
    return model


def _network(spec: ModelSpec) -> nn.Module:
    if spec.name == "resnet":
        return ResNet(spec.channels, spec.side, spec.hidden[1:], spec.classes)
    if spec.name == "transformer":
        vocabulary, width, heads, blocks = spec.hidden
        return Transformer(vocabulary, spec.inputs, width, heads, blocks, spec.classes)
    if spec.name == "lstm":
        vocabulary, width, units = spec.hidden
        return Lstm(vocabulary, width, units, spec.classes)
    if spec.name == "cnn":
        a, b = spec.hidden
        return nn.Sequential(
            nn.Unflatten(1, (1, spec.side, spec.side)),
            nn.Conv2d(1, a, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(a, b, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(b * (spec.side // 4) ** 2, spec.classes),
        )
    layers: list[nn.Module] = []
    for i, o in zip(spec.widths, spec.widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _initialise(model: nn.Module, seed: int) -> None:
    """Weights N(0, 1/fan-in) from a public seed; norms' scales one; biases and a logistic model zero."""
    several = sum(p.dim() > 1 for p in model.parameters()) > 1
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            if p.dim() > 1 and several:
                _draw(p, seed, f"parameter {number}")
            else:
                p.zero_()
        for module in model.modules():
            if isinstance(module, _NORMS):
                module.weight.fill_(1)


def _draw(p: torch.Tensor, seed: int, what: str) -> None:
    values = normals(p.numel(), p[0].numel(), seed, what)
    with torch.no_grad():
        p.copy_(torch.from_numpy(values).view(p.shape))


def use_base(path: Path) -> str:
    """Read a frozen base's weights from a ``.npy`` file of float32 values; later calls of :func:`build` find them.

    The file holds one vector, the base's parameters in registration order (what :func:`flatten` gives). It comes from
    the site's own disk. The hash in the plan that the site has signed decides which file it must be.

    Returns:
        SHA-256 (hex) of the file: the value for ``ModelSpec.base``.

    Raises:
        ModelError: the file cannot be read, is no such vector or holds a value that is not finite.
    """
    try:
        content = path.read_bytes()
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError) as e:
        raise ModelError(f"the base's weights cannot be read from {path.name!r}: {type(e).__name__}") from e
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.ndim != 1:
        raise ModelError(f"{path.name!r} is not one vector of float32 values", hint="numpy.save of flatten(model)")
    if not np.isfinite(values).all():
        raise ModelError(f"{path.name!r} holds a NaN or an infinity")
    digest = hashlib.sha256(content).hexdigest()
    _BASES[digest] = values
    return digest


def _base(spec: ModelSpec) -> NDArray[np.float32]:
    values = _BASES.get(spec.base)
    if values is None:
        raise ModelError(f"no file with the base {spec.base[:12]}… has been given", hint="give it with use_base")
    if values.shape != (spec.frozen,):
        raise ModelError(f"the base file holds {values.size} values, its network has {spec.frozen}")
    return values


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in registration order: all but a frozen base."""
    return [p for p in model.parameters() if p.requires_grad]


def flatten(model: nn.Module) -> NDArray[np.float32]:
    """``(D,)`` float32: the trainable parameters in registration order."""
    return torch.cat([p.detach().reshape(-1) for p in trainable(model)]).to("cpu", torch.float32).numpy()


def unflatten(model: nn.Module, values: NDArray[np.float32]) -> None:
    """Load ``(D,)`` values into the trainable parameters of ``model``, in registration order.

    Raises:
        ModelError: wrong length, or a value that is not finite.
    """
    fill(trainable(model), values)


def fill(parameters: list[nn.Parameter], values: NDArray[np.float32]) -> None:
    """Load ``(D,)`` values into ``parameters``, one after the other.

    Raises:
        ModelError: wrong length, or a value that is not finite.
    """
    sizes = [p.numel() for p in parameters]
    if values.shape != (sum(sizes),):
        raise ModelError(f"{values.shape} values for a model of {sum(sizes)} parameters")
    if not np.isfinite(values).all():
        raise ModelError("the weights hold a NaN or an infinity", hint="choose a lower learning rate or a smaller clip")
    at = 0
    for p, size in zip(parameters, sizes, strict=True):
        part, at = values[at : at + size], at + size
        if p.device.type == "cpu":  # by NumPy: the small networks of a simulation are loaded a thousand times a round
            p.detach().numpy()[...] = part.reshape(p.shape)
        else:
            p.detach().copy_(torch.from_numpy(part.copy()).view(p.shape))


def predict(model: nn.Module, X: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(n, classes)`` probabilities, without dropout.

    Raises:
        ModelError: a record holds a token id that the network does not have.
    """
    parameter = next(model.parameters())
    if isinstance(model, Tokens) and not model.usable(X).all():
        raise ModelError(f"a record holds something else than token ids below {model.vocabulary}")
    training = model.training
    model.eval()
    with torch.no_grad():
        chunks = [
            torch.softmax(model(torch.from_numpy(X[i : i + _CHUNK]).to(parameter.device, parameter.dtype)), 1)
            for i in range(0, max(len(X), 1), _CHUNK)
        ]
    model.train(training)
    return torch.cat(chunks).to("cpu", torch.float64).numpy()
