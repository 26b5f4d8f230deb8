"""Multidimensional partitioning (Mondrian: LeFevre, DeWitt, Ramakrishnan, ICDE 2006), breadth first, numpy only.

All open partitions are cut in one vectorised step per depth. For every attribute the cuts nearest to the median are
tried. The cut whose halves cover least of the domain (certainty penalty, weighted by rows) is taken. While very many
tuples are open, the widest attribute is cut at its median instead, as in the paper. A cut is allowed if both halves
meet every criterion. Partitions end up as sets of the values they really hold, so they are tighter than boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.tuples import CHUNK_CELLS, Constraints, Tuples, tabulate

Index = NDArray[np.int64]
Floats = NDArray[np.float64]
CUTS = 8
MANY = 1 << 19  # open tuples above which the paper's rule is used


@dataclass
class _Open:
    """The tuples of partitions that may still be cut, sorted by partition."""

    index: Index
    codes: NDArray[np.integer]  # (q, m)
    weights: NDArray[np.int64]
    part: Index  # (m,) ascending, 0..parts-1
    starts: Index  # (parts,)
    rows: NDArray[np.int64]  # (parts,)

    @classmethod
    def of(cls, index: Index, tuples: Tuples, part: Index, codes: NDArray[np.integer]) -> _Open:
        weights = tuples.weights[index]
        starts = np.flatnonzero(np.r_[True, part[1:] != part[:-1]]) if len(part) else np.zeros(0, np.int64)
        number = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(part)]))
        rows = np.add.reduceat(weights, starts) if len(starts) else np.zeros(0, np.int64)
        return cls(index, codes, weights, number, starts, rows)


@dataclass
class _Best:
    """The best cut found so far for every open partition."""

    cost: Floats
    attribute: NDArray[np.int64]
    value: NDArray[np.int64]


def mondrian(
    tuples: Tuples, domains: Sequence[Domain], constraints: Constraints, *, cuts: int = CUTS
) -> tuple[Index, int]:
    """(u,) the partition of every tuple, and their number. Every partition meets the criteria; nothing is suppressed.

    Args:
        cuts: how many cuts per attribute and partition are tried. 1: the median only.

    Raises:
        AnonymityError: not even the whole table meets the criteria.
    """
    constraints.require_satisfiable()
    positions = [d.positions for d in domains]
    small = max(d.size for d in domains) < 1 << 15
    codes = tuples.codes.astype(np.int16) if small else tuples.codes
    everything = np.arange(tuples.count)
    state = _Open.of(everything, tuples, np.zeros(tuples.count, np.int64), codes)
    result = np.full(tuples.count, -1, np.int64)
    done = 0
    while len(state.index):
        best = _search(state, tuples, positions, constraints, cuts)
        closed = best.attribute < 0
        number = np.cumsum(closed) - 1 + done
        here = closed[state.part]
        result[state.index[here]] = number[state.part[here]]
        done += int(closed.sum())
        state = _split(state, tuples, best, ~here)
    return result, done


def _split(state: _Open, tuples: Tuples, best: _Best, live: NDArray[np.bool_]) -> _Open:
    place = np.flatnonzero(live)
    part = state.part[place]
    if not len(place):
        return _Open.of(place, tuples, part, state.codes[:, :0])
    own = state.codes[best.attribute[part], place]
    half = 2 * part + (own > best.value[part])
    order = _stable_order(half)
    place = place[order]
    return _Open.of(state.index[place], tuples, half[order], state.codes.take(place, axis=1))


def _search(state: _Open, tuples: Tuples, positions: Sequence[Floats], constraints: Constraints, cuts: int) -> _Best:
    parts = len(state.starts)
    best = _Best(np.full(parts, np.inf), np.full(parts, -1, np.int64), np.zeros(parts, np.int64))
    k = max(constraints.k, 1)
    worth = state.rows >= 2 * k
    if not worth.all():
        state, back = _only(state, tuples, worth)
    else:
        back = np.arange(parts)
    if not len(state.index):
        return best
    low = np.minimum.reduceat(state.codes, state.starts, axis=1)
    high = np.maximum.reduceat(state.codes, state.starts, axis=1)
    if len(state.index) > MANY:
        spans = np.stack([p[high[j]] - p[low[j]] for j, p in enumerate(positions)])
        inner = _widest_first(state, spans, constraints)
        best.attribute[back], best.value[back] = inner.attribute, inner.value
        return best
    order_by_span = np.argsort([-float(p[high[j]].mean() - p[low[j]].mean()) for j, p in enumerate(positions)])
    inner = _Best(best.cost[back], best.attribute[back], best.value[back])
    for j in order_by_span.tolist():
        varies = high[j] > low[j]
        if varies.any():
            _try_attribute(j, state, varies, positions, constraints, cuts, inner)
    best.cost[back], best.attribute[back], best.value[back] = inner.cost, inner.attribute, inner.value
    return best


def _widest_first(state: _Open, spans: Floats, constraints: Constraints) -> _Best:
    """The median cut of each partition's widest attribute; where none is allowed, of the next widest."""
    parts = len(state.starts)
    best = _Best(np.zeros(parts), np.full(parts, -1, np.int64), np.zeros(parts, np.int64))
    ranking = np.argsort(-spans, axis=0, kind="stable")
    for attribute in ranking:
        todo = (best.attribute < 0) & (spans[attribute, np.arange(parts)] > 0)
        if not todo.any():
            continue
        pick = np.flatnonzero(todo[state.part])
        part = state.part[pick]
        order, own, part = _by_value(state.codes[attribute[part], pick], part)
        place = pick[order]
        runs = np.flatnonzero(np.r_[True, (own[1:] != own[:-1]) | (part[1:] != part[:-1])])
        of = part[runs]
        left = _left_sums(np.add.reduceat(state.weights[place], runs), of)
        chosen = _nearest_to_median(left, state.rows[of], of, max(constraints.k, 1), 1)
        if constraints.attribute and len(chosen):
            begins = np.r_[True, of[1:] != of[:-1]]
            ends = np.zeros(len(runs), bool)
            ends[chosen] = True
            begins |= np.r_[False, ends[:-1]]
            tried = np.zeros(parts, bool)
            tried[of[chosen]] = True
            segments = _Segments(runs[begins], of[begins], place, part, state).keep(tried)
            chosen = chosen[segments.both_hold(segments.cuts()[1], constraints)]
        best.attribute[of[chosen]] = attribute[of[chosen]]
        best.value[of[chosen]] = own[runs[chosen]]
    return best


