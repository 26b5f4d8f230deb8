"""Keys, signatures and the roster: nothing signed for one purpose, or by one party, is worth anything for another."""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import canonical, identity
from fedveil.common.errors import IdentityError
from fedveil.common.identity import Member, Roster, open_roster, opened, roster_from_payload, sign, sign_roster, signed
from fedveil.common.units import MAX_SITES, SiteId

KEYS = [identity.new_signing_key() for _ in range(5)]
PUBLIC = [identity.public_hex(k) for k in KEYS]
CONSORTIUM = identity.new_signing_key()
PINNED = identity.public_hex(CONSORTIUM)


def roster(**changes: Any) -> Roster:
    sites = tuple(Member(SiteId(f"site-{i}"), PUBLIC[i + 1], f"{i + 1:064x}") for i in range(3))
    values: dict[str, Any] = {
        "consortium": "hearts",
        "server": Member(identity.SERVER, PUBLIC[0], "f" * 64),
        "sites": sites,
    }
    return Roster(**values | changes)


# --- signatures


@given(st.binary(max_size=100), st.sampled_from(["fedveil/join/1", "fedveil/journal/1", "a", ""]))
def test_a_signature_holds_for_its_domain_payload_and_key(payload, domain) -> None:
    signature = sign(KEYS[0], domain, payload)
    identity.verify(PUBLIC[0], domain, payload, signature, what="x")
    for other in (
        (PUBLIC[1], domain, payload, signature),
        (PUBLIC[0], domain + "/", payload, signature),
        (PUBLIC[0], "fedveil/other/1", payload, signature),
        (PUBLIC[0], domain, payload + b"\0", signature),
        (PUBLIC[0], domain, payload, signature[:-1]),
        (PUBLIC[0], domain, payload, bytes([signature[0] ^ 1]) + signature[1:]),
        (PUBLIC[0], domain, payload, b""),
        ("", domain, payload, signature),
        ("zz" * 32, domain, payload, signature),
    ):
        with pytest.raises(IdentityError, match="the statement"):
            identity.verify(*other, what="the statement")


def test_a_domain_cannot_lend_its_end_to_a_payload() -> None:
    """Without the zero byte, ("ab", "c") and ("a", "bc") would be one message."""
    with pytest.raises(IdentityError):
        identity.verify(PUBLIC[0], "ab", b"c", sign(KEYS[0], "a", b"bc"), what="x")
    with pytest.raises(IdentityError):
        identity.verify(PUBLIC[0], "a", b"bc", KEYS[0].sign(b"abc"), what="x")


