"""An independent reading of docs/protocol.md: recomputes keysum.json from its labels, in numpy and plain Python.

Run as ``python tests/vectors/verify.py``. It imports neither the package nor TenSEAL; the negacyclic transform, the
sharing, the boxes, the hashes and the signatures are written here a second time.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PATH = Path(__file__).with_name("keysum.json")
N, Q, P = 4096, 1012 * 2**46 + 1, 65521


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def secret(case: str, what: str, site: int | str = "") -> bytes:
    return hashlib.sha256(f"fedveil test vector|{case}|{what}|{site}".encode()).digest()


def hkdf(key: bytes, salt: bytes, info: Any) -> bytes:
    return HKDF(SHA256(), 32, salt, canonical(info)).derive(key)


# ---- the ring


def root() -> int:
    """The smallest primitive 2N-th root of unity modulo q."""
    generator = next(g for g in range(2, 100) if pow(g, (Q - 1) // 2, Q) == Q - 1)
    psi = pow(generator, (Q - 1) // (2 * N), Q)
    return min(pow(psi, odd, Q) for odd in range(1, 2 * N, 2))


PSI = root()
REVERSED = np.array([int(f"{i:012b}"[::-1], 2) for i in range(N)])


def powers(base: int) -> np.ndarray:
    out = [1]
    for _ in range(N - 1):
        out.append(out[-1] * base % Q)
    return np.array(out, object)


def cyclic(x: np.ndarray, omega: int) -> np.ndarray:
    """sum_j x_j omega^(jk) for all k, by halves."""
    if len(x) == 1:
        return x
    even, odd = cyclic(x[::2], omega * omega % Q), cyclic(x[1::2], omega * omega % Q)
    twiddle, out = 1, []
    for _ in range(len(x) // 2):
        out.append(twiddle)
        twiddle = twiddle * omega % Q
    odd = odd * np.array(out, object) % Q
    return np.concatenate([(even + odd) % Q, (even - odd) % Q])


def transform(x: np.ndarray) -> np.ndarray:
    """Values at psi^(2 rev(i) + 1)."""
    return cyclic(x.astype(object) * powers(PSI) % Q, PSI * PSI % Q)[REVERSED]


def inverse(x: np.ndarray) -> np.ndarray:
    natural = np.empty(N, object)
    natural[REVERSED] = x
    back = cyclic(natural, pow(PSI, -2, Q)) * pow(N, -1, Q) % Q
    return back * powers(pow(PSI, -1, Q)) % Q


# ---- streams


def words(key: bytes, count: int) -> np.ndarray:
    return np.frombuffer(
        Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count)), "<u8"
    )


def uniform(key: bytes, blocks: int) -> np.ndarray:
    drawn = words(key, blocks * N * 11 // 10) & np.uint64(2**56 - 1)
    return drawn[drawn < Q][: blocks * N].reshape(blocks, N).astype(object)


def small(drawn: np.ndarray) -> np.ndarray:
    """Centred binomial from twice as many words."""
    count = np.array([int(w).bit_count() for w in drawn & np.uint64(2**42 - 1)])
    return count[: len(count) // 2] - count[len(count) // 2 :]


def errors(key: bytes, blocks: int) -> np.ndarray:
    assert blocks <= 16  # of one key: no case has more
    return small(words(key, 2 * blocks * N)).reshape(blocks, N)


# ---- one case


def packed(x: np.ndarray) -> bytes:
    return b"".join(int(v).to_bytes(7, "little") for v in x.reshape(-1))


def fingerprint(challenge: str, x: np.ndarray) -> list[int]:
    """Five numbers modulo q: the weight of coefficient i of block j in row k is u[j][k] * v[i][k]."""

    def weights(what: str, count: int) -> np.ndarray:
        key = hashlib.sha256(f"fedveil/keysum/{what}/1|{challenge}".encode()).digest()
        return words(key, 5 * count).reshape(count, 5)

    v = (weights("v", N) & np.uint64(2**26 - 1)).astype(object) - 2**25
    u = (weights("u", len(x)) & np.uint64(2**56 - 1)).astype(object)
    return [int(k) % Q for k in (u * x.astype(object).dot(v)).sum(0)]


class Case:
    """A case of the file and everything that follows from its labels."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.name, self.expected = case, case["name"], case["expected"]
        count = case["sites"]
        self.sites = [f"site-{i}" for i in range(count)]
        self.helpers = [self.sites[i] for i in case.get("helpers", range(count))]
        self.session, self.plan = secret(self.name, "session").hex(), secret(self.name, "plan").hex()
        self.signing = [Ed25519PrivateKey.from_private_bytes(secret(self.name, "ed25519", i)) for i in range(count)]
        self.private = [X25519PrivateKey.from_private_bytes(secret(self.name, "x25519", i)) for i in range(count)]
        public = [key.public_key().public_bytes_raw() for key in self.private]
        self.public = dict(zip(self.sites, public, strict=True))
        server = Ed25519PrivateKey.from_private_bytes(secret(self.name, "ed25519", "server"))
        line = lambda site, key: {"site": site, "signing_key": key.public_key().public_bytes_raw().hex(), "tls_key": ""}  # noqa: E731
        members = [line(site, key) for site, key in zip(self.sites, self.signing, strict=True)]
        self.roster = sha(
            canonical({"v": 1, "consortium": "vectors", "server": line("server", server), "sites": members})
        )
        figures = {name: case[name] for name in ("threshold", "min_members", "length", "bound", "rounds")}
        figures |= {"protocol": "keysum", "colluders": case.get("colluders", 0)}
        figures |= {"helpers": self.helpers if "helpers" in case else [], "reveal_to": case.get("reveal_to", "server")}
        self.joins = sha(canonical([figures, {site: key.hex() for site, key in self.public.items()}]))
        self._parameters()

    def _parameters(self) -> None:
        c = self.case
        for bits in (46, 45, 44, 43):
            k = max((k for k in (1, 2, 3, 4) if (2 * c["bound"] + 1) ** k <= 2**bits), default=0)
            if not k:
                continue
            blocks = math.ceil(c["length"] / (k * N))
            exponent = ((Q - 1) / 2**bits / 2 - 1) ** 2 / (42 * c["sites"]) / math.log(2)
            if 1 + math.log2(blocks * N) + math.log2(c["rounds"] + 1) - exponent <= -40:
                break
        base = max(b for b in range(int(2 ** (bits / k)) - 2, int(2 ** (bits / k)) + 2) if b % 2 and b**k <= 2**bits)
        self.bits, self.k, self.blocks, self.base, self.delta = bits, k, blocks, base, (Q - 1) // 2**bits
        found = {"plain_bits": bits, "base": base, "per_coefficient": k, "blocks": blocks}
        assert found == {name: self.expected[name] for name in found}

    def vector(self, site: int) -> list[int]:
        top = self.case["bound"] // self.case["sites"]
        return [(j * 7919 + site * 104729) * 1000003 % (2 * top + 1) - top for j in range(self.case["length"])]

    def messages(self, values: list[int]) -> np.ndarray:
        padded = np.zeros(self.blocks * self.k * N, object)
        padded[: len(values)] = values
        rows = padded.reshape(self.blocks, self.k, N)
        return np.asarray(sum(rows[:, c] * self.base**c for c in range(self.k)))

    def blinding(self, site: int) -> np.ndarray:
        info = [self.session, self.case["round"], self.case["nonce"], self.sites[site]]
        return uniform(hkdf(secret(self.name, "group"), b"fedveil/blinding/1", info), self.blocks)

    def contribution(self, i: int, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Ciphertext, secret, shares by helper, and the signed header; all compared with the file."""
        c, wanted = self.case, self.expected["contributions"][self.sites[i]]
        s = small(words(secret(self.name, "secret", i), 2 * N))
        e = errors(secret(self.name, "errors", i), self.blocks)
        product = np.stack([inverse(row * transform(s) % Q) for row in a])
        x = self.delta * self.messages(self.vector(i)) + e - product
        if c.get("reveal_to") == "sites":
            x = x + self.blinding(i)
        x %= Q
        data = packed(x)
        assert data[:56].hex() == wanted["first_coefficients"]
        assert sha(data) == wanted["ciphertext"]
        shares = self._shares(i, s)
        boxes = [self._box(i, site, shares[site], sha(data)) for site in self.helpers]
        assert sha(b"".join(boxes)) == wanted["shares"]
        header = {"kind": "keysum/contribution", "session": self.session, "round": c["round"], "nonce": c["nonce"],
                  "site": self.sites[i], "plan_hash": self.plan, "roster_hash": self.roster, "joins": self.joins,
                  "ciphertext": sha(data), "shares": [sha(box) for box in boxes]}  # fmt: skip
        signed = b"fedveil/contribution/1\0" + canonical(header)
        self.signing[i].public_key().verify(bytes.fromhex(wanted["signature"]), signed)
        header["signature"] = wanted["signature"]
        assert sha(canonical(header)) == wanted["digest"]
        return x, s, np.stack([shares[site] for site in self.helpers]), header

    def _shares(self, i: int, s: np.ndarray) -> dict[str, np.ndarray]:
        drawn = np.frombuffer(hashlib.shake_256(secret(self.name, "shares", i)).digest(1 << 17), "<u2")
        degree = self.case["threshold"] - 1
        coefficients = drawn[drawn < P][: degree * N].astype(object).reshape(degree, N)
        out = {}
        for at, site in enumerate(self.helpers, 1):
            value = s.astype(object)
            for j, row in enumerate(coefficients, 1):
                value = value + row * at**j
            out[site] = value % P
        return out

    def _box(self, sender: int, receiver: str, share: np.ndarray, ciphertext: str) -> bytes:
        shared = self.private[sender].exchange(X25519PublicKey.from_public_bytes(self.public[receiver]))
        info = [self.plan, self.roster, self.session, self.sites[sender], receiver]
        info += ["keysum/share", self.case["round"], self.case["nonce"], ciphertext]
        return AESGCM(hkdf(shared, b"fedveil/box/1", info)).encrypt(bytes(12), share.astype("<u2").tobytes(), None)

    def verify(self) -> None:
        c, want = self.case, self.expected
        label = f"fedveil/keysum/a/1|{self.session}|{c['round']}|{c['nonce']}"
        a = uniform(hashlib.sha256(label.encode()).digest(), self.blocks)
        parts = [self.contribution(i, a) for i in c["members"]]
        rows = [[p[3]["site"], sha(canonical(p[3]))] for p in parts]
        assert sha(canonical({"session": self.session, "round": c["round"], "members": rows})) == want["digest"]
        answers = np.asarray(sum(p[2] for p in parts)) % P
        key = self._interpolate(answers)
        assert np.array_equal(key, sum(p[1] for p in parts))
        total = np.asarray(sum(p[0] for p in parts))
        opened = (total + np.stack([inverse(row * transform(key) % Q) for row in a])) % Q
        self._opening(parts, rows, answers, total % Q, opened)
        if c.get("reveal_to") == "sites":
            opened = (opened - sum(self.blinding(i) for i in c["members"])) % Q
        sums = self._values(opened, len(parts))
        assert sums[:8] == want["first_sums"]
        assert sha(np.array(sums, "<i8").tobytes()) == want["sums"]
        assert sums == [sum(column) for column in zip(*(self.vector(i) for i in c["members"]), strict=True)]

    def _opening(self, parts: Any, rows: Any, answers: np.ndarray, total: np.ndarray, phases: np.ndarray) -> None:
        """The challenge, every member's fingerprint, and the bytes that sites get."""
        c, want = self.case, self.expected
        assert sha(packed(total)) == want["sum"]
        base = {"session": self.session, "round": c["round"], "digest": want["digest"]}
        signed, tail = [], b""
        for site in [h for h in self.helpers if h in want["answers"]][: c["threshold"]]:
            data = answers[self.helpers.index(site)].astype("<u2").tobytes()
            header = {**base, "kind": "keysum/answer", "site": site, "answer": sha(data)}
            signature = self._sign(site, "fedveil/answer/1", header)
            signed.append([site, sha(data), signature.hex()])
            tail += signature + data
        claims = {"members": want["digest"], "sum": want["sum"], "answers": sha(canonical(signed))}
        challenge = sha(canonical(["keysum/challenge", self.session, c["round"], c["nonce"], claims]))
        assert challenge == want["challenge"]
        middle, added = b"", [0] * 5
        for part, (site, digest) in zip(parts, rows, strict=True):
            found = fingerprint(challenge, part[0])
            data = b"".join(x.to_bytes(7, "little") for x in found)
            assert data.hex() == want["fingerprints"][site]
            header = {**base, "kind": "keysum/fingerprint", "site": site, "challenge": challenge,
                      "fingerprint": data.hex()}  # fmt: skip
            middle += bytes.fromhex(digest) + data + self._sign(site, "fedveil/fingerprint/1", header)
            added = [(a + b) % Q for a, b in zip(added, found, strict=True)]
        assert added == fingerprint(challenge, total)
        assert sha(packed(phases) + middle + tail) == want["opening"]

    def _sign(self, site: str, domain: str, header: dict[str, Any]) -> bytes:
        return self.signing[self.sites.index(site)].sign(domain.encode() + b"\0" + canonical(header))

    def _interpolate(self, answers: np.ndarray) -> np.ndarray:
        key, points = 0, []
        for i in self.case["answers"]:
            site, at = self.sites[i], self.helpers.index(self.sites[i])
            data = answers[at].astype("<u2").tobytes()
            want = self.expected["answers"][site]
            assert (data[:16].hex(), sha(data)) == (want["first_values"], want["answer"])
            points.append(at + 1)
        for x in points:
            weight = 1
            for other in points:
                if other != x:
                    weight = weight * -other * pow(x - other, -1, P) % P
            key = key + weight * answers[x - 1]
        residue = key % P
        return np.where(residue > P // 2, residue - P, residue)

    def _values(self, opened: np.ndarray, members: int) -> list[int]:
        half = self.base // 2
        out = []
        for block in opened:
            shifted = (block + self.delta * sum(half * self.base**c for c in range(self.k))) % Q
            message = (shifted + self.delta // 2) // self.delta
            residual = (shifted - message * self.delta).astype(np.float64)
            assert np.mean(residual**2) < 1.5 * 21 * members
            out += [(message // self.base**c % self.base - half).tolist() for c in range(self.k)]
        return [v for row in out for v in row][: self.case["length"]]


def verify(document: dict[str, Any]) -> list[str]:
    """Check every case; returns their names, and raises at the first byte that differs."""
    for case in document["cases"]:
        Case(case).verify()
    return [case["name"] for case in document["cases"]]


if __name__ == "__main__":
    for name in verify(json.loads(PATH.read_text())):
        print("agrees:", name)
