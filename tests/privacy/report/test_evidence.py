"""Single rows, two parties' copies, a site's signature, its local report, paper."""

from __future__ import annotations

import os
import stat

import pytest
from typer.testing import CliRunner

from fedveil.client.peers import PeerHeads
from fedveil.common import canonical, identity
from fedveil.common.contract import Column
from fedveil.common.errors import IdentityError, UsageError, VerificationError
from fedveil.common.journal import Copy, Head, parse
from fedveil.common.units import SiteId
from fedveil.deploy.cli.audit import app
from fedveil.deploy.cli.ledger import app as ledger_app
from fedveil.privacy.report import compare, local, pdf, row_proof
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.countersign import countersign, see, sign
from fedveil.privacy.report.signatures import require
from fedveil.privacy.report.verify import verify_report


def call(*arguments: object, to=app):
    return CliRunner().invoke(to, [str(a) for a in arguments], env={"COLUMNS": "200"})


def journal(w, site: str = "berg"):
    return w.folder / "journals" / f"{site}.jsonl"


# -- single rows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def proof(honest, tmp_path):
    path = tmp_path / "proof.json"
    result = call("prove", journal(honest), 5, "--out", path, to=ledger_app)
    assert result.exit_code == 0, result.exception
    return path


def test_a_row_is_shown_without_its_ledger(honest, proof, tmp_path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("report.json", "roster.json"):  # an auditor who has neither journals nor the rest of the run
        (alone / name).write_bytes((honest.folder / name).read_bytes())
    result = call("row", proof, "--report", alone, "--consortium-key", honest.public)
    assert result.exit_code == 0, result.exception
    assert "row 5 of berg holds" in result.stdout
    assert len(canonical.loads(proof.read_bytes())["path"]) <= 5
    with pytest.raises(VerificationError, match="missing"):
        row_proof.check(proof, alone / "report.json", None)


def test_every_row_of_every_journal_can_be_proved(honest, tmp_path) -> None:
    path = tmp_path / "p.json"
    for name in ("journal.jsonl", "journals/alba.jsonl"):
        for i, row in enumerate(parse((honest.folder / name).read_bytes())):
            path.write_bytes(canonical.dumps(row_proof.prove(honest.folder / name, i)))
            assert row_proof.check(path, honest.report, honest.public).hash == row.hash


FORGERIES = {
    "another body": (lambda p: p["row"]["body"].update(extra=1), "does not lead to the root"),
    "another place": (lambda p: p.update(index=4), "another row"),
    "another owner": (lambda p: p.update(owner="alba"), "another row"),
    "another ledger's row": (lambda p: p["row"].update(owner="alba"), "proof"),
    "another size": (lambda p: p.update(size=p["size"] - 1), "names"),
    "a hash of the path": (lambda p: p["path"].__setitem__(1, "0" * 64), "does not lead to the root"),
    "a shorter path": (lambda p: p["path"].pop(), "shorter"),
    "a longer path": (lambda p: p["path"].append("0" * 64), "longer"),
    "an endless path": (lambda p: p.update(path=["0" * 64] * 1000), "malformed"),
    "no path": (lambda p: p.update(path=None), "malformed"),
    "no row": (lambda p: p.update(row=None), "well-formed"),
    "a version": (lambda p: p.update(v=2), "malformed"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_proof_is_refused(honest, proof, forgery) -> None:
    change, reason = FORGERIES[forgery]
    value = canonical.loads(proof.read_bytes())
    change(value)
    proof.write_bytes(canonical.dumps(value))
    with pytest.raises(VerificationError, match=reason):
        row_proof.check(proof, honest.report, honest.public)


def test_a_root_that_the_server_did_not_sign_proves_nothing(spoilt, proof) -> None:
    document = canonical.loads(spoilt.report.read_bytes())
    document["payload"]["hashes"]["roots"]["berg"] = "0" * 64
    spoilt.report.write_bytes(canonical.dumps(document))
    with pytest.raises(VerificationError, match="signature"):
        row_proof.check(proof, spoilt.report, spoilt.public)


def test_there_is_no_proof_of_a_row_that_is_not_there(honest, tmp_path) -> None:
    for row, size in ((99, None), (-1, None), (5, 5), (0, 999)):
        with pytest.raises(VerificationError, match="no row"):
            row_proof.prove(journal(honest), row, size)


# -- two parties' copies ----------------------------------------------------------------------------------------------


def verdicts(a, b, public=None) -> dict[str, tuple[str, int | None]]:
    return {f.owner: (f.verdict, f.row) for f in compare.compare(a, b, public)}


@pytest.fixture
def copy(honest, tmp_path):
    path = tmp_path / "berg.jsonl"
    path.write_bytes(journal(honest).read_bytes())
    return path


def lines(path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_equal_longer_and_shorter_copies(honest, copy, tmp_path) -> None:
    assert verdicts(journal(honest), copy) == {"berg": ("same", None)}
    short = tmp_path / "short.jsonl"
    short.write_bytes(b"".join(lines(copy)[:4]))
    assert verdicts(short, copy) == {"berg": ("continues", 4)}
    assert verdicts(copy, short) == {"berg": ("cut", 4)}
    result = call("compare", copy, short)
    assert isinstance(result.exception, VerificationError)
    assert result.exception.exit_code == 60
    assert "before row 4" in result.exception.message


def test_a_fork_is_found_at_its_first_row(honest, spoilt) -> None:
    spoilt.rewrite("journals/berg.jsonl", "berg", lambda items: items[6][1].update(session="another"))
    public = identity.public_hex(honest.sites["berg"])
    assert verdicts(journal(honest), journal(spoilt), public) == {"berg": ("forked", 6)}
    assert verdicts(honest.folder, spoilt.folder)["berg"] == ("forked", 6)
    found = canonical.loads(call("compare", honest.folder, spoilt.folder, "--json").stdout)
    assert found["ok"] is False
    assert {"owner": "alba", "verdict": "same"}.items() <= found["journals"][1].items()


def test_a_row_changed_without_the_key_is_found(honest, copy) -> None:
    rows_ = lines(copy)
    rows_[2] = rows_[2].replace(b'"earlier"', b'"earliez"')
    copy.write_bytes(b"".join(rows_))
    assert verdicts(journal(honest), copy) == {"berg": ("altered", 2)}
    copy.write_bytes(b"".join(lines(journal(honest)))[:-9])
    assert verdicts(journal(honest), copy)["berg"][0] == "altered"


def test_a_signature_that_does_not_hold_is_found_with_the_key(honest, copy) -> None:
    rows_ = [canonical.loads(x) for x in lines(copy)]
    rows_[2]["sig"] = rows_[1]["sig"]
    copy.write_bytes(b"".join(canonical.dumps(r) + b"\n" for r in rows_))
    assert verdicts(journal(honest), copy) == {"berg": ("same", None)}
    public = identity.public_hex(honest.sites["berg"])
    assert verdicts(journal(honest), copy, public) == {"berg": ("altered", 2)}


def test_it_says_when_signatures_were_not_checked(honest, copy, tmp_path) -> None:
    public = identity.public_hex(honest.sites["berg"])
    checked = lambda a, b, key=None: {f.owner: f.signatures for f in compare.compare(a, b, key)}  # noqa: E731
    assert checked(journal(honest), copy) == {"berg": False}
    assert checked(journal(honest), copy, public) == {"berg": True}
    assert checked(honest.folder, copy) == {"berg": False}  # the folder's roster has the key, the file has none
    assert set(checked(honest.folder, honest.folder).values()) == {True, None}  # None: the two reports
    assert checked(peers(tmp_path, honest, 5), copy) == {"berg": False}
    assert checked(peers(tmp_path, honest, 5), peers(tmp_path, honest, 5)) == {"berg": None}
    said = call("compare", journal(honest), copy)
    assert said.exit_code == 0
    assert "Signatures were NOT checked (berg)" in " ".join(said.stdout.split())
    assert "NOT checked" not in call("compare", journal(honest), copy, "--public", public).stdout
    shown = canonical.loads(call("compare", journal(honest), copy, "--json").stdout)
    assert shown["journals"][0]["signatures"] is False


def test_another_journal_under_the_same_name_is_found(honest, spoilt) -> None:
    spoilt.rewrite("journals/berg.jsonl", "berg", lambda items: items[0][1].update(lineage="a fresh start"))
    assert verdicts(journal(honest), journal(spoilt)) == {"berg": ("replaced", 0)}


def peers(tmp_path, w, rows_: int, digest: str | None = None, *others: Copy):
    """What a site remembers of berg, written by the site's own program; older ledgers of berg first."""
    hashes = [canonical.loads(x)["hash"] for x in lines(journal(w))]
    path = tmp_path / "peers.json"
    path.unlink(missing_ok=True)
    kept = PeerHeads(path)
    for copy in (*others, Copy(Head(rows_, digest or hashes[rows_ - 1]), hashes[0])):
        kept.keep({SiteId("berg"): copy})
    return path


def test_a_ledger_against_the_heads_that_a_peer_has_seen(honest, copy, tmp_path) -> None:
    total = len(lines(copy))
    assert verdicts(peers(tmp_path, honest, total), copy) == {"berg": ("same", None)}
    assert verdicts(peers(tmp_path, honest, 5), copy) == {"berg": ("continues", 5)}
    assert verdicts(copy, peers(tmp_path, honest, 5)) == {"berg": ("continues", 5)}
    assert verdicts(peers(tmp_path, honest, 5, "a" * 64), copy) == {"berg": ("rewritten", 4)}
    seen = peers(tmp_path, honest, total)
    copy.write_bytes(b"".join(lines(copy)[:-2]))
    assert verdicts(seen, copy) == {"berg": ("cut", total - 2)}
    assert verdicts(copy, seen) == {"berg": ("cut", total - 2)}


def test_two_peers_who_were_told_two_stories(honest, tmp_path) -> None:
    a = peers(tmp_path, honest, 5)
    (tmp_path / "other").mkdir()
    assert verdicts(a, peers(tmp_path / "other", honest, 5, "b" * 64)) == {"berg": ("forked", 4)}
    assert verdicts(a, peers(tmp_path / "other", honest, 7)) == {"berg": ("not comparable", None)}


def test_of_several_ledgers_of_a_site_the_one_is_taken_that_begins_alike(honest, copy, tmp_path) -> None:
    others = [Copy(Head(3, f"{i:064x}"), f"{i + 9:064x}") for i in range(3)]
    assert verdicts(peers(tmp_path, honest, 5, None, *others), copy) == {"berg": ("continues", 5)}
    assert verdicts(peers(tmp_path, honest, 5, "a" * 64, *others), copy) == {"berg": ("rewritten", 4)}
    PeerHeads(tmp_path / "strange.json").keep({SiteId("berg"): others[0]})
    assert verdicts(tmp_path / "strange.json", copy) == {"berg": ("not comparable", None)}
    (tmp_path / "old.json").write_bytes(canonical.dumps({"berg": [5, "a" * 64, lines_hash(copy)]}))
    assert verdicts(tmp_path / "old.json", copy) == {"berg": ("rewritten", 4)}, "as one ledger a site was written"
    done = call("compare", peers(tmp_path, honest, 5, None, *others), copy)
    assert (done.exit_code, "continues" in done.stdout) == (0, True)


def lines_hash(path) -> str:
    return canonical.loads(lines(path)[0])["hash"]


def test_two_reports_of_one_session_must_say_the_same(honest, spoilt) -> None:
    assert verdicts(honest.folder, spoilt.folder)["report.json"] == ("same", None)
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    payload["claim"]["epsilon"] = 1.0
    spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, "fedveil/report/1", payload)))
    found = compare.compare(honest.report, spoilt.report)[0]
    assert (found.owner, found.verdict) == ("report.json", "forked")
    assert "epsilon" in found.detail


def test_what_is_no_journal_cannot_be_compared(honest, copy, tmp_path) -> None:
    bad = tmp_path / "x.json"
    for data in (b"[]", b"{", b'{"berg": [1]}', b'{"berg": [1, "zz", "zz"]}'):
        bad.write_bytes(data)
        with pytest.raises(UsageError):
            compare.compare(bad, copy)
    with pytest.raises(UsageError, match="no journal in common"):
        compare.compare(journal(honest, "alba"), copy)


# -- a site's signature -----------------------------------------------------------------------------------------------


def test_sites_sign_the_very_report(spoilt, tmp_path) -> None:
    for site in ("berg", "alba"):
        assert countersign(spoilt.report, spoilt.sites[site], spoilt.public) == site
    found = verify_report(spoilt.report)
    assert found.ok
    assert found.countersigned == ("alba", "berg")
    payload = canonical.loads(spoilt.report.read_bytes())["payload"] | {"written_at": 1}
    spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, "fedveil/report/1", payload)))
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert (failed.name, "another report" in failed.detail) == ("countersignatures", True)
    key = tmp_path / "signing.key"
    identity.save_signing_key(key, spoilt.sites["cava"])
    assert isinstance(call("sign", spoilt.report, "--key", key).exception, VerificationError)
    build_report(spoilt.folder, spoilt.server)
    assert verify_report(spoilt.report).ok, "the builder puts signatures under the older report aside"
    assert (spoilt.folder / "signatures.json.old").exists()
    result = call("sign", spoilt.folder, "--key", key, "--consortium-key", spoilt.public)
    assert (result.exit_code, result.stdout.strip()) == (0, "signed by cava")


