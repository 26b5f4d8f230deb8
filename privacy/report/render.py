"""JSON to one self-contained HTML page: no script, no font, no image from elsewhere; light, dark and on paper.

The page is a picture of ``report.json`` and proves nothing by itself; it says so, and how to check.
"""

from __future__ import annotations

import os
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError
from markupsafe import Markup

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, VerificationError
from fedveil.privacy.report import loss
from fedveil.privacy.report.bundle import read_bounded
from fedveil.privacy.report.plots import Chart, Series

TEMPLATE = "report.html.j2"
_LIMIT = 1 << 28
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)


def render_report(report: Path) -> Path:
    """Write ``report.html`` beside ``report.json``; returns its path.

    Raises:
        VerificationError: the report is missing or malformed. (Its signature is not checked here.)
    """
    try:
        document = canonical.loads(read_bounded(report, _LIMIT), limit=_LIMIT)
    except VerificationError:
        raise
    except FedveilError as e:
        raise VerificationError(f"{report.name}: {e.message}") from e
    page = render_html(document)
    out, partial = report.with_suffix(".html"), report.with_name(f".{report.stem}.html.part")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)
    return out


def render_html(document: Any) -> str:
    """The page of a signed report document ``{"payload", "signer", "signature"}``.

    Every text of the report is escaped: a hostile name stays text.

    Raises:
        VerificationError: the document does not have a report's fields.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"num": _number, "short": _short, "when": _when, "bytes": _bytes}
    source = files("fedveil.privacy.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    try:
        p = document["payload"]
        drawn = [(c, Markup(c.svg())) for c in charts(p)]  # noqa: S704 - built from escaped texts and numbers
        return environment.from_string(source).render(p=p, signer=str(document["signer"]), charts=drawn)
    except (TemplateError, *_MALFORMED) as e:
        raise VerificationError(
            f"the report cannot be shown: malformed ({type(e).__name__})", hint="run 'fedveil audit verify' on it"
        ) from e


def charts(p: dict[str, Any]) -> list[Chart]:
    """The charts of a payload, in the order in which they are shown."""
    return [c for c in (_spending(p), _metric(p), _survivors(p), _noise(p), _curve(p), _attack(p)) if c]


def _spending(p: dict[str, Any]) -> Chart:
    by, claim = p["accounting"]["by_step"], p["claim"]
    done, last = p["steps"]["opened"], by[-1][0]
    return Chart(
        "Privacy spent over the steps", "step", "ε",
        f"epsilon grows to {claim['epsilon']:.4g} by PLD and {claim['epsilon_rdp']:.4g} by RDP after {last} steps; "
        f"{done} were used",
        [
            Series("PLD (the claim)", [(0, 0), *((k, e) for k, e, _ in by)], "a", dots=True),
            Series("RDP (second accountant)", [(0, 0), *((k, e) for k, _, e in by)], "b"),
            Series("claimed", [(0, claim["epsilon"]), (last, claim["epsilon"])], "ref"),
        ],
        low=0, whole_x=True,
    )  # fmt: skip


def _metric(p: dict[str, Any]) -> Chart | None:
    rows = p["metrics"]["by_round"]
    names = sorted({name for _, m in rows for name in m})
    unit = [n for n in names if all(0 <= m[n] <= 1 for _, m in rows if n in m)]
    shown = (unit or names[:1])[:2]
    if not shown:
        return None
    lines = [
        Series(n, [(r, m[n]) for r, m in rows if n in m], "ab"[i], dots=True) for i, n in enumerate(shown)
    ]  # fmt: skip
    text = "; ".join(f"{s.label}: {s.points[-1][1]:.4g} at the end" for s in lines)
    high = max(y for s in lines for _, y in s.points)
    return Chart(
        "Metric on the public table", "round", ", ".join(shown)[:40], text, lines, whole_x=True,
        high=max(1.0, high) if unit and high > 0.6 else None,
    )  # fmt: skip


def _survivors(p: dict[str, Any]) -> Chart:
    trust, rounds = p["trust"], p["rounds"]
    bars = [(r["round"], r["members"] if r["outcome"] == "applied" else 0) for r in rounds]
    least = min((y for _, y in bars if y), default=0)
    allowed = trust["members"]
    xs = [x for x, _ in bars] or [1]
    return Chart(
        "Sites in each sum", "round", "sites",
        f"between {least} and {max((y for _, y in bars), default=0)} of {trust['sites']} sites in every opened sum; "
        f"never fewer than {allowed} are allowed; aborted rounds have no bar",
        [Series(f"fewest allowed: {allowed}", [(min(xs) - 0.5, allowed), (max(xs) + 0.5, allowed)], "ref")],
        bars=bars, low=0, high=max(1.0, 1.08 * trust["sites"]), whole_x=True, whole_y=True,
    )  # fmt: skip


def _noise(p: dict[str, Any]) -> Chart:
    sigma = p["mechanism"]["noise_multiplier"]
    points = [(r["round"], r["noise_multiplier"]) for r in p["rounds"] if r["noise_multiplier"] is not None]
    xs = [x for x, _ in points] or [1]
    top = max([sigma, *(y for _, y in points)])
    return Chart(
        "Effective noise in each sum", "round", "σ",
        f"the claim counts on sigma = {sigma:.4g}; the sums had at least {min((y for _, y in points), default=0):.4g}",
        [
            Series("in the sum, t colluders ruled out", points, "a", dots=True),
            Series("claimed (h shares)", [(min(xs) - 0.5, sigma), (max(xs) + 0.5, sigma)], "ref"),
        ],
        low=0, high=1.15 * top, whole_x=True,
    )  # fmt: skip


def _curve(p: dict[str, Any]) -> Chart:
    claim = p["claim"]
    return Chart(
        "The whole privacy curve", "ε", "δ",
        f"delta falls from {claim['curve'][0][1]:.3g} at epsilon 0; the claim is the point "
        f"({claim['epsilon']:.4g}, {claim['delta']:g})",
        [
            Series("δ(ε)", [(e, d) for e, d in claim["curve"]], "a"),
            Series("the claim", [(claim["epsilon"], claim["delta"])], "b", dots=True),
        ],
        log_y=True,
    )  # fmt: skip


def _attack(p: dict[str, Any]) -> Chart:
    points = [(e, d) for e, d in p["claim"]["curve"]]
    grid = [0.0, 0.001, 0.0025, 0.005, *(i / 100 for i in range(1, 100)), 1.0]
    return Chart(
        "Best possible membership test", "false alarms (share of non-members accused)", "members found",
        p["claim"]["attack_sentence"],
        [
            Series("limit for any test", [(x, loss.attack_rate(points, x)) for x in grid]),
            Series("guessing", [(0, 0), (1, 1)], "ref"),
        ],
        low=0, high=1,
    )  # fmt: skip


def _number(value: Any, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def _short(value: str, length: int = 16) -> str:
    return value if len(value) <= length else f"{value[:length]}…"


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
