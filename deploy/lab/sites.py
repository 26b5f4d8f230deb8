"""Public or made-up records, dealt out to virtual sites: what a simulation runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError

Records = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True, repr=False)
class Sites:
    """Records of virtual sites, and a public test table that belongs to none of them.

    Attributes:
        parts: per site ``(X, y)``: ``(n_i, inputs)`` float32 and ``(n_i,)`` int64. A site may have no record.
        X_test: the inputs that are held out, ``(n, inputs)`` float32.
        y_test: their classes, ``(n,)`` int64.
        classes: number of classes.
        features: what each input is; empty where nothing is known.
        labels: what each class is; empty where nothing is known.
        names: what each site is called in the source; empty where they were dealt out by chance.
        source: the data in a word, for a run's folder.
        dealt: ``target``, ``test`` and ``by`` of :func:`fedveil.split`, as a run's ``config.json`` holds them.
        again: deals out the same records under another seed; None where nobody can.
    """

    parts: list[Records]
    X_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    classes: int
    features: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    source: str = "records"
    dealt: Mapping[str, Any] = field(default_factory=dict, compare=False)
    again: Callable[[int], Sites] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse records that no run can use.

        Raises:
            DataError: no site, a class outside 0..classes-1, or inputs of another width than the test table's.
        """
        if not self.parts:
            raise DataError("there is no site", hint="one pair (X, y) for each site; a site may have no record")
        for i, (X, y) in enumerate([*self.parts, (self.X_test, self.y_test)]):
            where = f"site {i}" if i < len(self.parts) else "the test table"
            if X.ndim != 2 or X.shape[1] != self.inputs or y.shape != X.shape[:1]:
                raise DataError(
                    f"{where} has inputs of shape {X.shape} and classes of shape {y.shape}",
                    hint=f"(n, {self.inputs}) and (n,), as in the test table",
                )
            if y.size and not 0 <= y.min() <= y.max() < self.classes:
                raise DataError(
                    f"{where} has a class outside 0 to {self.classes - 1}",
                    hint="number the classes from 0, and give their count as classes; fedveil.split does both",
                )

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        sizes = [len(y) for _, y in self.parts]
        seen = Counter(np.concatenate([y for _, y in self.parts]).tolist()) if self.records else Counter[int]()
        named = [f"{self.labels[c] if self.labels else c}: {seen[c]}" for c in range(min(self.classes, 8))]
        empty = f", {self.empty} of them empty" if self.empty else ""
        return (
            f"Sites({self.source}: {len(self)} sites of {min(sizes)} to {max(sizes)} records{empty}, "
            f"{self.records} records of {self.inputs} inputs, {len(self.y_test)} held out; "
            f"classes {', '.join(named)}{', ...' if self.classes > 8 else ''})"
        )

    @property
    def records(self) -> int:
        """Number of training records in all."""
        return sum(len(y) for _, y in self.parts)

    @property
    def inputs(self) -> int:
        """Values of one record."""
        return self.X_test.shape[1]

    @property
    def empty(self) -> int:
        """How many sites have no record."""
        return sum(not len(y) for _, y in self.parts)

    @property
    def largest(self) -> int:
        """Records of the largest site, at least 1: what its capacity has to be."""
        return max(1, *(len(y) for _, y in self.parts))

    def pooled(self) -> Records:
        """All training records, site after site."""
        return np.concatenate([X for X, _ in self.parts]), np.concatenate([y for _, y in self.parts])
