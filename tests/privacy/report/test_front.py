"""The first page: it answers what a data protection officer asks, in both languages, out of the report alone."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from html import unescape
from typing import Any

import pytest

from fedveil.common import canonical, identity
from fedveil.common.errors import BudgetExhausted, VerificationError
from fedveil.common.journal import Journal, parse
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.dp.accounting import Filter, rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report import pdf
from fedveil.privacy.report.build import DOMAIN
from fedveil.privacy.report.cards import cards
from fedveil.privacy.report.catalogue import LANGUAGES, Speaker, messages
from fedveil.privacy.report.charges import compose
from fedveil.privacy.report.front import PRECEDENTS, front, level, spoken
from fedveil.privacy.report.plots import Chart, Moments, Series, moment
from fedveil.privacy.report.render import render_html
from fedveil.privacy.report.verify import verify_report

KEYS = ("a1" * 32, "b2" * 32)
DAY = 86400


@pytest.fixture(scope="module")
def document(honest):
    return canonical.loads(honest.report.read_bytes())


def first_page(document: Any, lang: str, verification: Any = None) -> str:
    """The text of the first page, tags taken out, blanks as one."""
    html = render_html(document, lang, verification)
    inside = html[html.index('<div class="front">') : html.index('<h2 class="rest">')]
    return unescape(re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", inside, flags=re.S)))


def changed(document: Any, change: Any) -> Any:
    out = copy.deepcopy(document)
    change(out["payload"])
    return out


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_question_is_answered_on_the_first_page(honest, document, lang) -> None:
    p, say = document["payload"], Speaker(lang)
    text = first_page(document, lang, verify_report(honest.report))
    assert f"ε = {spoken(p['claim']['epsilon'])}" in text
    assert say("front.middle") in text
    assert "one patient" in text, "the contract's words"
    for name, low, high in PRECEDENTS:
        assert say(f"precedent.{name}") in text
        assert f"{low:g}" in text
        assert f"{high:g}" in text
    for g in p["claim"]["groups"]:
        assert spoken(g["epsilon"]) in text
    assert say("front.nobody") in text
    for site, entry in p["sites"].items():
        assert f"{site} {spoken(entry['epsilon_after'])} / {spoken(entry['cap_epsilon'])}" in text
        assert f"% {entry['runs_left']} " in text
    claim = p["claim"]
    for epsilon in (claim["epsilon_rdp"], claim["replace_one_epsilon"], claim["fallback_epsilon"]):
        assert spoken(epsilon) in text
    for why in ("rdp_why", "filter_why", "fallback_why"):
        assert say(f"front.{why}") in text
    assert say("page.signed", n=0, sites=4) in text


def test_one_coin_says_what_epsilon_allows(document) -> None:
    """Total variation is δ at ε = 0: for q = 1 that of two Gaussians, in closed form."""
    from math import erf, sqrt

    p = document["payload"]
    sigma, steps = p["mechanism"]["noise_multiplier"], p["steps"]["planned"]
    exact = 50 * (1 + erf(sqrt(steps) / sigma / 2 / sqrt(2)))
    said = re.search(r"at most ([\d.]+) times in 100", front(p, Speaker("en")).coin)
    assert said is not None
    assert float(said.group(1)) == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize(
    ("epsilon", "name"), [(0.2, "low"), (1.0, "low"), (1.01, "middle"), (10, "middle"), (11, "high")]
)
def test_low_or_high(document, epsilon, name) -> None:
    assert level(epsilon) == name
    other = changed(document, lambda p: p["claim"].update(epsilon=epsilon))
    for lang in LANGUAGES:
        assert f'<span class="badge {name}">' in render_html(other, lang)
    assert 0 <= front(other["payload"], Speaker("en")).scale[0].at <= 100
    assert (
        front(changed(document, lambda p: p["claim"].update(epsilon=1e9))["payload"], Speaker("en")).scale[0].at == 100
    )


def charge_all(ledger: Ledger, steps: int, event: SampledGaussian) -> int:
    """Charge runs of so many steps until the budget refuses; returns the steps that were charged."""
    for n in range(10_000):
        try:
            ledger.reserve(f"again {n // steps}", n % steps + 1, "e" * 64, event)
        except BudgetExhausted:
            return n
    raise AssertionError("the budget never ends")


def test_runs_left_are_the_runs_that_the_ledger_admits(honest, document, tmp_path) -> None:
    """The site's own ledger is opened again and charged until it refuses."""
    for site in ("alba", "dorn"):
        shutil.copy(honest.folder / "journals" / f"{site}.jsonl", path := tmp_path / f"{site}.jsonl")
        ledger = Ledger.open(
            path, site, honest.sites[site], lineage=f"{site}-patients", cap=Epsilon(honest.cap),
            delta=Delta(honest.plan.delta), durable=False, clock=lambda: 1e9,
        )  # fmt: skip
        charged = charge_all(ledger, honest.plan.steps, honest.plan.event)
        ledger.close()
        assert document["payload"]["sites"][site]["runs_left"] == charged // honest.plan.steps > 0


