"""The scan for identifiers: published examples of every kind, their mutations, and what must not be found."""

import string

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.judge import hipaa
from fedveil.client.records.read import pii

# Specimens from the standards and authorities' own documentation; none belongs to a person.
KNOWN = {
    "email": ["jane.doe+x@example.org", "max@müller.example", "jörg@example.org", "用户@例子.中国", "a@b.xn--p1ai"],
    "url": ["https://example.org/p/1", "see www.example.org/x"],
    "us-ssn": ["536-90-4399"],
    "iban": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "FR1420041010050500013M02606"],
    "payment-card": ["4111 1111 1111 1111", "5555555555554444", "378282246310005"],
    "phone": ["+49 30 1234567", "(212) 555-0187", "212-555-0187", "+442079460958"],
    "uk-nhs": ["943 476 5919", "9434765919"],
    "german-tax": ["86095742719", "86 095 742 719"],
    "german-health": ["A123456780"],
    "french-nir": ["255081416802538", "2 55 08 14 168 025 38"],
    "chinese-id": ["11010519491231002X", "440524188001010014"],
    "ipv4": ["192.0.2.17"],
    "ipv6": ["2001:0db8::1", "fe80::1", "2001:db8:0:0:0:ff00:42:8329", "2001:DB8::", "2001:db8:1:2::",
             "fd00::1", "2a00:1450::", "2001:4860:4860:0:0:0:0:8888", "64:ff9b::1", "a:b:c:d:1:2:3:abc"],
    "mac-address": ["00:1B:44:11:3A:B7"],
    "vin": ["1M8GDM9AXKP042788"],
    "gps": ["48.85837, 2.29448"],
}  # fmt: skip
HARMLESS = [
    "", "ordinary text", "2021-03-04 10:11:12", "20.01.2020", "120/80 mmHg", "ICD J45.901", "3.14159265", "1,000,000",
    "std::vector", "a::b", "bad::cafe", "ratio 10:20:30:40:50", "10:11:12", "::1", "12:34:56:78", "x@y", "@home.de",
    "12345678901", "dose 10-20 mg", "version 1.2.3", "A12", "T1234567890", "12:30-13:45", "4111 1111 1111 1112",
    "add::1", "face::bed", "ratio 100::1", "2024::12", "chr1:1234::A", "120:80:70:98:37:15:100:12", "bad::123",
    "2019:03:04:11:12:13:100:200", "case 12::345", "feed::1", "1:100::2", "HLA-DRB1*15:01:01:01",
    "DE89370400440532013001", "000-12-3456", "666-12-3456", "943 476 5918",
]  # fmt: skip


def found(*texts, **options):
    return pii.scan(pa.array(texts, pa.string()), **options)


@pytest.mark.parametrize("kind", KNOWN)
def test_specimens_are_found_alone_and_in_sentences(kind):
    for text in KNOWN[kind]:
        if not (kind == "chinese-id" and text.startswith("4405241880")):  # born in 1880: not a date this scan takes
            assert kind in found(text), text
            assert kind in found(f"note of today: {text} (copied)"), text


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_are_not(text):
    kinds = set(found(text)) - ({"phone"} if text == "943 476 5918" else set())
    assert not kinds


CHECKED = {
    pii.luhn: "4111111111111111", pii.iban: "DE89370400440532013000", pii.nhs: "9434765919",
    pii.german_tax: "86095742719", pii.german_insured: "A123456780", pii.french_nir: "255081416802538",
    pii.chinese_id: "11010519491231002X",
}  # fmt: skip


@pytest.mark.parametrize(("check", "text"), CHECKED.items())
def test_every_check_digit_sees_a_wrong_digit(check, text):
    """Each scheme detects all single substitutions of a digit (NHS and 11,10: by design; Luhn: by design)."""
    assert check(text)
    missed = 0
    for i, c in enumerate(text):
        if c.isdigit():
            missed += sum(check(text[:i] + d + text[i + 1 :]) for d in string.digits if d != c)
    # The date part of the Chinese number and the digit-frequency rule of the German one only refuse more.
    assert missed == 0


def test_counts_cells_not_distinct_texts():
    assert found(*["a@b.example"] * 7, "plain", "c@d.example", "") == {"email": 8}


def test_numbers_are_only_scanned_for_check_digits():
    assert found("192.0.2.17", "9434765919", only_digits=True) == {"uk-nhs": 1}
    assert found("0.4111111111111111", "1.9434765919", only_digits=True) == {}


def test_column_names():
    for name in (
        "patientName",
        "birth_date",
        "PLZ",
        "Telefon-Nr",
        "E-Mail",
        "mrn",
        "Straße",
        "STRASSE",
        "strasse_nr",
        "Prénom",
        "Führerschein",
        "dirección",
        "身份证",
        "user id",
        "Nom",
        "IBAN",
    ):
        assert hipaa.hint(name), name
    for name in ("age", "sex", "trestbps", "chol", "thal", "s1", "oldpeak", "occupation", "native-country", "mailing"):
        assert not hipaa.hint(name), name
    assert hipaa.suspicious("zip", "feature")
    assert not hipaa.suspicious("zip", "quasi")
    assert hipaa.suspicious("name", "quasi")


def test_the_checklist_has_eighteen_lines():
    lines = hipaa.checklist(["age", "phone", "note"], {"note": {"us-ssn", "email"}})
    assert [e.letter for e in lines] == list("ABCDEFGHIJKLMNOPQR")
    by_letter = {e.letter: e.columns for e in lines}
    assert by_letter["D"] == ("phone",)
    assert by_letter["F"] == by_letter["G"] == ("note",)
    assert by_letter["A"] == ()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_no_text_breaks_the_scan(text):
    assert all(n == 1 for n in found(text).values())


def test_cells_full_of_identifiers_are_counted_by_kind():
    """Kinds with and without check digits in one cell; a wrong check digit is no card."""
    column = [f"a{i}@x.org, www.x{i}.de, +49 30 {1000000 + i}, 10.0.0.{i}, 4111 1111 1111 1111" for i in range(40)]
    column += [f"card 4111 1111 1111 11{i}" for i in range(12, 21)]
    hits = pii.scan(pa.array(column * 3))
    assert hits == {"email": 120, "url": 120, "phone": 120, "ipv4": 120, "payment-card": 120}
