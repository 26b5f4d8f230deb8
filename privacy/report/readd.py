"""Adds the ciphertexts of a run's contributions up again, where its server kept them: ``[run] keep_ciphertexts``.

What sites verify of an opened sum rests on the members' word for their own ciphertexts. Here the signed ciphertexts
themselves are added. So a member that chose its fingerprint to please the server is found too. This module needs SEAL;
what verifies a report does not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, UnverifiedOpening, UsageError, VerificationError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy import plan as plans
from fedveil.privacy.joining import chained, check_joins, sum_spec
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report.history import Round, replay
from fedveil.privacy.secagg import kept, lattice, verification
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.contributions import from_bytes
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_opening import Opening, max_bytes
from fedveil.privacy.secagg.opened_sum import BUFFERS, FOLDER, KEYSUM
from fedveil.privacy.secagg.params import N, choose
from fedveil.privacy.secagg.sealed import Joins

_HEADER = 1 << 22


@dataclass(frozen=True)
class Readded:
    """What was found about one round; ``error`` is empty if its ciphertexts add up to its opened sum."""

    round: int
    members: int
    error: str


def readd(run: Path, consortium_key: str | None = None, rounds: Collection[int] = ()) -> Iterator[Readded]:
    """Add up the signed ciphertexts of each applied round of ``run``, and compare with what the sites stepped on.

    Args:
        consortium_key: the pinned one; None takes the one in the folder.
        rounds: empty for all.

    Raises:
        UsageError: a round that opened no sum; a folder without ciphertexts.
        VerificationError: journal, roster, plan or join statements do not hold.
    """
    files = bundles.read(run)
    roster = bundles.open_roster(files, consortium_key or files.pin)
    history = replay(files.server_rows(roster))
    try:
        plan = plans.from_json(files.json(bundles.PLAN))
        documents = files.json(bundles.JOINS)
        known = (plan.hash, roster.hash, canonical.digest(documents))
        if known != (history.plan_hash, history.roster_hash, history.joins_digest):
            raise VerificationError("plan, roster or join statements are not those that the server's journal names")
        fields = check_joins(documents, history.session, plan.hash, roster)
        if plan.sum != "keysum" or not (run / kept.FOLDER).is_dir():
            raise UsageError(
                f"{run} holds no ciphertexts",
                hint="they are kept under keysum with keep_ciphertexts = true in [run] of federation.toml",
            )
        spec = sum_spec(plan, history.session, roster)
        joins = Joins(spec, fields)
    except (UsageError, VerificationError):
        raise
    except FedveilError as e:
        raise VerificationError(e.message, hint=e.hint) from e
    found = {r.number: r for r in history.applied}
    if missing := set(rounds) - set(found):
        raise UsageError(f"round {min(missing)} opened no sum", hint="leave out --round for all rounds that did")
    return (_readded(run, spec, joins, r) for n, r in found.items() if not rounds or n in rounds)


def _readded(run: Path, spec: SumSpec, joins: Joins, r: Round) -> Readded:
    try:
        opening = _opening(run / FOLDER, spec, r)
        total = _total(lambda site: _contribution(run, spec, r, site), spec, joins, opening, r.state_in)
        if sha256(lattice.to_bytes(total)) != opening.total:
            raise UnverifiedOpening("the members' signed ciphertexts do not add up to the opened sum")
        if spec.reveal_to == "server":
            verification.verify(spec, opening)
        else:  # only the sites can judge the errors
            verification.check(spec, opening)
    except FedveilError as e:
        return Readded(r.number, len(r.members or ()), e.message)
    return Readded(r.number, len(opening.members), "")


def _opening(folder: Path, spec: SumSpec, r: Round) -> Opening:
    """What the sites got, if it is what the journal names: the packet, its members and its nonce."""
    header = canonical.loads(bundles.read_bounded(folder / f"{r.number}.json", _HEADER))
    data = bundles.read_bounded(folder / f"{r.number}.bin", max_bytes(spec))
    if not isinstance(header, dict):
        raise VerificationError("the opened sum's header is no object")
    packet = Packet(header, {BUFFERS[KEYSUM]: data})
    if chained("", packet) != r.opened:
        raise VerificationError("the opened sum is not the one that the journal names")
    opening = Opening.parse(spec, packet)
    if (opening.round, opening.nonce, tuple(opening.members)) != (r.number, r.nonce, r.members):
        raise VerificationError("the opened sum is of another round, or of other members, than the journal names")
    return opening


def _contribution(run: Path, spec: SumSpec, r: Round, site: SiteId) -> Packet:
    name = kept.name(spec, r.number, site)
    try:
        return from_bytes(bundles.read_bounded(run / kept.FOLDER / name, choose(spec).ciphertext_bytes + _HEADER))
    except FedveilError as e:
        raise VerificationError(f"the ciphertext of {site!r} ({kept.FOLDER}/{name}): {e.message}") from e


def _total(
    read: Callable[[SiteId], Packet], spec: SumSpec, joins: Joins, opening: Opening, state: str
) -> NDArray[np.uint64]:
    """The sum of the members' ciphertexts, each of which is the one that its member signed, computed from ``state``.

    One is held at a time.
    """
    params = choose(spec)
    total = np.zeros((params.blocks, N), np.uint64)
    for site, member in opening.members.items():
        packet = read(site)
        said = messages.check_contribution(spec, joins, opening.round, opening.nonce, packet.header)
        if (said.site, said.digest) != (site, member.digest):
            raise VerificationError(f"the kept contribution of {site!r} is not the one that the opened sum names")
        if said.state != state:
            raise VerificationError(f"{site!r} computed its contribution from another model state than the round's")
        data = packet.buffer("ciphertext", params.ciphertext_bytes)
        if sha256(data) != said.ciphertext:
            raise VerificationError(f"the kept ciphertext of {site!r} is not the one that it signed")
        for first, chunk in lattice.chunks(data):
            blocks = lattice.from_bytes(chunk)
            rows = total[first : first + len(blocks)]
            rows += blocks
            lattice.reduce(rows.view(np.int64))
    return total
