"""What to anonymise and how, in a TOML file: for a table that no contract and no federation knows.

suppression_limit = 0.05
method = "auto"                 # fixed, mondrian, optimal, peel
identifiers = ["name"]          # never released
keep = ["cost"]                 # released as it is
[[quasi]]
name = "age"
hierarchy = "age.csv"           # beside this file: value;group;...;*  fixed_level and numeric may follow
[[sensitive]]
name = "diagnosis"
values = ["flu", "cold"]        # in order; or a hierarchy
[[criterion]]
is = "k-anonymity"              # see CRITERIA; the other keys are the criterion's arguments
k = 5
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedveil.common.errors import ContractError
from fedveil.privacy.anonymization.anonymizer import Method, check_limit
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import (
    AlphaK,
    BetaLikeness,
    Criterion,
    DeltaDisclosure,
    DistinctL,
    EntropyL,
    KAnonymity,
    RecursiveCL,
    TCloseness,
)
from fedveil.privacy.anonymization.prepare import bind

MAX_FILE_BYTES = 1 << 22
CRITERIA: Mapping[str, Callable[..., Criterion]] = {
    "k-anonymity": KAnonymity, "distinct-l": DistinctL, "entropy-l": EntropyL, "recursive-cl": RecursiveCL,
    "t-closeness": TCloseness, "alpha-k": AlphaK, "beta-likeness": BetaLikeness, "delta-disclosure": DeltaDisclosure,
}  # fmt: skip
_HINT = "see docs/data.md, 'Without a contract'"


@dataclass(frozen=True)
class Task:
    """Roles, criteria, method, and the share of rows that may be suppressed."""

    spec: TableSpec
    models: tuple[Criterion, ...]
    method: Method
    suppression_limit: float


def load(path: Path) -> Task:
    """Read a file of the form above; hierarchies are read from beside it.

    Raises:
        ContractError: unreadable, malformed, unknown keys, or what the columns and criteria themselves refuse.
    """
    try:
        with path.open("rb") as f:
            text = f.read(MAX_FILE_BYTES + 1)
        data = tomllib.loads(text.decode()) if len(text) <= MAX_FILE_BYTES else None
    except (OSError, ValueError, RecursionError) as e:
        raise ContractError(f"{path} is not a readable TOML file", hint=_HINT) from e
    if data is None:  # never read in part: a criterion may stand further on
        raise ContractError(f"{path} is longer than {MAX_FILE_BYTES >> 20} MiB", hint=_HINT)
    _known(data, {"suppression_limit", "method", "identifiers", "keep", "quasi", "sensitive", "criterion"}, str(path))
    quasi = tuple(QuasiIdentifier(**_column(c, path, {"numeric", "fixed_level"})) for c in _tables(data, "quasi"))
    sensitive = tuple(Sensitive(**_column(c, path, {"values"})) for c in _tables(data, "sensitive"))
    spec = TableSpec(quasi, sensitive, _names(data, "identifiers"), _names(data, "keep"))
    models = bind([_criterion(c) for c in _tables(data, "criterion")], spec)
    method, limit = data.get("method", "auto"), data.get("suppression_limit", 0.0)
    if method not in get_args(Method):
        raise ContractError(f"{path}: the method is unknown", hint=f"one of {', '.join(get_args(Method))}")
    check_limit(limit)
    return Task(spec, models, method, limit)


def _names(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = data.get(key, [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ContractError(f"{key} is not a list of column names", hint=f'{key} = ["name"]')
    return tuple(names)


def _tables(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = data.get(name, [])
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ContractError(f"{name} is not a list of tables", hint=f"write [[{name}]] above each")
    return found


def _known(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    if unknown := sorted(set(data) - keys):
        raise ContractError(f"{where}: {unknown[0][:64]!r} is not understood", hint=f"one of {', '.join(sorted(keys))}")


def _column(data: dict[str, Any], path: Path, keys: set[str]) -> dict[str, Any]:
    name, named = data.get("name"), data.get("hierarchy")
    if not isinstance(name, str) or not name:
        raise ContractError(f"{path}: a column has no name", hint="name = 'age'")
    _known(data, {"name", "hierarchy", *keys}, f"column {name[:64]!r}")
    out = dict(data)
    if "values" in out:
        if not isinstance(out["values"], list) or not all(isinstance(v, str) for v in out["values"]):
            raise ContractError(f"column {name[:64]!r}: values is not a list of texts", hint='values = ["a", "b"]')
        out["values"] = tuple(out["values"])
    if "numeric" in out and not isinstance(out["numeric"], bool):
        raise ContractError(f"column {name[:64]!r}: numeric must be true or false", hint="numeric = true")
    if named is not None:
        if not isinstance(named, str):
            raise ContractError(f"column {name[:64]!r}: the hierarchy names no file", hint="hierarchy = 'age.csv'")
        out["hierarchy"] = Hierarchy.from_csv(path.parent / named, name=name)
    return out


def _criterion(data: dict[str, Any]) -> Criterion:
    kind = CRITERIA.get(str(data.get("is")))
    if kind is None:
        raise ContractError("a criterion is of no known kind", hint=f"set is to one of {', '.join(CRITERIA)}")
    arguments = {k: v for k, v in data.items() if k != "is"}
    fields = [f for f in dataclasses.fields(kind) if f.init]  # pyright: ignore[reportArgumentType]
    _known(arguments, {f.name for f in fields}, str(data["is"]))
    for f in fields:
        if f.name not in arguments and f.default is dataclasses.MISSING:
            raise ContractError(f"{data['is']} lacks {f.name}", hint=f"{f.name} = ...")
    return kind(**arguments)
