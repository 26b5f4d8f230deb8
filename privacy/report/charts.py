"""The charts of a report's page, in one language of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedveil.privacy.report import privacy_loss
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.plots import Chart, Series, moment

MAX_LINES, MAX_LABEL = 3, 24
_GRID = (0.0, 0.001, 0.0025, 0.005, *(i / 100 for i in range(1, 100)), 1.0)


def charts(p: dict[str, Any], say: Speaker, attack_sentence: str) -> list[Chart]:
    """The charts of a payload, in the order in which they are shown."""
    drawn = (
        _spending(p, say), _sites(p, say), _survivors(p, say), _noise(p, say), _curve(p, say),
        _attack(p, say, attack_sentence), _metric(p, say),
    )  # fmt: skip
    return [c for c in drawn if c]


def alike(
    p: dict[str, Any], *, few: int = 0, over: Callable[[dict[str, Any]], Any] | None = None
) -> list[tuple[list[str], Any]]:
    """The sites' entries, equal ones together: ``(names, entry)`` in the roster's order; None if not delivered.

    Args:
        few: up to so many sites are left each by itself.
        over: what has to be equal; by default everything but the data set's name and the times of charges.
    """
    if len(p["sites"]) <= few:
        return [([site], entry) for site, entry in p["sites"].items()]
    groups: list[tuple[list[str], Any, Any]] = []
    for site, entry in p["sites"].items():
        same = None if entry is None else (over or _timeless)(entry)
        for names, other, first in groups:
            if other == same and (entry is None) == (first is None):
                names.append(site)
                break
        else:
            groups.append(([site], same, entry))
    return [(names, entry) for names, _, entry in groups]


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    runs = [{k: v for k, v in run.items() if k not in ("first_at", "last_at")} for run in entry["runs"]]
    return {**{k: v for k, v in entry.items() if k != "lineage"}, "runs": runs}


def _spending(p: dict[str, Any], say: Speaker) -> Chart:
    by, claim = p["accounting"]["by_step"], p["claim"]
    last = by[-1][0]
    numbers = {
        "pld": f"{claim['epsilon']:.4g}", "rdp": f"{claim['epsilon_rdp']:.4g}", "last": last,
        "opened": p["steps"]["opened"], "charged": p["accounting"]["steps_charged"],
    }  # fmt: skip
    return Chart(
        say("chart.spending"), say("chart.step"), "ε", say("chart.spending_text", **numbers),
        [
            Series(say("chart.pld"), [(0, 0), *((k, e) for k, e, _ in by)], "a", dots=True),
            Series(say("chart.rdp"), [(0, 0), *((k, e) for k, _, e in by)], "b"),
            Series(say("chart.claimed"), [(0, claim["epsilon"]), (last, claim["epsilon"])], "ref"),
        ],
        low=0, whole_x=True,
    )  # fmt: skip


def _sites(p: dict[str, Any], say: Speaker) -> Chart | None:
    """ε of each site's filter over all its runs; sites that spent alike share a line, the largest ε comes first."""
    found = [(names, s) for names, s in alike(p) if s is not None and s["spending"]]
    lines: list[tuple[list[str], list[tuple[float, float]]]] = []
    for names, s in found:
        points = [(0.0, 0.0), *((n, e) for n, e in s["spending"])]
        same = next((held for held, other in lines if other == points), None)
        if same is None:
            lines.append((list(names), points))
        else:
            same += names
    lines.sort(key=lambda x: -x[1][-1][1])
    if not lines:
        return None
    top = lines[0][1][-1][1]

    styles = ("a", "b", *"c" * MAX_LINES)
    series = [
        Series(_label(names, say), points, styles[i], dots=i == 0)
        for i, (names, points) in enumerate(lines[:MAX_LINES])
    ]
    total = max((s["spending"][-1][0] for _, s in found), default=0)
    begin = total - max((s["charged"] for _, s in found), default=0)
    if begin > 0:
        series.append(Series(say("chart.this_run"), [(begin, 0), (begin, top)], "ref"))
    text = say("chart.sites_spending_text", n=sum(len(names) for names, _ in found), top=f"{top:.4g}")
    return Chart(say("chart.sites_spending"), say("chart.steps_all"), "ε", text, series, low=0, whole_x=True)


def dates(p: dict[str, Any], say: Speaker) -> Chart | None:
    """ε of the sites' filters by date, up to three lines of sites alike; None if no ledger shows a charge."""
    found = [(names, s) for names, s in alike(p) if s is not None and s["runs"]]
    if not found:
        return None
    found.sort(key=lambda x: -x[1]["epsilon_after"])
    lines = [
        Series(_label(names, say), _over_time(s), style, dots=True)
        for (names, s), style in zip(found[:MAX_LINES], ("a", "b", "c"), strict=False)
    ]
    caps = {s["cap_epsilon"] for _, s in found}
    times = [x for line in lines for x, _ in line.points]
    if len(caps) == 1:
        cap = caps.pop()
        label = say("front.cap", cap=f"{cap:.4g}")
        lines.append(Series(label, [(min(times), cap), (max(times), cap)], "ref"))
    top, day = lines[0].points[-1][1], moment(lines[0].points[-1][0])
    text = say("front.dates_text", top=f"{top:.4g}", day=day)
    return Chart(say("front.dates"), say("front.date"), "ε", text, lines, low=0, dates=True)


