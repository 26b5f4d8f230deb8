"""What binds the participants of a run: the join statements and the secure sum's parameters, from the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from fedveil.common import canonical, identity
from fedveil.common.errors import FedveilError, FreshLedger, IdentityError, ProtocolError
from fedveil.common.identity import Member, Roster
from fedveil.common.journal import MAX_ROWS, Copy
from fedveil.common.units import MAX_SITES, SiteId, site_id
from fedveil.common.wire import Limits, Packet, sha256
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.committee import elect
from fedveil.privacy.secagg.interface import SumSpec, is_hex

JOIN = "fedveil/join/1"
MAX_LEDGERS = 4  # of one site that are remembered
MAX_IMPORTS = 8  # ledgers that a site's statement names as counted in its own
_MAX_SPECS = 64
_specs: dict[tuple[str, str, str], SumSpec] = {}  # by the hashes of plan and roster, and the session
_STATEMENT_BYTES = 2176  # the most that a statement measures without its copies, with its place among the others


@lru_cache(maxsize=64)
def data_set(name: str, unit: str) -> str:
    """What a ledger and the copies of its heads call a data set: SHA-256 (hex) of the contract's name and the unit.

    A site has one ledger for it. Another version of a contract keeps its name, and so its ledger. Charges of different
    units (records, clients) cannot be added up, so each unit has a ledger of its own.
    """
    return canonical.digest({"data_set": name, "unit": unit})


def names_of(members: Iterable[str]) -> str:
    """A set of sites by hash: SHA-256 (hex) of their names."""
    return canonical.digest(sorted(members))


def sum_spec(plan: PrivacyPlan, session: str, roster: Roster) -> SumSpec:
    """The plan as the secure sum sees it. One object for all virtual sites of a process."""
    key = (plan.hash, session, roster.hash)
    spec = _specs.get(key)
    if spec is None:
        if len(_specs) >= _MAX_SPECS:
            _specs.clear()
        spec = _specs[key] = _sum_spec(plan, session, roster)
    return spec


def _sum_spec(plan: PrivacyPlan, session: str, roster: Roster) -> SumSpec:
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

    What it says of the other sites' journals is not looked at here, beside its form: see :func:`check_copies`.

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
        _told(payload, member)
    except FedveilError as e:
        raise ProtocolError(f"the join statement of {site!r}: {e.message}") from e
    return fields


def check_copies(document: Any, site: SiteId, roster: Roster) -> None:
    """Raise :class:`ProtocolError` if a statement that was checked carries a copy that its owner has not signed.

    An honest site passes on nothing else. The server, which takes statements in, refuses one for it. The sites, which
    get all statements at once, leave such copies out: nobody makes another site refuse with what he made up.
    """
    for owner, copies in heads_of(document["payload"].get("peers", {})).items():
        for copy in copies.values():
            if not genuine(owner, copy, roster):
                raise ProtocolError(
                    f"the join statement of {site!r} is malformed: its copy of a journal head of {owner!r} is not "
                    f"signed by {owner!r}",
                    hint=f"{site!r} runs another program, or keeps a peers.json that was edited: it is not let in",
                )


class Told(NamedTuple):
    """What one site's signed statement says of journals.

    Attributes:
        own: where its own journal stands; signed.
        imports: ledgers whose spending its own ledger counts, and up to how many rows of each.
        copies: heads of the others' journals that it passes on, by site and ledger; each signed by its owner.
    """

    own: Copy
    imports: Mapping[str, int]
    copies: Mapping[SiteId, Mapping[str, Copy]]

    def ignores(self, known: Iterable[Copy]) -> Copy | None:
        """A ledger among the ``known`` ones of this site that counted the same data set, and now is counted nowhere.

        It is another ledger than the one that the site takes part with, which has not imported it, or not all of it.
        """
        for copy in known:
            other = copy.data_set == self.own.data_set and copy.ledger != self.own.ledger
            if other and self.imports.get(copy.ledger, -1) < copy.head.rows:
                return copy
        return None


def share(sites: int) -> int:
    """How many bytes of copies each of so many statements may carry.

    The message that begins a run holds all of them, and every site gets it. Together they take three quarters of the
    largest header (:class:`~fedveil.common.wire.Limits`). From about 45 sites with four ledgers each, not all copies
    fit. From about 1400 sites, none fits.
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
            entry = copies[-rank].to_json()
            budget -= len(canonical.dumps(entry)) + 1 + (len(site) + 6 if rank == 1 else 0)  # "site":[...],
            if budget < 0:
                return out
            out.setdefault(site, []).insert(0, entry)
    return out


