"""Flower's runtime and control interfaces as an executor sees them; the one module here that knows Flower's inside.

Protobuf over HTTP, as ``flwr/supercore/routers/runtime`` (flwr 1.41) serves it. Taking a task needs the secret that
SuperNode or SuperLink was started with (HMAC over the request); what a task is then asked for needs its token. Flower's
own client is not used: it retries for ever, follows proxies from the environment, and ends the process by a signal
when a task is not its own any more.

A message is a tree of objects, each named by its SHA-256. While they arrive, sizes and counts are checked, and each
object against its name. An array may name one chunk many times: its expansion is checked before anything is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import control_pb2, fab_pb2, message_pb2, node_pb2, runtime_pb2, task_pb2
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from fedveil.common.errors import ConfigError, ProtocolError, TransportError, WireError
from fedveil.common.wire import Limits

CLIENT, SERVER = TaskType.CLIENT_APP.value, TaskType.SERVER_APP.value
MAX_RESPONSE = 64 << 20
MAX_OBJECTS = 4096
_SLACK = 1 << 20  # for what Flower writes around our header and buffers
_TYPE = "application/protobuf"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_HEARTBEAT_S = 10.0  # Flower gives a task up after 30 s, later 60 s, without one
_TIMEOUT_S = 30.0
_RETRIES, _PAUSE_S = 4, 0.25
_UNREACHED = (502, 503, 504)
_LOG = logging.getLogger("fedveil.superlink")
P = TypeVar("P", bound=Proto)
Arrival = Literal["whole", "partly", "gone"]


class Link:
    """One HTTP interface of SuperNode or SuperLink.

    Args:
        address: ``host:port``.
        ca: the authority (PEM) that the interface's certificate must come from, TLS 1.3; None: plain HTTP, which is
            refused beyond this machine.
        secret: what tasks are taken with; empty where none are taken.

    Raises:
        ConfigError: the address is malformed, or not of this machine and without TLS.
    """

    def __init__(self, address: str, *, ca: Path | None, secret: bytes = b"") -> None:
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal()):
            raise ConfigError(f"{address!r} is not host:port", hint="for example 127.0.0.1:9094")
        if ca is None and not _loopback(host.strip("[]")):
            raise ConfigError(f"{address} is on another machine, without TLS", hint="name an address of this machine")
        verify: ssl.SSLContext | bool = False
        if ca is not None:
            verify = ssl.create_default_context(cafile=str(ca))
            verify.minimum_version = ssl.TLSVersion.TLSv1_3
        self.address, self._secret = address, derive_auth_secret(secret) if secret else b""
        self._base = f"{'https' if ca else 'http'}://{address}/v1/"
        self._client = httpx.Client(verify=verify, trust_env=False, timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def post(self, path: str, request: Proto, kind: type[P], *, token: str = "") -> P:
        """One request and its answer; tried a few times while nobody answers.

        Raises:
            TransportError: nobody answers.
            ProtocolError: the request was refused; WireError: the answer is malformed or over 64 MiB.
        """
        for left in range(_RETRIES, -1, -1):
            try:
                return self._once(path, request, kind, token)
            except TransportError:
                if not left:
                    raise
                time.sleep(_PAUSE_S)
        raise AssertionError("unreachable")

    def _once(self, path: str, request: Proto, kind: type[P], token: str) -> P:
        headers = {"content-type": _TYPE, "accept": _TYPE, "accept-encoding": "identity"}
        if token:
            headers[TASK_TOKEN_HEADER] = token
        elif self._secret and path == "runtime/acquire-task":
            headers |= create_superexec_auth_metadata(auth_secret=self._secret, method=_ACQUIRE, request=request)
        data = bytearray()
        try:
            body = request.SerializeToString(deterministic=True)
            with self._client.stream("POST", self._base + path, content=body, headers=headers) as response:
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > MAX_RESPONSE:
                        raise WireError(f"{path}: an answer of more than {MAX_RESPONSE} bytes")
        except httpx.HTTPError as e:
            raise TransportError(
                f"{self.address} does not answer ({type(e).__name__})", hint="start it, or correct its address"
            ) from e
        if response.status_code in _UNREACHED:
            raise TransportError(f"{self.address} does not answer (HTTP {response.status_code})")
        if not response.is_success:
            raise ProtocolError(f"{self.address} refused {path} (HTTP {response.status_code})")
        out = kind()
        try:
            out.ParseFromString(bytes(data))
        except DecodeError as e:
            raise WireError(f"{path}: a malformed answer") from e
        return out

    # What an executor asks for

    def acquire(self, kind: str) -> Task | None:
        """The oldest task of ``kind`` that nobody has taken, or None."""
        answer = self.post(
            "runtime/acquire-task",
            runtime_pb2.AcquireTaskRequest(supported_task_types=[kind]),
            runtime_pb2.AcquireTaskResponse,
        )
        if not (answer.HasField("task") and answer.token):
            return None
        return Task(self, answer.token, answer.task)

    # What an operator asks for

    def register(self, public_key_pem: bytes, name: str) -> None:
        """Let the SuperNode with this key in; what was registered before stays as it is."""
        request = control_pb2.RegisterNodeRequest(public_key=public_key_pem, name=name)
        known = self.post("control/list-nodes", control_pb2.ListNodesRequest(), control_pb2.ListNodesResponse)
        if all(node.public_key != public_key_pem for node in known.nodes_info):
            self.post("control/register-node", request, control_pb2.RegisterNodeResponse)

    def start_run(self, bundle: bytes) -> int:
        """Start a run under ``bundle``. Returns its number."""
        fab = fab_pb2.Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        answer = self.post("control/start-run", control_pb2.StartRunRequest(fab=fab), control_pb2.StartRunResponse)
        if not answer.HasField("run_id"):
            raise ProtocolError(f"{self.address} did not start the run")
        return int(answer.run_id)

    def stop_run(self, run_id: int) -> None:
        """Stop a run: SuperNodes let go of its messages. One that has ended, or is not known, stays as it is."""
        request = control_pb2.StopRunRequest(run_id=run_id)
        with contextlib.suppress(ProtocolError):
            self.post("control/stop-run", request, control_pb2.StopRunResponse)

    def run_status(self, run_id: int) -> tuple[str, str, str]:
        """Status, sub-status and details of a run, in Flower's words."""
        answer = self.post(
            "control/list-runs", control_pb2.ListRunsRequest(run_id=run_id), control_pb2.ListRunsResponse
        )
        status = answer.run_dict[run_id].status
        return status.status, status.sub_status, status.details


