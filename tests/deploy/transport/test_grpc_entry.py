"""Real mTLS gRPC on loopback: who gets in, and what those who do not are told."""

from __future__ import annotations

import shutil
import threading
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedveil.common import flwr_adapter as flower
from fedveil.common import identity
from fedveil.common.errors import TransportError
from fedveil.common.identity import Member, Roster
from fedveil.common.units import SiteId
from fedveil.deploy.enrol.provision import load_tls, make_consortium
from fedveil.deploy.transport.grpc_grid import GrpcGrid, read_tls, serve
from fedveil.deploy.transport.grpc_service import SERVICE
from fedveil.deploy.transport.grpc_site import run_site

if TYPE_CHECKING:
    from tests.deploy.transport.conftest import World


def test_a_foreign_authoritys_certificate_is_refused_on_both_sides(world: World, tmp_path: Path) -> None:
    make_consortium(tmp_path, ["north"], consortium="foreign")
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    # The site trusts its own authority: it refuses the server.
    error = world.site("north", folder=tmp_path / "sites" / "north").ended()
    assert isinstance(error, TransportError)
    assert "server's certificate" in error.message
    # The site trusts the right authority but shows a foreign certificate: the server refuses it.
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "sites" / "north", mixed)
    right = world.pki / "sites" / "north" / "ca.pem"
    tls = load_tls(mixed)
    shutil.copy(right, mixed / "ca.pem")
    with pytest.raises(TransportError, match="does not accept this site's certificate"):
        run_site(
            ClientApp(), address=f"127.0.0.1:{world.port}", tls=tls, site=SiteId("north"),
            stop=world.stop, wait=5,
        )  # fmt: skip
    done.set()
    assert server.ended() is None
    assert server.result == []


def test_a_certificate_that_is_not_on_the_roster_is_refused(world: World) -> None:
    members = world.roster.sites
    world.roster = Roster("test", world.roster.server, members[:2])
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    error = world.site("west").ended()
    assert isinstance(error, TransportError)
    assert "not on the roster" in error.message
    assert "enrol" in error.hint
    done.set()
    assert server.ended() is None
    assert server.result == []


def test_the_servers_own_certificate_is_no_site(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    assert isinstance(world.site("north", folder=world.pki / "server").ended(), TransportError)
    done.set()
    assert server.ended() is None
    assert server.result == []


def test_a_site_cannot_play_the_server(world: World, tmp_path: Path) -> None:
    """Its certificate is of the right authority, but for another role and without the host's name."""
    ca, certificate, key = read_tls(load_tls(world.pki / "sites" / "south"))
    impostor = grpc.server(futures.ThreadPoolExecutor(2))
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    world.port = impostor.add_secure_port("127.0.0.1:0", credentials)
    impostor.start()
    error = world.site("north").ended()
    impostor.stop(0).wait()
    assert isinstance(error, TransportError)
    assert "server's certificate" in error.message


def test_another_sites_certificate_is_refused_by_name(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    error = world.site("north", folder=world.pki / "sites" / "south").ended()
    assert isinstance(error, TransportError)
    assert "not that of 'north'" in error.message
    done.set()
    assert server.ended() is None


def test_two_processes_with_one_identity(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    first = world.site("north")
    world.until(lambda: "connected" in world.statuses["north"])
    error = world.site("north").ended()
    assert isinstance(error, TransportError)
    assert "another process is connected" in error.message
    done.set()
    assert server.ended() is None
    assert server.result == ["north"]
    assert first.ended() is None


def test_a_restarted_process_takes_over_at_once(world: World) -> None:
    stop, met, go = threading.Event(), threading.Event(), threading.Event()

    def main(grid: GrpcGrid) -> int:
        grid.wait_for_sites(1, 600)
        met.set()
        go.wait(600)
        return len(world.ask(grid, sites=["north"]))

    server = world.server(main)
    first = world.site("north", stop=stop)
    assert met.wait(600)
    stop.set()
    assert first.ended() is None
    assert world.statuses["north"][-1] == "stopped"
    world.site("north")
    go.set()
    assert server.ended() is None
    assert server.result == 1


def test_without_a_certificate_nobody_is_heard(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    ca = (world.pki / "server" / "ca.pem").read_bytes()
    for credentials in (grpc.ssl_channel_credentials(ca), None):
        target = f"127.0.0.1:{world.port}"
        channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
        with channel:
            call = channel.unary_unary(f"/{SERVICE}/Work")
            world.refused(lambda call=call: call(b"", timeout=600), grpc.StatusCode.UNAVAILABLE)
    done.set()
    assert server.ended() is None


def test_a_port_in_use_is_named(world: World) -> None:
    done = threading.Event()
    server = world.server(lambda grid: world.waiting(grid, done))
    with pytest.raises(TransportError, match=f"127.0.0.1:{world.port}"):
        serve(ServerApp(), address=f"127.0.0.1:{world.port}", tls=load_tls(world.pki / "server"), roster=world.roster)
    done.set()
    assert server.ended() is None


def test_no_server_is_an_error_with_the_address(world: World) -> None:
    error = world.site("north", address="127.0.0.1:1", wait=0.3).ended()
    assert isinstance(error, TransportError)
    assert "127.0.0.1:1" in error.message


def test_strangers_have_no_node(world: World) -> None:
    grid = GrpcGrid(world.roster)
    with pytest.raises(TransportError):
        grid.push_messages([flower.request(world.PING, to=7, action="train.echo", round=1)])
    assert list(grid.get_node_ids()) == []
    key = identity.public_hex(identity.new_signing_key())
    other = Roster("x", world.roster.server, (Member(SiteId("zz"), key),))
    assert GrpcGrid(other).site_of(flower.node_id(SiteId("zz"))) == "zz"
