"""Consent, identifiers, duplicates, corrections, outliers; what each does to neighbouring tables is measured."""

import datetime as dt
import json
import secrets
from collections import Counter

import numpy as np
import pytest

from fedveil.client.records import lineage
from fedveil.client.records.judge import page, stages
from fedveil.client.records.read import corrections, pseudonym
from fedveil.client.records.read.corrections import Correction
from fedveil.client.records.read.sources import Rules, read
from fedveil.client.records.release.pipeline import ingest
from fedveil.common import identity
from fedveil.common.errors import ConfigError, DataError, VerificationError

HEADER = ["patient", "age", "job", "dose", "grade", "y", "agreed", "seen_on"]
TODAY = dt.date(2026, 6, 1)


def extended(make, **changes):
    columns = make().payload["columns"]
    columns[0]["pseudonym"] = changes.pop("pseudonym", False)
    extra = [
        {"name": "agreed", "role": "drop"},
        {"name": "seen_on", "role": "drop", "type": "date", "format": "%d.%m.%Y"},
    ]
    for c in columns:
        c.update(changes.pop(c["name"], {}))
    return make(columns=[*columns, *extra], **changes)


def with_rules(rows):
    return [[*r, "yes" if i % 4 else "no", "01.03.2026" if i % 3 else "01.03.2020"] for i, r in enumerate(rows)]


RULES = {"consent": {"column": "agreed", "granted": ["yes"]}, "retention": {"column": "seen_on", "days": 365}}


def test_only_rows_with_consent_and_within_retention(make, rows, table):
    raw = read(table(with_rules(rows), HEADER), extended(make, **RULES), None, Rules(today=TODAY))
    kept = [i for i in range(len(rows)) if i % 4 and i % 3]
    assert raw.rows == len(kept)
    assert raw.columns["age"].tolist() == [float(rows[i][1]) for i in kept]
    assert (raw.tally.read, raw.tally.usable.refused, raw.tally.usable.expired) == (24, 6, 6)
    late = read(table(with_rules(rows), HEADER), extended(make, **RULES), None, Rules(today=dt.date(2026, 3, 1)))
    assert late.rows == raw.rows


def test_no_row_left_is_an_error_with_counts(make, rows, table):
    lines = [[*r, "no" if i < 4 else "yes", "01.03.2020" if i < 20 else "?"] for i, r in enumerate(rows)]
    with pytest.raises(DataError, match="of 24 rows, 4 lack consent and 20 are past their retention"):
        read(table(lines, HEADER), extended(make, **RULES), None, Rules(today=TODAY))


def test_consent_columns_must_be_in_the_file(make, rows, table):
    with pytest.raises(DataError, match="missing: 'agreed', 'seen_on'"):
        read(table(rows), extended(make, **RULES))


def test_pseudonyms_find_a_persons_rows(make, rows, table, secret):
    contract = extended(make, pseudonym=True, quality={"near_key": ["patient", "job"]})
    lines = with_rules(rows)
    lines[1][0] = lines[2][0] = lines[0][0]
    raw = read(table(lines, HEADER), contract, None, Rules(secret=secret))
    assert raw.persons is not None
    assert raw.near is not None
    assert Counter(np.bincount(raw.persons).tolist()) == {1: 21, 3: 1}
    assert raw.near[0] == raw.near[1] == raw.near[2]
    with pytest.raises(ConfigError, match="pseudonym secret"):
        read(table(lines, HEADER), contract)


def test_pseudonyms_are_keyed_and_per_column(secret):
    once = pseudonym.pseudonyms(["smith", "", "smith"], secret, "patient")
    assert once[0] == once[2] != once[1] == ""
    assert len(once[0]) == 32
    assert pseudonym.pseudonyms(["smith"], secret, "doctor") != once[:1]
    assert pseudonym.pseudonyms(["smith"], secrets.token_bytes(32), "patient") != once[:1]


