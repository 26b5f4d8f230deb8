"""What our transport costs, every party a process over mTLS on loopback: ``make bench-transport`` writes the table.

``python tests/bench/transport_table.py [OUT.md]``. Many sites (200 idle, 50 with a million parameters) are threads of a
few processes, each with a connection and certificate of its own. The server is always a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fedveil.deploy.transport.grpc_grid import GrpcGrid, serve  # before grpc, so that TLS 1.2 is off

import numpy as np  # isort: skip
from flwr.app import Context, Message  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip

from fedveil.client.egress.gate import Cleared, Gate  # isort: skip
from fedveil.common import flwr_adapter as flower  # isort: skip
from fedveil.common import identity  # isort: skip
from fedveil.common.settings import EgressSection  # isort: skip
from fedveil.common.units import SiteId  # isort: skip
from fedveil.common.wire import Limits, Packet  # isort: skip
from fedveil.deploy.enrol.provision import load_roster, load_tls, make_consortium  # isort: skip
from fedveil.deploy.transport.grpc_site import run_site  # isort: skip
from fedveil.privacy.secagg.interface import SumSpec  # isort: skip
from fedveil.privacy.secagg.keysum_server import KeysumServer  # isort: skip
from fedveil.privacy.secagg.keysum_site import KeysumSite  # isort: skip
from fedveil.privacy.secagg.store import MemoryStore  # isort: skip

PAYLOAD = 100_000_000
ROUNDS, IDLE_S = 200, 30.0
IDLE, MANY, PARAMETERS = 200, 50, 1_000_000
MIB = 1 << 20


# --- what the processes do -------------------------------------------------------------------------------------------


def memory(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name)) * 1024


def forget_peak() -> int:
    """Start to measure the peak anew; the memory in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def ask(grid: GrpcGrid, packet: Packet, kind: str = "echo") -> list[Message]:
    asked = [flower.request(packet, to=n, action=f"train.{kind}", round=1) for n in grid.get_node_ids()]
    return list(grid.send_and_receive(asked, timeout=300))


def noop(grid: GrpcGrid) -> dict[str, Any]:
    ask(grid, Packet({"kind": "x"}))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        assert len(ask(grid, Packet({"kind": "x"}))) == 2
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds), "worst": max(seconds)}


def slotted(grid: GrpcGrid) -> dict[str, Any]:
    """The same round with answers that leave as a site's contributions do, at multiples of the default slot."""
    ask(grid, Packet({"kind": "x"}), "slotted")
    seconds = []
    for _ in range(ROUNDS // 10):
        began = time.perf_counter()
        assert len(ask(grid, Packet({"kind": "x"}), "slotted")) == 2
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds)}


def bulk(grid: GrpcGrid) -> dict[str, Any]:
    ask(grid, Packet({"kind": "x"}))
    seconds = []
    for _ in range(3):
        packet = Packet({"kind": "x"}, {"a": os.urandom(PAYLOAD)})
        began = time.perf_counter()
        assert len(ask(grid, packet)) == len(list(grid.get_node_ids()))
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds)}


def peak(grid: GrpcGrid) -> dict[str, Any]:
    """One site; the server's payload lives before the measurement, so that what it costs to send it is told apart."""
    ask(grid, Packet({"kind": "forget"}))
    packet = Packet({"kind": "x"}, {"a": bytes(PAYLOAD)})
    before = forget_peak()
    [reply] = ask(grid, packet)
    grown = memory("VmHWM") - before
    del reply
    [told] = ask(grid, Packet({"kind": "peak"}))
    return {"server": grown / PAYLOAD, "site": flower.from_record(told.content, Limits()).header["grown"] / PAYLOAD}


def idle(grid: GrpcGrid) -> dict[str, Any]:
    cpu, began = time.process_time(), time.perf_counter()
    time.sleep(IDLE_S)
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    grown = memory("VmRSS") - idle_start[0]
    began = time.perf_counter()
    assert len(ask(grid, Packet({"kind": "x"}))) == IDLE
    return {"per_site": grown / IDLE, "cpu": share, "round": time.perf_counter() - began}


def spec(folder: Path, session: str) -> SumSpec:
    spare = MANY // 6
    threshold = (MANY + spare) // 2 + 1
    roster = load_roster(folder)
    bound = (1 << 22) - 1
    return SumSpec("keysum", session, "b" * 64, roster, threshold, MANY - spare, PARAMETERS, bound, 10, spare)


