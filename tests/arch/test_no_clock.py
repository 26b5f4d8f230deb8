"""No test of the suite depends on how quick the machine is: none compares readings of a clock with anything.

Two things are allowed: a generous guard against hanging in a waiting helper (``until`` and the like, in WAITING), and a
time limit whose end a test wants to see. ``tests/bench`` compares times with times and is exempt, as is
``tests/fuzz/fuzzer.py``, which runs for as long as it is told.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parents[1]
FILES = sorted({*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")} - {*TESTS.glob("bench/**/*.py")})
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}
CLOCKS |= {f"{name}_ns" for name in CLOCKS}
WAITING = {"until", "wait", "pause"}


def reads_clock(node: ast.expr, readings: set[str]) -> bool:
    """Whether an expression holds a reading: a call of a clock, or a name that a reading was given."""
    for n in ast.walk(node):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in CLOCKS:
            if isinstance(n.func.value, ast.Name) and n.func.value.id == "time":
                return True
        if isinstance(n, ast.Name) and n.id in readings:
            return True
    return False


def targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) else []


def readings_of(function: ast.AST) -> set[str]:
    """Names in ``function`` that hold a reading or what was computed from one."""
    found, size = set[str](), -1
    while size != len(found):
        size = len(found)
        for node in ast.walk(function):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Lambda):
                continue  # a clock that is handed over, not read
            if targets(node) and isinstance(value, ast.expr) and reads_clock(value, found):
                found |= {t.id for x in targets(node) for t in ast.walk(x) if isinstance(t, ast.Name)}
    return found


def faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and kind of everything in a file that the clock decides."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        if function.name in WAITING:
            continue
        readings = readings_of(function)
        for n in ast.walk(function):
            if isinstance(n, ast.Compare) and any(reads_clock(x, readings) for x in (n.left, *n.comparators)):
                yield n.lineno, "compares with a reading of a clock"
    for n in ast.walk(tree):
        if not isinstance(n, ast.Call):
            continue
        name = n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
        given = {k.arg: k.value for k in n.keywords}
        if name == "settings" and "deadline" in given and not _is_none(given["deadline"]):
            yield n.lineno, "a deadline of hypothesis"
        if ast.unparse(n.func) in ("subprocess.run", "subprocess.check_output") and "timeout" in given:
            yield n.lineno, "a time limit of a command (the suite has one)"
        if ast.unparse(n.func) == "pytest.mark.timeout" and n.args and ast.literal_eval(n.args[0]) < 600:
            yield n.lineno, "a time limit of a test below 600 s"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_no_clock_decides(path: Path) -> None:
    assert [*faults(ast.parse(path.read_text()))] == []


def test_property_tests_have_no_deadline_and_the_suite_a_generous_limit(pytestconfig: pytest.Config) -> None:
    assert settings.default is not None
    assert settings.default.deadline is None
    assert float(pytestconfig.getini("timeout")) >= 900


PLANTED = """
def test_speed():
    start = time.process_time()
    work()
    assert 100 / (time.process_time() - start) > 7
"""


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (PLANTED, "compares"),
        ("def test():\n    took = (now := time.monotonic()) + 1\n    r = 5 / took\n    assert r > 3\n", "compares"),
        ("def test():\n    a, b = 1, time.perf_counter_ns()\n    while b < 3: pass\n", "compares"),
        ("@settings(max_examples=3, deadline=200)\ndef test(): pass\n", "deadline"),
        ("def test():\n    subprocess.run(['x'], timeout=60)\n", "command"),
        ("pytestmark = [pytest.mark.timeout(200)]\n", "below"),
    ],
)  # fmt: skip
def test_a_planted_one_is_found(code: str, kind: str) -> None:
    assert [what for _, what in faults(ast.parse(code)) if kind in what]


@pytest.mark.parametrize(
    "code",
    [
        "def test():\n    clock = lambda: time.time() + 60\n    assert work(clock) == 3\n",
        "@settings(max_examples=3, deadline=None)\ndef test(): pass\n",
        "def until(x):\n    end = time.monotonic() + 600\n    while not x(): assert time.monotonic() < end\n",
    ],
)
def test_what_does_not_decide_is_no_fault(code: str) -> None:
    assert [*faults(ast.parse(code))] == []
