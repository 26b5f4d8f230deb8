"""`make bench-audit`: faults planted one by one into the real path, and which check catches each.

Writes docs/bench-audit.md. Every fault is examined five times, the honest program twenty times; keys, noise and
samples are fresh each time. About six minutes. `python tests/bench/audit_table.py [output file]`.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.client import round as line
from fedveil.client import train
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, StatsSpec
from fedveil.deploy.lab.audit.examination import conformance
from fedveil.privacy.audit.evidence import Conformance
from fedveil.privacy.audit.suite import Effort
from fedveil.privacy.dp import places
from fedveil.privacy.dp.accounting import rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.dp.noise import KeyStream, discrete_gaussian
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.plan_figures import PlanFigures
from fedveil.privacy.secagg.plain import PlainServer
from fedveil.privacy.tally import Tally

OUTPUT = Path(__file__).parents[2] / "docs" / "bench-audit.md"
HONEST, PLANTED = 20, 5


@dataclass
class Now:
    """Which site is answering, and under which plan: what a fault may depend on."""

    site: Any = None
    plan: Any = None


@contextmanager
def answering(draw: Callable[[Now, float, int], Any]) -> Iterator[None]:
    """A site's noise drawn by ``draw`` instead."""
    now, contribute = Now(), line.contribute

    def noted(site, request):
        now.site, now.plan = site, site.session(request.header.get("session")).plan
        return contribute(site, request)

    with ExitStack() as stack:
        stack.enter_context(patch.object(line, "contribute", noted))
        stack.enter_context(patch.object(line, "discrete_gaussian", lambda std, size: draw(now, std, size)))
        yield


def nothing(size: int):
    return np.zeros(size, np.int64)


def no_noise():
    return answering(lambda now, std, size: nothing(size))


def weaker():
    return answering(lambda now, std, size: discrete_gaussian(0.95 * std, size))


def cut_off():
    """No value beyond three standard deviations."""

    def draw(now, std, size):
        return np.clip(discrete_gaussian(std, size), -int(3 * std), int(3 * std))

    return answering(draw)


def short_key():
    """Every release's key stream begins from 16 random bits."""

    def init(self):
        self._encryptor = Cipher(algorithms.AES(os.urandom(2) + bytes(30)), modes.CTR(bytes(16))).encryptor()

    return patch.object(KeyStream, "__init__", init)


def none_far_along():
    def draw(now, std, size):
        out = discrete_gaussian(std, size)
        out[8192:] = 0
        return out

    return answering(draw)


def none_for_statistics():
    stats = lambda now: now.plan.task == "stats"  # noqa: E731
    return answering(lambda now, std, size: nothing(size) if stats(now) else discrete_gaussian(std, size))


def cheaper():
    """Every step is priced as if four fifths of the records were sampled that are."""
    event = property(lambda self: SampledGaussian(0.8 * self.sample_rate, self.noise_multiplier))
    return patch.object(PlanFigures, "event", event)


def half_at_one_site():
    last = lambda now: now.site.id == now.site.roster.sites[-1].site  # noqa: E731
    return answering(lambda now, std, size: discrete_gaussian(std / 2 if last(now) else std, size))


def added_by_the_server():
    """The opened sum is not what its members handed in."""
    result = PlainServer.result

    def shifted(self):
        values, members = result(self)
        return values + (np.arange(values.size) == 7), members

    return patch.object(PlainServer, "result", shifted)


def none_for_clients():
    whole = lambda now: now.plan.mode == "client"  # noqa: E731
    return answering(lambda now, std, size: nothing(size) if whole(now) else discrete_gaussian(std, size))


def none_under_blinding():
    hidden = lambda now: now.plan.reveal_to == "sites"  # noqa: E731
    return answering(lambda now, std, size: nothing(size) if hidden(now) else discrete_gaussian(std, size))


def one_share_missing():
    first = lambda now: now.site.id == now.site.roster.sites[0].site  # noqa: E731
    return answering(lambda now, std, size: nothing(size) if first(now) else discrete_gaussian(std, size))


def unclipped(where: Callable[[Any], bool]):
    """After the probe at join: what a site then computes is not what was probed."""
    whole = line.site_sum

    def summed(engine, plan, *given):
        return whole(engine, plan.model_copy(update={"clip": 1e9}) if where(plan.model) else plan, *given)

    return patch.object(line, "site_sum", summed)


def no_clipping():
    return unclipped(lambda model: True)


def no_clipping_of_networks():
    """The clip is left off wherever there is a hidden layer."""
    return unclipped(lambda model: bool(model.hidden))


def every_record():
    honest = places.seat
    return patch.object(train, "seat", lambda records, rate, room: honest(records, 1.0, max(records, room)))


def reused_noise():
    kept: dict[Any, Any] = {}

    def draw(now, std, size):
        return kept.setdefault((now.site.id, size), discrete_gaussian(std, size))

    return answering(draw)


