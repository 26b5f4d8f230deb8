"""Two engines that never build a plain gradient: the closed form of dense chains, and book-keeping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedveil.common.errors import ModelError
from fedveil.common.workload.torch.layers import Adapter
from fedveil.privacy.dp.clipping.engines import InPieces
from fedveil.privacy.dp.clipping.gradient_factors import Batch, Dense, Piece, Rows, Workspace, outer, together
from fedveil.privacy.dp.clipping.quick_layers import quicken

# Smaller exponents give denormal numbers, which take a processor many times as long: time would tell of a record.
LEAST_EXPONENT = -60.0

# (before, after) the activation -> its derivative
_DERIVATIVES: dict[type[nn.Module], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    nn.Tanh: lambda _, a: 1 - a.square(),
    nn.ReLU: lambda z, _: (z > 0).to(z.dtype),
    nn.Sigmoid: lambda _, a: a * (1 - a),
    nn.GELU: lambda z, _: (
        torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)  # Hendrycks & Gimpel 2016
    ),
}


@dataclass(frozen=True)
class Stage:
    """What stands between two activations of a chain.

    Attributes:
        linears: the trainable layers, in the parameters' order: one; or the two thin ones of an adapter.
        base: the frozen layer beside an adapter's.
    """

    linears: tuple[nn.Linear, ...]
    base: nn.Linear | None = None

    @property
    def all(self) -> tuple[nn.Linear, ...]:
        """Every layer."""
        return self.linears if self.base is None else (self.base, *self.linears)


class Chain(InPieces):
    """``Sequential(Linear, activation, Linear, ..., Linear)`` in closed form, of any depth.

    Activations: Tanh, ReLU, Sigmoid, GELU (exact form). Linear layers may lack a bias. In the place of one, there may
    be a frozen layer with an adapter (LoRA).

    Raises:
        ModelError: any other network.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model) if isinstance(model, nn.Sequential) else []
        self.stages = [stage for m in modules[::2] if (stage := _stage(m)) is not None]
        self.linears = [layer for stage in self.stages for layer in stage.linears]
        super().__init__([p.numel() for m in self.linears for p in m.parameters()])
        self.activations = [m for m in modules[1::2] if type(m) in _DERIVATIVES and _exact(m)]
        owned = [p for stage in self.stages for layer in stage.all for p in layer.parameters()]
        alone = len({id(p) for p in owned}) == len(owned) == len(list(model.parameters()))
        if not (alone and len(self.stages) + len(self.activations) == len(modules) and len(modules) % 2 == 1):
            raise ModelError("the closed form needs a chain of Linear layers and activations", hint="the engine 'auto'")

    @torch.no_grad()
    def pieces(self, batch: Batch) -> list[Piece]:
        """See :class:`fedveil.privacy.dp.clipping.engines.InPieces`."""
        inputs, slopes, x = list[tuple[torch.Tensor, ...]](), list[torch.Tensor](), batch.X
        for at, stage in enumerate(self.stages):
            seen, before = _forward(stage, x)
            inputs.append(seen)
            if at < len(self.activations):
                x = self.activations[at](before)
                slopes.append(_DERIVATIVES[type(self.activations[at])](before, x))
            else:
                x = before
        delta = (x - x.amax(1, keepdim=True)).clamp(min=LEAST_EXPONENT).exp()
        delta /= delta.sum(1, keepdim=True)
        delta[torch.arange(len(delta), device=delta.device), batch.y] -= 1
        pieces: list[Piece] = []
        for at in reversed(range(len(self.stages))):
            deltas, delta = _backward(self.stages[at], delta, slopes[at - 1] if at else None)
            own: list[Piece] = []
            for layer, d, a in zip(self.stages[at].linears, deltas, inputs[at], strict=True):
                own += [outer(d, a, batch.weights)] + ([Dense(d, batch.weights)] if layer.bias is not None else [])
            pieces = own + pieces
        return pieces


def _stage(module: nn.Module) -> Stage | None:
    if type(module) is Adapter and not any(p.requires_grad for p in module.base.parameters()):
        stage = Stage((module.inward, module.outward), module.base)
    else:
        stage = Stage((module,)) if isinstance(module, nn.Linear) else None
    if stage is None or any(type(layer) is not nn.Linear for layer in stage.all):
        return None
    return stage if all(p.requires_grad for layer in stage.linears for p in layer.parameters()) else None


