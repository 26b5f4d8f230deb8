"""The site's executor against a SuperNode in memory that can be made to lie."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization as ser
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.config import get_fab_config
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import message_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
)

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import ConfigError, IdentityError, ProtocolError, WireError
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.enrol.provision import make_consortium
from fedveil.deploy.superlink import bundle, commands, runtime
from fedveil.deploy.superlink.runtime import Inflow, Link
from fedveil.deploy.superlink.site import SiteExecutor

RUN, NODE = 77, 4242


class LyingNode:
    """What SuperNode serves to executors: one task with one message, each part open to change."""

    def __init__(self, message: Message) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects = {k: o.deflate() for k, o in get_all_nested_objects(message).items()}
        self.tree = get_object_tree(message)
        self.envelope = message_to_proto(flower.with_metadata(message.metadata, RecordDict(), None))
        self.bundle, self.claimed = bundle.BUNDLE, bundle.PIN
        self.tasks, self.asked = 1, []
        self.replies: list[message_pb2.Message] = []
        self.outputs: list[runtime_pb2.PushTaskOutputRequest] = []
        self.late: dict[str, bytes] = {}  # objects that SuperNode does not have yet
        self.done = threading.Event()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.rpartition("/")[2]
        self.asked.append(path)
        answer = getattr(self, path.replace("-", "_"))(request.content)
        return httpx.Response(200, stream=httpx.ByteStream(answer.SerializeToString()))

    def acquire_task(self, _: bytes) -> Any:
        out = runtime_pb2.AcquireTaskResponse()
        if self.tasks:
            self.tasks -= 1
            out.task.task_id, out.task.run_id, out.token = 5, RUN, "ab" * 16
        return out

    def pull_task_input(self, _: bytes) -> Any:
        out = runtime_pb2.PullTaskInputResponse()
        out.run.run_id, out.context.node_id = RUN, NODE
        out.fab.hash_str, out.fab.content = self.claimed, self.bundle
        return out

    def pull_messages(self, _: bytes) -> Any:
        return runtime_pb2.PullAppMessagesResponse(messages_list=[self.envelope], message_object_trees=[self.tree])

    def pull_object(self, body: bytes) -> Any:
        name = message_pb2.PullObjectRequest.FromString(body).object_id
        found, there = name in self.objects or name in self.late, name in self.objects
        content = self.objects.get(name, b"")
        return message_pb2.PullObjectResponse(object_found=found, object_available=there, object_content=content)

    def confirm_message_received(self, _: bytes) -> Any:
        return message_pb2.ConfirmMessageReceivedResponse()

    def push_messages(self, body: bytes) -> Any:
        self.replies += runtime_pb2.PushAppMessagesRequest.FromString(body).messages_list
        return runtime_pb2.PushAppMessagesResponse(message_ids=["x"], session_id="s")

    def push_task_output(self, body: bytes) -> Any:
        self.outputs.append(runtime_pb2.PushTaskOutputRequest.FromString(body))
        self.done.set()
        return runtime_pb2.PushTaskOutputResponse()


def _message() -> Message:
    flower.set_task_identity(RUN, 1)
    packet = Packet({"kind": "question"}, {"data": bytes(range(256)) * 8})
    return flower.request(packet, to=NODE, action="query.ask", round=1)


def _link(node: LyingNode) -> Link:
    link = Link("127.0.0.1:1", ca=None, secret=b"s" * 32)
    link.close()
    link._client = httpx.Client(transport=httpx.MockTransport(node))
    return link


def _served(node: LyingNode, *, fails: bool = False, stall: float = 60.0) -> tuple[SiteExecutor, list[Packet]]:
    """Let an executor work until the task has ended; what its app was called with."""
    called: list[Packet] = []
    app = ClientApp()

    @app.query("ask")
    def ask(message: Message, context: Context) -> Message:
        assert (context.run_id, context.node_id) == (RUN, NODE)
        called.append(flower.from_record(message.content, Limits()))
        if fails:
            raise RuntimeError("a patient's name")
        return flower.reply(Packet({"kind": "answer"}), message)

    link = _link(node)
    executor, stop = SiteExecutor(link, app, stall=stall), threading.Event()
    thread = threading.Thread(target=executor.serve, args=(stop,))
    thread.start()
    try:
        assert node.done.wait(600), node.asked
    finally:
        stop.set()
        thread.join(600)
        link.close()
    assert not thread.is_alive()
    return executor, called


def _reason(reply: message_pb2.Message) -> str:
    return message_from_proto(reply).error.reason or ""


def _refusal(node: LyingNode) -> dict[str, str]:
    assert [o.sub_status for o in node.outputs] == ["failed"]
    [reply] = node.replies
    assert reply.metadata.reply_to_message_id == node.envelope.metadata.message_id
    return json.loads(_reason(reply))


def test_a_task_under_the_pinned_bundle_is_answered_by_the_installed_app() -> None:
    node = LyingNode(_message())
    executor, called = _served(node)
    assert [(p.header, p.buffers) for p in called] == [({"kind": "question"}, {"data": bytes(range(256)) * 8})]
    assert (executor.answered, executor.refused) == (1, 0)
    assert [o.sub_status for o in node.outputs] == ["completed"]
    [reply] = node.replies
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (NODE, 1)
    assert reply.metadata.reply_to_message_id == node.envelope.metadata.message_id


@pytest.mark.parametrize("content", [b"", b"another bundle", bundle.BUNDLE + b"\0", bundle.BUNDLE[:-1]])
def test_a_bundle_that_only_claims_our_hash_is_refused_unread(content: bytes) -> None:
    node = LyingNode(_message())
    node.bundle = content  # while ``hash_str`` still says that it is ours
    executor, called = _served(node)
    assert called == []
    assert executor.refused == 1
    assert _refusal(node)["code"] == "PolicyRefusal"
    # SuperNode would take the refusal for another message's reply if it came before this one was whole.
    assert node.asked.index("confirm-message-received") < node.asked.index("push-messages")


def test_what_an_app_raises_is_not_told_and_does_not_end_the_executor() -> None:
    node = LyingNode(_message())
    node.tasks = 2
    _, called = _served(node, fails=True)
    assert called
    said = _reason(node.replies[0])
    assert "patient" not in said
    assert "InternalError" in said


def _swapped(node: LyingNode) -> None:
    name = next(k for k, v in node.objects.items() if v.startswith(b"ArrayChunk"))
    node.objects[name] = node.objects[name][:-1] + b"!"


def _nameless(node: LyingNode) -> None:
    node.tree.children.clear()


def _crowded(node: LyingNode) -> None:
    for i in range(runtime.MAX_OBJECTS + 1):
        node.tree.children.add(object_id=f"{i:064x}")


@pytest.mark.parametrize("lie", [_swapped, _nameless])
def test_a_message_that_is_not_what_its_names_say_is_refused(lie: Any) -> None:
    node = LyingNode(_message())
    lie(node)
    executor, called = _served(node)
    assert called == []
    assert executor.refused == 1
    assert _refusal(node)["code"] == "WireError"


def test_a_message_that_has_not_come_whole_is_waited_for() -> None:
    node = LyingNode(_message())
    name = next(k for k, v in node.objects.items() if v.startswith(b"ArrayChunk"))
    node.late[name] = node.objects.pop(name)
    threading.Timer(0.5, lambda: node.objects.update(node.late)).start()
    executor, called = _served(node)
    assert [p.buffers for p in called] == [{"data": bytes(range(256)) * 8}]
    assert executor.answered == 1


@pytest.mark.parametrize("found", [True, False])
def test_a_message_that_never_comes_whole_is_ended_without_a_reply(found: bool) -> None:
    """SuperNode does not wait for one, and would take it for the reply to the next message."""
    node = LyingNode(_message())
    name, content = node.objects.popitem()
    node.late = {name: content} if found else {}
    executor, called = _served(node, stall=0.3)
    assert called == []
    assert node.replies == []
    assert [o.sub_status for o in node.outputs] == ["failed"]
    assert executor._open == []


def test_a_message_that_does_not_come_does_not_hold_up_the_next() -> None:
    ghost, node = LyingNode(_message()), LyingNode(_message())
    missing = next(k for k in ghost.objects if k not in node.objects)  # messages differ in when they were made
    node.late, node.tasks = {missing: b""}, 2
    later = node.pull_messages

    def first(_: bytes) -> Any:
        node.pull_messages = later
        return ghost.pull_messages(_)

    node.pull_messages = first
    executor, called = _served(node)
    assert (len(called), executor.answered) == (1, 1)
    assert [r.metadata.reply_to_message_id for r in node.replies] == [node.envelope.metadata.message_id]


def test_a_message_of_too_many_objects_is_not_begun() -> None:
    node = LyingNode(_message())
    _crowded(node)
    with pytest.raises(WireError, match="objects"):
        Inflow(node.tree)


def _inflow(objects: dict[str, bytes], root: str, limits: Limits) -> Inflow:
    tree = message_pb2.ObjectTree(object_id=root)
    for name in objects:
        if name != root:
            tree.children.add(object_id=name)
    inflow = Inflow(tree, limits)
    for name in inflow.missing():
        inflow.take(name, objects[name])
    return inflow


def test_an_array_that_names_one_chunk_many_times_is_refused_before_it_is_built() -> None:
    """64 KiB arrive and would become 64 GiB: every object is the one it is named after, and small."""
    array = Array("uint8", (1 << 16,), flower.STYPE, bytes(1 << 16))
    [(chunk, _)] = array.slice_array()
    objects = {k: o.deflate() for k, o in get_all_nested_objects(array).items()}
    body = json.dumps({"dtype": "uint8", "shape": [1], "stype": flower.STYPE, "arraychunk_ids": [0] * (1 << 20)})
    bomb = f"Array {chunk} {len(body)}".encode() + b"\0" + body.encode()
    assert get_object_head_values_from_object_content(bomb) == ("Array", [chunk], len(body))
    name = hashlib.sha256(bomb).hexdigest()
    inflow = _inflow({chunk: objects[chunk], name: bomb}, name, Limits())
    with pytest.raises(WireError, match="size limit"):
        inflow.message()


def test_sizes_are_counted_while_they_arrive() -> None:
    message = _message()
    objects = {k: o.deflate() for k, o in get_all_nested_objects(message).items()}
    tiny = Limits(header=0, buffers=0)
    assert _inflow(objects, message.object_id, tiny).message().content  # all of it fits into the slack
    inflow = Inflow(message_pb2.ObjectTree(object_id="r"), tiny)
    big = bytes(runtime._SLACK + 1)
    with pytest.raises(WireError, match="size limit"):
        inflow.take(hashlib.sha256(big).hexdigest(), big)


def test_an_honest_array_of_equal_chunks_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower names a chunk that repeats once; that alone is no attack."""
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1024)
    flower.set_task_identity(RUN, 1)
    record = RecordDict({"a": ArrayRecord({"x": Array("uint8", (9000,), flower.STYPE, bytes(9000))})})
    message = Message(record, NODE, "query.ask")
    objects = {k: o.deflate() for k, o in get_all_nested_objects(message).items()}
    assert sum(v.startswith(b"ArrayChunk") for v in objects.values()) == 2
    out = _inflow(objects, message.object_id, Limits()).message()
    assert out.content["a"]["x"].data == bytes(9000)  # type: ignore[index]