def _over_time(entry: dict[str, Any]) -> list[tuple[float, float]]:
    """ε grows between the first and the last charge of a run, and rests between runs."""
    runs, points = entry["runs"], list[tuple[float, float]]()
    whole = sum(run["steps"] for run in runs) >= entry["spending"][-1][0]  # a report names the last 64 runs
    epsilon = 0.0 if whole else runs[0]["epsilon_after"]
    for run in runs:
        points += [(run["first_at"], epsilon), (run["last_at"], run["epsilon_after"])]
        epsilon = run["epsilon_after"]
    return points


def _label(names: list[str], say: Speaker) -> str:
    first = names[0] if len(names[0]) <= MAX_LABEL else f"{names[0][:MAX_LABEL]}…"
    return first if len(names) == 1 else say("page.alike", first=first, n=len(names) - 1)


def _metric(p: dict[str, Any], say: Speaker) -> Chart | None:
    rows = p["metrics"]["by_round"]
    names = sorted({name for _, m in rows for name in m})
    unit = [n for n in names if all(0 <= m[n] <= 1 for _, m in rows if n in m)]
    shown = (unit or names[:1])[:2]
    if not shown:
        return None
    lines = [
        Series(say.named("metric", n), [(r, m[n]) for r, m in rows if n in m], "ab"[i], dots=True)
        for i, n in enumerate(shown)
    ]
    text = say("attack.join").join(
        say("chart.metric_text", name=s.label, value=f"{s.points[-1][1]:.4g}") for s in lines
    )
    high = max(y for s in lines for _, y in s.points)
    return Chart(
        say("chart.metric"), say("chart.round"), ", ".join(s.label for s in lines)[:40], text, lines, whole_x=True,
        high=max(1.0, high) if unit and high > 0.6 else None,
    )  # fmt: skip


def _survivors(p: dict[str, Any], say: Speaker) -> Chart:
    trust, rounds = p["trust"], p["rounds"]
    bars = [(r["round"], r["members"] if r["outcome"] == "applied" else 0) for r in rounds]
    allowed, xs = trust["members"], [x for x, _ in bars] or [1]
    numbers = {
        "least": min((y for _, y in bars if y), default=0), "most": max((y for _, y in bars), default=0),
        "sites": trust["sites"], "allowed": allowed,
    }  # fmt: skip
    line = [(min(xs) - 0.5, allowed), (max(xs) + 0.5, allowed)]
    return Chart(
        say("chart.survivors"), say("chart.round"), say("page.sites"), say("chart.survivors_text", **numbers),
        [Series(say("chart.fewest", allowed=allowed), line, "ref")],
        bars=bars, low=0, high=max(1.0, 1.08 * trust["sites"]), whole_x=True, whole_y=True,
    )  # fmt: skip


def _noise(p: dict[str, Any], say: Speaker) -> Chart:
    sigma = p["mechanism"]["noise_multiplier"]
    points = [(r["round"], r["noise_multiplier"]) for r in p["rounds"] if r["noise_multiplier"] is not None]
    xs, top = [x for x, _ in points] or [1], max([sigma, *(y for _, y in points)])
    least = min((y for _, y in points), default=0)
    return Chart(
        say("chart.noise"), say("chart.round"), "σ",
        say("chart.noise_text", sigma=f"{sigma:.4g}", least=f"{least:.4g}"),
        [
            Series(say("chart.in_sum"), points, "a", dots=True),
            Series(say("chart.claimed_h"), [(min(xs) - 0.5, sigma), (max(xs) + 0.5, sigma)], "ref"),
        ],
        low=0, high=1.15 * top, whole_x=True,
    )  # fmt: skip


def _curve(p: dict[str, Any], say: Speaker) -> Chart:
    claim = p["claim"]
    numbers = {
        "first": f"{claim['curve'][0][1]:.3g}", "epsilon": f"{claim['epsilon']:.4g}", "delta": f"{claim['delta']:g}",
    }  # fmt: skip
    return Chart(
        say("chart.curve"), "ε", "δ", say("chart.curve_text", **numbers),
        [
            Series("δ(ε)", [(e, d) for e, d in claim["curve"]], "a"),
            Series(say("chart.the_claim"), [(claim["epsilon"], claim["delta"])], "b", dots=True),
        ],
        log_y=True,
    )  # fmt: skip


def _attack(p: dict[str, Any], say: Speaker, sentence: str) -> Chart:
    points = [(e, d) for e, d in p["claim"]["curve"]]
    return Chart(
        say("chart.attack"), say("chart.alarms"), say("chart.found"), sentence,
        [
            Series(say("chart.limit"), [(x, privacy_loss.attack_rate(points, x)) for x in _GRID]),
            Series(say("chart.guessing"), [(0, 0), (1, 1)], "ref"),
        ],
        low=0, high=1,
    )  # fmt: skip
