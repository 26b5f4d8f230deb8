"""A small coverage-guided fuzzer: mutate, run, keep what reaches a new line transition.

``python tests/fuzz/fuzzer.py [SECONDS] [TARGET ...]`` (all targets share the seconds; default 300). An input that makes
a target raise anything but a :class:`FedveilError`, or take more than ``SLOW_S`` of CPU time, is printed and ends it
with exit code 1. ``FEDVEIL_FUZZ_SEED`` repeats a run.
"""

from __future__ import annotations

import math
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import parsers
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedveil.common import canonical, errors, flwr_adapter, wire
from fedveil.common.errors import FedveilError
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport import codec

LIMITS = Limits(header=20_000, buffers=100_000)
SLOW_S = 2.0
MAX_INPUT = 20_000
_TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"0.1",
    b"\\ud800", b"\\u0000", b"\xff", b"\xc3\xa9", b'{"f":"0x1p+0"}', b'{"b":3}', b'"inf"', b"9" * 30, b"-1", b'""',
    b"[[[[", b'"kind":"a"', b"18446744073709551616", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"\0" * 8, b"FVM1",
    b"array", b"config", b"metric",
]  # fmt: skip
_WATCHED = {m.__file__ for m in (canonical, codec, flwr_adapter, wire, errors)}


# --- targets: each takes bytes and returns nothing; a FedveilError is a fine answer ----------------------------------


def loads(data: bytes) -> None:
    """What is accepted has one canonical form (a lone surrogate: none), and comes back from it."""
    value = canonical.loads(data)
    once = canonical.dumps(value)
    again = canonical.loads(once)
    if canonical.dumps(again) != once:
        raise AssertionError("the canonical form of a value is not stable")


def decode(data: bytes) -> None:
    """A stream in any chunks is a message or a WireError, and an accepted message can be looked at and sent on."""
    step = 1 + len(data) % 97
    decoder = codec.Decoder(LIMITS)
    for i in range(0, len(data), step):
        decoder.feed(data[i : i + step])
    message = decoder.result()
    if message.has_error():
        flwr_adapter.reply_error(message)
        return
    flwr_adapter.content_bytes(message)
    codec.encode(flwr_adapter.copied(message))
    read(flwr_adapter.from_record(message.content, LIMITS))


def record(data: bytes) -> None:
    """A content made of the input: its header, its arrays' names, types and shapes."""
    names = ["a", "b_1", "", "A", "x" * 65, "ü", "a b", "\ud800"]
    head, _, rest = data.partition(b"\xfe")
    arrays: dict[str, Array] = {}
    for i, part in enumerate(rest.split(b"\xfd")[:70]):
        choice = part[0] if part else 0
        name = names[choice % len(names)] + ("" if choice < 128 else str(i))
        shape = [(len(part),), (len(part) + 1,), (), (1, len(part)), (-1,)][choice % 5 if choice % 3 == 0 else 0]
        dtype = "float32" if choice % 11 == 1 else "uint8"
        arrays[name] = Array(dtype, shape, flwr_adapter.STYPE if choice % 7 else "other", part)
    content = RecordDict({flwr_adapter.HEADER: ConfigRecord({"json": head}), flwr_adapter.BUFFERS: ArrayRecord(arrays)})
    read(flwr_adapter.from_record(content, LIMITS))


def error(data: bytes) -> None:
    """The text of a peer's error."""
    told = flwr_adapter.parse_error(data.decode("utf-8", "surrogateescape"))
    flwr_adapter.error_text(told)


def document(data: bytes) -> None:
    """A JSON document for one of the other parsers, which the first byte chooses."""
    chosen = [*parsers.parsers().values()]
    if data:
        chosen[data[0] % len(chosen)].parse(canonical.loads(data[1:]))


def read(packet: Packet) -> None:
    """Do to an accepted packet what receivers do."""
    wire.check(packet, LIMITS)
    wire.check(packet, LIMITS, header_bytes=0)
    for name, data in packet.buffers.items():
        packet.buffer(name, len(data))
    packet.expect(packet.kind)
    packet.buffer("a", 3)


# --- inputs ----------------------------------------------------------------------------------------------------------


def _messages() -> list[Message]:
    packets = [
        Packet({"kind": "x", "n": 1, "f": 0.5, "l": [1, None, True], "d": {"é": "\u2028"}}, {"a": b"abc", "b": b""}),
        Packet({"kind": "y"}, {}),
    ]
    out = [flwr_adapter.request(p, to=5, action="query", round=1) for p in packets]
    mixed = RecordDict({"c": ConfigRecord({"i": 1, "f": 0.5, "s": "x", "b": b"yz", "l": [1.5, 2.5], "t": True})})
    out.append(flwr_adapter.request(mixed, to=5, action="train", round=2))
    out.append(flwr_adapter.error_reply(errors.PolicyRefusal("no", hint="ask"), out[0]))
    for m in out:
        flwr_adapter.stamp(m)
    return out