def noise_from_length():
    """As if the noise were σ·C for the expected batch of the data set's own length."""
    return answering(lambda now, std, size: discrete_gaussian(std * 4 / max(4, len(now.site.X)), size))


def no_composition():
    feed = Tally.feed

    def last_only(self, row):
        feed(self, row)
        if row.kind == "spend" and self.filter is not None:
            self.spent = rdp(self.events[-1], self.filter.order)

    return patch.object(Tally, "feed", last_only)


def dropped_when_encrypted():
    return answering(lambda now, std, size: discrete_gaussian(std, size) if now.plan.sum == "plain" else nothing(size))


def divisor_from_answers():
    """The server divides by what it guesses from the sum's members, not by the plan's constant."""
    step = ModelState.step
    return patch.object(ModelState, "step", lambda self, plan, s, unit: step(self, plan, s * plan.sites / 4, unit))


def in_order():
    """No places: the sampled records sit in the order of the table, and whoever comes later moves up."""

    def seated(records, rate, room):
        taken = np.flatnonzero(places.poisson_sample(records, rate))
        return np.concatenate([taken, np.full(room - len(taken), places.EMPTY)])

    return patch.object(train, "seat", seated)


def same_sample():
    kept: dict[int, Any] = {}
    sample = places.poisson_sample
    return patch.object(places, "poisson_sample", lambda n, rate: kept.setdefault(n, sample(n, rate)))


def repeated_along_the_model():
    def draw(now, std, size):
        return np.resize(discrete_gaussian(std, 256), size)

    return answering(draw)


def training(**changes: Any) -> PrivacyPlan:
    """Five sites, one of which may collude and one be missing: three honest shares."""
    given: dict[str, Any] = {
        "sites": 5, "records": 1000, "noise_multiplier": 1.0, "steps": 20, "clip": 0.5, "sample_rate": 0.25,
        "model": ModelSpec(name="logistic", inputs=64, classes=10), "optimizer": Optimizer(learning_rate=0.1),
        "contract_hash": "c" * 64,
    }  # fmt: skip
    return make_plan(**{**given, **changes})


def statistics(**changes: Any) -> PrivacyPlan:
    """The same sites; mean, variance and histogram of three columns."""
    columns = tuple(
        ColumnStats(column=f"x{i}", source="number", at=i, low=0.0, high=1.0, moments=2, histogram=True, cuts=CUTS)
        for i in range(3)
    )
    spec = StatsSpec(inputs=3, classes=2, columns=columns)
    return training(model=spec, clip=spec.norm_bound, steps=1, sample_rate=1.0, **changes)


CUTS = tuple(i / 20 for i in range(1, 20))
MLP = ModelSpec(name="mlp", inputs=64, classes=10, hidden=(32,))


# Few wide sums and few keys, for faults that are about neither.
QUICK, WIDE = Effort(wide=256, keys=16), Effort()
CLIENTS: dict[str, Any] = {"mode": "client", "few_clients": True, "local_steps": 3}


@dataclass(frozen=True)
class Fault:
    """A fault, the check that is there for it (others may fail as well), and the plan that it is examined under.

    Attributes:
        changes: of the plan; without any it is the honest program's, with a sum in the clear.
    """

    plant: Callable[[], Any]
    check: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    plan: Callable[..., PrivacyPlan] = training
    effort: Effort = QUICK


FAULTS: dict[str, Fault] = {
    "no noise": Fault(no_noise, "noise: variance"),
    "noise x0.95": Fault(weaker, "noise: variance"),
    "noise cut off at 3 standard deviations": Fault(cut_off, "sites: largest value"),
    "noise key of 16 bits": Fault(short_key, "noise: key", effort=Effort(wide=256)),
    "no noise beyond coordinate 8,192": Fault(
        none_far_along, "noise: every block", effort=Effort(wide=1 << 13, keys=16)
    ),
    "statistics without noise": Fault(none_for_statistics, "own path: noise", plan=statistics),
    "clients' updates without noise": Fault(none_for_clients, "own path: noise", CLIENTS),
    "no noise where only sites read": Fault(
        none_under_blinding, "own path: noise", {"reveal_to": "sites", "sum": "keysum"}
    ),
    "price at q*0.8": Fault(cheaper, "ledger: price"),
    "one site at half noise": Fault(half_at_one_site, "sites: noise"),
    "one share of noise missing": Fault(one_share_missing, "noise: variance"),
    "no clipping": Fault(no_clipping, "clip: norm of a record"),
    "no clipping of the plan's own network": Fault(no_clipping_of_networks, "own path: clipped sum", {"model": MLP}),
    "something added to the sum": Fault(added_by_the_server, "sum: nothing added or lost"),
    "subsampling claimed, not done": Fault(every_record, "sampling: rate"),
    "noise used again in every round": Fault(reused_noise, "noise: rounds independent"),
    "noise from the number of records": Fault(noise_from_length, "neighbours: noise"),
    "composition forgotten": Fault(no_composition, "ledger: composition"),
    "noise dropped under the secure sum": Fault(dropped_when_encrypted, "noise: variance", {"sum": "keysum"}),
    "divisor not the plan's": Fault(divisor_from_answers, "neighbours: divisor"),
    "shift of places": Fault(in_order, "places: at random"),
    "the same sample in every round": Fault(same_sample, "sampling: rounds independent"),
    "noise repeated along the model": Fault(repeated_along_the_model, "noise: coordinates independent"),
}


