"""Which engine: the first kind that agrees with a loop over single records, and of that kind the fastest.

Engines that hold no gradient of a single record come first, or hold it in a form that is summed at once. The others are
tried only where none of these can treat the network: a large network never has to wait for them, nor make room.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedveil.common.errors import ModelError
from fedveil.privacy.dp.clipping.core import BACKENDS, Clipper, Engine, Precision, fitting
from fedveil.privacy.dp.clipping.guard import refuse_coupled
from fedveil.privacy.dp.clipping.stand_alone import problem
from fedveil.privacy.dp.places import EMPTY
from fedveil.privacy.dp.rounding import margin

_LOG = logging.getLogger("fedveil.privacy")
TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 2e-3}
_RECORDS = 3
_MOST = 512
_LEAST = 32
_TURNS = 4
_HOPELESS = 3.0
_PATIENCE = 1.5  # seconds; after that, one measurement of each has to be enough
_FEW, _LONG = 8, 0.02  # so many records in so many seconds
_BATCHED = ("closed", "numpy", "book")  # the others hold every gradient, and gain nothing from larger batches

Records = tuple[NDArray[np.float32], NDArray[np.int64]]


def choose(
    make: Callable[[], nn.Module],
    inputs: int,
    classes: int,
    device: str = "cpu",
    *,
    precision: Precision = "float32",
    engines: Sequence[Engine] = tuple(BACKENDS),
    places: int = 128,
    rows: int = 1,
    microbatch: int = 0,
) -> Clipper:
    """The fastest engine that computes the right sum, and in which rows do not depend on each other.

    Args:
        make: builds the network; it is called once.
        inputs: values per record.
        classes: number of classes.
        precision: of the forward and backward pass.
        engines: which may be chosen; one name checks that engine alone.
        places: how many places a step has.
        rows: rows of each place.
        microbatch: the most rows at a time; 0: what is fastest. 1 is the strict mode, in which no row has a neighbour.

    Right means: within 1e-9 of the definition in float64, and within 2e-3 where float32 is asked for, on three
    synthetic records, once with all of them clipped and once with some. The definition is computed record by record
    with plain autograd in float64. Then the test of row independence
    (:func:`~fedveil.privacy.dp.clipping.stand_alone.problem`) is run at the shape of the steps.

    Raises:
        ModelError: the network couples records, or no engine computes the right sum.
    """
    built = make()  # once: the weights of a large network are drawn from hashes, which takes longer than a copy
    make = partial(deepcopy, built)
    refuse_coupled(built)
    reasons: list[str] = []
    right = _definition(make(), _synthetic(make(), inputs, classes, _RECORDS))
    timed = _synthetic(make(), inputs, classes, max(1, min(places * rows, _MOST)))

    def made(engine: Engine, precision: Precision) -> Clipper:
        return Clipper(make(), engine, device, precision=precision, microbatch=microbatch or None)

    kinds: tuple[list[Engine], list[Engine]] = ([], [])
    for engine in engines:
        kinds[engine not in _BATCHED].append(engine)
    for kind in kinds:
        found = [c for e in kind if (c := _parity(e, precision, made, right, rows, reasons)) is not None]
        for clipper in _by_speed(found, make, timed, sizes=not microbatch):
            if not (why := _within_memory(clipper, lambda c: _faults(c, right, inputs, places, rows))):
                return _settled(clipper)
            reasons.append(f"{clipper.engine}: {why}")
    raise ModelError(
        f"no engine computes this network's clipped sum in {precision} ({'; '.join(reasons)})",
        hint="another precision, or microbatch = 1, in [training] of site.toml",
    )


def _settled(clipper: Clipper) -> Clipper:
    clipper.release()
    if clipper.microbatch < clipper.wanted:
        _LOG.warning(
            "the GPU's memory holds %d rows at a time, not %d: steps take longer", clipper.microbatch, clipper.wanted
        )
    return clipper


def _faults(clipper: Clipper, right: _Right, inputs: int, places: int, rows: int) -> str:
    """Why an engine fails at the shape of the steps; empty if it does not."""
    each = clipper.shape(places, rows)[1]
    if not _agrees(clipper, right, right.sums[:1], each, rows):
        return f"another sum in a microbatch of {each}"
    return problem(clipper, inputs, places, rows)


def _within_memory(clipper: Clipper, check: Callable[[Clipper], str]) -> str:
    """What ``check`` says, with half the microbatch as often as a GPU's memory does not hold it.

    That may depend on the device and on what else runs there. It is settled before round 1, without any record.
    """
    while True:
        try:
            return check(clipper)
        except torch.OutOfMemoryError:
            if clipper.microbatch == 1:
                return "the GPU's memory does not hold one record's gradient"
        clipper.microbatch //= 2  # behind the handler: until there, the error holds what was computed
        clipper.release()


class _Right(NamedTuple):
    """What an engine has to come to.

    Attributes:
        sums: clip and clipped sum. The first clip is below every record's norm, so that an error in any norm shows. The
            second is not, so that an engine that only ever normalises shows.
    """

    records: Records
    sums: tuple[tuple[float, NDArray[np.float64]], ...]


def _definition(model: nn.Module, records: Records) -> _Right:
    with _shaken(model.double()):
        gradients = _gradients(model, records)
    norms = np.linalg.norm(gradients, axis=1)
    least = float(norms[norms > 0].min(initial=np.inf))
    clips = (0.5 * least, math.sqrt(least * float(norms.max()))) if math.isfinite(least) else (1.0,)
    return _Right(records, tuple((c, np.minimum(1.0, c / (norms + 1e-300)) @ gradients) for c in clips))


def _gradients(model: nn.Module, records: Records) -> NDArray[np.float64]:
    """``(n, D)``, one record after the other, by plain autograd."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = np.zeros((len(records[1]), sum(p.numel() for p in parameters)))
    with _without_dropout(model):
        for row, x, label in zip(out, *records, strict=True):
            loss = functional.cross_entropy(model(torch.from_numpy(x[None]).double()), torch.tensor([int(label)]))
            given = torch.autograd.grad(loss, parameters, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, given, strict=True)]
            row[:] = torch.cat([w.reshape(-1) for w in whole]).numpy()
    return out


