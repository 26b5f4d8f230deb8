"""Whether a plan speaks of this site's roster, contract, records and ledger. (What its owner allows is policy.)"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedveil.common.contract import DataContract
from fedveil.common.errors import PolicyRefusal, ProtocolError
from fedveil.common.identity import Roster
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import PrivacyPlan


class Holder(Protocol):
    """What a site holds that a plan has to fit; see :class:`fedveil.client.session.Site`."""

    roster: Roster
    contract_hash: str
    contract: DataContract | None
    width: int
    classes: int
    capacity: int
    persons: NDArray[np.int64] | None
    ledger: Ledger


def check(plan: PrivacyPlan, site: Holder) -> None:
    """Raise :class:`ProtocolError` or :class:`PolicyRefusal` for the first thing in which the two do not fit."""
    if plan.contract_hash != site.contract_hash:
        raise ProtocolError("the plan was made for another data contract")
    if plan.sites != len(site.roster.sites):
        raise ProtocolError(f"the plan speaks of {plan.sites} sites, the roster of {len(site.roster.sites)}")
    if (plan.model.inputs, plan.model.classes) != (site.width, site.classes):
        raise ProtocolError("the plan's model does not fit the contract's features and classes")
    if isinstance(plan.model, StatsSpec) and site.contract and (where := plan.model.misfit(site.contract)):
        raise ProtocolError(f"the statistics read the records otherwise than the contract: {where}")
    if site.ledger.tally.unit != plan.unit:
        raise PolicyRefusal(f"this site's ledger counts each {site.ledger.tally.unit}, the plan each {plan.unit}")
    if plan.unit == "client":
        return
    rows = 1 if site.persons is None else site.persons.shape[1]
    if plan.rows_per_person != rows:
        raise ProtocolError(
            f"the plan takes {plan.rows_per_person} rows of each {plan.unit}, this site's contract {rows}"
        )
    if site.capacity > plan.capacity:
        raise PolicyRefusal(
            f"the plan is for sites of at most {plan.capacity} {plan.unit}s; this one's capacity is {site.capacity}",
            hint="plan with that capacity: [privacy] capacity of federation.toml",
        )
