"""One record more at an empty place, under weights that a hostile server may send; and the test of assumption A1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, trainable
from fedveil.privacy.dp.clipping import Clipper, Engine, choose, problem, stand_alone
from fedveil.privacy.dp.places import EMPTY
from fedveil.privacy.dp.rounding import relative

ODD = ModelSpec(name="mlp", inputs=101, classes=3, hidden=(37, 19))
SPECS = {
    "mlp": ODD,
    "cnn": ModelSpec(name="cnn", inputs=144, classes=3, hidden=(4, 7)),
    "resnet": ModelSpec(name="resnet", inputs=64, classes=3, hidden=(1, 5, 7)),
    "transformer": ModelSpec(name="transformer", inputs=7, classes=3, hidden=(11, 12, 2, 1)),
    "lstm": ModelSpec(name="lstm", inputs=7, classes=3, hidden=(11, 9, 13)),
    "lora": ModelSpec(name="lora-mlp", inputs=13, classes=3, hidden=(3, 17)),
}
DENSE: tuple[Engine, ...] = ("closed", "numpy", "book", "vmap", "opacus")
CASES = [(s, e) for s in SPECS for e in DENSE if s in ("mlp", "lora") or e not in ("closed", "numpy")]


def hostile(spec: ModelSpec, rng: np.random.Generator) -> np.ndarray:
    """Units of the last hidden layer in identical pairs, which the next layer adds with +A and -A: rounding times A."""
    values = [rng.standard_normal(p.shape) / np.sqrt(max(1, p[0].numel())) for p in trainable(build(spec))]
    last = max(i for i, v in enumerate(values) if v.ndim >= 2)
    before = max(i for i, v in enumerate(values) if v.ndim >= 2 and i < last)
    units, per = len(values[before]), values[last].shape[1] // len(values[before]) or 1
    order = rng.permutation(units)
    first, second = order[: units // 2], order[units // 2 : 2 * (units // 2)]
    values[before][second] = values[before][first]
    if before + 1 < last and len(values[before + 1]) == units:
        values[before + 1][second] = values[before + 1][first]
    if per * units == values[last].shape[1]:
        wide = np.zeros((len(values[last]), units, per))
        wide[:, first] = rng.standard_normal((len(wide), len(first), per)) * 10.0 ** rng.uniform(9, 16)
        wide[:, second] = -wide[:, first]
        values[last] = wide.reshape(values[last].shape)
    return np.concatenate([v.ravel() for v in values]).astype(np.float32)


def records(spec: ModelSpec, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    X = rng.integers(0, spec.vocabulary, (n, spec.inputs)) if spec.vocabulary else rng.random((n, spec.inputs))
    return X.astype(np.float32), rng.integers(0, spec.classes, n)


def moved(clipper: Clipper, X, y, seats, persons=None) -> float:
    """How far the last record (person), taken from its place, moves the sum of clip 1."""
    last = len(X) - 1 if persons is None else len(persons) - 1
    empty = np.where(seats == last, EMPTY, seats)
    with_, without = (clipper.clipped_sum(X, y, 1.0, s, persons).values for s in (seats, empty))
    return float(np.linalg.norm(with_ - without))


@pytest.mark.parametrize(("name", "engine"), CASES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_under_hostile_weights_a_record_moves_the_sum_by_one_clip(name, engine, precision) -> None:
    spec, rng = SPECS[name], np.random.default_rng(11)
    clipper = Clipper(build(spec), engine, precision=precision)
    bound = 1 + relative(90)
    for _ in range(3):
        clipper.load(hostile(spec, rng))
        X, y = records(spec, 70, rng)
        X[-1] *= 1 if spec.vocabulary else 1e6
        seats = rng.permutation(np.r_[np.arange(70), [EMPTY] * 20])
        assert moved(clipper, X, y, seats) <= bound


@pytest.mark.parametrize("engine", [e for e in DENSE if e != "numpy"])
def test_a_person_of_twenty_rows_moves_the_sum_by_one_clip(engine) -> None:
    rng = np.random.default_rng(12)
    clipper = Clipper(build(ODD), engine)
    clipper.load(hostile(ODD, rng))
    X, y = records(ODD, 12 * 20, rng)
    persons = np.arange(240).reshape(12, 20)
    persons[::2, 7:] = EMPTY
    X[persons[3, 2]] = np.nan  # one row that cannot be used
    seats = rng.permutation(np.r_[np.arange(12), [EMPTY] * 5])
    assert moved(clipper, X, y, seats, persons) <= 1 + relative(17)


@pytest.mark.parametrize("engine", ["closed", "book", "vmap", "opacus"])
def test_a_place_of_one_person_is_the_mean_of_its_rows(engine) -> None:
    """Independent oracle: gradients of single rows, averaged and clipped in NumPy."""
    rng = np.random.default_rng(13)
    clipper = Clipper(build(ODD), engine, precision="float64")
    X, y = records(ODD, 9, rng)
    persons = np.array([[0, 1, 2, 3], [4, EMPTY, 5, EMPTY], [6, 7, 8, EMPTY]])
    rows = [clipper.clipped_sum(X[i : i + 1], y[i : i + 1], 1e9).values for i in range(9)]
    means = [np.mean([rows[i] for i in p if i >= 0], axis=0) for p in persons]
    for clip in (0.3, 1e6):  # all are clipped, or none: then the weights show
        expected = sum(m * min(1.0, clip / np.linalg.norm(m)) for m in means)
        found = clipper.clipped_sum(X, y, clip, None, persons).values
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.fixture
def rounds_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose last bits depend on a row's place. Some processors' do, others' do not at these sizes."""
    plain = nn.Linear.forward

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = plain(self, x)
        place, unit = torch.arange(len(out))[:, None], torch.arange(out.shape[-1])
        return out * (1 + 2.0**-22 * ((place + unit) % 3 == 0))

    monkeypatch.setattr(nn.Linear, "forward", forward)


