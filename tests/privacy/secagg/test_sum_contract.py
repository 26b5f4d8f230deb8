"""What every protocol promises, and what a session with restarts, drop-outs and repeated requests gives."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.common.errors import ProtocolError, SecureSumError
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg.interface import PROTOCOLS
from fedveil.privacy.secagg.keysum_common import sign_header
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import DirectoryStore, MemoryStore

ENCRYPTED = ("keysum", "sharedkey")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_opened_sum_is_the_integer_sum(session, protocol):
    s = session(protocol, 4, length=5000, bound=1 << 20)
    rows = np.arange(20_000).reshape(4, 5000) * 13 - 100_000
    for round in (1, 2):
        got, members = s.sum(round, dict(zip(s.names, rows, strict=True)))
        assert members == tuple(s.names)
        assert got.dtype == np.int64
        assert np.array_equal(got, rows.sum(0))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_contribution_is_replayed_bit_for_bit_and_never_made_twice(session, protocol):
    s = session(protocol, 3, length=3)
    site = s.site(s.names[0])
    assert site.replay(1) is None
    first = site.contribute(1, "n", np.array([1, 2, 3]))
    assert site.replay(1) == first
    assert site.contribute(1, "n", np.array([7, 7, 7])) == first
    with pytest.raises(SecureSumError, match="another nonce"):
        site.contribute(1, "m", np.array([1, 2, 3]))
    site.contribute(2, "n", np.array([1, 2, 3]))
    assert site.replay(1) is None
    with pytest.raises(SecureSumError, match="over"):
        site.contribute(1, "n", np.array([1, 2, 3]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("round", "nonce", "values"),
    [
        (1, "n", np.zeros(3)),
        (1, "n", np.zeros(4, np.int64)),
        (1, "n", np.zeros((3, 1), np.int64)),
        (-1, "n", np.zeros(3, np.int64)),
        (101, "n", np.zeros(3, np.int64)),
        (1, "", np.zeros(3, np.int64)),
        (1, "n" * 129, np.zeros(3, np.int64)),
        (1, "\n", np.zeros(3, np.int64)),
    ],
)
def test_what_is_no_vector_of_this_session_is_refused(session, protocol, round, nonce, values):
    site = session(protocol, 2, length=3)
    with pytest.raises(SecureSumError):
        site.site(site.names[0]).contribute(round, nonce, values)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_server_adds_a_site_once_and_only_in_its_round(session, protocol):
    s = session(protocol, 3, length=2)
    a, b, c = s.names
    v = np.array([1, 2])
    with pytest.raises(SecureSumError, match="no round"):
        s.server.add(a, s.site(a).contribute(1, "n", v))
    s.server.start_round(1, "n")
    s.server.add(a, s.site(a).contribute(1, "n", v))
    for name, packet in (
        (a, s.site(a).replay(1)),
        (b, s.site(a).replay(1)),
        (b, s.site(b).contribute(2, "n", v)),
        (c, s.site(c).contribute(1, "m", v)),
        (c, Packet({"kind": "other"})),
        (c, Packet({})),
    ):
        with pytest.raises(ProtocolError):
            s.server.add(name, packet)
    assert s.server.members == (a,)
    with pytest.raises(SecureSumError, match="fewer than 2"):
        s.server.agree_requests()
    with pytest.raises(SecureSumError):
        s.server.result()


@pytest.mark.parametrize(("protocol", "bound"), [("keysum", 1 << 40), *((p, 10) for p in PROTOCOLS)])
def test_a_sum_outside_the_bound_is_refused_not_wrapped(session, protocol, bound):
    s = session(protocol, 2, length=3, bound=bound)
    over = np.array([0, bound // 2 + 1, 0])
    with pytest.raises(SecureSumError, match="bound"):
        s.sum(1, dict.fromkeys(s.names, over))
    got, _ = s.sum(2, dict.fromkeys(s.names, np.array([bound // 2, -(bound // 2), 0])))
    assert got.tolist() == [bound, -bound, 0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_site_made_anew_from_its_store_before_every_step(session, protocol, tmp_path):
    names = [f"site-{i}" for i in range(3)]
    s = session(
        protocol, 3, length=20, stores={n: DirectoryStore(tmp_path / n) for n in names}, restart=protocol != "plain"
    )
    for round in (1, 2):
        got, _ = s.sum(round, {n: np.full(20, round) for n in names})
        assert np.array_equal(got, np.full(20, 3 * round))
    if protocol != "plain":
        assert s.site(s.names[0]).replay(2) is not None
        with pytest.raises(SecureSumError, match="over"):
            s.site(s.names[0]).contribute(1, "nonce-1", np.zeros(20, np.int64))


@pytest.mark.parametrize("protocol", ENCRYPTED)
def test_ending_a_session_destroys_its_secrets_for_good(session, protocol, tmp_path):
    s = session(protocol, 2, length=3, stores={f"site-{i}": DirectoryStore(tmp_path / str(i)) for i in range(2)})
    name = s.names[0]
    s.sum(1, dict.fromkeys(s.names, np.ones(3, np.int64)))
    secret = [(p, p.read_bytes()) for p in (tmp_path / "0").iterdir() if p.name.endswith(("x25519", "ckks"))]
    assert len(secret) == 1 + (protocol == "sharedkey")
    for _ in range(2):
        s.site(name).end()
    left = b"".join(p.read_bytes() for p in (tmp_path / "0").iterdir())
    for path, data in secret:
        assert not path.exists()
        assert data not in left
    for site in (s.site(name), s.fresh(name)):
        with pytest.raises(SecureSumError):
            site.join_fields()
        with pytest.raises(SecureSumError):
            site.contribute(2, "n", np.ones(3, np.int64))
    assert not list((tmp_path / "0").glob("*x25519"))


@pytest.mark.parametrize("protocol", ENCRYPTED)
def test_ciphertexts_of_equal_vectors_share_nothing_but_their_form(session, protocol):
    s = session(protocol, 2, length=4096)
    zero = np.zeros(4096, np.int64)
    a, b = (
        next(iter(p.buffers.values()))
        for p in (s.site(s.names[0]).contribute(1, "n", zero), s.site(s.names[0]).contribute(2, "n", zero))
    )
    tail = min(len(a), len(b), 16000)
    same = np.mean(np.frombuffer(a[-tail:], np.uint8) == np.frombuffer(b[-tail:], np.uint8))
    assert same < 0.05


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_keysum_under_every_drop_out_pattern(session, n):
    s = session("keysum", n, length=4, bound=1 << 20)
    vectors = {name: np.array([i, -i, 1 << i, 1000]) for i, name in enumerate(s.names, 1)}
    round = 0
    for size in range(2, n + 1):
        for members in combinations(s.names, size):
            round += 1
            got, opened = s.sum(round, {m: vectors[m] for m in members})
            assert opened == members
            assert np.array_equal(got, sum(vectors[m] for m in members))


@pytest.mark.parametrize("helpers", list(combinations(range(5), 3)))
def test_keysum_opens_with_any_threshold_of_helpers_members_or_not(session, helpers):
    s = session("keysum", 5, length=2)
    members = s.names[:2]
    got, _ = s.sum(1, dict.fromkeys(members, np.array([3, -4])), [s.names[i] for i in helpers])
    assert got.tolist() == [6, -8]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_keysum_is_exact_for_values_of_any_sign_and_size(session, data):
    n = data.draw(st.integers(2, 4))
    bound = data.draw(st.sampled_from([0, 1, 7, 100, (1 << 22) - 1, 1 << 22, (1 << 45) - 1]))
    length = data.draw(st.sampled_from([1, 2, 4095, 4097, 8192, 8193, 20000, 70000]))
    seed = data.draw(st.integers(0, 1 << 30))
    size = data.draw(st.sampled_from([1, bound + 1, 1 << 45, 1 << 60]))
    draw = np.random.default_rng(seed)
    target = draw.integers(-bound, bound, length, endpoint=True)
    target[:1], target[-1:] = bound, -bound
    rows = [draw.integers(-size, size, length, endpoint=True) for _ in range(n - 1)]
    rows.append(target - np.sum(rows, axis=0))
    s = session("keysum", n, length=length, bound=bound)
    got, _ = s.sum(1, dict(zip(s.names, rows, strict=True)))
    assert np.array_equal(got, target)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([1, 2047, 2048, 2049, 5000]), st.sampled_from([1, 1000, (1 << 30) - 1]), st.integers(0, 1 << 30))
def test_sharedkey_is_exact_up_to_its_bound(session, length, bound, seed):
    s = session("sharedkey", 3, length=length, bound=bound)
    draw = np.random.default_rng(seed)
    target = draw.integers(-bound, bound, length, endpoint=True)
    target[:1], target[-1:] = bound, -bound
    rows = [draw.integers(-(bound // 3), bound // 3, length, endpoint=True) for _ in range(2)]
    rows.append(target - np.sum(rows, axis=0))
    got, _ = s.sum(1, dict(zip(s.names, rows, strict=True)))
    assert np.array_equal(got, target)


def test_sharedkey_opens_once_per_round_and_only_for_enough_members(session):
    s = session("sharedkey", 3, length=2, min_members=3)
    s.sum(1, dict.fromkeys(s.names, np.array([1, 2])))
    request = s.server.open_requests()[s.names[0]]
    site = s.site(s.names[0])
    assert site.open(request) == site.open(request)
    single = s.site(s.names[1]).contribute(2, "n", np.array([5, 5]))
    for header in ({**request.header, "members": [s.names[1]]}, request.header):
        with pytest.raises(SecureSumError):
            site.open(Packet({**header, "lengths": single.header["lengths"]}, single.buffers))


def test_sharedkey_names_the_site_whose_answer_differs(session):
    s = session("sharedkey", 3, length=2)
    s.server.start_round(1, "n")
    for name in s.names:
        s.server.add(name, s.site(name).contribute(1, "n", np.array([1, 2])))
    s.server.agree_requests()
    requests = s.server.open_requests()
    liar = s.names[1]
    for name in s.names:
        answer = s.site(name).open(requests[name])
        if name == liar:
            false = np.array([9, 9], "<i8").tobytes()
            header = {k: v for k, v in answer.header.items() if k != "signature"} | {"values": sha256(false)}
            answer = Packet(sign_header(s.site(name)._signing_key, header), {"values": false})
        s.server.add_answer(name, answer)
    got, _ = s.server.result()
    assert got.tolist() == [3, 6]
    assert s.server.suspects == (liar,)


def test_a_server_without_the_shared_key_cannot_decrypt(session):
    s = session("sharedkey", 2, length=2)
    packet = s.site(s.names[0]).contribute(1, "n", np.array([1, 2]))
    assert not s.server._ckks._context.has_secret_key()
    with pytest.raises(SecureSumError):
        s.server._ckks.decrypt(packet.buffers["ciphertexts"], 2)


def test_the_site_may_not_send_before_it_joined(session):
    s = session("keysum", 2, length=2)
    site = KeysumSite(s.spec, s.names[0], s.site(s.names[0])._signing_key, MemoryStore())
    with pytest.raises(SecureSumError, match="not in the session"):
        site.contribute(1, "n", np.array([1, 2]))
    mine = site.join_fields()
    assert site.join_fields() == mine
    with pytest.raises(SecureSumError):
        site.begin({s.names[0]: mine})
    with pytest.raises(SecureSumError):
        site.begin({s.names[0]: mine, s.names[1]: mine})
    peer = s.site(s.names[1]).join_fields()
    site.begin({s.names[0]: mine, s.names[1]: peer})
    with pytest.raises(SecureSumError):
        site.begin({s.names[0]: mine, s.names[1]: {"x25519": "11" * 32}})


def test_sites_that_never_joined_are_left_out_of_every_round(session):
    other = session("keysum", 4, length=2, threshold=3)
    joined = other.names[:3]
    other.stores = {n: MemoryStore() for n in joined}
    sites = {n: other.fresh(n) for n in joined}
    joins = {n: x.join_fields() for n, x in sites.items()}
    other.server.begin(joins, {n: x.begin(joins) for n, x in sites.items()})
    other._sites |= sites
    got, members = other.sum(1, {n: np.array([1, 2]) for n in joined}, joined)
    assert got.tolist() == [3, 6]
    assert members == tuple(joined)
