"""What the short forms of a drafted column stand for."""

from __future__ import annotations

import itertools
from typing import Any

from fedveil.common.contract import dates, hierarchies
from fedveil.common.contract.base import MAX_LEAVES, OTHER
from fedveil.common.errors import ContractError


def shorthands(data: Any) -> Any:
    """A draft's column with its short forms written out. What is not understood stays as it is, for later checks."""
    if not isinstance(data, dict):
        return data
    out = dict(data)
    name = str(out.get("name", ""))[:64]
    if out.get("type") == "date":
        if not out.get("format"):
            raise ContractError(
                f"column {name!r} holds dates without a format: day and month are ambiguous",
                hint="declare format = '%d.%m.%Y', '%m/%d/%Y' or '%Y-%m-%d'",
            )
        out["type"] = "number"
    if out.get("format"):
        _as_days(out, name)
    out["levels"] = _spelt_levels(out, name)
    if out.get("values") == "digits" and isinstance(out.get("mask"), dict):
        out["values"] = _digit_leaves(out["mask"], name, out.get("unseen"))
    values = out.get("values")
    if out.get("hierarchy") == "mask" and isinstance(values, (list, tuple)):
        out["hierarchy"] = hierarchies.mask_rows([str(v) for v in values])
    if isinstance(out.get("hierarchy"), str):
        raise ContractError(
            f"the hierarchy of {name!r} names a file, which is looked for beside the draft's own file",
            hint="keep the draft in a file, and read it with 'fedveil data contract'",
        )
    return {k: v for k, v in out.items() if k != "levels" or v is not None or "levels" in data}


def _as_days(out: dict[str, Any], name: str) -> None:
    for key in ("low", "high", "threshold"):
        if key in out:
            out[key] = dates.days(out[key], f"{key} of {name!r}")
    for key in ("levels", "ladder"):
        if isinstance(out.get(key), (list, tuple)):
            out[key] = [
                [dates.days(y, f"a cut of {name!r}") for y in x] if isinstance(x, (list, tuple))
                else dates.days(x, f"a cut of {name!r}")
                for x in out[key]
            ]  # fmt: skip


def _spelt_levels(out: dict[str, Any], name: str) -> Any:
    levels, low, high = out.get("levels"), out.get("low"), out.get("high")
    if not isinstance(levels, (str, dict)):
        return levels
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise ContractError(
            f"levels of {name!r} are at equal steps, but it has no public bounds", hint="declare low and high"
        )
    if isinstance(levels, str):
        if not out.get("format"):
            raise ContractError(
                f"levels of {name!r} are a period of time, but it holds no dates",
                hint="set type = 'date' with its format",
            )
        return list(dates.boundaries(levels, low, high))
    every, origin = levels.get("every", 0), levels.get("origin", 0)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (every, origin))
    if set(levels) - {"every", "origin"} or not numbers or not every > 0 or (high - low) / every > MAX_LEAVES:
        raise ContractError(
            f"levels of {name!r} are not understood", hint="for example levels = { every = 10, origin = 20 }"
        )
    first = -int((origin - low) // every)
    cuts = (origin + every * i for i in range(first, first + MAX_LEAVES + 2))
    return [c for c in itertools.takewhile(lambda c: c < high, cuts) if c > low]


def _digit_leaves(mask: dict[str, Any], name: str, unseen: Any) -> list[str]:
    keep, length = mask.get("keep"), mask.get("length")
    if not isinstance(keep, int) or not isinstance(length, int) or not 1 <= keep <= 3 or keep > length:
        raise ContractError(
            f"values of {name!r} = 'digits' needs a mask that keeps 1 to 3 characters",
            hint="mask = { keep = 1, length = 5 }",
        )
    leaves = [f"{i:0{keep}d}" + "*" * (length - keep) for i in range(10**keep)]
    return [*leaves, OTHER] if unseen == OTHER else leaves
