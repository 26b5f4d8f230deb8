"""What a ledger says of its table is what the contract gives: no smaller k, no criterion left out, no smaller group."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.client.records.release.pipeline import evidence_of
from fedveil.common import canonical
from fedveil.common.contract import DataContract
from fedveil.common.errors import VerificationError
from fedveil.common.journal import Row
from fedveil.privacy.plan import make_plan
from fedveil.privacy.report import tables
from fedveil.privacy.report.charges import compose
from fedveil.privacy.report.verify import verify_report

KINDS = [
    {},
    {"l": 1},
    {"l": 1, "suppression_limit": 0.1},
    {"suppression_limit": 0.1},
    {"k": 2, "l": 1, "suppression_limit": 0.5},
    {"t": 0.2},
    {"quality": {"duplicates": "drop"}},
    {"quality": {"fitted_outliers": "drop"}},
    {"quality": {"near_duplicates": "drop", "near_key": ["age"]}},
]


def other(agreed: DataContract, changes: dict[str, Any]) -> DataContract:
    return DataContract.model_validate({**agreed.payload, **changes})


@pytest.mark.parametrize("changes", KINDS)
def test_what_is_expected_is_what_the_ingestion_says(make, honest, changes) -> None:
    """The verifier's own derivation against the program that makes the row; and such a run passes."""
    contract = other(honest.contract, changes)
    said = evidence_of(contract, "c" * 64, "d" * 64)
    assert {n: c["required"] for n, c in said["criteria"].items()} == tables.required(contract)
    assert (said["stability_factor"], said["unit"]) == (tables.factor(contract), tables.unit(contract))
    keep = ("sites", "records", "epsilon", "steps", "clip", "model", "optimizer")
    own = {**{k: getattr(honest.plan, k) for k in keep}, "epsilon": 2.0, "contract_hash": contract.hash}
    w = make(make_plan(**own), contract=contract, released=said)
    found = verify_report(w.report, consortium_key=w.public)
    assert found.ok, found.failed
    shown = canonical.loads(w.report.read_bytes())["payload"]["sites"]["alba"]["anonymisation"]
    assert shown["same_contract"]
    assert shown["stability_factor"] == tables.factor(contract)


def of(items: list[Any]) -> dict[str, Any]:
    return next(b for k, b in items if k == "data.released")


LIES = {
    "a smaller k": ("asks for 5", lambda b: b["criteria"]["k-anonymity"].update(required=2)),
    "a larger k": ("asks for 5", lambda b: b["criteria"]["k-anonymity"].update(required=50)),
    "a k that is no number": ("asks for 5", lambda b: b["criteria"]["k-anonymity"].update(required="5")),
    "k left out": ("said to be nothing", lambda b: b["criteria"].pop("k-anonymity")),
    "l left out": ("said to be nothing", lambda b: b["criteria"].pop("distinct l-diversity")),
    "l of one": ("asks for 2", lambda b: b["criteria"]["distinct l-diversity"].update(required=1)),
    "a criterion of its own": ("asks for nothing", lambda b: b["criteria"].update(x={"required": 1, "met": True})),
    "no criteria": ("said to be nothing", lambda b: b["criteria"].clear()),
    "no criteria at all": ("said to be nothing", lambda b: b.pop("criteria")),
    "another contract": ("another data contract", lambda b: b.update(contract="a" * 64)),
    "no contract": ("another data contract", lambda b: b.pop("contract")),
    "a stage of seven": ("multiply to 7", lambda b: b["stability"][0].update(factor=7)),
    "a stage without a bound": ("multiply to None", lambda b: b["stability"][0].update(factor=None)),
    "no bound although there is one": ("multiply to 1", lambda b: b.update(stability_factor=None)),
    "a group of seven": ("the contract gives 1", lambda b: (b.pop("stability"), b.update(stability_factor=7))),
    "a unit that sounds better": ("the contract gives 1", lambda b: b.update(unit="all rows of one person")),
    "nothing": ("another data contract", lambda b: b.clear()),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_another_table_than_the_contract_gives_is_refused(spoilt, lie) -> None:
    word, change = LIES[lie]
    spoilt.forge(ledgers={"berg": lambda items: change(of(items))})
    failed = verify_report(spoilt.report, consortium_key=spoilt.public).failed
    assert failed is not None
    assert failed.name == "ledger of berg"
    assert word in failed.detail


def test_a_ledger_that_says_nothing_of_its_table_is_refused(spoilt) -> None:
    spoilt.forge(ledgers={"berg": lambda items: items.pop([k for k, _ in items].index("data.released"))})
    failed = verify_report(spoilt.report, consortium_key=spoilt.public).failed
    assert failed is not None
    assert (failed.name, "no row data.released" in failed.detail) == ("ledger of berg", True)


def test_l_of_one_may_be_named(honest) -> None:
    """It asks for nothing; a ledger may say so."""
    contract = other(honest.contract, {"l": 1})
    said = evidence_of(contract, "c" * 64, "d" * 64)
    said["criteria"]["distinct l-diversity"] = {"required": 1, "met": True}
    tables.held(compose(ledger(said), "s").released, contract)
    said["criteria"]["distinct l-diversity"] = {"required": 2, "met": True}
    with pytest.raises(VerificationError, match="asks for nothing"):
        tables.held(compose(ledger(said), "s").released, contract)


def ledger(released: dict[str, Any]) -> list[Row]:
    opened = {"lineage": "l", "unit": "record", "adjacency": "a", "cap_epsilon": 5.0, "delta": 1e-5, "order": 6.0}
    rows = [("ledger.open", opened), ("data.released", released)]
    return [Row(n, "alba", 0, kind, body, "0" * 64, "0" * 64, "0" * 128) for n, (kind, body) in enumerate(rows)]


@pytest.mark.parametrize("stages", [5, [{}], [{"factor": 0}], [{"factor": True}], [{"factor": 1}] * 65])
def test_stages_that_are_none(stages) -> None:
    with pytest.raises(VerificationError, match=r"data\.released"):
        compose(ledger({"stability_factor": 1, "stability": stages}), "s")
