"""Attacks on a server process over the network: strangers, a member gone bad, and honest sites that must not notice."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.provision import load_tls, make_consortium
from fedveil.deploy.transport import TlsFiles
from fedveil.deploy.transport.codec import Decoder, cut, encode
from fedveil.deploy.transport.grpc_grid import OPTIONS, read_tls
from fedveil.deploy.transport.grpc_service import FROM, INSTANCE, SERVICE
from fedveil.deploy.transport.grpc_site import run_site

SITES = ["north", "south", "west"]
GROWTH = 64 << 20  # bytes by which the server may grow under attack: a reply, its copies, allocator slack
FUZZ_S = float(os.environ.get("FEDVEIL_FUZZ_SECONDS", "60"))
Code = grpc.StatusCode


class Victim:
    """The server process and one honest site, ``north``."""

    def __init__(self, pki: Path, *, burst: int = 10**9, stall: float = 2.0) -> None:
        self.pki = pki
        script = Path(__file__).with_name("transport_server.py")
        env = {**os.environ, "GRPC_VERBOSITY": "NONE", "MALLOC_ARENA_MAX": "2"}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(pki / "server"), str(burst), str(stall)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.facts: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True), threading.Thread(target=self._complaints)]
        for t in self._threads:
            t.start()
        self.until(lambda: bool(self.facts), 60)
        self.port = int(self.facts[0]["port"])
        self._threads.append(threading.Thread(target=self._honest, daemon=True))
        self._threads[-1].start()
        self.until(lambda: self.answered("north") > 2)
        self.before = self.rss

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.facts.append(json.loads(line))

    def _complaints(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def _honest(self) -> None:
        app = ClientApp()

        @app.train("echo")
        def echo(message: Message, context: Context) -> Message:
            return flower.reply(Packet({"kind": "echo"}, {"a": bytes(1000)}), message)

        tls = load_tls(self.pki / "sites" / "north")
        run_site(
            app, address=f"127.0.0.1:{self.port}", tls=tls, site=SiteId("north"), node_config={}, stop=self.stop
        )  # fmt: skip

    @staticmethod
    def until(condition: Callable[[], bool], timeout: float = 20) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "the condition did not come true"
            time.sleep(0.02)

    @property
    def rss(self) -> int:
        """The server's resident memory after its latest round, bytes."""
        return next(f["rss"] for f in reversed(self.facts) if "rss" in f)

    def answered(self, site: str) -> int:
        """Rounds that ``site`` has answered so far."""
        return sum(site in f.get("answered", ()) for f in list(self.facts))

    def reports(self) -> list[list[str]]:
        """What the server reported."""
        return [f["report"] for f in list(self.facts) if "report" in f]

    def check(self) -> None:
        """The server lives, the honest site is served, memory is bounded, no exception reached the log."""
        seen = self.answered("north")
        self.until(lambda: self.answered("north") >= seen + 3)
        assert self.process.poll() is None
        assert "north" not in [site for site, _ in self.reports()]
        peak = max(f["rss"] for f in self.facts if "rss" in f)
        assert peak - self.before < GROWTH, f"{(peak - self.before) / 2**20:.0f} MiB more than before the attacks"
        assert "Traceback" not in "".join(self.errors), "".join(self.errors)[-3000:]

    def close(self) -> None:
        """Let the run end in order: also a check."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(30)
        self.stop.set()
        for t in self._threads:
            t.join(15)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        assert code == 0, "".join(self.errors)[-3000:]
        assert self.facts[-1] == {"ended": True}


class Rogue:
    """A process with a member's certificate that speaks the protocol by hand."""

    def __init__(self, victim: Victim, site: str = "west", instance: str = "one", tls: TlsFiles | None = None) -> None:
        ca, certificate, key = read_tls(tls or load_tls(victim.pki / "sites" / site))
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        options = [(k, 64 << 20 if "message_length" in k else v) for k, v in options]
        self.channel = grpc.secure_channel(f"127.0.0.1:{victim.port}", credentials, options)
        self.metadata = ((INSTANCE, instance),)
        self.work: Any = None

    def dial(self) -> Rogue:
        """Open a session; raises what the server says to it."""
        self.work = self.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=self.metadata, timeout=120)
        assert canonical.loads(next(self.work))["t"] == "welcome"
        return self

    def message(self) -> Message:
        """The next message."""
        while canonical.loads(next(self.work))["t"] != "message":
            pass
        decoder = Decoder(Limits())
        while not decoder.complete:
            decoder.feed(next(self.work))
        return decoder.result()

    def reply(self, chunks: Any, *more: tuple[str, str], timeout: float = 20) -> bytes | grpc.StatusCode:
        """Send ``chunks`` as one reply; what the server says, or the status with which it refuses."""
        send = self.channel.stream_unary(f"/{SERVICE}/Reply")
        call = send.future(iter(chunks), metadata=(*self.metadata, *more), timeout=timeout)
        code = call.code()
        return call.result() if code is Code.OK else code

    def refused(self) -> grpc.StatusCode:
        """The status with which a session is refused."""
        with pytest.raises(grpc.RpcError) as e:
            self.dial()
        assert isinstance(e.value, grpc.Call)
        return e.value.code()

    def close(self) -> None:
        self.channel.close()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attacked")
    make_consortium(out, SITES, consortium="attacked", host="127.0.0.1")
    return out


