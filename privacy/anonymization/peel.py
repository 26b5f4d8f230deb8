"""Local recoding in the hierarchies' own labels: combinations of levels are tried from the least general upwards.

At each combination, the classes that meet every criterion are final and leave the table; the rest goes on. So rows in
dense regions keep fine labels, whatever the sparse ones need. Rows left over at the end are suppressed if the limit
allows it; otherwise the most general finished classes are put back until the whole meets the criteria at the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.lattice import all_nodes, separable_losses
from fedveil.privacy.anonymization.tuples import Constraints, Keys, Tuples

Index = NDArray[np.int64]
BLOCK_CELLS, MOST_NODES = 1 << 16, 256
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Peeled:
    """Attributes:
    classes: (u,) class of every tuple, -1 for suppressed ones.
    nodes: (c, q) the levels of each class.
    members: (c,) one tuple of each class.
    """

    classes: Index
    nodes: NDArray[np.int64]
    members: Index


def peel(tuples: Tuples, domains: Sequence[Domain], constraints: Constraints, *, limit: float = 0.0) -> Peeled:
    """Classes that all meet the criteria, with at most ``limit`` (a share) of the rows suppressed.

    Raises:
        UsageError: too many combinations of levels.
        AnonymityError: not even the whole table meets the criteria.
    """
    constraints.require_satisfiable()
    nodes = all_nodes(domains, "peel")
    losses = separable_losses(tuples, domains)
    loss = np.zeros(len(nodes))
    for j, own in enumerate(losses):
        loss += own[nodes[:, j]]
    nodes = nodes[np.lexsort((np.arange(len(nodes)), loss))]
    state = _Peeling(tuples, domains, constraints)
    at = 0
    while at < len(nodes) and state.left:
        at += state.advance(nodes[at:])
    return state.finish(nodes[-1], int(limit * tuples.rows + 1e-9))


class _Peeling:
    """The tuples that are not final yet."""

    def __init__(self, tuples: Tuples, domains: Sequence[Domain], constraints: Constraints) -> None:
        self.tuples, self.constraints = tuples, constraints
        self.index = np.arange(tuples.count)
        self.weights = tuples.weights.copy()
        self.keys = Keys(tuples.codes, [d.levels for d in domains])
        self.classes = np.full(tuples.count, -1, np.int64)
        self.nodes: list[NDArray[np.int64]] = []
        self.members: list[Index] = []
        self.count = 0

    @property
    def left(self) -> bool:
        return bool(len(self.index))

    def advance(self, nodes: NDArray[np.int64]) -> int:
        """Handle the first few of ``nodes``, and return how many."""
        block = nodes[: max(1, min(MOST_NODES, BLOCK_CELLS // len(self.index)))]
        # A node that cannot finish a class now never can: the tuples that are left only become fewer.
        for i in self._promising(block).tolist() if len(block) > 1 else [0]:
            if not self.left:
                break
            self._try(block[i])
        return len(block)

    def _promising(self, nodes: NDArray[np.int64]) -> Index:
        """Nodes with a bucket of at least k rows: a bucket holds whole classes, so none is overlooked."""
        bits = max(6, int(len(self.index) - 1).bit_length() + 1)
        buckets = _buckets(self.keys.block(nodes), bits) + (np.arange(len(nodes)) << bits)[:, None]
        weights = np.tile(self.weights, len(nodes))
        heavy = np.bincount(buckets.ravel(), weights, len(nodes) << bits) >= self.constraints.k
        return np.flatnonzero(heavy.reshape(len(nodes), -1).any(axis=1))

    def _try(self, node: NDArray[np.int64]) -> None:
        key = self.keys.at(node.tolist())
        bits = max(6, int(len(key) - 1).bit_length() + 2)
        bucket = _buckets(key, bits)
        heavy = np.bincount(bucket, self.weights, 1 << bits) >= self.constraints.k
        near = np.flatnonzero(heavy[bucket])
        if not len(near):
            return
        _, first, inverse = np.unique(key[near], return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        members = self.index[near]
        ok = self.constraints.holds(inverse, len(first), members)
        if not ok.any():
            return
        place = np.where(ok, np.cumsum(ok) - 1 + self.count, -1)
        final = ok[inverse]
        self.classes[members[final]] = place[inverse[final]]
        self.nodes.append(np.broadcast_to(node, (int(ok.sum()), len(node))))
        self.members.append(members[first[ok]])
        self.count += int(ok.sum())
        keep = np.ones(len(self.index), bool)
        keep[near[final]] = False
        self.index, self.weights, self.keys = self.index[keep], self.weights[keep], self.keys.take(keep)

    def finish(self, top: NDArray[np.int64], limit: int) -> Peeled:
        """Suppress what is left, or join it at the top with finished classes."""
        nodes = np.concatenate(self.nodes) if self.nodes else np.zeros((0, len(top)), np.int64)
        members = np.concatenate(self.members) if self.members else np.zeros(0, np.int64)
        out = Peeled(self.classes, nodes, members)
        rows = int(self.weights.sum())
        if rows == 0 or (rows <= limit and self._holds_without_rest()):
            return out
        return self._absorb(out, top)

    def _holds_without_rest(self) -> bool:
        """Whether suppressing the rest leaves every class within its criteria: the reference changes with it."""
        if not self.tuples.references:
            return self.count > 0
        kept = np.flatnonzero(self.classes >= 0)
        references = self.constraints.references_of(kept)
        return bool(self.constraints.holds(self.classes[kept], self.count, kept, references).all()) and self.count > 0

    def _absorb(self, out: Peeled, top: NDArray[np.int64]) -> Peeled:
        """Put back the latest (most general) classes: as few as the joined rest needs to meet everything."""
        needed = self._fewest()
        classes = out.classes.copy()
        back = classes >= self.count - needed
        classes[back | (classes < 0)] = self.count - needed
        one = np.flatnonzero(classes == self.count - needed)[:1]
        kept = self.count - needed
        return Peeled(classes, np.concatenate([out.nodes[:kept], top[None]]), np.r_[out.members[:kept], one])

    def _fewest(self) -> int:
        """How many classes have to join the rest; all of them always suffice, as the whole table meets everything."""
        step, low = 1, 0
        while step < self.count and not self._joined_holds(step):
            low, step = step, 2 * step
        high = min(step, self.count)
        # Not every criterion is monotone in the number joined, so only a number that was checked itself counts.
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._joined_holds(middle) else (middle, high)
        return high

    def _joined_holds(self, joined: int) -> bool:
        members = np.flatnonzero((self.classes < 0) | (self.classes >= self.count - joined))
        return bool(self.constraints.holds(np.zeros(len(members), np.int64), 1, members)[0])


def _buckets(keys: NDArray[np.int64], bits: int) -> Index:
    return ((keys.astype(np.uint64) * MIX) >> np.uint64(64 - bits)).astype(np.int64)
