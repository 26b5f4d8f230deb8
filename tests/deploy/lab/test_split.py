"""``fedveil.split``: every form of data, every rule, each record at one site or held out, and named refusals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedveil
from fedveil.common.errors import DataError, UsageError
from fedveil.deploy.lab import partition
from fedveil.deploy.lab.partition import Dirichlet, Iid, Quantity, Shards

N = 60
TABLE = {
    "age": np.arange(N) % 50 + 20,
    "income": np.where(np.arange(N) % 7 == 0, np.nan, np.arange(N) * 1.5),
    "ward": np.array(["north", "south", "east"])[np.arange(N) % 3],
    "ill": np.array(["no", "yes"])[np.arange(N) // 2 % 2],
}


def rows(sites: fedveil.Sites) -> list[bytes]:
    pooled = [np.concatenate([sites.X_test, sites.pooled()[0]]), np.concatenate([sites.y_test, sites.pooled()[1]])]
    return sorted(x.tobytes() + bytes([c]) for x, c in zip(*pooled, strict=True))


def csv_of(tmp_path):
    path = tmp_path / "t.csv"
    lines = [",".join(TABLE)]
    lines += [",".join("" if v != v else str(v) for v in row) for row in zip(*TABLE.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def parquet_of(tmp_path):
    pq.write_table(pa.table(TABLE), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


@pytest.mark.parametrize("form", ["csv", "parquet", "mapping", "arrow"])
def test_every_form_of_a_table_gives_the_same_sites(form, tmp_path):
    data = {"csv": csv_of, "parquet": parquet_of, "mapping": lambda _: TABLE, "arrow": lambda _: pa.table(TABLE)}
    sites = fedveil.split(data[form](tmp_path), "ill", clients=4, seed=3)
    assert sites.features == ("age", "income", "income is missing", "ward=east", "ward=north", "ward=south")
    assert sites.labels == ("no", "yes")
    assert (len(sites), sites.records + len(sites.y_test), sites.classes) == (4, N, 2)
    assert rows(sites) == rows(fedveil.split(TABLE, "ill", clients=7, seed=5))
    assert sites.X_test.min() >= 0 <= 1 >= sites.X_test.max()


def test_arrays_and_data_sets_are_taken_as_they_are():
    X, y = np.random.default_rng(0).normal(size=(30, 2, 3)), np.arange(30) % 3
    pairs = [(x, int(c)) for x, c in zip(X, y, strict=True)]
    one, other = fedveil.split((X, y), clients=3), fedveil.split(pairs, clients=3)
    assert (
        rows(one)
        == rows(other)
        == sorted(x.astype(np.float32).tobytes() + bytes([c]) for x, c in zip(X.reshape(30, 6), y, strict=True))
    )


def test_a_column_decides_who_holds_what():
    sites = fedveil.split(TABLE, "ill", by="ward")
    assert sites.names == ("east", "north", "south")
    assert sites.features == ("age", "income", "income is missing")
    assert [len(y) for _, y in sites.parts] == [16, 16, 16]
    with pytest.raises(UsageError, match="has 3 values, not 4"):
        fedveil.split(TABLE, "ill", by="ward", clients=4)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from([Iid(), Dirichlet(0.05), Dirichlet(50.0), Shards(2), Quantity(0.1)]),
    clients=st.integers(1, 40), records=st.integers(1, 200), seed=st.integers(0, 1 << 32),
)  # fmt: skip
def test_each_record_is_at_one_site(rule, clients, records, seed):
    y = np.arange(records) % 5
    dealt = rule(y, clients, np.random.default_rng(seed))  # noqa: TID251
    assert len(dealt) == clients
    assert sorted(np.concatenate(dealt).tolist()) == list(range(records))


def test_the_rules_do_what_they_are_named_after():
    y, rng = np.arange(2000) % 10, np.random.default_rng(1)  # noqa: TID251
    kinds = [len(np.unique(y[i])) for i in Shards(2)(y, 20, rng)]
    assert max(kinds) <= 4 < min(len(np.unique(y[i])) for i in Iid()(y, 20, rng))
    sizes = [len(i) for i in Quantity(0.2)(y, 20, rng)]
    assert max(sizes) > 3 * 100 > 100 > 5 * min(sizes)


def test_empty_sites_are_allowed_and_counted():
    sites = fedveil.split("digits", clients=30, by=Dirichlet(0.005))
    assert sites.empty > 0
    assert f"{sites.empty} of them empty" in repr(sites)


def test_a_seed_repeats_the_split_and_again_deals_anew():
    a, b = (fedveil.split(TABLE, "ill", clients=3, seed=7) for _ in range(2))
    assert all(np.array_equal(x, z) for (x, _), (z, _) in zip(a.parts, b.parts, strict=True))
    assert a.again is not None
    other = a.again(8)
    assert not all(np.array_equal(x, z) for (x, _), (z, _) in zip(a.parts, other.parts, strict=True))
    assert rows(other) == rows(a)


class NoLength:
    def __getitem__(self, i):
        return np.zeros(3), 0


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: fedveil.split(NoLength()), DataError, "no length"),
        (lambda: fedveil.split([(np.zeros(3), 0), (np.zeros(4), 1)]), DataError, "pairs of a record and its class"),
        (lambda: fedveil.split([(np.zeros(3), "a"), (np.zeros(3), "b")]), DataError, "pairs of a record"),
        (lambda: fedveil.split((np.zeros((3, 2)), np.zeros(4))), DataError, "3 records and 4 classes"),
        (lambda: fedveil.split((np.full((2, 2), np.nan), [0, 1])), DataError, "not a finite number"),
        (lambda: fedveil.split((np.zeros((2, 2)), [0.5, 1.0])), DataError, "no classes"),
        (lambda: fedveil.split((np.zeros((2, 2)), [1, 1])), DataError, "one value only"),
        (lambda: fedveil.split(TABLE, "cured"), UsageError, "no column 'cured'"),
        (lambda: fedveil.split(TABLE), UsageError, "which column"),
        (lambda: fedveil.split({**TABLE, "ill": [None, *["yes"] * (N - 1)]}, "ill"), DataError, "missing in 1 records"),
        (lambda: fedveil.split({"id": [f"p{i}" for i in range(99)], "ill": [0, 1, 0] * 33}, "ill"), DataError, "texts"),
        (lambda: fedveil.split({**TABLE, "id": [1, 2]}, "ill"), DataError, "different lengths"),
        (lambda: fedveil.split("t.xlsx", "ill"), UsageError, r"no \.csv"),
        (lambda: fedveil.split("none.csv", "ill"), DataError, "cannot be read"),
        (lambda: fedveil.split("letters"), UsageError, "unknown dataset"),
        (lambda: fedveil.split(TABLE, "ill", test=1.0), UsageError, "test = 1.0"),
        (lambda: fedveil.split(TABLE, "ill", clients=0), UsageError, "0 clients"),
        (lambda: fedveil.split(3), UsageError, "no table"),
        (lambda: fedveil.split((np.zeros((4, 2)), [0, 1, 0, 1]), by="ward"), UsageError, "no column 'ward'"),
        (lambda: Dirichlet(0), UsageError, "alpha"),
        (lambda: Shards(0), UsageError, "0 shards"),
    ],
)  # fmt: skip
def test_what_makes_no_sites_is_refused_by_name(call, error, said):
    with pytest.raises(error, match=said) as e:
        call()
    assert e.value.hint


def test_rules_by_name():
    assert partition.parse("iid") == Iid()
    assert partition.parse("dirichlet:0.3") == Dirichlet(0.3)
    assert partition.parse("dirichlet") == Dirichlet(0.5)
    assert partition.parse("shards:4") == Shards(4)
    assert partition.parse("column:ward") == "ward"
    for wrong in ("", "iid:2", "shards:x", "shards:1.5", "evenly", "column:"):
        with pytest.raises(UsageError, match="dealt out"):
            partition.parse(wrong)


class TestSitesOfOnesOwn:
    """``fedveil.Sites`` made by hand: what no run can use is refused where it is made."""

    def make(self, **change):
        X, y = np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1])
        given = {"parts": [(X, y), (X[:0], y[:0])], "X_test": X, "y_test": y, "classes": 2}
        return fedveil.Sites(**{**given, **change})

    def test_a_site_without_a_record_is_allowed_and_counted(self, tmp_path):
        sites = self.make()
        assert sites.empty == 1
        assert "1 of them empty" in repr(sites)
        parts = [*fedveil.split("trivial", clients=5).parts, (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))]
        whole = fedveil.split("trivial", clients=5)
        sites = fedveil.Sites(parts, whole.X_test, whole.y_test, whole.classes)
        run = fedveil.simulate(None, sites, sum="plain", steps=2, out=tmp_path / "run", compare=False, quiet=True)
        assert run.status == "COMPLETED"
        assert run.plan.sites == 6

    @pytest.mark.parametrize(
        ("change", "said", "works"),
        [
            ({"classes": 1}, "site 0 has a class outside 0 to 0", "from 0"),
            ({"y_test": np.array([0, 1, 2, 0])}, "the test table has a class outside 0 to 1", "fedveil.split"),
            ({"y_test": np.array([0, 1, -1, 0])}, "the test table has a class outside", "fedveil.split"),
            ({"X_test": np.zeros((4, 2), np.float32)}, "site 0 has inputs of shape \\(4, 3\\)", "\\(n, 2\\)"),
            ({"y_test": np.array([0, 1])}, "the test table has inputs of shape", "\\(n,\\)"),
            ({"parts": []}, "no site", "one pair"),
        ],
    )
    def test_refusals(self, change, said, works):
        with pytest.raises(DataError, match=said) as e:
            self.make(**change)
        assert works.replace("\\", "") in e.value.hint