def test_a_site_signs_only_what_was_made_from_its_own_ledger(spoilt, tmp_path) -> None:
    own = journal(spoilt).read_bytes()
    for other in (own[:-1], b"", own.replace(b"berg", b"cava"), journal(spoilt, "alba").read_bytes()):
        with pytest.raises(VerificationError, match="is not this site's"):
            countersign(spoilt.report, spoilt.sites["berg"], None, other)
    path = tmp_path / "ledger.jsonl"
    last = canonical.loads(own.splitlines()[-1])
    later = {**last, "n": last["n"] + 1, "kind": "spend", "body": {"session": "f" * 64, "round": 1}}
    path.write_bytes(own + canonical.dumps(later) + b"\n")  # of another run, since
    identity.save_signing_key(tmp_path / "signing.key", spoilt.sites["berg"])
    done = call("sign", spoilt.report, "--key", tmp_path / "signing.key", "--ledger", path)
    assert (done.exit_code, done.stdout.strip()) == (0, "signed by berg")
    path.write_bytes(own + canonical.dumps({**later, "body": {"session": spoilt.session, "round": 9}}) + b"\n")
    done = call("sign", spoilt.report, "--key", tmp_path / "signing.key", "--ledger", path)
    assert isinstance(done.exception, VerificationError)
    assert "leaves out" in str(done.exception)


