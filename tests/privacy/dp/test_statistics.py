"""Statistics as vectors: the joint sensitivity, and what the coordinates mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.contract import DataContract
from fedveil.common.errors import DataError, PlanError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import MetricSpec, StatsSpec, request
from fedveil.privacy.dp.statistics import bin_of, clipped_sum, vectors

CONTRACT = DataContract.model_validate(
    {
        "name": "t", "version": "1", "purpose": "test", "unit": "a row", "k": 2,
        "columns": [
            {"name": "id", "role": "identifier"},
            {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [20, 50]},
            {"name": "a", "role": "feature", "type": "number", "low": -5, "high": 45},
            {"name": "b", "role": "feature", "type": "number", "low": 0, "high": 1, "missing": "indicator"},
            {"name": "c", "role": "feature", "type": "category", "values": ["x", "y"], "missing": "indicator"},
            {"name": "t", "role": "target", "type": "number", "low": 0, "high": 9, "threshold": 4},
        ],
    }
)  # fmt: skip
WIDTH = CONTRACT.width  # age 3, a 1, b 2, c 3
ALL = ["count", "mean", "variance", "histogram", "quantiles"]
METRIC = MetricSpec(
    network=ModelSpec(name="logistic", inputs=WIDTH, classes=2), model_hash="0" * 64, confusion=True
)  # fmt: skip


def encoded(age: int, a: float, b: float | None, c: int) -> np.ndarray:
    """A record as ``encode`` gives it; a, b in [-1, 1]; None and 2 mean missing."""
    row = np.zeros(WIDTH, np.float32)
    row[age] = 1
    row[3] = a
    row[4:6] = (0, 1) if b is None else (b, 0)
    row[6 + c] = 1
    return row


unit = st.floats(-1, 1, width=32)
records = st.builds(encoded, st.integers(0, 2), unit, st.none() | unit, st.integers(0, 2))
specs = st.builds(
    lambda what, columns, bins, metric: request(
        CONTRACT, what, columns=columns, bins=bins, metric=METRIC if metric else None
    ),
    st.sampled_from([["histogram"], ALL]),
    st.lists(st.sampled_from(["age", "a", "b", "c", "t"]), unique=True, max_size=5),
    st.integers(1, 7),
    st.booleans(),
) | st.builds(
    lambda what, columns: request(CONTRACT, [what], columns=columns),
    st.sampled_from(["mean", "variance"]),
    st.lists(st.sampled_from(["a", "b"]), unique=True),
)


def phi(spec: StatsSpec, x: np.ndarray, y: int = 0, guess: int = 0) -> np.ndarray:
    return vectors(spec, x[None], np.array([y]), np.array([guess]) if spec.metric else None)[0]


class TestSensitivity:
    @given(specs, records, st.integers(0, 1), st.integers(0, 1))
    def test_no_record_is_longer_than_the_stated_norm(self, spec, x, y, guess) -> None:
        assert np.linalg.norm(phi(spec, x, y, guess)) <= spec.norm_bound * (1 + 1e-12)

    @given(specs)
    def test_and_some_record_is_exactly_so_long(self, spec) -> None:
        extreme = encoded(2, 1.0, -1.0, 0)
        assert np.linalg.norm(phi(spec, extreme)) == pytest.approx(spec.norm_bound, rel=1e-12)

    @settings(max_examples=60, deadline=None)
    @given(
        specs,
        st.lists(st.lists(st.floats(width=32), min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=6),
        st.lists(st.integers(-2, 3), min_size=6, max_size=6),
        st.integers(0, 5),
        st.floats(0.01, 5),
    )
    def test_one_record_moves_the_sum_by_at_most_the_clip_whatever_it_holds(self, spec, rows, ys, i, clip) -> None:
        X, y = np.array(rows, np.float32), np.array(ys[: len(rows)])
        guess = np.zeros(len(X), np.int64) if spec.metric else None
        i %= len(X)
        keep = np.arange(len(X)) != i
        whole = clipped_sum(spec, X, y, clip, guess)
        less = clipped_sum(spec, X[keep], y[keep], clip, None if guess is None else guess[keep])
        assert np.isfinite(whole).all()
        assert np.linalg.norm(whole - less) <= clip * (1 + 1e-9)

    def test_the_columns_share_one_sensitivity(self) -> None:
        """Negative control: the clip of one column alone does not bound two of them."""
        one = request(CONTRACT, ["mean"], columns=["a"])
        two = request(CONTRACT, ["mean"], columns=["a", "b"])
        x = encoded(0, 1.0, 1.0, 0)
        assert np.linalg.norm(phi(two, x)) > one.norm_bound * 1.2
        assert two.norm_bound == pytest.approx(2.0)  # count, a, b present, b

    def test_a_broken_record_counts_for_nothing(self) -> None:
        spec = request(CONTRACT, ALL)
        good = encoded(0, 0.5, None, 1)
        bad = good.copy()
        bad[3] = np.nan
        X = np.stack([good, bad, good, good])
        total = clipped_sum(spec, X, np.array([0, 0, 7, -1]), spec.norm_bound)
        assert np.array_equal(total, phi(spec, good))

    def test_blocks_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = request(CONTRACT, ALL)
        g = np.random.default_rng(0)  # noqa: TID251
        X = np.stack([encoded(int(g.integers(3)), g.uniform(-1, 1), g.uniform(-1, 1), 0) for _ in range(50)])
        y = g.integers(0, 2, 50)
        whole = clipped_sum(spec, X, y, 2.0)
        monkeypatch.setattr("fedveil.privacy.dp.statistics._CELLS", 3 * spec.parameters)
        assert np.allclose(clipped_sum(spec, X, y, 2.0), whole, rtol=1e-13)


class TestMeaning:
    def test_known_sums(self) -> None:
        spec = request(CONTRACT, ALL, bins=2, metric=METRIC)
        X = np.stack([encoded(0, -1, 0.5, 0), encoded(1, 0.0, None, 2), encoded(1, 0.5, -0.5, 1)])
        sums = vectors(spec, X, np.array([0, 1, 1]), np.array([0, 0, 1])).sum(0)
        found = {(s.kind, s.column.column if s.column else ""): sums[s.start : s.start + s.width] for s in spec.slots}
        expected: dict[tuple[str, str], list[float]] = {
            ("count", ""): [3], ("histogram", "age"): [1, 2, 0], ("sum", "a"): [-0.5], ("square", "a"): [1.25],
            ("histogram", "a"): [1, 2], ("present", "b"): [2], ("sum", "b"): [0], ("square", "b"): [0.5],
            ("histogram", "b"): [1, 1, 1], ("histogram", "c"): [1, 1, 1], ("histogram", "t"): [1, 2],
            ("correct", ""): [2], ("confusion", ""): [1, 0, 1, 1],
        }  # fmt: skip
        assert {k: v.tolist() for k, v in found.items()} == expected

    @given(st.integers(-5, 45), st.integers(1, 50))
    def test_values_on_an_edge_fall_into_the_upper_bin(self, value, bins) -> None:
        column = request(CONTRACT, ["histogram"], columns=["a"], bins=bins).columns[0]
        x = np.float32(2.0 * ((value - -5.0) / 50.0) - 1.0)  # as the encoding does it
        i = int(bin_of(column, np.array([x]))[0])
        assert 0 <= i < bins
        if value in column.cuts:
            assert i == column.cuts.index(value) + 1
        edges = column.edges
        assert edges[i] - 1e-5 <= value <= edges[i + 1] + 1e-5

    def test_shapes_are_checked(self) -> None:
        spec = request(CONTRACT, ["count"], metric=METRIC)
        x = encoded(0, 0, 0, 0)[None]
        for X, y, guess in (
            (x[:, 1:], np.zeros(1, int), np.zeros(1, int)),
            (x, np.zeros(2, int), np.zeros(1, int)),
            (x, np.zeros(1, int), None),
            (x, np.zeros(1, int), np.zeros(2, int)),
        ):
            with pytest.raises(DataError):
                vectors(spec, X, y, guess)


class TestAsking:
    @pytest.mark.parametrize(
        ("what", "more"),
        [
            (["median"], {}), (["mean"], {"columns": ["c"]}), (["mean"], {"columns": ["id"]}),
            (["histogram"], {"columns": ["nobody"]}), (["histogram"], {"bins": 0}),
            (["quantiles"], {"quantiles": (0.5, 1.0)}), (["histogram"], {"columns": ["a", "a"]}),
        ],
    )  # fmt: skip
    def test_what_cannot_be_answered_is_refused(self, what: list[str], more: dict[str, Any]) -> None:
        with pytest.raises(PlanError):
            request(CONTRACT, what, **more)

    def test_a_spec_fits_its_own_contract_and_no_other(self) -> None:
        spec = request(CONTRACT, ALL)
        assert spec.misfit(CONTRACT) == ""
        payload = CONTRACT.payload | {"columns": [dict(c) for c in CONTRACT.payload["columns"]]}
        payload["columns"][2]["high"] = 50.0
        assert "'a'" in spec.misfit(DataContract.model_validate(payload))

    @pytest.mark.parametrize("more", [{"inputs": 3}, {"classes": 3}, {"base": "0" * 64}])
    def test_models_that_do_not_fit_are_refused(self, more: dict[str, Any]) -> None:
        network = METRIC.network.model_copy(update=more)
        with pytest.raises(PlanError):
            request(CONTRACT, ["accuracy"], metric=METRIC.model_copy(update={"network": network}))

    def test_the_same_wish_is_the_same_spec(self) -> None:
        spec = request(CONTRACT, ALL)
        again = StatsSpec.model_validate_json(spec.model_dump_json())
        assert again == spec
