"""A site's own copy of the model, which it steps itself on the opened sums: no server can give it other weights.

The start follows from the plan. A round brings the sums that were opened since the one before. The site verifies each
where the protocol can (``keysum``), takes the plan's optimiser step on it, and compares the state that it comes to with
the one that the round names. What a contribution names, signed, is this state.

If only the sites can read the sums (``reveal_to = "sites"``), the server cannot hash the state. Then its name is the
hash of the chain of blinded sums that it came from, from which it follows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import ProtocolError, RunAborted, StateMismatch, StoreError, SumTooLong, WireError
from fedveil.common.wire import Packet, sha256
from fedveil.privacy import norm_cap
from fedveil.privacy.joining import chained
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import SiteSum, is_hex
from fedveil.privacy.secagg.named_state import NAMED, WHOLE
from fedveil.privacy.secagg.opened_sum import sums_in
from fedveil.privacy.secagg.store import Store

_LOG = logging.getLogger("fedveil.client")
_NAME = 32  # bytes of a state's name, before the state itself


@dataclass(frozen=True)
class Held:
    """The model after the sum of ``round`` (0: the start), and the state's name (see the module's text)."""

    round: int
    name: str
    state: ModelState


class OwnModel:
    """One site's model in one session. One state stays on disk; it is erased only after the next is written.

    Args:
        start: the plan's public initialisation.
    """

    def __init__(self, plan: PrivacyPlan, sum_: SiteSum, store: Store, start: ModelState) -> None:
        self._plan, self._sum, self._store = plan, sum_, store
        self._hidden = plan.reveal_to == "sites"
        self.held = Held(0, start.hash if self._hidden else start.digest, start)
        for number in sorted((int(name.removeprefix(_PREFIX)) for name in store.names(_PREFIX)), reverse=True):
            if (data := store.get(_key(number))) is not None:
                self.held = self._loaded(number, data)
                break

    @property
    def model_hash(self) -> str:
        """The model's name in journals and reports."""
        return self.held.name if self._hidden else self.held.state.hash

    @property
    def weights(self) -> NDArray[np.float32]:
        """``(D,)``: what gradients are computed from."""
        return np.frombuffer(self.held.state.sent(), "<f4")

    def follow(self, request: Packet) -> None:
        """Step on the sums in ``request`` that this model lacks. Afterwards it is the state that ``request`` names.

        The request may bring a whole later state instead of sums, if more than t + d members named it, signed.

        Raises:
            StateMismatch: it is another one. Then nothing has changed.
            ProtocolError: a whole state is not later than this model. Nothing has changed.
            UnverifiedOpening: under ``keysum``, nothing shows that a sum is that of its members. Nothing has changed.
            SumTooLong: a sum is longer than the plan's :func:`~fedveil.privacy.norm_cap.cap`. Nothing has changed.
            WireError, SecureSumError, RunAborted: a sum is malformed, or the model would not be finite after it.
        """
        named, now = request.header.get("state"), self.held
        if not (isinstance(named, str) and is_hex(named, 64)):
            raise WireError("a request that names no model state")
        if NAMED in request.header:
            now = self._later(request)
        for packet in sums_in(request):
            if self._number(packet) > now.round:
                now = self._after(now, packet)
        if now.name != named:
            raise StateMismatch(
                f"this site's model after round {now.round} is {now.name[:16]}..., the server names {named[:16]}...",
                hint="the server sent another sum than to the others, or not every sum that this site lacks",
            )
        self._keep(now)

    def _later(self, request: Packet) -> Held:
        """The whole state that ``request`` brings: all rounds before that of the members who named it are in it."""
        round_, name = self._sum.named(request.header[NAMED])
        data = request.buffer(WHOLE, self.held.state.length)
        if sha256(data) != name:
            raise StateMismatch(
                f"the server brings another model state than the {name[:16]}... that the members of round {round_} "
                "named",
                hint="its copy is damaged, or it lied; this site keeps the model that it has",
            )
        try:
            state = ModelState.load(data)
        except StoreError as e:
            raise WireError("a model state that is malformed") from e
        if not state.finite or not state.fits(self.held.state):
            raise WireError("a model state of another shape, or with values that are not finite numbers")
        if not self.held.state.steps < state.steps < round_ or round_ - 1 <= self.held.round:
            raise ProtocolError(
                f"the server brings the model state before round {round_}, which is not later than this site's after "
                f"round {self.held.round}, or does not go with that round",
                hint="a model only moves forward; nothing has changed",
            )
        return Held(round_ - 1, name, state)

    def follow_as(self, before: Held, other: OwnModel) -> bool:
        """Take the state of another site's model of the same run, which had the same state ``before`` it followed.

        Only for sites of one process. False, and nothing has changed, if this model was elsewhere.
        """
        if (self.held.round, self.held.name) != (before.round, before.name):
            return False
        self._keep(other.held)
        return True

    def _number(self, packet: Packet) -> int:
        number = packet.header.get("round")
        if type(number) is not int or not 1 <= number <= self._plan.steps:
            raise ProtocolError("an opened sum of a round that is not in the plan")
        return number

    def _after(self, now: Held, packet: Packet) -> Held:
        values, members = self._sum.opened(packet)
        state = now.state
        try:
            state = _stepped(self._plan, state, values, len(members))
        except (SumTooLong, RunAborted) as e:
            if not self._hidden:
                raise
            # The server could not look at this sum. Every site comes to the same conclusion: the model stays.
            _LOG.warning("round %d does not move the model: %s", packet.header["round"], e)
        return Held(self._number(packet), chained(now.name, packet) if self._hidden else state.digest, state)

    def _loaded(self, number: int, data: bytes) -> Held:
        if self._hidden:
            return Held(number, data[:_NAME].hex(), ModelState.load(data[_NAME:]))
        state = ModelState.load(data)
        return Held(number, state.digest, state)

    def _keep(self, now: Held) -> None:
        before = self.held.round
        if now.round == before:
            return
        if self._hidden:
            self._store.put(_key(now.round), bytes.fromhex(now.name), now.state.data)
        else:  # the state names itself; one object is shared by all virtual sites in memory
            self._store.put(_key(now.round), now.state.data)
        if before:
            self._store.erase(_key(before))
        self.held = now


_PREFIX = "model-"


def _key(number: int) -> str:
    return f"{_PREFIX}{number}"


class _Step(NamedTuple):
    plan: str
    before: str
    members: int
    opened: NDArray[np.int64]
    after: ModelState


_last: list[_Step] = []  # one step: the virtual sites of a process all take the same one, and share the state


def _stepped(plan: PrivacyPlan, state: ModelState, values: NDArray[np.int64], members: int) -> ModelState:
    """The state after one sum that is not too long; ``values`` cannot be written to."""
    taken = (plan.hash, state.digest, members)
    for step in _last:
        if step[:3] == taken and (step.opened is values or np.array_equal(step.opened, values)):
            return step.after
    norm_cap.check(plan, values, members)
    after = state.after(plan, values)
    _last[:] = [_Step(*taken, values, after)]
    return after