def _parity(
    engine: Engine,
    precision: Precision,
    made: Callable[[Engine, Precision], Clipper],
    right: _Right,
    rows: int,
    reasons: list[str],
) -> Clipper | None:
    """The engine, if it computes the right sum; otherwise why not is added to ``reasons``."""
    if engine == "numpy" and rows > 1:
        return None  # it takes one row for each place
    clipper, places = None, len(right.records[1]) + 1

    def compare(clipper: Clipper) -> str:
        return "" if _agrees(clipper, right, right.sums, places, rows) else "another sum"

    try:
        # In float64 first: a small error in a norm would hide in the rounding of float32.
        each: Precision
        for each in ("float64", "float32")[: 1 if precision == "float64" else 2]:
            clipper = made(engine, each)
            if why := _within_memory(clipper, compare):
                reasons.append(f"{engine}: {why}")
                return None
    except (ModelError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as e:
        reasons.append(f"{engine}: {type(e).__name__}")  # Opacus has no error class of its own
        return None
    return clipper


def _agrees(
    clipper: Clipper, right: _Right, sums: Sequence[tuple[float, NDArray[np.float64]]], places: int, rows: int
) -> bool:
    """Whether the clipped sums are those of the definition.

    The records sit at the last of so many places. Where a place has several rows, a record is one person's only row.
    """
    n = len(right.records[1])
    seats = np.full(max(places, n), EMPTY, np.int64)
    seats[-n:] = np.arange(n)
    persons = None
    if rows > 1:
        persons = np.full((n, rows), EMPTY, np.int64)
        persons[:, -1] = np.arange(n)
    tolerance = TOLERANCE[clipper.precision] + margin(clipper.size)  # by so much the clip is taken in
    for clip, values in sums:
        with _shaken(clipper.model), _without_dropout(clipper.model):
            out = clipper.clipped_sum(*right.records, clip, seats, persons)
        scale = float(np.linalg.norm(values)) or 1.0
        if out.excluded or not np.linalg.norm(out.values - values) <= tolerance * scale:
            return False
    return True


def _synthetic(model: nn.Module, inputs: int, classes: int, n: int) -> Records:
    """Fixed records that differ from each other, of the kind the network takes."""
    place = np.arange(n * inputs, dtype=np.float64).reshape(n, inputs)
    wave = np.sin(place * 0.7311 + np.square(place % 97) * 0.013)  # no two alike, no symmetry
    vocabulary = int(getattr(model, "vocabulary", 0))
    X = np.floor((wave + 1) / 2 * (vocabulary - 1e-6)) if vocabulary else wave
    return X.astype(np.float32), np.arange(n, dtype=np.int64) % classes


def _by_speed(found: list[Clipper], make: Callable[[], nn.Module], records: Records, *, sizes: bool) -> list[Clipper]:
    """Fastest first: best of interleaved runs; one that takes three times the best so far is not asked again.

    Where a few records already take long, the order stays as it is: time is then in large products, which are the same.
    """
    few = records[0][:_FEW], records[1][:_FEW]
    if not found or _seconds(found[0], few) > _LONG:
        return found
    size = sum(p.numel() for p in make().parameters() if p.requires_grad)
    for c in list(found) if sizes else []:
        tried = {fitting(c.engine, size, _MOST, c.device), min(_LEAST, c.microbatch)} if c.engine in _BATCHED else set()
        for m in tried - {c.microbatch}:
            if m < c.microbatch or c.microbatch < len(records[1]):
                found.append(Clipper(make(), c.engine, str(c.device), precision=c.precision, microbatch=m))
    best = {id(c): float("inf") for c in found}
    start = time.perf_counter()
    for turn in range(_TURNS):
        for c in found:
            if turn and (best[id(c)] > _HOPELESS * min(best.values()) or time.perf_counter() - start > _PATIENCE):
                continue
            taken = _seconds(c, records)
            best[id(c)] = min(best[id(c)], taken)
    return sorted(found, key=lambda c: best[id(c)])


def _seconds(clipper: Clipper, records: Records) -> float:
    start = time.perf_counter()
    try:
        clipper.clipped_sum(*records, 0.5)
    except torch.OutOfMemoryError:  # it may still do with a smaller microbatch, if there is no other
        return math.inf
    return time.perf_counter() - start


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Two engines draw different masks, so they can only be compared without."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]  # noqa: SLF001
    for m in layers:
        m.eval()
    try:
        yield
    finally:
        for m in layers:
            m.train()


@contextmanager
def _shaken(model: nn.Module) -> Iterator[nn.Module]:
    """A layer of zeros (a fresh adapter) hides the gradients below it: for the comparison every weight is moved."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            steps = torch.arange(p.numel(), dtype=torch.float64).mul_(1.7).cos_().mul_(0.05).view_as(p)
            p.add_(steps.to(p.device, p.dtype))
    try:
        yield model
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
