"""A stranger submits a bundle to an ordinary SuperLink: Flower's executor imports it, ours does not.

Two SuperNodes on one SuperLink get the same message of the same run: one as Flower starts it by default, which shows
that the bundle does run, and one set up as we say, with our executor behind it.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization as ser

from fedveil.deploy.lab.demo_hospitals import HOSPITALS
from fedveil.deploy.superlink import commands
from fedveil.deploy.superlink.runtime import Link

SITE = HOSPITALS[0]


def _ordinary_superlink(world: Any) -> Link:
    """SuperLink with Flower's own executors; reached with the consortium's authority."""
    server = world.home / "pki" / "server"
    world.start(
        "superlink", commands._tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(world.port),
        "--ssl-certfile", str(server / "tls.pem"), "--ssl-keyfile", str(server / "tls.key"),
        "--ssl-ca-certfile", str(server / "ca.pem"), "--disable-runtime-dependency-installation",
    )  # fmt: skip
    world.until_listening(world.port)
    return Link(f"127.0.0.1:{world.port}", ca=server / "ca.pem")


def _public(certificate: Path) -> bytes:
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    return key.public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.slow
def test_a_strangers_bundle_runs_under_flowers_executor_and_not_under_ours(world, free_port, stranger) -> None:
    with closing(_ordinary_superlink(world)) as link:
        _check(world, link, free_port, stranger)


def _check(world, link, free_port, stranger) -> None:
    home, node_port = world.home, free_port()
    link.register(_public(home / "pki" / "sites" / SITE / "tls.pem"), SITE)
    world.ours("node", "node", str(home / SITE / "site.toml"), "--port", str(node_port))
    executor = world.ours("site", "site", str(home / SITE / "site.toml"), "--port", str(node_port))
    world.start(
        "control", commands._tool("flower-supernode"), "--superlink", f"127.0.0.1:{world.port}",
        "--root-certificates", str(home / "pki" / "server" / "ca.pem"), "--host", "127.0.0.1",
        "--port", str(free_port()),
    )  # fmt: skip

    replies = world.home / "superlink.canary.replies"
    for number in (1, 2):  # the second time shows that the executor goes on
        run = link.start_run(stranger(f"1.0.{number}"))
        world.until(f"the stranger's replies {number}", replies.exists)
        said = json.loads(replies.read_text())
        replies.unlink()
        assert len(said) == 2, said
        assert sorted(said.values())[0] == "ran"  # the control: this bundle does run
        refusal = json.loads(sorted(said.values())[1])
        assert (refusal["code"], refusal["message"]) == (
            "PolicyRefusal", "this site runs no other bundle than fedveil's own",
        )  # fmt: skip
        world.until("the end of the stranger's run", lambda r=run: link.run_status(r)[0] == "finished")
        assert world.log("site").count("dropped the bundle") == number

    assert world.canary("control").read_text() == "imported\n" * 2
    assert world.installed("control")
    assert world.canary("superlink").exists()  # its ServerApp was imported too, on that ordinary SuperLink
    for name in ("node", "site"):
        assert not world.canary(name).exists()
        assert world.installed(name) == []
    assert executor.poll() is None
    ledger = (home / SITE / "state" / "ledger.jsonl").read_text()
    assert '"spend"' not in ledger
