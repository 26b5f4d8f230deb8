"""A minute of malformed frames against a server process, under real TLS; an honest site must not notice."""

from __future__ import annotations

import os
import random
import ssl
import threading
import time
from typing import Any

import grpc
import pytest

from fedveil.deploy.transport.codec import encode

FUZZ_S = float(os.environ.get("FEDVEIL_FUZZ_SECONDS", "60"))
Code = grpc.StatusCode


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes, a span, or a length field of ``data`` changed."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        i = rng.randrange(len(out)) if out else 0
        match rng.randrange(6):
            case 0 if out:
                out[i] = rng.randrange(256)
            case 1:
                del out[i : i + rng.randint(1, 40)]
            case 2:
                out[i:i] = rng.randbytes(rng.randint(1, 40))
            case 3:
                out[i:i] = out[i : i + rng.randint(1, 200)]
            case 4:
                out[4:8] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)])
            case 5:
                out[i : i + 1] = rng.choice([b'"', b"{", b"[", b"-", b"1e9", b"null", b"\xff", b"99999999999999999999"])
    return bytes(out)


@pytest.mark.slow
def test_a_minute_of_malformed_frames(victim: Any, new_rogue: Any) -> None:
    rng = random.Random(0)
    over = threading.Event()
    threading.Timer(FUZZ_S, over.set).start()
    counts = {"replies": 0, "connections": 0}
    outcomes: dict[Any, int] = {}

    def raw() -> None:
        """HTTP/2 frames under real TLS: the preface and SETTINGS, then noise with plausible frame heads."""
        mine = random.Random(1)
        while not over.is_set():
            try:
                with victim.tls_socket(ssl.TLSVersion.TLSv1_3) as s:
                    s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
                    for _ in range(mine.randint(1, 30)):
                        body = mine.randbytes(mine.randrange(300))
                        length = len(body) if mine.random() < 0.8 else mine.randrange(1 << 24)
                        head = length.to_bytes(3, "big") + bytes([mine.randrange(11), mine.randrange(256)])
                        s.sendall(head + mine.randrange(1 << 31).to_bytes(4, "big") + body)
                counts["connections"] += 1
            except OSError:
                counts["connections"] += 1

    noise = threading.Thread(target=raw)
    noise.start()
    west = new_rogue(victim).dial()
    while not over.is_set():
        try:
            pieces = encode(west.answer(west.message(), rng.randrange(3000)))
        except grpc.RpcError:
            west.close()
            time.sleep(0.1)
            west = new_rogue(victim)
            try:
                west.dial()
            except grpc.RpcError:
                continue
            continue
        stream = mutated(b"".join(pieces), rng)
        cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(4)))
        parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        for _ in range(20):  # until one of them counts as the answer
            outcome = west.reply(parts)
            counts["replies"] += 1
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if outcome in (b"ok", Code.UNAVAILABLE):
                break
            stream = mutated(b"".join(pieces), rng)
            parts = [stream]
    noise.join()
    west.close()
    victim.check()
    print({**counts, "outcomes": {str(k): v for k, v in outcomes.items()}, "rss": [victim.before, victim.rss]})
    assert min(counts.values()) > 10
    assert set(outcomes) <= {b"ok", b"stale", Code.INVALID_ARGUMENT, Code.ABORTED, Code.FAILED_PRECONDITION,
                             Code.UNAVAILABLE, Code.CANCELLED}, outcomes  # fmt: skip
