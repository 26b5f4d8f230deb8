"""A Flower Strategy around the secure sum: it moves messages between a Grid and :mod:`fedveil.server.rounds`.

No privacy arithmetic of its own: the plan fixes it, the sites enforce it, the optimiser post-processes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedveil.common import canonical, flwr_adapter
from fedveil.common.errors import (
    BudgetExhausted,
    FedveilError,
    IdentityError,
    ProtocolError,
    RunAborted,
    SecureSumError,
)
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.privacy.dp.accounting import epsilon_pld
from fedveil.privacy.joining import check_join, check_joins, sum_spec
from fedveil.privacy.secagg.conduct import Conduct
from fedveil.privacy.secagg.interface import ServerSum
from fedveil.privacy.secagg.server import server_sum
from fedveil.server import delivered, statistics
from fedveil.server.blinded import BlindedSums, blinded_sums
from fedveil.server.job import ABORTED, COMPLETED, EXHAUSTED, Job, write_durably
from fedveil.server.rounds import Round

MAX_CONSECUTIVE_ABORTS = 3
MIN_ABORTS = 3
_KEYED = ("keysum", "sharedkey")
_POLL = 0.05
_LOG = logging.getLogger("fedveil.server")


class SecureSumStrategy(Strategy):
    """Runs the plan of one :class:`~fedveil.server.job.Job` over any Grid.

    Attributes:
        status: how the run ended: COMPLETED, BUDGET_EXHAUSTED or ABORTED.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, job.plan
        self.status = COMPLETED
        self._nodes: dict[SiteId, int] = {}
        self._exhausted: set[SiteId] = set()
        # A quarter of the planned rounds may be lost; helpers with two wrong answers are not asked again.
        self._conduct = Conduct(max(MIN_ABORTS, job.plan.steps // 4))
        self._counted = (0, 0)
        self._sum: ServerSum = server_sum(sum_spec(job.plan, job.session, job.roster))
        self._blinded = blinded_sums(job) if job.plan.reveal_to == "sites" else None
        self._round: Round | None = None
        self._grid: Grid | None = None

    def summary(self) -> None:
        """Log what is about to run."""
        p = self.plan
        _LOG.info("mode %s, sum %s, %d sites, %d steps", p.mode, p.sum, p.sites, p.steps)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Join, run every planned round from where the job stands, end the session at every site.

        Flower's arguments besides ``grid`` are ignored: weights, rounds and time limits are the job's.

        Raises:
            RunAborted, BudgetExhausted: the run could not begin. An ending after round 1 is a ``status``.
        """
        self._grid = grid
        self.summary()
        self._join(grid)
        result = Result()
        config = ConfigRecord()
        aborts = 0
        done = sum(1 for _ in self.job.journal.of_kind("round.applied"))
        for number in range(self.job.first_round, self.plan.steps + 1):
            started = time.monotonic()
            replies = self._send(self.configure_train(number, self._arrays(), config, grid), self.job.round_timeout)
            arrays, metrics = self.aggregate_train(number, replies)
            aborts = 0 if arrays is not None else aborts + 1
            done += arrays is not None
            self._record(number, metrics, time.monotonic() - started)
            if self.plan.sites - len(self._exhausted) < self.plan.members:
                self.status = EXHAUSTED
                break
            if aborts >= MAX_CONSECUTIVE_ABORTS or not self._bearable(number, aborted=arrays is None):
                self.status = ABORTED
                break
        self._finish(done)
        result.arrays = self._arrays()
        return result

    @property
    def _name(self) -> str:
        """The model's name in journals: the hash of its weights, or of the sums it came from if the server has none."""
        return self.job.state.hash if self._blinded is None else self._blinded.name

    def _metrics(self) -> dict[str, float]:
        """Public test metrics; none of a model that only the sites know."""
        if self.job.evaluate is None or self._blinded is not None:
            return {}
        return self.job.evaluate(self.job.state.weights)

    def _share(self, blinded: BlindedSums) -> None:
        """Bring every site's own model up to date."""
        blinded.share(self._nodes, lambda packets: self._packets(self._ask(packets, "query.apply", 0)))

    def _bearable(self, number: int, *, aborted: bool) -> bool:
        """Book the round; False once more rounds were lost than a run bears."""
        if not aborted:
            self._conduct.opened(number, self._sum.suspects)
            return True
        try:
            self._conduct.aborted(number)
        except SecureSumError as e:
            _LOG.error("%s", e)
            return False
        return True

    # --- Flower's hooks -------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round on the journal (its nonce first) and ask every joined site to contribute."""
        job = self.job
        sent = {"weights": arrays["weights"].data, **job.attached}
        if self._blinded is not None:
            self._share(self._blinded)
            sent = {}
        nonce, job.nonce = job.nonce, ""
        if not nonce:
            nonce = secrets.token_hex(16)
            job.journal.append(
                "round.open",
                {"session": job.session, "round": server_round, "nonce": nonce, "model_hash": self._name},
            )
        self._round = Round(self.plan, self._sum, server_round, nonce)
        header = {
            "kind": "contribute",
            "session": job.session,
            "round": server_round,
            "nonce": nonce,
            "plan_hash": self.plan.hash,
            "model_hash": self._name,
        }
        packet = Packet(header, sent)
        return self._messages(dict.fromkeys(self._nodes, packet), "train.contribute", server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Collect, agree, open, apply; an aborted round is journalled and gives ``(None, None)``."""
        job, current = self.job, self._round
        if current is None:
            raise ProtocolError("a round must be configured before it is aggregated")
        try:
            self._take(replies, current.collect, current)
            agreements = current.close()
            members = current.members
            job.journal.append("round.set", {"session": job.session, "round": server_round, "members": list(members)})
            self._take(self._help(agreements, "train.agree", server_round), current.agree, current)
            self._take(self._help(current.ask(), "train.open", server_round), current.answer, current)
            if self._blinded is not None:
                self._blinded.add(server_round, current.blinded())
            else:
                job.state = job.state.step(self.plan, current.result())
        except RunAborted as e:
            _LOG.warning("%s", e)
            self._note_refusals(current)
            job.journal.append("round.aborted", {"session": job.session, "round": server_round, "reason": e.message})
            job.progress("aborted", {"round": server_round, "reason": e.message})
            return None, None
        self._note_refusals(current)
        job.journal.append(
            "round.applied",
            {
                "session": job.session,
                "round": server_round,
                "members": list(members),
                "noise_multiplier": self.plan.realised_noise_multiplier(len(members)),
                "model_hash": self._name,
                "checkpoint": job.checkpoint(),
            },
        )
        metrics = self._metrics()
        return self._arrays(), MetricRecord({"members": len(members), **metrics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: metrics on private rows are releases and would have to be charged."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing: see :meth:`configure_evaluate`."""
        return None

    # --- joining and ending ---------------------------------------------------------------------------------

    def _join(self, grid: Grid) -> None:
        job = self.job
        if job.joins:
            check_joins(job.joins, job.session, self.plan.hash, job.roster)
            self._reconnect(grid)
        else:
            self._gather(grid)
        job.progress("joined", {"sites": [m.site for m in job.roster.sites]})
        if self.plan.sum not in _KEYED:
            return
        fields = check_joins(job.joins, job.session, self.plan.hash, job.roster)
        packet = Packet({"kind": "begin", "session": job.session, "joins": job.joins})
        ready = self._packets(self._ask(dict.fromkeys(self._nodes, packet), "query.begin", 0))
        deals = self._sum.begin(fields, ready)
        if deals:
            wrapped = {
                s: Packet({"kind": "deal", "session": job.session, "packet": p.header}, p.buffers)
                for s, p in deals.items()
            }
            self._packets(self._ask(wrapped, "query.deal", 0))

    def _gather(self, grid: Grid) -> None:
        """Ask every node that connects, until every site of the roster has signed the plan."""
        job = self.job
        header = {
            "kind": "join",
            "session": job.session,
            "plan": self.plan.to_json(),
            "roster_hash": job.roster.hash,
            "contract_hash": self.plan.contract_hash,
        }
        answered: set[int] = set()  # who was asked and did not answer is asked again when it is there again
        deadline = time.monotonic() + job.join_timeout
        while len(job.joins) < self.plan.sites:
            if time.monotonic() > deadline:
                missing = [m.site for m in job.roster.sites if m.site not in job.joins]
                raise RunAborted(f"these sites did not join in time: {', '.join(missing)}")
            new = [node for node in grid.get_node_ids() if node not in answered]
            if not new:
                time.sleep(_POLL)
                continue
            messages = [flwr_adapter.request(Packet(header), to=n, action="query.join", round=0) for n in new]
            for reply in self._send(messages, job.join_timeout):
                answered.add(reply.metadata.src_node_id)
                self._admit(grid, reply)
        job.joins = {m.site: job.joins[m.site] for m in job.roster.sites}
        write_durably(job.run / "joins.json", canonical.dumps(job.joins))
        body = {"session": job.session, "joins_digest": canonical.digest(job.joins), "sites": list(job.joins)}
        job.journal.append("run.joined", body)

    def _admit(self, grid: Grid, reply: Message) -> None:
        """Take one site's signed statement; a refusal ends the run before it began."""
        node = reply.metadata.src_node_id
        error = flwr_adapter.reply_error(reply)
        if error is not None:
            who = _site_of(grid, node)
            self.job.journal.append("join.refused", {"session": self.job.session, "site": who, "code": error.code})
            kind = BudgetExhausted if isinstance(error, BudgetExhausted) else RunAborted
            raise kind(f"{who or 'a site'} does not take part: {error.message}", hint=error.hint)
        packet = flwr_adapter.from_record(reply.content, Limits()).expect("joined")
        document = packet.header.get("statement")
        payload = document.get("payload") if isinstance(document, dict) else None
        site = payload.get("site") if isinstance(payload, dict) else None
        if not isinstance(site, str):
            raise ProtocolError("a malformed join statement")
        check_join(document, SiteId(site), self.job.session, self.plan.hash, self.job.roster)
        authenticated = _site_of(grid, node)
        if authenticated not in ("", site) or site in self.job.joins:
            raise IdentityError(f"two sites speak as {site!r}", hint="every site needs its own keys")
        self.job.joins[site] = document
        self._nodes[SiteId(site)] = node

    def _reconnect(self, grid: Grid) -> None:
        """After a restart: wait for the sites to dial in again, all of them or as many as a sum needs."""
        expected = {flwr_adapter.node_id(m.site): m.site for m in self.job.roster.sites}
        deadline = time.monotonic() + self.job.join_timeout
        while len(self._nodes) < self.plan.sites:
            self._nodes = {expected[n]: n for n in grid.get_node_ids() if n in expected}
            if time.monotonic() > deadline:
                if len(self._nodes) >= self.plan.members:
                    break
                raise RunAborted(f"only {len(self._nodes)} of {self.plan.members} needed sites came back")
            time.sleep(_POLL)
        self._nodes = {s: n for n, s in expected.items()}

    def _finish(self, done: int) -> None:
        """Collect every site's ledger, verify its chain, and close the journal of the run."""
        job = self.job
        if self._blinded is not None:
            self._share(self._blinded)
        header = {
            "kind": "finish",
            "session": job.session,
            "status": self.status,
            "round": done,
            "model_hash": self._name,
        }
        replies = self._packets(self._ask(dict.fromkeys(self._nodes, Packet(header)), "query.finish", 0))
        heads = delivered.keep(job, {site: p.buffers.get("journal", b"") for site, p in replies.items()})
        metrics = self._metrics()
        if self._blinded is None:
            write_durably(job.run / "model.f32", job.state.sent())
        statistics.publish(job)
        body = {
            "session": job.session,
            "status": self.status,
            "steps_done": done,
            "model_hash": self._name,
            "heads": heads,
            "metrics": metrics,
        }
        job.journal.append("run.end", body)
        job.journal.close()
        job.progress("end", {"status": self.status, "steps": done, "metrics": metrics})

    # --- messages -------------------------------------------------------------------------------------------

    def _arrays(self) -> ArrayRecord:
        data = self.job.state.sent()
        return ArrayRecord({"weights": Array("float32", (len(data) // 4,), "fedveil.raw.1", data)})

    def _messages(self, packets: Mapping[SiteId, Packet], action: str, round_: int) -> list[Message]:
        """Requests to the sites that have a node; a packet that goes to many is turned into a record once."""
        records = {id(p): flwr_adapter.to_record(p) for p in {id(p): p for p in packets.values()}.values()}
        return [
            flwr_adapter.request(records[id(p)], to=self._nodes[s], action=action, round=round_)
            for s, p in packets.items()
            if s in self._nodes
        ]

    def _send(self, messages: Iterable[Message], timeout: float) -> list[Message]:
        if self._grid is None:
            raise ProtocolError("the strategy was not started")
        messages = list(messages)
        return list(self._grid.send_and_receive(messages, timeout=timeout)) if messages else []

    def _ask(self, packets: Mapping[SiteId, Packet], action: str, round_: int) -> list[Message]:
        return self._send(self._messages(packets, action, round_), self.job.round_timeout)

    def _help(self, packets: Mapping[SiteId, Packet], action: str, round_: int) -> list[Message]:
        """Ask the helpers that were not set aside for wrong answers."""
        aside = set(self._conduct.set_aside)
        return self._ask({s: p for s, p in packets.items() if s not in aside}, action, round_)

    def _sites(self) -> dict[int, SiteId]:
        return {n: s for s, n in self._nodes.items()}

    def _take(self, replies: Iterable[Message], step: Any, current: Round) -> None:
        """Give every reply to ``step``; an error is counted against its site in this round."""
        sites = self._sites()
        for reply in replies:
            site = sites[reply.metadata.src_node_id]
            error = flwr_adapter.reply_error(reply)
            if error is not None:
                current.refuse(site, error)
                continue
            try:
                packet = flwr_adapter.from_record(reply.content, Limits())
            except FedveilError as e:
                current.refuse(site, e)
                continue
            step(site, packet)

    def _packets(self, replies: Iterable[Message]) -> dict[SiteId, Packet]:
        """The answers that are no errors; errors are logged and journalled."""
        out: dict[SiteId, Packet] = {}
        sites = self._sites()
        for reply in replies:
            site = sites[reply.metadata.src_node_id]
            try:
                if (error := flwr_adapter.reply_error(reply)) is not None:
                    raise error
                out[site] = flwr_adapter.from_record(reply.content, Limits())
            except FedveilError as e:
                self.job.journal.append("site.refused", {"session": self.job.session, "site": site, "code": e.code})
                _LOG.warning("%s: %s", site, e)
        return out

    def _note_refusals(self, current: Round) -> None:
        for site, error in current.refusals.items():
            if isinstance(error, BudgetExhausted):
                self._exhausted.add(site)
            body = {"session": self.job.session, "round": current.number, "site": site, "code": error.code}
            self.job.journal.append("site.refused", body)
            _LOG.warning("round %d, %s: %s", current.number, site, error)

    def _record(self, number: int, metrics: MetricRecord | None, seconds: float) -> None:
        traffic = getattr(self._grid, "traffic", {})
        sent, received = (sum(t[k] for t in traffic.values()) for k in ("sent", "received"))
        facts = dict(metrics or {})
        line = {
            "round": number,
            "epsilon": epsilon_pld([(self.plan.event, number)], self.plan.delta),
            "members": facts.pop("members", 0),
            "metrics": facts,
            "bytes_sent": sent - self._counted[0],
            "bytes_received": received - self._counted[1],
            "seconds": round(seconds, 6),
        }
        self._counted = (sent, received)
        self.job.metrics(line)
        self.job.progress("round", line)


def _site_of(grid: Grid, node: int) -> str:
    """The site that the transport authenticated behind a node; empty where the transport authenticates nobody."""
    find = getattr(grid, "site_of", None)
    return str(find(node)) if find is not None else ""