def run(fault: str, **changes: Any) -> Conformance:
    """One examination of the program with a fault, planted after the plan was agreed on; ``changes`` of its plan."""
    f = FAULTS[fault]
    agreed = f.plan(**{"sum": "plain", **f.changes, **changes})
    with f.plant():
        return conformance(agreed, f.effort, engine="closed")


def main(output: Path) -> None:
    """Examine, print, write."""
    started = time.process_time()
    honest = [conformance(training(), QUICK if i else WIDE, engine="closed") for i in range(HONEST)]
    flagged = sum(not c.passed for c in honest)
    rows = []
    for fault, planted in FAULTS.items():
        named = planted.check
        found = [run(fault) for _ in range(PLANTED)]
        caught = sum(named in c.failed for c in found)
        others = Counter(name for c in found for name in c.failed if name != named)
        noise = float(np.mean([c.measured for c in found]))
        rows.append(f"| {fault} | {caught}/{PLANTED} | {named} | {', '.join(sorted(others)) or 'none'} | {noise:.3f} |")
        print(rows[-1], flush=True)
    seconds = time.process_time() - started
    output.write_text(document(honest, flagged, rows, seconds), encoding="utf-8")
    print(f"honest: {flagged}/{HONEST} flagged; {seconds:.0f} s of CPU; {output}")
    if flagged or any(f"| {PLANTED}/{PLANTED} |" not in row for row in rows):
        sys.exit(1)


def document(honest: list[Conformance], flagged: int, rows: list[str], seconds: float) -> str:
    """The page."""
    p, whole = training(), honest[0]
    ratio = [c.measured / c.claimed for c in honest]
    covered = sum(c.low <= c.claimed <= c.high for c in honest)
    checks = [
        f"| {f.name} | {f.asks.replace('|', chr(92) + '|')} | {f.samples} | {f.detects} |" for f in whole.findings
    ]
    return "\n".join([
        "# Planted faults", "",
        "Written by `make bench-audit`. The conformance suite (`fedveil.privacy.audit.suite`) examines this program "
        "through its real path (clip, sample, share, encrypt, sum, open). It does so once for the program as it is, "
        "and once for every fault below, under a plan of the kind that the fault is about. Each fault is planted by "
        "replacing one function.", "",
        f"Plan: {p.sites} sites, t = {p.colluders}, d = {p.dropouts}, h = {p.honest}, sum `{p.sum}`, σ = "
        f"{p.noise_multiplier:g}, C = {p.clip:g}, q = {p.sample_rate:g}. Each check fails a correct program with "
        f"probability at most {whole.findings[0].alpha:g}. All {len(whole.findings)} checks together do so with "
        f"probability below {len(whole.findings) * whole.findings[0].alpha:.1g}.", "",
        f"**Honest program: {flagged}/{HONEST} flagged.** Measured noise multiplier between {min(ratio):.4f} and "
        f"{max(ratio):.4f} of the claimed one. The {whole.confidence:.0%} interval holds the claim in {covered} of "
        f"{HONEST}. One of them: {whole.sentence}. That one looked at {WIDE.wide:,} features in the wide sums and at "
        f"{WIDE.keys:,} keys, as the command does; the others at {QUICK.wide} and {QUICK.keys}.", "",
        "| fault | caught | by the check | others that fail | measured noise multiplier (claimed 1) |",
        "|---|---|---|---|---|", *rows, "",
        "If a share is missing, the noise is still more than the claim counts on: |U| = 5 shares are drawn and h = 3 "
        "are claimed. The fault shows because the variance is tested against |U|/h, from both sides.", "",
        "## What each check rests on", "",
        "The smallest fault is the one found with a probability of 99.9 %.", "",
        "| check | what it compares | numbers | smallest fault it finds |", "|---|---|---|---|", *checks, "",
        "`own path` is the plan's own network or statistics, with its D. It has as few numbers as that D gives; the "
        "slab has more. `sites` and `sum` compare what every site handed to the sum, before it was encrypted. The "
        "suite tests honest code. A site that knows that it is examined, and draws its noise only then, would pass.",
        "",
        f"{seconds:.0f} s of CPU for {HONEST + PLANTED * len(rows)} examinations.", "",
    ])  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
