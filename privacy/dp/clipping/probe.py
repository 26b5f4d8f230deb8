"""Which engine: those that agree with a loop over single records, and of these the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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

TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 2e-3}
_RECORDS = 5
_MOST = 256
_LEAST = 32
_TURNS = 4
_HOPELESS = 3.0
_PATIENCE = 3.0  # seconds; after that, one measurement of each has to be enough
_HANDICAP = 1.2  # for engines that hold every gradient: a noisy clock must not pick them
_BATCHED = ("closed", "numpy", "book")  # the others gain nothing from more than 64 records at a time

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
        make: builds a fresh network with the same weights each time it is called.
        inputs: values per record.
        classes: number of classes.
        precision: of the forward and backward pass.
        engines: which may be chosen; one name checks that engine alone.
        places: how many places a step has.
        rows: rows of each place.
        microbatch: the most rows at a time; 0: what is fastest. 1 is the strict mode, in which no row has a neighbour.

    Right means: within 1e-9 of the definition in float64, and within 2e-3 where float32 is asked for, on five synthetic
    records, with all of them clipped and with none. The definition is computed record by record with plain autograd in
    float64. Then the test of row independence (:func:`~fedveil.privacy.dp.clipping.stand_alone.problem`) is run at the
    shape of the steps.

    Raises:
        ModelError: the network couples records, or no engine computes the right sum.
    """
    refuse_coupled(make())
    found: list[Clipper] = []
    reasons: list[str] = []
    records = _synthetic(make(), inputs, classes, _RECORDS)
    with _shaken(make().double()) as model:
        expected = {clip: reference(model, records, clip) for clip in (0.05, 1e9)}
    for engine in engines:
        if engine == "numpy" and rows > 1:
            continue  # it takes one row for each place
        try:
            # In float64 first: a small error in a norm would hide in the rounding of float32.
            exact = Clipper(make(), engine, device, precision="float64", microbatch=microbatch or None)
            right = _agrees(exact, records, expected, len(records[1]) + 1, rows)
            clipper = exact
            if precision == "float32":
                clipper = Clipper(make(), engine, device, precision=precision, microbatch=microbatch or None)
                right = right and _agrees(clipper, records, expected, len(records[1]) + 1, rows)
        except (ModelError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as e:
            reasons.append(f"{engine}: {type(e).__name__}")  # Opacus has no error class of its own
            continue
        if right:
            found.append(clipper)
        else:
            reasons.append(f"{engine}: another sum")
    timed = _synthetic(make(), inputs, classes, max(1, min(places * rows, _MOST)))
    for clipper in _by_speed(found, make, timed, sizes=not microbatch):
        if not _agrees(clipper, records, expected, each := clipper.shape(places, rows)[1], rows):
            reasons.append(f"{clipper.engine}: another sum in a microbatch of {each}")
        elif why := problem(clipper, inputs, places, rows):
            reasons.append(f"{clipper.engine}: {why}")
        else:
            return clipper
    raise ModelError(
        f"no engine computes this network's clipped sum in {precision} ({'; '.join(reasons)})",
        hint="another precision, or microbatch = 1, in [training] of site.toml",
    )


def reference(model: nn.Module, records: Records, clip: float) -> NDArray[np.float64]:
    """``(D,)``: the definition. One backward pass for each record by itself, in float64, without dropout."""
    model = model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = np.zeros(sum(p.numel() for p in parameters))
    with _without_dropout(model):
        for x, label in zip(*records, strict=True):
            loss = functional.cross_entropy(model(torch.from_numpy(x[None]).double()), torch.tensor([int(label)]))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            g = torch.cat([w.reshape(-1) for w in whole]).numpy()
            total += g * min(1.0, clip / (float(np.linalg.norm(g)) + 1e-300))
    return total


def _agrees(
    clipper: Clipper, records: Records, expected: dict[float, NDArray[np.float64]], places: int, rows: int
) -> bool:
    """With all clipped, and with none: an error in the norms shows in the first, an error in the sum in both.

    The records sit at the last of so many places. Where a place has several rows, a record is one person's only row.
    """
    n = len(records[1])
    seats = np.full(max(places, n), EMPTY, np.int64)
    seats[-n:] = np.arange(n)
    persons = None
    if rows > 1:
        persons = np.full((n, rows), EMPTY, np.int64)
        persons[:, -1] = np.arange(n)
    for clip, values in expected.items():
        with _shaken(clipper.model), _without_dropout(clipper.model):
            out = clipper.clipped_sum(*records, clip, seats, persons)
        scale = float(np.linalg.norm(values)) or 1.0
        if out.excluded or not np.linalg.norm(out.values - values) <= TOLERANCE[clipper.precision] * scale:
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
    """Fastest first: best of interleaved runs; one that takes three times the best so far is not asked again."""
    if len(found) == 1:
        return found
    size = sum(p.numel() for p in make().parameters() if p.requires_grad)
    for c in list(found) if sizes else []:
        tried = {fitting(c.engine, size, _MOST), min(_LEAST, c.microbatch)} if c.engine in _BATCHED else set()
        for m in tried - {c.microbatch}:
            if m < len(records[1]) or m < c.microbatch:
                found.append(Clipper(make(), c.engine, str(c.device), precision=c.precision, microbatch=m))
    best = {id(c): float("inf") for c in found}
    start = time.perf_counter()
    for turn in range(_TURNS):
        for c in found:
            if turn and (best[id(c)] > _HOPELESS * min(best.values()) or time.perf_counter() - start > _PATIENCE):
                continue
            taken = _seconds(c, records) * (1.0 if c.engine in _BATCHED else _HANDICAP)
            best[id(c)] = min(best[id(c)], taken)
    return sorted(found, key=lambda c: best[id(c)])


def _seconds(clipper: Clipper, records: Records) -> float:
    start = time.perf_counter()
    clipper.clipped_sum(*records, 0.5)
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