@dataclass(frozen=True)
class Input:
    """What a task brings, less its bundle's content.

    Attributes:
        run_id, node_id: Flower's numbers.
        bundle: SHA-256 of the bundle's bytes, computed here; not what the sender says it is.
    """

    run_id: int
    node_id: int
    bundle: str


class Task:
    """A task that this executor has taken.

    Attributes:
        run_id: the run it belongs to, as whoever gave the task says.
    """

    def __init__(self, link: Link, token: str, task: task_pb2.Task) -> None:
        self.run_id = int(task.run_id)
        self._link, self._token = link, token
        self._node = node_pb2.Node()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While inside, tell whoever gave the task, again and again, that it is being worked on."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(_HEARTBEAT_S):
                try:
                    self._post("send-task-heartbeat", runtime_pb2.SendTaskHeartbeatRequest(),
                               runtime_pb2.SendTaskHeartbeatResponse)  # fmt: skip
                except (TransportError, ProtocolError) as e:
                    _LOG.warning("a heartbeat was not taken: %s", e)

        thread = threading.Thread(target=beat, name="fedveil-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def begin(self) -> Input:
        """Begin the task. The bundle is hashed and dropped: no byte of it is looked at."""
        got = self._post("pull-task-input", runtime_pb2.PullTaskInputRequest(), runtime_pb2.PullTaskInputResponse)
        self._node = node_pb2.Node(node_id=got.context.node_id)
        return Input(int(got.run.run_id), int(got.context.node_id), hashlib.sha256(got.fab.content).hexdigest())

    def envelope(self) -> tuple[Message, Inflow]:
        """The message to work on: its metadata, and its content, which is still to be fetched with :meth:`fetch`.

        Raises:
            WireError: there is none, or it is malformed.
        """
        got = self.pull([])
        if len(got) != 1:
            raise WireError("a task without exactly one message")
        return got[0]

    def pull(self, message_ids: list[str], limits: Limits | None = None) -> list[tuple[Message, Inflow]]:
        """Messages that have come: at a site the one of this task, at the server the answers to ``message_ids``."""
        request = runtime_pb2.PullAppMessagesRequest(message_ids=message_ids)
        got = self._post("pull-messages", request, runtime_pb2.PullAppMessagesResponse)
        if len(got.messages_list) != len(got.message_object_trees):
            raise WireError("messages and object trees of different number")
        out: list[tuple[Message, Inflow]] = []
        for proto, tree in zip(got.messages_list, got.message_object_trees, strict=True):
            out.append((_checked(message_from_proto, proto), Inflow(tree, limits)))
        return out

    def fetch(self, inflow: Inflow, *, drop: bool = False) -> Arrival:
        """Fetch what is there of a message; one that is whole is confirmed. With ``drop`` nothing of it is kept.

        Raises:
            WireError: an object is not what its name says, or the message is too large.
        """
        for name in inflow.missing():
            request = message_pb2.PullObjectRequest(node=self._node, run_id=self.run_id, object_id=name)
            got = self._post("pull-object", request, message_pb2.PullObjectResponse)
            if not got.object_found:
                return "gone"
            if not got.object_available:
                return "partly"
            inflow.take(name, got.object_content) if not drop else inflow.drop(name)
        self._confirm(inflow)
        return "whole"

    def _confirm(self, inflow: Inflow) -> None:
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self._node, run_id=self.run_id, message_object_id=inflow.root
        )
        self._post("confirm-message-received", request, message_pb2.ConfirmMessageReceivedResponse)

    def push(self, messages: list[Message]) -> list[str]:
        """Send messages. Returns their ids; the id of one that was not taken is empty."""
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
            request = runtime_pb2.PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
                message_object_trees=[get_object_tree(m) for m in messages],
            )
            answer = self._post("push-messages", request, runtime_pb2.PushAppMessagesResponse)
            objects = {k: v for m in messages for k, v in get_all_nested_objects(m).items()}
            for name in answer.objects_to_push:
                if name not in objects:
                    raise ProtocolError("asked for an object that no message has")
                pushed = message_pb2.PushObjectRequest(
                    node=self._node, run_id=self.run_id, object_id=name, object_content=objects[name].deflate(),
                    session_id=answer.session_id,
                )  # fmt: skip
                if not self._post("push-object", pushed, message_pb2.PushObjectResponse).stored:
                    raise ProtocolError("an object of a message was not taken")
        return [str(i) for i in answer.message_ids]

    def nodes(self) -> list[tuple[int, bytes]]:
        """Number and public key (PEM) of every SuperNode that is online."""
        got = self._post("get-nodes", runtime_pb2.GetNodesRequest(), runtime_pb2.GetNodesResponse)
        return [(int(n.node_id), bytes(n.public_key)) for n in got.nodes]

    def finish(self, failure: str = "") -> None:
        """End the task: completed, or failed for the reason given."""
        status = SubStatus.FAILED if failure else SubStatus.COMPLETED
        request = runtime_pb2.PushTaskOutputRequest(sub_status=status, details=failure)
        self._post("push-task-output", request, runtime_pb2.PushTaskOutputResponse)

    def _post(self, path: str, request: Proto, kind: type[P]) -> P:
        return self._link.post(f"runtime/{path}", request, kind, token=self._token)


