"""What the server can forge alone of journals: the sites' ledgers in the folder, its own journal, models, sums."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from forged_run import CAPPED, NAMES, OTHER, PLAN, Forger, Items, body
from forgery import ALONE, LEFT_OUT, forged

from fedveil.common import canonical
from fedveil.common.units import SiteId
from fedveil.common.wire import sha256
from fedveil.privacy.dp.events import SampledGaussian

DAY = 86_400


# -- the server alone: ledgers ----------------------------------------------------------------------------------------


def _edit_row(f: Forger, site: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """A ledger edited by somebody without its key: numbers and hashes are right, signatures cannot be."""
    rows = f.rows(site)
    change(rows)
    last = "0" * 64
    for n, r in enumerate(rows):
        core = {"v": 1, "n": n, **{k: r[k] for k in ("owner", "at", "kind", "body")}, "prev": last}
        r.update(n=n, prev=last, hash=(last := canonical.digest(core)))
    (f.folder / f.file(site)).write_bytes(b"".join(canonical.dumps(r) + b"\n" for r in rows))
    f.tell()


def _spends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if r["kind"] == "spend"]


@forged(ALONE, "a cheaper price in a site's charge", f"ledger of {OTHER}")
def cheaper_row(f: Forger) -> None:
    event = SampledGaussian(0.5, 99.0).to_json()
    _edit_row(f, OTHER, lambda rows: _spends(rows)[-1]["body"].update(event=event))


@forged(ALONE, "a charge taken out of a site's ledger", f"ledger of {OTHER}")
def charge_removed(f: Forger) -> None:
    _edit_row(f, OTHER, lambda rows: rows.remove(_spends(rows)[-1]))


@forged(ALONE, "the last rows of a site's ledger cut off", f"ledger of {OTHER}")
def tail_cut(f: Forger) -> None:
    f.cut(OTHER, 3)
    f.tell()


def _left_out(f: Forger, *sites: str) -> None:
    for site in sites:
        (f.folder / f.file(site)).unlink()
    f.tell()


@forged(
    ALONE,
    "one site's ledger left out",
    why=LEFT_OUT,
)
def one_ledger(f: Forger) -> None:
    _left_out(f, OTHER)


@forged(ALONE, "two sites' ledgers left out", "ledgers delivered")
def two_ledgers(f: Forger) -> None:
    _left_out(f, OTHER, CAPPED)


@forged(ALONE, "the ledgers of the run before, under this run's report", "server journal")
def merged(f: Forger) -> None:
    for name in ("journal.jsonl", *(f.file(n) for n in NAMES)):
        shutil.copy(f.base.home / "first" / name, f.folder / name)


# -- the server alone: its journal ------------------------------------------------------------------------------------


@forged(ALONE, "a round fewer, in journal, metrics, model and report", f"ledger of {NAMES[0]}")
def round_fewer(f: Forger) -> None:
    states = f.steps({})

    def change(items: Items) -> None:
        items[:] = [i for i in items if i[1].get("round") != PLAN.steps]
        body(items, "run.end").update(status="ABORTED", steps_done=PLAN.steps - 1, model_hash=states[2].hash)

    lines = (f.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (f.folder / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    (f.folder / "model.f32").write_bytes(states[2].sent())
    f.tell(change)


def _other_sum(f: Forger, round_: int) -> None:
    """Another opened sum, short enough; the states and models after it are those that it gives."""
    values = f.values(round_) // 2
    named = f.put_opening(round_, replace(f.opening(round_), phases=f.phases(values)))
    states = f.steps({round_: values})

    def change(items: Items) -> None:
        for kind, b in items:
            r = b.get("round", 0)
            if kind == "round.open" and r > round_:
                b |= {"model_hash": states[r - 1].hash, "state": states[r - 1].digest}
            if kind == "round.applied" and r >= round_:
                b |= {"model_hash": states[r].hash, "state": states[r].digest}
                b |= {"sum": named} if r == round_ else {}
        body(items, "run.end")["model_hash"] = states[PLAN.steps].hash

    (f.folder / "model.f32").write_bytes(states[PLAN.steps].sent())
    f.tell(change)


@forged(ALONE, "another opened sum of a round in the middle, with all models after it", f"ledger of {NAMES[0]}")
def middle_sum(f: Forger) -> None:
    _other_sum(f, 1)


@forged(ALONE, "another opened sum of the last round, with the model that it gives", f"ledger of {NAMES[0]}")
def last_sum(f: Forger) -> None:
    _other_sum(f, PLAN.steps)


@forged(ALONE, "the hash of a model in the middle", "model chain")
def middle_model(f: Forger) -> None:
    f.tell(lambda items: body(items, "round.applied").update(model_hash="a" * 64))


def _middle_everywhere(f: Forger) -> None:
    def change(items: Items) -> None:
        body(items, "round.applied")["model_hash"] = body(items, "round.open", 1)["model_hash"] = "a" * 64

    f.tell(change)


forged(ALONE, "the hash of a model in the middle, wherever it stands", "model chain")(_middle_everywhere)


@forged(
    ALONE, "the hash of a model in the middle, wherever it stands, with the opened sums kept back",
    why="sites sign the name of the whole state, not of its rounded weights: for one in the middle, the opened sums "
    "must be there to tell; no figure depends on it",
)  # fmt: skip
def middle_without_sums(f: Forger) -> None:
    (f.folder / "sums").rename(f.folder / "elsewhere")
    _middle_everywhere(f)


@forged(ALONE, "another final model: file, journal and report", "model chain")
def last_model(f: Forger) -> None:
    data = b"\0" * 4 * PLAN.model.parameters
    (f.folder / "model.f32").write_bytes(data)

    def change(items: Items) -> None:
        body(items, "round.applied", -1)["model_hash"] = sha256(data)
        body(items, "run.end")["model_hash"] = sha256(data)

    f.tell(change)


def _members(f: Forger, round_: int, members: list[str]) -> None:
    def change(items: Items) -> None:
        for kind, b in items:
            if kind in ("round.set", "round.applied") and b["round"] == round_:
                b["members"] = members
            if kind == "round.applied" and b["round"] == round_:
                b["noise_multiplier"] = PLAN.realised_noise_multiplier(len(members))

    opening = f.opening(round_)
    some = next(iter(opening.members.values()))
    rows = {SiteId(name): opening.members.get(SiteId(name), some) for name in members}
    named = f.put_opening(round_, replace(opening, members=rows))

    def both(items: Items) -> None:
        change(items)
        body(items, "round.applied", round_ - 1)["sum"] = named

    f.tell(both)


@forged(ALONE, "a member left out of a sum's set", "signed sets")
def member_out(f: Forger) -> None:
    _members(f, 1, [n for n in NAMES if n != OTHER])


@forged(ALONE, "a site that refused shown as a member, for more noise", "signed sets")
def refused_member(f: Forger) -> None:
    _members(f, PLAN.steps, [*NAMES])


@forged(ALONE, "the run dated 90 days earlier", "row times")
def earlier(f: Forger) -> None:
    f.tell(at=lambda _, t: t - 90 * DAY)


@forged(ALONE, "a row of its journal dated before the row before it", "row times")
def falling(f: Forger) -> None:
    f.tell(at=lambda n, t: t - 3600 * (n == 5))


@forged(ALONE, "a row of its journal twice", "order of events")
def twice(f: Forger) -> None:
    f.tell(lambda items: items.insert(5, items[4]))


@forged(
    ALONE, "the refusal of a site left out",
    why="an answer may be lost on the way, so a ledger's refusal is no proof that the server heard it; no figure "
    "depends on it",
)  # fmt: skip
def unsaid_refusal(f: Forger) -> None:
    f.tell(lambda items: items.remove(next(i for i in items if i[0] == "site.refused")))


@forged(
    ALONE, "a real run called a simulated one",
    why="it claims less: the result says in capitals that the run protected nobody",
)  # fmt: skip
def called_simulated(f: Forger) -> None:
    f.tell(lambda items: body(items, "run.open").update(simulated=True))


def _results(f: Forger) -> None:
    rows = [canonical.loads(x) for x in (f.folder / "metrics.jsonl").read_bytes().splitlines()]
    rows[-1]["metrics"] = {**rows[-1]["metrics"], "accuracy": 0.99}
    (f.folder / "metrics.jsonl").write_bytes(b"".join(canonical.dumps(r) + b"\n" for r in rows))
    f.tell(lambda items: body(items, "run.end").update(metrics=rows[-1]["metrics"]))


forged(
    ALONE, "better results, in journal, metrics and report, before the sites sign",
    why="the server alone evaluates the model on its public table; whoever has the table and the model can repeat it",
)(_results)  # fmt: skip
forged(
    ALONE,
    "better results everywhere, after the sites signed; 2 signatures are asked for",
    "countersignatures",
    signatures=2,
)(_results)


@forged(
    ALONE, "another version of the software, another time of writing",
    why="what ran at the server is its word alone; no figure depends on it",
)  # fmt: skip
def software(f: Forger) -> None:
    f.state(lambda p: (p.update(written_at=1), p["software"]["fedveil"].update(version="9.9")))


@forged(ALONE, "report.html with a smaller ε than report.json", why="the page is a picture that nobody signs; "
        "'fedveil audit render' writes it again")  # fmt: skip
def page(f: Forger) -> None:
    (f.folder / "report.html").write_text("<h1>&epsilon; = 0.1</h1>")
