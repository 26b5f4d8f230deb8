"""The data contract: what it refuses, what it fixes, and what its signature is worth."""

import json
import subprocess
import sys
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedveil.common import canonical, identity
from fedveil.common.contract import DOMAIN, Column, DataContract, load_signed, open_contract, sign_contract
from fedveil.common.errors import ContractError

AGE = {"name": "age", "role": "quasi", "type": "number", "low": 18, "high": 80, "levels": [50]}
SEX = {"name": "sex", "role": "quasi", "type": "category", "values": [1, 2], "levels": [[1], [2]]}
BMI = {"name": "bmi", "role": "feature", "type": "number", "low": 10, "high": 60, "unit": "kg/m²"}
JOB = {"name": "job", "role": "sensitive", "type": "category", "values": ["a", "b", "c"], "levels": [["a", "b"], ["c"]]}
END = {"name": "end", "role": "target", "type": "number", "low": 0, "high": 400, "threshold": 140.5}
NAME = {"name": "patient", "role": "identifier"}


def draft(*columns, **changes):
    base = {"name": "demo", "version": "1", "purpose": "a test", "unit": "one row = one record", "k": 5, "l": 2}
    base |= {"sensitive_target": True, "columns": list(columns) or [NAME, AGE, SEX, BMI, END]}
    return deepcopy({**base, **changes})


def build(*columns, **changes):
    return DataContract.model_validate(draft(*columns, **changes))


def test_fixes_names_labels_and_width():
    c = build(NAME, AGE, SEX, {**BMI, "missing": "indicator"}, JOB, END)
    assert c.feature_names == ("age=[18,50)", "age=[50,80]", "sex=1", "sex=2", "bmi", "bmi=missing")
    assert c.width == 6
    assert c.target.labels == ("<=140.5", ">140.5")
    assert c.classes == 2
    assert [x.name for x in c.loaded] == ["age", "sex", "bmi", "job", "end"]
    assert [x.name for x in c.sensitive] == ["job", "end"]
    assert c.sensitive[0].labels == ("a|b", "c")
    assert Column.model_validate({**JOB, "as_feature": True}).feature_names == ("job=a|b", "job=c")
    assert Column.model_validate({**AGE, "as_feature": False}).feature_names == ()
    assert Column.model_validate({**AGE, "levels": []}).labels == ("[18,80]",)
    with pytest.raises(ValidationError, match="frozen"):
        c.k = 2  # pyright: ignore[reportAttributeAccessIssue]


