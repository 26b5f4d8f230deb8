"""The probe that picks an engine, the check of places, the memory of a large batch, and engines on a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from tests.privacy.dp.definition import reference
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, unflatten
from fedveil.privacy.dp.clipping import Clipper, choose, direct, engines, probe, problem
from fedveil.privacy.dp.clipping.gradient_factors import Dense

MLP = ModelSpec(name="mlp", inputs=6, classes=3, hidden=(16, 16), seed=3)
CNN = ModelSpec(name="cnn", inputs=64, classes=4, hidden=(3, 2), seed=5)
TEXT = ModelSpec(name="transformer", inputs=8, classes=3, hidden=(12, 16, 2, 1), seed=7)
LORA = ModelSpec(name="lora-transformer", inputs=8, classes=3, hidden=(2, 12, 8, 2, 1), seed=10)


def network(spec: ModelSpec) -> nn.Module:
    model = build(spec)
    unflatten(model, np.random.default_rng(5).normal(0, 0.5, spec.parameters).astype(np.float32))
    return model


@pytest.mark.parametrize("spec", [MLP, CNN, TEXT, LORA], ids=lambda s: s.name)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_choose_takes_an_engine_that_is_right_and_leaves_the_weights_alone(spec, precision) -> None:
    clipper = choose(lambda: network(spec), spec.inputs, spec.classes, precision=precision, places=16)
    X, y = probe._synthetic(network(spec), spec.inputs, spec.classes, 9)
    expected = reference(network(spec), (X, y), 0.2)
    off = np.linalg.norm(clipper.clipped_sum(X, y, 0.2).values - expected) / np.linalg.norm(expected)
    assert off < (1e-9 if clipper.precision == "float64" else 1e-4)
    assert precision == clipper.precision


@pytest.mark.parametrize("name", ["lora-mlp", "mlp"])
def test_where_calls_cost_most_all_places_are_one_microbatch(name, monkeypatch) -> None:
    """Also where one engine alone can treat the network. Time is counted in microbatches here."""
    spec = ModelSpec(name=name, inputs=20, classes=3, hidden=(2, 8) if name == "lora-mlp" else (8,))
    monkeypatch.setattr(probe, "_seconds", lambda clipper, records: 1e-6 * clipper.shape(len(records[1]))[0])
    assert choose(lambda: build(spec), 20, 3, places=281).shape(281) == (1, 281)


@pytest.mark.parametrize("forgotten", range(6))
def test_an_engine_that_forgets_one_layer_is_rejected(forgotten, monkeypatch) -> None:
    """Negative control: one parameter's gradient missing from the norm, then from the sum, however fast that is."""
    monkeypatch.setattr(probe, "_seconds", lambda c, records: 0.0 if c.engine == "closed" else 1.0)
    assert choose(lambda: network(MLP), 6, 3, engines=("closed", "vmap")).engine == "closed"

    class Unmeasured:
        def __init__(self, piece):
            self.squares = lambda: torch.zeros_like(piece.squares())
            self.add, self.operands = piece.add, piece.operands

    class Unsummed:
        def __init__(self, piece):
            self.squares = piece.squares
            self.operands = piece.operands
            self.add = lambda factor, keep, out: None

    for fault in (Unmeasured, Unsummed):

        def add(self, batch, clip, out, fault=fault, **fresh):
            pieces: list[Any] = [fault(p) if i == forgotten else p for i, p in enumerate(self.pieces(batch))]
            return engines.clip_pieces(pieces, self._sizes, batch.keep, clip, out, **fresh)

        monkeypatch.setattr(direct.Chain, "add", add)
        assert choose(lambda: network(MLP), 6, 3, engines=("closed", "vmap")).engine == "vmap"
        with pytest.raises(ModelError, match="closed: another sum"):
            choose(lambda: network(MLP), 6, 3, engines=("closed",))


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("spec", [MLP, CNN, TEXT], ids=lambda s: s.name)
def test_an_engine_that_measures_the_records_of_one_class_too_short_is_rejected(spec, label, monkeypatch) -> None:
    """Whichever record it is: its norm shows only where it is clipped."""
    honest = direct.Book.pieces

    def pieces(self, batch):
        short = torch.where(batch.y == label, 0.25, 1.0).double()

        def measured(piece):
            squares = piece.squares
            piece.squares = lambda: squares() * short
            return piece

        return [measured(p) for p in honest(self, batch)]

    monkeypatch.setattr(direct.Book, "pieces", pieces)
    with pytest.raises(ModelError, match="book: another sum"):
        choose(lambda: network(spec), spec.inputs, spec.classes, engines=("book",))


