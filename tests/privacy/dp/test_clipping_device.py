"""What a GPU needs, without one: tables that stay on a device, its memory, its loss, and that nothing waits."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedveil.common.errors import ModelError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.privacy.dp.clipping import Clipper, choose, core, device, direct, stand_alone
from fedveil.privacy.dp.clipping.core import fitting
from fedveil.privacy.dp.clipping.device import Resident, failed, free_bytes
from fedveil.privacy.dp.places import EMPTY

MLP = ModelSpec(name="mlp", inputs=6, classes=3, hidden=(5,))
TEXT = ModelSpec(name="transformer", inputs=6, classes=3, hidden=(9, 8, 2, 1))
CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


def table(spec: ModelSpec, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    X = rng.integers(0, spec.vocabulary, (n, spec.inputs)) if spec.vocabulary else rng.normal(0, 1, (n, spec.inputs))
    X, y = X.astype(np.float32), rng.integers(0, 3, n)
    X[1::5] = np.nan  # these cannot be used
    y[2::7] = 3
    return X, y


@pytest.mark.parametrize("spec", [MLP, TEXT], ids=lambda s: s.name)
@pytest.mark.parametrize("persons", [False, True])
@pytest.mark.parametrize("n", [0, 23])
def test_a_table_on_the_device_gives_the_batches_that_the_host_gives(spec, persons, n) -> None:
    clipper, (X, y) = Clipper(build(spec), "book"), table(spec, n)
    groups = np.r_[np.arange(n), [EMPTY] * (24 - n % 24)].reshape(-1, 4) if persons else np.arange(n)[:, None]
    units = len(groups)
    seats = np.random.default_rng(4).permutation(np.r_[np.arange(units), [EMPTY] * (32 - units)]).reshape(4, 8)
    held = Resident(X, y, clipper.usable(X, y), 40, CPU, clipper.dtype)
    found = list(held.batches(seats, groups, weighted=persons))
    assert len(found) == 4
    for batch, at in zip(found, seats, strict=True):
        expected = clipper.batch((X, y, groups, persons), at)
        assert torch.equal(batch.X, expected.X)
        assert torch.equal(batch.y, expected.y)
        assert torch.equal(batch.keep, expected.keep)
        assert (batch.weights is None) == (expected.weights is None)
        if batch.weights is not None and expected.weights is not None:
            assert torch.equal(batch.weights, expected.weights)


def test_a_table_is_uploaded_once_takes_the_room_of_its_capacity_and_is_given_back(monkeypatch) -> None:
    monkeypatch.setattr(core, "fits", lambda rows, inputs, device: True)
    here, there = Clipper(build(MLP), "closed", microbatch=8), Clipper(build(MLP), "closed", microbatch=8)
    for n in (5, 20):
        X, y = table(MLP, n)
        first, again = (there.clipped_sum(X, y, 0.5, capacity=30) for _ in range(2))
        held = there._tables[id(X)]
        assert there._resident(X, y, 30) is held
        assert held._features.shape == (31, 6)  # whatever n is
        assert np.array_equal(first.values, again.values)
        monkeypatch.setattr(core, "fits", lambda rows, inputs, device: False)
        expected = here.clipped_sum(X, y, 0.5)
        monkeypatch.setattr(core, "fits", lambda rows, inputs, device: True)
        assert np.array_equal(first.values, expected.values)
        assert (first.entered, first.excluded) == (expected.entered, expected.excluded)
    there.release()
    assert not there._tables
    there.clipped_sum(X, y, 0.5)
    assert not there._tables  # nobody said that it stays


class Waits(TorchDispatchMode):
    """Counts what would make a program wait for a GPU: a value or a shape that depends on values is read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((n, "book") for n in ("mlp", "cnn", "resnet", "transformer", "lstm")),
        ("mlp", "closed"),
        ("lora-mlp", "closed"),
    ],
)
def test_a_step_waits_only_for_its_result(name, engine, monkeypatch) -> None:
    hidden = {"cnn": (3, 4), "resnet": (1, 4, 4), "transformer": (9, 8, 2, 1), "lstm": (9, 4, 5), "lora-mlp": (2, 5)}
    spec = ModelSpec(name=name, inputs=64 if name in ("cnn", "resnet") else 6, classes=3, hidden=hidden.get(name, (5,)))
    monkeypatch.setattr(core, "fits", lambda rows, inputs, device: True)
    clipper, (X, y) = Clipper(build(spec), engine, microbatch=4), table(spec, 20)
    clipper.clipped_sum(X, y, 0.5, capacity=20)  # uploads, and asks the network for its classes
    with Waits() as waits:
        clipper.clipped_sum(X, y, 0.5, capacity=20)
    assert waits.found == ["_local_scalar_dense"] * len(waits.found)
    assert len(waits.found) <= 3  # norm and count, whatever the number of microbatches


