"""The whole contract: columns, criteria, what rows are taken in, and how long it holds."""

from __future__ import annotations

import datetime as dt
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedveil.common import canonical
from fedveil.common.contract import hierarchies
from fedveil.common.contract.base import OTHER, Code, Name, Strict, Text, refuse, repeated
from fedveil.common.contract.columns import Column
from fedveil.common.errors import ContractError, WireError

MAX_FILE_BYTES = 1 << 22
MAX_COLUMNS = 4096


class Consent(Strict):
    """Only rows whose ``column`` says one of ``granted`` are used for the contract's purpose."""

    column: Name
    granted: Annotated[tuple[Code, ...], Field(min_length=1, max_length=64)]


class Retention(Strict):
    """Only rows whose date in ``column`` is at most ``days`` days before the day of ingestion are used."""

    column: Name
    days: Annotated[int, Field(ge=1, le=1 << 17)]


class Quality(Strict):
    """What is done about repeated rows and about values far from the others.

    Attributes:
        duplicates: exact repetitions (identifiers included) stay, or only the first is kept. Factor 1 for DP.
        near_key: columns that say which rows are about the same thing (a pseudonym, a date of admission).
        near_duplicates: rows that agree in ``near_key`` are counted, or only the first is kept. Not bounded.
        fitted_outliers: rows beyond three interquartile ranges of the site's own values are counted, or dropped. Not
            bounded: the fence depends on every record.
    """

    duplicates: Literal["keep", "drop"] = "keep"
    near_key: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    near_duplicates: Literal["count", "drop"] = "count"
    fitted_outliers: Literal["count", "drop"] = "count"


