"""How records are dealt out to virtual sites: evenly, by classes, by sizes, or by a column.

The generators here are seeded, so that an experiment can be repeated. They only deal out what a simulation makes up;
they never touch keys, masks, record sampling or noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import UsageError

Index = NDArray[np.int64]
Random = np.random.Generator  # noqa: TID251 - of made-up splits


class Partition(Protocol):
    """A rule by which records are dealt out."""

    def __call__(self, y: NDArray[np.int64], clients: int, rng: Random) -> list[Index]:
        """For each client the positions of its records; each record is at one client. ``y``: their classes."""
        ...


@dataclass(frozen=True)
class Iid:
    """Evenly and at random."""

    def __call__(self, y: NDArray[np.int64], clients: int, rng: Random) -> list[Index]:
        """See :class:`Partition`."""
        return np.array_split(rng.permutation(len(y)), clients)


@dataclass(frozen=True)
class Dirichlet:
    """Every class in shares drawn from Dirichlet(alpha) (Hsu, Qi & Brown 2019): the smaller, the more uneven."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _positive("Dirichlet's alpha", self.alpha)

    def __call__(self, y: NDArray[np.int64], clients: int, rng: Random) -> list[Index]:
        """See :class:`Partition`."""
        parts: list[list[Index]] = [[] for _ in range(clients)]
        for c in np.unique(y):
            rows = rng.permutation(np.flatnonzero(y == c))
            cuts = (np.cumsum(rng.dirichlet([self.alpha] * clients))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        return [np.concatenate(p) for p in parts]


@dataclass(frozen=True)
class Shards:
    """Records in order of class, cut into equal shards, ``per_client`` of them for each (McMahan et al. 2017)."""

    per_client: int = 2

    def __post_init__(self) -> None:
        if self.per_client < 1:
            raise UsageError(f"{self.per_client} shards for each client", hint="Shards takes 1 or more")

    def __call__(self, y: NDArray[np.int64], clients: int, rng: Random) -> list[Index]:
        """See :class:`Partition`."""
        order = rng.permutation(len(y))
        shards = np.array_split(order[np.argsort(y[order], kind="stable")], clients * self.per_client)
        dealt = rng.permutation(len(shards)).reshape(clients, self.per_client)
        return [np.concatenate([shards[i] for i in own]) for own in dealt]


@dataclass(frozen=True)
class Quantity:
    """Sites of uneven sizes, drawn from Dirichlet(alpha); each a random part of the records."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _positive("Quantity's alpha", self.alpha)

    def __call__(self, y: NDArray[np.int64], clients: int, rng: Random) -> list[Index]:
        """See :class:`Partition`."""
        cuts = (np.cumsum(rng.dirichlet([self.alpha] * clients))[:-1] * len(y)).astype(int)
        return np.split(rng.permutation(len(y)), cuts)


@dataclass(frozen=True)
class ByGroup:
    """One site for each value of ``groups``, ``(n,)`` whole numbers from 0 up."""

    groups: NDArray[np.int64]

    def __call__(self, y: NDArray[np.int64], clients: int, rng: Random) -> list[Index]:
        """See :class:`Partition`."""
        return [np.flatnonzero(self.groups == g) for g in range(clients)]


_NAMED = {"dirichlet": (Dirichlet, float, 0.5), "shards": (Shards, int, 2), "quantity": (Quantity, float, 0.5)}
FORMS = "iid, dirichlet:0.3, shards:2, quantity:0.5, or column:NAME"


def parse(text: str) -> str | Partition:
    """The rule that a command line names, for example ``dirichlet:0.3``; for ``column:NAME`` the name.

    Raises:
        UsageError: none of :data:`FORMS`.
    """
    name, _, value = text.partition(":")
    if name == "column" and value:
        return value
    if name == "iid" and not value:
        return Iid()
    if name in _NAMED:
        make, kind, usual = _NAMED[name]
        try:
            return make(kind(value) if value else usual)
        except ValueError:
            pass
    raise UsageError(f"records cannot be dealt out by {text[:64]!r}", hint=FORMS)


def named(by: str | Partition | None) -> str:
    """What :func:`parse` reads as ``by``; the name of a rule that it does not know."""
    if by is None or isinstance(by, str):
        return "iid" if by is None else f"column:{by}"
    for name, (make, _, _) in _NAMED.items():
        if type(by) is make:
            return f"{name}:{next(iter(vars(by).values())):g}"
    return "iid" if isinstance(by, Iid) else getattr(by, "__name__", type(by).__name__)


def _positive(what: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UsageError(f"{what} is {value!r}", hint="a number above 0; 0.1 is very uneven, 100 nearly even")