def _only(state: _Open, tuples: Tuples, worth: NDArray[np.bool_]) -> tuple[_Open, Index]:
    here = worth[state.part]
    return _Open.of(state.index[here], tuples, state.part[here], state.codes[:, here]), np.flatnonzero(worth)


def _try_attribute(
    j: int,
    state: _Open,
    varies: NDArray[np.bool_],
    positions: Sequence[Floats],
    constraints: Constraints,
    cuts: int,
    best: _Best,
) -> None:
    """Improve ``best`` with the cuts of attribute ``j``."""
    pick = None if varies.all() else np.flatnonzero(varies[state.part])
    own = state.codes[j] if pick is None else state.codes[j][pick]
    part = state.part if pick is None else state.part[pick]
    order, own, part = _by_value(own, part)
    place = order if pick is None else pick[order]
    weights = state.weights[place]
    runs = np.flatnonzero(np.r_[True, (own[1:] != own[:-1]) | (part[1:] != part[:-1])])
    of = part[runs]
    left = _left_sums(np.add.reduceat(weights, runs), of)
    total = state.rows[of]
    k = max(constraints.k, 1)
    chosen = _nearest_to_median(left, total, of, k, cuts)
    if not len(chosen):
        return
    # Segments: a partition's tuples between two tried cuts. Partitions without a cut to try drop out.
    tried = np.zeros(len(best.cost), bool)
    tried[of[chosen]] = True
    ends = np.zeros(len(runs), bool)
    ends[chosen] = True
    first = np.r_[True, of[1:] != of[:-1]]
    begins = first | np.r_[False, ends[:-1]]
    segments = _Segments(runs[begins], of[begins], place, part, state)
    segments = segments.keep(tried)
    cost = segments.cost(positions)
    cut_of, last = segments.cuts()
    value = own[segments.stops[last] - 1]
    cost = cost[last]
    better = cost < best.cost[cut_of]
    if constraints.attribute and better.any():
        better[better] = segments.both_hold(last[better], constraints)
    if not better.any():
        return
    cut_of, value, cost = cut_of[better], value[better], cost[better]
    rank = np.lexsort((value, cost, cut_of))
    winner = rank[np.r_[True, cut_of[rank][1:] != cut_of[rank][:-1]]]
    who = cut_of[winner]
    best.cost[who], best.attribute[who], best.value[who] = cost[winner], j, value[winner]


