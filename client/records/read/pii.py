"""Direct identifiers in columns that are not declared as identifiers: patterns with check digits, names, uniqueness.

Patterns are tried on distinct texts only: first one pass of a linear-time regular expression, then the check digits
of each kind. What the contract itself declares (leaves, missing codes) is public and not scanned. A scan finds only
the kinds that it knows. It does not prove that a text identifies nobody: names of persons have no pattern.

Check digits: Luhn (ISO/IEC 7812-1 annex B), IBAN (ISO 13616, modulo 97), NHS number (modulo 11), German tax number
(ISO 7064 mod 11,10) and health insurance number (Luhn over letter and digits), French NIR (97 - n mod 97), Chinese
resident identity number (ISO 7064 mod 11-2), vehicle identification number (ISO 3779, North American check digit).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

MIN_ROWS_UNIQUE = 50
UNIQUE_SHARE = 0.98
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)  # for each digit: twice the digit, and the sum of that number's digits
NUMBER_SHARE = 0.8  # from this share of a number's cells on, right check digits are no coincidence


@dataclass(frozen=True)
class Pattern:
    """One kind of identifier: a regular expression (RE2 and Python) and, if needed, a test of what it found."""

    kind: str
    expression: str
    valid: Callable[[str], bool] | None = None
    digits: bool = False  # whether columns of numbers are searched for it too


def luhn(text: str) -> bool:
    """Whether the digits of ``text`` carry a right Luhn check digit."""
    digits = [*map(int, filter(str.isdigit, text))]
    doubled = map(_DOUBLED.__getitem__, digits[-2::-2])
    return len(set(digits)) > 1 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def iban(text: str) -> bool:
    """Whether ``text`` is an IBAN: its number modulo 97 is 1."""
    bare = re.sub(r"\s", "", text).upper()
    return 15 <= len(bare) <= 34 and int("".join(str(int(c, 36)) for c in bare[4:] + bare[:4])) % 97 == 1


def us_ssn(text: str) -> bool:
    """Whether a US social security number of this form can have been issued."""
    area, group, serial = re.split(r"[- ]", text)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def nhs(text: str) -> bool:
    """Whether ten digits are an NHS number of the United Kingdom."""
    d = [int(c) for c in text if c.isdigit()]
    return len(d) == 10 and len(set(d)) > 1 and (11 - sum(x * (10 - i) for i, x in enumerate(d[:9])) % 11) % 11 == d[9]


def german_tax(text: str) -> bool:
    """Whether eleven digits are a German tax identification number."""
    d = [int(c) for c in text if c.isdigit()]
    if len(d) != 11 or d[0] == 0 or not 8 <= len(set(d[:10])) <= 9:
        return False
    product = 10
    for x in d[:10]:
        total = (x + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == d[10]


def german_insured(text: str) -> bool:
    """Whether a letter and nine digits are a German health insurance number (GKV)."""
    d = [int(c) for c in f"{ord(text[0].upper()) - 64:02d}{text[1:9]}"]
    total = sum(sum(divmod(x * (1 + i % 2), 10)) for i, x in enumerate(d))
    return total % 10 == int(text[9])


def french_nir(text: str) -> bool:
    """Whether fifteen characters are a French social security number."""
    bare = re.sub(r"\s", "", text).upper()
    number = bare[:13].replace("2A", "19").replace("2B", "18")
    return number.isdigit() and 97 - int(number) % 97 == int(bare[13:])


def chinese_id(text: str) -> bool:
    """Whether eighteen characters are a Chinese resident identity number with a possible date of birth."""
    month, day = int(text[10:12]), int(text[12:14])
    total = sum(int(c) * pow(2, 17 - i, 11) for i, c in enumerate(text[:17]))
    return 1 <= month <= 12 and 1 <= day <= 31 and "10X98765432"[total % 11] == text[17].upper()


def vin(text: str) -> bool:
    """Whether seventeen characters are a vehicle identification number with a right check digit."""
    values = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", [*range(1, 9), *range(1, 6), 7, 9, *range(2, 10)], strict=True))
    weights = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
    total = sum((int(c) if c.isdigit() else values[c]) * w for c, w in zip(text, weights, strict=True))
    return not text.isdigit() and "0123456789X"[total % 11] == text[8]


def phone(text: str) -> bool:
    """Whether a written number can be a telephone number: 8 to 15 digits, and not a date."""
    digits = sum(map(str.isdigit, text))
    if re.fullmatch(r"\d{3}[- ]\d{2}[- ]\d{4}", text):
        return False  # the form of a social security number, whose own test decides
    return 8 <= digits <= 15 and not re.search(r"\b\d{4}[-. ]\d{2}[-. ]\d{2}\b|\b\d{2}[-. ]\d{2}[-. ]\d{4}\b", text)


def ipv6(text: str) -> bool:
    """Whether groups of hexadecimal digits are an IPv6 address, and neither a time, a ratio nor words around ``::``.

    Short ones are taken for an address only if they lie in a block in use: global, local to a site, local to a link.
    """
    groups = [g for g in text.split(":") if g]
    letters = re.search("[A-Fa-f]", text) is not None
    if len(groups) < 2 or max(map(len, groups)) < 3 or not any(map(str.isdigit, text)):
        return False
    if not letters and (max(map(len, groups)) < 4 or any(len(g) in (2, 3) and g[0] == "0" for g in groups)):
        return False
    used = r"(?i)fe[89ab][0-9a-f]|f[cd][0-9a-f]{2}" + (r"|[23][0-9a-f]{3}" if letters else "")
    if len(groups) < 3 and not re.fullmatch(used, groups[0]):
        return False
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


# Letters and digits of addresses, also internationalised ones (RFC 6531, RFC 5890).
_LETTER = "A-Za-z\u00c0-\u1fff\u2c00-\ud7ff"
PATTERNS = (
    Pattern(
        "email",
        rf"[{_LETTER}0-9._%+-]@(?:[{_LETTER}0-9][{_LETTER}0-9-]*\.)+(?:[{_LETTER}]{{2,24}}|xn--[A-Za-z0-9-]{{2,59}})",
    ),
    Pattern("url", r"(?i)\b(?:https?://|www\.)[^\s/$.?#][^\s]{2,}"),
    Pattern("us-ssn", r"\b\d{3}[- ]\d{2}[- ]\d{4}\b", us_ssn),
    Pattern("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", iban),
    Pattern("payment-card", r"\b(?:\d{4}[- ]?){3}\d{1,7}\b|\b3\d{3}[- ]?\d{6}[- ]?\d{5}\b", luhn, True),
    Pattern(
        "phone",
        r"(?:\+\d{1,3}[ .-]?)?(?:\(0?\d{1,4}\)|\b\d{2,5})[ ./-]\d{2,4}[ .-]?\d{2,5}(?:[ .-]?\d{2,4}){0,2}\b"
        r"|\+\d{8,15}\b",
        phone,
    ),
    Pattern("uk-nhs", r"\b\d{3}[ -]?\d{3}[ -]?\d{4}\b", nhs, True),
    Pattern("german-tax", r"\b[1-9]\d ?\d{3} ?\d{3} ?\d{3}\b", german_tax, True),
    Pattern("german-health", r"\b[A-Z]\d{9}\b", german_insured),
    Pattern("french-nir", r"\b[1-478] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}\b", french_nir, True),
    Pattern("chinese-id", r"\b[1-9]\d{5}(?:19|20)\d{9}[\dXx]\b", chinese_id, True),
    Pattern("ipv4", r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b"),
    Pattern("ipv6", r"\b[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}(?:[0-9A-Fa-f]{1,4}\b)?", ipv6),
    Pattern("mac-address", r"\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b"),
    Pattern("vin", r"\b[A-HJ-NPR-Z0-9]{8}[0-9X][A-HJ-NPR-Z0-9]{8}\b", vin),
    Pattern("gps", r"\b-?\d{1,2}\.\d{4,}[,; ] ?-?\d{1,3}\.\d{4,}\b"),
)  # fmt: skip
_COMPILED = {p.kind: re.compile(p.expression) for p in PATTERNS}
# Every pattern needs one of these, so texts without any are skipped at once. An IPv6 address has a group of three
# hexadecimal digits at its start, between two colons, or at its end. Times and ratios have none.
_POSSIBLE = (
    r"@|\d{4}|\d[ .-]\d{2}|://|(?i:www\.)|(?:[0-9A-Fa-f]{2}[:-]){5}|\d\)"
    r"|[0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:|:[0-9A-Fa-f]{3,4}:|:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{3}"
)

_WHOLE = r"^[0-9][0-9 -]{7,22}[0-9]$"  # for columns of numbers: a measurement with decimals is no identifier


def scan(text: pa.Array, *, only_digits: bool = False) -> dict[str, int]:
    """How many cells of ``text`` hold which kind of identifier.

    Args:
        only_digits: for columns of numbers: only kinds that are written as digits and have a check digit.
    """
    encoded = pc.dictionary_encode(text)
    counts = np.bincount(encoded.indices.to_numpy(zero_copy_only=False), minlength=len(encoded.dictionary))
    possible = pc.match_substring_regex(encoded.dictionary, _WHOLE if only_digits else _POSSIBLE)
    where = np.flatnonzero(possible.to_numpy(zero_copy_only=False))
    found: dict[str, int] = {}
    if not len(where):
        return found
    candidates = encoded.dictionary.take(pa.array(where))
    texts = candidates.to_pylist()
    for p in PATTERNS:
        if only_digits and not p.digits:
            continue
        hits = pc.match_substring_regex(candidates, p.expression).to_numpy(zero_copy_only=False)
        cells = where[hits]
        if p.valid is not None:
            finder, valid = _COMPILED[p.kind].findall, p.valid
            cells = where[[i for i in np.flatnonzero(hits).tolist() if any(map(valid, finder(texts[i])))]]
        if len(cells):
            found[p.kind] = int(counts[cells].sum())
    return found


def nearly_unique(distinct: int, present: int) -> bool:
    """Whether nearly every row of a column has a value of its own, in a table that is long enough to tell."""
    return present >= MIN_ROWS_UNIQUE and distinct >= UNIQUE_SHARE * present