def test_a_closed_ledger_carries_no_run(honest, document) -> None:
    rows = parse((honest.folder / "journals" / "alba.jsonl").read_bytes())
    assert compose(rows, honest.session).affords(honest.plan.event) > 0
    closed = [
        *rows,
        type(rows[0])(len(rows), "alba", 10**9, "ledger.closed", {"ledger": "d" * 64}, rows[-1].hash, "e" * 64, ""),
    ]
    assert compose(closed, honest.session).affords(honest.plan.event) == 0


def test_who_approved(make) -> None:
    world = make(approvals={"alba": {"approvals": ["c" * 64, "d" * 64], "approvers": list(KEYS)},
                            "berg": {"approvals": ["e" * 64]}})  # fmt: skip
    assert verify_report(world.report).ok
    document = canonical.loads(world.report.read_bytes())
    said = {site: s["approvals"] for site, s in document["payload"]["sites"].items()}
    assert said == {"alba": list(KEYS), "berg": ["e" * 64], "cava": None, "dorn": None}
    for lang in LANGUAGES:
        text = first_page(document, lang)
        assert all(f"{key[:16]}…" in text for key in KEYS)
        assert Speaker(lang)("front.persons", n=1, keys="e" * 16 + "…") in text
        assert Speaker(lang)("front.nobody") in text


@pytest.mark.parametrize(
    "body", [{"approvals": []}, {"approvals": "x"}, {"approvers": ["x"]}, {"approvers": ["a" * 64] * 300}, {}]
)
def test_a_row_that_names_no_approval_is_refused(honest, body, tmp_path) -> None:
    key = identity.new_signing_key()
    ledger = Ledger.open(
        tmp_path / "l.jsonl", "x", key, lineage="l", cap=Epsilon(8.0), delta=Delta(1e-5), durable=False
    )
    ledger.note("plan.approved", session="s", plan_hash="0" * 64, **body)
    with pytest.raises(VerificationError, match="plan.approved"):
        compose(list(ledger.journal.rows), "s")
    assert compose(list(ledger.journal.rows), "another session").approvals is None


def test_the_dates_are_those_of_the_ledgers_rows(tmp_path) -> None:
    now, event, key = [0.0], SampledGaussian(1.0, 8.0), identity.new_signing_key()
    with Journal.open(tmp_path / "l.jsonl", "x", key, durable=False, clock=lambda: now[0]) as journal:
        order = 8.0
        body = {
            "lineage": "l",
            "unit": "record",
            "adjacency": "add-or-remove-one",
            "cap_epsilon": 8.0,
            "delta": 1e-5,
            "order": order,
        }
        journal.append("ledger.open", body)
        for day, session in ((3, "one"), (3, "one"), (40, "two"), (41, "two")):
            now[0] = day * DAY
            number = sum(r.body.get("session") == session for r in journal.rows) + 1
            journal.append(
                "spend", {"session": session, "round": number, "plan_hash": "0" * 64, "event": event.to_json()}
            )
        spent = compose(list(journal.rows), "two").spending
    assert [(s.session, s.at) for s in spent] == [("one", 3 * DAY)] * 2 + [("two", 40 * DAY), ("two", 41 * DAY)]
    assert spent[-1].epsilon == Filter(8.0, 1e-5, order).epsilon_of(4 * rdp(event, order))


