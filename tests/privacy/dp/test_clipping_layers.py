"""Networks beyond the named ones: tied weights, dropout, repeated layers, and layers that couple records."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from tests.privacy.dp.definition import reference
from torch import nn
from torch.nn import functional

from fedveil.common.errors import ModelError
from fedveil.privacy.dp.clipping import Clipper, Engine, choose, refuse_coupled

ENGINES: tuple[Engine, ...] = ("closed", "numpy", "book", "vmap", "opacus")
DENSE: tuple[Engine, ...] = ("closed", "book", "vmap", "opacus")


class Tied(nn.Module):
    """The same table reads tokens and scores classes."""

    vocabulary = 9

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.tokens(x.long()).mean(1)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.inner(torch.relu(self.inner(x)))))


class Raw(nn.Module):
    """A parameter that belongs to no plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.out = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(x @ self.matrix))


class Padded(nn.Module):
    vocabulary = 9

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.out = nn.Embedding(9, 4, padding_idx=0), nn.LayerNorm([3, 4]), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.tokens(x.long()[:, :3])).mean(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=2)
        self.norm, self.out = nn.GroupNorm(3, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(functional.gelu(self.norm(self.conv(x.unflatten(1, (4, 3, 3))))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = DPLSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x.unflatten(1, (3, 2)))[0][:, -1])


def chain(activation: nn.Module, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, 5, bias=bias), activation, nn.Linear(5, 5), activation, nn.Linear(5, 3, bias=bias)
    )


# which engines must compute each network; all others must refuse or be refused by the probe
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[Engine, ...]]] = {
    "tied": (Tied, 6, 9, ("vmap", "opacus")),
    "twice": (Twice, 6, 3, ("book", "vmap", "opacus")),
    "raw": (Raw, 6, 3, ("vmap",)),
    "padded": (Padded, 6, 3, ("book", "vmap")),
    "grouped": (Grouped, 36, 3, ("book", "vmap", "opacus")),
    "lstm": (Recurrent, 6, 3, ("vmap", "opacus")),
    "relu": (chain(nn.ReLU()), 6, 3, ENGINES),
    "sigmoid": (chain(nn.Sigmoid()), 6, 3, DENSE),
    "gelu": (chain(nn.GELU()), 6, 3, DENSE),
    "no bias": (chain(nn.Tanh(), bias=False), 6, 3, ENGINES),
    "gelu by tanh": (chain(nn.GELU("tanh")), 6, 3, ("book", "vmap", "opacus")),
}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return make()

    return fresh


def batch(model: nn.Module, inputs: int, classes: int, n: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    tokens = int(getattr(model, "vocabulary", 0))
    X = rng.integers(0, tokens, (n, inputs)) if tokens else rng.normal(0, 2, (n, inputs))
    return X.astype(np.float32), rng.integers(0, classes, n)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_right_or_refuses(name, engine) -> None:
    make, inputs, classes, able = NETWORKS[name]
    make = seeded(make)
    if engine not in able:
        try:
            choose(make, inputs, classes, engines=(engine,), precision="float64")
        except ModelError:
            return
    clipper = choose(make, inputs, classes, engines=(engine,), precision="float64")
    X, y = batch(make(), inputs, classes)
    for clip in (0.05, 1e6):
        expected = reference(make(), (X, y), clip)
        np.testing.assert_allclose(clipper.clipped_sum(X, y, clip).values, expected, rtol=1e-8, atol=1e-9)


def test_opacus_overestimates_padding_and_is_dropped() -> None:
    """Opacus' rule for embeddings forgets padding_idx; the probe sees it."""
    make = seeded(Padded)
    with pytest.raises(ModelError, match="opacus: another sum"):
        choose(make, 6, 3, engines=("opacus",))
    assert choose(make, 6, 3).engine in ("book", "vmap")


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        (nn.BatchNorm1d(4), "GroupNorm"),
        (nn.BatchNorm2d(4), "GroupNorm"),
        (nn.BatchNorm3d(4), "GroupNorm"),
        (nn.SyncBatchNorm(4), "GroupNorm"),
        (nn.LazyBatchNorm1d(), "GroupNorm"),
        (nn.InstanceNorm1d(6, track_running_stats=True, affine=True), "GroupNorm"),
        (nn.LSTM(4, 4), "lstm"),
        (nn.GRU(4, 4, batch_first=True), "DPLSTM"),
        (nn.MultiheadAttention(8, 2, batch_first=True), "nn.Linear"),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "nn.Linear"),
        (DPMultiheadAttention(8, 2, batch_first=True), "nn.Linear"),
        (DPLSTM(4, 4, batch_first=False), "batch_first=True"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_layers_that_couple_records_are_refused_with_a_replacement(layer, hint) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4), layer), nn.Linear(4, 2))
    with pytest.raises(ModelError) as e:
        refuse_coupled(model)
    assert hint in e.value.hint
    for engine in ENGINES:
        with pytest.raises(ModelError):
            Clipper(model, engine)


def test_layers_that_do_not_are_taken() -> None:
    refuse_coupled(nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
    with pytest.raises(ModelError, match="no parameter"):
        refuse_coupled(nn.Linear(3, 2).requires_grad_(False))


class Centred(nn.Module):
    """Subtracts the batch's mean: no layer's name gives it away."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x - x.mean(0) if len(x) > 1 else x)


def test_a_hidden_coupling_is_seen_by_the_probe() -> None:
    for engine in ("book", "opacus"):
        with pytest.raises(ModelError, match="another sum"):
            choose(seeded(Centred), 6, 3, engines=(engine,))
    # vmap shows the network one record at a time: there is nobody to meet
    assert choose(seeded(Centred), 6, 3).engine == "vmap"


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.out = nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.first(x)))


@pytest.mark.parametrize("engine", ["book", "vmap", "opacus"])
def test_dropout_draws_for_each_record_by_itself(engine) -> None:
    """Copies of one record get different masks, and nothing about torch's own generator decides which."""
    clipper = choose(seeded(Dropped), 6, 3, engines=(engine,))
    X, y = np.ones((1, 6), np.float32), np.zeros(1, np.int64)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, second = (clipper.clipped_sum(X, y, 1.0).values for _ in range(2))
    assert not np.allclose(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    # 16 equal masks among copies of one record: probability 2^-480
    many = clipper.clipped_sum(np.repeat(X, 16, 0), np.repeat(y, 16), 1.0).values
    support = np.abs(many[: 6 * 32].reshape(32, 6)).sum(1) > 0
    alone = np.abs(first[: 6 * 32].reshape(32, 6)).sum(1) > 0
    assert support.sum() > alone.sum()
    assert np.linalg.norm(many) <= 16.0
    assert clipper.model.get_submodule("drop").training