def test_a_wait_in_a_microbatch_is_seen(monkeypatch) -> None:
    """Negative control."""
    clipper, (X, y) = Clipper(build(MLP), "closed", microbatch=4), table(MLP, 20)
    honest = clipper.backend.add
    monkeypatch.setattr(clipper.backend, "add", lambda *a, **k: torch.tensor([int(honest(*a, **k).sum())]))
    with Waits() as waits:
        clipper.clipped_sum(X, y, 0.5)
    assert len(waits.found) > 3


@pytest.mark.parametrize("holds", [1, 5])
def test_a_gpu_of_little_memory_gets_smaller_microbatches_and_it_is_said_once(holds, monkeypatch, caplog) -> None:
    honest = direct.Book.pieces

    def pieces(self, batch):
        if len(batch.y) > holds and not isinstance(self._model, stand_alone._Planted):
            raise torch.OutOfMemoryError
        return honest(self, batch)

    monkeypatch.setattr(direct.Book, "pieces", pieces)
    with caplog.at_level(logging.WARNING, "fedveil.privacy"):
        found = choose(lambda: build(MLP), 6, 3, engines=("book",), places=40)
    assert found.microbatch == {1: 1, 5: 4}[holds]
    assert [r.message for r in caplog.records] == [
        f"the GPU's memory holds {found.microbatch} rows at a time, not 64: steps take longer"
    ]


def test_a_gpu_that_does_not_hold_one_record_is_refused_by_that_name(monkeypatch) -> None:
    def pieces(self, batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(direct.Book, "pieces", pieces)
    with pytest.raises(ModelError, match="memory does not hold one record"):
        choose(lambda: build(MLP), 6, 3, engines=("book",), places=40)


@pytest.fixture
def gpu(monkeypatch):
    """Its memory, as torch would tell it: free, total, reserved by this process, in use by it, its share."""
    state = {"free": 30 * GIB, "total": 80 * GIB, "reserved": 0, "allocated": 0, "share": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (state["free"], state["total"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: state["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: state["allocated"])
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda d: state["share"])
    return state


def test_microbatches_follow_the_free_memory_and_the_owners_share(gpu) -> None:
    size = 25_000_000  # 400 MB for a record
    assert fitting("book", size, 512, CPU) == 1
    assert fitting("book", size, 512, GPU) == 15 * GIB // (16 * size) == 40
    gpu |= {"share": 0.25, "allocated": 10 * GIB, "reserved": 12 * GIB}
    assert free_bytes(GPU) == 10 * GIB
    assert fitting("book", size, 512, GPU) == 13
    gpu["allocated"] = gpu["reserved"] = 40 * GIB
    assert free_bytes(GPU) == 0
    assert fitting("book", size, 512, GPU) == 1
    assert fitting("closed", size, 64, GPU) == 64


def test_a_large_table_stays_on_the_host(gpu) -> None:
    assert device.fits(1_000_000, 784, GPU)
    assert not device.fits(3_000_000, 784, GPU)
    assert not device.fits(1, 1, CPU)


def test_only_what_no_record_can_cause_counts_as_a_failure_of_the_gpu(monkeypatch) -> None:
    def lost(*_, code=0, **__):
        error = torch.AcceleratorError("CUDA error")
        setattr(error, "error_code", code)  # noqa: B010
        raise error

    assert not failed(torch.OutOfMemoryError("no memory"), CPU)
    assert failed(torch.OutOfMemoryError("no memory"), GPU)
    monkeypatch.setattr(torch, "ones", lost)
    assert failed(RuntimeError("cuBLAS"), GPU)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: lost(code=710))  # an assertion: data may have caused it
    assert not failed(RuntimeError("cuBLAS"), GPU)
    monkeypatch.setattr(torch, "ones", lambda *a, device: torch.full(a, 1.0))
    assert not failed(ValueError("of this program"), GPU)
    monkeypatch.setattr(torch, "ones", lambda *a, device: torch.full(a, 2.0))
    assert failed(ValueError("of this program"), GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [MLP, TEXT], ids=lambda s: s.name)
def test_on_a_gpu_a_table_that_stays_gives_the_same_sum_and_nothing_waits(spec) -> None:
    device.fix_arithmetic()
    X, y = table(spec, 23)
    stays, sent = (Clipper(build(spec), "book", "cuda", microbatch=4) for _ in range(2))
    found = stays.clipped_sum(X, y, 0.5, capacity=30)
    assert stays._tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = stays.clipped_sum(X, y, 0.5, capacity=30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = sent.clipped_sum(X, y, 0.5)
    assert np.array_equal(found.values, again.values)
    assert np.array_equal(found.values, expected.values)
    assert (found.entered, found.excluded) == (expected.entered, expected.excluded)


@pytest.mark.gpu
def test_on_a_gpu_memory_that_runs_out_is_met_by_a_smaller_microbatch(caplog) -> None:
    device.fix_arithmetic()
    wide = ModelSpec(name="transformer", inputs=64, classes=3, hidden=(100, 256, 4, 2))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + GIB // 2) / total))
    try:
        found = choose(lambda: build(wide), 64, 3, "cuda", engines=("book",), places=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= found.microbatch <= 512