def test_the_chart_over_time_draws_the_dates(document) -> None:
    def runs(p: dict[str, Any]) -> None:
        for entry in p["sites"].values():
            first, second = 1_700_000_000, 1_700_000_000 + 90 * DAY
            entry["runs"] = [
                {"session": "a", "steps": 3, "first_at": first, "last_at": first + 5, "epsilon_after": 1.5},
                {"session": "b", "steps": 3, "first_at": second, "last_at": second + DAY, "epsilon_after": 2.5},
            ]
            entry["spending"] = [[6, 2.5]]

    html = render_html(changed(document, runs), "en")
    svg = next(s for s in re.findall(r"<svg.*?</svg>", html, re.S) if "ε spent over time" in s)
    assert re.findall(r">(20\d\d-\d\d-\d\d)<", svg) == ["2023-11-23", "2023-12-21", "2024-01-18"]
    assert "ends at 2.5 on 2024-02-13" in svg


@pytest.mark.parametrize("span", [0, 1, 7, 59, 61, 3600, 40_000, DAY, 5 * DAY, 100 * DAY, 9_000 * DAY, 10**13, 10**18])
def test_any_two_times_have_ticks_between_them(span) -> None:
    ticks = Moments(1_700_000_000, 1_700_000_000 + span).ticks()
    assert 1 <= len(ticks) <= 5
    assert all(1_700_000_000 <= x <= 1_700_000_000 + span for x, _ in ticks)
    assert Chart("t", "x", "y", "d", [Series("s", [(0, 0), (span, 1)])], dates=True).svg().endswith("</svg>")
    assert (moment(-1), moment(10**30)) == ("1970-01-01", "9999-12-31")


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("unit", ["record", "person", "client"])
def test_the_words_for_a_unit_come_from_one_place(document, lang, unit) -> None:
    text = first_page(changed(document, lambda p: p["claim"].update(unit=unit)), lang)
    for section in ("several", "counted"):
        assert messages()[f"{section}.{unit}"][lang] in text
    assert ("one patient" in text) == (unit != "client"), "the contract speaks of what a row stands for"
    for other in {"record", "person", "client"} - {unit}:
        assert messages()[f"several.{other}"][lang] not in text


def test_what_an_original_record_can_change_is_said_first(document) -> None:
    def five(p: dict[str, Any]) -> None:
        p["sites"]["alba"]["anonymisation"] |= {
            "stability_factor": 5, "unit": "one patient; a group of 5 of them", "epsilon_of_original_record": 13.25,
        }  # fmt: skip
        p["sites"]["berg"]["anonymisation"] |= {
            "stability_factor": None,
            "unit": "one row",
            "epsilon_of_original_record": None,
        }

    found = front(changed(document, five)["payload"], Speaker("en"))
    assert found.warnings == [
        "Of ORIGINAL records: at alba one of them can change up to 5 released ones. That gives ε = 13.25.",
        "At berg ε speaks of rows of the released table only: "
        "how many of them one original record can change is not bounded.",
    ]  # fmt: skip
    assert found.words == "", "the sites' tables do not stand for the same"
    assert "13.25" in first_page(changed(document, five), "zh")


def test_the_page_is_made_of_the_report_alone(document) -> None:
    """Nothing of a table can be on it: there is none here, and no other file is read."""
    text = render_html(canonical.loads(canonical.dumps(document)), "en")
    assert '<div class="front">' in text
    # Declared numbers of the plan are the only counts of records in a report.
    assert set(re.findall(r"records_\w+", str(document["payload"]))) == {"records_declared"}


