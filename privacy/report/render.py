"""JSON to one self-contained HTML page: no script, no font, no image from elsewhere; light, dark and on paper.

The page is a picture of ``report.json`` and proves nothing by itself; it says so, and how to check. Its texts come from
the catalogue. The report's own sentences are written again from the report's numbers, in the page's language.
"""

from __future__ import annotations

import time
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, TemplateError
from markupsafe import Markup

from fedveil.common import canonical
from fedveil.common.errors import MALFORMED, FedveilError, VerificationError
from fedveil.common.files import replacing
from fedveil.privacy.report import cards, catalogue
from fedveil.privacy.report.bundle import read_bounded
from fedveil.privacy.report.catalogue import LANGUAGES, Speaker
from fedveil.privacy.report.charts import alike, charts, dates
from fedveil.privacy.report.front import front, sitenames, spoken, ticks
from fedveil.privacy.report.plots import Chart
from fedveil.privacy.report.verify import Verification, verify_report
from fedveil.privacy.report.wording import words

TEMPLATES = ("report.html.j2", "front.html.j2")
MAX_ROWS, FEW = 60, 12
_LIMIT = 1 << 28


def render_report(
    report: Path, langs: tuple[str, ...] = LANGUAGES, *, verification: Verification | None = None
) -> Path:
    """Write a page and two cards beside ``report.json`` in every one of ``langs``; returns the English page's path.

    Args:
        langs: languages of the catalogue; ``report.html`` is English, ``report.zh.html`` Chinese, and so on.
        verification: what the page says about checks; by default the report is verified now, with the folder's key.

    Raises:
        VerificationError: the report is missing or malformed. (A report that fails its checks is shown as one.)
        UsageError: the catalogue does not have a language.
    """
    document = load(report)
    found = verification or verify_report(report)
    for lang in langs:
        page = render_html(document, lang, found)
        _write(page_path(report, lang), page)
        for name, text in cards.cards(document["payload"], lang, failed=not found.ok).items():
            _write(page_path(report.with_name(name), lang), text)
    return page_path(report, langs[0])


def page_path(report: Path, lang: str) -> Path:
    """Where the page (or card) of one language lies."""
    suffix = ".md" if report.suffix == ".md" else ".html"
    return report.with_suffix(suffix if lang == LANGUAGES[0] else f".{lang}{suffix}")


def load(report: Path) -> Any:
    """The signed document of a report's file.

    Raises:
        VerificationError: missing, too large, or no JSON.
    """
    try:
        return canonical.loads(read_bounded(report, _LIMIT), limit=_LIMIT)
    except VerificationError:
        raise
    except FedveilError as e:
        raise VerificationError(f"{report.name}: {e.message}") from e


def render_html(document: Any, lang: str = LANGUAGES[0], verification: Verification | None = None) -> str:
    """The page of a signed report document ``{"payload", "signer", "signature"}``.

    Every text of the report is escaped: a hostile name stays text.

    Raises:
        VerificationError: the document does not have a report's fields.
        UsageError: the catalogue does not have the language.
    """
    say = Speaker(lang)
    room = files("fedveil.privacy.report")
    sources = DictLoader({name: room.joinpath(name).read_text(encoding="utf-8") for name in TEMPLATES})
    environment = Environment(
        loader=sources, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def number(value: Any, digits: int = 4) -> str:
        return _number(value, say, digits)

    def names(value: list[str]) -> str:
        return sitenames([_short(name, 24) for name in value], say)

    environment.filters |= {
        "num": number, "short": _short, "when": _when, "bytes": _bytes, "tight": _tight, "sitenames": names,
        "eps": spoken,
    }  # fmt: skip
    try:
        p = document["payload"]
        w = words(p, say)
        drawn = [_drawn(c) for c in charts(p, say, w["attack"])]
        over_time = dates(p, say)
        groups = rounds(p)
        return environment.get_template(TEMPLATES[0]).render(
            p=p, w=w, t=say, charts=drawn, signer=str(document["signer"]), sites=alike(p, few=FEW), v=verification,
            f=front(p, say), ticks=ticks(), dated=_drawn(over_time) if over_time else None,
            rounds=groups[:MAX_ROWS], more_rounds=max(0, len(groups) - MAX_ROWS), max_rows=MAX_ROWS,
            lineages={s: "-" if e is None else e["lineage"] for s, e in p["sites"].items()},
            tags=catalogue.TAGS, points=_points(p),
        )  # fmt: skip
    except (TemplateError, *MALFORMED) as e:
        raise VerificationError(
            f"the report cannot be shown: malformed ({type(e).__name__})", hint="run 'fedveil audit verify' on it"
        ) from e


def rounds(p: dict[str, Any]) -> list[dict[str, Any]]:
    """Consecutive rounds that were alike as one entry, with ``first`` and ``last``."""

    def key(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["outcome"], r["members"], r["missing"], r["noise_multiplier"], r["reason"]

    runs = [list(g) for _, g in groupby(p["rounds"], key=key)]
    return [{**g[0], "first": g[0]["round"], "last": g[-1]["round"]} for g in runs]


def _drawn(chart: Chart) -> tuple[Chart, Markup]:
    return chart, Markup(chart.svg())  # noqa: S704 - escaped texts and numbers


def _points(p: dict[str, Any]) -> list[tuple[float, float]]:
    """Every fourth point of the curve, and the claim."""
    claim = (p["claim"]["epsilon"], p["claim"]["delta"])
    return sorted({(e, d) for e, d in p["claim"]["curve"][::4] if d >= 1e-12} | {claim})


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _number(value: Any, say: Speaker, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return say("word.yes" if value else "word.no")
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def _short(value: str, length: int = 16) -> str:
    return value if len(value) <= length else f"{value[:length]}…"


def _tight(value: str) -> str:
    return value.replace(" = ", "\u00a0=\u00a0")


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