def heads_of(value: Any) -> dict[SiteId, dict[str, Copy]]:
    """Parse ``{site: [[rows, hash, ledger, data set, signature], ...]}`` into copies by site and ledger, in that order.

    ``[rows, hash, ledger]`` is the older form, without a signature; and one such entry instead of a list is the oldest,
    in which one ledger of a site was remembered. No signature is checked.

    Raises:
        ProtocolError: anything else, more than :data:`MAX_LEDGERS` of one site, or one ledger twice.
    """
    if not isinstance(value, dict) or len(value) > MAX_SITES:
        raise ProtocolError("journal heads are malformed")
    return {site_id(site): _copies(entries) for site, entries in value.items()}


def heads_in(documents: Mapping[SiteId, Any], roster: Roster) -> dict[SiteId, Told]:
    """What the statements say of journals, from statements that were checked already (:func:`check_joins`).

    Copies that their owner has not signed are left out: they are hearsay.
    """
    found = {site: _told(document["payload"], roster.member(site)) for site, document in documents.items()}
    return {
        site: t._replace(
            copies={
                owner: {name: copy for name, copy in by.items() if genuine(owner, copy, roster)}
                for owner, by in t.copies.items()
            }
        )
        for site, t in found.items()
    }


def seen_of(told: Mapping[SiteId, Told], site: SiteId) -> list[tuple[SiteId, Copy]]:
    """Every signed copy of a head of ``site``'s journals in the statements of the others, and who passed it on."""
    return [(s, copy) for s, t in told.items() if s != site for copy in t.copies.get(site, {}).values()]


def left_out(
    told: Mapping[SiteId, Told], data_set: str, memory: Callable[[SiteId], Iterable[Copy]] = lambda _: ()
) -> dict[SiteId, FreshLedger]:
    """The sites that may not take part with the ledger that they joined with, each with the refusal.

    It is of another data set than the run's; or it is a fresh one, and a copy that the site itself has signed shows
    another ledger of this data set, whose spending it does not count.

    Args:
        data_set: the run's, as :func:`data_set` gives it.
        memory: gives what is known of a site's ledgers beside what the statements show.
    """
    out: dict[SiteId, FreshLedger] = {}
    seen: dict[SiteId, list[Copy]] = {}
    for witness, said in told.items():
        for site, by in said.copies.items():
            if site != witness:
                seen.setdefault(site, []).extend(by.values())
    for site, said in told.items():
        if said.own.data_set != data_set:
            out[site] = FreshLedger(
                f"{site!r} takes part with the ledger of another data set than the contract's",
                hint="one ledger for each data set, which the contract names",
            )
        elif known := said.ignores([*seen.get(site, ()), *memory(site)]):
            out[site] = fresh(site, known)
    return out


def fresh(site: SiteId, known: Copy) -> FreshLedger:
    """The refusal of a site whose ledger does not count the ``known`` one."""
    return FreshLedger(
        f"{site!r} takes part with a ledger that does not count what was spent on this data set from its ledger "
        f"{known.ledger[:16]}..., of which {known.head.rows} rows were seen",
        hint="restore that ledger (the folder of its last run holds a copy, journals/SITE.jsonl), or count it in a new "
        "one: 'fedveil ledger import', with --lost if it is lost for good",
    )


def at_caps(told: Mapping[SiteId, Told]) -> list[tuple[SiteId, str]]:
    """The lost ledgers that sites count as having spent their whole caps: each with its site."""
    return [(site, name) for site, t in told.items() for name, rows in t.imports.items() if rows == MAX_ROWS]


def genuine(owner: SiteId, copy: Copy, roster: Roster) -> bool:
    """Whether ``copy`` is the word of a member of the roster, under the key that the roster names."""
    try:
        return copy.signed_by(owner, roster.member(owner).signing_key)
    except IdentityError:  # no longer on the roster
        return False


def _told(payload: Mapping[str, Any], member: Member) -> Told:
    head, imports = payload.get("head"), payload.get("imports")
    if not isinstance(head, list) or len(head) != 2:
        raise ProtocolError("a journal head is malformed")
    own = Copy.from_json([*head, payload.get("ledger"), payload.get("data_set"), payload.get("head_signature")])
    if not own.signed_by(member.site, member.signing_key):
        raise ProtocolError("its own journal head is not signed")
    if not isinstance(imports, list) or len(imports) > MAX_IMPORTS:
        raise ProtocolError("the imported ledgers are malformed")
    for entry in imports:
        ok = isinstance(entry, list) and len(entry) == 2 and is_hex(entry[0], 64) and type(entry[1]) is int
        if not ok or not 0 <= entry[1] <= MAX_ROWS:
            raise ProtocolError("the imported ledgers are malformed")
    return Told(own, dict(imports), heads_of(payload.get("peers", {})))


def _copies(entries: Any) -> dict[str, Copy]:
    if isinstance(entries, list) and entries and type(entries[0]) is int:
        entries = [entries]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_LEDGERS:
        raise ProtocolError("journal heads are malformed")
    copies = [Copy.from_json(entry) for entry in entries]
    by = {copy.ledger: copy for copy in copies}
    if len(by) != len(copies):
        raise ProtocolError("journal heads are malformed: one ledger twice")
    return by
