"""Where the noise comes from: 32 bytes of the operating system's randomness, anew for every chunk of every release."""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.client import round as line
from fedveil.common import threads
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.audit.share_checks import fresh_keys
from fedveil.privacy.audit.slab import Slab, slab_plan
from fedveil.privacy.dp import noise
from fedveil.privacy.dp.noise import KeyStream, discrete_gaussian
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

SITES, STEPS = 4, 3


class Watched:
    """The operating system's randomness and the cipher, each call noted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.drawn: list[bytes] = []
        self.keys: list[tuple[bytes, bytes]] = []
        patch.setattr(noise, "os", SimpleNamespace(urandom=self._urandom))
        patch.setattr(noise, "Cipher", self._cipher)

    def _urandom(self, count: int) -> bytes:
        self.drawn.append(os.urandom(count))
        return self.drawn[-1]

    def _cipher(self, algorithm: algorithms.AES, mode: modes.CTR) -> Cipher[modes.CTR]:
        assert type(algorithm) is algorithms.AES
        assert type(mode) is modes.CTR
        self.keys.append((bytes(algorithm.key), bytes(mode.nonce)))
        return Cipher(algorithm, mode)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def plan() -> PrivacyPlan:
    return make_plan(
        sum="plain", sites=SITES, records=100, noise_multiplier=2.0, steps=STEPS, clip=1.0,
        model=ModelSpec(name="logistic", inputs=20, classes=2), optimizer=Optimizer(learning_rate=0.1),
        contract_hash="c" * 64,
    )  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_one_draw_of_noise_takes_one_key_of_256_bits(watched: Watched, size: int) -> None:
    for _ in range(3):
        discrete_gaussian(1000.0, size)
    assert [len(k) for k in watched.drawn] == [32] * 3
    assert watched.keys == [(k, bytes(16)) for k in watched.drawn]  # the key is what was drawn, and nothing else
    assert len(set(watched.drawn)) == 3


@pytest.mark.parametrize(("size", "chunks"), [(999, 1), (1000, 1), (1001, 2), (2500, 3)])
@pytest.mark.parametrize("count", [1, 3])
def test_every_chunk_of_a_draw_has_a_key_of_its_own(watched: Watched, monkeypatch, size, chunks, count) -> None:
    monkeypatch.setattr(noise, "_CHUNK", 1000)
    monkeypatch.setattr(threads, "_count", [count])
    assert discrete_gaussian(1e9, size).shape == (size,)
    assert [len(k) for k in watched.drawn] == [32] * chunks
    assert len({k for k, _ in watched.keys}) == len(watched.keys) == chunks


@pytest.mark.parametrize("count", [1, 3])
def test_chunks_share_no_values_and_would_under_one_key(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(noise, "_CHUNK", 1000)
    monkeypatch.setattr(threads, "_count", [count])
    assert np.unique(discrete_gaussian(2.0**45, 5000)).size > 4990

    def same(self: KeyStream) -> None:
        self._encryptor = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()

    monkeypatch.setattr(KeyStream, "__init__", same)  # negative control
    assert np.unique(discrete_gaussian(2.0**45, 5000)).size <= 1000


def test_every_release_of_every_site_has_a_key_of_its_own(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the sites' own code: each draws once a round, and gives the draw no stream that it kept."""
    by: Counter[int] = Counter()

    def draw(*given: Any) -> Any:
        assert len(given) == 2
        before = len(watched.drawn)
        out = discrete_gaussian(*given)
        by[len(watched.drawn) - before] += 1
        return out

    monkeypatch.setattr(line, "discrete_gaussian", draw)
    inner = slab_plan(plan(), inputs=20, steps=STEPS, sample_rate=1.0, records=SITES)
    empty = Slab(np.zeros((SITES, 1), np.int64), 20, 1.0)
    InProcess().run(inner, empty.parts(), absent=[frozenset()] * STEPS)
    assert by == {1: SITES * STEPS}
    assert {len(k) for k in watched.drawn} == {32}
    assert len(set(watched.drawn)) == len(watched.drawn)


def many(steps: int) -> Any:
    inner = slab_plan(plan(), inputs=20, steps=steps, sample_rate=1.0, records=SITES)
    empty = Slab(np.zeros((SITES, 1), np.int64), 20, 1.0)
    return InProcess().run(inner, empty.parts(), absent=[frozenset()] * steps)


def test_a_key_of_16_bits_repeats_itself_and_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, of the check that examinations make; with a key of 8 bits, so that few releases are enough."""
    found = fresh_keys(many(40), 1e-9)
    assert (found.name, found.passed, found.measured, found.samples) == ("noise: key", True, 0.0, 160)

    def short(self: KeyStream) -> None:
        self._encryptor = Cipher(algorithms.AES(os.urandom(1) + bytes(31)), modes.CTR(bytes(16))).encryptor()

    monkeypatch.setattr(KeyStream, "__init__", short)
    found = fresh_keys(many(40), 1e-9)  # 160 draws out of 256: all different with less than 1e-25
    assert not found.passed
    assert found.detects == "a key of 10 bits"
