"""The site's executor: SuperNode hands it tasks, the installed app answers, no bundle is ever looked into.

SuperNode offers a task before its message has come whole. If the run ends meanwhile, the rest never comes, and the task
is still offered. SuperNode waits for one reply to every message that did come whole. A reply to another message is
taken in its place, and the right one then lies there until the next message. So nothing is answered before it is whole,
not even with a refusal. A message whose rest does not come is never answered; meanwhile other tasks go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.common import errors
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, PolicyRefusal, ProtocolError, TransportError, WireError
from fedveil.deploy.superlink.bundle import PIN
from fedveil.deploy.superlink.runtime import CLIENT, Arrival, Inflow, Input, Link, Task

_POLL_S = 0.1
_AWAY_S = 1.0
_STALL_S = 60.0
_MAX_OPEN = 8
_LOG = logging.getLogger("fedveil.superlink")
_OTHER = "this site runs no other bundle than fedveil's own"


@dataclass
class _Open:
    """A task whose message is arriving; with a ``refusal`` what arrives is dropped."""

    task: Task
    given: Input
    envelope: Message
    inflow: Inflow
    held: ExitStack
    refusal: FedveilError | None
    moved: float = field(default_factory=time.monotonic)


class SiteExecutor:
    """Takes the tasks of one SuperNode, in this process and thread.

    Args:
        link: SuperNode's runtime interface, with the secret it was started with.
        app: answers every message of a task under the pinned bundle, one at a time.
        on_status: told, in words, of what happens.
        stall: seconds after which a message is given up if nothing more of it comes.

    A task under another bundle is answered with :class:`PolicyRefusal` and ended as failed. Its message is dropped
    unread. What breaks a bound is answered with :class:`WireError`. Nothing that a task brings ends this process.
    """

    def __init__(
        self, link: Link, app: ClientApp, *, on_status: Callable[[str], None] = lambda text: None,
        stall: float = _STALL_S,
    ) -> None:  # fmt: skip
        self._link, self._app, self._say, self._stall = link, app, on_status, stall
        self._open: list[_Open] = []
        self._away = False
        self.answered, self.refused = 0, 0

    def serve(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set; a SuperNode that is away is waited for."""
        try:
            while not stop.is_set():
                stop.wait(self._turn())
        finally:
            for o in self._open:
                o.held.close()

    def _turn(self) -> float:
        """One look at SuperNode; how long to wait before the next."""
        try:
            task = self._link.acquire(CLIENT) if len(self._open) < _MAX_OPEN else None
            if self._away:
                self._say("SuperNode is there")
            self._away = False
            if task is not None:
                self._begin(task)
            for o in list(self._open):
                self._advance(o)
            return _POLL_S if task is None else 0.0
        except TransportError as e:
            if not self._away:
                self._say(f"waiting: {e}")
            self._away = True
        except FedveilError as e:
            # This task, or this answer, is lost; SuperNode tells the server after a minute.
            _LOG.warning("a task came to nothing: %s", e)
        except Exception as e:  # whatever a task brings, the next one is taken
            _LOG.error("a task failed inside the executor: %s", errors.trace(e))
        return _AWAY_S

    def _begin(self, task: Task) -> None:
        with ExitStack() as stack:
            stack.enter_context(task.held())
            given = task.begin()
            envelope, inflow = task.envelope()
            refusal = None if given.bundle == PIN else PolicyRefusal(_OTHER)
            self._open.append(_Open(task, given, envelope, inflow, stack.pop_all(), refusal))
        if refusal is not None:
            self._say(f"run {given.run_id}: dropped the bundle {given.bundle}, which is not fedveil's")

    def _advance(self, o: _Open) -> None:
        """Fetch what has come of a message, and answer it once it is whole."""
        before = len(o.inflow.missing())
        try:
            state, message = self._arrived(o)
            if len(o.inflow.missing()) < before:
                o.moved = time.monotonic()
            if state == "partly" and time.monotonic() - o.moved < self._stall:
                return
            if state == "whole":
                self._answer(o, message)
            else:
                self._say(f"run {o.given.run_id}: a message did not come whole")
                with suppress(ProtocolError):  # SuperNode may have ended the task itself
                    o.task.finish("the message did not come whole")
        except BaseException:
            self._drop(o)
            raise
        self._drop(o)

    def _arrived(self, o: _Open) -> tuple[Arrival, Message | None]:
        try:
            state = o.task.fetch(o.inflow, drop=o.refusal is not None)
            return state, o.inflow.message() if state == "whole" and o.refusal is None else None
        except WireError as e:
            o.refusal = e
            self._say(f"run {o.given.run_id}: {e}")
            return o.task.fetch(o.inflow, drop=True), None

    def _answer(self, o: _Open, message: Message | None) -> None:
        if message is None or o.refusal is not None:
            refusal = o.refusal or WireError("a message that cannot be read")
            o.task.push([flower.error_reply(refusal, o.envelope)])
            self.refused += 1
            o.task.finish(refusal.message)
            return
        flower.set_task_identity(o.given.run_id, o.given.node_id)
        context = Context(o.given.run_id, o.given.node_id, {}, RecordDict(), {})
        o.task.push([flower.answer(self._app, message, context)])
        self.answered += 1
        o.task.finish()

    def _drop(self, o: _Open) -> None:
        self._open.remove(o)
        o.held.close()
