"""A server process for attacks on the transport: it asks every connected site again and again, and reports how it is.

``python transport_server.py FOLDER BURST STALL``. Lines of JSON on stdout: ``{"port"}``, then after every round
``{"rounds", "answered", "rss"}`` (bytes), ``{"report": [site, what]}`` for what was refused, ``{"ended"}`` once stdin
was closed.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fedveil.deploy.transport.grpc_grid import GrpcGrid, serve  # before flwr, which imports grpc

from flwr.app import Context  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip

from fedveil.common import flwr_adapter as flower  # isort: skip
from fedveil.common.wire import Limits, Packet  # isort: skip
from fedveil.deploy.enrol.provision import load_roster, load_tls  # isort: skip
from fedveil.deploy.transport.guard import Bounds  # isort: skip


_saying = threading.Lock()


def say(**facts: Any) -> None:
    with _saying:  # rounds and reports come from several threads; print writes a line and its end separately
        print(json.dumps(facts), flush=True)


def rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) * 1024


def main() -> None:
    """Serve until stdin is closed."""
    logging.basicConfig(level=logging.INFO)
    folder, burst, stall = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        assert isinstance(grid, GrpcGrid)
        number = 0
        while not over.is_set():
            number += 1
            packet = Packet({"kind": "ping"}, {"a": bytes(50_000)})
            asked = [flower.request(packet, to=n, action="train.echo", round=number) for n in grid.get_node_ids()]
            replies = grid.send_and_receive(asked, timeout=1.0)
            answered = sorted(grid.site_of(m.metadata.src_node_id) for m in replies if not m.has_error())
            say(rounds=number, answered=answered, rss=rss())
            time.sleep(0.1)

    serve(
        app,
        address="127.0.0.1:0",
        tls=load_tls(folder),
        roster=load_roster(folder),
        ready=lambda port: say(port=port),
        limits=Limits(header=10_000, buffers=4_000_000),
        grace=0.5,
        bounds=Bounds(burst=burst, stall=stall, held=8_000_000),
        report=lambda site, what: say(report=[site, what]),
    )
    say(ended=True)


main()
