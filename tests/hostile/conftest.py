"""Two worlds for attacks: a joined session of the sum of keys in memory, and a server process with one honest site.

In the first the adversary has the server and some of the sites. In the second it is whoever reaches the server's port.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.enrol.provision import load_tls, make_consortium
from fedveil.deploy.transport import TlsFiles
from fedveil.deploy.transport.codec import Decoder, cut, encode
from fedveil.deploy.transport.grpc_grid import OPTIONS, read_tls
from fedveil.deploy.transport.grpc_service import INSTANCE, SERVICE
from fedveil.deploy.transport.grpc_site import run_site
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import MemoryStore, Store

sys.path.insert(
    0, str(Path(__file__).parent)
)  # the forgeries are also a program: tests find its modules by their names

SITES = ["north", "south", "west"]
GROWTH = 64 << 20  # bytes by which the server may grow under attack: a reply, its copies, allocator slack
Code = grpc.StatusCode
NINE = [SiteId(f"s{i}") for i in range(9)]
KEYS = {name: new_signing_key() for name in NINE}
SERVER_KEY = new_signing_key()


class World:
    """``n`` joined sites of which the last ``c`` are the adversary's, as is the server.

    Attributes:
        keys: every site's signing key, the honest ones' too.
    """

    keys = KEYS

    def __init__(self, n: int, c: int, threshold: int, min_members: int, length: int = 6) -> None:
        self.names = NINE[:n]
        members = tuple(Member(s, public_hex(KEYS[s])) for s in self.names)
        roster = Roster("hostile", Member(SERVER, public_hex(SERVER_KEY)), members)
        self.spec = SumSpec(
            "keysum", secrets.token_hex(32), "b" * 64, roster, threshold, min_members, length, 1000, 10, c
        )
        self.stores: dict[SiteId, Store] = {s: MemoryStore() for s in self.names}
        self.sites = {s: self.fresh(s) for s in self.names}
        self.server = KeysumServer(self.spec)
        joins = {s: site.join_fields() for s, site in self.sites.items()}
        self.server.begin(joins, {s: site.begin(joins) for s, site in self.sites.items()})
        self.honest, self.colluders = self.names[: n - c], self.names[n - c :]
        self.packets: dict[SiteId, Packet] = {}

    def fresh(self, name: SiteId) -> KeysumSite:
        return KeysumSite(self.spec, name, KEYS[name], self.stores[name])

    def contribute(self, round: int = 1) -> None:
        self.packets = {s: site.contribute(round, "n", np.arange(6)) for s, site in self.sites.items()}

    def announce(self, members: Iterable[SiteId], round: int = 1) -> Packet:
        """An announcement of any set, as a lying server writes it."""
        chosen = [s for s in self.names if s in set(members)]
        header = {"kind": messages.MEMBERS, "session": self.spec.session, "round": round, "nonce": "n"}
        return Packet({**header, "members": [self.packets[s].header for s in chosen]})

    def digest(self, members: Iterable[SiteId], round: int = 1) -> str:
        chosen = {s: messages.canonical.digest(self.packets[s].header) for s in set(members)}
        return messages.members_digest(self.spec, round, chosen)

    def forge(self, colluder: SiteId, digest: str, round: int = 1) -> str:
        """A colluder signs whatever is asked."""
        header = messages.agreement_header(self.spec, round, colluder, digest)
        return messages.sign_header(KEYS[colluder], header)["signature"]

    def ask(self, helper: SiteId, members: Iterable[SiteId], agreements: Mapping[SiteId, str]) -> Packet:
        at = self.names.index(helper) * messages.BOX_BYTES
        chosen = [s for s in self.names if s in set(members)]
        boxes = [self.packets[s].buffers["shares"][at : at + messages.BOX_BYTES] for s in chosen]
        header = {"kind": messages.OPEN, "session": self.spec.session, "round": 1}
        header |= {"digest": self.digest(members), "agreements": dict(agreements)}
        return Packet(header, {"shares": b"".join(boxes)})

    def share_of(self, dealer: SiteId, helper: SiteId) -> np.ndarray:
        """What ``helper`` was dealt: the adversary reads it for its own sites."""
        said = self.packets[dealer].header
        at = self.names.index(helper) * messages.BOX_BYTES
        box = self.packets[dealer].buffers["shares"][at : at + messages.BOX_BYTES]
        data = self.sites[helper]._session.unseal(dealer, messages.box_context(1, "n", said["ciphertext"]), box)
        return np.frombuffer(data, "<u2").astype(np.int64)


@pytest.fixture
def new_world() -> type[World]:
    """:class:`World`, to be made with the numbers of sites and colluders, threshold and smallest number of members."""
    return World


# --- over the network ------------------------------------------------------------------------------------------


class Victim:
    """The server process and one honest site, ``north``."""

    def __init__(self, pki: Path, *, burst: int = 10**9, stall: float = 5.0) -> None:
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
            app, address=f"127.0.0.1:{self.port}", tls=tls, site=SiteId("north"), stop=self.stop
        )  # fmt: skip

    @staticmethod
    def until(condition: Callable[[], bool], timeout: float = 600) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "the condition did not come true"
            time.sleep(0.02)

    @property
    def rss(self) -> int:
        """The server's resident memory after its latest round, bytes."""
        return next(f["rss"] for f in reversed(self.facts) if "rss" in f)

    def next_rounds(self, count: int) -> None:
        """Wait until as many more rounds are over."""
        seen = sum("rounds" in f for f in list(self.facts))
        self.until(lambda: sum("rounds" in f for f in list(self.facts)) >= seen + count)

    def answered(self, site: str) -> int:
        """Rounds that ``site`` has answered so far."""
        return sum(site in f.get("answered", ()) for f in list(self.facts))

    def reports(self) -> list[list[str]]:
        """What the server reported."""
        return [f["report"] for f in list(self.facts) if "report" in f]

    def tls_socket(self, version: ssl.TLSVersion) -> ssl.SSLSocket:
        """A connection as ``west`` in just this version of TLS."""
        files = load_tls(self.pki / "sites" / "west")
        context = ssl.create_default_context(cafile=str(files.ca))
        context.load_cert_chain(files.certificate, files.key)
        context.set_alpn_protocols(["h2"])
        context.minimum_version = context.maximum_version = version
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=600)
        return context.wrap_socket(raw, server_hostname="127.0.0.1")

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
        code = self.process.wait(600)
        self.stop.set()
        for t in self._threads:
            t.join(600)
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
        """Open a session, as soon as the server has seen that the one of an earlier test is gone."""
        while True:
            try:
                self._open()
            except grpc.RpcError as e:
                if not (isinstance(e, grpc.Call) and e.code() is Code.ALREADY_EXISTS):
                    raise
                time.sleep(0.05)
            else:
                return self

    def _open(self) -> None:
        self.work = self.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=self.metadata, timeout=600)
        assert canonical.loads(next(self.work))["t"] == "welcome"

    def message(self) -> Message:
        """The next message."""
        while canonical.loads(next(self.work))["t"] != "message":
            pass
        decoder = Decoder(Limits())
        while not decoder.complete:
            decoder.feed(next(self.work))
        return decoder.result()

    @staticmethod
    def answer(message: Message, size: int = 100) -> Message:
        """An answer of ``size`` bytes as the protocol wants it."""
        return flower.reply(Packet({"kind": "x"}, {"a": bytes(size)}), message)

    def reply(self, chunks: Any, *more: tuple[str, str], timeout: float = 600) -> bytes | grpc.StatusCode:
        """Send ``chunks`` as one reply; what the server says, or the status with which it refuses."""
        send = self.channel.stream_unary(f"/{SERVICE}/Reply")
        call = send.future(iter(chunks), metadata=(*self.metadata, *more), timeout=timeout)
        code = call.code()
        return call.result() if code is Code.OK else code

    def in_time(self, make: Callable[[Message], Message]) -> Message:
        """An answer that the server took; a question that was over before it came is followed by the next."""
        for _ in range(200):
            made = make(self.message())
            if (outcome := self.reply(cut(encode(made)))) == b"ok":
                return made
            assert outcome == b"stale"
        raise AssertionError("no question was answered in time")

    def refused(self) -> grpc.StatusCode:
        """The status with which a session is refused."""
        with pytest.raises(grpc.RpcError) as e:
            self._open()
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


@pytest.fixture
def new_victim() -> type[Victim]:
    """:class:`Victim`, for a test that needs a server of its own."""
    return Victim


@pytest.fixture
def new_rogue() -> type[Rogue]:
    """:class:`Rogue`, for a test that makes and closes many."""
    return Rogue