def test_a_layer_whose_gradient_is_zero_at_the_start_is_probed_too(monkeypatch) -> None:
    """Fresh adapters multiply by zero: without moved weights the thin layers below them could be forgotten unseen."""
    honest = engines.clip_pieces
    names = [n for n, p in build(LORA).named_parameters() if p.requires_grad]
    at = next(i for i, n in enumerate(names) if n.endswith("inward.weight"))

    def wrong(pieces, sizes, keep, clip, out, **fresh):
        zeroed = Dense(torch.zeros(len(keep), sizes[at]))
        return honest([zeroed if i == at else p for i, p in enumerate(pieces)], sizes, keep, clip, out, **fresh)

    monkeypatch.setattr(engines, "clip_pieces", wrong)
    with pytest.raises(ModelError, match="another sum"):
        choose(lambda: build(LORA), LORA.inputs, LORA.classes, engines=("book",))


def test_an_engine_that_is_off_by_little_is_rejected(monkeypatch) -> None:
    honest = engines.clip_pieces

    def loose(pieces, sizes, keep, clip, out, **fresh):
        return honest(pieces, sizes, keep, clip * (1 + 1e-7), out, **fresh)

    monkeypatch.setattr(engines, "clip_pieces", loose)
    with pytest.raises(ModelError, match="another sum"):
        choose(lambda: network(MLP), 6, 3, engines=("book",))


class Leaky(nn.Module):
    """Adds a millionth of a neighbour: too little for the parity check in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x + 1e-6 * x.roll(1, 0))


def test_a_coupling_below_the_tolerance_is_seen_bit_for_bit() -> None:
    """Negative control of the condition under which float32 may be used."""
    clipper = Clipper(Leaky(), "book", precision="float32")
    assert "neighbours" in problem(clipper, 6, 16)
    with pytest.raises(ModelError, match="another sum"):
        choose(Leaky, 6, 3, engines=("book",), precision="float32")
    wide = ModelSpec(name="mlp", inputs=16, classes=16, hidden=(16,), seed=3)
    assert not problem(Clipper(network(wide), "closed", precision="float32"), 16, 64)


MEMORY = """
import resource, sys
import numpy as np
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.privacy.dp.clipping import Clipper
engine = sys.argv[1]
spec = ModelSpec(name="mlp", inputs=200, classes=10, hidden=(200,), seed=1)
clipper = Clipper(build(spec), engine, microbatch=32)
X = np.random.default_rng(0).normal(size=(1280, 200)).astype(np.float32)
y = np.zeros(1280, np.int64)
clipper.clipped_sum(X[:128], y[:128], 1.0)
small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clipper.clipped_sum(X, y, 1.0)
large = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((large - small) * 1024)
"""


@pytest.mark.parametrize("engine", ["vmap", "opacus"])
def test_a_batch_ten_times_larger_takes_no_more_memory(engine) -> None:
    """1,280 gradients of 42,210 float64 values would be 430 MB; 32 of them are 11 MB."""
    out = subprocess.run([sys.executable, "-c", MEMORY, engine], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 100 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [MLP, CNN, TEXT, LORA], ids=lambda s: s.name)
@pytest.mark.parametrize("engine", ["book", "vmap", "opacus"])
def test_the_same_sum_on_a_gpu(spec, engine) -> None:
    clipper = Clipper(network(spec), engine, "cuda", precision="float64")
    X, y = probe._synthetic(network(spec), spec.inputs, spec.classes, 70)
    np.testing.assert_allclose(
        clipper.clipped_sum(X, y, 0.3).values, reference(network(spec), (X, y), 0.3), rtol=1e-8, atol=1e-10
    )
    assert choose(lambda: network(spec), spec.inputs, spec.classes, "cuda").device.type == "cuda"
