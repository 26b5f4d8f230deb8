"""Contracts whose unit is the person: which rows are whose, k counts persons, capacity and rows beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.release.persons import EMPTY, rows_of
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


def test_a_contract_that_cannot_tell_persons_apart_or_suppresses_is_refused(contract) -> None:
    with pytest.raises(ContractError, match="tells persons apart"):
        DataContract.model_validate({**contract.payload, "rows_per_person": 2})
    with pytest.raises(ContractError, match="suppression_limit"):
        of_persons(contract, suppression_limit=0.1)


def test_a_contract_about_records_has_the_hash_that_it_had(contract) -> None:
    assert "rows_per_person" not in contract.payload
    assert of_persons(contract).payload["rows_per_person"] == 2
    assert of_persons(contract).hash != of_persons(contract, 3).hash
