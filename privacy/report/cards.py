"""Model card and data card: two pages of Markdown beside the report, from its numbers and the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fedveil.privacy.report import front
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.charts import alike
from fedveil.privacy.report.wording import notice, words

MODEL_CARD, DATA_CARD = "model-card.md", "data-card.md"
_FEW, _NAMES = 12, 12


def cards(p: dict[str, Any], lang: str, *, failed: bool = False) -> dict[str, str]:
    """Both cards of a report's payload, by file name; every text of the payload is escaped.

    Args:
        failed: the report did not pass its checks. Then the cards say so first, and strike out what they repeat of it.

    Raises:
        UsageError: the catalogue does not have the language.
        KeyError, TypeError, ValueError: the payload does not have a report's fields.
    """
    say = Speaker(lang)
    w = words(p, say)
    page = partial(_page, p=p, say=say, failed=failed)
    return {MODEL_CARD: _model(p, w, say, page), DATA_CARD: _data(p, w, say, page)}


def _model(p: dict[str, Any], w: dict[str, Any], say: Speaker, page: Callable[..., str]) -> str:
    m, stats = p["mechanism"], p["trust"]["task"] == "stats"
    kind = "stats" if stats else "train"
    numbers = {
        "name": text(p["model"]["name"]), "parameters": f"{p['model']['parameters']:,}", "sites": p["trust"]["sites"],
        "consortium": text(p["consortium"]),
    }  # fmt: skip
    rule = {
        "mechanism": w["mechanism"], "clip": f"{m['clip']:.4g}", "sigma": f"{m['noise_multiplier']:.6g}",
        "sampling": w["sampling"], "q": f"{m['sample_rate']:.4g}",
    }  # fmt: skip
    steps, status = p["steps"], say.named("status", p["status"])
    final = [f"{text(say.named('metric', k))}: {v:.4g}" for k, v in p["metrics"]["final"].items()]
    return page(
        say("card.stats" if stats else "card.model"),
        ("card.what", [say(f"card.what_{kind}", **numbers)]),
        ("card.made", [
            say("card.made_steps", done=steps["applied"], planned=steps["planned"], status=status),
            say("card.made_rule", **rule),
        ]),
        ("card.privacy", [
            *front.sentences(p, say), w["claim"], w["fallback"], w["replace_one"], w["attack"], *w["audit"],
        ]),
        ("card.results", final or [say("card.results_none")]),
        ("card.use", [say("card.use_text", result=say(f"result.{kind}"))]),
        ("card.limits", [*w["not_covered"], *w["deviations"]]),
        ("card.hash", [
            f"{say('page.hash_model')}: `{text(p['hashes']['model'])}`",
            f"{say('page.hash_plan')}: `{text(p['hashes']['plan'])}`",
        ]),
    )  # fmt: skip


def _data(p: dict[str, Any], w: dict[str, Any], say: Speaker, page: Callable[..., str]) -> str:
    groups = alike(p, few=_FEW)
    return page(
        say("card.data"),
        ("card.what", [say("card.data_what", sites=p["trust"]["sites"], unit=w["protects"])]),
        ("card.public", w["public_data"]),
        ("page.anonymised", [_criteria(names, s, say) for names, s in groups]),
        ("card.spent", [_spent(names, s, say) for names, s in groups]),
        ("card.limits", w["not_covered"]),
        ("card.hash", [f"{say('page.hash_contract')}: `{text(p['hashes']['contract'])}`"]),
    )  # fmt: skip


def _criteria(names: list[str], entry: Any, say: Speaker) -> str:
    a = None if entry is None else entry["anonymisation"]
    if a is None:
        return f"{_names(names, say)}: {say('page.nothing')}"
    met = [
        f"{text(name)} ({text(c['required'])}): {say('page.met' if c['met'] else 'page.not_met')}"
        for name, c in a["criteria"].items()
    ]
    factor = say("page.not_bounded") if a["stability_factor"] is None else str(a["stability_factor"])
    return f"{_names(names, say)}: {say('attack.join').join([*met, say('page.stability') + ': ' + factor])}"


def _spent(names: list[str], entry: Any, say: Speaker) -> str:
    if entry is None:
        return f"{_names(names, say)}: {say('page.not_delivered')}"
    more = say("front.runs_sentence", n=entry["runs_left"])
    spent, cap = f"{entry['epsilon_after']:.4g}", f"{entry['cap_epsilon']:.4g}"
    return f"{_names(names, say)}: ε = {spent} / {cap}, {say('page.left')} {100 * entry['left']:.3g} %, {more}"


def _names(names: list[str], say: Speaker) -> str:
    more = f", … ({len(names)})" if len(names) > _NAMES else ""
    return say("list.join").join(map(text, names[:_NAMES])) + more


def _page(title: str, *sections: tuple[str, Iterable[str]], p: dict[str, Any], say: Speaker, failed: bool) -> str:
    out, stroke = [f"# {title}: {text(p['consortium'])}", ""], "~~" if failed else ""
    if failed:
        out += [f"**{say('page.verified_banner')}**", ""]
    if said := notice(p, say):
        out += [f"**{said}**", ""]
    out += [say("card.from", session=text(p["session"])), "", "    fedveil audit verify report.json", ""]
    for key, lines in sections:
        out += [f"## {say(key)}", "", *(f"- {stroke}{line}{stroke}" for line in lines), ""]
    return "\n".join(out)


def text(value: Any) -> str:
    """A foreign text as text: no Markdown, no HTML, one line."""
    plain = "".join(c if c.isprintable() else " " for c in str(value))
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!&" else c for c in plain)
