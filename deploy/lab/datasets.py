"""Bundled public data for simulations and the demo, split into virtual institutions. No download.

The generators here split and initialise public data under a public seed, so that an experiment can be
repeated; they never touch keys, masks, record sampling or noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import UsageError
from fedveil.common.units import MAX_SITES
from fedveil.deploy.lab.choices import CHOICES


@dataclass(frozen=True)
class Split:
    """A public data set as ``parts`` of virtual sites and a public test table.

    Attributes:
        parts: per site ``(X, y)``: ``(n_i, features)`` float32 and ``(n_i,)`` int64.
        X_test, y_test: the held-out quarter or fifth; declared public, belongs to no site.
    """

    parts: list[tuple[NDArray[np.float32], NDArray[np.int64]]]
    X_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    classes: int

    @property
    def records(self) -> int:
        """Number of training records in all."""
        return sum(len(y) for _, y in self.parts)

    @property
    def inputs(self) -> int:
        """Number of features."""
        return self.X_test.shape[1]


def load(name: str, clients: int, seed: int, *, alpha: float | None = None) -> Split:
    """Split ``name`` over ``clients`` sites: IID, or by classes with Dirichlet(``alpha``) shares.

    ``digits``: scikit-learn's 8x8 digits, pixels / 16. ``diabetes``: scikit-learn's diabetes records, encoded as in the
    demo. Of both a stratified fifth is held out. ``trivial``: 8 records of 4 features at every site, for measuring the
    platform itself.

    Raises:
        UsageError: an unknown name, no client, or more clients than records.
    """
    if name == "trivial":
        _require(clients, MAX_SITES, name)
        return _trivial(clients, seed)
    if name not in CHOICES["dataset"]:
        raise UsageError(f"unknown dataset {name!r}", hint=f"one of {', '.join(CHOICES['dataset'])}")
    from sklearn.model_selection import train_test_split

    X, y = _digits() if name == "digits" else _diabetes()
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=seed, stratify=y)
    _require(clients, len(y_train), name)
    index = _iid(len(y_train), clients, seed) if alpha is None else _dirichlet(y_train, clients, seed, alpha)
    return Split([(X_train[i], y_train[i]) for i in index], X_test, y_test, int(y.max()) + 1)


def _require(clients: int, most: int, name: str) -> None:
    if not 1 <= clients <= most:
        raise UsageError(
            f"{clients} clients cannot share the dataset {name!r}",
            hint=f"--clients takes 1 to {most} with this dataset",
        )


def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch["data"] / 16.0).astype(np.float32), bunch["target"].astype(np.int64)


def _diabetes() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from fedveil.deploy.lab import demo_hospitals

    return demo_hospitals.encoded(demo_hospitals.records())


def _iid(records: int, clients: int, seed: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.random.default_rng(seed).permutation(records), clients)  # noqa: TID251


def _dirichlet(y: NDArray[np.int64], clients: int, seed: int, alpha: float) -> list[NDArray[np.int64]]:
    """Every class is dealt out in shares drawn from Dirichlet(alpha) (Hsu, Qi & Brown 2019)."""
    if not alpha > 0:
        raise UsageError(f"alpha = {alpha!r} must be positive", hint="--alpha takes a number above 0")
    rng = np.random.default_rng(seed)  # noqa: TID251
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for c in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == c))
        cuts = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(p) for p in parts]


def _trivial(clients: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)  # noqa: TID251
    make = lambda n: (rng.standard_normal((n, 4)).astype(np.float32), rng.integers(0, 2, n))  # noqa: E731
    X_test, y_test = make(64)
    return Split([make(8) for _ in range(clients)], X_test, y_test, 2)
