"""The sites hand over their ledgers at the end of a run; the server checks and keeps them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from fedveil.common import canonical
from fedveil.common.contract import DataContract
from fedveil.common.errors import FedveilError, VerificationError, trace
from fedveil.common.files import write
from fedveil.common.journal import parse, verify_rows
from fedveil.common.units import SiteId
from fedveil.privacy.report import history, ledgers, prices, tables
from fedveil.privacy.report.charges import compose
from fedveil.privacy.report.history import End, History
from fedveil.server.job import Job

_LOG = logging.getLogger("fedveil.server")


def keep(job: Job, handed: Mapping[SiteId, bytes], end: End) -> dict[str, list[int | str]]:
    """Write every ledger that a report can be built on into the run's folder; returns their heads, by site.

    A ledger that an auditor would refuse counts as not delivered and is missing in the result, because one bad ledger
    must not prevent the report. Reasons: its chain, its signatures, the rules for its owner, another end of the run or
    other charges than in the server's journal, another table than the contract's.

    Args:
        end: the end of the run as it will be written, still without heads.
    """
    seen = dataclasses.replace(history.replay(job.journal.rows), end=end)
    contract = None if seen.simulated else _contract(job)
    heads: dict[str, list[int | str]] = {}
    for site, data in handed.items():
        try:
            heads[site] = _head(job, seen, contract, site, data)
        except Exception as e:  # every class: a member wrote the ledger, and the run's end must be written
            said = e if isinstance(e, FedveilError) else trace(e)
            _LOG.error("the ledger of %s does not hold and counts as not delivered: %s", site, said)
            continue
        write(job.run / "journals" / f"{site}.jsonl", data, durable=job.durable)
    return heads


def _head(job: Job, seen: History, contract: DataContract | None, site: SiteId, data: bytes) -> list[int | str]:
    rows = verify_rows(parse(data), job.roster.member(site).signing_key, owner=site)
    if not rows or any(r.sig != r.sig.lower() for r in rows):
        raise VerificationError("no rows, or signatures that are not in lower case")
    joined = job.joins[site]["payload"]
    ledgers.continues(rows, joined, (), job.plan.colluders)  # what others have seen of it is for auditors to weigh
    charges = compose(rows, job.session)
    ledgers.charged(charges, job.plan, seen, joined["head"][0])
    ledgers.counts(charges, prices.read(job.plan.to_json()), seen, site)
    ledgers.ends(charges, seen, site)
    if contract is not None:
        tables.held(charges.released, contract)
    return [len(rows), rows[-1].hash]


def _contract(job: Job) -> DataContract | None:
    """The contract beside the run's journal. The sites compare the signed one with it. None if there is none."""
    path = job.run / "contract.json"
    if not path.exists():
        return None
    payload = canonical.loads(path.read_bytes())["payload"]
    return DataContract.model_validate(payload.get("contract", payload))