def test_ed25519_is_the_one_of_rfc_8032() -> None:
    """Test 1 of section 7.1, whose message is empty, shows that key and signature bytes are the standard's."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    assert identity.public_hex(key) == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155")


# --- key files


def test_a_key_is_written_for_its_owner_alone_and_never_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "signing.key"
    before = os.umask(0)
    try:
        identity.save_signing_key(path, KEYS[0])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    written = path.read_bytes()
    with pytest.raises(IdentityError, match="exists already") as e:
        identity.save_signing_key(path, KEYS[1])
    assert "never overwritten" in e.value.hint
    assert path.read_bytes() == written
    assert identity.public_hex(identity.load_signing_key(path)) == PUBLIC[0]


def test_a_link_is_not_followed_to_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(IdentityError, match="exists"):
        identity.write_secret(tmp_path / "link", b"x")
    assert (tmp_path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601, 0o777])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode) -> None:
    identity.save_signing_key(tmp_path / "key", KEYS[0])
    (tmp_path / "key").chmod(mode)
    with pytest.raises(IdentityError, match="read by others") as e:
        identity.load_signing_key(tmp_path / "key")
    assert "chmod 600" in e.value.hint
    (tmp_path / "key").chmod(0o400)
    assert identity.load_signing_key(tmp_path / "key")


def test_files_that_hold_no_such_key(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    locked = KEYS[0].private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.BestAvailableEncryption(b"x"))
    for name, data in {
        "empty": b"", "text": b"no key", "public": b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
        "ec": other.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()), "locked": locked,
    }.items():  # fmt: skip
        identity.write_secret(tmp_path / name, data)
        with pytest.raises(IdentityError) as e:
            identity.load_signing_key(tmp_path / name)
        assert name in e.value.message
        assert data[30:60].decode() not in str(e.value) or len(data) < 60
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(IdentityError):
            identity.load_signing_key(missing)


# --- signed documents


@given(st.dictionaries(st.text("ab", max_size=3), st.integers() | st.text("xé", max_size=3), max_size=3))
def test_signed_documents_open_for_their_domain_and_signer(payload) -> None:
    document = signed(KEYS[0], "fedveil/test/1", payload)
    assert opened(document, "fedveil/test/1", PUBLIC[0], what="x") == payload
    assert opened(canonical.loads(canonical.dumps(document)), "fedveil/test/1", PUBLIC[0], what="x") == payload
    with pytest.raises(IdentityError, match="does not hold"):
        opened(document, "fedveil/test/2", PUBLIC[0], what="x")
    with pytest.raises(IdentityError, match="pinned"):
        opened(document, "fedveil/test/1", PUBLIC[1], what="x")
    with pytest.raises(IdentityError, match="does not hold"):  # a stranger who names the pinned key as its signer
        opened(
            signed(KEYS[1], "fedveil/test/1", payload) | {"signer": PUBLIC[0]}, "fedveil/test/1", PUBLIC[0], what="x"
        )
    with pytest.raises(IdentityError, match="does not hold"):
        opened(document | {"payload": {**payload, "more": 1}}, "fedveil/test/1", PUBLIC[0], what="x")


@pytest.mark.parametrize(
    "document",
    [
        None, 1, "x", [], {}, {"payload": 1}, {"payload": 1, "signer": PUBLIC[0]},
        {"payload": 1, "signer": PUBLIC[0], "signature": 5}, {"payload": 1, "signer": PUBLIC[0], "signature": "xyz"},
        {"payload": 1, "signer": PUBLIC[0], "signature": ""}, {"payload": 1, "signer": None, "signature": "00"},
    ],
)  # fmt: skip
def test_what_is_not_signed(document) -> None:
    with pytest.raises(IdentityError):
        opened(document, "fedveil/test/1", PUBLIC[0], what="the plan")


@pytest.mark.parametrize("change", [
    lambda d: {**d, "more": "not signed"},
    lambda d: {**d, "signature": d["signature"].upper()},
    lambda d: {**d, "signature": " ".join((d["signature"][:64], d["signature"][64:]))},
], ids=["an unsigned field", "upper case", "a blank"])  # fmt: skip
def test_a_signed_document_has_one_form(change) -> None:
    """Else whoever counts documents counts one of them twice, and unsigned words travel under a signature."""
    document = signed(KEYS[0], "fedveil/test/1", {"a": 1})
    with pytest.raises(IdentityError, match="form|more"):
        opened(change(document), "fedveil/test/1", PUBLIC[0], what="x")


# --- the roster


def test_a_roster_round_trips_and_names_its_members() -> None:
    r = roster()
    document = canonical.loads(canonical.dumps(sign_roster(r, CONSORTIUM)))
    again = open_roster(document, PINNED)
    assert (again, again.hash) == (r, r.hash)
    assert [r.index(m.site) for m in r.sites] == [0, 1, 2]
    assert r.member("site-1").signing_key == PUBLIC[2]
    assert r.by_tls_key(f"{2:064x}").site == "site-1"
    for wrong in ("site-9", "server", "", "SITE-1", "x" * 1000):
        with pytest.raises(IdentityError, match="not on the roster") as e:
            r.index(wrong)
        assert len(e.value.message) < 200
    for wrong in ("", "e" * 64, "f" * 64):  # "f"...: the server is no site
        with pytest.raises(IdentityError, match="certificate"):
            r.by_tls_key(wrong)


def test_order_and_every_field_are_under_the_hash() -> None:
    r = roster()
    others = [
        roster(consortium="lungs"), roster(sites=r.sites[::-1]), roster(sites=r.sites[:2]),
        roster(server=Member(identity.SERVER, PUBLIC[4], "f" * 64)),
        roster(server=Member(identity.SERVER, PUBLIC[0], "e" * 64)),
    ]  # fmt: skip
    assert len({r.hash, *(o.hash for o in others)}) == 6


@pytest.mark.parametrize(
    ("what", "member"),
    [
        ("site id", Member(SiteId("site-0"), PUBLIC[4], "9" * 64)),
        ("site id", Member(identity.SERVER, PUBLIC[4], "9" * 64)),
        ("signing key", Member(SiteId("site-9"), PUBLIC[1], "9" * 64)),
        ("signing key", Member(SiteId("site-9"), PUBLIC[0], "9" * 64)),
        ("TLS key", Member(SiteId("site-9"), PUBLIC[4], f"{1:064x}")),
        ("TLS key", Member(SiteId("site-9"), PUBLIC[4], "f" * 64)),
    ],
)
def test_no_two_members_share_a_name_or_a_key(what, member) -> None:
    """One party under two names would hold two of the T answers."""
    with pytest.raises(IdentityError, match=f"share one {what}"):
        roster(sites=(*roster().sites, member))


def test_a_roster_has_a_size() -> None:
    with pytest.raises(IdentityError, match="0 sites"):
        roster(sites=())
    many = tuple(Member(SiteId(f"s{i}"), f"{i:064x}") for i in range(MAX_SITES + 1))
    assert len(roster(sites=many[:-1]).sites) == MAX_SITES
    with pytest.raises(IdentityError, match="outside"):
        roster(sites=many)


def test_a_forged_roster_is_refused() -> None:
    r = roster()
    stranger = identity.new_signing_key()
    with pytest.raises(IdentityError, match="pinned"):
        open_roster(sign_roster(r, stranger), PINNED)
    with pytest.raises(IdentityError, match="does not hold"):
        open_roster(sign_roster(r, stranger) | {"signer": PINNED}, PINNED)
    document = sign_roster(r, CONSORTIUM)
    document["payload"]["sites"][0]["signing_key"] = PUBLIC[4]
    with pytest.raises(IdentityError, match="does not hold"):
        open_roster(document, PINNED)
    with pytest.raises(IdentityError, match="does not hold"):  # signed by the consortium, but not as a roster
        open_roster(signed(CONSORTIUM, "fedveil/contract/1", r.payload), PINNED)


def changed(**changes: Any) -> Any:
    return canonical.loads(canonical.dumps(roster().payload)) | changes


SITE = {"site": "a", "signing_key": PUBLIC[1], "tls_key": ""}


@pytest.mark.parametrize(
    "payload",
    [
        None, [], "x", {}, changed(v=2), changed(v=None), changed(consortium=5), changed(consortium={"a": 1}),
        changed(consortium=None), changed(server=None), changed(server={}), changed(sites=None), changed(sites=[]),
        changed(sites={}), changed(sites={"a": SITE}), changed(sites="ab"), changed(sites=[1]), changed(sites=[None]),
        changed(sites=[SITE | {"site": "A B"}]), changed(sites=[SITE | {"site": "../x"}]),
        changed(sites=[SITE | {"site": 5}]),
        changed(sites=[SITE | {"site": None}]), changed(sites=[SITE | {"signing_key": PUBLIC[1].upper()}]),
        changed(sites=[SITE | {"signing_key": PUBLIC[1][:-1]}]), changed(sites=[SITE | {"signing_key": ""}]),
        changed(sites=[SITE | {"signing_key": 5}]), changed(sites=[SITE | {"signing_key": [0] * 64}]),
        changed(sites=[SITE | {"signing_key": " " * 64}]), changed(sites=[SITE | {"tls_key": "x" * 64}]),
        changed(sites=[SITE | {"tls_key": None}]), changed(sites=[SITE, SITE]),
        changed(sites=[{k: v for k, v in SITE.items() if k != "tls_key"}]),
    ],
)  # fmt: skip
def test_a_malformed_roster_is_an_identity_error(payload) -> None:
    """Even one that the consortium signed."""
    with pytest.raises(IdentityError):
        roster_from_payload(payload)


# --- certificates


def certificate(key: ec.EllipticCurvePrivateKey, days: int) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "site")])
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(days).not_valid_before(start).not_valid_after(start + datetime.timedelta(days=days))
    return builder.sign(key, hashes.SHA256()).public_bytes(ser.Encoding.PEM)


def test_a_renewed_certificate_keeps_its_identity() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    first, renewed = certificate(key, 30), certificate(key, 60)
    assert first != renewed
    assert identity.spki_sha256(first) == identity.spki_sha256(renewed)
    assert identity.spki_sha256(first) != identity.spki_sha256(certificate(ec.generate_private_key(ec.SECP256R1()), 30))
    with pytest.raises(IdentityError, match="parsed"):
        identity.spki_sha256(b"no certificate")
    der = x509.load_pem_x509_certificate(first).public_bytes(ser.Encoding.DER)
    p256 = bytes.fromhex("06082a8648ce3d030107")
    with pytest.raises(IdentityError, match="parsed"):  # on a curve that nobody knows
        identity.spki_sha256(ssl.DER_cert_to_PEM_cert(der.replace(p256, p256[:-1] + b"\x7f")).encode())


def test_a_signature_that_held_is_remembered_and_nothing_near_it(monkeypatch):
    asked = []
    real = identity._public_key
    monkeypatch.setattr(identity, "_public_key", lambda public: asked.append(public) or real(public))
    signature = sign(KEYS[0], "a", b"payload|more")
    for _ in range(3):
        identity.verify(PUBLIC[0], "a", b"payload|more", signature, what="x")
    assert len(asked) == 1
    for public, domain, payload, other in (
        (PUBLIC[1], "a", b"payload|more", signature), (PUBLIC[0], "b", b"payload|more", signature),
        (PUBLIC[0], "a", b"payload|mor", signature + b"e"), (PUBLIC[0], "a", b"payload|more", signature[:-1]),
        (PUBLIC[0], "a", b"payload|more", bytes(64)),
    ):  # fmt: skip
        for _ in range(2):  # a failure is not remembered as anything
            with pytest.raises(IdentityError):
                identity.verify(public, domain, payload, other, what="x")
    monkeypatch.setattr(identity, "_MAX_HELD", 4)
    for i in range(16):
        identity.verify(PUBLIC[0], "a", b"%d" % i, sign(KEYS[0], "a", b"%d" % i), what="x")
    assert len(identity._held) <= 4
