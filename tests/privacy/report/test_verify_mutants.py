"""One hundred copies of an honest run, each spoilt in another way: all refused, each for its own reason.

Some are spoilt by a stranger, who holds no key; some by a dishonest server or site, who signs everything anew that it
can sign. The original passes before, between and after them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedveil.common import canonical, identity
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report.verify import verify_report

JOURNALS = ("journal.jsonl", *(f"journals/{s}.jsonl" for s in ("alba", "berg", "cava", "dorn")))
DOMAIN = "fedveil/report/1"
Change = Callable[[Any], Any]
Mutant = tuple[str, str, str, Change]  # name, the check that must fail first, a word of its reason, what is done


def culprit(name: str) -> str:
    return "server journal" if name == "journal.jsonl" else f"ledger of {Path(name).stem}"


def lines_of(w, name: str) -> list[bytes]:
    return (w.folder / name).read_bytes().splitlines(keepends=True)


def put(w, name: str, rows: list[bytes]) -> None:
    (w.folder / name).write_bytes(b"".join(rows))


# -- without any key --------------------------------------------------------------------------------------------------


def flip(name: str, part: float) -> Change:
    def change(w) -> None:
        data = bytearray((w.folder / name).read_bytes())
        data[int(part * (len(data) - 1))] ^= 1
        (w.folder / name).write_bytes(bytes(data))

    return change


def drop(name: str, row: int) -> Change:
    def change(w) -> None:
        rows = lines_of(w, name)
        del rows[row]
        put(w, name, rows)

    return change


def double(name: str, row: int) -> Change:
    def change(w) -> None:
        rows = lines_of(w, name)
        put(w, name, [*rows[: row + 1], *rows[row:]])

    return change


def swap(name: str, row: int) -> Change:
    def change(w) -> None:
        rows = lines_of(w, name)
        rows[row], rows[row + 1] = rows[row + 1], rows[row]
        put(w, name, rows)

    return change


def borrow_signature(name: str) -> Change:
    def change(w) -> None:
        rows = [canonical.loads(x) for x in lines_of(w, name)]
        rows[2]["sig"] = rows[1]["sig"]
        put(w, name, [canonical.dumps(r) + b"\n" for r in rows])

    return change


def edit_json(name: str, change: Change) -> Change:
    def apply(w) -> None:
        value = canonical.loads((w.folder / name).read_bytes())
        change(value)
        (w.folder / name).write_bytes(canonical.dumps(value))

    return apply


def strangers() -> Iterator[Mutant]:
    for name in JOURNALS:
        for part in (0.02, 0.35, 0.5, 0.77, 0.99):
            yield f"byte at {part} of {name}", culprit(name), "row", flip(name, part)
        for row in (0, 2):
            yield f"row {row} of {name} left out", culprit(name), "row", drop(name, row)
        yield f"last row of {name} left out", culprit(name), "head", drop(name, -1)
        yield f"row 1 of {name} twice", culprit(name), "missing or moved", double(name, 1)
        for row in (0, 3):
            yield f"rows {row}, {row + 1} of {name} swapped", culprit(name), "missing or moved", swap(name, row)
        yield f"another row's signature in {name}", culprit(name), "not signed", borrow_signature(name)
    for site in ("alba", "dorn"):
        spoil = lambda d, s=site: d[s].update(signature="0" * 128)  # noqa: E731
        yield f"no signature of {site} under the plan", "join statements", "not the one", edit_json("joins.json", spoil)
    yield "report signature", "report signature", "", edit_json("report.json", lambda d: d.update(signature="0" * 128))
    yield "roster signature", "roster", "", edit_json("roster.json", lambda d: d.update(signature="0" * 128))
    for key, value in (("noise_multiplier", 99.0), ("delta", 1e-6), ("colluders", 0), ("steps", 5)):
        spoil = lambda d, k=key, v=value: d.update({k: v})  # noqa: E731
        yield f"plan with another {key}", "join statements", "another plan", edit_json("plan.json", spoil)


# -- with the server's key, or a site's and the server's --------------------------------------------------------------


def sign_report(w, change: Change) -> None:
    payload = canonical.loads(w.report.read_bytes())["payload"]
    change(payload)
    w.report.write_bytes(canonical.dumps(identity.signed(w.server, DOMAIN, payload)))


def claims(change: Change) -> Change:
    return lambda w: sign_report(w, change)


def head(w, name: str) -> list[Any]:
    rows = lines_of(w, name)
    return [len(rows), canonical.loads(rows[-1])["hash"]]


def server(change: Change) -> Change:
    """The server writes its journal anew after ``change`` and signs it and a report that names its head."""

    def apply(w) -> None:
        w.rewrite("journal.jsonl", "server", change)
        sign_report(w, lambda p: p["hashes"]["heads"].update(server=head(w, "journal.jsonl")))

    return apply


def site(owner: str, change: Change) -> Change:
    """A site writes its ledger anew, and the server names its new head everywhere."""

    def apply(w) -> None:
        name = f"journals/{owner}.jsonl"
        w.rewrite(name, owner, change)
        new = head(w, name)
        sign_report(w, lambda p: p["hashes"]["heads"].update({owner: new}))
        server(lambda items: items[-1][1]["heads"].update({owner: new}))(w)

    return apply


def older(owner: str, rows: int) -> Change:
    """An older copy of a ledger, with its older head named by the server: what was spent since is forgotten."""

    def change(items: list[Any]) -> None:
        del items[-rows:]

    return site(owner, change)


def body(items: list[Any], kind: str, nth: int = 0) -> dict[str, Any]:
    return [b for k, b in items if k == kind][nth]


def cheaper_metrics(w) -> None:
    rows = [canonical.loads(x) for x in lines_of(w, "metrics.jsonl")]
    rows[0]["epsilon_opened"] /= 2
    put(w, "metrics.jsonl", [canonical.dumps(r) + b"\n" for r in rows])


def countersigned_elsewhere(w) -> None:
    statement = {"v": 1, "site": "alba", "session": w.session, "report": "0" * 64}
    w.json("signatures.json", {"alba": identity.signed(w.sites["alba"], "fedveil/report-seen/1", statement)})


def members(nth: int, names: str) -> Change:
    def change(items: list[Any]) -> None:
        for kind in ("round.set", "round.applied"):
            body(items, kind, nth)["members"] = names.split()
        body(items, "round.applied", nth)["noise_multiplier"] = body(items, "round.applied", 0)["noise_multiplier"]

    return server(change)


def insiders() -> Iterator[Mutant]:
    for by in (0.5, 0.9, 0.99, 1.1):
        spoil = claims(lambda p, f=by: p["claim"].update(epsilon=f * p["claim"]["epsilon"]))
        yield f"ε times {by}", "epsilon by PLD", "is claimed", spoil
    yield "ε by RDP", "epsilon by RDP", "stated", claims(lambda p: p["claim"].update(epsilon_rdp=0.5))
    yield "fallback ε", "fallback epsilon", "it is", claims(lambda p: p["claim"].update(fallback_epsilon=0.5))
    yield "the curve", "privacy curve", "promises", claims(lambda p: p["claim"]["curve"][2].__setitem__(1, 1e-12))
    yield "a budget", "budgets", "spent", claims(lambda p: p["sites"]["cava"].update(epsilon_after=0.1))
    for key, less in (("steps_charged", 3), ("epsilon_charged_pld", 0.1), ("epsilon_charged_rdp", 0.1)):
        spoil = claims(lambda p, k=key, v=less: p["accounting"].update({k: v}))
        yield f"a smaller {key}", "budgets", "charged to one site", spoil
    yield "a Merkle root", "every field", "roots", claims(lambda p: p["hashes"]["roots"].update(alba="0" * 64))
    yield "a field that no schema knows", "every field", "'praise'", claims(lambda p: p.update(praise="safe"))
    yield "ε of the rounds opened, in the metrics", "metrics file", "it states", cheaper_metrics
    yield "a site's signature under another report", "countersignatures", "another report", countersigned_elsewhere
    yield "survivors in the report", "every field", "members", claims(lambda p: p["rounds"][1].update(members=4))
    yield "fewer survivors than n - d", "rounds", "fewer than", members(0, "alba berg")
    yield "a stranger among the survivors", "rounds", "not on the roster", members(0, "alba berg cava evil")
    yield "a survivor who charged nothing", "charges", "not charged", members(1, "alba berg cava dorn")
    noise = server(lambda x: body(x, "round.applied").update(noise_multiplier=99.0))
    yield "more noise than the survivors give", "rounds", "realised noise", noise
    for key in ("plan_hash", "roster_hash"):
        spoil = server(lambda x, k=key: x[0][1].update({k: "0" * 64}))
        yield f"another {key} at the server", "join statements", "another plan or roster", spoil
    spoil = site("berg", lambda x: body(x, "plan.accepted").update(plan_hash="0" * 64))
    yield "another plan accepted by a site", "ledger of berg", "continue", spoil
    spoil = site("berg", lambda x: body(x, "spend", -1).update(plan_hash="0" * 64))
    yield "a charge under another plan", "charges", "another event or plan", spoil
    spoil = site("berg", lambda x: body(x, "spend", -1).update(event=SampledGaussian(1.0, 400.0).to_json()))
    yield "a cheaper charge", "charges", "another event or plan", spoil
    for nth in (0, 2):
        spoil = server(lambda x, n=nth: body(x, "round.open", n).update(model_hash="a" * 64))
        yield f"another model into round {nth}", "model chain", "model before", spoil
    yield "another last model", "model chain", "at the end", server(lambda x: x[-1][1].update(model_hash="a" * 64))
    file = lambda w: (w.folder / "model.f32").write_bytes(b"another model")  # noqa: E731
    yield "a model file that is another", "model chain", "model.f32", file
    yield "another model in the report", "model chain", "names another", claims(
        lambda p: p["hashes"].update(model="a" * 64)
    )  # fmt: skip
    spoil = site("cava", lambda x: body(x, "model").update(model_hash="a" * 64))
    yield "a model that the server never had", "ledger of cava", "names a model", spoil
    for owner in ("alba", "berg"):
        yield f"an older head of {owner}: last charge forgotten", f"ledger of {owner}", "tail was cut", older(owner, 4)
    yield "an older head, from before it joined", "ledger of cava", "continue", older("cava", 12)
    spoil = claims(lambda p: p["hashes"]["heads"].update(dorn=[2, "d" * 64]))
    yield "an older head in the report alone", "ledger of dorn", "report names", spoil


MUTANTS = [*strangers(), *insiders()]


@pytest.fixture(scope="module")
def worn(honest, tmp_path_factory):
    """One copy, put back in order after each use."""
    w = honest.copy(tmp_path_factory.mktemp("mutants") / "run")
    return w, {p: p.read_bytes() for p in w.folder.rglob("*") if p.is_file()}


def test_there_are_over_a_hundred_and_no_two_alike() -> None:
    assert len(MUTANTS) > 100
    assert Counter(m[0] for m in MUTANTS).most_common(1)[0][1] == 1


def test_the_original_passes(worn) -> None:
    assert verify_report(worn[0].report, consortium_key=worn[0].public).ok


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_every_mutant_is_refused_for_its_own_reason(worn, mutant) -> None:
    w, files = worn
    name, check, word, change = mutant
    change(w)
    changed = {p for p in w.folder.rglob("*") if p.is_file() and files.get(p) != p.read_bytes()}
    try:
        assert changed, name
        found = verify_report(w.report, consortium_key=w.public)
        assert found.failed is not None
        assert found.failed.name == check, found.failed
        assert word in found.failed.detail
        assert found.claim == ""
        assert {"check": check, "detail": found.failed.detail} in found.to_json()["mismatches"]
    finally:
        for p in changed:
            p.unlink()
        for p, data in files.items():
            p.write_bytes(data)
