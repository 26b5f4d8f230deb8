"""A site that encrypts a very large model keeps its connection: keep-alives go on, nobody dials twice.

The site is a process of its own that runs what ``fedveil client run`` runs (``run_site`` around a client app); both
sides ping every second and hang up a second after a ping without an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedveil.common import flwr_adapter as flower
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport import grpc_grid
from fedveil.deploy.transport.grpc_grid import GrpcGrid

LENGTH = 100_000_000
BOUND = (1 << 22) - 1  # two values in a coefficient
PING_MS = 1000
MOST_S = 0.25  # the longest another thread of the site may be kept waiting; a ping is given four times as long
MAX_BYTES_PER_PARAMETER = 10.0  # the int32 vector, the ciphertext of 3.5, the encoded reply and working space

SITE = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from flwr.clientapp import ClientApp
from fedveil.common import flwr_adapter as flower, identity
from fedveil.common.identity import Roster, Member, SERVER, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.deploy.enrol.provision import load_tls
from fedveil.deploy.transport import grpc_site
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import DirectoryStore

folder, address, state, length, bound, ping = sys.argv[1:4] + [int(x) for x in sys.argv[4:]]
short = {"grpc.keepalive_time_ms": ping, "grpc.keepalive_timeout_ms": ping, "grpc.http2.ping_timeout_ms": ping}
grpc_site._OPTIONS = [*{**dict(grpc_site._OPTIONS), **short}.items()]
names = [SiteId(s) for s in ("north", "south", "west")]
keys = {s: new_signing_key() for s in names}
members = tuple(Member(s, public_hex(k)) for s, k in keys.items())
roster = Roster("keepalive", Member(SERVER, public_hex(new_signing_key())), members)
spec = SumSpec("keysum", "a" * 64, "b" * 64, roster, 2, 2, length, bound, 10)
mine, others = names[0], names[1:]
sums = {s: site_sum(spec, s, keys[s], DirectoryStore(Path(state) / s)) for s in names}
joins = {s: x.join_fields() for s, x in sums.items()}
sums[mine].begin(joins)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024

app, facts, stop = ClientApp(), {"statuses": []}, threading.Event()

@app.train("contribute")
def contribute(message, context):
    longest, over = [0.0], threading.Event()
    def tick():
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now
    ticker = threading.Thread(target=tick)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    values = np.arange(length, dtype=np.int32)
    values %= 1000
    ticker.start()
    began = time.perf_counter()
    packet = sums[mine].contribute(1, "n", values)
    facts["seconds"] = time.perf_counter() - began
    over.set()
    ticker.join()
    facts["longest"] = longest[0]
    facts["per_parameter"] = (status("VmHWM") - before) / length
    return flower.reply(packet, message)

grpc_site.run_site(
    app, address=address, tls=load_tls(Path(folder)), site=mine, stop=stop,
    on_status=facts["statuses"].append,
)
print(json.dumps(facts))
"""


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


@pytest.mark.slow
def test_the_connection_survives_the_encryption_of_a_hundred_million_parameters(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = 24 * LENGTH  # both processes: this one holds the reply, the site vector, ciphertext and reply
    if _available() < need:
        pytest.skip(f"{need >> 30} GiB of free memory are needed")
    short = {
        "grpc.keepalive_time_ms": PING_MS,
        "grpc.keepalive_timeout_ms": PING_MS,
        "grpc.http2.ping_timeout_ms": PING_MS,
        "grpc.http2.min_recv_ping_interval_without_data_ms": PING_MS // 2,
    }
    monkeypatch.setattr(grpc_grid, "_SERVER_OPTIONS", [*{**dict(grpc_grid._SERVER_OPTIONS), **short}.items()])
    attached = list[str]()

    def main(grid: GrpcGrid) -> tuple[Packet, float]:
        real = grid.mailbox.attach
        monkeypatch.setattr(grid.mailbox, "attach", lambda s, i, **k: attached.append(i) or real(s, i, **k))
        assert grid.wait_for_sites(1, 600) == 1
        node = flower.node_id(SiteId("north"))
        request = flower.request(Packet({"kind": "contribute"}), to=node, action="train.contribute", round=1)
        session = grid.mailbox._links[SiteId("north")].session
        started = time.monotonic()
        [reply] = grid.replies([request], timeout=600)
        assert grid.mailbox._links[SiteId("north")].session is session, "the stream was opened a second time"
        return flower.from_record(reply.content, Limits()), time.monotonic() - started

    server = world.server(main, grace=0.0)
    arguments = [str(world.pki / "sites" / "north"), f"127.0.0.1:{world.port}", str(tmp_path / "state")]
    site = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SITE), *arguments, str(LENGTH), str(BOUND), str(PING_MS)],
        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip
    killer = threading.Timer(400, site.kill)
    killer.start()
    try:
        out, _ = site.communicate()
    finally:
        killer.cancel()
    assert server.ended() is None
    packet, took = server.result
    facts = json.loads(out)
    print({**facts, "round trip": round(took, 1)})
    assert site.returncode == 0
    assert len(packet.buffers["ciphertext"]) == 7 * 4096 * -(-LENGTH // 8192)
    assert facts["seconds"] > 2 * PING_MS / 1000, "several pings were due while the site worked"
    assert facts["statuses"] == ["connecting", "connected", "waiting", "working", "waiting", "finished"]
    assert len(attached) <= 1
    assert facts["longest"] < MOST_S
    assert facts["per_parameter"] < MAX_BYTES_PER_PARAMETER
