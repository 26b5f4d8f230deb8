"""The first page: what a data protection officer asks, answered out of a report's payload in one language.

Nothing here computes ε. Every number is a field of the payload, which the verifier derives again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedveil.privacy.planning import HIGH_EPSILON
from fedveil.privacy.report import tables
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.charts import alike
from fedveil.privacy.report.wording import kind

LOW_EPSILON = 1.0  # with HIGH_EPSILON the tiers of Ponomareva et al. 2023, "How to DP-fy ML"
SCALE = (0.1, 1.0, 10.0, 100.0)
FEW, MAX_LINES, MAX_KEYS = 4, 5, 4
# Published ε of deployments, lowest and highest; sources in docs/privacy-report.md.
PRECEDENTS: tuple[tuple[str, float, float], ...] = (
    ("wikimedia", 1.0, 1.0),
    ("emissions", 2.0, 2.0),
    ("gboard", 0.994, 13.69),
    ("apple", 2.0, 16.0),
    ("census", 17.14, 17.14),
)


@dataclass(frozen=True)
class Bar:
    """One line of the scale: ``per`` is what one ε covers; ``at`` and ``width`` are percent of the scale's width."""

    label: str
    per: str
    value: str
    at: float
    width: float
    own: bool = False


@dataclass(frozen=True)
class Left:
    """What one site, or several alike, have left: ``spent`` of ``cap``, ``part`` of the budget in [0, 1]."""

    names: list[str]
    spent: float
    cap: float
    part: float
    runs: int


@dataclass(frozen=True)
class Other:
    """One of the other ε's: its name, its value or range as text, and why it differs."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Front:
    """The first page.

    Attributes:
        kind: what ε speaks of (:func:`~fedveil.privacy.report.wording.kind`).
        words: the contract's own words for the unit; empty if the sites did not say, or said different ones.
        level: one of ``low``, ``middle``, ``high``.
        warnings: where original records are not the released ones.
        sizes: ``(how many belong to one person, ε)``, the quoted one first.
        lost: sites whose ledger was not delivered.
        approved: ``(sites, who approved)``.
        left: those first who can carry the fewest runs.
        more: groups of sites that are not listed here.
    """

    kind: str
    words: str
    level: str
    coin: str
    warnings: list[str]
    scale: list[Bar]
    scale_note: str
    sizes: list[tuple[int, float]]
    sizes_note: str
    left: list[Left]
    lost: list[str]
    approved: list[tuple[list[str], str]]
    others: list[Other]
    more: int


def front(p: Mapping[str, Any], say: Speaker) -> Front:
    """The first page of a payload.

    Raises:
        KeyError, TypeError, ValueError: the payload does not have a report's fields.
    """
    claim, unit = p["claim"], say(f"unit.{kind(p)}")
    right = f"{50 * (1 + claim['curve'][0][1]):.1f}"
    groups = [(names, s) for names, s in alike(dict(p), few=FEW, over=_budget) if s is not None]
    groups.sort(key=lambda x: (x[1]["runs_left"], x[1]["left"]))
    asked = alike(dict(p), over=lambda s: s["approvals"])
    by = say("list.join").join(dict.fromkeys(str(g["accountant"]) for g in claim["groups"]))
    return Front(
        kind=kind(p), words=_words(p), level=level(claim["epsilon"]), coin=say("front.coin", unit=unit, right=right),
        warnings=list(_warnings(p, say)), scale=list(_scale(claim["epsilon"], say)),
        scale_note=say("front.scale_note", low=f"{LOW_EPSILON:g}", high=f"{HIGH_EPSILON:g}"),
        sizes=[(1, claim["epsilon"]), *((g["size"], g["epsilon"]) for g in claim["groups"])],
        sizes_note=say("front.together_note", accountant=by),
        left=[
            Left(names, s["epsilon_after"], s["cap_epsilon"], s["left"], s["runs_left"])
            for names, s in groups[:MAX_LINES]
        ],
        lost=list(p["ledgers_missing"]),
        approved=[(names, _approved(s, say)) for names, s in asked[:MAX_LINES]],
        others=list(_others(p, say)), more=max(0, len(groups) - MAX_LINES),
    )  # fmt: skip


def level(epsilon: float) -> str:
    """``low`` up to 1, ``middle`` up to 10, else ``high``."""
    return "low" if epsilon <= LOW_EPSILON else "middle" if epsilon <= HIGH_EPSILON else "high"


def sentences(p: Mapping[str, Any], say: Speaker) -> list[str]:
    """The first page's numbers as sentences, for a card."""
    claim = p["claim"]
    values = say("attack.join").join(
        say("front.size", n=g["size"], epsilon=spoken(g["epsilon"])) for g in claim["groups"]
    )
    quoted = {
        "epsilon": spoken(claim["epsilon"]), "delta": f"{claim['delta']:g}", "unit": say(f"unit.{kind(p)}"),
        "level": say(f"front.{level(claim['epsilon'])}"),
    }  # fmt: skip
    return [say("front.quote_sentence", **quoted), say(f"together.{kind(p)}", values=values)]


