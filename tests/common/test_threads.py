"""Pieces over threads: the order, the number of threads, exceptions, and that no thread is left."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import threads
from fedveil.common.errors import ConfigError


@pytest.fixture(autouse=True)
def own_count() -> Iterator[None]:
    before = threads.in_use()
    yield
    threads.use(before)
    assert not [t for t in threading.enumerate() if t.name.startswith("fedveil-pieces")]


@given(count=st.integers(1, 4), size=st.integers(0, 30))
def test_results_come_in_the_order_of_the_pieces(count: int, size: int) -> None:
    threads.use(count)
    assert list(threads.mapped(lambda x: -x, iter(range(size)))) == [-x for x in range(size)]


def test_pieces_are_made_in_the_callers_thread_and_worked_on_by_as_many_threads_as_said() -> None:
    me = threading.get_ident()
    for count in (1, 2, 3):
        threads.use(count)
        together, made, worked = threading.Barrier(count), set[int](), set[int]()

        def pieces(made: set[int] = made) -> Iterator[int]:
            for i in range(12):
                made.add(threading.get_ident())
                yield i

        def work(i: int, together: threading.Barrier = together, worked: set[int] = worked) -> None:
            worked.add(threading.get_ident())
            together.wait(60)  # only so many at once come past it

        threads.each(work, pieces())
        assert made == {me}
        assert (worked == {me}) if count == 1 else (len(worked) == count and me not in worked)


def test_one_thread_or_one_piece_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise RuntimeError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", started)
    threads.use(1)
    assert list(threads.mapped(abs, range(5))) == list(range(5))
    threads.use(3)
    assert list(threads.mapped(abs, [-1])) == [1]
    with pytest.raises(RuntimeError):  # negative control
        list(threads.mapped(abs, range(2)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_exception_in_a_piece_ends_the_call_and_later_pieces_are_left_out(count: int) -> None:
    threads.use(count)
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        if i == 3:
            raise ZeroDivisionError("in a worker")

    with pytest.raises(ZeroDivisionError, match="in a worker"):
        threads.each(work, range(1000))
    assert len(begun) < 20


def test_an_exception_while_pieces_are_made_or_read_is_the_callers_too() -> None:
    threads.use(2)

    def broken() -> Iterator[int]:
        yield from range(5)
        raise KeyError("in the pieces")

    with pytest.raises(KeyError):
        threads.each(abs, broken())


def test_who_stops_reading_early_leaves_no_thread() -> None:
    threads.use(2)
    results = threads.mapped(abs, range(1000))
    assert next(results) == 0
    del results  # the fixture looks


@pytest.mark.parametrize("count", [0, -1, 4097])
def test_another_number_of_threads_is_refused(count: int) -> None:
    with pytest.raises(ConfigError):
        threads.use(count)


@pytest.mark.parametrize(("named", "count"), [("1", 1), ("0", 1), ("x", 0), ("", 0), ("9" * 40, 0), ("²", 0)])
def test_a_process_begins_with_what_omp_num_threads_says_or_its_cores(named: str, count: int) -> None:
    code = "import os; from fedveil.common import threads; print(threads.in_use(), len(os.sched_getaffinity(0)))"
    out = subprocess.run(
        [sys.executable, "-c", code], env={"OMP_NUM_THREADS": named}, capture_output=True, text=True, check=True
    )
    found, cores = map(int, out.stdout.split())
    assert found == (count or cores)


@given(st.integers(0, 100), st.integers(1, 40), st.integers(0, 20))
def test_spans_cover_everything_once(stop: int, length: int, start: int) -> None:
    parts = list(threads.spans(stop, length, start))
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(start, stop))
    assert all(p.stop - p.start == length for p in parts[:-1])


FAULTS = """
import resource
from fedveil.privacy.secagg import lattice

stream = lattice.Uniform(lattice.Stream(bytes(32)))
for _ in range(5):
    stream.take(16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    stream.take(16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own way")
def test_the_memory_of_a_chunk_serves_the_next_one() -> None:
    def faults(**env: str) -> int:
        out = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
        return int(out.stdout)

    assert faults() < 2000  # a chunk's temporaries have about 500 pages
    fixed = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    assert faults(**fixed) > 10_000  # negative control: what glibc does by itself