def _forward(stage: Stage, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The inputs of the trainable layers, and the output."""
    if stage.base is None:
        return (x,), stage.linears[0](x)
    thin = stage.linears[0](x)
    return (x, thin), stage.base(x) + stage.linears[1](thin)


def _backward(
    stage: Stage, delta: torch.Tensor, slope: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The gradients at the trainable layers' outputs, and at the stage's input, before its activation if any."""
    deltas = (delta,) if stage.base is None else (delta @ stage.linears[1].weight, delta)
    if slope is None:
        return deltas, delta
    back = deltas[0] @ stage.linears[0].weight
    return deltas, (back if stage.base is None else back + delta @ stage.base.weight) * slope


def _exact(module: nn.Module) -> bool:
    return getattr(module, "approximate", "none") == "none"


@dataclass
class _Use:
    """One call of a layer: its input and its output (part of the graph)."""

    inward: torch.Tensor
    output: torch.Tensor


class Book(InPieces):
    """Book-keeping (Bu et al. 2023, arXiv:2210.00038): one forward pass, one backward pass to the layers' outputs.

    The weights' own gradients are never computed by autograd: the norms and, once these are known, the clipped sum
    follow from each layer's inputs and output gradients. A layer may be used several times per record.

    The model is its own: on a CPU some layers are replaced (:mod:`fedveil.privacy.dp.clipping.quick_layers`).

    Raises:
        ModelError: a trainable parameter belongs to no Linear, Conv2d, Embedding, LayerNorm or GroupNorm layer, or to
            two layers (tied weights), or a layer is called without a leading batch dimension.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._layers = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        owned = [p for m in self._layers for p in m.parameters(recurse=False) if p.requires_grad]
        super().__init__([p.numel() for p in self._parameters])
        if any(type(m) not in _GRADIENTS or not _plain(m) for m in self._layers):
            raise ModelError("book-keeping knows Linear, Conv2d, Embedding, LayerNorm, GroupNorm", hint="'auto'")
        if len({id(p) for p in owned}) != len(owned):
            raise ModelError("book-keeping cannot treat a parameter that two layers share", hint="the engine 'auto'")
        if all(p.device.type == "cpu" for p in model.parameters()):
            quicken(model)

    def pieces(self, batch: Batch) -> list[Piece]:
        """See :class:`fedveil.privacy.dp.clipping.engines.InPieces`."""
        uses = self._forward_backward(batch.X, batch.y)
        found: dict[int, Piece] = {}
        with torch.no_grad():
            for layer, calls in uses.items():
                own = _GRADIENTS[type(layer)](layer, calls, batch.weights, self._workspace)
                found |= {id(p): piece for p, piece in own if p.requires_grad}
        zero = [p for p in self._parameters if id(p) not in found]
        found |= {id(p): Dense(p.new_zeros(len(batch.keep), *p.shape)) for p in zero}
        return together([found[id(p)] for p in self._parameters])

    def _forward_backward(self, X: torch.Tensor, y: torch.Tensor) -> dict[nn.Module, list[_Call]]:
        uses: list[tuple[nn.Module, _Use]] = []

        def remember(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if not len(inputs[0]) == len(output) == len(X):
                raise ModelError(f"a {type(module).__name__} layer is called without a leading batch dimension")
            # with the weights out of the graph, the first layers' outputs are its leaves
            output = output if output.requires_grad else output.requires_grad_()
            uses.append((module, _Use(inputs[0].detach(), output)))
            return output

        handles = [layer.register_forward_hook(remember) for layer in self._layers]
        try:
            for p in self._parameters:
                p.requires_grad_(False)
            loss = functional.cross_entropy(self._model(X), y, reduction="sum")
            deltas = torch.autograd.grad(loss, [u.output for _, u in uses], allow_unused=True)
        finally:
            for p in self._parameters:
                p.requires_grad_(True)
            for handle in handles:
                handle.remove()
        calls: dict[nn.Module, list[_Call]] = {}
        for (module, use), delta in zip(uses, deltas, strict=True):
            if delta is not None:
                calls.setdefault(module, []).append((use.inward, delta))
        return calls


_Call = tuple[torch.Tensor, torch.Tensor]  # a layer's input and the gradient at its output
_Found = list[tuple[torch.Tensor, Piece]]
_Weights = torch.Tensor | None  # see Batch


def _linear(layer: nn.Linear, calls: list[_Call], weights: _Weights, workspace: Workspace) -> _Found:
    inward = _one_after_the_other([a.reshape(len(a), -1, a.shape[-1]) for a, _ in calls])
    delta = _one_after_the_other([d.reshape(len(d), -1, d.shape[-1]) for _, d in calls])
    if inward.shape[1] == 1:
        weight = outer(delta[:, 0], inward[:, 0], weights)
    else:
        product = workspace.take(layer, (len(delta), *layer.weight.shape), delta)
        weight = Dense(torch.bmm(delta.transpose(1, 2), inward, out=product), weights)
    found: _Found = [(layer.weight, weight)]
    if layer.bias is not None:
        found.append((layer.bias, Dense(delta.sum(1), weights)))
    return found


def _one_after_the_other(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def _conv2d(layer: nn.Conv2d, calls: list[_Call], weights: _Weights, workspace: Workspace) -> _Found:
    groups, (out, inner, *kernel) = layer.groups, layer.weight.shape
    shape = (len(calls[0][1]) * groups, inner * math.prod(kernel), out // groups)
    total = workspace.take(layer, shape, calls[0][1])
    for turn, (a, d) in enumerate(calls):
        product = workspace.take("another call", shape, d) if turn else total
        patches = _patches(layer, a, d.shape[2:], workspace).view(*shape[:2], -1)
        # A third faster this way round: outputs last.
        torch.bmm(patches, d.reshape(shape[0], shape[2], -1).transpose(1, 2), out=product)
        if turn:
            total += product
    found: _Found = [(layer.weight, Dense(total.view(-1, groups, *shape[1:]), weights, turned=True))]
    if layer.bias is not None:
        sums = torch.stack([d.sum((2, 3)) for _, d in calls]).sum(0)
        found.append((layer.bias, Dense(sums, weights)))
    return found


def _patches(layer: nn.Conv2d, a: torch.Tensor, places: torch.Size, workspace: Workspace) -> torch.Tensor:
    """What each output place saw, ``(B, channels, *kernel, *places)``: ``unfold``, at a third of its time."""
    (up, left), (down, right) = (int(p) for p in layer.padding), layer.stride
    padded = functional.pad(a, (left, left, up, up))
    record, channel, row, column = padded.stride()
    kernel, dilation = layer.kernel_size, layer.dilation
    shape = (*padded.shape[:2], *kernel, *places)
    steps = (record, channel, row * dilation[0], column * dilation[1], row * down, column * right)
    return workspace.take("patches", shape, padded).copy_(padded.as_strided(shape, steps))


def _embedding(layer: nn.Embedding, calls: list[_Call], weights: _Weights, _: Workspace) -> _Found:
    ids = _one_after_the_other([a.reshape(len(a), -1) for a, _ in calls])
    delta = _one_after_the_other([d.reshape(len(d), -1, d.shape[-1]) for _, d in calls])
    if layer.padding_idx is not None:
        delta = delta * (ids != layer.padding_idx).unsqueeze(-1)
    return [(layer.weight, Rows(ids, delta, layer.num_embeddings, weights))]


def _layer_norm(layer: nn.LayerNorm, calls: list[_Call], weights: _Weights, _: Workspace) -> _Found:
    own = len(layer.normalized_shape)
    products = [(functional.layer_norm(a, layer.normalized_shape, eps=layer.eps) * d, d) for a, d in calls]
    shape = (len(products[0][1]), -1, *products[0][1].shape[-own:])
    return _affine(layer, [(p.reshape(shape).sum(1), d.reshape(shape).sum(1)) for p, d in products], weights)


def _group_norm(layer: nn.GroupNorm, calls: list[_Call], weights: _Weights, _: Workspace) -> _Found:
    products = [(functional.group_norm(a, layer.num_groups, eps=layer.eps) * d, d) for a, d in calls]
    return _affine(layer, [(p.flatten(2).sum(2), d.flatten(2).sum(2)) for p, d in products], weights)


def _affine(layer: nn.LayerNorm | nn.GroupNorm, sums: list[_Call], weights: _Weights) -> _Found:
    found: _Found = [(layer.weight, Dense(torch.stack([w for w, _ in sums]).sum(0), weights))]
    if layer.bias is not None:
        found.append((layer.bias, Dense(torch.stack([b for _, b in sums]).sum(0), weights)))
    return found


_GRADIENTS: dict[type[nn.Module], Callable[..., _Found]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}


def _plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.Embedding):
        return not module.scale_grad_by_freq and not module.sparse
    return True