def test_corrections_are_applied_counted_and_recorded(contract, rows, table, tmp_path, secret):
    rows[0][1], rows[1][1], rows[2][2] = "430", "250", "A"
    rules = (
        Correction("age", "typing error", equals="430", to="43"),
        Correction("age", "tenths of years", scale=0.1, above=100),
        Correction("job", "old code", equals="A", to="a"),
    )
    out = ingest(table(rows), contract, tmp_path / "w", secret=secret, rules=Rules(rules))
    done = {s.name: s for s in out.report.stages}
    assert done["declared corrections"].cells == 3
    record = json.loads((tmp_path / "w" / "lineage.json").read_text())
    assert [s["stage"] for s in page.to_json(out.report)["stages"]][0] == "read"
    recorded = next(s for s in record["stages"] if s["name"] == "declared corrections")["parameters"]["rules"]
    assert [r["reason"] for r in recorded] == ["typing error", "tenths of years", "old code"]
    with pytest.raises(DataError, match="2 cells are out of the public bounds"):
        ingest(table(rows), contract, tmp_path / "w", secret=secret, rules=Rules(rules[2:]))


@pytest.mark.parametrize(
    "wrong",
    [{}, {"equals": "a", "scale": 2.0}, {"scale": 0.0}, {"scale": float("nan")}, {"scale": 2.0, "reason": ""}],
)
def test_corrections_say_one_thing_and_why(wrong):
    with pytest.raises(ConfigError, match="one replacement or one rescaling"):
        Correction(**{"column": "age", "reason": "why", **wrong})