class Inflow:
    """A message that arrives object by object.

    Raises:
        WireError: more than ``MAX_OBJECTS`` objects.
    """

    def __init__(self, tree: message_pb2.ObjectTree, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.root = tree.object_id
        self._room = limits.header + limits.buffers + _SLACK
        self._contents: dict[str, bytes] = {}
        self._names: dict[str, None] = {}
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            self._names[node.object_id] = None
            waiting.extend(node.children)
            if len(self._names) + len(waiting) > MAX_OBJECTS:
                raise WireError(f"a message of more than {MAX_OBJECTS} objects")

    def missing(self) -> list[str]:
        """The objects that have not come."""
        return [name for name in self._names if name not in self._contents]

    def take(self, name: str, content: bytes) -> None:
        """Keep one object; WireError when it is not the one of that name, or too much has come."""
        if hashlib.sha256(content).hexdigest() != name:
            raise WireError("an object of a message is not the one it is named after")
        self._room -= len(content)
        if self._room < 0:
            raise WireError("a message over its size limit")
        self._contents[name] = content

    def drop(self, name: str) -> None:
        """Count one object as come, and keep nothing."""
        self._contents[name] = b""

    def message(self) -> Message:
        """The message, once nothing is missing."""
        self._check_expansion()
        out = _checked(lambda root: inflate_object_from_contents(root, self._contents), self.root)
        if not isinstance(out, Message):
            raise WireError("an object where a message was expected")
        out.metadata.__dict__["_message_id"] = self.root
        return out

    def _check_expansion(self) -> None:
        room = self._room
        for content in self._contents.values():
            kind, children, length = _checked(get_object_head_values_from_object_content, content)
            if kind != "Array":
                continue
            body = _checked(json.loads, content[len(content) - length :])
            chunks = body.get("arraychunk_ids") if isinstance(body, dict) else None
            if not isinstance(chunks, list) or not all(type(i) is int and 0 <= i < len(children) for i in chunks):
                raise WireError("a malformed array")
            sizes = [len(self._contents.get(c, b"")) for c in children]
            room -= sum(sizes[i] for i in chunks) - sum(sizes)
            if room < 0:
                raise WireError("a message over its size limit")


def _checked(parse: Callable[[Any], Any], value: Any) -> Any:
    """Flower's own parsers raise errors of many classes. Here a malformed message is always one class."""
    try:
        return parse(value)
    except Exception as e:  # KeyError, ValueError, RecursionError, DecodeError, ...: all of them say the same
        raise WireError(f"a malformed message ({type(e).__name__})") from None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
