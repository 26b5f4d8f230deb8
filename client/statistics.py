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
from fedveil.privacy.dp.places import EMPTY, seat
from fedveil.privacy.plan import PrivacyPlan

_LOG = logging.getLogger("fedveil.client")


def statistics_sum(
    plan: PrivacyPlan,
    spec: StatsSpec,
    request: Packet,
    X: NDArray[np.float32],
    y: NDArray[np.int64],
    capacity: int,
    persons: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """``(D,)``: what this site adds to the sum before noise.

    Args:
        capacity: K, the most records that the site may ever hold. All K places are computed; empty ones hold a record
            that does not count.
        persons: ``(n, R)`` the rows of each person, in a plan whose unit is the person. A person counts once, with the
            mean of the rows' vectors.

    Sensitivity: one record changes it by at most ``plan.clip`` in L2 norm. If anything goes wrong with the data, this
    does not show: the site then adds nothing, and its noise still goes out, as in training.

    Raises:
        WireError, ProtocolError: the weights to evaluate are not those that the plan names (public facts).
    """
    weights = None if spec.metric is None else _weights(spec.metric, request)
    try:
        X, y = _seated(X, y, plan.places(capacity), np.arange(len(X))[:, None] if persons is None else persons)
        predicted = None if spec.metric is None or weights is None else predictions(spec.metric, weights, X)
        return statistics.clipped_sum(spec, X, y, plan.clip, predicted, plan.rows_per_person)
    except Exception as e:  # of every class: a failure that the data can cause must not show
        _LOG.error("the statistics failed on this site's data (%s): releasing noise only", type(e).__name__)
        return np.zeros(spec.parameters)


def _seated(
    X: NDArray[np.float32], y: NDArray[np.int64], places: int, groups: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The rows of the units at random places, R for each; where there is none, zeros of a class that does not exist."""
    seats = seat(len(groups), 1.0, places)
    rows = np.full((places, groups.shape[1]), EMPTY)
    rows[seats >= 0] = groups[seats[seats >= 0]]
    rows = rows.reshape(-1)
    taken = rows >= 0
    features, classes = np.zeros((len(rows), X.shape[1]), X.dtype), np.full(len(rows), -1, y.dtype)
    features[taken], classes[taken] = X[rows[taken]], y[rows[taken]]
    return features, classes


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