def keysum(grid: GrpcGrid) -> dict[str, Any]:
    """One round of the sum of keys with real keys, ciphertexts and shares; weights go out, the sum is opened."""
    server = KeysumServer(spec(FOLDER / "server", SESSION))

    def step(packets: dict[SiteId, Packet], take: Any, kind: str) -> None:
        asked = [flower.request(p, to=flower.node_id(s), action=f"train.{kind}", round=1) for s, p in packets.items()]
        for reply in grid.replies(asked, timeout=300):
            site = grid.site_of(reply.metadata.src_node_id)
            if (error := flower.reply_error(reply)) is not None:
                raise error
            take(site, flower.from_record(reply.content, Limits()))
            del reply

    sites = grid.mailbox.connected()
    joins: dict[SiteId, Any] = {}
    ready: dict[SiteId, Packet] = {}
    step(dict.fromkeys(sites, Packet({"kind": "x"})), lambda s, p: joins.update({s: p.header["fields"]}), "join")
    joins = {m.site: joins[m.site] for m in load_roster(FOLDER / "server").sites}
    step(dict.fromkeys(sites, Packet({"kind": "x", "joins": joins})), ready.__setitem__, "begin")
    server.begin(joins, ready)
    server.start_round(1, "n")
    weights = np.zeros(PARAMETERS, np.float32).tobytes()
    before, began, cpu = forget_peak(), time.perf_counter(), time.process_time()
    step(dict.fromkeys(sites, Packet({"kind": "x"}, {"weights": weights})), server.add, "contribute")
    collected = time.perf_counter() - began
    step(server.agree_requests(), server.add_agreement, "agree")
    step(server.open_requests(), server.add_answer, "open")
    step(server.fingerprint_requests(), server.add_fingerprint, "fingerprint")
    server.opened()
    values, members = server.result()
    seconds = time.perf_counter() - began
    assert len(members) == MANY
    assert (values == MANY * (np.arange(PARAMETERS) % 1000)).all(), "the opened sum is wrong"
    traffic = grid.traffic
    return {
        "seconds": seconds, "collect": collected, "cpu": time.process_time() - cpu, "peak": memory("VmHWM") - before,
        "received": sum(t["received"] for t in traffic.values()) / MANY,
    }  # fmt: skip


SCENES = {"noop": noop, "slotted": slotted, "bulk": bulk, "peak": peak, "idle": idle, "keysum": keysum}
FOLDER, SESSION = Path(), "a" * 64
idle_start = [0]


def server_role(scene: str, port_file: str, sites: int) -> None:
    app = ServerApp()
    out: dict[str, Any] = {}

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, GrpcGrid)
        idle_start[0] = memory("VmRSS")
        assert grid.wait_for_sites(sites, 120) == sites
        out.update(SCENES[scene](grid))

    def ready(port: int) -> None:
        Path(port_file).with_suffix(".part").write_text(str(port))
        Path(port_file).with_suffix(".part").rename(port_file)

    folder = FOLDER / "server"
    serve(app, address="127.0.0.1:0", tls=load_tls(folder), roster=load_roster(folder), ready=ready)
    print(json.dumps(out))


