"""Hierarchies, dates, masks, consent, expiry: what a contract accepts, what it refuses, and what it makes of them."""

import datetime as dt
import itertools
import re
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common import identity
from fedveil.common.contract import Column, DataContract, hierarchies, load_signed, open_contract, sign_contract
from fedveil.common.contract import dates as contract_dates
from fedveil.common.errors import ContractError

Y = {"name": "y", "role": "target", "type": "category", "values": ["no", "yes"]}
JOB_ROWS = [["nurse", "care", "*"], ["medic", "care", "*"], ["clerk", "office", "*"]]
JOB = {"name": "job", "role": "quasi", "type": "category", "values": ["nurse", "medic", "clerk"], "hierarchy": JOB_ROWS,
       "level": 1}  # fmt: skip
AGE = {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "ladder": [[20, 50, 70], [50], []],
       "level": 1}  # fmt: skip
BORN = {"name": "born", "role": "quasi", "type": "date", "format": "%d.%m.%Y", "low": "1920-01-01",
        "high": "2020-12-31", "levels": "decade"}  # fmt: skip
ZIP = {"name": "zip", "role": "quasi", "type": "category", "mask": {"keep": 1, "length": 5}, "unseen": "other",
       "values": "digits", "hierarchy": "mask", "level": 0}  # fmt: skip


def draft(*columns, **changes):
    base = {"name": "demo", "version": "1", "purpose": "a test", "unit": "one row = one record", "k": 5}
    return deepcopy({**base, "columns": list(columns) or [JOB, Y], **changes})


def build(*columns, **changes):
    return DataContract.model_validate(draft(*columns, **changes))


def test_a_level_of_a_hierarchy_gives_groups_and_labels():
    job = Column.model_validate(JOB)
    assert job.labels == ("care", "office")
    assert job.groups == (("nurse", "medic"), ("clerk",))
    assert [s.labels for s in job.steps] == [("nurse", "medic", "clerk"), ("care", "office"), ("*",)]
    age = Column.model_validate(AGE)
    assert age.labels == ("[0,20)", "[20,50)", "[50,70)", "[70,100]")
    assert [s.labels for s in age.steps][1:] == [("[0,50)", "[50,100]"), ("[0,100]",)]
    assert Column.model_validate({**AGE, "level": 3}).cuts == ()
    assert age.feature_names[0] == "age=[0,20)"


def test_dates_are_days_with_iso_labels():
    born = Column.model_validate(BORN)
    assert (born.type, born.low) == ("number", (dt.date(1920, 1, 1) - dt.date(1970, 1, 1)).days)
    assert len(born.labels) == 11
    assert born.labels[0] == "[1920-01-01,1930-01-01)"
    assert born.labels[-1] == "[2020-01-01,2020-12-31]"
    assert Column.model_validate({**BORN, "levels": ["1950-06-01"]}).labels[1] == "[1950-06-01,2020-12-31]"
    assert Column.model_validate(born.model_dump(mode="json")) == born  # the canonical form reads back


@settings(max_examples=60, deadline=None)
@given(st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)), st.integers(0, 3000),
       st.sampled_from(["month", "quarter", "year", "decade"]))  # fmt: skip
def test_periods_begin_on_the_first_of_a_month(start, length, period):
    low = float((start - contract_dates.EPOCH).days)
    cuts = list(contract_dates.boundaries(period, low, low + length))
    assert all(low < c < low + length for c in cuts)
    dates = [contract_dates.EPOCH + dt.timedelta(days=c) for c in cuts]
    months = contract_dates.PERIODS[period]
    assert all(d.day == 1 and (d.year * 12 + d.month - 1) % months == 0 for d in dates)
    # Complete: every day that begins a period inside the bounds is there.
    inside = (start + dt.timedelta(days=i) for i in range(1, length))
    assert len(dates) == sum(d.day == 1 and (d.year * 12 + d.month - 1) % months == 0 for d in inside)


def test_regular_intervals():
    age = {**{k: v for k, v in AGE.items() if k not in ("ladder", "level")}, "levels": {"every": 30, "origin": 10}}
    assert Column.model_validate(age).cuts == (10, 40, 70)
    assert Column.model_validate({**age, "levels": {"every": 50}}).cuts == (50,)
    for wrong in ({"every": 0}, {"every": -1}, {"each": 3}, {"every": 1e-9}, {"every": "x"}, {}):
        with pytest.raises(ContractError, match="not understood"):
            Column.model_validate({**age, "levels": wrong})


