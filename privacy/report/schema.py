"""The published schema of ``report.json``, and a small validator of the part of JSON Schema 2020-12 that it uses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Any

from fedveil.common.errors import VerificationError

NAME = "privacy-report-3"
MAX_ERRORS = 32
_KINDS: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: type(v) is int,
    "number": lambda v: type(v) in (int, float),
    "boolean": lambda v: type(v) is bool,
    "null": lambda v: v is None,
}
_KNOWN = frozenset({
    "$schema", "$id", "$defs", "$ref", "title", "description", "type", "const", "enum", "anyOf", "properties",
    "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "minimum", "maximum",
    "exclusiveMinimum", "pattern", "maxLength", "minProperties", "maxProperties",
})  # fmt: skip


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    """The schema of a report of the version this package writes; the same file is in ``docs/schema``."""
    return json.loads(files("fedveil.privacy.report").joinpath(f"{NAME}.json").read_text(encoding="utf-8"))


def errors(document: Any, against: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with ``document``, each with its place; empty if nothing is. At most about thirty are named.

    Raises:
        VerificationError: the schema uses a keyword that this validator does not know.
    """
    whole = schema() if against is None else against
    found: list[str] = []
    for error in _check(document, whole, whole, "report"):
        found.append(error)
        if len(found) == MAX_ERRORS:
            break
    return found


def _check(value: Any, rule: dict[str, Any], whole: dict[str, Any], where: str) -> Iterator[str]:
    if unknown := set(rule) - _KNOWN:
        raise VerificationError(f"the schema uses {sorted(unknown)[0]!r}, which is not supported")
    if "$ref" in rule:
        yield from _check(value, whole["$defs"][rule["$ref"].removeprefix("#/$defs/")], whole, where)
    if "anyOf" in rule:
        tried = [list(_check(value, r, whole, where)) for r in rule["anyOf"]]
        if all(tried):
            yield min(tried, key=len)[0]
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_KINDS[k](value) for k in kinds):
        yield f"{where} is not of type {' or '.join(kinds)}"
        return
    if "const" in rule and value != rule["const"]:
        yield f"{where} is not {rule['const']!r}"
    if "enum" in rule and value not in rule["enum"]:
        yield f"{where} is none of {', '.join(map(str, rule['enum']))}"
    if isinstance(value, dict):
        yield from _object(value, rule, whole, where)
    elif isinstance(value, list):
        yield from _array(value, rule, whole, where)
    else:
        yield from _scalar(value, rule, where)


def _object(value: dict[str, Any], rule: dict[str, Any], whole: dict[str, Any], where: str) -> Iterator[str]:
    named, rest = rule.get("properties", {}), rule.get("additionalProperties", True)
    for name in rule.get("required", []):
        if name not in value:
            yield f"{where}: {name} is missing"
    if len(value) < rule.get("minProperties", 0) or len(value) > rule.get("maxProperties", len(value)):
        yield f"{where} has {len(value)} entries"
    for name, inner in value.items():
        if name in named:
            yield from _check(inner, named[name], whole, f"{where}.{name}")
        elif rest is False:
            yield f"{where}: {name[:64]!r} is not known"
        elif rest is not True:
            yield from _check(inner, rest, whole, f"{where}.{name[:64]}")


def _array(value: list[Any], rule: dict[str, Any], whole: dict[str, Any], where: str) -> Iterator[str]:
    if len(value) < rule.get("minItems", 0) or len(value) > rule.get("maxItems", len(value)):
        yield f"{where} has {len(value)} entries"
    first = rule.get("prefixItems", [])
    for i, inner in enumerate(value):
        how = first[i] if i < len(first) else rule.get("items", {})
        yield from _check(inner, how, whole, f"{where}[{i}]")


def _scalar(value: Any, rule: dict[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, str):
        if len(value) > rule.get("maxLength", len(value)):
            yield f"{where} is longer than {rule['maxLength']} characters"
        if "pattern" in rule and not re.search(rule["pattern"], value):
            yield f"{where} does not match {rule['pattern']}"
    if type(value) in (int, float):
        if value < rule.get("minimum", value) or value > rule.get("maximum", value):
            yield f"{where} is out of bounds"
        if "exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"]:
            yield f"{where} is out of bounds"
