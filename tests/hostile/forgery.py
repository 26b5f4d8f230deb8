"""A forgery of a report, and the list of all; who forges, and the keys that this takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forged_run import LIAR, SERVER, Forger

Change = Callable[[Forger], Any]
ALONE, SITE, BOTH = "server", "one site", "server and one site"
LEFT_OUT = (
    "up to d sites may drop out for good; the report names it, states no budget of it, and counts every round that was "
    "opened as charged"
)
HOLDS = {ALONE: (SERVER,), SITE: (LIAR,), BOTH: (SERVER, LIAR)}


@dataclass(frozen=True)
class Forgery:
    """One row of the table.

    Attributes:
        check: the check that fails first, by name; empty where none does.
        why: why it is out of reach, where no check fails.
        pinned: the auditor has the consortium's key from elsewhere.
        signatures: of how many sites under this very report the auditor asks for.
        auditor: the auditor asks for an audit signed by the key that he knows.
    """

    who: str
    what: str
    check: str
    change: Change
    why: str = ""
    pinned: bool = True
    signatures: int = 0
    auditor: bool = False


FORGERIES: list[Forgery] = []


def forged(who: str, what: str, check: str = "", **more: Any) -> Callable[[Change], Change]:
    """Enter a function into the table."""

    def enter(change: Change) -> Change:
        FORGERIES.append(Forgery(who, what, check, change, **more))
        return change

    return enter
