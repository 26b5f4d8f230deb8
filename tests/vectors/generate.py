"""Writes keysum.json: known answers of the sum of keys, from fixed keys and scripted randomness.

Run as ``python tests/vectors/generate.py`` after a change that is meant to change bytes on the wire. The randomness
is scripted by replacing ``os.urandom`` for the duration of one call in this process: nothing in the package
takes a seed. What it writes is checked by verify.py, which shares no code with the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical
from fedveil.common.identity import SERVER, Member, Roster, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import sha256
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.params import choose
from fedveil.privacy.secagg.store import MemoryStore

PATH = Path(__file__).with_name("keysum.json")
CASES: list[dict[str, Any]] = [
    {"name": "two values a coefficient, one site missing", "sites": 3, "threshold": 2, "min_members": 2,
     "length": 9, "bound": 4194303, "rounds": 10, "round": 1, "nonce": "n-1", "members": [0, 2], "answers": [1, 2]},
    {"name": "four values a coefficient, two blocks", "sites": 5, "threshold": 4, "min_members": 4, "colluders": 1,
     "length": 16389, "bound": 1447, "rounds": 1000, "round": 7, "nonce": "a nonce|7", "members": [0, 1, 2, 3, 4],
     "answers": [0, 1, 3, 4]},
    {"name": "one value a coefficient, a committee of three", "sites": 5, "threshold": 2, "min_members": 3,
     "length": 3, "bound": 35184372088831, "rounds": 1, "round": 0, "nonce": "x", "members": [0, 2, 3],
     "answers": [1, 4], "helpers": [1, 2, 4]},
    {"name": "three values a coefficient, blinded", "sites": 3, "threshold": 2, "min_members": 2, "length": 12289,
     "bound": 20642, "rounds": 10, "round": 3, "nonce": "b", "members": [0, 1, 2], "answers": [0, 2],
     "reveal_to": "sites"},
]  # fmt: skip


def secret(case: str, what: str, site: int | str = "") -> bytes:
    """32 fixed bytes, as anybody can compute them from the label."""
    return hashlib.sha256(f"fedveil test vector|{case}|{what}|{site}".encode()).digest()


def scripted(keys: list[bytes], stream: bytes) -> Callable[[int], bytes]:
    """In place of ``os.urandom``: ``keys`` one after the other, then the bytes of ``stream``."""
    left, at = list(keys), [0]

    def urandom(size: int) -> bytes:
        if left:
            assert size == len(left[0])
            return left.pop(0)
        at[0] += size
        assert at[0] <= len(stream)
        return stream[at[0] - size : at[0]]

    return urandom


def vector(case: dict[str, Any], site: int) -> np.ndarray:
    """Values up to bound / sites in size: those of the file's rule."""
    top = case["bound"] // case["sites"]
    return (np.arange(case["length"], dtype=np.int64) * 7919 + site * 104729) * 1000003 % (2 * top + 1) - top


def make(case: dict[str, Any]) -> dict[str, Any]:
    """One case with its answers."""
    name, count = case["name"], case["sites"]
    keys = [Ed25519PrivateKey.from_private_bytes(secret(name, "ed25519", i)) for i in range(count)]
    names = [SiteId(f"site-{i}") for i in range(count)]
    roster = Roster(
        "vectors",
        Member(SERVER, public_hex(Ed25519PrivateKey.from_private_bytes(secret(name, "ed25519", "server")))),
        tuple(Member(site, public_hex(key)) for site, key in zip(names, keys, strict=True)),
    )
    spec = SumSpec(
        "keysum", secret(name, "session").hex(), secret(name, "plan").hex(), roster, case["threshold"],
        case["min_members"], case["length"], case["bound"], case["rounds"], case.get("colluders", 0),
        tuple(names[i] for i in case.get("helpers", [])), case.get("reveal_to", "server"),
    )  # fmt: skip
    stores = {site: MemoryStore() for site in names}
    for i, site in enumerate(names):
        stores[site].put(f"{spec.session}-{i}-x25519", secret(name, "x25519", i))
    sites = {site: KeysumSite(spec, site, key, stores[site]) for site, key in zip(names, keys, strict=True)}
    server = KeysumServer(spec)
    joins = {site: s.join_fields() for site, s in sites.items()}
    with mock.patch("os.urandom", scripted([secret(name, "group")], b"")):
        replies = {site: s.begin(joins) for site, s in sites.items()}
    for site, packet in server.begin(joins, replies).items():
        sites[site].receive(packet)
    return {**case, "expected": _round(case, spec, names, sites, server)}


def _round(case, spec, names, sites, server) -> dict[str, Any]:
    p = choose(spec)
    expected: dict[str, Any] = {
        "plain_bits": p.plain_bits, "base": p.base, "per_coefficient": p.per_coefficient, "blocks": p.blocks,
        "contributions": {}, "answers": {},
    }  # fmt: skip
    server.start_round(case["round"], case["nonce"])
    for i in case["members"]:
        random = [secret(case["name"], "secret", i), secret(case["name"], "errors", i)]
        stream = hashlib.shake_256(secret(case["name"], "shares", i)).digest(1 << 17)
        with mock.patch("os.urandom", scripted(random, stream)):
            packet = sites[names[i]].contribute(case["round"], case["nonce"], vector(case, i))
        server.add(names[i], packet)
        expected["contributions"][names[i]] = {
            "first_coefficients": packet.buffers["ciphertext"][:56].hex(),
            "ciphertext": sha256(packet.buffers["ciphertext"]),
            "shares": sha256(packet.buffers["shares"]),
            "signature": packet.header["signature"],
            "digest": canonical.digest(packet.header),
        }
    for site, request in server.agree_requests().items():
        packet = sites[site].agree(request)
        expected["digest"] = packet.header["digest"]
        server.add_agreement(site, packet)
    requests = server.open_requests()
    for i in case["answers"]:
        answer = sites[names[i]].open(requests[names[i]])
        server.add_answer(names[i], answer)
        data = answer.buffers["answer"]
        expected["answers"][names[i]] = {"first_values": data[:16].hex(), "answer": sha256(data)}
    expected["fingerprints"] = {}
    for site, request in server.fingerprint_requests().items():
        packet = sites[site].fingerprint(request)
        server.add_fingerprint(site, packet)
        expected["fingerprints"][site] = packet.header["fingerprint"]
        expected["challenge"] = packet.header["challenge"]
    packet = server.opened()
    expected |= {"sum": packet.header["sum"], "opening": sha256(packet.buffers["opening"])}
    values, _ = sites[names[0]].opened(packet)
    assert np.array_equal(values, sum(vector(case, i) for i in case["members"]))
    return expected | {"first_sums": values[:8].tolist(), "sums": sha256(values.astype("<i8").tobytes())}


def document() -> str:
    """All cases as the text of the file."""
    return json.dumps({"version": 1, "cases": [make(case) for case in CASES]}, indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(document())