@pytest.mark.usefixtures("rounds_by_place")
def test_without_places_the_same_weights_break_the_bound() -> None:
    """Negative control: taking a record out shifts the others, and their rounding becomes whole clips."""
    rng = np.random.default_rng(14)
    clipper, shifted, placed = Clipper(build(ODD), "closed"), 0.0, 0.0
    for _ in range(10):
        clipper.load(hostile(ODD, rng))
        X, y = records(ODD, 70, rng)
        whole, less = clipper.clipped_sum(X, y, 1.0).values, clipper.clipped_sum(X[1:], y[1:], 1.0).values
        shifted = max(shifted, float(np.linalg.norm(whole - less)))
        placed = max(placed, moved(clipper, X, y, rng.permutation(np.r_[np.arange(70), [EMPTY] * 20])))
    assert shifted > 1.5
    assert placed <= 1 + relative(90)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_every_engine_passes_the_test_of_independence_here(name, engine) -> None:
    spec = SPECS[name]
    assert problem(Clipper(build(spec), engine), spec.inputs, 37) == ""


class Leaky(nn.Module):
    """The last bit of a row depends on the row before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.arange(p.numel(), dtype=p.dtype).cos().view_as(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h * (1 + torch.finfo(h.dtype).eps * (h.roll(1, 0) > 0).to(h.dtype)))


@pytest.mark.parametrize("engine", ["book", "opacus"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_coupling_of_the_last_bit_is_refused_by_the_engines_name(engine, precision) -> None:
    with pytest.raises(ModelError, match=f"{engine}: a row's bits depend on its neighbours") as e:
        choose(Leaky, 6, 3, engines=(engine,), precision=precision)
    assert "microbatch = 1" in str(e.value.hint)
    strict = choose(Leaky, 6, 3, engines=(engine,), precision=precision, microbatch=1)
    assert strict.microbatch == 1


class Provoked(nn.Module):
    """The last bit of every row depends on the batch, if the batch is of a certain kind."""

    def __init__(self, when) -> None:
        super().__init__()
        self.first, self.last, self.when = nn.Linear(6, 5), nn.Linear(5, 3), when

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h * (1 + torch.finfo(h.dtype).eps * self.when(x).to(h.dtype)))


KINDS = {
    "all finite, one huge": lambda x: x.isfinite().all() & (x.abs().max() > 1e20),
    "one infinite": lambda x: x.isinf().any(),
    "many infinite": lambda x: x.isinf().sum() > x.numel() // 8,
    "NaN at an even place": lambda x: x[0::2].isnan().any(),
    "NaN at an odd place": lambda x: x[1::2].isnan().any(),
    "zeros at an odd place": lambda x: (x[1::2] == 0).all(),
    "zeros at an even place": lambda x: (x[0::2] == 0).all(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_coupling_that_only_some_neighbours_provoke_is_seen(kind) -> None:
    torch.manual_seed(5)
    assert "neighbours" in problem(Clipper(Provoked(KINDS[kind]), "book"), 6, 32)


def test_a_blind_test_refuses_the_machine(monkeypatch) -> None:
    monkeypatch.setattr(stand_alone, "_sees_planted", lambda *_: False)
    with pytest.raises(ModelError, match="does not see"):
        problem(Clipper(build(ODD), "closed"), ODD.inputs, 37)


def test_the_number_of_microbatches_is_the_places_alone() -> None:
    """Nothing that is sampled, unusable or overflowing changes how often an engine is called."""
    clipper, rng = Clipper(build(ODD), "closed"), np.random.default_rng(15)
    calls: list[int] = []
    honest = clipper.backend.add
    clipper.backend.add = lambda batch, clip, out, **kind: (
        calls.append(len(batch.keep)),
        honest(batch, clip, out, **kind),
    )[1]  # type: ignore[method-assign]
    for n, broken in ((0, 0), (1, 1), (150, 0), (150, 150)):
        X, y = records(ODD, n, rng)
        X[:broken] = np.nan
        seats = np.r_[np.arange(n), [EMPTY] * (150 - n)]
        calls.clear()
        clipper.clipped_sum(X, y, 1.0, seats)
        assert calls == [50, 50, 50]
