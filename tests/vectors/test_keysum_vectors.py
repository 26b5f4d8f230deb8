"""The committed vectors are what the package makes, and what a second implementation makes."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENT = json.loads((HERE / "keysum.json").read_text())


def test_the_package_makes_the_committed_vectors_byte_for_byte():
    assert _load("generate").document() == (HERE / "keysum.json").read_text()


def test_a_second_implementation_agrees():
    assert len(_load("verify").verify(DOCUMENT)) == 4


@pytest.mark.parametrize("path", [("contributions", "site-0", "ciphertext"), ("contributions", "site-2", "shares"),
                                  ("digest",), ("answers", "site-1", "answer"), ("sums",), ("opening",),
                                  ("fingerprints", "site-2")])  # fmt: skip
def test_the_verifier_notices_a_byte_that_differs(path):
    case = copy.deepcopy(DOCUMENT["cases"][0])
    place = case["expected"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = "0" * 64
    with pytest.raises(AssertionError):
        _load("verify").verify({"cases": [case]})


def test_the_verifier_shares_no_code_with_the_package():
    tree = ast.parse((HERE / "verify.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not [n for n in names if n.startswith(("fedveil", "tenseal", "privacy", "common"))]


def test_nothing_in_the_package_takes_a_seed():
    """Scripting the operating system's randomness is what the generator does; there is no door for it inside."""
    untouched = os.urandom
    _load("generate").make(_load("generate").CASES[0])
    assert os.urandom is untouched
    room = HERE.parents[1] / "privacy" / "secagg"
    for path in room.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and path.name != "committee.py":
                assert not [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg in ("seed", "rng", "entropy")]
