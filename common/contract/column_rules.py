"""When a column of a contract is consistent, and what the short forms of a draft stand for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from fedveil.common.contract import dates, hierarchies
from fedveil.common.contract.base import MAX_LEAVES, OTHER, printable, refuse, repeated
from fedveil.common.errors import ContractError

if TYPE_CHECKING:
    from fedveil.common.contract.columns import Column


def shorthands(data: Any) -> Any:
    """A draft's column with its short forms written out; whatever is not understood is left for the checks."""
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
            f"the hierarchy of {name!r} names a file", hint="read the draft with 'fedveil data contract', from a file"
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
        raise ContractError(f"levels of {name!r} are regular, but it has no public bounds", hint="declare low and high")
    if isinstance(levels, str):
        if not out.get("format"):
            raise ContractError(f"levels of {name!r} are a period of time, but it holds no dates", hint="type = 'date'")
        return list(dates.boundaries(levels, low, high))
    every, origin = levels.get("every", 0), levels.get("origin", 0)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (every, origin))
    if set(levels) - {"every", "origin"} or not numbers or not every > 0 or (high - low) / every > MAX_LEAVES:
        raise ContractError(f"levels of {name!r} are not understood", hint="levels = { every = 10, origin = 20 }")
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


def check(c: Column) -> None:
    """Refuse an inconsistent column.

    Raises:
        ContractError: see the rules in :mod:`fedveil.common.contract`.
    """
    printable(c.name, "a column name")
    if c.format:
        dates.pattern(c.format)
        if c.type != "number":
            raise ContractError(f"column {c.name!r} has a date format but is no date", hint="type = 'date'")
    if c.pseudonym and c.role != "identifier":
        raise ContractError(f"pseudonym has no meaning for {c.name!r}", hint="only an identifier has one")
    if c.loaded:
        _check_role(c)
        (_check_number if c.type == "number" else _check_category)(c)


def _check_role(c: Column) -> None:
    if c.type is None:
        raise ContractError(f"column {c.name!r} has no type", hint="type = 'number', 'category' or 'date'")
    if c.recoded and c.role not in ("quasi", "sensitive"):
        raise ContractError(f"column {c.name!r} has levels but its role is {c.role!r}", hint="only quasi and sensitive")
    if c.levels is not None and c.level is not None:
        raise ContractError(f"column {c.name!r} has both levels and a level", hint="keep one")
    if not c.recoded and (c.role == "quasi" or (c.role == "sensitive" and c.type == "number")):
        raise ContractError(f"column {c.name!r} has no levels", hint="declare its cut points or groups")
    if c.as_feature is not None and c.role not in ("quasi", "sensitive"):
        raise ContractError(f"as_feature has no meaning for {c.name!r}", hint="use it with quasi or sensitive")
    if c.threshold is not None and (c.role != "target" or c.type != "number"):
        raise ContractError(f"column {c.name!r} has a threshold", hint="only a target that is a number has one")
    if c.role == "target" and c.missing != "error":
        raise ContractError("a missing target cannot be encoded", hint="missing = 'error' for the target")
    if c.role == "target" and (c.encoding != "labels" or c.outliers == "missing"):
        raise ContractError("a target is a class of its own", hint="neither encoding nor outliers = 'missing' apply")
    if c.outliers == "missing" and c.missing == "error":
        raise ContractError(
            f"outliers of {c.name!r} become missing values, which are an error", hint="missing = 'indicator'"
        )
    refuse(repeated(c.missing_codes), f"missing codes of {c.name!r} are declared twice", "declare each once")


def _check_number(c: Column) -> None:
    if c.low is None or c.high is None:
        raise ContractError(f"column {c.name!r} has no public bounds", hint="declare low and high; never from the data")
    if c.low >= c.high:
        raise ContractError(f"column {c.name!r}: low is not below high", hint="swap them, or correct the public bounds")
    if c.values or c.unseen != "error" or c.mask or c.hierarchy:
        raise ContractError(f"column {c.name!r} is a number but lists values", hint="type = 'category' has values")
    if c.role == "target" and (c.threshold is None or not c.low <= c.threshold < c.high):
        raise ContractError("the target needs a threshold with low <= threshold < high", hint="1 is value > threshold")
    if c.ladder:
        hierarchies.check_ladder(c.ladder, c.low, c.high, c.name)
    if c.level is not None and not 1 <= c.level <= len(c.ladder):
        raise ContractError(f"level {c.level} of {c.name!r} is not in its hierarchy", hint=f"1 to {len(c.ladder)}")
    if c.levels is None:
        return
    if any(not isinstance(cut, float) for cut in c.levels):
        raise ContractError(f"the levels of the number {c.name!r} are not cut points", hint="levels = [50, 65]")
    if c.cuts:
        hierarchies.check_ladder((c.cuts,), c.low, c.high, c.name)


def _check_category(c: Column) -> None:
    if c.low is not None or c.high is not None or c.ladder or c.outliers != "error":
        raise ContractError(f"column {c.name!r} is a category but has bounds", hint="type = 'number' has bounds")
    if not c.values:
        raise ContractError(f"column {c.name!r} lists no values", hint="declare its leaves in order")
    for v in c.values:
        printable(v, f"a value of {c.name!r}")
    refuse(repeated(c.values), f"values of {c.name!r} are declared twice", "declare each leaf once")
    refuse(sorted(set(c.values) & set(c.missing_codes)), f"missing codes of {c.name!r} are also values", "choose one")
    if c.unseen == "other" and OTHER not in c.values:
        raise ContractError(f"unseen = 'other' but {c.name!r} has no leaf 'other'", hint="add 'other' to values")
    if c.role == "target" and len(c.values) < 2:
        raise ContractError("the target has fewer than two classes", hint="list every class in values")
    if c.mask and c.mask.keep > c.mask.length:
        raise ContractError(f"the mask of {c.name!r} keeps more than there is", hint="keep <= length")
    if c.hierarchy:
        hierarchies.check_rows(c.hierarchy, c.values, c.name)
    if c.level is not None and not 0 <= c.level < len(c.steps):
        raise ContractError(f"level {c.level} of {c.name!r} is not in its hierarchy", hint=f"0 to {len(c.steps) - 1}")
    if c.levels is not None:
        _check_groups(c)


def _check_groups(c: Column) -> None:
    if any(not isinstance(g, tuple) or not g for g in c.levels or ()):
        raise ContractError(f"the levels of {c.name!r} are not groups", hint="levels = [['a'], ['b', 'c']]")
    flat = [v for g in c.groups for v in g]
    refuse(repeated(flat), f"values of {c.name!r} are in two groups", "every leaf belongs to one group")
    refuse([v for v in c.values if v not in set(flat)], f"no group of {c.name!r} holds these leaves", "add them")
    refuse([v for v in flat if v not in set(c.values)], f"groups of {c.name!r} hold unknown leaves", "add to values")
    refuse(repeated(c.labels), f"two groups of {c.name!r} read alike", "rename a leaf that contains '|'")
