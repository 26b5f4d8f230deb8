"""Checks what a site says of its released table against the data contract that every site signed.

All of it follows from the contract: which criteria were required, how many released records one original record can
change, what the unit is. A site that states anything else has not done what was agreed, or does not say what it did.
"""

from __future__ import annotations

from typing import Any

from fedveil.common.contract import DataContract
from fedveil.common.errors import VerificationError
from fedveil.privacy.report.charges import Released

K, L, T = "k-anonymity", "distinct l-diversity", "t-closeness"


def required(contract: DataContract) -> dict[str, Any]:
    """What each criterion asks for, by its name in evidence; l = 1 asks for nothing."""
    asked: dict[str, Any] = {K: contract.k}
    if contract.l > 1:
        asked[L] = contract.l
    return asked if contract.t is None else {**asked, T: contract.t}


def factor(contract: DataContract) -> int | None:
    """How many released records one original record can change; None where that is not bounded.

    Derived once more, apart from the ingestion. Which near duplicate is kept, and where a fitted fence stands, depends
    on other records. Suppression for k moves a class of k at most, suppression for l one of any size.
    """
    if "drop" in (contract.quality.near_duplicates, contract.quality.fitted_outliers):
        return None
    if contract.suppression_limit == 0:
        return 1
    return contract.k if contract.l <= 1 else None


def unit(contract: DataContract) -> str:
    """What ε of a released record speaks of."""
    n = factor(contract)
    if n is None:
        return "one row of the released table; not bounded for the original records"
    return contract.unit if n == 1 else contract.unit + _group(n)


def spoken(said: str, n: int | None) -> str:
    """The contract's own words in what :func:`unit` says at the factor ``n``; empty where it does not use them."""
    return "" if n is None else said.removesuffix(_group(n))


def _group(n: int) -> str:
    return f"; a group of {n} of them"


def held(said: Released | None, contract: DataContract) -> None:
    """Raise :class:`VerificationError` unless a ledger's newest ``data.released`` row is what the contract gives."""
    if said is None:
        raise VerificationError("it says nothing of the table that the site took part with (no row data.released)")
    if said.contract_hash != contract.hash:
        raise VerificationError("its table was checked against another data contract")
    asked = required(contract)
    found = {
        name: c["required"] for name, c in said.criteria.items() if name in asked or (name, c["required"]) != (L, 1)
    }
    for name in sorted({*asked, *found}):
        if asked.get(name) != found.get(name) or isinstance(found.get(name), bool):
            said_to_be, wanted = _shown(found, name), _shown(asked, name)
            raise VerificationError(
                f"its table's {name[:64]} is said to be {said_to_be}, the contract asks for {wanted}"
            )
    if (said.stability_factor, said.unit) != (factor(contract), unit(contract)):
        raise VerificationError(
            f"its table's stability factor is said to be {said.stability_factor} ({said.unit[:128]!r}), "
            f"the contract gives {factor(contract)} ({unit(contract)[:128]!r})"
        )


def _shown(values: dict[str, Any], name: str) -> str:
    return str(values[name])[:32] if name in values else "nothing"
