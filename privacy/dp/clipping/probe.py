"""Which engine: those that agree with a loop over single records, and of these the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedveil.common.errors import ModelError
from fedveil.privacy.dp.clipping.core import BACKENDS, Clipper, Engine, Precision, fitting
from fedveil.privacy.dp.clipping.gradient_factors import Limit
from fedveil.privacy.dp.clipping.guard import refuse_coupled

TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 2e-3}
_RECORDS = 5
_MOST = 256
_LEAST = 32
_TURNS = 4
_HOPELESS = 3.0
_PATIENCE = 3.0  # seconds; after that, one measurement of each has to be enough
_HANDICAP = 1.2  # for float32, and for engines that hold every gradient: a noisy clock must not pick them
_BATCHED = ("closed", "numpy", "book")  # the others gain nothing from more than 64 records at a time

Records = tuple[NDArray[np.float32], NDArray[np.int64]]


def choose(
    make: Callable[[], nn.Module],
    inputs: int,
    classes: int,
    device: str = "cpu",
    *,
    precision: Precision | Literal["auto"] = "float64",
    engines: Sequence[Engine] = tuple(BACKENDS),
    batch: int = 128,
) -> Clipper:
    """The fastest engine that computes the right sum.

    Args:
        make: builds a fresh network with the same weights each time it is called.
        inputs: values per record.
        classes: number of classes.
        precision: ``auto`` tries both and takes float32 only where it is at least a fifth faster.
        engines: which may be chosen; one name checks that engine alone.
        batch: how many records a step is expected to have.

    Right means: within 1e-9 (float64) or 2e-3 (float32) of the definition, on five synthetic records, with all of them
    clipped and with none. The definition is computed record by record with plain autograd in float64. In float32 an
    engine must also pass :func:`position_free`.

    Raises:
        ModelError: the network couples records, or no engine computes the right sum.
    """
    refuse_coupled(make())
    found: list[Clipper] = []
    reasons: list[str] = []
    records = _synthetic(make(), inputs, classes, _RECORDS)
    with _shaken(make().double()) as model:
        expected = {clip: reference(model, records, clip) for clip in (0.05, 1e9)}
    wanted: tuple[Precision, ...] = ("float64", "float32") if precision == "auto" else (precision,)
    for engine in engines:
        for kind in wanted:
            try:
                clipper = Clipper(make(), engine, device, precision=kind)
                right = _agrees(clipper, records, expected, len(records[1]) + 1)
            except (ModelError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as e:
                reasons.append(f"{engine}: {type(e).__name__}")  # Opacus has no error class of its own
                continue
            if right:
                found.append(clipper)
            else:
                reasons.append(f"{engine}: another sum")
    for clipper in _by_speed(found, make, _synthetic(make(), inputs, classes, max(1, min(batch, _MOST)))):
        if not _agrees(clipper, records, expected, clipper.microbatch):
            reasons.append(f"{clipper.engine}: another sum in a microbatch of {clipper.microbatch}")
        elif clipper.precision == "float32" and not position_free(clipper, inputs, classes):
            reasons.append(f"{clipper.engine}: a record's rounding depends on its place")
        else:
            return clipper
    raise ModelError(f"no engine computes this network's clipped sum ({'; '.join(reasons)})")


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


def _agrees(clipper: Clipper, records: Records, expected: dict[float, NDArray[np.float64]], microbatch: int) -> bool:
    """With all clipped, and with none: an error in the norms shows in the first, an error in the sum in both."""
    for clip, values in expected.items():
        usual, clipper.microbatch = clipper.microbatch, microbatch
        with _shaken(clipper.model), _without_dropout(clipper.model):
            out = clipper.clipped_sum(*records, clip)
        clipper.microbatch = usual
        scale = float(np.linalg.norm(values)) or 1.0
        if out.excluded or not np.linalg.norm(out.values - values) <= TOLERANCE[clipper.precision] * scale:
            return False
    return True


def position_free(clipper: Clipper, inputs: int, classes: int) -> bool:
    """Whether a record's contribution has the same bits in every place of a microbatch and beside all neighbours.

    Tried for the first, second, middle and last places, and with two sets of neighbours, one of them far larger.
    """
    n = clipper.microbatch
    X, y = _synthetic(clipper.model, inputs, classes, n + 1)
    probe_x, probe_y = X[-1], y[-1]
    seen: set[bytes] = set()
    places = sorted({0, 1 % n, n // 2, n // 2 + n // 4, n - 1})
    tokens = getattr(clipper.model, "vocabulary", 0)
    for scale, tried in ((1.0, places), (1.0 if tokens else 1e3, places[1::2])):
        for place in tried:
            shift = place if scale == 1 else place + 1
            batch_x, batch_y = np.roll(X[:-1], shift, 0) * np.float32(scale), np.roll(y[:-1], shift)
            batch_x[place], batch_y[place] = probe_x, probe_y
            seen.add(_alone(clipper, batch_x, batch_y, place))
    return len(seen) == 1


def _alone(clipper: Clipper, X: NDArray[np.float32], y: NDArray[np.int64], place: int) -> bytes:
    """The bits that the record at ``place`` contributes while all others are multiplied by 0."""
    keep = torch.zeros(len(X), dtype=torch.bool, device=clipper.device)
    keep[place] = True
    dtype = next(clipper.model.parameters()).dtype
    with _shaken(clipper.model), _without_dropout(clipper.model):
        values = torch.zeros(clipper.size, dtype=torch.float64, device=clipper.device)
        norms = clipper._backend(  # noqa: SLF001 - the probe looks at one record inside a microbatch
            torch.from_numpy(X).to(clipper.device, dtype),
            torch.from_numpy(y).to(clipper.device),
            Limit(0.05, keep),
            values,
        )
    return (values + 0.0).cpu().numpy().tobytes() + norms[place].cpu().numpy().tobytes()


def _synthetic(model: nn.Module, inputs: int, classes: int, n: int) -> Records:
    """Fixed records that differ from each other, of the kind the network takes."""
    place = np.arange(n * inputs, dtype=np.float64).reshape(n, inputs)
    wave = np.sin(place * 0.7311 + np.square(place % 97) * 0.013)  # no two alike, no symmetry
    vocabulary = int(getattr(model, "vocabulary", 0))
    X = np.floor((wave + 1) / 2 * (vocabulary - 1e-6)) if vocabulary else wave
    return X.astype(np.float32), np.arange(n, dtype=np.int64) % classes


def _by_speed(found: list[Clipper], make: Callable[[], nn.Module], records: Records) -> list[Clipper]:
    """Fastest first: best of interleaved runs; one that takes three times the best so far is not asked again."""
    if len(found) == 1:
        return found
    size = sum(p.numel() for p in make().parameters() if p.requires_grad)
    for c in list(found):
        sizes = {fitting(c.engine, size, _MOST), min(_LEAST, c.microbatch)} if c.engine in _BATCHED else set()
        for m in sizes - {c.microbatch}:
            if m < len(records[1]) or m < c.microbatch:
                found.append(Clipper(make(), c.engine, str(c.device), precision=c.precision, microbatch=m))
    best = {id(c): float("inf") for c in found}
    start = time.perf_counter()
    for turn in range(_TURNS):
        for c in found:
            if turn and (best[id(c)] > _HOPELESS * min(best.values()) or time.perf_counter() - start > _PATIENCE):
                continue
            handicaps = (c.precision == "float32") + (c.engine not in _BATCHED)
            taken = _seconds(c, records) * _HANDICAP**handicaps
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
