"""`make bench-secagg`: the sum of keys beside the CKKS setting of other platforms; writes docs/bench-secagg.md.

Everything is measured in one run; the two sides take turns. Figures are medians, in CPU seconds of one process
(`time.process_time`, all threads). Ratios hold on other machines, absolute figures do not. Run it on a quiet machine;
it takes about a minute. `python tests/bench/secagg_table.py [output file]`.
"""

from __future__ import annotations

import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tenseal as ts

from fedveil.common import threads
from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.dp.quantize import to_grid
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.params import choose
from fedveil.privacy.secagg.server import server_sum
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import DirectoryStore, MemoryStore, Store

MILLION = 1 << 20
OUTPUT = Path(__file__).parents[2] / "docs" / "bench-secagg.md"
BOUNDS = {1: (1 << 45) - 1, 2: (1 << 22) - 1, 3: 20642, 4: 1447}
NOISE = 1e5  # standard deviation of a site's share, in grid units
TARGETS = {"cpu": 8.0, "bytes": 14.0, "per": 3.6, "rate": 15.0, "memory": 2.5}
# Rows of ResNet-18's state (He et al. 2016, 1000 classes): 11.69 million parameters in 62 tensors.
WIDTHS, KERNEL = (64, 128, 256, 512), 3


class World:
    """A joined session of ``n`` sites."""

    def __init__(
        self,
        n: int,
        length: int,
        bound: int,
        *,
        only: int | None = None,
        store: Store | None = None,
        reveal_to: str = "server",
    ) -> None:
        keys = [new_signing_key() for _ in range(n)]
        self.names = [SiteId(f"site-{i:03}") for i in range(n)]
        sites = tuple(Member(s, public_hex(k)) for s, k in zip(self.names, keys, strict=True))
        roster = Roster("bench", Member(SERVER, public_hex(new_signing_key())), sites)
        colluders = max(1, n // 6)
        threshold, members = (n + colluders) // 2 + 1, n - max(1, n // 6)
        self.spec = SumSpec(
            "keysum", secrets.token_hex(32), "0" * 64, roster, threshold, members, length, bound, 100, colluders,
            reveal_to=reveal_to,
        )  # fmt: skip
        self.server = server_sum(self.spec)
        self.sites = {
            s: site_sum(self.spec, s, k, store if store and s == self.names[0] else MemoryStore())
            for s, k in zip(self.names, keys, strict=True)
        }
        joins = {s: site.join_fields() for s, site in self.sites.items()}
        begun = self.names if only is None else self.names[:only]
        replies = {s: self.sites[s].begin(joins) for s in begun}
        for s, packet in self.server.begin(joins, replies).items():
            self.sites[s].receive(packet)


def cpu(work: Callable[[], Any], repeat: int = 1) -> tuple[float, Any]:
    """Median CPU seconds of ``repeat`` calls, and the last result."""
    times, result = list[float](), None
    for _ in range(repeat):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return statistics.median(times), result


def nvflare_context() -> ts.Context:
    """CKKS as NVFlare's HE sets it up: degree 8192, [60, 40, 40], symmetric, scale 2^40."""
    context = ts.context(
        ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2.0**40
    return context


def side_by_side(rounds: int = 5) -> dict[str, float]:
    """1M parameters, n = 10, k = 2: the client's whole contribution against encrypt + serialise."""
    context, update = nvflare_context(), np.random.default_rng(0).normal(0, 0.02, MILLION)
    world = World(10, MILLION, BOUNDS[2])
    site = world.sites[world.names[0]]
    grid = np.rint(update * 1e6).astype(np.int64)
    theirs, ours = list[float](), list[float]()
    blob, packet = b"", Packet({})
    site.contribute(0, "warm", grid)
    for round in range(1, rounds + 1):
        seconds, blob = cpu(lambda: ts.ckks_vector(context, update).serialize())
        theirs.append(seconds)
        seconds, packet = cpu(lambda r=round: site.contribute(r, "n", grid))
        ours.append(seconds)
    cipher = len(packet.buffers["ciphertext"])
    return {
        "theirs": statistics.median(theirs),
        "ours": statistics.median(ours),
        "their_bytes": len(blob),
        "our_bytes": cipher + len(packet.buffers["shares"]),
        "our_ciphertext": cipher,
    }


def whole_round(n: int, k: int, length: int, contributors: int, reveal_to: str = "server") -> dict[str, float]:
    """CPU seconds of each part of a round; ``contributors`` of the n sites make one, the others' are not timed."""
    world = World(n, length, BOUNDS[k], reveal_to=reveal_to)
    top = BOUNDS[k] // n
    values = np.random.default_rng(1).integers(-top, top, length, endpoint=True)
    world.server.start_round(1, "n")
    encrypt, add = list[float](), list[float]()
    size = 0
    for i, (name, site) in enumerate(world.sites.items()):
        seconds, packet = cpu(lambda s=site: s.contribute(1, "n", values))
        added, _ = cpu(lambda s=name, p=packet: world.server.add(s, p))
        if i < contributors:
            encrypt.append(seconds)
            add.append(added)
        size = sum(map(len, packet.buffers.values()))
    update = np.random.default_rng(2).normal(0, 0.02, length)
    noise, _ = cpu(lambda: discrete_gaussian(NOISE, length), 5)
    grid, _ = cpu(lambda: to_grid(update, 1.0, 1e-6), 5)
    helpers = world.names[: world.spec.threshold]
    requests = world.server.agree_requests()
    agree = list[float]()
    for name in helpers:
        seconds, packet = cpu(lambda s=name: world.sites[s].agree(requests[s]))
        agree.append(seconds)
        world.server.add_agreement(name, packet)
    requests, answer = world.server.open_requests(), list[float]()
    for name in helpers:
        seconds, packet = cpu(lambda s=name: world.sites[s].open(requests[s]))
        answer.append(seconds)
        world.server.add_answer(name, packet)
    opened, requests = cpu(world.server.fingerprint_requests)
    vouch = list[float]()
    for name, request in requests.items():
        seconds, packet = cpu(lambda s=name, r=request: world.sites[s].fingerprint(r))
        vouch.append(seconds)
        world.server.add_fingerprint(name, packet)
    packet = world.server.opened()
    read, (total, _) = cpu(lambda: world.sites[world.names[0]].opened(packet))
    if not np.array_equal(total, n * values):
        raise SystemExit("the opened sum is wrong: no figures are written")
    return {
        "k": choose(world.spec).per_coefficient,
        "noise": noise,
        "grid": grid,
        "bytes": size / length,
        "encrypt": statistics.median(encrypt),
        "rate": length / statistics.median(encrypt) / 1e6,
        "add": statistics.median(add),
        "agree": statistics.median(agree),
        "answer": statistics.median(answer),
        "open": opened,
        "vouch": statistics.median(vouch),
        "read": read,
    }


def resnet18() -> dict[str, np.ndarray]:
    """A state dict of ResNet-18's shapes, float32: 11,689,512 trainable parameters."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    before = 64
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(2):
            name, inside = f"layer{stage}.{block}", before if block == 0 else width
            shapes[f"{name}.conv1.weight"] = (width, inside, KERNEL, KERNEL)
            shapes[f"{name}.conv2.weight"] = (width, width, KERNEL, KERNEL)
            for part in ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"):
                shapes[f"{name}.{part}"] = (width,)
            if inside != width:
                shapes[f"{name}.downsample.0.weight"] = (width, inside, 1, 1)
                shapes[f"{name}.downsample.1.weight"] = shapes[f"{name}.downsample.1.bias"] = (width,)
        before = width
    shapes |= {"fc.weight": (1000, 512), "fc.bias": (1000,)}
    draw = np.random.default_rng(2)
    return {name: draw.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}


def memory_child(kind: str) -> None:
    """In a process of its own: prints bytes per parameter of the peak above the vector's."""
    length = 11_689_512
    with tempfile.TemporaryDirectory() as folder:
        world = World(10, length, BOUNDS[2], only=1, store=DirectoryStore(Path(folder)))
        site = world.sites[world.names[0]]
        grid = np.arange(length, dtype=kind)
        grid %= 1000
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        site.contribute(1, "n", grid)
        print((_status("VmHWM") - before) / length)


def _status(field: str) -> int:
    """Bytes of one line of this process's status. (A child's ``ru_maxrss`` starts at its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def memory(kind: str) -> float:
    """Bytes per parameter by which the resident set grows, at its peak, while one contribution is made.

    Args:
        kind: type of the vector that is handed in, ``int32`` or ``int64``.
    """
    code = f"import runpy; runpy.run_path({__file__!r})['memory_child']({kind!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def resnet_row(k: int) -> dict[str, float]:
    """Flattening a ResNet-18-shaped dict once, and the contribution of its 11.7M values, k of them a coefficient."""
    state = resnet18()
    length = sum(v.size for v in state.values())
    flatten, grid = cpu(
        lambda: np.rint(np.concatenate([v.reshape(-1) for v in state.values()]) * np.float32(1e6)).astype(np.int64), 3
    )
    world = World(10, length, BOUNDS[k])
    seconds, packet = cpu(lambda: world.sites[world.names[0]].contribute(1, "n", grid))
    size = sum(map(len, packet.buffers.values()))
    return {
        "k": k,
        "length": length,
        "tensors": len(state),
        "flatten": flatten,
        "encrypt": seconds,
        "bytes": size / length,
    }


def row(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> list[str]:
    """The two lines a table begins with."""
    return [row(*cells), "|" + "---|" * len(cells)]


def verdict(ok: bool) -> str:
    """Whether a target was met, in a table's words."""
    return "met" if ok else "**missed**"


def machine() -> str:
    """Cores, processor, versions; no host name."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "tenseal", "cryptography"))
    return f"Machine: {os.cpu_count()} cores, {model}. Python {platform.python_version()}, {libraries}."


def client_section(side: dict[str, float]) -> list[str]:
    """One client beside CKKS, and the targets."""
    ours, theirs = side["ours"], side["theirs"]
    cpu_ratio, byte_ratio, rate = theirs / ours, side["their_bytes"] / side["our_bytes"], MILLION / ours / 1e6
    per = side["our_bytes"] / MILLION
    line = lambda name, seconds, size: row(  # noqa: E731
        name, f"{seconds:.3f}", f"{MILLION / seconds / 1e6:.1f}", f"{size:,.0f}", f"{size / MILLION:.2f}"
    )
    return [
        "## One client, 1M (2^20) parameters, n = 10",
        "",
        *head("", "CPU s", "Mparam/s/core", "bytes", "bytes per parameter"),
        line("`keysum`, k = 2: encrypt, share, seal, sign, keep", ours, side["our_bytes"]),
        line("`ts.ckks_vector`, 8192 [60, 40, 40], symmetric, serialised", theirs, side["their_bytes"]),
        "",
        *head("figure", "measured", "target", ""),
        row("less client CPU", f"{cpu_ratio:.1f}x", f"{TARGETS['cpu']:.0f}x", verdict(cpu_ratio >= TARGETS["cpu"])),
        row("fewer bytes", f"{byte_ratio:.1f}x", f"{TARGETS['bytes']:.0f}x", verdict(byte_ratio >= TARGETS["bytes"])),
        row("bytes per parameter", f"{per:.2f}", TARGETS["per"], verdict(per <= TARGETS["per"])),
        row("Mparam/s/core", f"{rate:.1f}", TARGETS["rate"], verdict(rate >= TARGETS["rate"])),
        "",
        "All bytes include the shares.",
    ]


def round_section(rows: list[tuple[int, dict[str, float]]], blinded: dict[str, float]) -> list[str]:
    """Whole rounds."""
    return [
        "## A whole round of 1M parameters",
        "",
        "Per site: noise, grid, contribution, agreement, answer, fingerprint, and the check of the opened sum. At the",
        "server: adding one contribution, opening with T answers.",
        "",
        *head(
            *("n", "k", "B/param", "noise s", "grid s", "contribution s", "Mparam/s/core", "agreement s", "answer s"),
            *("fingerprint s", "check s", "add s", "open s"),
        ),
        *(
            row(
                *(n, f"{r['k']:.0f}", f"{r['bytes']:.2f}", f"{r['noise']:.3f}", f"{r['grid']:.3f}"),
                *(f"{r['encrypt']:.3f}", f"{r['rate']:.1f}"),
                *(f"{r[part]:.3f}" for part in ("agree", "answer", "vouch", "read", "add", "open")),
            )
            for n, r in rows
        ),
        "",
        "k values share a coefficient. The plan's bound decides which k fits. The shares of the secrets, 8.2 KB a",
        "helper, are in B/param. For 100 helpers they are 0.78 of it, which is one reason for a committee.",
        "",
        f"With group blinding (n = 10, k = 2) a contribution takes {blinded['encrypt']:.3f} s, the server's opening "
        f"{blinded['open']:.3f} s, and",
        f"a site reads the sum in {blinded['read']:.3f} s.",
    ]


def model_section(nets: list[dict[str, float]], extra: dict[str, float]) -> list[str]:
    """The ResNet-18-shaped update and a client's memory."""
    whole = {kind: added + np.dtype(kind).itemsize for kind, added in extra.items()}
    return [
        "## A ResNet-18-shaped update, n = 10",
        "",
        *head("values", "tensors", "k", "flatten once, to the grid, s", "contribution s", "Mparam/s/core", "B/param"),
        *(
            row(
                *(f"{net['length']:,.0f}", f"{net['tensors']:.0f}", f"{net['k']:.0f}", f"{net['flatten']:.3f}"),
                *(f"{net['encrypt']:.3f}", f"{net['length'] / net['encrypt'] / 1e6:.1f}", f"{net['bytes']:.2f}"),
            )
            for net in nets
        ),
        "",
        "This is the memory of the client while it makes that contribution at k = 2, in bytes per parameter. The",
        "client is a process of its own with its state on disk. The figure is its resident set at the peak, less",
        "its size before the call:",
        "",
        *head(
            "vector handed in",
            "what the call adds",
            "with the vector itself",
            "beside a float32 update",
            "at most 2.5x",
        ),
        *(
            row(
                *(kind, f"{extra[kind]:.1f}", f"{whole[kind]:.1f}", f"{whole[kind] / 4:.2f}x"),
                verdict(whole[kind] <= 4 * TARGETS["memory"]),
            )
            for kind in extra
        ),
        "",
        "The target is 2.5x a float32 update, the vector itself included. The call must hold one copy of the",
        "ciphertext (3.5 bytes per parameter). The rest is working space. An int32 vector is widened chunk by",
        "chunk. At k = 1 the ciphertext alone has 7 bytes per parameter.",
    ]


def table() -> str:
    """The page. Takes about twenty seconds on a quiet machine."""
    threads.use(1)  # figures are of one core
    side = side_by_side()
    rows = [(10, whole_round(10, k, MILLION, 3)) for k in (1, 2, 3, 4)]
    rows.append((100, whole_round(100, 2, MILLION, 5)))
    sections = [
        [
            "# Bench of the secure sum",
            "",
            "Written by `make bench-secagg` (`tests/bench/secagg_table.py`). Times are CPU seconds of one thread, as",
            "medians. Both sides are measured in one run, interleaved. Compare ratios between machines, not seconds.",
            "",
            machine(),
        ],
        client_section(side),
        round_section(rows, whole_round(10, 2, MILLION, 3, "sites")),
        model_section([resnet_row(k) for k in (1, 2)], {kind: memory(kind) for kind in ("int32", "int64")}),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


if __name__ == "__main__":
    page = table()
    Path(sys.argv[1] if len(sys.argv) > 1 else OUTPUT).write_text(page)
    print(page)
