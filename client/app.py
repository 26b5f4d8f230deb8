"""The Flower ClientApp: short handlers around :mod:`fedveil.client.round`, and one gate for every answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.client import report_receipt
from fedveil.client import round as line
from fedveil.client.egress.gate import Cleared, Gate
from fedveil.client.session import Site
from fedveil.common import flwr_adapter
from fedveil.common.wire import Limits, Packet

Handler = Callable[[Site, Packet], Packet]
Resolve = Callable[[Context], AbstractContextManager[Site]]


def make_app(resolve: Resolve, gate: Gate | None = None) -> ClientApp:
    """The app over any way of finding the site that a message is for (a process of its own, or a simulator).

    Args:
        gate: through which every answer leaves; by default one without slots.
    """
    app, gate = ClientApp(), gate or Gate()
    for register, action, handler in (
        (app.query, "join", line.join),
        (app.query, "begin", line.begin),
        (app.query, "deal", line.deal),
        (app.train, "contribute", line.contribute),
        (app.train, "agree", line.agree),
        (app.train, "open", line.open_sum),
        (app.train, "fingerprint", line.fingerprint),
        (app.query, "apply", line.apply),
        (app.query, "finish", line.finish),
        (app.query, "report", report_receipt.report),
    ):
        register(action)(_answering(resolve, action, handler, gate))
    return app


def _answering(resolve: Resolve, action: str, handler: Handler, gate: Gate) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        arrived = gate.arrived()
        out: Cleared | Exception
        try:
            # The server gets these rows with the ledger, so their dates must not tell what the slot hides.
            with resolve(context) as site, site.ledger.journal.dated():
                request = flwr_adapter.from_record(message.content, Limits())
                out = gate.cleared(handler(site, request), action, request, site)
        except Exception as e:  # of every class: the gate decides what the server learns of it
            out = e
        return gate.leave(out, message, action, arrived)

    return answer
