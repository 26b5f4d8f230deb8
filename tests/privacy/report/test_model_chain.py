"""The chain of models: a changed one in the middle is found, in the journal, the report and the sums themselves."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common import canonical, identity
from fedveil.common.wire import Packet
from fedveil.privacy.joining import chained
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import Check, verify_report

OTHER = "a" * 64


def failed(w) -> Check:
    found = verify_report(w.report, consortium_key=w.public).failed
    assert found is not None
    return found


def body(items: list[Any], kind: str, nth: int = 0) -> dict[str, Any]:
    return [b for k, b in items if k == kind][nth]


def test_an_honest_chain_is_counted(honest) -> None:
    check = next(c for c in verify_report(honest.report).checks if c.name == "model chain")
    assert check.detail.startswith("3 models, the final one")


def test_a_model_that_the_report_alone_changes(spoilt) -> None:
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    payload["rounds"][1]["model_hash"] = OTHER
    spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, "fedveil/report/1", payload)))
    assert failed(spoilt).name == "model chain"
    assert "after round 2" in failed(spoilt).detail


@pytest.mark.parametrize("rows", [lambda r: r.clear(), lambda r: r.append(r[-1]), lambda r: r.__setitem__(0, 4)])
def test_a_report_with_other_rounds(spoilt, rows) -> None:
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    rows(payload["rounds"])
    spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, "fedveil/report/1", payload)))
    assert failed(spoilt).name == "model chain"


def test_an_aborted_round_leaves_the_model_as_it_was(spoilt) -> None:
    """The honest run's round 3 was aborted: what follows it must start where it started."""

    def moved(items: list[Any]) -> None:
        body(items, "round.open", 3)["model_hash"] = OTHER

    spoilt.rewrite("journal.jsonl", "server", moved)
    build_report(spoilt.folder, spoilt.server)
    assert failed(spoilt).name == "model chain"
    assert "round 4 does not start" in failed(spoilt).detail


# -- sums that the server keeps and cannot read -----------------------------------------------------------------------


@pytest.fixture
def blinded(make, planned):
    """A run whose sums only the sites read: its models are named by sums that lie beside the journal."""
    w = make(planned(reveal_to="sites"), aborted={3})
    folder = w.folder / "sums"
    folder.mkdir()

    def named(items: list[Any]) -> None:
        now = items[0][1]["model_hash"]
        for kind, b in items:
            if kind == "round.open":
                b["model_hash"] = now
            elif kind == "round.applied":
                packet = Packet({"kind": "blinded", "round": b["round"]}, {"opening": bytes([b["round"]]) * 500})
                (folder / f"{b['round']}.json").write_bytes(canonical.dumps(packet.header))
                (folder / f"{b['round']}.bin").write_bytes(packet.buffers["opening"])
                now = b["model_hash"] = chained(now, packet)
        items[-1][1]["model_hash"] = now

    w.rewrite("journal.jsonl", "server", named)
    last = w.rows("journal.jsonl")[-1]["body"]["model_hash"]

    def ended(items: list[Any]) -> None:
        body(items, "model")["model_hash"] = last

    w.forge(ledgers=dict.fromkeys(w.sites, ended))
    return w


def test_the_sums_give_the_names(blinded) -> None:
    found = verify_report(blinded.report, consortium_key=blinded.public)
    assert found.ok, found.failures
    assert "3 blinded sums give the same names" in next(c.detail for c in found.checks if c.name == "model chain")


SPOILT = {
    "a sum that was changed": ("blinded sum of round 2", lambda f: (f / "2.bin").write_bytes(b"\x02" * 499 + b"\x03")),
    "a header that was changed": ("blinded sum of round 2", lambda f: (f / "2.json").write_bytes(b'{"round":3}')),
    "no JSON": ("the sum of round 4", lambda f: (f / "4.json").write_bytes(b"{")),
    "a sum that is missing": ("round 4 is missing", lambda f: (f / "4.bin").unlink()),
    "a header that is missing": ("4.json is missing", lambda f: (f / "4.json").unlink()),
    "two sums swapped": ("blinded sum of round 1", lambda f: _swap(f / "1.bin", f / "2.bin")),
}


def _swap(a, b) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize("what", SPOILT)
def test_a_sum_that_does_not_give_its_model_is_named(blinded, what) -> None:
    word, change = SPOILT[what]
    change(next(blinded.folder.glob("*/1.bin")).parent)
    assert failed(blinded).name == "model chain"
    assert word in failed(blinded).detail


def test_an_intermediate_model_that_everybody_swears_to_is_found(blinded) -> None:
    """The server renames the model between two rounds, consistently, in all that it signs: the sums say otherwise."""
    old = next(r["body"]["model_hash"] for r in blinded.rows("journal.jsonl") if r["kind"] == "round.applied")

    def renamed(items: list[Any]) -> None:
        for _, b in items:
            if b.get("model_hash") == old:
                b["model_hash"] = OTHER

    blinded.rewrite("journal.jsonl", "server", renamed)
    build_report(blinded.folder, blinded.server)
    assert failed(blinded).name == "model chain"
    assert "round 1" in failed(blinded).detail
