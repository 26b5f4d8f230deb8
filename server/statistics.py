"""What the server writes at the end of a run of statistics."""

from __future__ import annotations

from fedveil.common import canonical
from fedveil.common.files import write_durably
from fedveil.privacy.stats_document import STATISTICS, document
from fedveil.server.job import Job


def publish(job: Job) -> None:
    """Write ``statistics.json`` from the opened sum; nothing for a training run, or if no sum was opened."""
    applied = list(job.journal.of_kind("round.applied"))
    if job.plan.task != "stats" or not applied:
        return
    result = document(job.plan, job.session, len(applied[-1].body["members"]), job.state.sent())
    write_durably(job.run / STATISTICS, canonical.dumps(result) + b"\n")
