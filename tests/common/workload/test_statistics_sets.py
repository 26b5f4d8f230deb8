"""Statistics read labels and numbers; a column whose cells are sets of leaves has none."""

from __future__ import annotations

import pytest

from fedveil.common.contract import DataContract
from fedveil.common.errors import PlanError
from fedveil.common.workload.statistics import request


def contract(encoding: str) -> DataContract:
    columns = [
        {"name": "age", "role": "feature", "type": "number", "low": 0, "high": 100},
        {
            "name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c"],
            "levels": [["a"], ["b", "c"]], "encoding": encoding,
        },
        {"name": "ill", "role": "target", "type": "category", "values": ["0", "1"]},
    ]  # fmt: skip
    return DataContract.model_validate(
        {"name": "c", "version": "1", "purpose": "p", "unit": "one row", "k": 5, "l": 1, "columns": columns}
    )


def test_a_column_of_sets_is_refused_by_name_and_left_out_otherwise():
    labels, sets = contract("labels"), contract("sets")
    assert request(labels, ["histogram"], columns=["job"]).columns[0].labels
    with pytest.raises(PlanError, match="'job' is encoded as sets"):
        request(sets, ["histogram"], columns=["job"])
    assert [c.column for c in request(sets, ["histogram"]).columns] == ["age", "ill"]


def test_a_site_refuses_a_spec_that_reads_sets_as_labels():
    sets = contract("sets")
    spec = request(contract("labels"), ["histogram"], columns=["job"])
    forged = spec.model_copy(update={"inputs": sets.width, "classes": sets.classes})
    assert "sets" in forged.misfit(sets)
    assert request(sets, ["mean", "histogram"]).misfit(sets) == ""
