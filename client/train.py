"""A site's computation on its own records: the clipped sum of one step, or a client's clipped model update."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fedveil.common.errors import DeviceError, ModelError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.privacy.dp import clipping
from fedveil.privacy.dp.clipping.device import failed, fix_arithmetic
from fedveil.privacy.dp.places import seat
from fedveil.privacy.dp.rounding import margin
from fedveil.privacy.dp.sampling import poisson_sample
from fedveil.privacy.plan import PrivacyPlan

_LOG = logging.getLogger("fedveil.client")


def pick_device(wanted: str) -> str:
    """``cuda`` if it is wanted or allowed and present, else ``cpu``."""
    if wanted not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu"
    fix_arithmetic()
    return "cuda"


@lru_cache(maxsize=8)
def clipper(
    spec: ModelSpec,
    engine: str,
    device: str,
    precision: clipping.Precision = "float32",
    places: int = 128,
    rows: int = 1,
    microbatch: int = 0,
) -> clipping.Clipper:
    """The clipping engine for a network, built once per process.

    Only an engine that computes the right sum, and whose rows pass the test of independence at the shape of the steps,
    is given (see :mod:`fedveil.privacy.dp.clipping`).

    Args:
        engine: ``auto``, the fastest; or one of :data:`fedveil.privacy.dp.clipping.Engine`, which has to pass too.
        places, rows: the shape of a step (:meth:`PrivacyPlan.places`), and how many rows a place holds.
        microbatch: the most rows at a time; 0: what is fastest.

    Raises:
        ModelError: the network couples records, or no engine passes; it says which failed and why.
    """
    engines = get_args(clipping.Engine)
    if engine not in ("auto", *engines):
        raise ModelError(f"unknown engine {engine!r}", hint="auto, " + ", ".join(engines))
    named = engines if engine == "auto" else (cast(clipping.Engine, engine),)
    return clipping.choose(
        lambda: build(spec), spec.inputs, spec.classes, device, precision=precision, engines=named, places=places,
        rows=rows, microbatch=microbatch,
    )  # fmt: skip


def site_sum(
    engine: clipping.Clipper,
    plan: PrivacyPlan,
    weights: NDArray[np.float32],
    X: NDArray[np.float32],
    y: NDArray[np.int64],
    capacity: int,
    persons: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """``(D,)``: what this site adds to the round before noise.

    Args:
        capacity: K, the most records (or persons) that the site may ever hold. It decides the step's shape.
        persons: ``(n, R)`` the rows of each person, in a plan whose unit is the person.

    Sensitivity: one unit changes it by at most ``plan.clip`` in L2 norm, beyond what rounding adds
    (``docs/sensitivity.md``), whatever ``weights`` are. Records that cannot be used are left out one by one. If the
    whole step fails all the same, the site adds nothing and its noise still goes out, so no refusal shows. But the
    bound above does not cover such a failure. So nothing that one record can do may cause one.

    Raises:
        DeviceError: the GPU was lost, or another process has its memory: no record can cause that. Nothing was charged
            or released. The site misses the round.
    """
    with _naming_lost_gpus(engine.device):
        engine.load(weights)
        try:
            if plan.mode == "client":
                # Whether or not it is in the sample, the update is computed: time must not tell.
                update = _client_update(engine, plan, X, y)
                return update if in_sample(plan, 1)[0] else np.zeros_like(update)
            units = len(X) if persons is None else len(persons)
            seats = seat(units, plan.sample_rate, plan.places(capacity))
            out = engine.clipped_sum(X, y, plan.clip, seats, persons, capacity)
        except Exception as e:  # of every class: a failure that the data can cause must not show
            # The memory of a client's descent is that of its records.
            counts = plan.mode == "client" and isinstance(e, torch.OutOfMemoryError)
            if failed(e, engine.device) and not counts:
                raise
            _LOG.error("the step failed on this site's data (%s): releasing noise only", type(e).__name__)
            return np.zeros(plan.model.parameters)
    if out.excluded:
        _LOG.warning("records without a finite gradient were left out of this step")
    return out.values


@contextmanager
def _naming_lost_gpus(device: torch.device) -> Iterator[None]:
    """:class:`DeviceError` for whatever a GPU that has failed raises."""
    try:
        yield
    except Exception as e:
        if not failed(e, device):
            raise
        raise DeviceError(
            f"the GPU failed in this step ({type(e).__name__}): nothing was charged, and this site misses the round",
            hint="stop other jobs on the GPU; if it does not compute any more, restart this site: it goes on",
        ) from e


def _client_update(
    engine: clipping.Clipper, plan: PrivacyPlan, X: NDArray[np.float32], y: NDArray[np.int64]
) -> NDArray[np.float64]:
    """DP-FedAvg (McMahan et al. 2018): ``local_steps`` passes over the records, the whole update clipped to C."""
    if not len(X):
        return np.zeros(plan.model.parameters)
    if engine.stacks:
        return client_updates(engine, plan, X[None], y[None])[0]
    model, parameters = engine.model, engine.parameters
    begun = [p.detach().clone() for p in parameters]
    features = torch.from_numpy(X).to(engine.device, parameters[0].dtype)
    labels = torch.from_numpy(y).to(engine.device)
    rate, pull = plan.optimizer.learning_rate, plan.optimizer.proximal
    for part in clipping.passes(len(X), plan.local_steps, plan.local_batch):
        loss = torch.nn.functional.cross_entropy(model(features[part]), labels[part])
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, p0 in zip(parameters, grads, begun, strict=True):
                p.sub_(rate * (g + pull * (p - p0)))
    moved = [(p0.double() - p.detach().double()).reshape(-1) for p, p0 in zip(parameters, begun, strict=True)]
    return _clipped(plan, torch.cat(moved).cpu().numpy()[None])[0]


def client_updates(
    engine: clipping.Clipper, plan: PrivacyPlan, X: NDArray[np.float32], y: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``(S, D)``: the clipped updates of S clients of n records each, from the weights that ``engine`` holds.

    Args:
        engine: one that :attr:`~fedveil.privacy.dp.clipping.Clipper.stacks`.
        X: ``(S, n, features)``. y: ``(S, n)``. A client with a class that the model does not have adds zeros.
    """
    known = ((y >= 0) & (y < plan.model.classes)).all(1)
    parts = clipping.passes(X.shape[1], plan.local_steps, plan.local_batch)
    o = plan.optimizer
    moved = engine.descents(X, np.where(known[:, None], y, 0), parts, o.learning_rate, o.proximal)
    moved[~known] = 0.0
    return _clipped(plan, moved)


def in_sample(plan: PrivacyPlan, clients: int) -> NDArray[np.bool_]:
    """``(clients,)``: which are in the round's sample, each by its own coin that nobody else sees (mode ``client``).

    The others send zeros, with their share of the noise like everybody: who was sampled does not show, and the plan's
    sample rate counts.
    """
    if plan.sample_rate == 1:
        return np.ones(clients, np.bool_)
    return poisson_sample(clients, plan.sample_rate)


def _clipped(plan: PrivacyPlan, updates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row of ``updates`` clipped to C; zeros for one that is not finite."""
    updates[~np.isfinite(updates).all(1)] = 0.0
    norms = np.sqrt(np.einsum("ij,ij->i", updates, updates))
    factor = np.minimum(plan.clip * (1 - margin(plan.model.parameters)) / (norms + 1e-30), 1.0)
    return updates * factor[:, None]