def test_a_site_whose_ledger_is_missing_does_not_sign(make) -> None:
    w = make(lost={"dorn"})
    with pytest.raises(VerificationError, match="without the ledger of dorn"):
        countersign(w.report, w.sites["dorn"], None, b"x")
    assert countersign(w.report, w.sites["alba"], None, journal(w, "alba").read_bytes()) == "alba"


def test_what_is_signed_is_what_was_verified(spoilt, monkeypatch) -> None:
    seen = see(spoilt.report, spoilt.public)
    before = canonical.loads(spoilt.report.read_bytes())
    spoilt.report.write_bytes(b"{}")  # between the checks and the signature
    (spoilt.folder / "roster.json").unlink()
    site, signed = sign(seen, spoilt.sites["berg"])
    require(site, identity.public_hex(spoilt.sites["berg"]), seen.session, canonical.digest(before), signed)


def test_nobody_outside_signs_and_nothing_wrong_is_signed(spoilt) -> None:
    with pytest.raises(IdentityError, match="no site"):
        countersign(spoilt.report, identity.new_signing_key(), None)
    (spoilt.folder / "joins.json").write_bytes(b"{}")
    with pytest.raises(VerificationError):
        countersign(spoilt.report, spoilt.sites["alba"], None)
    assert not (spoilt.folder / "signatures.json").exists()


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"evil": {}}', b'{"alba": {}}', b'{"alba": 5}'])
def test_malformed_signatures_are_a_failed_check(spoilt, data) -> None:
    (spoilt.folder / "signatures.json").write_bytes(data)
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert failed.name == "countersignatures"


