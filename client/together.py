"""Many sites of one process contribute in one pass: a simulation's sum in the clear, for study.

What a site checks, charges and writes down is what :mod:`fedveil.client.round` does for one request, site by site. Only
the numbers are computed for many sites at once: the clipped sums, the grid and the noise. Nothing is sent: so there is
no message to answer twice, and no gate to pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedveil.client import train
from fedveil.client.egress.gate import spoken
from fedveil.client.own_model import Held, OwnModel
from fedveil.client.round import Turn, admitted, charge
from fedveil.client.session import Site
from fedveil.common.errors import FedveilError, ProtocolError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.dp import places
from fedveil.privacy.dp.clipping import Clipper
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.dp.quantize import to_grid
from fedveil.privacy.secagg.plain import Together

_VALUES = 1 << 20  # of all vectors that are held at a time
_Turns = list[tuple[Site, Turn]]


def contribute(sites: Iterable[Site], request: Packet) -> Together:
    """What :func:`fedveil.client.round.contribute` would send for each site, as one sum; every site is charged.

    Args:
        sites: all asked for the same round of the same plan, which trains a network under ``plain``.

    Guarantee: the distribution of the sum, and what stands in the ledgers, are those of one request after the other.

    Raises:
        ProtocolError: the plan's sum is protected: then every site has to answer by itself.
    """
    turns, refusals = _admitted(sites, request)
    if not turns:
        return Together.nothing(refusals)
    plan = turns[0][1].session.plan
    if plan.sum != "plain" or plan.task != "train":
        raise ProtocolError("only training under a sum in the clear is computed for many sites at once")
    members, total = set[SiteId](), np.zeros(plan.model.parameters, np.int64)
    for some in _alike(turns, max(1, _VALUES // plan.model.parameters)):
        values = to_grid(_sums(some), plan.clamp, plan.grid)
        charged = np.array([_charged(site, turn, refusals) for site, turn in some])
        total += values[charged].sum(0)
        count = int(charged.sum())
        total += discrete_gaussian(plan.share_std, count * total.size).reshape(count, total.size).sum(0)
        for (site, turn), paid in zip(some, charged, strict=True):
            if paid:
                site.ledger.commit(turn.session.id, turn.round)
                members.add(site.id)
    ordered = tuple(site.id for site, _ in turns if site.id in members)
    return Together(ordered, turns[0][1].model.held.name, total, refusals)


def _admitted(sites: Iterable[Site], request: Packet) -> tuple[_Turns, dict[SiteId, FedveilError]]:
    """The sites that may contribute, each with its model at the state that the request names; and the refusals."""
    turns: _Turns = []
    refusals: dict[SiteId, FedveilError] = {}
    led: tuple[Held, OwnModel] | None = None
    for site in sites:
        try:
            turn = admitted(site, request)
            if isinstance(turn, Packet):
                raise ProtocolError(f"round {turn.header.get('round')} was answered in a message")
            before = turn.model.held
            if led is None or not turn.model.follow_as(*led):
                turn.model.follow(request)
                led = before, turn.model
        except FedveilError as e:
            refusals[site.id] = spoken(e)
        else:
            turns.append((site, turn))
    return turns, refusals


def _charged(site: Site, turn: Turn, refusals: dict[SiteId, FedveilError]) -> bool:
    try:
        charge(site, turn)
    except FedveilError as e:
        refusals[site.id] = spoken(e)
        return False
    return True


class _Shape(NamedTuple):
    """What the steps of two sites must have in common to be computed in one pass."""

    engine: str
    device: str
    precision: str
    microbatch: int
    capacity: int
    rows: int  # of a client; 0 where a step's shape does not depend on them
    persons: bool


def _alike(turns: _Turns, most: int) -> Iterator[_Turns]:
    """The turns in groups whose steps have one shape, at most so many at a time."""
    groups: dict[_Shape, _Turns] = {}
    for site, turn in turns:
        rows = len(site.X) if turn.session.plan.mode == "client" else 0
        shape = _Shape(
            site.engine, site.device, turn.session.precision, site.microbatch, site.capacity, rows,
            site.persons is not None,
        )  # fmt: skip
        groups.setdefault(shape, []).append((site, turn))
    for group in groups.values():
        for first in range(0, len(group), most):
            yield group[first : first + most]


def _sums(turns: _Turns) -> NDArray[np.float64]:
    """``(S, D)``: what each site adds before noise, as :func:`fedveil.client.train.site_sum` computes it."""
    site, turn = turns[0]
    plan, engine = turn.session.plan, site.clipper(turn.session)
    if site.persons is not None or not engine.stacks:
        return np.stack([_alone(engine, s, t) for s, t in turns])
    engine.load(turn.model.weights)
    if plan.mode != "client":
        return _clipped_sums(engine, turn, [s for s, _ in turns])
    out, sampled = np.zeros((len(turns), plan.model.parameters)), train.in_sample(plan, len(turns))
    if len(site.X) and sampled.any():
        some = [s for (s, _), taken in zip(turns, sampled, strict=True) if taken]
        X, y = np.stack([s.X for s in some]), np.stack([s.y for s in some])
        out[sampled] = train.client_updates(engine, plan, X, y)
    return out


def _alone(engine: Clipper, site: Site, turn: Turn) -> NDArray[np.float64]:
    plan = turn.session.plan
    return train.site_sum(engine, plan, turn.model.weights, site.X, site.y, site.capacity, site.persons)


def _clipped_sums(engine: Clipper, turn: Turn, sites: Sequence[Site]) -> NDArray[np.float64]:
    plan = turn.session.plan
    records = np.array([len(s.X) for s in sites])
    seats = places.seat_each(records, plan.sample_rate, plan.places(sites[0].capacity))
    first = np.cumsum(records) - records
    seats = np.where(seats == places.EMPTY, seats, seats + first[:, None])
    return engine.clipped_sums(
        np.concatenate([s.X for s in sites]), np.concatenate([s.y for s in sites]), plan.clip, seats
    )
