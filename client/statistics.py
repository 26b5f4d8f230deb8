"""A site's computation for a run of statistics: one clipped sum over all its records."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import ProtocolError, WireError
from fedveil.common.wire import Packet, sha256
from fedveil.common.workload.statistics import EVALUATED, MetricSpec, StatsSpec
from fedveil.common.workload.torch.layers import Tokens
from fedveil.common.workload.torch.networks import build, predict, unflatten
from fedveil.privacy.dp import statistics
from fedveil.privacy.plan import PrivacyPlan

_LOG = logging.getLogger("fedveil.client")


def statistics_sum(
    plan: PrivacyPlan, spec: StatsSpec, request: Packet, X: NDArray[np.float32], y: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``(D,)``: what this site adds to the sum before noise.

    Sensitivity: one record changes it by at most ``plan.clip`` in L2 norm. If anything goes wrong with the data, this
    does not show: the site then adds nothing, and its noise still goes out, as in training.

    Raises:
        WireError, ProtocolError: the weights to evaluate are not those that the plan names (public facts).
    """
    weights = None if spec.metric is None else _weights(spec.metric, request)
    try:
        predicted = None if spec.metric is None or weights is None else predictions(spec.metric, weights, X)
        return statistics.clipped_sum(spec, X, y, plan.clip, predicted)
    except Exception as e:  # of every class: a failure that the data can cause must not show
        _LOG.error("the statistics failed on this site's data (%s): releasing noise only", type(e).__name__)
        return np.zeros(spec.parameters)


def predictions(metric: MetricSpec, weights: NDArray[np.float32], X: NDArray[np.float32]) -> NDArray[np.int64]:
    """``(n,)`` predicted classes, one record at a time; -1 for a record that the network cannot take.

    In a batch, the rounding of one record's scores depends on how many others there are. Near a tie, one record could
    so change another record's prediction, and the sum would move by more than one record's share. For the same reason
    a record that the network cannot take (no token id) is left out by itself, and never by an exception.
    """
    model = build(metric.network).double().eval()
    unflatten(model, weights)
    usable = np.isfinite(X).all(axis=1)
    if isinstance(model, Tokens):
        usable &= model.usable(X)
    pairs = zip(X, usable.tolist(), strict=True)
    return np.array([int(predict(model, row[None]).argmax()) if ok else -1 for row, ok in pairs], np.int64)


def _weights(metric: MetricSpec, request: Packet) -> NDArray[np.float32]:
    data = request.buffer(EVALUATED, 4 * metric.network.parameters)
    if sha256(data) != metric.model_hash:
        raise ProtocolError("the model to evaluate is not the one that the plan names")
    weights = np.frombuffer(data, "<f4")
    if not np.isfinite(weights).all():
        raise WireError("the weights hold a NaN or an infinity")
    return weights
