"""The egress gate: everything that leaves this site for the network passes it.

:meth:`Gate.cleared` checks every answer (form, policy, ledger, size). Then :meth:`Gate.leave` makes the message: a
:class:`Cleared` packet, or an error's class and, for a few classes, its words. Nothing else in this package sends.
Logs and files stay on this machine. What is not in the tables of ``forms`` and ``ledger_rows`` does not leave.

Timing: ``contribute`` is the one request whose work depends on records. Answers to it, and refusals of every kind,
leave at whole multiples of the *slot* after their request came. So a duration says only how many slots it took. If the
slot is longer than the slowest step, it says nothing.

The gate stops mistakes (a metric that somebody added, a count in a header, an exception's text). It cannot stop a
program that was replaced on purpose, because ciphertexts and keys are opaque to it.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from flwr.app import Message

from fedveil.client.egress.forms import Forms
from fedveil.client.session import Site
from fedveil.common import errors, flwr_adapter
from fedveil.common.errors import FedveilError, PolicyRefusal, trace
from fedveil.common.wire import Packet

_LOG = logging.getLogger("fedveil.client")
# Only these classes' messages are written without looking at data. Of all other errors only the class's name leaves.
SPOKEN = (
    errors.PolicyRefusal,
    errors.PlanError,
    errors.BudgetExhausted,
    errors.ProtocolError,
    errors.IdentityError,
    errors.ModelError,
)
# Functions that hold records. An error of any class that passed one of them loses its words. "" is a whole module.
_HOLD_RECORDS = (
    ("fedveil.client.records.", ""),
    ("fedveil.privacy.anonymization.", ""),
    ("fedveil.client.train", "site_sum"),
    ("fedveil.client.train", "_client_update"),
    ("fedveil.client.train", "client_updates"),
    ("fedveil.client.statistics", "predictions"),
    ("fedveil.privacy.dp.", "clipped_sum"),
)
# The path of a file on this machine. It must not leave: folders are named after people and wards.
_PATH = re.compile(r"""(?:^|[^\w.)])(?:~\w*/|/|[A-Za-z]:\\|\\\\)\S""")
_SLOTTED = "contribute"
HELD = "this site's egress gate held the answer back"


@dataclass(frozen=True)
class Cleared:
    """A packet that :meth:`Gate.cleared` has found fit to leave."""

    packet: Packet


class Gate:
    """One for each process.

    Args:
        slot: seconds; 0 sends at once (the simulator, where nothing real is protected).
        clock, sleep: time, for tests.
    """

    def __init__(
        self,
        slot: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._slot, self._clock, self._sleep = slot, clock, sleep
        self._forms = Forms()

    def arrived(self) -> float:
        """When a request came, by this gate's clock."""
        return self._clock()

    def cleared(self, packet: Packet, action: str, request: Packet, site: Site) -> Cleared:
        """``packet``, if every field and every byte of it may leave as the answer to ``request``.

        Raises:
            PolicyRefusal: it may not leave. The site's own log says why, and its ledger that it happened. A round that
                was charged stays charged.
        """
        try:
            self._forms.check(packet, action, request, site)
        except Exception as e:  # of every class: an answer that cannot be checked does not leave
            _LOG.error("%s (%s)", HELD, e if isinstance(e, FedveilError) else trace(e))
            site.refused(request.header.get("session"), PolicyRefusal.__name__)
            raise PolicyRefusal(HELD, hint="the reason is in the site's own log") from None
        return Cleared(packet)

    def leave(self, out: Cleared | Exception, message: Message, action: str, arrived: float) -> Message:
        """The answer to ``message``, made when its slot has come.

        Args:
            out: what was cleared, or what went wrong instead.
            action: as for :meth:`cleared`.
            arrived: of the request (:meth:`arrived`).
        """
        error = out if isinstance(out, Exception) else None
        if error is not None:
            _log(error, action)
        if self._slot and (error is not None or action == _SLOTTED):
            taken = self._clock() - arrived
            self._sleep(max(math.ceil(taken / self._slot), 1) * self._slot - taken)
        if isinstance(out, Cleared):
            return flwr_adapter.reply(out.packet, message)
        if not isinstance(out, FedveilError):
            return flwr_adapter.internal_error_reply(message)
        return flwr_adapter.error_reply(spoken(out), message)


def spoken(error: FedveilError) -> FedveilError:
    """What may leave of ``error``: its class, and its words if they can hold neither a record nor a path."""
    if isinstance(error, SPOKEN) and not _held_records(error.__traceback__) and not _PATH.search(str(error)):
        return error
    return type(error)("the reason is in the site's own log")


def _held_records(traceback: TracebackType | None) -> bool:
    """Whether an error passed through a function that holds records."""
    while traceback is not None:
        code, module = traceback.tb_frame.f_code, str(traceback.tb_frame.f_globals.get("__name__", ""))
        if any(module.startswith(m) and name in ("", code.co_name) for m, name in _HOLD_RECORDS):
            return True
        traceback = traceback.tb_next
    return False


def _log(error: Exception, action: str) -> None:
    """Write to the site's own log. Our own errors are written in full. Of others only the class and the place are
    written, because a library's words may quote a record.
    """
    if isinstance(error, FedveilError):
        _LOG.warning("%s: %s: %s", action, error.code, error)
    else:
        _LOG.error("%s failed: %s", action, trace(error))