class DataContract(Strict):
    """The agreement itself.

    Attributes:
        name, version, purpose: what the contract is called and what the data may be used for.
        unit: what one row stands for, or one person's rows: the unit of every privacy statement ("one patient").
        columns: the columns, in the order of the encoding.
        k: every class of equal quasi-identifiers has at least k rows (k >= 2).
        l: every class has at least l distinct values of every sensitive attribute (l = 1: nothing required).
        t: every class's distribution of every sensitive attribute is at most this far from the table's (earth mover's
            distance, in [0, 1]); None: nothing required.
        t_distance: ground distance of t: all values equally far apart, or by rank.
        sensitive_target: whether the target counts as a sensitive attribute.
        suppression_limit: fraction of rows, in [0, 0.5], that may be suppressed to reach k and l. With 0 every row is
            recoded by itself, and DP on the released table is DP on the original one.
        expires: last day (UTC, ISO) on which the contract holds; "" for none.
        consent, retention: which rows may be used at all.
        quality: what is done about duplicates and outliers.
        rows_per_person: given, a person's rows are protected together: at most so many of them are used, k counts
            persons, and ε speaks of one person. Persons are told apart by the columns with ``pseudonym = true``.
    """

    name: Name
    version: Name
    purpose: Text
    unit: Text
    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=MAX_COLUMNS)]
    k: Annotated[int, Field(le=1 << 20)]
    l: Annotated[int, Field(le=1 << 20)] = 1  # noqa: E741 - the literature's name
    t: Annotated[float, Field(allow_inf_nan=False)] | None = None
    t_distance: Literal["equal", "ordered"] = "equal"
    sensitive_target: bool = False
    suppression_limit: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.0
    expires: Annotated[str, Field(max_length=10)] = ""
    consent: Consent | None = None
    retention: Retention | None = None
    quality: Quality = Quality()
    rows_per_person: Annotated[int, Field(ge=1, le=1 << 16)] | None = None

    @model_serializer(mode="wrap")
    def _without_persons(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        if self.rows_per_person is None:
            out.pop("rows_per_person", None)  # the hash of a contract about records does not depend on this field
        return out

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        limit = data.get("suppression_limit")
        if isinstance(limit, (int, float)) and 1 <= limit <= 100:
            raise ContractError(
                f"suppression_limit = {limit:g} reads like a percentage",
                hint=f"it is a fraction: write {limit / 100:g} for {limit:g} %",
            )
        if isinstance(data.get("expires"), dt.date):
            data = {**data, "expires": data["expires"].isoformat()[:10]}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> DataContract:
        self._check_names()
        targets = sum(c.role == "target" for c in self.columns)
        if targets != 1:
            raise ContractError(f"{targets} target columns instead of one", hint="give one column role = 'target'")
        if self.width == 0:
            raise ContractError("no column is a training feature", hint="give a column role = 'feature'")
        refuse(repeated(self.feature_names), "feature names are not unique", "rename a column or a leaf")
        if self.k < 2:
            raise ContractError(f"k = {self.k} protects nobody", hint="k is at least 2; 5 is customary")
        self._check_diversity()
        self._check_rows_rules()
        self._check_persons()
        return self

    def _check_names(self) -> None:
        names = [c.name for c in self.columns]
        roles = {n: {c.role for c in self.columns if c.name == n} for n in repeated(names)}
        both = [n for n, r in roles.items() if {"quasi", "target"} <= r]
        refuse(both, "columns are quasi-identifier and target at once", "give each of them one role")
        refuse(list(roles), "columns are declared twice", "declare every column once, with one role")

    def _check_diversity(self) -> None:
        if self.l < 1:
            raise ContractError(f"l = {self.l} has no meaning", hint="l is at least 1; 1 asks for no diversity")
        if self.l > 1 and not self.sensitive:
            raise ContractError(f"l = {self.l} but nothing is sensitive", hint="set sensitive_target = true")
        few = [c.name for c in self.sensitive if self.l > len(c.labels)]
        refuse(few, f"l = {self.l} is more than the number of distinct values", "lower l, or declare finer levels")
        if self.t is not None and not 0 <= self.t <= 1:
            raise ContractError(
                f"t = {self.t:g} is outside [0, 1]", hint="t = 0.2 is customary; t = 1 asks for nothing"
            )
        if self.t is not None and not self.sensitive:
            raise ContractError(f"t = {self.t:g} but nothing is sensitive", hint="set sensitive_target = true")

    def _check_rows_rules(self) -> None:
        known = {c.name: c for c in self.columns}
        asked = [*self.quality.near_key, *(r.column for r in (self.consent, self.retention) if r)]
        absent = [n for n in asked if n not in known]
        refuse(absent, "columns of consent, retention or near_key are not declared", "declare them under [[columns]]")
        if self.retention and not known[self.retention.column].format:
            raise ContractError(
                f"the retention column {self.retention.column!r} holds no dates", hint="type = 'date' with its format"
            )
        if self.quality.near_duplicates == "drop" and not self.quality.near_key:
            raise ContractError("near_duplicates = 'drop' needs a near_key", hint="declare near_key, or set 'count'")
        if self.expires:
            self._last_day()

    def _check_persons(self) -> None:
        if self.rows_per_person is None:
            return
        if not any(c.pseudonym for c in self.columns):
            raise ContractError(
                "rows_per_person is given, but no column tells persons apart",
                hint="pseudonym = true in the identifier that a person's rows share",
            )
        if self.suppression_limit > 0:
            raise ContractError(
                "suppression_limit does not go together with rows_per_person",
                hint="suppression_limit = 0: with it, one person's rows could bring back a whole class of others",
            )

    def _last_day(self) -> dt.date:
        try:
            return dt.date.fromisoformat(self.expires)
        except ValueError as e:
            raise ContractError("expires is not a date", hint="write it as 2027-12-31") from e

    def require_current(self, today: dt.date | None = None) -> None:
        """Raise :class:`ContractError` after the last day of the contract (``today`` defaults to the day in UTC)."""
        if self.expires and self._last_day() < (today or dt.datetime.now(dt.UTC).date()):
            raise ContractError(
                f"the data contract {self.name!r} {self.version} expired after {self.expires}",
                hint="agree on a new contract, and sign it",
            )

    @cached_property
    def target(self) -> Column:
        """The column to predict."""
        return next(c for c in self.columns if c.role == "target")

    @cached_property
    def classes(self) -> int:
        """How many classes the target has."""
        return len(self.target.labels)

    @cached_property
    def loaded(self) -> tuple[Column, ...]:
        """The columns that are read, released and possibly trained on, in order."""
        return tuple(c for c in self.columns if c.loaded)

    @cached_property
    def quasi(self) -> tuple[Column, ...]:
        """The quasi-identifiers, in order."""
        return tuple(c for c in self.columns if c.role == "quasi")

    @cached_property
    def sensitive(self) -> tuple[Column, ...]:
        """The sensitive attributes: the sensitive columns, and the target if declared so."""
        return tuple(c for c in self.columns if c.role == "sensitive" or (c.role == "target" and self.sensitive_target))

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the model inputs, in order; a function of the contract alone."""
        return tuple(n for c in self.columns for n in c.feature_names)

    @cached_property
    def width(self) -> int:
        """Number of model inputs, the same at every site."""
        return len(self.feature_names)

    @cached_property
    def payload(self) -> dict[str, Any]:
        """The canonical JSON form, every default written out."""
        return self.model_dump(mode="json")

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON form."""
        return canonical.digest(self.payload)

    @classmethod
    def load(cls, path: Path) -> DataContract:
        """Read an unsigned draft from ``.toml`` or ``.json``; hierarchies may be files, named relative to the draft.

        Raises:
            ContractError: unreadable, malformed, inconsistent, or a role that was never filled in.
        """
        if path.suffix not in (".toml", ".json"):
            raise ContractError(f"{path} is neither .toml nor .json", hint="write the contract in TOML or JSON")
        data = read_bounded(path)
        try:
            payload = tomllib.loads(data.decode()) if path.suffix == ".toml" else canonical.loads(data)
        except (ValueError, RecursionError, WireError) as e:
            at = f" ({e})" if isinstance(e, tomllib.TOMLDecodeError) and str(e).isprintable() else ""
            raise ContractError(
                f"{path} is not well-formed {path.suffix[1:].upper()}{at}",
                hint="correct its syntax; 'fedveil data contract init' writes a draft to compare with",
            ) from e
        if isinstance(payload, dict) and isinstance(payload.get("columns"), list):
            open_roles = [str(c.get("name")) for c in payload["columns"] if isinstance(c, dict) and not c.get("role")]
            refuse(
                open_roles, f"{len(open_roles)} columns have no role",
                "decide for each: identifier, quasi, sensitive, feature, target or drop; none is guessed",
            )  # fmt: skip
            payload["columns"] = [_with_hierarchy(c, path.parent) for c in payload["columns"]]
        return cls.model_validate(payload)


def _with_hierarchy(column: Any, folder: Path) -> Any:
    """The column. If it names a hierarchy file, its hierarchy is what that file holds."""
    named = column.get("hierarchy") if isinstance(column, dict) else None
    if not isinstance(named, str) or named == "mask":
        return column
    rows = hierarchies.read_rows(folder / named)
    out = {k: v for k, v in column.items() if k != "hierarchy"}
    name = str(column.get("name"))[:64]
    if column.get("type") == "number":
        low, high = column.get("low"), column.get("high")
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
            raise ContractError(f"column {name!r} has no public bounds", hint="declare low and high")
        return {**out, "ladder": hierarchies.ladder_from_rows(rows, low, high, name)}
    out.setdefault("values", [r[0] for r in rows])
    if OTHER in out["values"] and OTHER not in {r[0] for r in rows}:
        rows = (*rows, (*[OTHER] * (len(rows[0]) - 1), rows[0][-1]))
    return {**out, "hierarchy": rows}


def read_bounded(path: Path) -> bytes:
    """The bytes of a contract file, which may have at most 4 MiB."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ContractError(f"the contract {path} cannot be read: {e.strerror}", hint="name a readable file") from e
    if len(data) > MAX_FILE_BYTES:
        raise ContractError(
            f"the contract {path} is larger than {MAX_FILE_BYTES} bytes", hint="name the file of a data contract"
        )
    return data
