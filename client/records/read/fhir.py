"""FHIR resources as a table: one NDJSON line per resource, one declared path per column.

A path names fields from the resource down, as in ``name[0].family`` or ``identifier[system=urn:x].value``. Its steps
are a field, an index, or the first element of a list whose field has the given text. Nothing else of FHIRPath is
understood. A path that leads nowhere gives "no value". A path that ends in an object or a list is an error.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedveil.client.records.read.files import BATCH_ROWS, Opened, check_header, wanted
from fedveil.common import canonical
from fedveil.common.contract import DataContract
from fedveil.common.errors import ConfigError, DataError, WireError

MAX_LINE_BYTES = 1 << 22
_STEP = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\[(?:(\d{1,4})|([A-Za-z_]\w*)=([^\]]{1,256}))\])?(?:\.|$)")


@dataclass(frozen=True)
class FhirSource:
    """An NDJSON file of resources of one type.

    Attributes:
        resource: the ``resourceType`` that every line must have; any other is an error.
        paths: by column of the contract, the path of its value.
    """

    path: Path
    resource: str
    paths: Mapping[str, str]


Step = tuple[str, int | None, str, str]


def parse_path(path: str) -> tuple[Step, ...]:
    """The steps of a path: field, index, or field and text of the wanted element.

    Raises:
        ConfigError: not a path of the understood form.
    """
    steps: list[Step] = []
    at = 0
    while at < len(path):
        found = _STEP.match(path, at)
        if found is None:
            break
        name, index, key, text = found.groups()
        steps.append((name, None if index is None else int(index), key or "", text or ""))
        at = found.end()
    if not steps or at < len(path) or path.endswith("."):
        raise ConfigError(
            f"{path[:128]!r} is not a path", hint="for example name[0].family or identifier[use=official].value"
        )
    return tuple(steps)


def value_at(resource: Any, steps: tuple[Step, ...]) -> str | None:
    """The text at a path; None where it leads nowhere.

    Raises:
        DataError: it ends in an object or a list.
    """
    here = resource
    for name, index, key, text in steps:
        here = here.get(name) if isinstance(here, dict) else None
        if index is not None or key:
            elements = here if isinstance(here, list) else []
            chosen = elements[index : index + 1] if index is not None else [
                e for e in elements if isinstance(e, dict) and str(e.get(key)) == text
            ]  # fmt: skip
            here = chosen[0] if chosen else None
    if isinstance(here, (dict, list)):
        raise DataError("a declared path ends in an object or a list", hint="declare paths that end in a single value")
    return None if here is None else str(here).lower() if isinstance(here, bool) else str(here)


def open_fhir(source: FhirSource, contract: DataContract) -> Opened:
    """Read the resources; a column without a path is missing.

    Raises:
        ConfigError: a path is not understood.
        DataError: no such file, the paths are not the contract's columns. While iterating: a line that is no resource
            of the type, with its number.
    """
    check_header("the declared paths", list(source.paths), contract)
    names = [n for n in source.paths if n in wanted(contract)]
    steps = {n: parse_path(source.paths[n]) for n in names}
    if not source.path.is_file():
        raise DataError(f"{source.path} is not a file", hint="give the path of an NDJSON file")
    return Opened(tuple(names), _batches(source, steps))


def _batches(source: FhirSource, steps: Mapping[str, tuple[Step, ...]]) -> Iterator[pa.Table]:
    rows: dict[str, list[str | None]] = {n: [] for n in steps}
    held = 0
    with source.path.open("rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            bare = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            resource = _resource(bare, source.resource, number)
            for name, path in steps.items():
                rows[name].append(value_at(resource, path))
            held += 1
            if held == BATCH_ROWS:
                yield _table(rows)
                rows, held = {n: [] for n in steps}, 0
    if held:
        yield _table(rows)


def _table(rows: Mapping[str, list[str | None]]) -> pa.Table:
    return pa.table({n: pa.array(v, pa.string()) for n, v in rows.items()})


def _resource(line: bytes, kind: str, number: int) -> Any:
    try:
        resource = canonical.loads(line, limit=MAX_LINE_BYTES)
    except WireError:
        resource = None
    if not isinstance(resource, dict) or resource.get("resourceType") != kind:
        raise DataError(
            f"line {number} is not a {kind[:64]} resource",
            hint="export one resource type per NDJSON file, as UTF-8 without lone surrogates",
        )
    return resource
