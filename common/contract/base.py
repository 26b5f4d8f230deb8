"""What every part of a contract is made of: strict frozen models, and texts that have only one meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedveil.common.errors import ContractError

MAX_LEAVES = 4096
MAX_DEPTH = 32
OTHER = "other"
MISSING = "missing"


def _as_text(value: Any) -> Any:
    """Whole numbers are welcome as leaves and codes: ``values = [1, 2]`` means "1" and "2"."""
    return str(value) if type(value) is int else value


Leaf = Annotated[str, BeforeValidator(_as_text), Field(min_length=1, max_length=256)]
Code = Annotated[str, BeforeValidator(_as_text), Field(max_length=64)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Bound = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A frozen model that refuses unknown fields. Every refusal is a :class:`ContractError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    @model_validator(mode="wrap")
    @classmethod
    def _as_contract_error(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or cls.__name__
        name = data.get("name") if isinstance(data, dict) else None
        of = f" of {name[:64]!r}" if isinstance(name, str) and name.isprintable() else ""
        raise ContractError(
            f"the data contract is malformed at {where}{of}: {first['msg']}",
            hint="docs/data.md lists the fields of a contract",
        )


def repeated(items: Sequence[str]) -> list[str]:
    """The items that occurred before, in order."""
    seen: set[str] = set()
    return [x for x in items if x in seen or seen.add(x)]


def refuse(names: Sequence[str], what: str, hint: str) -> None:
    """Raise :class:`ContractError` naming the first few of ``names``, if there is any."""
    if names:
        raise ContractError(f"{what}: {', '.join(repr(n[:64]) for n in names[:3])}", hint=hint)


def printable(text: str, what: str) -> None:
    """Refuse control characters and white space at the ends."""
    if not text.isprintable() or text != text.strip():
        raise ContractError(f"{what} has control characters or white space at its ends", hint="take them out")


def short(x: float) -> str:
    """The shortest text of a number: ``50``, ``0.5``."""
    return str(int(x)) if x.is_integer() and abs(x) < 1e15 else repr(x)
