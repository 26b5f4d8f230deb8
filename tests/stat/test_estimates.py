"""Estimates from noisy sums: unbiased, with the standard errors they state; wrong noise is noticed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common.errors import DataError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, MetricSpec, StatsSpec
from fedveil.privacy.dp.estimates import estimate, project, quantile, scaler
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.dp.statistics import clipped_sum

BMI = ColumnStats(
    column="bmi", source="number", at=0, low=10.0, high=60.0, missing=True, moments=2, histogram=True,
    cuts=(20.0, 25.0, 30.0, 40.0),
)  # fmt: skip
SPEC = StatsSpec(
    inputs=2, classes=2, columns=(BMI,), quantiles=(0.1, 0.5, 0.9),
    metric=MetricSpec(network=ModelSpec(name="logistic", inputs=2, classes=2), model_hash="0" * 64),
)  # fmt: skip
N, STD, FINE, REPEATS = 4000, 12.0, 1e-3, 1500


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    g = np.random.default_rng(3)  # noqa: TID251
    bmi = np.clip(g.normal(27, 6, N), 10, 60)
    gone = g.random(N) < 0.2
    X = np.column_stack([np.where(gone, 0, 2 * (bmi - 10) / 50 - 1), gone]).astype(np.float32)
    y = g.integers(0, 2, N)
    guess = np.where(g.random(N) < 0.8, y, 1 - y)
    sums = clipped_sum(SPEC, X, y, SPEC.norm_bound, guess)
    return {"sums": sums, "bmi": bmi[~gone], "gone": gone, "accuracy": (guess == y).mean()}


def repeated(sums: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Estimates and stated errors over many releases with noise ``factor`` times the stated one, shifted."""
    D, out = len(sums), {}
    noise = discrete_gaussian(STD * factor / FINE, D * REPEATS).reshape(REPEATS, D) * FINE + shift
    for row in noise:
        found = estimate(SPEC, sums + row, STD)
        c = found["columns"]["bmi"]
        values = {"count": found["count"], "present": c["present"], "mean": c["mean"], "variance": c["variance"],
                  "std": c["std"], "accuracy": found["metrics"]["accuracy"]}  # fmt: skip
        for name, v in values.items():
            out.setdefault(name, []).append((v["estimate"], v["standard_error"]))
        for i, value in enumerate(c["histogram"]["noisy"]):
            out.setdefault(f"bin{i}", []).append((value, c["histogram"]["standard_error"]))
    return {k: (np.array([a for a, _ in v]), np.array([b for _, b in v])) for k, v in out.items()}


def truths(table: dict[str, Any]) -> dict[str, float]:
    bmi = table["bmi"]
    bins, _ = np.histogram(bmi, bins=BMI.edges)
    return {
        "count": N, "present": len(bmi), "mean": bmi.mean(), "variance": bmi.var(), "std": bmi.std(),
        "accuracy": table["accuracy"], **{f"bin{i}": float(b) for i, b in enumerate(bins)},
    }  # fmt: skip


def misses(found: dict[str, tuple[np.ndarray, np.ndarray]], truth: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Per statistic: bias in standard errors of the mean, and the ratio of real to stated spread."""
    out = {}
    for name, (values, errors) in found.items():
        stated = math.sqrt((errors**2).mean())
        out[name] = ((values.mean() - truth[name]) / (stated / math.sqrt(REPEATS)), values.std(ddof=1) / stated)
    return out


def accepted(m: dict[str, tuple[float, float]]) -> bool:
    # 1500 draws: the ratio of standard deviations has a relative error of 1.8 %; six such are 11 %.
    return all(abs(bias) < 6 and abs(ratio - 1) < 0.11 for bias, ratio in m.values())


def test_unbiased_with_the_stated_errors(table) -> None:
    found = misses(repeated(table["sums"]), truths(table))
    assert accepted(found), found


@pytest.mark.parametrize(("factor", "shift"), [(1.2, 0.0), (0.8, 0.0), (1.0, 3.0)])
def test_other_noise_than_stated_is_noticed(table, factor: float, shift: float) -> None:
    assert not accepted(misses(repeated(table["sums"], factor, shift), truths(table)))


def test_without_noise_the_estimates_are_the_table(table) -> None:
    found, truth = estimate(SPEC, table["sums"], 0.0), truths(table)
    c = found["columns"]["bmi"]
    assert c["mean"]["estimate"] == pytest.approx(truth["mean"], rel=1e-6)
    assert c["variance"]["estimate"] == pytest.approx(truth["variance"], rel=1e-5)
    assert c["histogram"]["missing"]["noisy"] == pytest.approx(table["gone"].sum())
    for q in c["quantiles"]:
        assert abs(q["estimate"] - np.quantile(table["bmi"], q["p"])) < q["resolution"] / 2
    assert scaler(found)["bmi"] == pytest.approx((truth["mean"], truth["std"]), rel=1e-5)


def test_a_count_lost_in_the_noise_gives_no_ratio(table) -> None:
    found = estimate(SPEC, table["sums"] * 0.001, STD)
    c = found["columns"]["bmi"]
    assert c["mean"] is c["variance"] is found["metrics"]["accuracy"] is None
    assert scaler(found) == {}


def test_impossible_values_are_projected_and_marked(table) -> None:
    sums = table["sums"].copy()
    slots = {s.kind: s.start for s in SPEC.slots}
    sums[slots["square"]] = 0.0  # less than the squared mean
    sums[slots["correct"]] = 2 * N
    sums[slots["histogram"]] = -900.0
    found = estimate(SPEC, sums, STD)
    c = found["columns"]["bmi"]
    assert (c["variance"]["estimate"], c["variance"]["projected"]) == (0.0, True)
    assert found["metrics"]["accuracy"]["estimate"] == 1.0
    assert c["histogram"]["noisy"][0] == -900.0
    assert min(c["histogram"]["projected"]) == 0.0
    mean, spread = scaler(found)["bmi"]
    assert spread == pytest.approx(50 / math.sqrt(12))
    assert 10 <= mean <= 60


counts = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12).map(np.array)


@given(counts, st.floats(1e-3, 1e6))
def test_the_projection_is_the_nearest_point(values, total) -> None:
    got = project(values, total)
    assert got.min() >= 0
    assert got.sum() == pytest.approx(total, rel=1e-6)
    # optimality: what was not cut moved by one and the same amount, and what was cut would have moved below zero
    shift = (values - got)[got > 0]
    assert np.ptp(shift) <= 1e-6 * max(1.0, np.abs(values).max())
    assert (values[got == 0] <= shift.max() + 1e-6 * max(1.0, np.abs(values).max())).all()


@given(counts, st.floats(1, 1e6), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_quantiles_are_monotone_and_within_the_bounds(values, total, p, q) -> None:
    kept = project(values, total)
    edges = tuple(np.linspace(-3, 5, len(kept) + 1).tolist())
    low, high = (quantile(edges, kept, x, 0.0)["estimate"] for x in sorted((p, q)))
    assert -3 <= low <= high + 1e-9 <= 5 + 2e-9


@pytest.mark.parametrize("sums", [np.zeros(3), np.full(SPEC.parameters, np.nan)])
def test_a_sum_that_does_not_fit_is_refused(sums) -> None:
    with pytest.raises(DataError):
        estimate(SPEC, sums, 1.0)