# -- what stays at the site -------------------------------------------------------------------------------------------


COLUMNS = [
    {"name": "age", "role": "quasi", "type": "number", "low": 40, "high": 80, "levels": [50]},
    {"name": "sex", "role": "quasi", "type": "category", "values": ["f", "m"], "levels": [["f"], ["m"]]},
    {"name": "y", "role": "target", "type": "number", "low": 0, "high": 2, "threshold": 1},
]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ({"type": "number", "low": 0, "high": 10, "levels": [2, 7]}, [0.2, 0.5, 0.3]),
        ({"type": "category", "values": list("abcd"), "levels": [["a", "b", "c"], ["d"]]}, [2 / 3, 0]),
        ({"type": "category", "values": list("abcd"), "levels": [list("abcd")]}, [1]),
        ({"type": "category", "values": ["a"], "levels": [["a"]]}, [0]),
        ({"type": "category", "values": list("abc"), "level": 1,
          "hierarchy": [["a", "x", "*"], ["b", "x", "*"], ["c", "z", "*"]]}, [0.5, 0]),
    ],
)  # fmt: skip
def test_what_a_label_costs(column, expected) -> None:
    c = Column.model_validate({"name": "c", "role": "quasi", **column})
    assert list(local._spans(c).values()) == pytest.approx(expected)