def test_answers_of_the_interface_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_RESPONSE", 1000)
    node = LyingNode(_message())
    node.bundle = bytes(2000)
    link = _link(node)
    task = link.acquire(runtime.CLIENT)
    assert task is not None
    with pytest.raises(WireError, match="1000 bytes"):
        task.begin()
    link.close()


def test_a_refused_request_is_an_error_of_ours() -> None:
    link = _link(LyingNode(_message()))
    link._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(401, stream=httpx.ByteStream(b"")))
    )
    with pytest.raises(ProtocolError, match="HTTP 401"):
        link.acquire(runtime.CLIENT)
    link.close()


@pytest.mark.parametrize("address", ["10.0.0.1:9094", "example.org:9094", "0.0.0.0:9094", "127.0.0.1", ":9094", "x:y"])
def test_without_tls_only_this_machine_is_spoken_to(address: str) -> None:
    with pytest.raises(ConfigError):
        Link(address, ca=None)


def test_the_bundle_is_pinned_and_holds_no_code() -> None:
    assert bundle.PIN == hashlib.sha256(bundle.BUNDLE).hexdigest()
    assert bundle.PIN == "2a13e4fb643596ff8866fe6413f9f7280e9e4055a20265fadc1875b3138c2fc0"
    with zipfile.ZipFile(BytesIO(bundle.BUNDLE)) as archive:
        assert archive.namelist() == ["pyproject.toml"]
    config = get_fab_config(bundle.BUNDLE)  # SuperLink and SuperNode read it with this
    assert f"{config['tool']['flwr']['app']['publisher']}/{config['project']['name']}" == "fedveil/pinned"


