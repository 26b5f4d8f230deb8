"""What binds the participants of a run: the join statements and the secure sum's parameters, from the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedveil.common import canonical, identity
from fedveil.common.errors import FedveilError, ProtocolError
from fedveil.common.identity import Roster
from fedveil.common.journal import Head
from fedveil.common.units import MAX_SITES, SiteId, site_id
from fedveil.common.wire import Limits, Packet, sha256
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.committee import elect
from fedveil.privacy.secagg.interface import SumSpec, is_hex

JOIN = "fedveil/join/1"
MAX_LEDGERS = 4  # of one site that are remembered
_STATEMENT_BYTES = 1280  # the most that a statement measures without its copies, with its place among the others


def sum_spec(plan: PrivacyPlan, session: str, roster: Roster) -> SumSpec:
    """The plan as the secure sum sees it."""
    sites = [m.site for m in roster.sites]
    helpers = elect(sites, plan.committee, bytes.fromhex(plan.committee_seed)) if plan.committee else ()
    return SumSpec(
        protocol=plan.sum, session=session, plan_hash=plan.hash, roster=roster, threshold=plan.threshold,
        min_members=plan.members, length=plan.model.parameters, bound=plan.bound, rounds=plan.steps,
        colluders=plan.colluders, reveal_to=plan.reveal_to, helpers=helpers,
    )  # fmt: skip


def chained(name: str, packet: Packet) -> str:
    """The name of a model after one more blinded sum: SHA-256 (hex) of the name before and the sum's digests."""
    buffers = {k: sha256(v) for k, v in packet.buffers.items()}
    return canonical.digest({"before": name, "header": packet.header, "buffers": buffers})


def check_joins(documents: Any, session: str, plan_hash: str, roster: Roster) -> Mapping[SiteId, dict[str, Any]]:
    """All sites' join fields, after every signature and every hash was checked; nobody may be missing.

    Raises:
        ProtocolError, IdentityError: naming the site whose statement does not hold.
    """
    if not isinstance(documents, dict) or set(documents) != {m.site for m in roster.sites}:
        raise ProtocolError("the join statements are not those of exactly the roster's sites")
    return {m.site: check_join(documents[m.site], m.site, session, plan_hash, roster) for m in roster.sites}


def check_join(document: Any, site: SiteId, session: str, plan_hash: str, roster: Roster) -> dict[str, Any]:
    """The join fields of one site's statement, after its signature, its hashes and the form of its heads were checked.

    Raises:
        ProtocolError, IdentityError: the statement does not hold, or is larger than its site's room in the message that
            shows all statements to every site.
    """
    member, room = roster.member(site), _STATEMENT_BYTES + share(len(roster.sites))
    if (size := len(canonical.dumps(document))) > room:
        raise ProtocolError(f"the join statement of {site!r} measures {size} bytes; the limit is {room}")
    payload = identity.opened(document, JOIN, member.signing_key, what=f"the join statement of {site!r}")
    wanted = {"v": 1, "session": session, "site": site, "plan_hash": plan_hash, "roster_hash": roster.hash}
    if not isinstance(payload, dict) or any(payload.get(k) != v for k, v in wanted.items()):
        raise ProtocolError(f"{site!r} signed another plan, roster or session")
    fields = payload.get("fields")
    if not isinstance(fields, dict):
        raise ProtocolError(f"the join statement of {site!r} is malformed")
    try:
        heads_in({site: document})
    except FedveilError as e:
        raise ProtocolError(f"the join statement of {site!r}: {e.message}") from e
    return fields


class Copy(NamedTuple):
    """The head of one site's journal, and the hash of that journal's first row: a site may own several ledgers."""

    head: Head
    ledger: str


def share(sites: int) -> int:
    """How many bytes of copies each of so many statements may carry.

    The message that begins a run holds all of them, and every site gets it. Together they take three quarters of the
    largest header (:class:`~fedveil.common.wire.Limits`). From about 70 sites with four ledgers each, not all copies
    fit. From about 2400 sites, none fits.
    """
    return max(0, Limits.header * 3 // 4 // max(sites, 1) - _STATEMENT_BYTES)


def carried(heads: Mapping[SiteId, Mapping[str, Copy]], order: Iterable[SiteId], budget: int) -> dict[SiteId, Any]:
    """What of ``heads`` fits into ``budget`` bytes of canonical JSON, in the form that :func:`heads_of` reads.

    The newest ledger of each site in ``order``, then the second newest of each, and so on, up to the first that does
    not fit.

    Args:
        heads: by site and ledger. The one that moved last stands last.
    """
    out: dict[SiteId, list[list[int | str]]] = {}
    order = list(order)
    for rank in range(1, MAX_LEDGERS + 1):
        for site in order:
            copies = list(heads[site].values())
            if len(copies) < rank:
                continue
            entry = [*copies[-rank].head, copies[-rank].ledger]
            budget -= len(canonical.dumps(entry)) + 1 + (len(site) + 6 if rank == 1 else 0)  # "site":[...],
            if budget < 0:
                return out
            out.setdefault(site, []).insert(0, entry)
    return out


def heads_of(value: Any) -> dict[SiteId, dict[str, Copy]]:
    """Parse ``{site: [[rows, hash, ledger], ...]}`` into copies by site and ledger, in the order in which they stand.

    One ``[rows, hash, ledger]`` instead of a list is the older form, in which one ledger of a site was remembered.

    Raises:
        ProtocolError: anything else, more than :data:`MAX_LEDGERS` of one site, or one ledger twice.
    """
    if not isinstance(value, dict) or len(value) > MAX_SITES:
        raise ProtocolError("journal heads are malformed")
    return {site_id(site): _copies(entries) for site, entries in value.items()}


def heads_in(documents: Mapping[SiteId, Any]) -> dict[SiteId, tuple[Copy, dict[SiteId, Copy]]]:
    """Per site, its own journal head and its copies of the others', from statements that were checked already.

    Of the several ledgers that a site may own, the copies are those of the one that it takes part with here.
    """
    payloads = {site: document["payload"] for site, document in documents.items()}
    own = {
        s: _copy([*p["head"], p.get("ledger")] if isinstance(p.get("head"), list) else None)
        for s, p in payloads.items()
    }
    held = {s: heads_of(p.get("peers", {})) for s, p in payloads.items()}
    return {
        s: (own[s], {o: by[own[o].ledger] for o, by in held[s].items() if o in own and own[o].ledger in by})
        for s in payloads
    }


def _copies(entries: Any) -> dict[str, Copy]:
    if isinstance(entries, list) and entries and type(entries[0]) is int:
        entries = [entries]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_LEDGERS:
        raise ProtocolError("journal heads are malformed")
    copies = [_copy(entry) for entry in entries]
    by = {copy.ledger: copy for copy in copies}
    if len(by) != len(copies):
        raise ProtocolError("journal heads are malformed: one ledger twice")
    return by


def _copy(value: Any) -> Copy:
    ok = isinstance(value, list) and len(value) == 3 and type(value[0]) is int
    if not ok or value[0] < 0 or not all(is_hex(v, 64) for v in value[1:]):
        raise ProtocolError("a journal head is malformed")
    return Copy(Head(value[0], value[1]), value[2])
