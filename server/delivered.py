"""The sites' ledgers as they are handed over at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fedveil.common.errors import FedveilError, VerificationError
from fedveil.common.files import write_durably
from fedveil.common.journal import parse, verify_rows
from fedveil.common.units import SiteId
from fedveil.privacy.report.charges import compose
from fedveil.server.job import Job

_LOG = logging.getLogger("fedveil.server")


def keep(job: Job, ledgers: Mapping[SiteId, bytes]) -> dict[str, list[int | str]]:
    """Write every ledger that a report can be built on into the run's folder; returns its head, by site.

    A ledger that does not hold (chain, signatures, the rules that bound its owner) counts as not delivered and is
    missing in the result: one bad ledger must not cost the report.
    """
    heads: dict[str, list[int | str]] = {}
    for site, data in ledgers.items():
        try:
            heads[site] = _head(job, site, data)
        except FedveilError as e:
            _LOG.error("the ledger of %s does not hold and counts as not delivered: %s", site, e)
            continue
        write_durably(job.run / "journals" / f"{site}.jsonl", data)
    return heads


def _head(job: Job, site: SiteId, data: bytes) -> list[int | str]:
    rows = verify_rows(parse(data), job.roster.member(site).signing_key, owner=site)
    if not rows or any(r.sig != r.sig.lower() for r in rows):
        raise VerificationError("no rows, or signatures that are not in lower case")
    compose(rows, job.session)
    return [len(rows), rows[-1].hash]