@pytest.fixture(scope="module")
def victim(pki: Path) -> Iterator[Victim]:
    made = Victim(pki)
    yield made
    made.close()


@pytest.fixture
def rogue(victim: Victim) -> Iterator[Callable[..., Rogue]]:
    made: list[Rogue] = []

    def make(*a: Any, **k: Any) -> Rogue:
        made.append(Rogue(victim, *a, **k))
        return made[-1]

    yield make
    for r in made:
        r.close()
    # The server must have seen that they are gone, or the next test's dial is a second session.
    victim.until(lambda: not victim.reports() or True)
    time.sleep(0.2)


def answer(message: Message, size: int = 100) -> Message:
    return flower.reply(Packet({"kind": "x"}, {"a": bytes(size)}), message)


# --- strangers -------------------------------------------------------------------------------------------------


def test_a_foreign_authority_is_refused(victim: Victim, rogue: Any, tmp_path: Path) -> None:
    make_consortium(tmp_path, ["west"], consortium="foreign", host="127.0.0.1")
    folder = tmp_path / "sites" / "west"
    tls = load_tls(folder)
    shutil.copy(victim.pki / "sites" / "west" / "ca.pem", folder / "ca.pem")
    assert rogue(tls=tls).refused() is Code.UNAVAILABLE
    victim.check()


def test_an_expired_certificate_of_a_member_is_refused(victim: Victim, rogue: Any, tmp_path: Path) -> None:
    good = victim.pki / "sites" / "west"
    old = x509.load_pem_x509_certificate((good / "tls.pem").read_bytes())
    ca = x509.load_pem_x509_certificate((good / "ca.pem").read_bytes())
    key = serialization.load_pem_private_key((victim.pki / "consortium" / "ca.key").read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    for name, end in (("control", now + datetime.timedelta(days=1)), ("expired", now - datetime.timedelta(minutes=1))):
        builder = x509.CertificateBuilder(ca.subject, old.subject, old.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=2)).not_valid_after(end)
        for extension in old.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
        (tmp_path / name).write_bytes(pem)
        peer = rogue(tls=TlsFiles(good / "ca.pem", tmp_path / name, good / "tls.key"))
        if name == "control":
            peer.dial()
            peer.close()
        else:
            assert peer.refused() is Code.UNAVAILABLE
    victim.check()


def test_plain_text_and_old_tls_are_refused(victim: Victim) -> None:
    for first in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        os.urandom(4096),
    ):
        with socket.create_connection(("127.0.0.1", victim.port), timeout=5) as s:
            s.sendall(first)
            s.settimeout(15)
            try:
                while got := s.recv(4096):
                    assert b"fedveil" not in got
            except ConnectionError:
                pass
    with pytest.raises((ssl.SSLError, ConnectionError)):
        tls_socket(victim, ssl.TLSVersion.TLSv1_2).close()
    tls_socket(victim, ssl.TLSVersion.TLSv1_3).close()  # control
    victim.check()


def tls_socket(victim: Victim, version: ssl.TLSVersion) -> ssl.SSLSocket:
    files = load_tls(victim.pki / "sites" / "west")
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    raw = socket.create_connection(("127.0.0.1", victim.port), timeout=5)
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


# --- a member gone bad -----------------------------------------------------------------------------------------


def test_a_second_live_session_is_refused_and_reported(victim: Victim, rogue: Any) -> None:
    assert rogue("north", "another process").refused() is Code.ALREADY_EXISTS
    victim.until(lambda: any(s == "north" and "second live process" in what for s, what in victim.reports()))
    victim.facts[:] = [f for f in victim.facts if "report" not in f]
    victim.check()


def test_a_site_cannot_answer_for_another_one(victim: Victim, rogue: Any) -> None:
    west, south = rogue("west").dial(), rogue("south").dial()
    theirs = answer(south.message())
    assert west.reply(cut(encode(theirs))) == b"stale"
    mine = answer(west.message())
    mine.metadata.__dict__.update(_src_node_id=flower.node_id(SiteId("south")))
    before = victim.answered("south")
    assert west.reply(cut(encode(mine))) == b"ok"
    time.sleep(1.3)
    assert victim.answered("south") == before, "an answer was booked for the site that did not give it"
    victim.check()