def test_flowers_commands_start_nothing_and_listen_on_loopback(tmp_path: Path) -> None:
    make_consortium(tmp_path, ["a-hospital"], consortium="c", host="127.0.0.1")
    state = tmp_path / "state"
    state.mkdir()
    link = commands.superlink(tmp_path / "server", 9092)
    node = commands.supernode(tmp_path / "sites" / "a-hospital", state, "server.example:443", 9094)
    for command in (link, node):
        pairs = dict(zip(command[1:], command[2:], strict=False))
        assert pairs["--isolation"] == "process"
        assert pairs["--host"] == "127.0.0.1"
        assert Path(pairs["--superexec-auth-secret-file"]).stat().st_size == 32
        assert "--insecure" not in command
    assert "--enable-supernode-auth" in link
    key = state / commands.NODE_KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    ours = ser.load_pem_private_key((tmp_path / "sites" / "a-hospital" / "tls.key").read_bytes(), None)
    theirs = ser.load_ssh_private_key(key.read_bytes(), None)
    spki = (ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)
    assert theirs.public_key().public_bytes(*spki) == ours.public_key().public_bytes(*spki)


def test_processes_that_start_together_find_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = {p.read_bytes() for p in pool.map(lambda _: commands.secret(tmp_path), range(32))}
    assert [len(s) for s in found] == [32]
    assert [p.name for p in tmp_path.iterdir()] == [commands.SECRET]
    (tmp_path / commands.SECRET).chmod(0o644)
    with pytest.raises(IdentityError):
        commands.secret(tmp_path)


def test_config_records_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that is none of ours (no packet inside) is an error of the app's, not of the executor's."""
    flower.set_task_identity(RUN, 1)
    node = LyingNode(Message(RecordDict({"q": ConfigRecord({"n": 1})}), NODE, "query.ask"))
    executor, called = _served(node)
    assert called == []
    assert executor.answered == 1
    assert json.loads(_reason(node.replies[0]))["code"] == "WireError"
