"""Was this record in the training data? LiRA (Carlini et al. 2022) with a few shadow models.

Every model is trained on a random half of the records. Each is attacked in turn, with all others as shadows. For each
record the shadows give two distributions of its logit: of models trained on it, and of the others. Their likelihood
ratio is the score. With so few shadows, all records share one spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, flatten, predict, unflatten
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.dp.noise import KeyStream
from fedveil.privacy.plan import PrivacyPlan

FALSE_ALARMS = 0.01


@dataclass(frozen=True)
class Membership:
    """What the attack achieved over all models.

    Attributes:
        rate: true positives at 1 % false positives. auc: area under the curve.
        accuracy: of the models on public records they never saw.
    """

    rate: float
    auc: float
    accuracy: float


def trained_openly(spec: ModelSpec, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float32]:
    """``(D,)``: weights after plain gradient descent on all records, to the end: a model without any defence."""
    model = build(spec)
    features, labels = torch.from_numpy(X), torch.from_numpy(y)
    descent = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(400):
        descent.zero_grad()
        functional.cross_entropy(model(features), labels).backward()
        descent.step()
    return flatten(model)


def trained_privately(plan: PrivacyPlan, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float32]:
    """``(D,)``: weights after a run of this program over the plan's sites."""
    parts = list(zip(np.array_split(X, plan.sites), np.array_split(y, plan.sites), strict=True))
    run = InProcess().run(plan, parts)
    moved = np.sum([r.applied for r in run.releases], axis=0) * plan.optimizer.learning_rate
    return (flatten(build(plan.network)) - moved).astype(np.float32)


def logits(spec: ModelSpec, weights: NDArray[np.float32], X: NDArray[np.float32], y: NDArray[np.int64]):
    """``(n,)``: log(p / (1 - p)) of each record's own class."""
    model = build(spec)
    unflatten(model, weights)
    p = np.clip(predict(model, X)[np.arange(len(y)), y], 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def halves(models: int, records: int) -> NDArray[np.bool_]:
    """``(models, records)``: each record in half of the models, at random."""
    order = np.argsort(KeyStream().uniform(models * records).reshape(models, records), axis=0)
    return order < models // 2


def lira(seen: NDArray[np.float64], member: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores and truth of every record in every model, each model attacked with all others as shadows.

    Args:
        seen: ``(models, n)`` logits. member: ``(models, n)`` who was trained on.
    """
    scores = np.empty_like(seen)
    for v in range(len(seen)):
        others = np.arange(len(seen)) != v
        s, m = seen[others], member[others]
        inside = np.where(m, s, 0).sum(0) / m.sum(0)
        outside = np.where(~m, s, 0).sum(0) / (~m).sum(0)
        spread = float(np.std(s - np.where(m, inside, outside))) + 1e-9
        scores[v] = ((seen[v] - outside) ** 2 - (seen[v] - inside) ** 2) / (2 * spread**2)
    return scores.reshape(-1), member.reshape(-1)


def judge(scores: NDArray[np.float64], truth: NDArray[np.bool_], accuracy: float) -> Membership:
    """The attack's rates."""
    outside = np.sort(scores[~truth])
    threshold = outside[-max(1, int(FALSE_ALARMS * outside.size))]
    ranks = np.argsort(np.argsort(scores)) + 1
    inside = int(truth.sum())
    auc = (float(ranks[truth].sum()) - inside * (inside + 1) / 2) / (inside * outside.size)
    return Membership(float((scores[truth] > threshold).mean()), auc, accuracy)
