"""No byte, row or order of any journal can change without a named failure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.common import canonical, identity
from fedveil.common.errors import VerificationError
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import Verification, verify_report

JOURNALS = ("journal.jsonl", "journals/alba.jsonl", "journals/berg.jsonl", "journals/cava.jsonl", "journals/dorn.jsonl")
Item = tuple[str, dict[str, Any]]


def owner(name: str) -> str:
    return "server" if name == "journal.jsonl" else Path(name).stem


def failed(v: Verification) -> str:
    assert not v.ok
    assert v.claim == ""
    assert v.failed is not None
    with pytest.raises(VerificationError, match=v.failed.name):
        v.raise_for_failure()
    return v.failed.name


def culprit(name: str) -> str:
    return "server journal" if name == "journal.jsonl" else f"ledger of {Path(name).stem}"


def test_an_honest_run_passes_every_check(honest) -> None:
    v = verify_report(honest.report, consortium_key=honest.public)
    assert [c.name for c in v.checks if not c.passed] == []
    v.raise_for_failure()
    assert v.pinned
    assert not v.simulated
    assert "ε = 2" in v.claim
    assert {f"ledger of {s}" for s in honest.sites} < {c.name for c in v.checks}


def test_without_a_pinned_key_the_result_says_so(honest) -> None:
    v = verify_report(honest.report)
    assert v.ok
    assert not v.pinned
    assert "NOT pinned" in next(c.detail for c in v.checks if c.name == "roster")


@pytest.mark.parametrize("name", JOURNALS)
def test_every_row_counts(honest, tmp_path, name) -> None:
    """Each row removed (the last one too), doubled, and swapped with the next one."""
    lines = (honest.folder / name).read_bytes().splitlines(keepends=True)
    w = honest.copy(tmp_path / "run")
    for i in range(len(lines)):
        variants = [lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:]]
        if i + 1 < len(lines):
            variants.append([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]])
        for spoilt in variants:
            (w.folder / name).write_bytes(b"".join(spoilt))
            assert failed(verify_report(w.report)) == culprit(name)


@pytest.mark.parametrize("name", JOURNALS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_journal_cut_short_or_emptied(honest, tmp_path, name, rows) -> None:
    w = honest.copy(tmp_path / "run")
    lines = (w.folder / name).read_bytes().splitlines(keepends=True)
    (w.folder / name).write_bytes(b"".join(lines[:rows]))
    assert failed(verify_report(w.report)) == culprit(name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_a_journal_can_change(honest, data) -> None:
    name = data.draw(st.sampled_from(JOURNALS))
    original = (honest.folder / name).read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    new = data.draw(st.one_of(st.integers(0, 255), st.just(original[at] ^ 0x20)).filter(lambda b: b != original[at]))
    _fails_with(honest, name, original[:at] + bytes([new]) + original[at + 1 :])


def test_the_case_of_no_letter_of_a_row_can_change(honest) -> None:
    """One whole row, every letter: hexadecimal digits do not notice their case by themselves."""
    name = "journals/cava.jsonl"
    original = (honest.folder / name).read_bytes()
    start = original.index(b"\n") + 1
    for at in range(start, original.index(b"\n", start) + 1):
        if original[at : at + 1].isalpha():
            _fails_with(honest, name, original[:at] + bytes([original[at] ^ 0x20]) + original[at + 1 :])


def _fails_with(honest, name: str, data: bytes) -> None:
    path, kept = honest.folder / name, (honest.folder / name).read_bytes()
    path.write_bytes(data)
    try:
        assert failed(verify_report(honest.report)) == culprit(name)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("name", JOURNALS)
def test_an_owner_who_signs_his_journal_anew_is_caught_by_the_heads(spoilt, name) -> None:
    """The same rows at another time: perfect signatures, other hashes."""
    spoilt.rewrite(name, owner(name), lambda items: items[1][1].update(extra="later"))
    assert failed(verify_report(spoilt.report)) == culprit(name)


# -- a dishonest server: it signs its journal and the report anew, so only the sites' signatures are against it ----


def _server_lies(w, change: Callable[[list[Item]], Any]) -> str:
    w.rewrite("journal.jsonl", "server", change)
    try:
        build_report(w.folder, w.server)
    except VerificationError:
        # The builder refuses; a liar would write the report by hand, with the new head and the old numbers.
        document = canonical.loads(w.report.read_bytes())
        lines = (w.folder / "journal.jsonl").read_bytes().splitlines()
        document["payload"]["hashes"]["heads"]["server"] = [len(lines), canonical.loads(lines[-1])["hash"]]
        w.report.write_bytes(canonical.dumps(identity.signed(w.server, "fedveil/report/1", document["payload"])))
    return failed(verify_report(w.report))


def _body(items: list[Item], kind: str, nth: int = 0) -> dict[str, Any]:
    return [b for k, b in items if k == kind][nth]


def _drop(items: list[Item], kind: str, nth: int = 0) -> None:
    del items[[i for i, (k, _) in enumerate(items) if k == kind][nth]]


LIES: dict[str, tuple[str, Callable[[list[Item]], Any]]] = {
    "a round that never was": ("order of events", lambda x: _drop(x, "round.open", 1)),
    "rounds in another order": ("order of events", lambda x: _body(x, "round.open").update(round=2)),
    "a set that was not announced": ("order of events", lambda x: _drop(x, "round.set")),
    "another set than announced": ("order of events", lambda x: _body(x, "round.applied")["members"].pop()),
    "a second announcement": ("order of events", lambda x: x.insert(4, x[3])),
    "a member twice": ("order of events", lambda x: _body(x, "round.set")["members"].append("alba")),
    "rows after the end": ("order of events", lambda x: x.append(("run.resumed", {**x[3][1], "round": 5}))),
    "no end": ("order of events", lambda x: x.pop()),
    "another session": ("order of events", lambda x: _body(x, "round.set").update(session="f" * 64)),
    "an unknown kind": ("order of events", lambda x: x.insert(2, ("round.secret", {"session": x[0][1]["session"]}))),
    "a plan the sites did not sign": ("join statements", lambda x: x[0][1].update(plan_hash="0" * 64)),
    "a roster the sites did not sign": ("join statements", lambda x: x[0][1].update(roster_hash="0" * 64)),
    "statements other than those kept": ("join statements", lambda x: x[1][1].update(joins_digest="0" * 64)),
    "a smaller crowd": ("rounds", lambda x: _shrink(x, 0, ["alba", "berg"])),
    "a stranger in the sum": ("rounds", lambda x: _shrink(x, 0, ["alba", "berg", "cava", "evil"])),
    "more noise than there was": ("rounds", lambda x: _body(x, "round.applied").update(noise_multiplier=9.0)),
    "a site that never charged": ("charges", lambda x: _shrink(x, 1, ["alba", "berg", "cava", "dorn"])),
    "a model from elsewhere": ("model chain", lambda x: _body(x, "round.open", 2).update(model_hash="a" * 64)),
    "another first model": ("model chain", lambda x: x[0][1].update(model_hash="a" * 64)),
    "another last model": ("model chain", lambda x: x[-1][1].update(model_hash="a" * 64)),
    "complete when it was not": ("rounds", lambda x: _cut_last_round(x, "COMPLETED")),
    "out of budget when it was not": ("charges", lambda x: _cut_last_round(x, "BUDGET_EXHAUSTED")),
    "another count of steps": ("order of events", lambda x: x[-1][1].update(steps_done=1)),
    "a ledger head it never got": ("ledger of berg", lambda x: x[-1][1]["heads"].update(berg=[3, "b" * 64])),
    "two ledgers left out": ("ledger of alba", lambda x: [x[-1][1]["heads"].pop(s) for s in ("alba", "berg")]),
}  # fmt: skip


def _shrink(items: list[Item], nth: int, members: list[str]) -> None:
    for kind in ("round.set", "round.applied"):
        _body(items, kind, nth)["members"] = list(members)
    if nth == 1:  # all four: the plan's noise at n = 4, t = 1, h = 2
        sigma = _body(items, "round.applied", 0)["noise_multiplier"]
        _body(items, "round.applied", nth)["noise_multiplier"] = sigma


def _cut_last_round(items: list[Item], status: str) -> None:
    del items[-4:-1]
    items[-1][1].update(
        status=status, steps_done=2, model_hash=items[-4][1].get("model_hash", items[-3][1].get("model_hash"))
    )


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_server_is_caught(spoilt, lie) -> None:
    check, change = LIES[lie]
    if lie == "out of budget when it was not":
        # Nothing contradicts the shorter journal except the sites' own: they charged a round it does not have,
        # and noted a model it does not know.
        assert _server_lies(spoilt, change) in (check, "model chain", "ledger of alba", "ledgers delivered")
    else:
        assert _server_lies(spoilt, change) == check


# -- a dishonest site, with the server's help: everything is signed anew except the other sites' statements --------


def _site_lies(w, site: str, change: Callable[[list[Item]], Any]) -> str:
    name = f"journals/{site}.jsonl"
    w.rewrite(name, site, change)
    lines = (w.folder / name).read_bytes().splitlines()
    head = [len(lines), canonical.loads(lines[-1])["hash"]]

    def tell(items: list[Item]) -> None:
        items[-1][1]["heads"][site] = head

    document = canonical.loads(w.report.read_bytes())
    document["payload"]["hashes"]["heads"][site] = head
    w.report.write_bytes(canonical.dumps(identity.signed(w.server, "fedveil/report/1", document["payload"])))
    w.rewrite("journal.jsonl", "server", tell)
    lines = (w.folder / "journal.jsonl").read_bytes().splitlines()
    document["payload"]["hashes"]["heads"]["server"] = [len(lines), canonical.loads(lines[-1])["hash"]]
    w.report.write_bytes(canonical.dumps(identity.signed(w.server, "fedveil/report/1", document["payload"])))
    return failed(verify_report(w.report))


def _cheaper(items: list[Item]) -> None:
    _body(items, "spend", -1)["event"] = SampledGaussian(1.0, 400.0).to_json()


SITE_LIES: dict[str, tuple[str, str, Callable[[list[Item]], Any]]] = {
    "a charge left out": ("charges", "", lambda x: (_drop(x, "commit", -1), _drop(x, "spend", -1))),
    "a cheaper charge": ("charges", "", _cheaper),
    "a charge under another plan": ("charges", "", lambda x: _body(x, "spend", -1).update(plan_hash="0" * 64)),
    "a charge for a round that was not": ("charges", "", lambda x: _add_spend(x, 9)),
    "history rewritten": ("ledger of berg", "continue", lambda x: _body(x, "spend").update(session="another")),
    "a commit without a charge": ("ledger of berg", "never charged", lambda x: _drop(x, "spend", -1)),
    "a step charged twice": ("ledger of berg", "second time", lambda x: x.insert(-2, x[-4])),
    "past the cap": ("ledger of berg", "past the cap", lambda x: x.insert(-5, ("ledger.cap", {"cap_epsilon": 3.0}))),
    "spending after a refusal": ("ledger of berg", "refused a step", lambda x: x.insert(-4, _refusal(x))),
    "spending after the end": ("ledger of berg", "had ended", lambda x: x.extend([x.pop(-4), x.pop(-3)])),
    "a model nobody sent": ("ledger of berg", "names a model", lambda x: _body(x, "model").update(model_hash="a" * 64)),
    "an order no accountant can bear": ("ledger of berg", "continue", lambda x: x[0][1].update(order=1e12)),
}  # fmt: skip


def _refusal(items: list[Item]) -> Item:
    return "refused", {"session": _body(items, "model")["session"], "reason": "BudgetExhausted"}


def _add_spend(items: list[Item], round_: int) -> None:
    items.insert(-2, ("spend", {**_body(items, "spend", -1), "round": round_}))


@pytest.mark.parametrize("lie", SITE_LIES)
def test_a_lying_site_is_caught_even_if_the_server_helps(spoilt, lie) -> None:
    check, word, change = SITE_LIES[lie]
    assert _site_lies(spoilt, "berg", change) == check
    if word:
        detail = next(c.detail for c in verify_report(spoilt.report).checks if not c.passed)
        assert word in detail


# -- the files ------------------------------------------------------------------------------------------------------

FILES = ("plan.json", "roster.json", "joins.json", "contract.json", "consortium.pub", "journal.jsonl", "metrics.jsonl")


@pytest.mark.parametrize("name", [*FILES, "report.json", "journals/alba.jsonl"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"payload":1e999}', None])
def test_a_malformed_or_missing_file_is_a_failed_check_and_no_traceback(spoilt, name, data) -> None:
    if data is None:
        (spoilt.folder / name).unlink()
    else:
        (spoilt.folder / name).write_bytes(data)
    assert failed(verify_report(spoilt.report))


def test_a_missing_folder_a_folder_and_a_pipe(spoilt, tmp_path) -> None:
    assert failed(verify_report(tmp_path / "nothing" / "report.json")) == "files"
    assert failed(verify_report(tmp_path)) == "files"
    (spoilt.folder / "plan.json").unlink()
    (spoilt.folder / "plan.json").mkdir()
    assert failed(verify_report(spoilt.report)) == "files"


def test_a_model_file_must_be_the_model_of_the_journals(spoilt) -> None:
    path = spoilt.folder / "model.f32"
    path.write_bytes(b"model 4")
    detail = next(c.detail for c in verify_report(spoilt.report).checks if c.name == "model chain")
    assert "its file too" in detail
    path.write_bytes(b"model 5")
    assert failed(verify_report(spoilt.report)) == "model chain"


def test_the_journal_of_a_stranger(spoilt) -> None:
    shutil.copy(spoilt.folder / "journals/alba.jsonl", spoilt.folder / "journals/evil.jsonl")
    assert failed(verify_report(spoilt.report)) == "roster"


def test_a_ledger_handed_in_for_another_site(spoilt) -> None:
    shutil.copy(spoilt.folder / "journals/alba.jsonl", spoilt.folder / "journals/berg.jsonl")
    assert failed(verify_report(spoilt.report)) == "ledger of berg"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_files_of_the_bundle_cannot_change_their_meaning(honest, data) -> None:
    name = data.draw(st.sampled_from(["plan.json", "roster.json", "joins.json", "contract.json", "metrics.jsonl"]))
    path = honest.folder / name
    original = path.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda b: b != original[at]))
    path.write_bytes(original[:at] + bytes([new]) + original[at + 1 :])
    try:
        assert failed(verify_report(honest.report))
    finally:
        path.write_bytes(original)
