"""The data contract: what the sites agree their tables look like, signed before anybody reads a row.

A contract fixes everything that must not depend on the data: the columns and their roles, public bounds, the leaves of
every category, the levels to which quasi-identifiers are recoded, the required k and l. Hence every site encodes to
the same width, and neither the encoding nor the recoding reveals anything. Its hash stands in every round.

Rules of a contract (each broken one is a :class:`~fedveil.common.errors.ContractError`):

* exactly one target; at least one training feature; no column twice; every loaded column has a type;
* a number has public bounds ``low < high``, a category has ordered leaves ``values``;
* ``levels`` of a number are cut points strictly inside the bounds: ``[50]`` over 18..80 means ``[18,50)`` and
  ``[50,80]``; ``levels`` of a category are groups of leaves: every leaf in exactly one group;
* quasi-identifiers have levels; so have sensitive numbers (diversity is counted over the levels);
* k >= 2; l is at most the number of values that every sensitive attribute can take.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedveil.common import canonical, identity
from fedveil.common.errors import ContractError, IdentityError, WireError

DOMAIN = "fedveil/contract/1"
MAX_FILE_BYTES = 1 << 22
MAX_COLUMNS = 4096
MAX_LEAVES = 4096
OTHER = "other"
MISSING = "missing"

Role = Literal["identifier", "quasi", "sensitive", "feature", "target", "drop"]


def _as_text(value: Any) -> Any:
    """Whole numbers are welcome as leaves and codes: ``values = [1, 2]`` means "1" and "2"."""
    return str(value) if type(value) is int else value


Leaf = Annotated[str, BeforeValidator(_as_text), Field(min_length=1, max_length=256)]
Code = Annotated[str, BeforeValidator(_as_text), Field(max_length=64)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Bound = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """Frozen, unknown fields refused, and every refusal a :class:`ContractError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    @model_validator(mode="wrap")
    @classmethod
    def _as_contract_error(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or cls.__name__
        raise ContractError(
            f"the data contract is malformed at {where}: {first['msg']}",
            hint="compare it with the fields of fedveil.common.contract",
        )


class Column(_Strict):
    """One column of the agreed table.

    Attributes:
        name: header of the column, 1 to 128 printable characters.
        role: ``identifier`` and ``drop`` are never released or trained on (and may be absent from the file);
            ``quasi`` is released recoded to ``levels``; ``sensitive`` is what l-diversity protects; ``feature`` is
            released as it is; ``target`` is what the model predicts.
        type: ``number`` or ``category``; None only for identifier and drop.
        unit: unit of measurement, for readers ("mmHg", "years").
        low, high: public bounds of a number, both inclusive, in ``unit``; never taken from data.
        values: ordered leaves of a category. The order is the order of the encoding and of the classes.
        unseen: what a value outside ``values`` means: an error, or the leaf "other" (which ``values`` must then hold).
        missing_codes: texts that mean "no value", compared after trimming white space.
        missing: ``error`` refuses a table with missing values in this column; ``indicator`` adds an indicator feature.
        levels: fixed recoding: cut points of a number, groups of leaves of a category.
        threshold: for a target that is a number: class 1 is ``value > threshold``, class 0 the rest.
        as_feature: whether a quasi-identifier (default yes) or a sensitive column (default no) is trained on, in
            recoded form.
    """

    name: Name
    role: Role
    type: Literal["number", "category"] | None = None
    unit: Annotated[str, Field(max_length=128)] = ""
    low: Bound | None = None
    high: Bound | None = None
    values: Annotated[tuple[Leaf, ...], Field(max_length=MAX_LEAVES)] = ()
    unseen: Literal["error", "other"] = "error"
    missing_codes: Annotated[tuple[Code, ...], Field(max_length=64)] = ("",)
    missing: Literal["error", "indicator"] = "error"
    levels: (
        Annotated[tuple[Bound, ...], Field(max_length=MAX_LEAVES)]
        | Annotated[tuple[tuple[Leaf, ...], ...], Field(max_length=MAX_LEAVES)]
        | None
    ) = None
    threshold: Bound | None = None
    as_feature: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Column:
        _printable(self.name, "a column name")
        if self.loaded:
            _check_role(self)
            (_check_number if self.type == "number" else _check_category)(self)
        return self

    @property
    def loaded(self) -> bool:
        """Whether the column is read for release and training (all roles but identifier and drop)."""
        return self.role not in ("identifier", "drop")

    @property
    def is_feature(self) -> bool:
        """Whether the column enters the model's input."""
        if self.as_feature is not None:
            return self.as_feature
        return self.role in ("feature", "quasi")

    @property
    def coded(self) -> bool:
        """Whether the released column holds labels (else: numbers)."""
        return self.type == "category" or self.levels is not None or self.role == "target"

    @cached_property
    def cuts(self) -> tuple[float, ...]:
        """Cut points of a recoded number or of a thresholded target; () otherwise."""
        if self.type != "number":
            return ()
        if self.role == "target":
            return () if self.threshold is None else (self.threshold,)
        return tuple(c for c in self.levels or () if isinstance(c, float))

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of leaves of a category, in order; one group per leaf where no levels are declared."""
        if self.type != "category":
            return ()
        if self.levels is None:
            return tuple((v,) for v in self.values)
        return tuple(g for g in self.levels if isinstance(g, tuple))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What a released cell of a coded column may say, in order ("" beside it where missing values are allowed)."""
        if self.type == "category":
            return tuple("|".join(g) for g in self.groups)
        if self.role == "target" and self.threshold is not None:
            return (f"<={_short(self.threshold)}", f">{_short(self.threshold)}")
        if self.levels is None or self.low is None or self.high is None:
            return ()
        edges = [_short(e) for e in (self.low, *self.cuts, self.high)]
        pairs = list(itertools.pairwise(edges))
        return tuple(f"[{a},{b}{']' if i == len(pairs) - 1 else ')'}" for i, (a, b) in enumerate(pairs))

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the model inputs this column gives."""
        if not self.is_feature:
            return ()
        names = tuple(f"{self.name}={v}" for v in self.labels) if self.coded else (self.name,)
        return (*names, f"{self.name}={MISSING}") if self.missing == "indicator" else names


class DataContract(_Strict):
    """The agreement itself.

    Attributes:
        name, version, purpose: what the contract is called and what the data may be used for.
        unit: what one row stands for: the unit of every privacy statement ("one row = one record").
        columns: the columns, in the order of the encoding.
        k: every class of equal quasi-identifiers has at least k rows (k >= 2).
        l: every class has at least l distinct values of every sensitive attribute (l = 1: nothing required).
        sensitive_target: whether the target counts as a sensitive attribute.
        suppression_limit: fraction of rows, in [0, 0.5], that may be suppressed to reach k and l. With 0 every row is
            recoded by itself, and DP on the released table is DP on the original one.
    """

    name: Name
    version: Name
    purpose: Text
    unit: Text
    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=MAX_COLUMNS)]
    k: Annotated[int, Field(le=1 << 20)]
    l: Annotated[int, Field(le=1 << 20)] = 1  # noqa: E741 - the literature's name
    sensitive_target: bool = False
    suppression_limit: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> DataContract:
        names = [c.name for c in self.columns]
        _refuse(_repeated(names), "columns are declared twice", "declare every column once, with one role")
        targets = sum(c.role == "target" for c in self.columns)
        if targets != 1:
            raise ContractError(f"{targets} target columns instead of one", hint="give one column role = 'target'")
        if self.width == 0:
            raise ContractError("no column is a training feature", hint="give a column role = 'feature'")
        _refuse(_repeated(self.feature_names), "feature names are not unique", "rename a column or a leaf")
        if self.k < 2:
            raise ContractError(f"k = {self.k} protects nobody", hint="k is at least 2; 5 is customary")
        self._check_diversity()
        return self

    def _check_diversity(self) -> None:
        if self.l < 1:
            raise ContractError(f"l = {self.l} has no meaning", hint="l is at least 1; 1 asks for no diversity")
        if self.l > 1 and not self.sensitive:
            raise ContractError(f"l = {self.l} but nothing is sensitive", hint="set sensitive_target = true")
        few = [c.name for c in self.sensitive if self.l > len(c.labels)]
        _refuse(few, f"l = {self.l} is more than the number of distinct values", "lower l, or declare finer levels")

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
        """Read an unsigned draft from ``.toml`` or ``.json``."""
        if path.suffix not in (".toml", ".json"):
            raise ContractError(f"{path} is neither .toml nor .json", hint="write the contract in TOML or JSON")
        data = _read(path)
        try:
            payload = tomllib.loads(data.decode()) if path.suffix == ".toml" else canonical.loads(data)
        except (ValueError, RecursionError, WireError) as e:
            raise ContractError(f"{path} is not well-formed {path.suffix[1:].upper()}") from e
        return cls.model_validate(payload)


def sign_contract(contract: DataContract, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The signed document ``{"payload": {"v", "contract", "hash"}, "signer", "signature"}``."""
    return identity.signed(key, DOMAIN, {"v": 1, "contract": contract.payload, "hash": contract.hash})


def open_contract(document: Any, pinned_public: str) -> DataContract:
    """The contract in a signed document, once its signature by ``pinned_public`` (64 hex digits) and its hash hold.

    Raises:
        ContractError: unsigned, signed by another key, altered, of an unknown version, or inconsistent.
    """
    try:
        payload = identity.opened(document, DOMAIN, pinned_public, what="the data contract")
    except (IdentityError, WireError) as e:
        raise ContractError(e.message, hint="take the contract from the consortium again; do not edit it") from e
    if not isinstance(payload, dict) or set(payload) != {"v", "contract", "hash"} or payload["v"] != 1:
        raise ContractError("the signed data contract has an unknown form", hint="use the same version of fedveil")
    contract = DataContract.model_validate(payload["contract"])
    if contract.hash != payload["hash"]:
        raise ContractError("the data contract's hash differs from the signed one", hint="sign the contract again")
    return contract


def load_signed(path: Path, pinned_public: str) -> DataContract:
    """Read a signed JSON document and :func:`open_contract` it."""
    try:
        document = canonical.loads(_read(path))
    except WireError as e:
        raise ContractError(f"{path} is not a signed contract", hint="sign it with 'fedveil data contract-sign'") from e
    return open_contract(document, pinned_public)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ContractError(f"the contract {path} cannot be read: {e.strerror}") from e
    if len(data) > MAX_FILE_BYTES:
        raise ContractError(f"the contract {path} is larger than {MAX_FILE_BYTES} bytes")
    return data


def _check_role(c: Column) -> None:
    if c.type is None:
        raise ContractError(f"column {c.name!r} has no type", hint="type = 'number' or 'category'")
    if c.levels is not None and c.role not in ("quasi", "sensitive"):
        raise ContractError(f"column {c.name!r} has levels but its role is {c.role!r}", hint="only quasi and sensitive")
    if c.levels is None and (c.role == "quasi" or (c.role == "sensitive" and c.type == "number")):
        raise ContractError(f"column {c.name!r} has no levels", hint="declare its cut points or groups")
    if c.as_feature is not None and c.role not in ("quasi", "sensitive"):
        raise ContractError(f"as_feature has no meaning for {c.name!r}", hint="use it with quasi or sensitive")
    if c.threshold is not None and (c.role != "target" or c.type != "number"):
        raise ContractError(f"column {c.name!r} has a threshold", hint="only a target that is a number has one")
    if c.role == "target" and c.missing != "error":
        raise ContractError("a missing target cannot be encoded", hint="missing = 'error' for the target")
    _refuse(_repeated(c.missing_codes), f"missing codes of {c.name!r} are declared twice", "declare each once")


def _check_number(c: Column) -> None:
    if c.low is None or c.high is None:
        raise ContractError(f"column {c.name!r} has no public bounds", hint="declare low and high; never from the data")
    if c.low >= c.high:
        raise ContractError(f"column {c.name!r}: low is not below high")
    if c.values or c.unseen != "error":
        raise ContractError(f"column {c.name!r} is a number but lists values", hint="type = 'category' has values")
    if c.role == "target" and (c.threshold is None or not c.low <= c.threshold < c.high):
        raise ContractError("the target needs a threshold with low <= threshold < high", hint="1 is value > threshold")
    if c.levels is None:
        return
    if any(not isinstance(cut, float) for cut in c.levels):
        raise ContractError(f"the levels of the number {c.name!r} are not cut points", hint="levels = [50, 65]")
    if any(a >= b for a, b in itertools.pairwise(c.cuts)):
        raise ContractError(f"a boundary of {c.name!r} lies in two bins", hint="cut points strictly increase")
    if any(not c.low < cut < c.high for cut in c.cuts):
        raise ContractError(f"a cut point of {c.name!r} leaves a gap", hint="cuts lie strictly between low and high")


def _check_category(c: Column) -> None:
    if c.low is not None or c.high is not None:
        raise ContractError(f"column {c.name!r} is a category but has bounds", hint="type = 'number' has bounds")
    if not c.values:
        raise ContractError(f"column {c.name!r} lists no values", hint="declare its leaves in order")
    for v in c.values:
        _printable(v, f"a value of {c.name!r}")
    _refuse(_repeated(c.values), f"values of {c.name!r} are declared twice", "declare each leaf once")
    _refuse(sorted(set(c.values) & set(c.missing_codes)), f"missing codes of {c.name!r} are also values", "choose one")
    if c.unseen == "other" and OTHER not in c.values:
        raise ContractError(f"unseen = 'other' but {c.name!r} has no leaf 'other'", hint="add 'other' to values")
    if c.role == "target" and len(c.values) < 2:
        raise ContractError("the target has fewer than two classes", hint="list every class in values")
    if c.levels is None:
        return
    if any(not isinstance(g, tuple) or not g for g in c.levels):
        raise ContractError(f"the levels of {c.name!r} are not groups", hint="levels = [['a'], ['b', 'c']]")
    flat = [v for g in c.groups for v in g]
    _refuse(_repeated(flat), f"values of {c.name!r} are in two groups", "every leaf belongs to one group")
    _refuse([v for v in c.values if v not in set(flat)], f"no group of {c.name!r} holds these leaves", "add them")
    _refuse([v for v in flat if v not in set(c.values)], f"groups of {c.name!r} hold unknown leaves", "add to values")
    _refuse(_repeated(c.labels), f"two groups of {c.name!r} read alike", "rename a leaf that contains '|'")


def _repeated(items: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [x for x in items if x in seen or seen.add(x)]


def _refuse(names: Sequence[str], what: str, hint: str) -> None:
    if names:
        raise ContractError(f"{what}: {', '.join(repr(n[:64]) for n in names[:3])}", hint=hint)


def _printable(text: str, what: str) -> None:
    if not text.isprintable() or text != text.strip():
        raise ContractError(f"{what} has control characters or white space at its ends")


def _short(x: float) -> str:
    return str(int(x)) if x.is_integer() and abs(x) < 1e15 else repr(x)
