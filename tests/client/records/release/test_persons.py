"""Contracts whose unit is the person: which rows are whose, k counts persons, capacity and rows beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.read.sources import Rules, read
from fedveil.client.records.release import anonymize
from fedveil.client.records.release.persons import EMPTY, first_rows, rows_of
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, ContractError

PERSON = {"name": "patient", "role": "identifier", "pseudonym": True}


def of_persons(contract: DataContract, rows_per_person: int = 2, **changes) -> DataContract:
    columns = [PERSON if c["name"] == "patient" else c for c in contract.payload["columns"]]
    return DataContract.model_validate(
        {**contract.payload, "columns": columns, "rows_per_person": rows_per_person, **changes}
    )


@settings(max_examples=200, deadline=None)
@given(
    whose=st.lists(st.integers(0, 6), min_size=1, max_size=30), most=st.integers(1, 4),
    capacity=st.none() | st.integers(1, 8), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_grouped_as_a_loop_over_the_source_does(whose, most, capacity, seed) -> None:
    order = np.random.default_rng(seed).permutation(len(whose))
    found = rows_of(np.array(whose), order, most, capacity)
    expected: dict[int, list[int]] = {}
    for row, person in enumerate(whose):
        if person in expected or capacity is None or len(expected) < capacity:
            expected.setdefault(person, [])
            if len(expected[person]) < most:
                expected[person].append(row)
    assert found.shape == (len(expected), most)
    for line, rows in zip(found, expected.values(), strict=True):
        assert [int(order[i]) for i in line if i != EMPTY] == rows


def test_a_persons_rows_stand_together_whatever_the_shuffle(contract, rows, table, tmp_path, secret) -> None:
    for i, row in enumerate(rows):
        row[0] = f"p{i // 3:03}"  # three rows each; two are used
    out = ingest(table(rows), of_persons(contract, k=2), tmp_path / "w", secret=secret)
    assert out.persons is not None
    assert out.persons.shape == (8, 2)
    assert out.left_out == 8
    dose = contract.feature_names.index("dose")
    for i, own in enumerate(out.persons):
        assert [round(float(2 * out.X[j, dose] + 1), 3) for j in own] == [float(r[3]) for r in rows[3 * i : 3 * i + 2]]


def test_persons_beyond_the_capacity_are_left_out_by_the_order_of_the_source(
    contract, rows, table, tmp_path, secret
) -> None:
    out = ingest(table(rows), of_persons(contract), tmp_path / "w", secret=secret, capacity=20)
    assert out.persons is not None
    assert out.persons.shape == (20, 2)
    plain = ingest(table(rows), contract, tmp_path / "v", secret=secret, capacity=20)
    assert plain.persons is None
    assert (len(plain.y), plain.left_out) == (20, 4)
    dose = contract.feature_names.index("dose")
    first = sorted(float(r[3]) for r in rows[:20])
    np.testing.assert_allclose(sorted(2 * plain.X[:, dose] + 1), first, atol=1e-6)


def test_k_counts_persons_and_not_their_rows(contract, rows, table, tmp_path, secret) -> None:
    """Every class has six rows; of four persons only."""
    for i, row in enumerate(rows):
        row[0] = f"p{i // 6}-{min(i % 6, 3)}"
    ingest(table(rows), contract, tmp_path / "v", secret=secret)
    with pytest.raises(AnonymityError, match="k = 5 fails in 4 classes"):
        ingest(table(rows), of_persons(contract, 6), tmp_path / "w", secret=secret)
    assert not (tmp_path / "w" / "released.csv").exists()
    ingest(table(rows), of_persons(contract, 6, k=4), tmp_path / "u", secret=secret)


@given(whose=st.lists(st.integers(0, 6), min_size=1, max_size=30), most=st.integers(1, 4))
def test_the_first_rows_of_each_person_as_a_loop_finds_them(whose, most) -> None:
    expected = [i for i, person in enumerate(whose) if whose[:i].count(person) < most]
    assert first_rows(np.array(whose), most).tolist() == expected


@pytest.mark.parametrize("method", ["fixed", "mondrian", "optimal"])
def test_a_release_by_any_method_holds_k_persons_in_every_class(make, rows, table, tmp_path, secret, method) -> None:
    """Of persons with three rows each two are released; a class of 2·k rows is of k persons, whoever they are."""
    for i, row in enumerate(rows):
        row[0] = f"p{i // 3:03}"
    agreed = of_persons(make(), k=2, l=1)
    raw = read(table(rows), agreed, rules=Rules(secret=secret))
    out = tmp_path / "r.csv"
    done = anonymize.anonymise(raw, agreed, method, out)
    k = next(f for f in done.findings.findings if f.name == "k-anonymity")
    assert (k.required, k.met) == ("k = 4", True)
    assert done.findings.rows == 2 * len(rows) // 3
    assert anonymize.verify(out, agreed).met
    sizes = done.findings.rows, done.findings.classes
    risk = anonymize.risk(out, agreed)
    assert risk.prosecutor <= 1 / agreed.k
    assert (risk.rows, risk.classes) == sizes


def test_control_k_rows_of_fewer_persons_are_refused(make, rows, table, tmp_path, secret) -> None:
    """Six rows in each class, of two persons: enough rows for k = 3, too few for 3 persons with three rows each."""
    for i, row in enumerate(rows):
        row[0] = f"p{i // 3:03}"
    raw = read(table(rows), of_persons(make(), 3, k=3, l=1), rules=Rules(secret=secret))
    with pytest.raises(AnonymityError):
        anonymize.anonymise(raw, of_persons(make(), 3, k=3, l=1), "fixed", tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()
    assert anonymize.anonymise(raw, make(k=3, l=1), "fixed", tmp_path / "rows.csv").findings.met


def test_a_contract_that_cannot_tell_persons_apart_or_suppresses_is_refused(contract) -> None:
    with pytest.raises(ContractError, match="tells persons apart"):
        DataContract.model_validate({**contract.payload, "rows_per_person": 2})
    with pytest.raises(ContractError, match="suppression_limit"):
        of_persons(contract, suppression_limit=0.1)


def test_a_contract_about_records_has_the_hash_that_it_had(contract) -> None:
    assert "rows_per_person" not in contract.payload
    assert of_persons(contract).payload["rows_per_person"] == 2
    assert of_persons(contract).hash != of_persons(contract, 3).hash
