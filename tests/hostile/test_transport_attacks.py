"""Attacks on a server process over the network: strangers, a member gone bad, and honest sites that must not notice."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedveil.common import flwr_adapter as flower
from fedveil.common.units import SiteId
from fedveil.deploy.enrol.provision import load_tls, make_consortium
from fedveil.deploy.transport import TlsFiles
from fedveil.deploy.transport.codec import cut, encode
from fedveil.deploy.transport.grpc_service import FROM, SERVICE

Code = grpc.StatusCode


# --- strangers -------------------------------------------------------------------------------------------------


def test_a_foreign_authority_is_refused(victim: Any, rogue: Any, tmp_path: Path) -> None:
    make_consortium(tmp_path, ["west"], consortium="foreign", host="127.0.0.1")
    folder = tmp_path / "sites" / "west"
    tls = load_tls(folder)
    shutil.copy(victim.pki / "sites" / "west" / "ca.pem", folder / "ca.pem")
    assert rogue(tls=tls).refused() is Code.UNAVAILABLE
    victim.check()


def test_an_expired_certificate_of_a_member_is_refused(victim: Any, rogue: Any, tmp_path: Path) -> None:
    good = victim.pki / "sites" / "west"
    old = x509.load_pem_x509_certificate((good / "tls.pem").read_bytes())
    ca = x509.load_pem_x509_certificate((good / "ca.pem").read_bytes())
    key = serialization.load_pem_private_key((victim.pki / "consortium" / "ca.key").read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    for name, end in (("control", now + datetime.timedelta(days=1)), ("expired", now - datetime.timedelta(minutes=1))):
        builder = x509.CertificateBuilder(ca.subject, old.subject, old.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=2)).not_valid_after(end)
        for extension in old.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
        (tmp_path / name).write_bytes(pem)
        peer = rogue(tls=TlsFiles(good / "ca.pem", tmp_path / name, good / "tls.key"))
        if name == "control":
            peer.dial()
            peer.close()
        else:
            assert peer.refused() is Code.UNAVAILABLE
    victim.check()


def test_plain_text_and_old_tls_are_refused(victim: Any) -> None:
    for first in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        os.urandom(4096),
    ):
        with socket.create_connection(("127.0.0.1", victim.port), timeout=600) as s:
            s.sendall(first)
            s.settimeout(600)
            try:
                while got := s.recv(4096):
                    assert b"fedveil" not in got
            except ConnectionError:
                pass
    with pytest.raises((ssl.SSLError, ConnectionError)):
        victim.tls_socket(ssl.TLSVersion.TLSv1_2).close()
    victim.tls_socket(ssl.TLSVersion.TLSv1_3).close()  # control
    victim.check()


# --- a member gone bad -----------------------------------------------------------------------------------------


def test_a_second_live_session_is_refused_and_reported(victim: Any, rogue: Any) -> None:
    assert rogue("north", "another process").refused() is Code.ALREADY_EXISTS
    victim.until(lambda: any(s == "north" and "second live process" in what for s, what in victim.reports()))
    victim.facts[:] = [f for f in victim.facts if "report" not in f]
    victim.check()


def test_a_site_cannot_answer_for_another_one(victim: Any, rogue: Any) -> None:
    west, south = rogue("west").dial(), rogue("south").dial()
    theirs = south.answer(south.message())
    assert west.reply(cut(encode(theirs))) == b"stale"
    before = victim.answered("south")

    def forged(message: Any) -> Any:
        mine = west.answer(message)
        mine.metadata.__dict__.update(_src_node_id=flower.node_id(SiteId("south")))
        return mine

    west.in_time(forged)
    victim.next_rounds(2)
    assert victim.answered("south") == before, "an answer was booked for the site that did not give it"
    victim.check()


def test_replays_are_stale(victim: Any, rogue: Any) -> None:
    west = rogue().dial()
    recorded = encode(west.in_time(west.answer))
    assert west.reply(cut(recorded)) == b"stale"
    west.message()
    assert west.reply(cut(recorded)) == b"stale", "an answer to an earlier round was taken for this one"
    assert rogue("west", "another").reply(cut(recorded)) is Code.FAILED_PRECONDITION
    assert west.reply(cut(recorded), (FROM, "10")) is Code.FAILED_PRECONDITION
    victim.check()


def test_oversized_frames_are_refused_before_they_are_kept(victim: Any, rogue: Any) -> None:
    west = rogue().dial()
    assert west.reply([bytes(16 << 20)]) is Code.RESOURCE_EXHAUSTED
    head = encode(west.answer(west.message(), 10 << 20))[0]
    assert west.reply([head, *[bytes(1 << 20)] * 200]) is Code.INVALID_ARGUMENT
    assert west.reply([b"FVM1" + (2**32 - 1).to_bytes(4, "big"), *[bytes(1 << 20)] * 200]) is Code.INVALID_ARGUMENT
    west.message()
    endless = (bytes(1 << 20) for _ in range(100))
    assert west.reply([b"FVM1" + (8 << 20).to_bytes(4, "big"), *endless]) is Code.INVALID_ARGUMENT
    victim.check()


def test_slow_peers_are_cut_and_do_not_crowd_out_the_others(victim: Any, rogue: Any) -> None:
    with ExitStack() as crowd:
        for _ in range(150):
            s = crowd.enter_context(socket.create_connection(("127.0.0.1", victim.port), timeout=600))
            s.sendall(b"\x16")  # a TLS record begins, and never goes on
        _drip_and_hold(victim, rogue)
    victim.check()


def _drip_and_hold(victim: Any, rogue: Any) -> None:
    def drip() -> Iterator[bytes]:
        yield encode(west.answer(message, 3_000_000))[0]
        while True:
            yield b"\0"
            time.sleep(0.2)

    west = rogue().dial()
    message = west.message()
    assert west.reply(drip()) in (Code.CANCELLED, Code.UNKNOWN, b"stale")  # it would go on for ever
    # Calls that are opened and never spoken on, more of them than the server has threads.
    idle = [
        west.channel.stream_stream(f"/{SERVICE}/Work")(iter(wait_forever()), metadata=west.metadata) for _ in range(40)
    ]
    victim.check()
    for call in idle:
        call.cancel()


def wait_forever() -> Iterator[bytes]:
    time.sleep(5)
    yield from ()


def test_a_site_that_reads_nothing_is_cut(victim: Any, rogue: Any) -> None:
    """It opens streams and never reads: each is replaced by the next, none keeps a thread of the server."""
    west = rogue()
    calls = [west.channel.unary_stream(f"/{SERVICE}/Work")(b"", metadata=west.metadata) for _ in range(60)]
    victim.check()
    for call in calls:
        call.cancel()


def test_a_site_that_fails_all_the_time_is_not_heard_for_a_while(pki: Path, new_victim: Any, new_rogue: Any) -> None:
    victim = new_victim(pki, burst=30)
    west = new_rogue(victim)
    try:
        west.dial()
        heard = 0
        while (code := west.reply([os.urandom(100)])) is Code.INVALID_ARGUMENT:
            heard += 1
        assert code is Code.RESOURCE_EXHAUSTED
        assert heard > 10
        victim.until(lambda: ["west", "too many failed calls of this site"] in victim.reports())
        victim.check()
    finally:
        west.close()
        victim.close()
