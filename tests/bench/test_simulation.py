"""One thousand virtual clients with a trivial task and the sum in the clear: what the platform itself costs.

Seconds depend on the machine and are printed; what is asserted is the memory, and the round beside one that does
nothing: the same thousand messages there and back through the same engine, answered by an app that echoes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest

CLIENTS = 1000
TARGET_S = 0.4
MAX_RSS_MIB = 1024
MAX_RATIO = 4

_SIMULATION = f"""
import json, resource, sys
from pathlib import Path
from fedveil.deploy.lab import simulate
out = Path(sys.argv[1])
done = simulate.run(simulate.Config(clients={CLIENTS}, dataset="trivial", sum="plain", steps=4), out, report=False)
seconds = [json.loads(x)["seconds"] for x in (out / "metrics.jsonl").read_text().splitlines()]
print(json.dumps({{"status": done.status, "seconds": seconds, "all": done.seconds,
                   "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}}))
"""
_NOTHING = f"""
import json, time
from flwr.clientapp import ClientApp
from fedveil.common import flwr_adapter as flower
from fedveil.common.wire import Packet
from fedveil.common.units import SiteId
from fedveil.deploy.transport.inprocess import InprocessGrid
app = ClientApp()
@app.train("echo")
def echo(message, context):
    return flower.reply(flower.from_record(message.content, flower.Limits()), message)
sites = [SiteId(f"site-{{i:04d}}") for i in range({CLIENTS})]
grid = InprocessGrid(app, sites, lambda i: {{}})
seconds = []
for _ in range(4):
    started = time.perf_counter()
    record = flower.to_record(Packet({{"kind": "ping"}}))
    messages = [flower.request(record, to=n, action="train.echo", round=1) for n in grid.get_node_ids()]
    assert len(list(grid.send_and_receive(messages))) == {CLIENTS}
    seconds.append(time.perf_counter() - started)
print(json.dumps({{"seconds": seconds}}))
"""


def measured(code: str, *arguments: str) -> dict[str, Any]:
    """What a fresh process prints, so that its memory is its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.bench
def test_a_thousand_trivial_clients(tmp_path):
    run = measured(_SIMULATION, str(tmp_path / "run"))
    nothing = statistics.median(measured(_NOTHING)["seconds"])
    seconds = statistics.median(run["seconds"])
    print(
        f"\n{CLIENTS} clients: {seconds:.3f} s per round (first {run['seconds'][0]:.3f} s), {run['all']:.1f} s in all; "
        f"a round of nothing {nothing:.3f} s, ratio {seconds / nothing:.1f}; {run['rss']:.0f} MiB"
    )
    assert run["status"] == "COMPLETED"
    assert run["rss"] <= MAX_RSS_MIB
    assert seconds <= MAX_RATIO * nothing
    assert seconds <= TARGET_S