class _Segments:
    """Consecutive pieces of partitions, ordered along one attribute; a cut lies after each but a partition's last."""

    def __init__(self, starts: Index, of: Index, place: Index, part: Index, state: _Open) -> None:
        self.starts, self.of = starts, of
        self.stops = np.r_[starts[1:], len(place)]
        self.place, self.part, self.state = place, part, state

    def keep(self, tried: NDArray[np.bool_]) -> _Segments:
        """Only the segments of these partitions; the others' tuples stay in place, but no segment covers them."""
        if tried[self.of].all():
            return self
        mask = tried[self.of]
        out = _Segments(self.starts[mask], self.of[mask], self.place, self.part, self.state)
        out.stops = self.stops[mask]
        return out

    def cuts(self) -> tuple[Index, Index]:
        """(c,) the partition of each cut, and the segment it lies behind."""
        last = np.flatnonzero(self.of[1:] == self.of[:-1])
        return self.of[last], last

    def cost(self, positions: Sequence[Floats]) -> Floats:
        """(s,) certainty penalty of both halves if the partition was cut behind each segment (its last: unused)."""
        weights = self._reduce(np.add, self.state.weights)
        left_rows = _left_sums(weights, self.of)
        right_rows = self.state.rows[self.of] - left_rows
        out = np.zeros(len(self.of))
        ordered = self.state.codes[:, self.place]
        low, high = self._reduce(np.minimum, ordered), self._reduce(np.maximum, ordered)
        for e, position in enumerate(positions):
            left_low, left_high = _running(low[e], self.of, np.minimum), _running(high[e], self.of, np.maximum)
            right_low = _running(low[e][::-1], self.of[::-1], np.minimum)[::-1]
            right_high = _running(high[e][::-1], self.of[::-1], np.maximum)[::-1]
            # Behind segment i the right half begins with segment i + 1.
            right_low, right_high = np.r_[right_low[1:], 0], np.r_[right_high[1:], 0]
            out += left_rows * (position[left_high] - position[left_low])
            out += right_rows * (position[right_high] - position[right_low])
        return out

    def both_hold(self, cuts: Index, constraints: Constraints) -> NDArray[np.bool_]:
        """(c,) whether every criterion holds on both sides of the cuts behind these segments."""
        ok = np.ones(len(cuts), bool)
        members = self.state.index[self.place]
        lengths = self.stops - self.starts
        flat = np.repeat(self.starts - np.r_[0, np.cumsum(lengths)[:-1]], lengths) + np.arange(int(lengths.sum()))
        segment = np.repeat(np.arange(len(self.of)), lengths)
        left_rows = _left_sums(self._reduce(np.add, self.state.weights), self.of)[cuts]
        right_rows = self.state.rows[self.of[cuts]] - left_rows
        for m in constraints.attribute:
            values, weights, domain = constraints.channel(m, members[flat])
            reference = constraints.tuples.references.get(m.column)
            for begin, stop in self._blocks(domain):
                mine = np.flatnonzero((cuts >= begin) & (cuts < stop))
                if not len(mine):
                    continue
                a, b = np.searchsorted(segment, [begin, stop])
                table = tabulate(segment[a:b] - begin, values[a:b], weights[a:b], stop - begin, domain)
                left, right = _both_sides(table, self.of[begin:stop], cuts[mine] - begin)
                ok[mine] &= m.holds(left_rows[mine], left, reference) & m.holds(right_rows[mine], right, reference)
        return ok

    def _blocks(self, domain: int) -> list[tuple[int, int]]:
        """Ranges of segments that end where a partition ends and hold a bounded number of cells."""
        step = max(1, CHUNK_CELLS // domain)
        if len(self.of) <= step:
            return [(0, len(self.of))]
        ends = np.flatnonzero(np.r_[self.of[1:] != self.of[:-1], True]) + 1
        out, begin = [], 0
        while begin < len(self.of):
            fits = ends[(ends > begin) & (ends <= begin + step)]
            stop = int(fits[-1]) if len(fits) else int(ends[ends > begin][0])
            out.append((begin, stop))
            begin = stop
        return out

    def _reduce(self, how: np.ufunc, values: NDArray) -> NDArray:
        ordered = values if values.ndim == 2 else values[self.place]
        if np.array_equal(self.stops[:-1], self.starts[1:]) and int(self.stops[-1]) == ordered.shape[-1]:
            return how.reduceat(ordered, self.starts, axis=-1)
        # Pieces with gaps between them: every second result belongs to a gap.
        bounds = np.stack([self.starts, self.stops], axis=1).ravel()
        if bounds[-1] == ordered.shape[-1]:
            bounds = bounds[:-1]
        return how.reduceat(ordered, bounds, axis=-1)[..., ::2]


def _both_sides(table: NDArray[np.int64], of: Index, cuts: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sums = np.cumsum(table, axis=0)
    first = np.searchsorted(of, of[cuts], side="left")
    last = np.searchsorted(of, of[cuts], side="right") - 1
    before = np.where((first > 0)[:, None], sums[first - 1], 0)
    return sums[cuts] - before, sums[last] - sums[cuts]


def _nearest_to_median(left: Index, total: Index, of: Index, k: int, cuts: int) -> Index:
    """Ascending run numbers: for every partition its ``cuts`` feasible cuts nearest to the median."""
    feasible = np.flatnonzero((left >= k) & (total - left >= k))
    if not len(feasible):
        return feasible
    distance = np.abs(2 * left[feasible] - total[feasible])
    order = np.lexsort((distance, of[feasible]))
    owner = of[feasible][order]
    begin = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    rank = np.arange(len(order)) - np.repeat(begin, np.diff(np.r_[begin, len(order)]))
    return np.sort(feasible[order[rank < cuts]])


def _left_sums(weights: Index, of: Index) -> Index:
    """Running sums that begin anew in every partition (``of`` ascending)."""
    sums = np.cumsum(weights)
    begin = np.flatnonzero(np.r_[True, of[1:] != of[:-1]])
    base = np.r_[0, sums[begin[1:] - 1]]
    return sums - np.repeat(base, np.diff(np.r_[begin, len(of)]))


def _running(values: NDArray[np.int32], of: Index, how: np.ufunc) -> Index:
    """Running minimum or maximum that begins anew wherever ``of`` (monotone) changes."""
    block = np.cumsum(np.r_[0, of[1:] != of[:-1]]) * (1 << 32)
    shift = block if how is np.maximum else -block
    return how.accumulate(values + shift) - shift


def _stable_order(keys: NDArray[np.integer]) -> Index:
    """A stable argsort of small non-negative integers: radix sort where 16 bits suffice."""
    top = int(keys.max(initial=0))
    return np.argsort(keys.astype(np.uint16) if top < 1 << 16 else keys, kind="stable")


def _by_value(own: NDArray[np.integer], part: Index) -> tuple[Index, NDArray[np.integer], Index]:
    """The order by partition, then by value, and both so ordered; ``part`` ascends already."""
    top = int(own.max(initial=0)) + 1
    if (int(part[-1]) + 1) * top < 1 << 16:
        order = _stable_order(part * top + own)
        return order, own[order], part
    inner = _stable_order(own)
    order = inner[_stable_order(part[inner])]
    return order, own[order], part