def test_a_masked_postcode():
    column = Column.model_validate(ZIP)
    assert column.values == (*(f"{i}****" for i in range(10)), "other")
    assert [len(s.labels) for s in column.steps] == [11, 1]
    three = hierarchies.mask_rows(["94110", "94120", "other"])
    assert three[0] == ("94110", "9411*", "941**", "94***", "9****", "*****")
    assert three[2] == ("other",) * 5 + ("*****",)


def test_arx_files(tmp_path):
    (tmp_path / "job.csv").write_text("nurse;care;*\nmedic;care;*\nclerk;office;*\n")
    (tmp_path / "age.csv").write_text(
        "".join(f"{i};{i // 5 * 5}-{i // 5 * 5 + 4};{i // 10}x;*\n" for i in range(1, 21))
    )
    (tmp_path / "c.toml").write_text(
        'name = "d"\nversion = "1"\npurpose = "p"\nunit = "u"\nk = 2\n'
        '[[columns]]\nname = "job"\nrole = "quasi"\ntype = "category"\nhierarchy = "job.csv"\nlevel = 1\n'
        '[[columns]]\nname = "age"\nrole = "quasi"\ntype = "number"\nlow = 1\nhigh = 20\n'
        'hierarchy = "age.csv"\nlevel = 2\n'
        '[[columns]]\nname = "y"\nrole = "target"\ntype = "category"\nvalues = ["no", "yes"]\n'
    )
    c = DataContract.load(tmp_path / "c.toml")
    assert c.columns[0].values == ("nurse", "medic", "clerk")
    assert c.columns[1].ladder == ((5, 10, 15), (10,), ())
    assert c.columns[1].labels == ("[1,10)", "[10,20]")


