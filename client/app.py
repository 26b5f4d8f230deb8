"""The Flower ClientApp: handlers of a few lines around :mod:`fedveil.client.round`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.client import round as line
from fedveil.client.session import Site
from fedveil.common import errors, flwr_adapter
from fedveil.common.errors import FedveilError
from fedveil.common.wire import Limits, Packet

Handler = Callable[[Site, Packet], Packet]
Resolve = Callable[[Context], AbstractContextManager[Site]]

_LOG = logging.getLogger("fedveil.client")
# Only these classes' messages are written without looking at data; of all others only the name leaves.
_SPOKEN = (
    errors.PolicyRefusal,
    errors.PlanError,
    errors.BudgetExhausted,
    errors.ProtocolError,
    errors.IdentityError,
    errors.ModelError,
)


def make_app(resolve: Resolve) -> ClientApp:
    """The app over any way of finding the site that a message is for (a process of its own, or a simulator)."""
    app = ClientApp()
    for register, action, handler in (
        (app.query, "join", line.join),
        (app.query, "begin", line.begin),
        (app.query, "deal", line.deal),
        (app.train, "contribute", line.contribute),
        (app.train, "agree", line.agree),
        (app.train, "open", line.open_sum),
        (app.query, "apply", line.apply),
        (app.query, "finish", line.finish),
    ):
        register(action)(_answering(resolve, handler))
    return app


def _answering(resolve: Resolve, handler: Handler) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        try:
            with resolve(context) as site:
                packet = handler(site, flwr_adapter.from_record(message.content, Limits()))
            return flwr_adapter.reply(packet, message)
        except FedveilError as e:
            _LOG.warning("%s: %s", e.code, e)
            return flwr_adapter.error_reply(e if isinstance(e, _SPOKEN) else _muted(e), message)

    return answer


def _muted(error: FedveilError) -> FedveilError:
    """The error's class without its words: what it says may depend on data, and stays in the site's own log."""
    return type(error)("the reason is in the site's own log")
