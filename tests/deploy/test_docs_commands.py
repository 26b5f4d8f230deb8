"""Every ``fedveil ledger`` and ``fedveil audit`` command that the documents show runs as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.common import canonical, cli, identity
from fedveil.common.errors import UsageError
from fedveil.common.units import Delta, Epsilon
from fedveil.deploy.lab import simulate, virtual_sites
from fedveil.privacy.audit import attach
from fedveil.privacy.audit.one_run import Guesses, OneRun, corrected, detectable
from fedveil.privacy.audit.slab import price
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report import pdf
from fedveil.privacy.report.build import build_report

ROOT = Path(__file__).parents[2]
SLOW = ("conformance RUN", "one-run RUN", "attacks --out", "--audit")


def commands() -> list[str]:
    """Lines of code blocks up to their explanation, and what stands between backticks; each once."""
    found: dict[str, None] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        inline = re.findall(r"`(fedveil (?:ledger|audit)[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        lines = re.findall(r"^(?: {4,}|\$ )?(fedveil (?:ledger|audit) .*)$", text, re.MULTILINE)
        for line in [*inline, *(re.split(r" {2,}", x)[0] for x in lines)]:
            found[" ".join(line.split())] = None
    return list(found)


COMMANDS = commands()


def test_the_commands_are_found():
    assert len(COMMANDS) > 25
    assert {"fedveil audit schema", "fedveil audit pdf RUN [--lang zh] [--out FILE]"} <= set(COMMANDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, virtual_sites.World]:
    """A simulated run, and beside it what its members keep: keys, ledgers, a site's folder, a proof."""
    home, worlds, make = tmp_path_factory.mktemp("docs"), [], virtual_sites.World.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(virtual_sites.World, "make", lambda n: worlds.append(make(n)) or worlds[-1])
        simulate.run(simulate.Config(clients=4, dataset="trivial", sum="plain", steps=4), home / "RUN")
    (made,) = worlds
    for folder, key in (("SERVER", made.server), ("SITE", made.keys[0]), ("old", identity.new_signing_key())):
        identity.save_signing_key(home / folder / "signing.key", key)
    shutil.copy(home / "SITE" / "signing.key", home / "signing.key")
    identity.save_signing_key(home / "auditor.key", identity.new_signing_key())
    shutil.copy(home / "RUN" / "consortium.pub", home / "SITE" / "consortium.pub")
    ledger = home / "RUN" / "journals" / "site-0001.jsonl"
    for folder in ("STATE", "state", "lib"):
        (home / folder).mkdir()
        shutil.copy(ledger, home / folder / "ledger.jsonl")
    for name in ("LEDGER", "FILE", "HELD", "SHOWN"):
        shutil.copy(ledger, home / name)
    (home / "FOLDER").mkdir()
    done = invoke(["ledger", "prove", home / "LEDGER", 1, "--out", home / "PROOF"])
    assert done.exit_code == 0, done.exception
    return home, made


def invoke(words):
    return CliRunner().invoke(cli.build(), [str(w) for w in words], env={"COLUMNS": "200"})


def filled(command: str, made: virtual_sites.World) -> list[str]:
    """The words of a command with this world's things for what the document leaves to the reader."""
    pin = identity.public_hex(made.consortium)
    values = {
        "KEY": pin, "HEX": pin, "...": "SERVER/signing.key", "ROSTER": "RUN/roster.json",
        "report.json": "RUN/report.json", "runs/first/report.json": "RUN/report.json",
        "ROW": "1", "N": str(len(Path("LEDGER").read_bytes().splitlines())),
        "/etc/fedveil/identity/roster.json": "RUN/roster.json", "/var/lib/fedveil/ledger.jsonl": "lib/ledger.jsonl",
    }  # fmt: skip
    plain = re.sub(r"\[([^\]]*)\]", lambda m: m[1].partition("|")[0], command).partition(" > ")[0]
    return [values.get(w, w) for w in shlex.split(plain)[1:]]


def older_ledger(made: virtual_sites.World, key: str) -> None:
    old = Ledger.open(Path("OLD"), made.sites[0], identity.load_signing_key(Path(key)), lineage="older",
                      cap=Epsilon(9.0), delta=Delta(1e-5))  # fmt: skip
    old.reserve("e" * 64, 1, "a" * 64, SampledGaussian(1.0, 20.0))
    for heads in ("HEADS", "joins.json"):  # what the others hold of it
        Path(heads).write_bytes(canonical.dumps({made.sites[0]: [old.journal.copy("5e" * 32).to_json()]}))
    old.close()


def audited(made: virtual_sites.World) -> str:
    """Attach a result that ``auditor.key`` signed to RUN; the key's fingerprint."""
    plan, guesses = attach.plan_of(Path("RUN")), Guesses(1000, 100, 70)
    least = detectable(1000, price(plan), plan.steps, plan.claim, plan.delta, 0.95, "gaussian")
    bound = corrected(guesses, plan.delta, 0.95, "gaussian")
    result = OneRun(bound, 0.95, plan.delta, "gaussian", guesses, plan.claim, least)
    evidence = attach.evidence_of(plan.hash, result, identity.load_signing_key(Path("auditor.key")))
    attach.write(Path("RUN"), evidence)
    build_report(Path("RUN"), made.server)
    return evidence.signatures["one_run"].fingerprint


@pytest.mark.parametrize("command", [c for c in COMMANDS if len(c.split()) == 3 and c != "fedveil audit schema"])
def test_what_is_named_in_a_sentence_exists(command):
    assert invoke([*command.split()[1:], "--help"]).exit_code == 0


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=[pytest.mark.slow, pytest.mark.timeout(3600)] if any(s in c for s in SLOW) else [])
        for c in COMMANDS
        if len(c.split()) > 3 or c == "fedveil audit schema"
    ],
)
def test_it_runs_as_it_stands_there(command, world, tmp_path, monkeypatch):
    home, made = world
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    words = filled(command, made)
    if "--auditor" in words:
        words[words.index("--auditor") + 1] = audited(made)
    if words[:2] == ["ledger", "import"]:
        older_ledger(made, words[words.index("--old-key") + 1] if "--old-key" in words else "signing.key")
        words += ["--yes"] if "--lost" in words else []  # what a person answers
    if "--out" in words:
        Path(words[words.index("--out") + 1]).unlink(missing_ok=True)  # a new file, whatever the document calls it
    if "--audit" in words:
        measured = invoke(["audit", "conformance", "RUN", "--rounds", 4, "--inputs", 64, "--json"])
        assert measured.exit_code == 0, measured.exception
        Path(words[words.index("--audit") + 1]).write_text(measured.stdout)
    done = invoke(words)
    if words[1] == "pdf" and pdf.browser() is None:
        assert isinstance(done.exception, UsageError)
        assert "Chromium" in str(done.exception)
        return
    if words[1] == "readd":  # a simulation keeps no ciphertexts
        assert isinstance(done.exception, UsageError)
        assert "holds no ciphertexts" in str(done.exception)
        return
    assert done.exit_code == 0, (done.exception, done.output)
