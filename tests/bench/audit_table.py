"""`make bench-audit`: faults planted one by one into the real path, and which check catches each.

Writes docs/bench-audit.md. Every fault is examined five times, the honest program twenty times; keys, noise and
samples are fresh each time. About three minutes. `python tests/bench/audit_table.py [output file]`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from fedveil.client import round as line
from fedveil.client import train
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.audit.evidence import Conformance
from fedveil.privacy.audit.suite import Effort, examine
from fedveil.privacy.dp.accounting import rdp
from fedveil.privacy.dp.clipping import Clipper
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.ledger import Tally
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

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
    return answering(lambda now, std, size: discrete_gaussian(0.9 * std, size))


def one_share_missing():
    first = lambda now: now.site.id == now.site.roster.sites[0].site  # noqa: E731
    return answering(lambda now, std, size: nothing(size) if first(now) else discrete_gaussian(std, size))


def no_clipping():
    whole = Clipper.clipped_sum
    return patch.object(Clipper, "clipped_sum", lambda self, X, y, clip: whole(self, X, y, 1e9))


def every_record():
    return patch.object(train, "poisson_sample", lambda records, rate: np.ones(records, bool))


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
    return patch.object(ModelState, "step", lambda self, plan, opened: step(self, plan, opened * plan.sites / 4))


def same_sample():
    kept: dict[int, Any] = {}
    sample = train.poisson_sample
    return patch.object(train, "poisson_sample", lambda n, rate: kept.setdefault(n, sample(n, rate)))


def repeated_along_the_model():
    def draw(now, std, size):
        return np.resize(discrete_gaussian(std, 256), size)

    return answering(draw)


# Each fault with the check that is there for it; others may fail as well.
FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no noise": (no_noise, "noise: variance"),
    "noise x0.9": (weaker, "noise: variance"),
    "one share of noise missing": (one_share_missing, "noise: variance"),
    "no clipping": (no_clipping, "clip: norm of a record"),
    "subsampling claimed, not done": (every_record, "sampling: rate"),
    "noise used again in every round": (reused_noise, "noise: rounds independent"),
    "noise from the number of records": (noise_from_length, "neighbours: noise"),
    "composition forgotten": (no_composition, "ledger: composition"),
    "noise dropped under the secure sum": (dropped_when_encrypted, "noise: variance"),
    "divisor not the plan's": (divisor_from_answers, "neighbours: divisor"),
    "the same sample in every round": (same_sample, "sampling: rounds independent"),
    "noise repeated along the model": (repeated_along_the_model, "noise: coordinates independent"),
}


def plan(sum_: Literal["keysum", "plain"] = "keysum") -> PrivacyPlan:
    """Five sites, one of which may collude and one be missing: three honest shares."""
    return make_plan(
        sum=sum_, sites=5, records=1000, noise_multiplier=1.0, steps=20, clip=0.5, sample_rate=0.25,
        model=ModelSpec(name="logistic", inputs=64, classes=10), optimizer=Optimizer(learning_rate=0.1),
        contract_hash="c" * 64,
    )  # fmt: skip


def run(fault: str | None, sum_: Literal["keysum", "plain"] = "keysum", effort: Effort | None = None) -> Conformance:
    """One examination, of the program with a fault or of the honest one (None)."""
    if fault is None:
        return examine(InProcess(), plan(sum_), effort)
    with FAULTS[fault][0]():
        return examine(InProcess(), plan(sum_), effort)


def main(output: Path) -> None:
    """Examine, print, write."""
    started = time.process_time()
    honest = [run(None) for _ in range(HONEST)]
    flagged = sum(not c.passed for c in honest)
    rows = []
    for fault, (_, named) in FAULTS.items():
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
    p, last = plan(), honest[-1]
    ratio = [c.measured / c.claimed for c in honest]
    covered = sum(c.low <= c.claimed <= c.high for c in honest)
    checks = [f"| {f.name} | {f.asks.replace('|', chr(92) + '|')} | {f.samples} | {f.detects} |" for f in last.findings]
    return "\n".join([
        "# Planted faults", "",
        "Written by `make bench-audit`. The conformance suite (`fedveil.privacy.audit.suite`) examines this program "
        "through its real path (clip, sample, share, encrypt, sum, open). It does so once for the program as it is, "
        "and once for every fault below. Each fault is planted by replacing one function.", "",
        f"Plan: {p.sites} sites, t = {p.colluders}, d = {p.dropouts}, h = {p.honest}, sum `{p.sum}`, σ = "
        f"{p.noise_multiplier:g}, C = {p.clip:g}, q = {p.sample_rate:g}. Each check fails a correct program with "
        f"probability at most {last.findings[0].alpha:g}. All {len(last.findings)} checks together do so with "
        f"probability below {len(last.findings) * last.findings[0].alpha:.1g}.", "",
        f"**Honest program: {flagged}/{HONEST} flagged.** Measured noise multiplier between {min(ratio):.4f} and "
        f"{max(ratio):.4f} of the claimed one. The {last.confidence:.0%} interval holds the claim in {covered} of "
        f"{HONEST}. One of them: {last.sentence}.", "",
        "| fault | caught | by the check | others that fail | measured noise multiplier (claimed 1) |",
        "|---|---|---|---|---|", *rows, "",
        "If a share is missing, the noise is still more than the claim counts on: |U| = 5 shares are drawn and h = 3 "
        "are claimed. The fault shows because the variance is tested against |U|/h, from both sides.", "",
        "## What each check rests on", "",
        "The smallest fault is the one found with a probability of 99.9 %.", "",
        "| check | what it compares | numbers | smallest fault it finds |", "|---|---|---|---|", *checks, "",
        "More sites need more rounds: with n sites, one missing share is 1/n of the variance. The suite tests honest "
        "code. A site that knows the audit slab, and draws its noise only there, would pass.", "",
        f"{seconds:.0f} s of CPU for {HONEST + PLANTED * len(rows)} examinations.", "",
    ])  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
