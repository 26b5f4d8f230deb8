"""What happens to a message at a site: one function per message, to be read from top to bottom.

A record's way through a round is :func:`contribute`, top to bottom: sample, clip, clamp, grid, **charge**, noise,
encrypt, persist, hand on. The plan that the site signed fixed everything that a message can ask for. A message only
names the session and the round, and brings the sums that were opened since the one before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.client import witness
from fedveil.client.egress.ledger_rows import ENDINGS
from fedveil.client.own_model import OwnModel
from fedveil.client.session import Session, Site
from fedveil.client.statistics import statistics_sum
from fedveil.client.train import site_sum
from fedveil.common.errors import BudgetExhausted, DeviceError, ProtocolError, StateMismatch, WireError
from fedveil.common.identity import SERVER
from fedveil.common.wire import Packet
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.dp.quantize import to_grid
from fedveil.privacy.secagg.interface import MAX_NONCE, is_hex

_LOG = logging.getLogger("fedveil.client")
FARTHEST = 1e30  # of a weight between a round's steps: it stays a finite single-precision number


def join(site: Site, request: Packet) -> Packet:
    """Accept or refuse a plan. The answer is this site's signed statement."""
    h = request.expect("join").header
    session = site.accept(h.get("session", ""), h.get("plan"), h.get("roster_hash", ""), h.get("contract_hash", ""))
    if session.plan.task == "train":  # a model that couples records is refused before round 1
        site.clipper(session)
    return Packet({"kind": "joined", "statement": site.statement(session)})


def begin(site: Site, request: Packet) -> Packet:
    """Take all sites' statements, each checked against the pinned roster."""
    h = request.expect("begin").header
    return site.begin(h.get("session"), h.get("joins"))


def deal(site: Site, request: Packet) -> Packet:
    """Take what another site sent to this one, through the server, at the beginning of the run."""
    h = request.expect("deal").header
    session, inner = site.session(h.get("session")), h.get("packet")
    if not isinstance(inner, dict):
        raise WireError("a relayed packet without a header")
    session.sum.receive(Packet(inner, request.buffers))
    return Packet({"kind": "dealt"})


@dataclass(frozen=True)
class Turn:
    """A round that a site may contribute to: everything but its budget was looked at."""

    session: Session
    round: int
    nonce: str
    model: OwnModel


def contribute(site: Site, request: Packet) -> Packet:
    """One round: the clipped sum of this site's sampled records, charged, noised, encrypted.

    A repeated request gets the identical bytes. If a round was charged and its answer was lost, the request is refused:
    fresh noise for the same step would be a second release.
    """
    turn = admitted(site, request)
    if isinstance(turn, Packet):
        return turn
    session, plan, model = turn.session, turn.session.plan, turn.model
    model.follow(request)

    if isinstance(plan.model, StatsSpec):
        clipped = statistics_sum(plan, plan.model, request, site.X, site.y, site.capacity, site.persons)
    else:
        clipped = site_sum(site.clipper(session), plan, model.weights, site.X, site.y, site.capacity, site.persons)
    noisy = to_grid(clipped, plan.clamp, plan.grid)
    del clipped
    charge(site, turn)
    noisy += discrete_gaussian(plan.step_std, plan.model.parameters)
    for _ in range(1, plan.noisy_steps):
        noisy += another_step(site, turn, noisy)
    head = site.head if plan.sum == "keysum" else None  # it is signed for the helpers: others show it to nobody
    sealed = session.sum.contribute(turn.round, turn.nonce, noisy, head, model.held.name)
    site.ledger.commit(session.id, turn.round)
    return sealed


