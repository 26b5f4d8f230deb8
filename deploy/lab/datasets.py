"""Bundled public data for simulations and the demo, split into virtual institutions. No download.

The generators here split and initialise public data under a public seed, so that an experiment can be
repeated; they never touch keys, masks, record sampling or noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import UsageError
from fedveil.common.units import MAX_SITES
from fedveil.deploy.lab.choices import CHOICES
from fedveil.deploy.lab.partition import Iid, Partition
from fedveil.deploy.lab.sites import Sites


def load(name: str, clients: int, seed: int, *, by: Partition | None = None) -> Sites:
    """Deal out ``name`` to ``clients`` sites: evenly, or as ``by`` says.

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
        raise UsageError(
            f"unknown dataset {name!r}", hint=f"one of {', '.join(CHOICES['dataset'])}, or a table with a target column"
        )
    from sklearn.model_selection import train_test_split

    X, y = _digits() if name == "digits" else _diabetes()
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=seed, stratify=y)
    _require(clients, len(y_train), name)
    index = (by or Iid())(y_train, clients, np.random.default_rng(seed))  # noqa: TID251
    parts = [(X_train[i], y_train[i]) for i in index]
    return Sites(parts, X_test, y_test, int(y.max()) + 1, source=name)


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


def _trivial(clients: int, seed: int) -> Sites:
    rng = np.random.default_rng(seed)  # noqa: TID251
    make = lambda n: (rng.standard_normal((n, 4)).astype(np.float32), rng.integers(0, 2, n))  # noqa: E731
    X_test, y_test = make(64)
    return Sites([make(8) for _ in range(clients)], X_test, y_test, 2, source="trivial")