REFUSED = {
    "gap": (draft({**AGE, "levels": [18]}, SEX, END), "between its bounds"),
    "cut out of bounds": (draft({**AGE, "levels": [50, 90]}, SEX, END), "between its bounds"),
    "boundary in two bins": (draft({**AGE, "levels": [50, 50]}, SEX, END), "do not increase"),
    "cuts not in order": (draft({**AGE, "levels": [60, 50]}, SEX, END), "do not increase"),
    "value in two groups": (draft({**SEX, "levels": [[1, 2], [2]]}, AGE, END), "two groups"),
    "group misses a leaf": (draft({**SEX, "levels": [[1]]}, AGE, END), "no group"),
    "no groups at all": (draft({**SEX, "levels": []}, AGE, END), "no group"),
    "group with a foreign leaf": (draft({**SEX, "levels": [[1], [2, 3]]}, AGE, END), "unknown leaves"),
    "empty group": (draft({**SEX, "levels": [[1, 2], []]}, AGE, END), "not groups"),
    "groups for a number": (draft({**AGE, "levels": [["a"]]}, SEX, END), "not cut points"),
    "cuts for a category": (draft({**SEX, "levels": [1.5]}, AGE, END), "not groups"),
    "groups that read alike": (draft({**SEX, "values": ["1", "2", "1|2"], "levels": [[1, 2], ["1|2"]]}, END), "alike"),
    "quasi without levels": (draft({k: v for k, v in AGE.items() if k != "levels"}, END), "no levels"),
    "sensitive number without levels": (draft(AGE, {**BMI, "role": "sensitive"}, END), "no levels"),
    "feature with levels": (draft({**BMI, "levels": [20]}, AGE, END), "has levels"),
    "quasi also target": (draft(AGE, SEX, {**END, "levels": [50]}), "role is 'target'"),
    "duplicated column": (draft(AGE, AGE, SEX, END), "declared twice: 'age'"),
    "duplicated leaf": (draft({**SEX, "values": [1, 1]}, AGE, END), "declared twice"),
    "duplicated missing code": (draft({**BMI, "missing_codes": ["?", "?"]}, END), "missing codes"),
    "low = high": (draft({**BMI, "low": 60}, AGE, END), "low is not below high"),
    "no bounds": (draft({k: v for k, v in BMI.items() if k != "high"}, AGE, END), "no public bounds"),
    "infinite bound": (draft({**BMI, "high": float("inf")}, AGE, END), "finite"),
    "bounds of a category": (draft({**SEX, "low": 0, "high": 3}, AGE, END), "bounds"),
    "values of a number": (draft({**BMI, "values": ["x"]}, AGE, END), "lists values"),
    "category without values": (draft({**SEX, "values": []}, AGE, END), "no values"),
    "no target": (draft(AGE, SEX), "0 target columns"),
    "two targets": (draft(AGE, END, {**END, "name": "end2"}), "2 target columns"),
    "no feature": (draft(NAME, END), "no column is a training feature"),
    "no threshold": (draft(AGE, {k: v for k, v in END.items() if k != "threshold"}), "threshold"),
    "threshold out of bounds": (draft(AGE, {**END, "threshold": 400}), "threshold"),
    "threshold of a feature": (draft(AGE, {**BMI, "threshold": 20}, END), "threshold"),
    "target that may be missing": (draft(AGE, {**END, "missing": "indicator"}), "missing target"),
    "one class": (draft(AGE, {"name": "y", "role": "target", "type": "category", "values": ["a"]}, l=1), "two classes"),
    "k = 1": (draft(k=1), "k = 1"),
    "l = 0": (draft(l=0), "l = 0"),
    "l without anything sensitive": (draft(sensitive_target=False), "nothing is sensitive"),
    "l over the classes": (draft(l=3), "distinct values: 'end'"),
    "l over the groups": (draft(AGE, JOB, END, l=3, sensitive_target=False), "distinct values: 'job'"),
    "no role": (draft({"name": "age", "type": "number"}, END), "role"),
    "no type": (draft({"name": "age", "role": "feature"}, END), "no type"),
    "unknown field": (draft(surprise=1), "surprise"),
    "unknown field of a column": (draft({**AGE, "lvls": [1]}, END), "lvls"),
    "unseen without the leaf": (draft({**SEX, "unseen": "other"}, END), "no leaf 'other'"),
    "missing code that is a leaf": (draft({**SEX, "missing_codes": [2]}, END), "also values"),
    "too much suppression": (draft(suppression_limit=0.6), "suppression_limit"),
    "control characters": (draft({**BMI, "name": "b\nmi"}, END), "control characters"),
    "not a table": ([1, 2], "malformed"),
    "feature names clash": (
        draft({**SEX, "name": "a", "values": ["b=c"], "levels": [["b=c"]]}, {**SEX, "name": "a=b", "values": ["c"],
               "levels": [["c"]]}, END), "feature names"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    payload, words = REFUSED[case]
    with pytest.raises(ContractError, match=words) as e:
        DataContract.model_validate(payload)
    assert e.value.exit_code == 20


def test_hash_depends_on_meaning_not_on_spelling():
    explicit = draft({**AGE, "missing": "error", "levels": [50.0]}, SEX, BMI, END)
    assert DataContract.model_validate(explicit).hash == build(AGE, SEX, BMI, END).hash
    changed = [build(AGE, BMI, SEX, END), build({**AGE, "levels": [51]}, SEX, BMI, END), build(AGE, SEX, BMI, END, k=6)]
    hashes = {c.hash for c in changed} | {build(AGE, SEX, BMI, END).hash}
    assert len(hashes) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(19, 79), unique=True, max_size=8).map(sorted), st.booleans())