def another_step(site: Site, turn: Turn, so_far: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(D,)`` on the grid: one more noisy step of a round, charged already, where those before it have led.

    The weights follow from noisy sums alone. They move by plain steps at the plan's rate, as if the site held an even
    share of the declared records.
    """
    plan, state = turn.session.plan, turn.model.held.state
    rate = plan.optimizer.learning_rate * plan.optimizer.factor(state.steps + 1)
    weights = state.weights - so_far * (rate * plan.grid * plan.sites / plan.divisor)
    bounded = np.clip(weights, -FARTHEST, FARTHEST).astype(np.float32)
    try:
        clipped = site_sum(site.clipper(turn.session), plan, bounded, site.X, site.y, site.capacity, site.persons)
    except DeviceError as e:
        raise DeviceError(
            "the GPU failed in a later step of this round: the round stays charged, and this site misses it",
            hint=e.hint,
        ) from e
    return to_grid(clipped, plan.clamp, plan.grid) + discrete_gaussian(plan.step_std, plan.model.parameters)


def admitted(site: Site, request: Packet) -> Turn | Packet:
    """What a request for a contribution asks for, if this site may answer it; or the bytes that it was answered with.

    Raises:
        ProtocolError, WireError, PolicyRefusal, BudgetExhausted, IdentityError: it may not.
    """
    h = request.expect("contribute").header
    session = site.session(h.get("session"))
    plan, round_ = session.plan, _round(h.get("round"), session.plan.steps)
    if h.get("plan_hash") != session.plan_hash:
        raise ProtocolError("the request names another plan than the one this site signed")
    nonce = h.get("nonce")
    if not (isinstance(nonce, str) and 0 < len(nonce) <= MAX_NONCE and nonce.isascii() and nonce.isprintable()):
        raise WireError("a malformed nonce")
    _require_open(site, session)
    if (again := session.sum.replay(round_)) is not None:
        if again.header.get("nonce") != nonce:
            raise ProtocolError(f"round {round_} was answered under another nonce")
        if (session.id, round_) not in site.ledger.tally.committed:
            site.ledger.commit(session.id, round_)  # a crash came between keeping the answer and this row
        return again
    site.permit(session)
    # If every site holds the one key that reads the sums, a revoked site has it too. So nothing more is contributed.
    site.not_revoked([SERVER, *(m.site for m in site.roster.sites)] if plan.sum == "sharedkey" else [SERVER])
    return Turn(session, round_, nonce, site.model(session))


def charge(site: Site, turn: Turn) -> None:
    """Charge the ledger for a turn; only then may noise be drawn. :class:`BudgetExhausted` ends the session here."""
    session = turn.session
    try:
        site.ledger.reserve(session.id, turn.round, session.plan_hash, session.plan.event, turn.model.held.name)
    except BudgetExhausted:
        session.exhausted = True
        raise


def apply(site: Site, request: Packet) -> Packet:
    """Take opened sums that this site lacks, if the request brings some. The answer says how far its model has come.

    Sums that do not lead to the state that the request names change nothing. Then the answer says that too.
    """
    h = request.expect("apply").header
    model = site.model(site.session(h.get("session")))
    if "sums" in h:
        try:
            model.follow(request)
        except StateMismatch as e:
            _LOG.warning("sums of session %s are not taken: %s", str(h.get("session"))[:16], e)
    return Packet({"kind": "applied", "round": model.held.round, "state": model.held.name})


def agree(site: Site, request: Packet) -> Packet:
    """Sign the announced set of members, once per round, unless one was revoked or its journal went back in time.

    The ledger holds the set before the signature leaves.
    """
    members = request.header.get("members")
    headers = members if isinstance(members, list) else []
    named = [h["site"] for h in headers if isinstance(h, dict) and isinstance(h.get("site"), str)]
    site.not_revoked([SERVER, *named])
    session = site.session(request.header.get("session"))
    witness.refuse_barred(named, session.barred)
    signed = session.sum.agree(request, site.witness)
    witness.note_agreed(site.ledger, session.id, signed.header["round"], named, signed.header["digest"])
    return signed


def open_sum(site: Site, request: Packet) -> Packet:
    """Help to open the sum over the agreed set, once per round, unless the server or one of the set was revoked."""
    members = request.header.get("members")
    site.not_revoked([SERVER, *(m for m in members if isinstance(m, str))] if isinstance(members, list) else [SERVER])
    return site.session(request.header.get("session")).sum.open(request)


def fingerprint(site: Site, request: Packet) -> Packet:
    """Vouch for the opened sum with the fingerprint of this site's own ciphertext, unless the server was revoked."""
    site.not_revoked([SERVER])
    return site.session(request.header.get("session")).sum.fingerprint(request)


def finish(site: Site, request: Packet) -> Packet:
    """End the session: note the final model, which is this site's own, destroy the keys, hand over the ledger."""
    h = request.expect("finish").header
    session = site.session(h.get("session"))
    model_hash, status = h.get("model_hash"), h.get("status")
    if not (is_hex(model_hash, 64) and status in ENDINGS):
        raise WireError("a malformed end of session")
    model = site.model(session)
    model.follow(request)
    if model_hash != model.model_hash:
        raise StateMismatch("the server ends the session with another model than this site's")
    if session.plan.reveal_to == "sites":
        site.keep(session.id, model.held.state.model())
    if not session.ended:
        site.ledger.note(
            "model", session=session.id, round=_round(h.get("round"), session.plan.steps, 0), model_hash=model_hash
        )
        site.ledger.note("session.end", session=session.id, status=status)
        session.ended = True
    session.sum.end()
    session.release()
    lines = b"".join(row.line() for row in site.ledger.journal.rows)
    return Packet({"kind": "finished", "head": list(site.ledger.head)}, {"journal": lines})


def _require_open(site: Site, session: Session) -> None:
    """Refuse before the charge what could not be answered anyway.

    A session's end is two rows. After a crash between them the ledger names the last model: nothing may follow it.
    """
    if session.ended or session.id in site.ledger.tally.last_models:
        raise ProtocolError("that session has ended")
    if session.exhausted:
        raise BudgetExhausted(
            "the budget refused a step of this session", hint="a normal ending: the last model is kept"
        )
    if not session.begun:
        raise ProtocolError("this site was not told who joined", hint="the server begins a session before its rounds")


def _round(value: object, steps: int, first: int = 1) -> int:
    if type(value) is not int or not first <= value <= steps:
        raise ProtocolError(f"a round outside the plan's {first}..{steps}")
    return value
