"""A Flower Strategy around the secure sum: it moves messages between a Grid and :mod:`fedveil.server.rounds`.

It has no privacy arithmetic of its own. The plan fixes privacy, the sites enforce it, and the optimiser post-processes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedveil.common.errors import BudgetExhausted, ProtocolError, RunAborted, SecureSumError, StateMismatch
from fedveil.common.files import write_durably
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.dp.accounting import epsilon_pld
from fedveil.privacy.joining import sum_spec
from fedveil.privacy.report.history import End
from fedveil.privacy.report.progress import priced
from fedveil.privacy.secagg.interface import ServerSum
from fedveil.privacy.secagg.kept import FOLDER as CIPHERTEXTS
from fedveil.privacy.secagg.round_outcomes import Conduct
from fedveil.privacy.secagg.server import server_sum
from fedveil.server import admission, ledger_handover, report_signatures, statistics
from fedveil.server.early_stop import EarlyStop
from fedveil.server.exchange import Exchange
from fedveil.server.job import ABORTED, COMPLETED, EXHAUSTED, STOPPED, Job
from fedveil.server.opened_sums import opened_sums
from fedveil.server.rounds import Round

MAX_CONSECUTIVE_ABORTS = 3
MIN_ABORTS = 3
_LOG = logging.getLogger("fedveil.server")


class SecureSumStrategy(Strategy):
    """Runs the plan of one :class:`~fedveil.server.job.Job` over any Grid.

    Args:
        site_wait: seconds to wait, before a round is opened (and charged), until as many sites are connected as a sum
            needs. If they do not come, the run is ABORTED. None: the job's ``join_timeout``.

    Attributes:
        status: how the run ended: COMPLETED, STOPPED_EARLY, BUDGET_EXHAUSTED or ABORTED.
    """

    def __init__(self, job: Job, *, site_wait: float | None = None) -> None:
        self.job, self.plan = job, job.plan
        self.status = COMPLETED
        self._site_wait = job.join_timeout if site_wait is None else site_wait
        self._exhausted: set[SiteId] = set()
        # A quarter of the planned rounds may be lost. Helpers that gave two wrong answers are not asked again, nor are
        # members that twice did not vouch for a sum.
        self._conduct = Conduct(max(MIN_ABORTS, job.plan.steps // 4))
        self._consecutive, self._bearable = 0, True
        self._counted = (0, 0)
        keep = job.run / CIPHERTEXTS if job.keep_ciphertexts else None
        self._sum: ServerSum = server_sum(sum_spec(job.plan, job.session, job.roster), keep)
        self._opened = opened_sums(job)
        self._round: Round | None = None
        self._linked: Exchange | None = None
        self._early = EarlyStop(
            job.patience, job.stop_metric, job.run / "metrics.jsonl",
            classes=job.plan.network.classes if job.plan.task == "train" else 0,
            stopped=any(True for _ in job.journal.of_kind("run.stopped")),
        )  # fmt: skip

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
        self._linked = exchange = Exchange(self.job, grid)
        self.summary()
        admission.join(exchange, self._sum)
        self._remember()
        result = Result()
        config = ConfigRecord()
        for number in range(self.job.first_round, self.plan.steps + 1):
            if self.job.stopped:
                self.status = ABORTED
            if self.job.stopped or self._over() or not self._enough_sites(number):
                break
            started = time.monotonic()
            if exchange.together is None:
                messages = self.configure_train(number, self._arrays(), config, grid)
                replies = exchange.replies(messages, self.job.round_timeout)
                opened, metrics = self.aggregate_train(number, replies)
            else:
                given = exchange.together(self._ask_for(number))
                opened, metrics = self._aggregated(number, partial(Round.collect_together, given=given))
            self._book(number, opened=opened is not None)
            self._record(number, metrics, time.monotonic() - started)
        self._over()
        self._finish()
        result.arrays = self._arrays()
        return result

    def _remember(self) -> None:
        """Read from the journal of a run that goes on which sites' budgets are spent and which rounds were lost."""
        for row in self.job.journal.of_kind("site.refused", "round.applied", "round.aborted"):
            if row.kind != "site.refused":
                self._book(int(row.body["round"]), opened=row.kind == "round.applied")
            elif row.body["code"] == BudgetExhausted.__name__:
                self._exhausted.add(SiteId(row.body["site"]))

    def _book(self, number: int, *, opened: bool) -> None:
        """Count a round that is over."""
        if opened:
            self._consecutive = 0
            self._conduct.opened(number, self._sum.suspects)
            return
        self._consecutive += 1
        try:
            self._conduct.aborted(number, self._sum.unvouched)
        except SecureSumError as e:
            _LOG.error("%s", e)
            self._bearable = False

    def _over(self) -> bool:
        """Whether no further round may be opened; ``status`` says why."""
        if self.plan.sites - len(self._exhausted) < self.plan.members:
            self.status = EXHAUSTED
        elif self.plan.sites - len(self._exhausted | set(self._conduct.left_out)) < self.plan.members:
            self.status = ABORTED  # too few are still asked to contribute
        elif self._consecutive >= MAX_CONSECUTIVE_ABORTS or not self._bearable:
            self.status = ABORTED
        elif self._early.due:
            if self.status != STOPPED and not any(True for _ in self.job.journal.of_kind("run.stopped")):
                # Before any site is told: after a restart the run ends in the same way.
                self.job.journal.append("run.stopped", {"session": self.job.session})
            self.status = STOPPED
        return self.status != COMPLETED

    def _enough_sites(self, number: int) -> bool:
        """Wait until a sum's members are connected. A round that cannot open its sum would be charged for nothing."""
        needed = self.plan.members
        there = self._exchange.wait_for_sites(needed, 0)
        if there < needed:
            _LOG.warning("round %d waits for sites: %d of %d are connected", number, there, needed)
            there = self._exchange.wait_for_sites(needed, self._site_wait)
        if there < needed:
            _LOG.error("round %d is not opened: %d of the %d needed sites are connected", number, there, needed)
            self.status = ABORTED
        return there >= needed

    @property
    def _exchange(self) -> Exchange:
        if self._linked is None:
            raise ProtocolError("the strategy was not started")
        return self._linked

    @property
    def _name(self) -> str:
        """The model's name in journals: the hash of its weights. If the server has none: of the sums it came from."""
        return self.job.state.hash if self.plan.reveal_to == "server" else self._opened.state

    def _metrics(self) -> dict[str, float]:
        """Public test metrics. There are none for a model that only the sites know."""
        if self.job.evaluate is None or self.plan.reveal_to == "sites":
            return {}
        return self.job.evaluate(self.job.state.result)

    def _catch_up(self) -> None:
        """Bring the sites up to date whose models lack more sums than one message brings."""
        link = self._exchange
        self._opened.share(link.nodes, lambda packets: link.packets(link.ask(packets, "query.apply")))

    # --- Flower's hooks -------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write the round's opening into the journal (its nonce first) and ask the joined sites to contribute.

        Sites that repeatedly did not vouch for a sum are not asked.
        """
        return self._exchange.messages(self._ask_for(server_round), "train.contribute", server_round)

    def _ask_for(self, server_round: int) -> dict[SiteId, Packet]:
        """Open a round; what every joined site that is not left out is asked."""
        job = self.job
        self._catch_up()
        nonce, job.nonce = job.nonce, ""
        if not nonce:
            nonce = secrets.token_hex(16)
            job.journal.append(
                "round.open",
                {
                    "session": job.session,
                    "round": server_round,
                    "nonce": nonce,
                    "model_hash": self._name,
                    "state": self._opened.state,
                },
            )
        self._round = Round(self.plan, self._sum, server_round, nonce, self._opened.state)
        header = {
            "kind": "contribute",
            "session": job.session,
            "round": server_round,
            "nonce": nonce,
            "plan_hash": self.plan.hash,
        }
        left_out = set(self._conduct.left_out)
        asked = [site for site in self._exchange.nodes if site not in left_out]
        return self._opened.packets(asked, header, job.attached)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Collect, agree, open, verify, apply. An aborted round is written into the journal and gives ``(None, None)``.

        Each reply is checked and added when ``replies`` gives it, and freed before the next one is asked for.
        """
        return self._aggregated(server_round, lambda r: self._exchange.each(replies, r.collect, r.refuse))

    def _aggregated(
        self, server_round: int, collect: Callable[[Round], None]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        job, current = self.job, self._round
        if current is None:
            raise ProtocolError("a round must be configured before it is aggregated")
        try:
            collect(current)
            agreements = current.close()
            members = current.members
            self._opened.reached(members)
            self._opened.close(server_round, current.nonce, self._sum.headers)
            job.journal.append("round.set", {"session": job.session, "round": server_round, "members": list(members)})
            self._exchange.each(self._help(agreements, "train.agree", server_round), current.agree, current.refuse)
            self._exchange.each(self._help(current.ask(), "train.open", server_round), current.answer, current.refuse)
            vouching = self._exchange.ask(current.verify(), "train.fingerprint", server_round)
            self._exchange.each(vouching, current.fingerprint, current.refuse)
            packet, values = current.opened()
            if values is not None:
                job.state = job.state.after(self.plan, values)
            kept = self._opened.add(server_round, packet, "" if values is None else job.state.digest)
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
                "state": self._opened.state,
                "sum": kept,
                "checkpoint": job.checkpoint(),
            },
        )
        metrics = self._metrics()
        return self._arrays(), MetricRecord({"members": len(members), **metrics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Does nothing: metrics on private rows are releases and would have to be charged."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Does nothing: see :meth:`configure_evaluate`."""
        return None

    # --- ending, messages, records --------------------------------------------------------------------------

    def _finish(self) -> None:
        """Collect every site's ledger, verify its chain, and close the journal of the run."""
        job, link = self.job, self._exchange
        done = sum(1 for _ in job.journal.of_kind("round.applied"))
        self._catch_up()
        header = {
            "kind": "finish",
            "session": job.session,
            "status": self.status,
            "round": done,
            "model_hash": self._name,
        }
        replies = link.packets(link.ask(self._opened.packets(link.nodes, header), "query.finish"))
        end = End(self.status, done, self._name, {}, {})
        heads = ledger_handover.keep(job, {site: p.buffers.get("journal", b"") for site, p in replies.items()}, end)
        metrics = self._metrics()
        if self.plan.reveal_to == "server":
            write_durably(job.run / "model.f32", job.state.model())
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
        if job.countersigned:
            report_signatures.offer(job, link, [SiteId(site) for site in heads])

    def _arrays(self) -> ArrayRecord:
        data = self.job.state.model()
        return ArrayRecord({"weights": Array("float32", (len(data) // 4,), "fedveil.raw.1", data)})

    def _help(self, packets: Mapping[SiteId, Packet], action: str, round_: int) -> Iterable[Message]:
        """Ask the helpers, but not those that were excluded for wrong answers."""
        aside = set(self._conduct.set_aside)
        return self._exchange.ask({s: p for s, p in packets.items() if s not in aside}, action, round_)

    def _note_refusals(self, current: Round) -> None:
        for site, error in current.refusals.items():
            if isinstance(error, BudgetExhausted):
                self._exhausted.add(site)
            if isinstance(error, StateMismatch):
                self._opened.lost(site)
            body = {"session": self.job.session, "round": current.number, "site": site, "code": error.code}
            self.job.journal.append("site.refused", body)
            _LOG.warning("round %d, %s: %s", current.number, site, error)

    def _record(self, number: int, metrics: MetricRecord | None, seconds: float) -> None:
        traffic = getattr(self._exchange.grid, "traffic", {})
        sent, received = (sum(t[k] for t in traffic.values()) for k in ("sent", "received"))
        facts: dict[str, Any] = dict(metrics or {})
        line = {
            "round": number,
            "epsilon_opened": epsilon_pld([(self.plan.event, priced(number, self.plan.steps))], self.plan.delta),
            "members": facts.pop("members", 0),
            "metrics": facts,
            "bytes_sent": sent - self._counted[0],
            "bytes_received": received - self._counted[1],
            "seconds": round(seconds, 6),
        }
        self._counted = (sent, received)
        self._early.see(facts)
        self.job.metrics(line)
        self.job.progress("round", line)
