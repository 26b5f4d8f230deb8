"""The site's executor: SuperNode hands it tasks, the installed app answers, no bundle is ever looked into."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.common import errors
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, PolicyRefusal, TransportError
from fedveil.deploy.superlink.bundle import PIN
from fedveil.deploy.superlink.runtime import CLIENT, Input, Link, Task

_POLL_S = 0.1
_AWAY_S = 1.0
_LOG = logging.getLogger("fedveil.superlink")
_OTHER = "this site runs no other bundle than fedveil's own"


class SiteExecutor:
    """Takes the tasks of one SuperNode, one after the other, in this process.

    Args:
        link: SuperNode's runtime interface, with the secret it was started with.
        app: answers every message of a task under the pinned bundle.
        on_status: told, in words, of what happens.

    A task under another bundle is answered with :class:`PolicyRefusal` and ended as failed; its content is not fetched.
    So is whatever breaks a bound. Nothing that a task brings ends this process.
    """

    def __init__(self, link: Link, app: ClientApp, *, on_status: Callable[[str], None] = lambda text: None) -> None:
        self._link, self._app, self._say = link, app, on_status
        self.answered, self.refused = 0, 0

    def serve(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set; a SuperNode that is away is waited for."""
        away = False
        while not stop.is_set():
            try:
                task = self._link.acquire(CLIENT)
                if away:
                    self._say("SuperNode is there")
                away = False
                if task is None:
                    stop.wait(_POLL_S)
                else:
                    self._handle(task)
            except TransportError as e:
                if not away:
                    self._say(f"waiting: {e}")
                away = True
                stop.wait(_AWAY_S)
            except FedveilError as e:
                # This task, or this answer, is lost; SuperNode tells the server after a minute.
                _LOG.warning("a task came to nothing: %s", e)
                stop.wait(_AWAY_S)
            except Exception as e:  # whatever a task brings, the next one is taken
                _LOG.error("a task failed inside the executor: %s", errors.trace(e))
                stop.wait(_AWAY_S)

    def _handle(self, task: Task) -> None:
        with task.held():
            given = task.begin()
            reply, failure = self._reply(task, given)
            task.push([reply])
            task.finish(failure)

    def _reply(self, task: Task, given: Input) -> tuple[Message, str]:
        """What to send, and why the task failed if it did."""
        envelope, inflow = task.envelope()
        if given.bundle != PIN:
            self.refused += 1
            self._say(f"run {given.run_id}: dropped the bundle {given.bundle}, which is not fedveil's")
            task.confirm(inflow)
            return flower.error_reply(PolicyRefusal(_OTHER), envelope), _OTHER
        flower.set_task_identity(given.run_id, given.node_id)
        try:
            message = task.content(inflow)
        except errors.WireError as e:
            self.refused += 1
            self._say(f"run {given.run_id}: {e}")
            task.confirm(inflow)
            return flower.error_reply(e, envelope), e.message
        reply = flower.answer(self._app, message, Context(given.run_id, given.node_id, {}, RecordDict(), {}))
        self.answered += 1
        return reply, ""