def test_the_local_report_says_whether_the_site_signed(spoilt, tmp_path) -> None:
    rows_ = parse(journal(spoilt).read_bytes())
    countersign(spoilt.report, spoilt.sites["berg"], spoilt.public, journal(spoilt).read_bytes())
    found = local.collect(tmp_path, rows_, spoilt.report, ())
    assert found["signed_report"] is True
    pages = [p.read_text(encoding="utf-8") for p in local.write(tmp_path, found)]
    assert "and signed it" in pages[1]
    assert "并签了名" in pages[2]
    build_report(spoilt.folder, spoilt.server)
    assert local.collect(tmp_path, rows_, spoilt.report, ())["signed_report"] is False
    assert local.collect(tmp_path, rows_, None, ())["signed_report"] is None


def test_the_local_report_holds_what_the_federations_does_not(honest, tmp_path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "quality.json").write_bytes(canonical.dumps({
        "rows": 41, "stages": [{"stage": "read", "rows": 41}, {"cells": 7, "stage": "missing"}],
        "columns": [{"column": "<age>", "missing": 7}],
    }))  # fmt: skip
    (work / "lineage.json").write_bytes(canonical.dumps({
        "source": {"rows": 41}, "released": {"rows": 38}, "suppressed_rows": 3,
    }))  # fmt: skip
    rows_ = '"[40,50)",m,>1\n"[40,50)",m,<=1\n"[50,80]",f,>1\n'
    (work / "released.csv").write_text(f"age,sex,y\n{rows_}", encoding="utf-8")
    (tmp_path / "contract.json").write_bytes(canonical.dumps({"payload": {"contract": {"columns": COLUMNS}}}))
    document = canonical.loads(honest.report.read_bytes())
    quasi = local.quasi_identifiers(tmp_path)
    found = local.collect(work, parse(journal(honest).read_bytes()), honest.report, quasi)
    assert (found["continues_report"], found["signed_report"]) == (True, False)
    loss = found["loss"]
    assert {k: loss[k] for k in ("source", "released", "suppressed")} == {"source": 41, "released": 38, "suppressed": 3}
    assert loss["suppressed_share"] == 3 / 41
    # Of 40 years one label spans 10 (two rows), one 30; a sex is exact. Suppressed rows count as fully general.
    assert loss["ncp_of_released_by_column"] == {"age": pytest.approx((10 + 10 + 30) / 40 / 3), "sex": 0}
    assert loss["ncp"] == pytest.approx(38 / 41 * (50 / 120 + 0) / 2 + 3 / 41)
    assert found["risk"] == {"rows": 3, "classes": 2, "smallest_class": 1, "prosecutor": 1.0, "marketer": 2 / 3,
                             "alone": 1 / 3}  # fmt: skip
    for path in local.write(work, found):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        text = path.read_text(encoding="utf-8")
        assert "41" in text
        assert path.suffix == ".json" or "&lt;age&gt;" in text
    for key in ("quality", "loss", "risk", "lineage"):
        assert key not in document["payload"], "the federation's report holds none of it"


