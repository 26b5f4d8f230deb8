"""Two implementations of the chain agree: on the RFC's vectors, on honest journals, and on spoilt ones, row by row."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.common import canonical, identity
from fedveil.common.errors import VerificationError
from fedveil.common.journal import Journal, parse, verify_rows
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger

HERE = Path(__file__).parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vectors_journal_chain", HERE / "journal_chain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECOND = load()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = identity.public_hex(KEY)

# RFC 8032, section 7.1, tests 1 to 3: public key, message, signature.
RFC_8032 = (
    ("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
     "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
     "d25bf5f0595bbe24655141438e7a100b"),
    ("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
     "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
     "387b2eaeb4302aeeb00d291612bb0c00"),
    ("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
     "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
     "4a7c15e9716ed28dc027beceea1ec40a"),
)  # fmt: skip


@pytest.mark.parametrize("case", RFC_8032, ids=("test 1", "test 2", "test 3"))
def test_the_rfcs_signatures_hold_and_no_others(case) -> None:
    public, message, signature = map(bytes.fromhex, case)
    assert SECOND.signature_holds(public, message, signature)
    assert not SECOND.signature_holds(public, message + b"x", signature)
    assert not SECOND.signature_holds(public, message, bytes([signature[0] ^ 1]) + signature[1:])
    assert not SECOND.signature_holds(bytes.fromhex(PUBLIC), message, signature)
    # S + L signs the same in a careless implementation (RFC 8032, section 8.4).
    s = int.from_bytes(signature[32:], "little") + SECOND.L
    assert not SECOND.signature_holds(public, message, signature[:32] + s.to_bytes(32, "little"))


@pytest.fixture(scope="module")
def journal(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "alba.jsonl"
    with Journal.open(path, "alba", KEY, durable=False, clock=lambda: 1.0e9) as j:
        j.append("ledger.open", {"lineage": "patients β", "cap_epsilon": 4.0, "delta": 1e-05, "order": 6.5})
        for n in range(1, 4):
            j.append("spend", {"session": "s", "round": n, "event": {"sample_rate": 0.25, "noise_multiplier": 1e22}})
        j.append("note", {"nested": [1, None, True, {"ключ": "值"}], "big": 1 << 70, "tiny": 5e-324})
    return path.read_bytes()


def package(data: bytes) -> tuple[int, str] | int:
    """The head; or the number of the first row that the package refuses."""
    try:
        rows = verify_rows(parse(data), PUBLIC, owner="alba")
    except VerificationError as e:
        found = re.search(r"row (\d+)", e.message)
        assert found is not None
        return int(found[1])
    return len(rows), rows[-1].hash if rows else "0" * 64


def second(data: bytes) -> tuple[int, str] | int:
    try:
        return SECOND.check(data, PUBLIC, "alba")
    except SECOND.Refused as e:
        return e.row


def test_both_accept_an_honest_journal_with_the_same_head(journal) -> None:
    assert second(journal) == package(journal) == (5, canonical.loads(journal.splitlines()[-1])["hash"])
    assert second(b"") == package(b"")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_both_refuse_a_changed_byte_at_the_same_row(journal, data) -> None:
    at = data.draw(st.integers(0, len(journal) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda b: b != journal[at]))
    spoilt = journal[:at] + bytes([new]) + journal[at + 1 :]
    found = package(spoilt)
    assert isinstance(found, int)
    assert second(spoilt) == found


def test_both_accept_a_ledger_that_was_closed(tmp_path) -> None:
    event = SampledGaussian(1.0, 8.0)
    for name in ("old", "new"):
        ledger = Ledger.open(tmp_path / name, "alba", KEY, lineage=name, cap=Epsilon(4.0), delta=Delta(1e-5))
        ledger.reserve("s", 1, "a" * 64, event)
        if name == "new":
            ledger.take_over(tmp_path / "old", KEY)
        ledger.close()
        data = (tmp_path / name).read_bytes()
        assert second(data) == package(data)
    data = (tmp_path / "old").read_bytes()
    last = canonical.loads(data.splitlines()[-1])
    assert last["kind"] == "ledger.closed"
    assert second(data) == (3, last["hash"])
    spoilt = data.replace(last["body"]["ledger"].encode(), b"f" * 64)
    assert second(spoilt) == package(spoilt) == 2


def test_both_refuse_rows_that_are_missing_doubled_moved_or_borrowed(journal) -> None:
    lines = journal.splitlines(keepends=True)
    spoilt = []
    for i in range(len(lines) - 1):
        spoilt += [lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:],
                   [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]]  # fmt: skip
        row, other = canonical.loads(lines[i]), canonical.loads(lines[i + 1])
        spoilt.append([*lines[:i], canonical.dumps({**row, "sig": other["sig"]}) + b"\n", *lines[i + 1 :]])
        spoilt.append([*lines[:i], canonical.dumps({**row, "sig": row["sig"].upper()}) + b"\n", *lines[i + 1 :]])
    for rows in spoilt:
        found = package(b"".join(rows))
        assert isinstance(found, int)
        assert second(b"".join(rows)) == found
    assert second(journal[:-1]) == package(journal[:-1]) == 4


def test_both_refuse_another_key_and_another_owner(journal) -> None:
    stranger = identity.public_hex(identity.new_signing_key())
    for public, owner in ((stranger, "alba"), (PUBLIC, "berg")):
        with pytest.raises(VerificationError):
            verify_rows(parse(journal), public, owner=owner)
        with pytest.raises(SECOND.Refused):
            SECOND.check(journal, public, owner)


def test_the_second_implementation_shares_no_code_with_the_first() -> None:
    tree = ast.parse((HERE / "journal_chain.py").read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"__future__", "hashlib", "json", "sys", "pathlib", "typing"}
