"""Layers through which records influence each other are refused, with what to use instead."""

from __future__ import annotations

from opacus.layers import DPMultiheadAttention
from opacus.validators import ModuleValidator
from torch import nn

from fedveil.common.errors import ModelError

_REPLACEMENT: tuple[tuple[type[nn.Module], str, str], ...] = (
    (
        nn.modules.batchnorm._BatchNorm,  # noqa: SLF001 - the base of every BatchNorm, lazy and synchronised ones too
        "it mixes the records of a batch, so that clipping one record's gradient does not bound its influence",
        "use nn.GroupNorm or nn.LayerNorm instead",
    ),
    (
        nn.RNNBase,
        "its fused kernel hides the gradients of single records",
        "use the model 'lstm', or opacus.layers.DPLSTM with batch_first=True",
    ),
    (
        nn.MultiheadAttention,
        "its fused kernel hides the gradients of single records",
        "build attention from nn.Linear layers, as the model 'transformer' does",
    ),
)


def refuse_coupled(model: nn.Module) -> None:
    """Check that every layer treats a record by itself.

    Raises:
        ModelError: a layer mixes records, keeps sums over them, or takes the batch in another dimension than the
            first; the hint names a replacement.
    """
    for name, module in model.named_modules():
        for kind, why, hint in _REPLACEMENT:
            if isinstance(module, kind):
                raise ModelError(f"layer {name!r} is {type(module).__name__}: {why}", hint=hint)
        _refuse_settings(name, module)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("the model has no parameter to train")
    if errors := ModuleValidator.validate(model, strict=False):
        raise ModelError(f"Opacus cannot bound a record's influence: {type(errors[0]).__name__}: {errors[0]}")


def _refuse_settings(name: str, module: nn.Module) -> None:
    """Layers that are sound with some settings and not with others."""
    if getattr(module, "track_running_stats", False):
        raise ModelError(
            f"layer {name!r} is {type(module).__name__} with running statistics: they add up over records",
            hint="track_running_stats=False, or nn.GroupNorm",
        )
    if isinstance(module, DPMultiheadAttention):
        # with batch_first=True Opacus 1.6 computes another function; without, the batch is not the first dimension
        raise ModelError(
            f"layer {name!r} is DPMultiheadAttention, which does not compute attention over a leading batch",
            hint="build attention from nn.Linear layers, as the model 'transformer' does",
        )
    if getattr(module, "batch_first", True) is False:
        raise ModelError(
            f"layer {name!r} is {type(module).__name__} with batch_first=False: it would take time for the batch",
            hint="batch_first=True",
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise ModelError(
            f"layer {name!r} renormalises its weights by the records it meets", hint="nn.Embedding without max_norm"
        )
