"""The eighteen direct identifiers of the HIPAA safe harbour method, as hints in column names and as a checklist.

45 CFR 164.514(b)(2)(i) lists what has to be removed. A program can find some of them by pattern and some by a column's
name. For the others the checklist says that a person has to look. To pass the checklist is not compliance.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# (letter, what, patterns of pii.py that find it, words of column names). Words in English, German, French, Spanish,
# Italian and Chinese; a word with a space must occur as consecutive words.
_LIST: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("A", "names", (), "name|firstname|lastname|surname|forename|fullname|maidenname|vorname|nachname|familienname|"
     "prenom|nom|apellido|apellidos|nombre|cognome|initials|first name|last name|姓名|名字"),
    ("B", "geographic units smaller than a state", ("gps",), "address|street|city|zip|zipcode|postcode|postal code|"
     "adresse|strasse|hausnummer|plz|ort|wohnort|rue|ville|code postal|direccion|calle|indirizzo|latitude|longitude|"
     "gps|geocode|county|地址|邮编"),
    ("C", "dates, other than the year", (), "dob|birthdate|date of birth|birth date|geburtsdatum|admission date|"
     "discharge date|death date|date of death|aufnahmedatum|date naissance|fecha nacimiento|出生日期"),
    ("D", "telephone numbers", ("phone",), "phone|telephone|tel|mobile|cell phone|telefon|handy|telefono|电话|手机"),
    ("E", "fax numbers", ("phone",), "fax|telefax"),
    ("F", "e-mail addresses", ("email",), "email|mail|e mail|邮箱"),
    ("G", "social security numbers", ("us-ssn", "french-nir", "chinese-id", "german-tax"), "ssn|social security|"
     "sozialversicherungsnummer|nir|national id|passport|ausweis|dni|身份证|身份证号"),
    ("H", "medical record numbers", ("uk-nhs",), "mrn|medical record|patient id|patientid|patient number|"
     "patientennummer|pid|nhs number|fallnummer|case id|病历号"),
    ("I", "health plan beneficiary numbers", ("german-health",), "insurance number|policy number|member id|"
     "beneficiary|versichertennummer|kvnr|medicare|medicaid|医保号"),
    ("J", "account numbers", ("iban", "payment-card"), "iban|account number|account|kontonummer|credit card|银行卡"),
    ("K", "certificate and licence numbers", (), "license number|licence number|license|certificate number|"
     "fuehrerschein"),
    ("L", "vehicle identifiers", ("vin",), "vin|license plate|plate|kennzeichen|车牌"),
    ("M", "device identifiers", ("mac-address",), "device id|serial number|serial|imei|udi|mac address"),
    ("N", "web addresses", ("url",), "url|website|homepage"),
    ("O", "IP addresses", ("ipv4", "ipv6"), "ip|ip address|ipaddress"),
    ("P", "biometric identifiers", (), "fingerprint|voiceprint|iris|biometric|dna sequence|genome"),
    ("Q", "full-face photographs", (), "photo|photograph|portrait|picture|face image|照片"),
    ("R", "any other unique number or code", (), "id|uuid|guid|identifier|user id|username|login"),
)  # fmt: skip
_WORDS = {word: letter for letter, _, _, words in _LIST for word in words.split("|")}
_LONGEST = max(len(w.split()) for w in _WORDS)
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})
# Names that a coarse quasi-identifier may have without being a direct identifier.
_QUASI = frozenset("BC")


@dataclass(frozen=True)
class Entry:
    """One line of the checklist.

    Attributes:
        letter, what: as in the rule.
        looked: how it was looked for.
        columns: columns in which it was found, or whose name says so; identifiers and dropped columns are not listed.
    """

    letter: str
    what: str
    looked: str
    columns: tuple[str, ...]


def hint(column: str) -> str:
    """The letter of the identifier that a column's name speaks of; "" if of none.

    Accents do not matter: ``Straße`` is ``strasse``, ``prénom`` is ``prenom``, ``Führerschein`` is ``fuehrerschein``.
    """
    spaced = re.sub(r"(?<=[a-zß-öø-ÿ0-9])(?=[A-ZÀ-ÖØ-Þ])", " ", unicodedata.normalize("NFC", column))
    german = spaced.casefold().translate(_UMLAUTS)
    return next((letter for text in (spaced.casefold(), german) if (letter := _letter(text))), "")


def _letter(folded: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))
    words = [w for w in re.split(r"[^0-9a-z\u4e00-\u9fff]+", bare) if w]
    for size in range(min(_LONGEST, len(words)), 0, -1):
        for start in range(len(words) - size + 1):
            if letter := _WORDS.get(" ".join(words[start : start + size])):
                return letter
    return ""


def suspicious(column: str, role: str) -> str:
    """The identifier that the name of a used column speaks of, in words; "" if the name is no reason to stop."""
    letter = hint(column)
    if not letter or (role == "quasi" and letter in _QUASI):
        return ""
    return next(what for known, what, _, _ in _LIST if known == letter)


def checklist(columns: Collection[str], found: Mapping[str, Collection[str]]) -> tuple[Entry, ...]:
    """The eighteen lines for the columns that will be used.

    Args:
        found: by column, the kinds that :func:`fedveil.client.records.read.pii.scan` found.
    """
    out = []
    for letter, what, kinds, _ in _LIST:
        named = [c for c in columns if hint(c) == letter]
        matched = [c for c in columns if set(kinds) & set(found.get(c, ()))]
        looked = "column names and patterns" if kinds else "column names; needs a person's eye too"
        out.append(Entry(letter, what, looked, tuple(dict.fromkeys(named + matched))))
    return tuple(out)