FILES = {
    "unequal depth": ("a;x;*\nb;*\n", "unequal depth: 1 lines"),
    "one level": ("a\nb\n", "1 levels"),
    "empty label": ("a;;*\nb;x;*\n", "empty label"),
    "empty": ("", "0 lines"),
    "open quote": ('a;"x;*\n', "not well-formed"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_hierarchy_files(tmp_path, case):
    (tmp_path / "h.csv").write_text(FILES[case][0])
    with pytest.raises(ContractError, match=FILES[case][1]):
        hierarchies.read_rows(tmp_path / "h.csv")
    with pytest.raises(ContractError, match="cannot be read"):
        hierarchies.read_rows(tmp_path / "none.csv")


def test_hierarchy_files_of_other_encodings(tmp_path):
    (tmp_path / "h.csv").write_bytes("\ufeffa,x,*\r\nb,y,*\r\n".encode())
    assert hierarchies.read_rows(tmp_path / "h.csv") == (("a", "x", "*"), ("b", "y", "*"))
    (tmp_path / "h.csv").write_bytes(b"\xff;x;*\n")
    with pytest.raises(ContractError, match="cannot be read"):
        hierarchies.read_rows(tmp_path / "h.csv")


REFUSED = {
    "value not covered": (draft({**JOB, "hierarchy": JOB_ROWS[:2]}, Y), "has no line for these leaves: 'clerk'"),
    "leaf with two parents": (draft({**JOB, "hierarchy": [*JOB_ROWS, ["clerk", "care", "*"]]}, Y), "two parents"),
    "label with two parents": (
        draft({**JOB, "hierarchy": [["nurse", "care", "x"], ["medic", "care", "y"], ["clerk", "office", "x"]]}, Y),
        "a label has two parents: 'care'",
    ),
    "label with two meanings": (
        draft({**JOB, "values": ["x", "y"], "hierarchy": [["x", "y", "*"], ["y", "a", "*"]]}, Y),
        "one label for two different groups: 'y'",
    ),
    "label that reads as any value": (
        draft({**JOB, "hierarchy": [["nurse", "*", "all"], ["medic", "*", "all"], ["clerk", "office", "all"]]}, Y),
        "means any value",
    ),
    "a day before the year 1": (draft({**BORN, "low": -1e12}, Y), "low of 'born' is not a day"),
    "a cut after the year 9999": (draft({**BORN, "levels": [1e9]}, Y), "a cut of 'born' is not a day"),
    "low above high": (draft({**BORN, "low": "2021-01-01"}, Y), "low is not below high"),
    "unequal depth": (draft({**JOB, "hierarchy": [*JOB_ROWS[:2], ["clerk", "*"]]}, Y), "unequal depth"),
    "leaf that is no value": (draft({**JOB, "hierarchy": [*JOB_ROWS, ["smith", "care", "*"]]}, Y), "are not values"),
    "level above the top": (draft({**JOB, "level": 3}, Y), "not in its hierarchy"),
    "level of no hierarchy": (draft({**AGE, "ladder": []}, JOB, Y), "not in its hierarchy"),
    "levels and level": (draft({**JOB, "levels": [["nurse", "medic", "clerk"]]}, Y), "both levels and a level"),
    "ladder: two parents": (draft({**AGE, "ladder": [[20, 50], [30]]}, Y), "a bin has two parents"),
    "ladder: boundary in two bins": (draft({**AGE, "ladder": [[20, 20]]}, Y), "do not increase"),
    "ladder: gap": (draft({**AGE, "ladder": [[20, 100]]}, Y), "between its bounds"),
    "ladder: other order": (draft({**AGE, "ladder": [[50], [20, 50]]}, Y), "two parents"),
    "hierarchy of a number": (draft({**AGE, "hierarchy": JOB_ROWS}, Y), "lists values"),
    "date without a format": (draft({k: v for k, v in BORN.items() if k != "format"}, Y), "ambiguous"),
    "two-digit year": (draft({**BORN, "format": "%d.%m.%y"}, Y), "date format"),
    "day without month": (draft({**BORN, "format": "%d-%Y"}, Y), "month"),
    "not a date": (draft({**BORN, "low": "1.1.1920"}, Y), "low of 'born' is not a date"),
    "no such period": (draft({**BORN, "levels": "week"}, Y), "not a period"),
    "period of a number": (draft({**AGE, "ladder": [], "level": None, "levels": "year"}, Y), "no dates"),
    "format of a category": (draft({**JOB, "format": "%Y"}, Y), "is not a date"),
    "mask keeps too much": (draft({**ZIP, "values": ["941**"], "unseen": "error", "mask": {"keep": 6, "length": 5}}, Y),
                            "keeps more"),
    "digits without a mask": (draft({**ZIP, "mask": {"keep": 9, "length": 9}}, Y), "'digits'"),
    "percent": (draft(suppression_limit=5), r"percentage.*write 0.05 for 5 %"),
    "t above 1": (draft(t=1.5, sensitive_target=True), "outside"),
    "t below 0": (draft(t=-0.1, sensitive_target=True), "outside"),
    "t without anything sensitive": (draft(t=0.2), "nothing is sensitive"),
    "quasi-identifier that is target": (draft(JOB, {**Y, "name": "job"}), "quasi-identifier and target at once: 'job'"),
    "consent by an unknown column": (draft(consent={"column": "c", "granted": ["1"]}), "not declared: 'c'"),
    "retention without dates": (draft(retention={"column": "job", "days": 10}), "no dates"),
    "near duplicates by no key": (draft(quality={"near_duplicates": "drop"}), "needs a near_key"),
    "expires on no day": (draft(expires="31.12.2027"), "expires is not a date"),
    "outliers to missing": (draft({**AGE, "outliers": "missing"}, Y), "takes no missing values"),
    "pseudonym of a feature": (draft({**JOB, "pseudonym": True}, Y), "pseudonym"),
    "sets of a target": (draft(JOB, {**Y, "encoding": "sets"}), "takes no encoding"),
    "hierarchy by name": (draft({**JOB, "hierarchy": "job.csv"}, Y), "names a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    payload, words = REFUSED[case]
    with pytest.raises(ContractError, match=words) as refused:
        DataContract.model_validate(payload)
    assert refused.value.hint  # what to do stands beside what is wrong


@pytest.mark.parametrize("text", ["name = ", "[[columns]\n", '{"a": 1,}'])
def test_a_malformed_draft_says_where_and_what_to_do(tmp_path, text):
    path = tmp_path / ("c.json" if text.startswith("{") else "c.toml")
    path.write_text(text)
    with pytest.raises(ContractError, match="not well-formed") as refused:
        DataContract.load(path)
    assert "syntax" in refused.value.hint
    assert path.suffix == ".json" or "(" in refused.value.message  # TOML: where


@pytest.mark.parametrize("missing", [{7}, set(range(1, 21)), {1, 2}])
def test_ladders_from_files_have_no_gaps(missing):
    rows = tuple((str(i), "x", "*") for i in range(1, 21) if i not in missing)
    with pytest.raises(ContractError, match=f"gap: {len(missing)} whole"):
        hierarchies.ladder_from_rows(rows, 1, 20, "age")


def test_a_label_of_a_number_is_one_interval():
    rows = tuple((str(i), "ab"[i in (3, 4)], "*") for i in range(1, 8))
    with pytest.raises(ContractError, match="two intervals"):
        hierarchies.ladder_from_rows(rows, 1, 7, "age")
    with pytest.raises(ContractError, match="one line per whole number"):
        hierarchies.ladder_from_rows((("1.5", "*"),), 1, 2, "age")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_level_partitions_the_leaves(data):
    """A random tree is accepted, and each of its levels holds every leaf exactly once, coarser over finer."""
    leaves = [f"v{i}" for i in range(data.draw(st.integers(2, 12)))]
    rows, current = [[v] for v in leaves], leaves
    for depth in range(data.draw(st.integers(1, 4))):
        distinct = list(dict.fromkeys(current))
        parent = {v: f"d{depth}-{data.draw(st.integers(0, 3))}" for v in distinct}
        current = [parent[v] for v in current]
        for row, label in zip(rows, current, strict=True):
            row.append(label)
    column = Column.model_validate({**JOB, "values": leaves, "hierarchy": rows, "level": 1})
    for step in column.steps:
        assert sorted(itertools.chain(*step.groups)) == sorted(leaves)
        assert len(set(step.labels)) == len(step.labels) == len(step.groups)
    for fine, coarse in itertools.pairwise(column.steps):
        assert all(any(set(g) <= set(h) for h in coarse.groups) for g in fine.groups)


def test_an_expired_contract_is_refused(tmp_path):
    key = identity.new_signing_key()
    document = sign_contract(build(expires="2027-01-31"), key)
    public = identity.public_hex(key)
    assert open_contract(document, public, today=dt.date(2027, 1, 31)).expires == "2027-01-31"
    with pytest.raises(ContractError, match="expired after 2027-01-31"):
        open_contract(document, public, today=dt.date(2027, 2, 1))
    with pytest.raises(ContractError, match="expired"):  # the real clock
        open_contract(sign_contract(build(expires="2001-01-01"), key), public)
    with pytest.raises(ContractError, match="cannot be read"):
        load_signed(tmp_path / "none.json", public)


def test_a_draft_with_open_roles_is_refused(tmp_path):
    (tmp_path / "c.toml").write_text(
        'name = "d"\nversion = "1"\npurpose = "p"\nunit = "u"\nk = 2\n[[columns]]\nname = "a"\nrole = ""\n'
        '[[columns]]\nname = "b"\n[[columns]]\nname = "y"\nrole = "target"\n'
    )
    with pytest.raises(ContractError, match="2 columns have no role: 'a', 'b'.*none is guessed"):
        DataContract.load(tmp_path / "c.toml")


def test_sets_have_one_input_per_leaf_whatever_the_levels():
    fine = build({**JOB, "level": 0, "encoding": "sets"}, {**AGE, "encoding": "sets", "missing": "indicator"}, Y)
    coarse = build({**JOB, "level": 2, "encoding": "sets"}, {**AGE, "level": 3, "encoding": "sets",
                   "missing": "indicator"}, Y)  # fmt: skip
    assert fine.feature_names == coarse.feature_names
    assert fine.feature_names == ("job=nurse", "job=medic", "job=clerk", "age", "age=width", "age=missing")


def test_date_formats_match_what_they_describe():
    for form, good, bad in (
        ("%d.%m.%Y", "1.12.2020", "2020-12-01"), ("%Y-%m-%d", "2020-12-01T10:00:00Z", "1.12.2020"),
        ("%Y", "1999", "99"), ("%Y%m%d", "20201231", "201231"),
    ):  # fmt: skip
        assert re.match(contract_dates.pattern(form), good)
        assert not re.match(contract_dates.pattern(form), bad)