def test_corrections_from_files(tmp_path, contract):
    path = tmp_path / "c.toml"
    path.write_text('[[correction]]\ncolumn = "age"\nreason = "r"\nscale = 2\nbelow = 10\n')
    (rule,) = corrections.load(path)
    assert (rule.scale, rule.below) == (2, 10)
    corrections.check([rule], contract)
    for text in ("", "x = ", '[[correction]]\ncolumn = "a"\n', '[[correction]]\ncolumn = "a"\nreason = "r"\nz = 1\n'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            corrections.load(path)
    for bad in (
        Correction("nobody", "r", scale=2),
        Correction("job", "r", scale=2),
        Correction("patient", "r", equals="x"),
    ):
        with pytest.raises(ConfigError, match="correction"):
            corrections.check([bad], contract)


def test_outliers_move_to_the_bound_or_to_nothing(make, rows, table):
    rows[0][3], rows[1][3] = "99", "-99"
    clamped = read(table(rows), extended_dose(make, "clamp"))
    assert clamped.columns["dose"][:2].tolist() == [3, -1]
    emptied = read(table(rows), extended_dose(make, "missing"))
    assert np.isnan(emptied.columns["dose"][:2]).all()
    assert emptied.tally.columns["dose"].moved == clamped.tally.columns["dose"].moved == 2


def extended_dose(make, outliers):
    columns = make().payload["columns"]
    columns[3]["outliers"] = outliers
    return make(columns=columns)


def reduced(make, lines, table, quality, name="t.csv"):
    contract = make(quality=quality)
    raw, done = stages.reduce(read(table(lines, name=name), contract), contract, ())
    return raw, {s.name: s for s in done}


def test_duplicates(make, rows, table):
    lines = [*rows, rows[3], rows[3], ["other", *rows[4][1:]]]
    kept, done = reduced(make, lines, table, {})
    assert (kept.rows, done["exact duplicates"].cells) == (27, 2)
    kept, done = reduced(make, lines, table, {"duplicates": "drop"})
    assert (kept.rows, done["exact duplicates"].rows_out) == (25, 25)
    kept, done = reduced(make, lines, table, {"near_key": ["age", "job", "y"]})
    assert (kept.rows, done["near duplicates"].cells) == (27, 3)
    kept, _ = reduced(make, lines, table, {"near_key": ["age", "job", "y"], "near_duplicates": "drop"})
    assert kept.rows == 24


def test_fitted_outliers_are_counted_or_dropped(make, rows, table):
    for i, r in enumerate(rows):
        r[3] = str(0.5 + i / 1000)
    rows[7][3] = "2.9"
    kept, done = reduced(make, rows, table, {})
    assert (kept.rows, done["outliers"].cells) == (24, 1)
    kept, _ = reduced(make, rows, table, {"fitted_outliers": "drop"})
    assert kept.rows == 23
    assert 2.9 not in kept.columns["dose"]


def multiset(raw):
    names = sorted(raw.columns)
    return Counter(zip(*(map(repr, raw.columns[n].tolist()) for n in names), strict=True))


def change(a, b):
    return sum(((a - b) + (b - a)).values())


@pytest.mark.parametrize("quality", [{}, {"duplicates": "drop"}])
def test_factor_one_is_measured(make, rows, table, quality):
    """Remove each record in turn: the rows that reach the recoding change by at most one."""
    rows = [*rows, rows[3], rows[3], rows[9]]
    whole = multiset(reduced(make, rows, table, quality)[0])
    factor = stages.total(stages.stability(make(quality=quality)))
    assert factor == 1
    changes = [
        change(whole, multiset(reduced(make, rows[:i] + rows[i + 1 :], table, quality)[0])) for i in range(len(rows))
    ]
    assert max(changes) <= factor


def test_fitted_stages_are_not_bounded_and_really_are_not(make, table, rows):
    """One record decides over the fence, and with it over several other rows."""
    quality = {"fitted_outliers": "drop"}
    assert stages.total(stages.stability(make(quality=quality))) is None
    near = {"near_key": ["job"], "near_duplicates": "drop"}
    assert stages.total(stages.stability(make(quality=near))) is None
    # Three quarters zero but one: with one zero more the upper quartile is 0, and there is no fence at all.
    dose = [*["0"] * 18, *["0.1"] * 2, *["1"] * 4]
    for r, d in zip(rows, dose, strict=True):
        r[3] = d
    whole = multiset(reduced(make, rows, table, quality)[0])
    added = multiset(reduced(make, [*rows, ["z", *rows[0][1:3], "0", *rows[0][4:]]], table, quality)[0])
    assert change(whole, added) >= 5


def test_stability_is_in_the_evidence(make, rows, table, tmp_path, secret):
    out = ingest(table(rows), make(quality={"fitted_outliers": "drop"}), tmp_path / "w", secret=secret)
    assert out.evidence["stability_factor"] is None
    assert "not bounded" in out.evidence["unit"]
    by_stage = {s["stage"]: s["factor"] for s in out.evidence["stability"]}
    assert by_stage["outliers"] is None
    assert by_stage["consent and retention"] == by_stage["recoding"] == 1
    assert "not bounded" in (tmp_path / "w" / "quality.html").read_text()


def test_lineage_is_signed_and_changes_show(contract, rows, table, tmp_path, secret):
    key = identity.new_signing_key()
    ingest(table(rows), contract, tmp_path / "w", secret=secret, key=key)
    files = tmp_path / "w" / "lineage.json", tmp_path / "w" / "lineage.sig"
    record = lineage.read_signed(*files, identity.public_hex(key))
    assert record["contract"] == contract.hash
    assert [s["name"] for s in record["stages"]][-1] == "suppression"
    with pytest.raises(VerificationError, match="not signed"):
        lineage.read_signed(*files, identity.public_hex(identity.new_signing_key()))
    files[0].write_bytes(files[0].read_bytes().replace(b'"rows":24', b'"rows":25', 1))
    with pytest.raises(VerificationError, match="changed"):
        lineage.read_signed(*files, identity.public_hex(key))
    ingest(table(rows), contract, tmp_path / "w", secret=secret)
    lineage.read_signed(*files, identity.public_hex(lineage.derived_key(secret)))


def test_t_closeness_is_required_of_the_written_file(make, rows, table, tmp_path, secret):
    assert "t-closeness" in ingest(table(rows), make(t=0.1), tmp_path / "w", secret=secret).evidence["criteria"]
    skewed = [[*r[:5], "9" if int(r[1]) < 50 or i % 6 == 0 else "0"] for i, r in enumerate(rows)]
    skewed = [[*r[:5], "0" if i in (0, 6) else r[5]] for i, r in enumerate(skewed)]
    with pytest.raises(DataError, match="t = 0.1 for 'y' fails in 4 classes"):
        ingest(table(skewed), make(t=0.1), tmp_path / "w", secret=secret)
    assert not (tmp_path / "w" / "released.csv").exists()
