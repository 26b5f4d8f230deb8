"""Records from gradients: by division, by matching (iDLG), by a network that the server made to steal (imprint).

All attack a dense network with one hidden layer of tanh. A record x moves the first layer's weights by ``δ xᵀ`` and its
biases by ``δ``. So every row of those weights, divided by its entry of those biases, *is* the record.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build

EXACT = 1e-3  # mean square over pixels in [0, 1]: nobody sees the difference
_STEEP = 4.0


def candidates(spec: ModelSpec, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(k, inputs)``: one record for every hidden unit whose bias moved (Phong et al. 2018, Section 3)."""
    hidden = spec.hidden[0]
    weights = seen[: hidden * spec.inputs].reshape(hidden, spec.inputs)
    bias = seen[hidden * spec.inputs :][:hidden]
    moved = np.abs(bias) > 1e-9 * max(float(np.abs(bias).max()), 1e-300)
    return weights[moved] / bias[moved, None]


def best(spec: ModelSpec, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(inputs,)``: the candidate of the unit that moved most."""
    hidden = spec.hidden[0]
    bias = seen[hidden * spec.inputs :][:hidden]
    k = int(np.argmax(np.abs(bias)))
    return seen[k * spec.inputs : (k + 1) * spec.inputs] / bias[k]


def errors(found: NDArray[np.float64], records: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(n,)``: mean square error of each record's nearest candidate."""
    if not len(found):
        return np.full(len(records), np.inf)
    known = np.clip(found, 0, 1)
    return np.array([float(((known - x) ** 2).mean(1).min()) for x in records.astype(np.float64)])


def label(spec: ModelSpec, seen: NDArray[np.float64]) -> int:
    """The class of a single record: the only output whose bias gradient is negative (Zhao et al. 2020, iDLG)."""
    return int(np.argmin(seen[-spec.classes :]))


def idlg(spec: ModelSpec, seen: NDArray[np.float64], *, iterations: int = 120) -> NDArray[np.float64]:
    """``(inputs,)``: a record whose gradient matches what was seen, by L-BFGS from a grey image (Zhao et al. 2020)."""
    model = build(spec).double()
    parameters = list(model.parameters())
    target = torch.from_numpy(seen)
    guess = torch.full((1, spec.inputs), 0.5, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([label(spec, seen)])
    search = torch.optim.LBFGS([guess], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
                               tolerance_change=1e-15)  # fmt: skip

    def distance() -> torch.Tensor:
        search.zero_grad()
        loss = functional.cross_entropy(model(guess), wanted)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        off = (torch.cat([g.reshape(-1) for g in gradients]) - target).square().sum()
        (guess.grad,) = torch.autograd.grad(off, [guess])
        return off.detach()

    search.step(distance)
    return guess.detach().numpy()[0]


def imprint(spec: ModelSpec, public: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(D,)``: weights that make each hidden unit answer to a narrow band of one projection of the records.

    After Fowl et al. 2022 ("Robbing the Fed"), for tanh: a unit's gradient is ``1 - tanh²``, a bump around its band, so
    that each band's row holds the record that falls into it. Bands are quantiles of public records.
    """
    hidden, inputs = spec.hidden[0], spec.inputs
    along = np.cos(np.arange(inputs) * 1.7 + 0.3)  # any fixed direction that tells images apart
    along /= np.linalg.norm(along)
    edges = np.quantile(public @ along, (np.arange(hidden) + 0.5) / hidden)
    gaps = np.gradient(edges)
    steep = 2 * _STEEP / np.maximum(gaps, 1e-4)
    first = steep[:, None] * along
    outward = np.repeat(np.cos(np.arange(spec.classes) * 2.3)[:, None], hidden, 1) / hidden
    parts = (first, -steep * edges, outward, np.zeros(spec.classes))
    return np.concatenate([p.reshape(-1) for p in parts]).astype(np.float32)
