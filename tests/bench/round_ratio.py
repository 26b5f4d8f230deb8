"""A whole round with keysum against the same round without encryption, real processes over mTLS, 11M parameters.

Both runs use mode ``local`` (where ``none`` is allowed), four sites, the same plan otherwise. Prints both medians
and their ratio. ``make bench-round``.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fedveil.common import contract as contracts
from fedveil.common import identity
from fedveil.common.contract import DataContract
from fedveil.deploy.enrol.provision import make_consortium

SITES = ("a", "b", "c", "d")
FEATURES, HIDDEN, ROWS, STEPS = 64, (2600, 4160), 256, 5


def main() -> None:
    """Run both and print."""
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("none", "keysum", "none", "keysum"):
            home = Path(scratch) / f"{name}-{len(seconds)}-{os.urandom(2).hex()}"
            seconds.setdefault(name, []).extend(_run(home, name))
    parameters = sum((i + 1) * o for i, o in zip((FEATURES, *HIDDEN), (*HIDDEN, 2), strict=True))
    none, keysum = (statistics.median(seconds[k]) for k in ("none", "keysum"))
    print(
        f"{parameters} parameters, {len(SITES)} sites of {ROWS} records, {os.cpu_count()} cores shared by 5 processes"
    )
    print(f"median round: none {none:.2f} s, keysum {keysum:.2f} s, ratio {keysum / none:.3f}")


def _run(home: Path, protocol: str) -> list[float]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    _lay_out(home, port, protocol)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedveil"]
    log = (home / "log.txt").open("wb")
    run = home / "run"
    server = subprocess.Popen(
        [*command, "server", "start", str(home / "federation.toml"), "--run", str(run)], env=env, stdout=log, stderr=log
    )
    sites = [
        subprocess.Popen([*command, "client", "run", str(home / f"{s}.toml")], env=env, stdout=log, stderr=log)
        for s in SITES
    ]
    try:
        if server.wait(900) != 0:
            sys.exit((home / "log.txt").read_text())
    finally:
        for p in sites:
            p.terminate()
        for p in sites:
            p.wait()
    return [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def _lay_out(home: Path, port: int, protocol: str) -> None:
    make_consortium(home / "pki", SITES, consortium="bench", host="127.0.0.1")
    names = [f"x{i}" for i in range(FEATURES)]
    columns = [
        {"name": "q", "role": "quasi", "type": "category", "values": ["0", "1"], "levels": [["0", "1"]]},
        *({"name": n, "role": "feature", "type": "number", "low": 0, "high": 1} for n in names),
        {"name": "y", "role": "target", "type": "category", "values": ["0", "1"]},
    ]
    agreed = DataContract.model_validate(
        {"name": "bench", "version": "1", "purpose": "timing", "unit": "one row", "k": 5, "columns": columns}
    )
    key = identity.load_signing_key(home / "pki" / "consortium" / "consortium.key")
    (home / "contract.json").write_text(json.dumps(contracts.sign_contract(agreed, key)))
    rng = np.random.default_rng(0)
    for site in SITES:
        X, y = rng.random((ROWS, FEATURES)), rng.integers(0, 2, ROWS)
        rows = [",".join(["q", *names, "y"])]
        rows += [",".join(["0", *(f"{v:.4f}" for v in x), str(c)]) for x, c in zip(X, y, strict=True)]
        (home / f"{site}.csv").write_text("\n".join(rows) + "\n")
        (home / f"{site}.toml").write_text(
            f'[site]\nid = "{site}"\nserver = "127.0.0.1:{port}"\nidentity = "pki/sites/{site}"\n'
            f'contract = "contract.json"\ndata = "{site}.csv"\nlineage = "bench"\n'
            f'capacity = 100000\nstate = "state-{site}"\n'
            '[limits]\nmax_epsilon = 50\nmodes = ["local"]\nsums = ["keysum", "none"]\nmin_sites = 1\n'
            '[training]\nengine = "closed"\ndevice = "cpu"\n'
        )
    (home / "federation.toml").write_text(
        f'[federation]\nname = "bench"\naddress = "127.0.0.1:{port}"\nidentity = "pki/server"\n'
        'contract = "contract.json"\n'
        f'[privacy]\nmode = "local"\nsum = "{protocol}"\nepsilon = 8\nrecords = {ROWS * len(SITES)}\n'
        f"steps = {STEPS}\nclip = 1.0\n"
        f'[model]\nname = "mlp"\nhidden = {list(HIDDEN)}\n[optimizer]\nlearning_rate = 0.1\n'
    )


if __name__ == "__main__":
    main()
