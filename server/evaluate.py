"""Metrics on a table that was declared public and belongs to no site. They cost no budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, predict, unflatten


def area_under_roc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann-Whitney)."""
    hits, misses = int(positive.sum()), int((~positive).sum())
    if not hits or not misses:
        raise DataError("the public test table holds one class only", hint="AUC needs both classes")
    order = np.argsort(scores, kind="stable")
    _, inverse, counts = np.unique(scores[order], return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = np.empty(len(scores))
    ranks[order] = (last - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


class Evaluator:
    """Accuracy, and AUC for two classes, of flat weights on one public table.

    Raises:
        DataError: no rows, a class that the model does not have, or only one of the two classes of a model with two.
    """

    def __init__(self, spec: ModelSpec, X: NDArray[np.float32], y: NDArray[np.int64]) -> None:
        # Checked here, before a run begins, and not after its first charged round.
        present = np.unique(y)
        if not len(present) or present[0] < 0 or present[-1] >= spec.classes:
            raise DataError(f"the public test table holds no rows, or classes outside 0..{spec.classes - 1}")
        self._binary = spec.classes == 2
        if self._binary and len(present) < 2:
            raise DataError("the public test table holds one class only", hint="AUC needs both classes")
        self._model, self._X, self._y = build(spec), X, y

    def __call__(self, weights: NDArray[np.float64]) -> dict[str, float]:
        """``{"accuracy": ..., "auc": ...}`` of ``(D,)`` weights."""
        unflatten(self._model, weights.astype(np.float32))
        p = predict(self._model, self._X)
        out = {"accuracy": float((p.argmax(1) == self._y).mean())}
        if self._binary:
            out["auc"] = area_under_roc(p[:, 1], self._y == 1)
        return out
