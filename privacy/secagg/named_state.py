"""A whole model state on its way to a site that lacks many sums, with the signatures that stand for it.

Every signed contribution names the state that it was computed from. So the headers of one round say which state its
members had, and the bytes of that state can come from anybody. A message brings both: in its header ``named``, an
object of ``round``, ``nonce`` and ``members`` (the signed headers of that round); and the buffer ``whole``, the state.

More than t + d members must name it: at least one of them is then honest, however t collude and whoever is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.units import SiteId
from fedveil.privacy.secagg.interface import SumSpec

NAMED, WHOLE = "named", "whole"  # the field of a message's header, and its buffer
Verify = Callable[[int, str, Any], tuple[SiteId, str]]


def pack(round: int, nonce: str, headers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`check` reads: a round, its nonce, and the signed headers of its members' contributions."""
    return {"round": round, "nonce": nonce, "members": list(headers)}


def check(spec: SumSpec, value: Any, verify: Verify) -> tuple[int, str]:
    """The round, and the one state that its members named, signed: the model after all rounds before it.

    Args:
        value: see :func:`pack`; from the server.
        verify: gives the site and the state of a header of that round and nonce, every field and the signature checked.

    Raises:
        WireError, SecureSumError: another form; a round that is not planned; too few members, one of them twice; a
            header that does not hold; members that name different states, or none.
    """
    if spec.reveal_to != "server":
        raise SecureSumError("a model state as a whole, of a run in which only its sums have names")
    if not isinstance(value, dict) or set(value) != {"round", "nonce", "members"}:
        raise WireError("the members that name a model state are malformed")
    round, nonce, headers = value["round"], value["nonce"], value["members"]
    if type(round) is not int or not isinstance(nonce, str) or not isinstance(headers, list):
        raise WireError("the members that name a model state are malformed")
    spec.check_round(round, nonce)
    if not spec.quorum <= len(headers) <= len(spec.roster.sites):
        raise SecureSumError(f"{len(headers)} members name a model state; {spec.quorum} are needed to believe it")
    said = dict[SiteId, str]()
    for header in headers:
        site, state = verify(round, nonce, header)
        if site in said:
            raise SecureSumError(f"{site!r} is among the members that name a model state twice")
        said[site] = state
    if len(states := set(said.values())) != 1 or "" in states:
        raise SecureSumError(f"the members of round {round} do not all name one model state")
    return round, states.pop()