def _seeds(name: str) -> list[bytes]:
    streams = [b"".join(codec.encode(m)) for m in _messages()]
    texts = [b'{"a":[1,2.5,"x",null,true],"b":{}}', b'"\\u00e9"', b"1e3", b"[]"]
    if name == "decode":
        return streams
    if name == "document":
        return [bytes([i]) + canonical.dumps(p.document) for i, p in enumerate(parsers.parsers().values())]
    if name == "record":
        heads = [b'{"kind":"a"}', b'{"kind":1}', b"[]", b'{"a":1.0,"kind":"b"}']
        return [h + b"\xfe" + b"\x08ab\xfd\x19xyz" for h in heads]
    if name == "error":
        return [flwr_adapter.error_text(errors.WireError("cut", hint="again")).encode(), b"{}", b"x"]
    return [*texts, *(s[8:200] for s in streams)]


def _stream_fixed(data: bytes, rng: random.Random) -> bytes:
    """Let a stream's declared header length fit where its header seems to end, so that mutations reach what follows."""
    if len(data) < 12 or rng.random() < 0.2:
        return data
    end = data.rfind(b"}") + 1
    return b"FVM1" + max(0, end - 8).to_bytes(4, "big") + data[8:]


def mutated(data: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """``data`` with one to eight changes."""
    out = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        i = rng.randrange(len(out) + 1)
        match rng.randrange(8):
            case 0 if i < len(out):
                out[i] ^= 1 << rng.randrange(8)
            case 1 if i < len(out):
                out[i] = rng.randrange(256)
            case 2:
                del out[i : i + rng.randint(1, 20)]
            case 3:
                out[i:i] = rng.choice(_TOKENS)
            case 4:
                out[i : i + 1] = rng.choice(_TOKENS)
            case 5:
                other = rng.choice(corpus)
                j = rng.randrange(len(other) + 1)
                out[i : i + rng.randrange(50)] = other[j : j + rng.randint(1, 100)]
            case 6:
                out[i:i] = out[i : i + rng.randint(1, 60)]
            case 7:
                digits = str(rng.choice([0, 1, -1, 255, 1 << 16, 1 << 31, 1 << 63, 1 << 64, rng.randrange(1000)]))
                out[i : i + rng.randrange(4)] = digits.encode()
    return bytes(out[:MAX_INPUT])


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one target.

    Attributes:
        accepted: inputs that were taken; the others met a FedveilError.
        edges: line transitions that were reached.
        failures: inputs that did worse, and how.
    """

    executions: int = 0
    accepted: int = 0
    edges: int = 0
    corpus: int = 0
    failures: list[tuple[bytes, str]] = field(default_factory=list)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "loads": loads, "decode": decode, "record": record, "error": error, "document": document,
}  # fmt: skip


class Tracer:
    """Transitions between lines of the watched modules."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()
        self.new = False

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        """A function is entered."""
        if frame.f_code.co_filename not in _WATCHED:
            return None
        code, last = id(frame.f_code), 0

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            edge = (code, last, frame.f_lineno)
            last = frame.f_lineno
            if edge not in self.seen:
                self.seen.add(edge)
                self.new = True
            return line

        return line


def fuzz(name: str, seed: int, *, seconds: float = math.inf, executions: float = math.inf, most: int = 5) -> Outcome:
    """Run one target until ``most`` failures, for ``seconds``, or for ``executions``: these repeat with the seed."""
    rng, tracer, out = random.Random(seed), Tracer(), Outcome()
    corpus = _seeds(name)
    pending = list(corpus)
    end = time.monotonic() + seconds
    slow = SLOW_S if math.isfinite(seconds) else math.inf
    while time.monotonic() < end and out.executions < executions and len(out.failures) < most:
        data = pending.pop() if pending else mutated(rng.choice(corpus), corpus, rng)
        if name == "decode":
            data = _stream_fixed(data, rng)
        tracer.new = False
        _run(TARGETS[name], data, tracer, out, slow)
        if tracer.new:
            corpus.append(data)
    out.edges, out.corpus = len(tracer.seen), len(corpus)
    return out


def _run(target: Callable[[bytes], None], data: bytes, tracer: Tracer, out: Outcome, slow: float) -> None:
    began = time.thread_time()
    sys.settrace(tracer.call)
    try:
        target(data)
        out.accepted += 1
    except FedveilError:
        pass
    except Exception as e:
        out.failures.append((data, f"{type(e).__name__}: {e}"[:300]))
    finally:
        sys.settrace(None)
    out.executions += 1
    if (took := time.thread_time() - began) > slow:
        out.failures.append((data, f"took {took:.1f} s"))


def main(arguments: Iterable[str]) -> int:
    """Fuzz and report; the exit code."""
    seconds, *names = [*arguments] or ["300"]
    names = names or [*TARGETS]
    seed = int(os.environ.get("FEDVEIL_FUZZ_SEED", "0")) or secrets.randbits(32)
    print(f"seed {seed}")
    bad = 0
    for name in names:
        out = fuzz(name, seed, seconds=float(seconds) / len(names))
        print(f"{name}: {out.executions} executions, {out.accepted} accepted, {out.edges} edges, corpus {out.corpus}, "
              f"{len(out.failures)} failures", flush=True)  # fmt: skip
        for data, why in out.failures:
            bad += 1
            print(f"  {why}\n  {data[:500]!r}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
