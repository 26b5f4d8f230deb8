"""A site driven by hand over real mTLS gRPC: redelivery, malformed frames, forged replies."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import grpc
from flwr.app import Message

from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport.codec import cut, encode
from fedveil.deploy.transport.grpc_grid import GrpcGrid
from fedveil.deploy.transport.grpc_service import INSTANCE, SERVICE

if TYPE_CHECKING:
    from tests.deploy.transport.conftest import Wire, World


def test_an_unanswered_message_is_delivered_again_after_reconnection(world: World) -> None:
    server = world.server(lambda grid: world.opened(world.ask(grid, sites=["north"])["north"]).header)
    first = world.wire("north")
    message = first.message()
    first.close()
    second = reconnected(world)
    again = second.message()
    assert again.metadata.message_id == message.metadata.message_id
    assert again.content == message.content
    assert second.reply([b"".join(encode(flower.reply(Packet({"kind": "second"}), again)))]) == b"ok"
    assert canonical.loads(next(second.work)) == {"t": "end", "status": "finished"}
    second.close()
    assert server.ended() is None
    assert server.result == {"kind": "second"}


def reconnected(world: World) -> Wire:
    """A new process, as soon as the server has seen that the first one is gone."""
    for _ in range(200):
        try:
            return world.wire("north", "two")
        except grpc.RpcError:
            time.sleep(0.02)
    raise AssertionError("the first process is still connected")


def test_hostile_frames_do_not_disturb_the_others(world: World) -> None:
    ready, done = threading.Event(), threading.Event()

    def main(grid: GrpcGrid) -> tuple[dict[str, Message], int]:
        grid.wait_for_sites(2, 600)
        ready.set()
        replies = world.ask(grid, sites=["north", "south"])
        done.wait(600)
        return replies, len(world.ask(grid, sites=["north"]))

    server = world.server(main, limits=Limits(header=10_000, buffers=100_000))
    bad = world.wire("south")
    world.site("north")
    message = bad.message()
    good = flower.reply(Packet({"kind": "x"}, {"a": bytes(50)}), message)
    # Garbage that cannot be assigned to a message, a cut stream, a stranger's message: refused, still owed.
    assert "WireError" in world.refused(lambda: bad.reply([b"\0" * 5000]), grpc.StatusCode.INVALID_ARGUMENT)
    world.refused(lambda: bad.reply([]), grpc.StatusCode.ABORTED)
    world.refused(lambda: bad.reply(cut(encode(good)[:1])), grpc.StatusCode.ABORTED)
    stale = flower.copied(good)
    stale.metadata.__dict__["_reply_to_message_id"] = "f" * 32
    assert bad.reply(cut(encode(stale))) == b"stale"
    # A chunk over the transport's limit never reaches the decoder.
    world.refused(lambda: bad.reply([bytes(2 << 20)]), grpc.StatusCode.RESOURCE_EXHAUSTED)
    # Another process's name, no name, no such call.
    stranger = bad.channel.stream_unary(f"/{SERVICE}/Reply")
    world.refused(lambda: stranger(iter([]), metadata=((INSTANCE, "two"),)), grpc.StatusCode.FAILED_PRECONDITION)
    world.refused(lambda: stranger(iter([])), grpc.StatusCode.INVALID_ARGUMENT)
    world.refused(lambda: bad.channel.unary_unary(f"/{SERVICE}/Admin")(b""), grpc.StatusCode.UNIMPLEMENTED)
    # A readable header that breaks a bound is this site's answer: an error, at once.
    large = flower.reply(Packet({"kind": "x"}, {"a": bytes(200_000)}), message)
    assert "limit" in world.refused(lambda: bad.reply(cut(encode(large))), grpc.StatusCode.INVALID_ARGUMENT)
    assert bad.reply(cut(encode(good))) == b"stale"
    done.set()
    bad.close()
    assert server.ended() is None
    replies, after = server.result
    assert not replies["north"].has_error()
    assert isinstance(flower.reply_error(replies["south"]), WireError)
    assert after == 1


def test_a_reply_cannot_speak_for_another_site_or_round(world: World) -> None:
    def main(grid: GrpcGrid) -> Message:
        return next(iter(grid.send_and_receive(world.requests(grid, sites=["south"]), timeout=600)))

    server = world.server(main)
    bad = world.wire("south")
    message = bad.message()
    forged = flower.reply(Packet({"kind": "x"}), message)
    forged.metadata.__dict__.update(_src_node_id=flower.node_id(SiteId("north")), _group_id="99", _run_id=5)
    assert bad.reply(cut(encode(forged))) == b"ok"
    bad.close()
    assert server.ended() is None
    metadata = server.result.metadata
    assert metadata.src_node_id == flower.node_id(SiteId("south"))
    assert (metadata.group_id, metadata.run_id) == ("1", message.metadata.run_id)
