"""Clipped sums by the plainest way there is: torch's autograd on one record after the other, in double precision.

It shares nothing with the engines that sites clip with, except the network itself. It is slow, and made for a few
records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from fedveil.client.statistics import predictions
from fedveil.common.wire import sha256
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import StatsSpec
from fedveil.common.workload.torch.networks import build, flatten, trainable
from fedveil.privacy.audit.evidence import Part
from fedveil.privacy.dp.noise import KeyStream
from fedveil.privacy.dp.statistics import vectors
from fedveil.privacy.plan import PrivacyPlan, Workload

_DIFFERENT = 4  # records; the others are copies, so that their sum stands out of the noise


class Autograd:
    """See :class:`~fedveil.privacy.audit.evidence.Reference`."""

    def workload(self, plan: PrivacyPlan) -> Workload:
        """The plan's own; a frozen base is drawn from its seed, and a model to evaluate is its public start."""
        model = plan.model
        if isinstance(model, ModelSpec):
            return model.model_copy(update={"base": ""})
        if model.metric is None:
            return model
        start = sha256(flatten(build(model.metric.network)).astype("<f4").tobytes())
        return model.model_copy(update={"metric": model.metric.model_copy(update={"model_hash": start})})

    def records(self, plan: PrivacyPlan, each: Sequence[int]) -> list[Part]:
        """Uniform features, token ids or columns, and classes, from the operating system's randomness."""
        stream, model = KeyStream(), plan.model
        X = (2 * stream.uniform(_DIFFERENT, model.inputs) - 1).astype(np.float32)
        if isinstance(model, StatsSpec):
            for c in model.columns:
                if c.source == "coded":
                    X[:, c.at : c.at + len(c.labels)] = 0
                    X[np.arange(_DIFFERENT), c.at + stream.below(len(c.labels), _DIFFERENT)] = 1
                elif c.missing:
                    X[:, c.at + 1] = 0
        elif model.vocabulary:
            X = stream.below(model.vocabulary, X.size).reshape(X.shape).astype(np.float32)
        y = stream.below(model.classes, _DIFFERENT)
        taken = [np.arange(n) % _DIFFERENT for n in each]
        return [(X[rows], y[rows]) for rows in taken]

    def lengths(self, plan: PrivacyPlan, parts: Sequence[Part]) -> NDArray[np.float64]:
        """Of single records' gradients, of whole sites' updates, or of records' vectors."""
        return np.linalg.norm(self._units(plan, parts), axis=1)

    def known(self, plan: PrivacyPlan, parts: Sequence[Part]) -> NDArray[np.float64]:
        """``(D,)``: the sum of what is clipped, after each was cut to the plan's clip."""
        units = self._units(plan, parts)
        factors = np.minimum(1.0, plan.clip / np.maximum(np.linalg.norm(units, axis=1), 1e-300))
        return (units * factors[:, None]).sum(0)

    def _units(self, plan: PrivacyPlan, parts: Sequence[Part]) -> NDArray[np.float64]:
        if isinstance(plan.model, StatsSpec):
            return np.concatenate([_vectors(plan.model, X, y) for X, y in parts])
        if plan.mode == "client":
            return np.stack([_update(plan, X, y) if len(X) else np.zeros(plan.model.parameters) for X, y in parts])
        model = build(plan.model).double()
        rows = [_gradient(model, X[i : i + 1], y[i : i + 1]) for X, y in parts for i in range(len(X))]
        return np.stack(rows)


def _gradient(model: nn.Module, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
    parameters = trainable(model)
    loss = cross_entropy(model(torch.from_numpy(X).double()), torch.from_numpy(y))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).numpy()


def _update(plan: PrivacyPlan, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
    """A client's descent on its mean loss: what its weights lose in ``local_steps`` passes."""
    model = build(plan.network).double()
    start = flat = torch.cat([p.detach().reshape(-1) for p in trainable(model)])
    o, many = plan.optimizer, -(-len(X) // plan.local_batch) if plan.local_batch else 1
    for first in [*range(many)] * plan.local_steps:
        gradient = torch.from_numpy(_gradient(model, X[first::many], y[first::many]))
        flat = flat - o.learning_rate * (gradient + o.proximal * (flat - start))
        nn.utils.vector_to_parameters(flat, trainable(model))
    return (start - flat).numpy()


def _vectors(spec: StatsSpec, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
    predicted = None
    if spec.metric is not None:
        predicted = predictions(spec.metric, flatten(build(spec.metric.network)), X)
    return vectors(spec, X, y, predicted)