def test_every_value_lies_under_exactly_one_label(cuts, indicator):
    column = Column.model_validate({**AGE, "levels": cuts, "missing": "indicator" if indicator else "error"})
    assert len(column.labels) == len(set(column.labels)) == len(cuts) + 1
    assert len(column.feature_names) == len(cuts) + 1 + indicator
    for value in range(18, 81):
        inside = 0
        for label in column.labels:
            low, high = map(float, label[1:-1].split(","))
            inside += low <= value < high or (label.endswith("]") and value == high)
        assert inside == 1


def test_signature_round_trip_through_json():
    key, contract = identity.new_signing_key(), build()
    document = json.loads(json.dumps(sign_contract(contract, key)))
    opened = open_contract(document, identity.public_hex(key))
    assert opened == contract
    assert opened.hash == contract.hash


def _altered(document, key):
    terse = {"v": 2, "contract": draft(), "hash": canonical.digest(draft())}
    return {
        "unsigned": document["payload"],
        "other signer": sign_contract(build(), identity.new_signing_key()),
        "altered k": {**document, "payload": {**document["payload"], "contract": build(k=6).payload}},
        "signature cut": {**document, "signature": document["signature"][:-2]},
        "not an object": ["payload"],
        "nothing": None,
        "hash mismatch": identity.signed(key, DOMAIN, {"v": 2, "contract": build().payload, "hash": "0" * 64}),
        "defaults left out": identity.signed(key, DOMAIN, terse),
        "version 1": identity.signed(key, DOMAIN, {**document["payload"], "v": 1}),
        "bare contract": identity.signed(key, DOMAIN, build().payload),
        "inconsistent": identity.signed(key, DOMAIN, {"v": 2, "contract": draft(k=1), "hash": "0" * 64}),
        "made for another purpose": identity.signed(key, "fedveil/roster/1", document["payload"]),
    }  # fmt: skip


ALTERATIONS = sorted(_altered(sign_contract(build(), k0 := identity.new_signing_key()), k0))


@pytest.mark.parametrize("how", ALTERATIONS)
def test_altered_documents_are_refused(how):
    key = identity.new_signing_key()
    document = sign_contract(build(), key)
    with pytest.raises(ContractError):
        open_contract(_altered(document, key)[how], identity.public_hex(key))


def test_load_toml_and_json_agree(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(draft(AGE, SEX, END)))
    (tmp_path / "c.toml").write_text(
        """
        name = "demo"
        version = "1"
        purpose = "a test"
        unit = "one row = one record"
        k = 5
        l = 2
        sensitive_target = true
        [[columns]]
        name = "age"
        role = "quasi"
        type = "number"
        low = 18
        high = 80
        levels = [50]
        [[columns]]
        name = "sex"
        role = "quasi"
        type = "category"
        values = [1, 2]
        levels = [[1], [2]]
        [[columns]]
        name = "end"
        role = "target"
        type = "number"
        low = 0
        high = 400
        threshold = 140.5
        """
    )
    assert DataContract.load(tmp_path / "c.toml").hash == DataContract.load(tmp_path / "c.json").hash


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", "k = = 1"),
        ("c.toml", "\udcff"),
        ("c.json", '{"k": 1, "k": 2}'),
        ("c.json", '{"k": NaN}'),
        ("c.json", "[]"),
        ("c.yaml", "k: 1"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ContractError):
        DataContract.load(tmp_path / name)


def test_absent_and_unsigned_files_are_refused(tmp_path):
    with pytest.raises(ContractError, match="cannot be read"):
        DataContract.load(tmp_path / "none.toml")
    (tmp_path / "signed.json").write_text("{not json")
    with pytest.raises(ContractError, match="not a signed contract"):
        load_signed(tmp_path / "signed.json", "0" * 64)


def test_needs_neither_torch_nor_flwr_nor_arrow():
    code = "import sys, fedveil.common.contract; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "fedveil.common.contract" in out.split()
    assert not {"torch", "flwr", "pyarrow"} & {m.partition(".")[0] for m in out.split()}