def sites_role(port_file: str, names: list[str]) -> None:
    while not Path(port_file).exists():
        time.sleep(0.02)
    address = f"127.0.0.1:{Path(port_file).read_text()}"
    threads = [threading.Thread(target=one_site, args=(name, address)) for name in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def one_site(name: str, address: str) -> None:
    app, state, folder = ClientApp(), {"before": 0}, FOLDER / "sites" / name

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        packet = flower.from_record(message.content, Limits())
        header: dict[str, Any] = {"kind": "echo"}
        if packet.kind == "forget":
            state["before"] = forget_peak()
        elif packet.kind == "peak":
            header["grown"] = memory("VmHWM") - state["before"]
        return flower.reply(Packet(header, packet.buffers), message)

    gate = Gate(EgressSection().slot)

    @app.train("slotted")
    def slotted_echo(message: Message, context: Context) -> Message:
        arrived = gate.arrived()
        return gate.leave(Cleared(Packet({"kind": "echo"})), message, "contribute", arrived)

    sums: list[KeysumSite] = []

    def handler(kind: str, work: Any) -> None:
        @app.train(kind)
        def answer(message: Message, context: Context) -> Message:
            return flower.reply(work(flower.from_record(message.content, Limits())), message)

    def join(packet: Packet) -> Packet:
        key = identity.load_signing_key(folder / "signing.key")
        sums.append(KeysumSite(spec(folder, SESSION), SiteId(name), key, MemoryStore()))
        return Packet({"kind": "joined", "fields": sums[0].join_fields()})

    def contribute(packet: Packet) -> Packet:
        return sums[0].contribute(1, "n", (np.arange(PARAMETERS) % 1000).astype(np.int32))

    handler("join", join)
    handler("begin", lambda p: sums[0].begin(p.header["joins"]))
    handler("contribute", contribute)
    handler("agree", lambda p: sums[0].agree(p))
    handler("open", lambda p: sums[0].open(p))
    handler("fingerprint", lambda p: sums[0].fingerprint(p))
    run_site(
        app, address=address, tls=load_tls(folder), site=SiteId(name), stop=threading.Event(), wait=120
    )  # fmt: skip


# --- running them, and the table -------------------------------------------------------------------------------------


def measure(scene: str, sites: int, processes: int) -> dict[str, Any]:
    """Run one scene and return what its server measured, with the CPU seconds of the sites' processes."""
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"site-{i:03d}" for i in range(sites)]
        make_consortium(Path(scratch) / "pki", names, consortium="bench", host="127.0.0.1")
        port = str(Path(scratch) / "port")
        me = [sys.executable, __file__, "--role"]
        env = {**os.environ, "FEDVEIL_BENCH_FOLDER": f"{scratch}/pki", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([*me, "server", scene, port, str(sites)], stdout=subprocess.PIPE, env=env, text=True)
        clients = [subprocess.Popen([*me, "sites", port, *names[i::processes]], env=env) for i in range(processes)]
        try:
            out, _ = server.communicate(timeout=400)
            assert server.returncode == 0, scene
        finally:
            for c in clients:
                c.terminate() if server.returncode else None
                c.wait(60)
        return json.loads(out)


def table() -> str:
    """Every scene once, as Markdown."""
    load = os.getloadavg()[0]
    r = {
        "noop": measure("noop", 2, 2), "slotted": measure("slotted", 2, 2),
        "bulk": measure("bulk", 2, 2), "peak": measure("peak", 1, 1),
        "idle": measure("idle", IDLE, 2), "keysum": measure("keysum", MANY, 2),
    }  # fmt: skip
    b, k, p, i = r["bulk"]["seconds"], r["keysum"], r["peak"], r["idle"]
    rows = [
        ("no-op round, 2 sites, median of 200", f"{r['noop']['median']:.4f} s", "0.05 s", r["noop"]["median"] <= 0.05),
        (f"the same, answers at multiples of the default slot of {EgressSection().slot:g} s",
         f"{r['slotted']['median']:.4f} s", "", None),
        ("100 MB each way to 2 sites, median of 3", f"{b:.2f} s", "3 s", b <= 3),
        ("peak memory, server, 100 MB each way, 1 site", f"{p['server'] + 1:.2f}x payload", "2.5x", p["server"] < 1.5),
        ("peak memory, site, the same", f"{p['site']:.2f}x payload", "2.5x", p["site"] <= 2.5),
        (f"{IDLE} idle sites: server memory per site", f"{i['per_site'] / 1024:.0f} KiB", "", None),
        (f"{IDLE} idle sites: server CPU", f"{100 * i['cpu']:.2f} % of a core", "", None),
        (f"{IDLE} sites: one no-op round", f"{i['round']:.2f} s", "", None),
        (f"{MANY} sites x 1M parameters, one keysum round", f"{k['seconds']:.2f} s", "", None),
        ("... of which contributions, encrypted and added", f"{k['collect']:.2f} s", "", None),
        ("... server CPU", f"{k['cpu']:.2f} s", "", None),
        ("... server memory above its start", f"{k['peak'] / MIB:.0f} MiB", "", None),
        ("... received per site", f"{k['received'] / 1e6:.2f} MB", "", None),
    ]  # fmt: skip
    lines = [
        "# Bench of the transport",
        "",
        "Written by `make bench-transport` (`tests/bench/transport_table.py`). Every party is a process on one",
        "machine, over mTLS (TLS 1.3) on loopback. What many sites do is done by threads of two processes.",
        "Seconds are wall-clock. They count encryption at the sites where it is named.",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; not quiet: load "
        f"{load:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended.",
        "", "| what | measured | target | |", "|---|---|---|---|",
    ]  # fmt: skip
    verdict = {True: "met", False: "missed", None: ""}
    lines += [f"| {what} | {value} | {target} | {verdict[ok]} |" for what, value, target, ok in rows]
    lines += [
        "",
        "At the server one payload is the array that the app holds and sends. The array that comes back is a",
        "second payload.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        FOLDER = Path(os.environ["FEDVEIL_BENCH_FOLDER"])
        if sys.argv[2] == "server":
            server_role(sys.argv[3], sys.argv[4], int(sys.argv[5]))
        else:
            sites_role(sys.argv[3], sys.argv[4:])
    else:
        text = table()
        print(text)
        Path(sys.argv[1] if len(sys.argv) > 1 else "docs/bench-transport.md").write_text(text)
