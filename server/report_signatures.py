"""The finished report, offered to the sites for their signatures."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedveil.common import canonical
from fedveil.common.errors import FedveilError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.report import handover, signatures
from fedveil.privacy.report.build import build_report
from fedveil.server.exchange import Exchange
from fedveil.server.job import Job

_LOG = logging.getLogger("fedveil.server")


def offer(job: Job, link: Exchange, sites: Sequence[SiteId]) -> list[SiteId]:
    """Write the ended run's report, send it to ``sites`` and keep the signatures that come back; returns who signed.

    If a site does not sign, this is logged and its signature is missing. The report says how many there are. If the
    report cannot be built, or is too large to be sent, this is logged and nothing is sent.
    """
    try:
        document = build_report(job.run, job.key)
        packet = handover.packed(job.run, job.session, len(sites))
    except FedveilError as e:
        _LOG.error("the report is not offered to the sites: %s", e)
        return []
    held: dict[str, object] = {}
    digest = canonical.digest(document)

    def refuse(site: SiteId, error: FedveilError) -> None:
        _LOG.warning("%s did not sign the report: %s", site, error)

    def take(site: SiteId, answer: Packet) -> None:
        try:
            statement = answer.expect("signed").header.get("statement")
            signatures.require(site, job.roster.member(site).signing_key, job.session, digest, statement)
        except FedveilError as e:
            refuse(site, e)
        else:
            held[site] = statement

    link.each(link.ask(dict.fromkeys(sites, packet), "query.report"), take, refuse)
    if held:
        signatures.keep(job.run, held)
    _LOG.info("%d of %d sites signed the report", len(held), len(job.roster.sites))
    return [SiteId(site) for site in held]
