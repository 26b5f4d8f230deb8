"""The factor that fixed recoding claims, against every removal from every small table: missing values, l = 1 and l = 2.

A table is a multiset of (quasi-identifier, sensitive value), where the value may be missing. What is released is what
:func:`fixed.recode` leaves, if no class in it fails; a refusal releases nothing and is stated elsewhere as uncovered.
"""

import csv
import itertools
from collections import Counter

import numpy as np
import pytest

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError
from fedveil.privacy.anonymization import fixed
from fedveil.privacy.anonymization.verify import require, verify

KINDS = tuple(itertools.product("ab", ("x", "y", "")))
ROWS = 7


def contract(k, ell, limit, *, missing="indicator"):
    columns = [
        {"name": "g", "role": "quasi", "type": "category", "values": ["a", "b"], "levels": [["a"], ["b"]]},
        {"name": "s", "role": "sensitive", "type": "category", "values": ["x", "y"], "missing": missing},
        {"name": "f", "role": "feature", "type": "number", "low": 0, "high": 1},
        {"name": "t", "role": "target", "type": "category", "values": ["no", "yes"]},
    ]
    base = {"name": "n", "version": "1", "purpose": "p", "unit": "u", "k": k, "l": ell, "suppression_limit": limit}
    return DataContract.model_validate({**base, "columns": columns})


def columns_of(rows):
    n = len(rows)
    texts = {name: np.array([r[i] for r in rows] or [], object) for i, name in enumerate(("g", "s"))}
    return {**texts, "f": np.zeros(n), "t": np.array(["no"] * n, object)}


def released(rows, c):
    """The released rows as a multiset; None where the site refuses."""
    table = fixed.recode(columns_of(rows), len(rows), c).table
    if not table.rows or fixed.failing_classes(table, c)[1].any():
        return None
    names = [(*column.labels, "") for column in c.loaded[:2]]
    return Counter(
        (names[0][i], names[1][j]) for i, j in zip(table.coded["g"].tolist(), table.coded["s"].tolist(), strict=True)
    )


def worst_removal(c, kinds):
    """The largest number of released rows that differ between any table of at most ROWS rows and itself less one."""
    tables = [t for n in range(2, ROWS + 1) for t in itertools.combinations_with_replacement(kinds, n)]
    seen = {t: released(t, c) for t in tables}
    worst = 0
    for t in tables:
        for gone in range(len(t)):
            one, other = seen[t], seen.get(t[:gone] + t[gone + 1 :])
            if one is not None and other is not None:
                worst = max(worst, sum(((one - other) + (other - one)).values()))
    return worst


@pytest.mark.parametrize("missing", ["indicator", "error"])
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("ell", [1, 2])
@pytest.mark.parametrize("k", [2, 3])
def test_no_removal_exceeds_the_claimed_factor(k, ell, limit, missing):
    c = contract(k, ell, limit, missing=missing)
    worst = worst_removal(c, KINDS if missing == "indicator" else [x for x in KINDS if x[1]])
    claimed = fixed.stability_factor(c)
    if claimed is None:
        assert worst > k  # suppression for l does reach beyond a class of k: "not bounded" is not said for nothing
    else:
        assert worst == claimed


def test_one_value_among_missing_ones_decides_over_nothing():
    """It went wrong once: sixty rows without a sensitive value and one with, under l = 1."""
    c = contract(5, 1, 0.4)
    rows = [("a", "x")] * 100 + [("b", "")] * 60
    with_, without = released([*rows, ("b", "x")], c), released(rows, c)
    assert with_ is not None
    assert without is not None
    assert (with_.total(), without.total()) == (161, 160)


def test_l_of_one_requires_nothing_of_a_written_file(tmp_path):
    path = tmp_path / "r.csv"
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([["g", "s", "f", "t"], *[["a", "", "0", "no"]] * 5, *[["b", "x", "0", "no"]] * 4])
    verdict = verify(path, contract(4, 1, 0.0))
    assert verdict.l_met
    assert not verdict.l_failing
    assert require(path, contract(4, 1, 0.0)).rows == 9
    # k fails for b: the class without any sensitive value stands in no way out, and l is not named.
    with pytest.raises(AnonymityError, match=r"k = 5 fails in 1 classes \(dropping .* would pass\)$"):
        require(path, contract(5, 1, 0.0))
    with pytest.raises(AnonymityError, match="l = 2 for 's' fails in 2 classes"):
        require(path, contract(4, 2, 0.0))
