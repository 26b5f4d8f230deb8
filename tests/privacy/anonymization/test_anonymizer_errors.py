"""Bad input: what, where, how many, what to do, and never a record's value."""

# What is handed in is wrong on purpose.
# pyright: reportArgumentType=false

import pyarrow as pa
import pytest

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, ContractError, DataError, UsageError
from fedveil.privacy.anonymization.anonymizer import Anonymizer, contract_models
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import (
    AlphaK,
    BetaLikeness,
    DeltaDisclosure,
    DistinctL,
    EntropyL,
    KAnonymity,
    RecursiveCL,
    TCloseness,
)

SPEC = TableSpec((QuasiIdentifier("age"), QuasiIdentifier("city")), (Sensitive("ill"),), ("name",))
GOOD = {"name": ["secret-a", "secret-b", "secret-c", "secret-d"], "age": [31, 32, 33, 34],
        "city": ["secret-x", "secret-y"] * 2, "ill": ["secret-u", "secret-u", "secret-v", None]}  # fmt: skip


PLAIN = (KAnonymity(2),)


def run(models=PLAIN, spec=SPEC, change=None, **kwargs):
    return Anonymizer(spec, models, **kwargs).fit_transform(pa.table({**GOOD, **(change or {})}))


ROWS = {
    "k above n": (lambda: run([KAnonymity(5)]), AnonymityError, "k = 5 is more than the table's 4 rows"),
    "l above values": (lambda: run([DistinctL(3)]), AnonymityError, "2 different values of column 'ill'"),
    "entropy at the top": (lambda: run([EntropyL(2.0)]), AnonymityError, "the best reachable is 1.89"),
    "percent": (lambda: run(suppression_limit=5), ContractError, "0.05 is 5 %"),
    "negative limit": (lambda: run(suppression_limit=-0.1), ContractError, "not a share"),
    "nan limit": (lambda: run(suppression_limit=float("nan")), ContractError, "not a share"),
    "no criterion": (lambda: run([]), ContractError, "no criterion"),
    "unknown method": (lambda: run(method="best"), UsageError, "auto, fixed"),
    "fixed without levels": (lambda: run(method="fixed"), ContractError, "'age' has no fixed level"),
    "no role": (lambda: run(change={"extra": [1] * 4}), DataError, "1 columns have no role: 'extra'"),
    "not finite": (lambda: run(change={"age": [1.0, float("nan"), 2.0, float("inf")]}), DataError, "2 values"),
    "not sensitive": (lambda: run([TCloseness(0.3, "city")]), ContractError, "not declared sensitive"),
    "texts in order": (lambda: run([TCloseness(0.3, distance="ordered")]), ContractError, "declared order"),
    "no tree": (lambda: run([TCloseness(0.3, distance="hierarchical")]), ContractError, "no hierarchy"),
    "undeclared value": (
        lambda: run([DistinctL(2)], TableSpec(SPEC.quasi, (Sensitive("ill", ("other",)),), ("name",))),
        DataError, "'ill': 2 values",
    ),
    "not covered": (
        lambda: run(spec=TableSpec((SPEC.quasi[0], QuasiIdentifier("city", Hierarchy.from_rows([["x", "*"]]))),
                                   SPEC.sensitive, ("name",))),
        DataError, "'city': 2 different values are not in its hierarchy",
    ),
    "no specification": (lambda: Anonymizer({"a": 1}, PLAIN), UsageError, "not dict"),
    "a number for a criterion": (lambda: run([5]), ContractError, "int is not a list of criteria"),
    "a criterion for a list": (lambda: run(KAnonymity(2)), ContractError, "models=[KAnonymity(5)]"),
    "a class for a criterion": (lambda: run([KAnonymity]), ContractError, "not a list of criteria"),
    "limit as text": (lambda: run(suppression_limit="5%"), ContractError, "suppression_limit is not a number but str"),
    "limit as truth": (lambda: run(suppression_limit=True), ContractError, "not a number but bool"),
    "t as text": (lambda: TCloseness("0.2"), ContractError, "t is not a number but str"),
    "entropy as text": (lambda: EntropyL("2"), ContractError, "l is not a number but str"),
    "alpha as text": (lambda: AlphaK("0.5", 2), ContractError, "α is not a number but str"),
    "beta as text": (lambda: BetaLikeness("1"), ContractError, "β is not a number but str"),
    "delta as nothing": (lambda: DeltaDisclosure(None), ContractError, "δ is not a number but NoneType"),
    "c as text": (lambda: RecursiveCL("1", 2), ContractError, "c is not a number but str"),
    "names for columns": (lambda: TableSpec(("age",)), ContractError, "quasi is not a tuple of QuasiIdentifier"),
    "one name for a tuple": (lambda: TableSpec(SPEC.quasi, keep="name"), ContractError, "keep is not a tuple of str"),
    "level as text": (lambda: QuasiIdentifier("age", fixed_level="1"), ContractError, "fixed level is not a whole"),
    "texts as numbers": (
        lambda: run(spec=TableSpec((SPEC.quasi[0], QuasiIdentifier("city", numeric=True)), SPEC.sensitive, ("name",))),
        DataError, "'city': 2 different values are not numbers",
    ),
    "list as quasi-identifier": (lambda: run(change={"age": [[1], [2], [3], None]}), DataError, "texts: 'age'"),
    "struct as sensitive": (lambda: run(change={"ill": [{"a": 1}] * 4}), DataError, "texts: 'ill'"),
    "bytes as quasi-identifier": (lambda: run(change={"city": [b"a"] * 4}), DataError, "texts: 'city'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_refused_with_words_and_without_values(name):
    call, kind, words = ROWS[name]
    with pytest.raises(kind) as e:
        call()
    assert words in str(e.value)
    assert "secret" not in str(e.value)


def test_zero_rows_missing_and_repeated_columns():
    empty = pa.table(GOOD).slice(0, 0)
    with pytest.raises(DataError, match="no rows"):
        Anonymizer(SPEC, [KAnonymity(2)]).fit_transform(empty)
    with pytest.raises(DataError, match="1 columns are missing: 'city'"):
        Anonymizer(SPEC, [KAnonymity(2)]).fit_transform(pa.table(GOOD).drop_columns("city"))
    twice = pa.table([[1, 2], [1, 2]], names=["age", "age"])
    with pytest.raises(DataError, match="occur twice: 'age'"):
        Anonymizer(SPEC, [KAnonymity(2)]).fit_transform(twice)
    with pytest.raises(UsageError, match=r"pyarrow\.Table"):
        Anonymizer(SPEC, [KAnonymity(2)]).fit_transform([1])  # type: ignore[arg-type]


def test_too_many_quasi_identifiers_for_the_lattice():
    names = [f"q{i}" for i in range(18)]
    table = pa.table({n: list(range(8)) for n in names})
    spec = TableSpec(tuple(QuasiIdentifier(n) for n in names))
    for method in ("optimal", "peel"):
        with pytest.raises(UsageError, match="18 quasi-identifiers span 262144 combinations"):
            Anonymizer(spec, [KAnonymity(2)], method=method).fit_transform(table)
    auto = Anonymizer(spec, [KAnonymity(2)], method="auto")
    auto.fit_transform(table)
    assert auto.outcome.method == "mondrian"


def test_unreachable_within_the_suppression_limit():
    table = pa.table({"q": ["a"] * 5 + ["b"]})
    spec = TableSpec((QuasiIdentifier("q", fixed_level=0),))
    with pytest.raises(AnonymityError, match="1 of 6 rows in classes that fail"):
        Anonymizer(spec, [KAnonymity(2)], method="fixed", suppression_limit=0.1).fit_transform(table)
    assert Anonymizer(spec, [KAnonymity(2)], method="fixed", suppression_limit=0.2).fit_transform(table).num_rows == 5


def test_there_is_no_outcome_before_a_release():
    with pytest.raises(UsageError, match="fit_transform"):
        _ = Anonymizer(SPEC, [KAnonymity(2)]).outcome


HIERARCHIES = {
    "unequal depth": ([["a", "x", "*"], ["b", "*"]], "unequal depth"),
    "two parents": ([["a", "x", "r", "*"], ["b", "x", "s", "*"]], "two parents"),
    "twice": ([["a", "*"], ["a", "*"]], "twice"),
    "two meanings": ([["a", "b", "*"], ["b", "c", "*"], ["c", "c", "*"]], "two different groups"),
    "empty": ([], "0 rows"),
}


@pytest.mark.parametrize("name", HIERARCHIES)
def test_broken_hierarchies_are_refused(name):
    rows, words = HIERARCHIES[name]
    with pytest.raises(ContractError, match=words):
        Hierarchy.from_rows(rows, name="h")


def test_roles_are_unique():
    with pytest.raises(ContractError, match="'q' has two roles"):
        TableSpec((QuasiIdentifier("q"),), (Sensitive("q"),))
    with pytest.raises(ContractError, match="quasi-identifier"):
        TableSpec(())


def test_a_contract_is_a_specification():
    columns = [
        {"name": "id", "role": "identifier"},
        {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 99, "levels": [30, 60]},
        {"name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c"], "levels": [["a", "b"], ["c"]]},
        {"name": "y", "role": "target", "type": "category", "values": ["no", "yes"]},
    ]
    c = DataContract.model_validate(
        {"name": "t", "version": "1", "purpose": "p", "unit": "u", "k": 2, "l": 2, "sensitive_target": True,
         "columns": columns}
    )  # fmt: skip
    table = pa.table({"id": range(4), "age": [10.5, 20, 70, 99], "job": ["a", "b", "c", "c"],
                      "y": ["no", "yes", "no", "yes"]})  # fmt: skip
    a = Anonymizer(TableSpec.from_contract(c), contract_models(c), method="fixed")
    out = sorted(map(tuple, (r.values() for r in a.fit_transform(table).to_pylist())))
    assert [r[:2] for r in out] == [("[0,30)", "a|b")] * 2 + [("[60,99]", "c")] * 2
    assert a.stability.factor == 1
    with pytest.raises(DataError, match="outside the contract's bounds"):
        a.fit_transform(table.set_column(1, "age", pa.array([10.5, 20, 70, 430])))