def test_a_local_ledger_that_is_another_is_said(honest, spoilt, tmp_path) -> None:
    spoilt.rewrite("journals/berg.jsonl", "berg", lambda items: items[3][1].update(remark="later"))
    result = call("local", tmp_path, "--ledger", journal(spoilt), "--report", honest.report)
    assert result.exit_code == 0, result.exception
    assert "IS NOT THE ONE" in (tmp_path / "local-report.html").read_text(encoding="utf-8")
    assert "不一致" in (tmp_path / "local-report.zh.html").read_text(encoding="utf-8")
    nowhere = call("local", tmp_path / "nope", "--ledger", journal(spoilt))
    assert isinstance(nowhere.exception, UsageError)
    stranger = identity.public_hex(identity.new_signing_key())
    refused = call("local", tmp_path, "--ledger", journal(spoilt), "--public", stranger)
    assert isinstance(refused.exception, VerificationError)


# -- paper ------------------------------------------------------------------------------------------------------------


def test_without_a_browser_the_user_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no Chromium"):
        pdf.print_page(tmp_path / "x.html", tmp_path / "x.pdf")


def test_a_pdf_that_cannot_be_written_and_a_page_that_stays(spoilt, tmp_path, monkeypatch) -> None:
    for out in (tmp_path / "nope" / "x.pdf", tmp_path):
        refused = call("pdf", spoilt.folder, "--out", out)
        assert isinstance(refused.exception, UsageError)
        assert "cannot be written" in refused.exception.message
    seen: list[str] = []

    def printed(page, out):
        seen.append(page.read_text(encoding="utf-8"))
        return out

    monkeypatch.setattr(pdf, "print_page", printed)
    (spoilt.folder / "report.html").write_text("rendered with a key", encoding="utf-8")
    for key in ([], ["--consortium-key", spoilt.public]):
        assert call("pdf", spoilt.folder, "--out", tmp_path / "x.pdf", *key).exit_code == 0
    assert ["taken from the folder itself" in page for page in seen] == [True, False]
    assert (spoilt.folder / "report.html").read_text(encoding="utf-8") == "rendered with a key"
    assert [p.name for p in tmp_path.glob("print-*")] == []


@pytest.mark.slow
@pytest.mark.skipif(pdf.browser() is None, reason="no Chromium here")
def test_both_pages_are_printed(spoilt) -> None:
    for lang in ("en", "zh"):
        result = call("pdf", spoilt.folder, "--lang", lang)
        assert result.exit_code == 0, result.exception
    found = sorted(p.name for p in spoilt.folder.glob("*.pdf"))
    assert found == ["report.pdf", "report.zh.pdf"]
    assert all((spoilt.folder / name).stat().st_size > 50_000 for name in found)