def test_what_the_first_page_says_is_signed_and_derived_again(spoilt) -> None:
    for field, change in {
        "groups": lambda p: p["claim"]["groups"][0].update(epsilon=0.1),
        "runs_left": lambda p: p["sites"]["alba"].update(runs_left=99),
        "approvals": lambda p: p["sites"]["alba"].update(approvals=[KEYS[0]]),
        "dates": lambda p: p["sites"]["alba"]["runs"][0].update(first_at=1),
    }.items():
        before = spoilt.report.read_bytes()
        document = canonical.loads(before)
        change(document["payload"])
        spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, DOMAIN, document["payload"])))
        found = verify_report(spoilt.report)
        own = {"groups": ["group epsilon"]}.get(field, [])
        assert [c.name for c in found.failures] == [*own, "every field"], field
        spoilt.report.write_bytes(before)


def test_long_names_are_cut_and_many_sites_are_put_together(document) -> None:
    def many(p: dict[str, Any]) -> None:
        entry = p["sites"]["alba"]
        p["sites"] = {f"{i:03d}-" + "long-name-of-a-hospital-" * 2: {**entry, "runs_left": i} for i in range(40)}

    other = changed(document, many)
    for lang in LANGUAGES:
        text = first_page(other, lang)
        assert not re.search(r"[\w-]{30,}", text)
        assert text.count("long-name") < 20
        assert Speaker(lang)("front.more", n=35) in text
    assert [x.runs for x in front(other["payload"], Speaker("en")).left] == [0, 1, 2, 3, 4], "the scarcest first"


def test_the_cards_quote_the_same_numbers(document) -> None:
    p = document["payload"]
    for lang in LANGUAGES:
        found = cards(p, lang)
        for g in p["claim"]["groups"]:
            assert spoken(g["epsilon"]) in found["model-card.md"]
        assert Speaker(lang)("front.runs_sentence", n=p["sites"]["alba"]["runs_left"]) in found["data-card.md"]


AUDITOR = """\
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "flwr", "tenseal", "opacus", "matplotlib", "pyarrow", "sklearn", "grpc"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from fedveil.common.cli import main
sys.argv = ["fedveil", "audit", "render", sys.argv[1]]
main()
"""


def test_an_auditors_installation_writes_the_pages(spoilt) -> None:
    done = subprocess.run([sys.executable, "-c", AUDITOR, spoilt.folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((spoilt.folder / name).is_file() for name in ("report.html", "report.zh.html", "model-card.md"))


@pytest.mark.skipif(pdf.browser() is None or not shutil.which("pdftotext"), reason="no Chromium or no pdftotext here")
@pytest.mark.parametrize("lang", LANGUAGES)
def test_on_paper_all_of_it_is_the_first_page(document, lang, tmp_path) -> None:
    def worst(p: dict[str, Any]) -> None:
        entry = p["sites"]["alba"]
        p["sites"] = {f"{i:03d}-" + "long-name-of-a-hospital-" * 2: {**entry, "runs_left": i} for i in range(40)}
        p["simulated"], p["ledgers_missing"] = True, ["lost"]

    say = Speaker(lang)
    for name, other in (("plain", document), ("worst", changed(document, worst))):
        (page := tmp_path / f"{name}.html").write_text(render_html(other, lang), encoding="utf-8")
        out = pdf.print_page(page, tmp_path / f"{name}.pdf")
        texts = subprocess.run(["pdftotext", "-layout", out, "-"], capture_output=True, text=True, check=True).stdout
        first, second = re.sub(r"[ \n]", "", texts).split("\f")[:2]
        for key in (
            "front.quote",
            "front.left",
            "front.dates",
            "front.approved",
            "front.fallback_why",
            "page.verified_not",
        ):
            assert say(key).replace(" ", "") in first, key
        assert second.startswith(say("front.details").replace(" ", ""))