def test_replays_are_stale(victim: Victim, rogue: Any) -> None:
    west = rogue().dial()
    recorded = encode(answer(west.message()))
    assert west.reply(cut(recorded)) == b"ok"
    assert west.reply(cut(recorded)) == b"stale"
    west.message()
    assert west.reply(cut(recorded)) == b"stale", "an answer to an earlier round was taken for this one"
    assert rogue("west", "another").reply(cut(recorded)) is Code.FAILED_PRECONDITION
    assert west.reply(cut(recorded), (FROM, "10")) is Code.FAILED_PRECONDITION
    victim.check()


def test_oversized_frames_are_refused_before_they_are_kept(victim: Victim, rogue: Any) -> None:
    west = rogue().dial()
    assert west.reply([bytes(16 << 20)]) is Code.RESOURCE_EXHAUSTED
    head = encode(answer(west.message(), 10 << 20))[0]
    assert west.reply([head, *[bytes(1 << 20)] * 200]) is Code.INVALID_ARGUMENT
    assert west.reply([b"FVM1" + (2**32 - 1).to_bytes(4, "big"), *[bytes(1 << 20)] * 200]) is Code.INVALID_ARGUMENT
    west.message()
    endless = (bytes(1 << 20) for _ in range(100))
    assert west.reply([b"FVM1" + (8 << 20).to_bytes(4, "big"), *endless]) is Code.INVALID_ARGUMENT
    victim.check()


def test_slow_peers_are_cut_and_do_not_crowd_out_the_others(victim: Victim, rogue: Any) -> None:
    with ExitStack() as crowd:
        for _ in range(150):
            s = crowd.enter_context(socket.create_connection(("127.0.0.1", victim.port), timeout=5))
            s.sendall(b"\x16")  # a TLS record begins, and never goes on
        _drip_and_hold(victim, rogue)
    victim.check()


def _drip_and_hold(victim: Victim, rogue: Any) -> None:
    def drip() -> Iterator[bytes]:
        yield encode(answer(message, 3_000_000))[0]
        while True:
            yield b"\0"
            time.sleep(0.2)

    west = rogue().dial()
    message = west.message()
    began = time.monotonic()
    assert west.reply(drip()) in (Code.CANCELLED, Code.UNKNOWN, b"stale")
    assert time.monotonic() - began < 8
    # Calls that are opened and never spoken on, more of them than the server has threads.
    idle = [
        west.channel.stream_stream(f"/{SERVICE}/Work")(iter(wait_forever()), metadata=west.metadata) for _ in range(40)
    ]
    victim.check()
    for call in idle:
        call.cancel()


def wait_forever() -> Iterator[bytes]:
    time.sleep(5)
    yield from ()


def test_a_site_that_reads_nothing_is_cut(victim: Victim, rogue: Any) -> None:
    """It opens streams and never reads: each is replaced by the next, none keeps a thread of the server."""
    west = rogue()
    calls = [west.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=west.metadata) for _ in range(60)]
    victim.check()
    for call in calls:
        call.cancel()


def test_a_site_that_fails_all_the_time_is_not_heard_for_a_while(pki: Path) -> None:
    victim = Victim(pki, burst=30)
    west = Rogue(victim)
    try:
        west.dial()
        codes = [west.reply([os.urandom(100)]) for _ in range(60)]
        assert codes[0] is Code.INVALID_ARGUMENT
        assert codes[-1] is Code.RESOURCE_EXHAUSTED
        assert ["west", "too many calls that came to nothing"] in victim.reports()
        victim.check()
    finally:
        west.close()
        victim.close()


# --- the fuzzer ------------------------------------------------------------------------------------------------


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
def test_a_minute_of_malformed_frames(victim: Victim) -> None:
    rng = random.Random(0)
    end = time.monotonic() + FUZZ_S
    counts = {"replies": 0, "connections": 0}
    outcomes: dict[Any, int] = {}

    def raw() -> None:
        """HTTP/2 frames under real TLS: the preface and SETTINGS, then noise with plausible frame heads."""
        mine = random.Random(1)
        while time.monotonic() < end:
            try:
                with tls_socket(victim, ssl.TLSVersion.TLSv1_3) as s:
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
    west = Rogue(victim).dial()
    while time.monotonic() < end:
        try:
            pieces = encode(answer(west.message(), rng.randrange(3000)))
        except grpc.RpcError:
            west.close()
            time.sleep(0.1)
            west = Rogue(victim)
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
    assert min(counts.values()) > 10 * FUZZ_S / 6
    assert set(outcomes) <= {b"ok", b"stale", Code.INVALID_ARGUMENT, Code.ABORTED, Code.FAILED_PRECONDITION,
                             Code.UNAVAILABLE, Code.CANCELLED}, outcomes  # fmt: skip