def _budget(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["epsilon_after"], entry["cap_epsilon"], entry["left"], entry["runs_left"]


def _words(p: Mapping[str, Any]) -> str:
    """The contract's words, if ε speaks of records or persons and all sites' tables stand for the same."""
    said = {
        tables.spoken(s["anonymisation"]["unit"], s["anonymisation"]["stability_factor"])
        for s in p["sites"].values()
        if s is not None and s["anonymisation"] is not None
    }
    return said.pop() if len(said) == 1 and kind(p) != "client" else ""


def _warnings(p: Mapping[str, Any], say: Speaker) -> Iterator[str]:
    found = alike(dict(p), over=lambda s: _changed(s["anonymisation"]))
    for names, s in found:
        table = None if s is None else s["anonymisation"]
        if table is None or kind(p) == "client" or table["stability_factor"] == 1:
            continue
        sites = sitenames(names, say)
        if table["epsilon_of_original_record"] is None:
            yield say("front.unbounded", sites=sites)
        else:
            epsilon = spoken(table["epsilon_of_original_record"])
            yield say("front.original", sites=sites, n=table["stability_factor"], epsilon=epsilon)


def _changed(table: Mapping[str, Any] | None) -> Any:
    return (0, 0) if table is None else (table["stability_factor"], table["epsilon_of_original_record"])


def _scale(epsilon: float, say: Speaker) -> Iterator[Bar]:
    yield Bar(say("front.this_run"), "", spoken(epsilon), _at(epsilon), 0.0, own=True)
    for name, low, high in PRECEDENTS:
        value = f"{low:g}" if low == high else f"{low:g}–{high:g}"
        at = _at(low)
        yield Bar(say(f"precedent.{name}"), say(f"precedent.{name}_per"), value, at, _at(high) - at)


def ticks() -> list[tuple[float, str]]:
    """``(percent of the width, text)`` of the scale's marks."""
    return [(_at(x), f"{x:g}") for x in SCALE]


def _at(epsilon: float) -> float:
    """Where ε lies on the logarithmic scale, in percent; what is beyond an end lies at it."""
    low, high = math.log10(SCALE[0]), math.log10(SCALE[-1])
    return 100 * (math.log10(min(max(epsilon, SCALE[0]), SCALE[-1])) - low) / (high - low)


def _approved(entry: Mapping[str, Any] | None, say: Speaker) -> str:
    if entry is None:
        return say("front.unknown")
    if entry["approvals"] is None:
        return say("front.nobody")
    keys = [f"{key[:16]}…" for key in entry["approvals"][:MAX_KEYS]]
    more = ["…"] if len(entry["approvals"]) > MAX_KEYS else []
    return say("front.persons", n=len(entry["approvals"]), keys=say("list.join").join([*keys, *more]))


def _others(p: Mapping[str, Any], say: Speaker) -> Iterator[Other]:
    claim, trust, steps, counted = p["claim"], p["trust"], p["steps"], p["accounting"]
    unit = say(f"unit.{kind(p)}")
    why = say("front.quoted_why", planned=steps["planned"], h=trust["honest"])
    yield Other(say("front.quoted"), spoken(claim["epsilon"]), why)
    yield Other(say("front.rdp"), spoken(claim["epsilon_rdp"]), say("front.rdp_why"))
    why = say("front.charged_why", n=counted["steps_charged"], planned=steps["planned"])
    yield Other(say("front.charged"), spoken(counted["epsilon_charged_pld"]), why)
    yield Other(say("front.replaced"), spoken(claim["replace_one_epsilon"]), say("front.replaced_why", unit=unit))
    spent = [s["epsilon_after"] for s in p["sites"].values() if s is not None]
    if spent:
        low, high = spoken(min(spent)), spoken(max(spent))
        yield Other(say("front.filter"), low if low == high else f"{low}–{high}", say("front.filter_why"))
    why = say("front.fallback_none" if trust["mode"] == "local" else "front.fallback_why")
    yield Other(say("front.fallback"), spoken(claim["fallback_epsilon"]), why)


def sitenames(names: list[str], say: Speaker, most: int = 3) -> str:
    """Up to ``most`` names, and how many there are if there are more."""
    more = f" … ({len(names)})" if len(names) > most else ""
    return say("list.join").join(names[:most]) + more


def spoken(epsilon: float) -> str:
    """ε as a person reads it: four digits; above a thousand, where it says nothing any more, only that."""
    return f"{epsilon:.4g}" if epsilon <= 1000 else "> 1000"
