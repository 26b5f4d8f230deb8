"""Who takes part: every site signs a statement before round 1. After a restart the same sites take part again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection

from flwr.app import Message

from fedveil.common import canonical, flwr_adapter
from fedveil.common.errors import BudgetExhausted, IdentityError, ProtocolError, RunAborted
from fedveil.common.files import write_durably
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.privacy.joining import at_caps, check_copies, check_join, check_joins, heads_in, left_out
from fedveil.privacy.secagg.interface import ServerSum
from fedveil.server.exchange import Exchange

_LOG = logging.getLogger("fedveil.server")
_KEYED = ("keysum", "sharedkey")
_POLL = 0.05
_LATE_S = 10.0  # for the sites beyond those that a sum needs


def join(exchange: Exchange, server_sum: ServerSum) -> None:
    """Join every site of the roster, or find those that joined before the server stopped. Then begin the sum.

    Raises:
        RunAborted, BudgetExhausted: a site does not take part, or is too late. Nothing was charged yet.
        ProtocolError, IdentityError: a statement is not valid.
    """
    job = exchange.job
    if job.joins:
        check_joins(job.joins, job.session, job.plan.hash, job.roster)
        _reconnect(exchange)
    else:
        _gather(exchange)
    job.progress("joined", {"sites": [m.site for m in job.roster.sites]})
    if job.plan.sum in _KEYED:
        _begin(exchange, server_sum)
    else:
        _leave_out(exchange)


def _begin(exchange: Exchange, server_sum: ServerSum) -> None:
    """Show every site all statements, and pass on what the sites deal to each other."""
    job = exchange.job
    fields = check_joins(job.joins, job.session, job.plan.hash, job.roster)
    packet = Packet({"kind": "begin", "session": job.session, "joins": job.joins})
    ready = exchange.packets(exchange.ask(dict.fromkeys(exchange.nodes, packet), "query.begin"))
    wrapped = {
        s: Packet({"kind": "deal", "session": job.session, "packet": p.header}, p.buffers)
        for s, p in server_sum.begin(fields, ready).items()
    }
    exchange.packets(exchange.ask(wrapped, "query.deal"))
    _leave_out(exchange, [s for s in exchange.nodes if s not in ready])


def _leave_out(exchange: Exchange, refused: Collection[str] = ()) -> None:
    """Ask nothing more of a site that takes part with another ledger than it may: no sum with it would be opened.

    Args:
        refused: who has refused already, and is in the journal for it.
    """
    job = exchange.job
    statements = {SiteId(site): document for site, document in job.joins.items()}
    told = heads_in(statements, job.roster)
    for site, name in at_caps(told):
        _LOG.warning("%s has lost its ledger %s...: it counts that one as having spent its whole cap", site, name[:16])
    named = Counter(said.own.data_set for said in told.values())  # all sites have read the same contract
    for site, error in left_out(told, named.most_common(1)[0][0]).items():
        _LOG.warning("%s takes no part: %s", site, error)
        if site not in refused:
            job.journal.append("site.refused", {"session": job.session, "site": site, "code": error.code})
        exchange.nodes.pop(site, None)


def _gather(exchange: Exchange) -> None:
    """Ask every node that connects, until every site of the roster has signed the plan."""
    job = exchange.job
    header = {
        "kind": "join",
        "session": job.session,
        "plan": job.plan.to_json(),
        "roster_hash": job.roster.hash,
        "contract_hash": job.plan.contract_hash,
    }
    answered: set[int] = set()  # a node that did not answer is asked again when it is back
    deadline = time.monotonic() + job.join_timeout
    while len(job.joins) < job.plan.sites:
        if time.monotonic() > deadline:
            missing = [m.site for m in job.roster.sites if m.site not in job.joins]
            raise RunAborted(
                f"these sites did not join in time: {', '.join(missing)}",
                hint="each site's own log says why; start them, or raise join_timeout in [run] of federation.toml",
            )
        new = [node for node in exchange.grid.get_node_ids() if node not in answered]
        if not new:
            time.sleep(_POLL)
            continue
        messages = [flwr_adapter.request(Packet(header), to=n, action="query.join", round=0) for n in new]
        for reply in exchange.replies(messages, job.join_timeout):
            answered.add(reply.metadata.src_node_id)
            _admit(exchange, reply)
    job.joins = {m.site: job.joins[m.site] for m in job.roster.sites}
    write_durably(job.run / "joins.json", canonical.dumps(job.joins))
    body = {"session": job.session, "joins_digest": canonical.digest(job.joins), "sites": list(job.joins)}
    job.journal.append("run.joined", body)


def _admit(exchange: Exchange, reply: Message) -> None:
    """Take one site's signed statement. A refusal ends the run before it has begun."""
    job, node = exchange.job, reply.metadata.src_node_id
    authenticated = exchange.site_of(node)
    error = flwr_adapter.reply_error(reply)
    if error is not None:
        job.journal.append("join.refused", {"session": job.session, "site": authenticated, "code": error.code})
        kind = BudgetExhausted if isinstance(error, BudgetExhausted) else RunAborted
        raise kind(f"{authenticated or 'a site'} does not take part: {error.message}", hint=error.hint)
    packet = flwr_adapter.from_record(reply.content, Limits()).expect("joined")
    document = packet.header.get("statement")
    payload = document.get("payload") if isinstance(document, dict) else None
    site = payload.get("site") if isinstance(payload, dict) else None
    if not isinstance(site, str):
        raise ProtocolError("a malformed join statement")
    check_join(document, SiteId(site), job.session, job.plan.hash, job.roster)
    check_copies(document, SiteId(site), job.roster)
    if authenticated not in ("", site) or site in job.joins:
        raise IdentityError(f"two sites speak as {site!r}", hint="every site needs its own keys")
    job.joins[site] = document
    exchange.nodes[SiteId(site)] = node


def _reconnect(exchange: Exchange) -> None:
    """After a restart, wait until the sites connect again: all of them, or enough for a sum and then a little longer.

    Enough sites must come within the time to join. A site that never comes back does not delay the others that long.
    """
    job = exchange.job
    expected = {flwr_adapter.node_id(m.site): m.site for m in job.roster.sites}
    deadline, enough = time.monotonic() + job.join_timeout, float("inf")
    there: set[int] = set()
    while len(there) < job.plan.sites:
        there = {n for n in exchange.grid.get_node_ids() if n in expected}
        now = time.monotonic()
        enough = min(enough, now) if len(there) >= job.plan.members else float("inf")
        if now > enough + _LATE_S:
            break
        if now > deadline and len(there) < job.plan.members:
            raise RunAborted(
                f"only {len(there)} of {job.plan.members} needed sites came back",
                hint="start the sites, then 'fedveil server resume'",
            )
        time.sleep(_POLL)
    exchange.nodes.update({s: n for n, s in expected.items()})
