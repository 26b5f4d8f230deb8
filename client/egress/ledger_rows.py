"""What a row of a site's ledger may hold when the ledger is handed over: a closed table.

A kind of row, or a field, that is not in the table does not leave. Texts are bounded. What a row says about the data
is compared with what follows from the data contract and two commitments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedveil.common import errors
from fedveil.common.contract import DataContract
from fedveil.common.errors import PolicyRefusal, VerificationError
from fedveil.common.journal import Row
from fedveil.privacy.dp.events import from_json
from fedveil.privacy.secagg.interface import is_hex

Check = Callable[[Any], bool]
MAX_TEXT = 256
ENDINGS = (
    "COMPLETED",
    "STOPPED_EARLY",
    "BUDGET_EXHAUSTED",
    "ABORTED",
)  # how a run can end; a free text could carry anything out


def hexadecimal(digits: int) -> Check:
    """True for a string of that many lower-case hexadecimal digits: a hash, a key, a signature."""
    return lambda value: is_hex(value, digits)


def text(longest: int) -> Check:
    """True for a printable string of at most ``longest`` characters."""
    return lambda value: isinstance(value, str) and len(value) <= longest and value.isprintable()


def whole(value: Any) -> bool:
    """True for an integer from 0 to 2^48."""
    return type(value) is int and 0 <= value <= 1 << 48


def number(value: Any) -> bool:
    """True for a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def exactly(what: str, found: Any, expected: Mapping[str, Any]) -> None:
    """Raise :class:`PolicyRefusal` unless ``found`` has the expected keys, and each value is as expected.

    An expected value is a :data:`Check` or the value itself. The message names the field, never what it held.
    """
    if not isinstance(found, Mapping) or set(found) != set(expected):
        raise PolicyRefusal(f"{what} has missing or unknown fields")
    for name, want in expected.items():
        value = found[name]
        ok = want(value) if callable(want) else type(value) is type(want) and value == want
        if not ok:
            raise PolicyRefusal(f"{what}: the field {name!r} has a value that may not leave")


def _one_of(*values: Any) -> Check:
    return lambda value: value in values


def _codes() -> frozenset[str]:
    todo, out = [errors.FedveilError], set[str]()
    while todo:
        cls = todo.pop()
        out.add(cls.__name__)
        todo.extend(cls.__subclasses__())
    return frozenset(out)


def _event(value: Any) -> bool:
    try:
        from_json(value)
    except VerificationError:
        return False
    return True


def _counted(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _event(pair[0]) and whole(pair[1]) for pair in value
    )


def _hashes(value: Any) -> bool:
    return isinstance(value, list) and all(is_hex(v, 64) for v in value)


def _head(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and whole(value[0]) and is_hex(value[1], 64)


def _covered(value: Any) -> bool:
    return isinstance(value, list) and all(map(_head, value))


def _caps(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(cap, list) and len(cap) == 3 and is_hex(cap[0], 64) and number(cap[1]) and number(cap[2])
        for cap in value
    )


def _criteria(value: Any) -> bool:
    return isinstance(value, dict) and all(
        text(64)(name) and isinstance(c, dict) and set(c) == {"required", "met"} and number(c["required"])
        and type(c["met"]) is bool
        for name, c in value.items()
    )  # fmt: skip


def _stage(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"stage", "factor", "why"}
        and text(MAX_TEXT)(value["stage"])
        and text(MAX_TEXT)(value["why"])
        and (value["factor"] is None or whole(value["factor"]))
    )


_HEX = hexadecimal(64)
_CODE = _one_of(*_codes())
_OPEN: dict[str, Check] = {
    "lineage": text(128), "unit": _one_of("record", "person", "client"), "adjacency": _one_of("add-or-remove-one"),
    "cap_epsilon": number, "delta": number, "order": number,
}  # fmt: skip
_FORMS: dict[str, dict[str, Check]] = {
    "ledger.open": _OPEN,
    "ledger.import": {
        "lineage": text(128), "owner": text(64), "public": _HEX, "ledger": _HEX, "carries": _hashes, "head": _head,
        "events": _counted,
    },
    "ledger.lost": {
        "ledger": _HEX, "owner": text(64), "public": _HEX, "head": _head, "data_set": _HEX,
        "signature": hexadecimal(128), "cap_epsilon": number, "delta": number,
    },
    "ledger.cap": {"cap_epsilon": number},
    "ledger.capacity": {"capacity": whole},
    "plan.approved": {"session": _HEX, "plan_hash": _HEX, "approvals": _hashes},
    "plan.accepted": {"session": _HEX, "plan_hash": _HEX, "roster_hash": _HEX, "contract_hash": _HEX},
    "spend": {"session": _HEX, "round": whole, "plan_hash": _HEX, "event": _event},
    "commit": {"session": _HEX, "round": whole},
    "agreed": {"session": _HEX, "round": whole, "members": _HEX, "digest": _HEX},
    "refused": {"session": _HEX, "reason": _CODE},
    "model": {"session": _HEX, "round": whole, "model_hash": _HEX},
    "session.end": {"session": _HEX, "status": _one_of(*ENDINGS)},
    "journal.repaired": {"dropped_bytes": whole},
}  # fmt: skip
_OPTIONAL: dict[str, dict[str, Check]] = {
    "ledger.open": {"version": text(128), "subject_salt": text(128), "data_set": _HEX},
    "ledger.import": {"covers": _covered, "lost": _caps},
    "plan.accepted": {"precision": _one_of("float32")},
    "spend": {"state": _HEX},  # ledgers of the first release lack it
    "plan.approved": {"approvers": _hashes},
}
_EVIDENCE: dict[str, Check] = {
    "v": _one_of(1),
    "contract": _HEX,
    "contract_hash": _HEX,
    "recoding": _one_of("fixed"),
    "criteria": _criteria,
    "suppression": _one_of(True, False),
    "stability_factor": lambda value: value is None or whole(value),
    "stability": lambda value: isinstance(value, list) and len(value) <= 64 and all(map(_stage, value)),
    "unit": text(MAX_TEXT),
    "commitments": lambda value: (
        isinstance(value, dict) and set(value) <= {"source", "released"} and _hashes(list(value.values()))
    ),
}


def check_rows(rows: Iterable[Row], owner: str, contract: DataContract | None) -> None:
    """Raise :class:`PolicyRefusal` for the first row that may not leave.

    Args:
        contract: if given, what rows say about data under this contract must be exactly what follows from it.
    """
    for row in rows:
        what = f"row {row.n} of the ledger ({row.kind[:32]})"
        if row.owner != owner:
            raise PolicyRefusal(f"{what} belongs to another site")
        if row.kind == "data.released":
            _check_evidence(what, row.body, contract)
            continue
        form = _FORMS.get(row.kind)
        if form is None:
            raise PolicyRefusal(f"{what} is of a kind that may not leave the site")
        optional = {k: v for k, v in _OPTIONAL.get(row.kind, {}).items() if k in row.body}
        exactly(what, row.body, {**form, **optional})


def _check_evidence(what: str, body: dict[str, Any], contract: DataContract | None) -> None:
    if not set(body) <= set(_EVIDENCE):
        raise PolicyRefusal(f"{what} has unknown fields")
    exactly(what, body, {k: _EVIDENCE[k] for k in body})
    if contract is None or body.get("contract") != contract.hash:
        return
    from fedveil.client.records.release.pipeline import evidence_of  # imports pyarrow, which a simulation does not need

    c = body.get("commitments", {})
    if body != evidence_of(contract, c.get("source", ""), c.get("released", "")):
        raise PolicyRefusal(f"{what} does not say exactly what follows from the data contract")
