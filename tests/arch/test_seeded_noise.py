"""Seeded noise is for debugging a simulation. No real site, no server, no file and no message can ask for it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fedveil.common.settings import Federation, SiteSettings
from fedveil.privacy.plan import PrivacyPlan

SOURCE = Path(__file__).parents[2]
ROOMS = ("common", "privacy", "client", "server", "deploy")
# Who may ask whether a block is open, and who may open one.
ASKING = {"privacy/dp/noise.py", "privacy/dp/sampling.py", "privacy/dp/clipping/core.py", "deploy/lab/seeded_noise.py"}
OPENING = {"deploy/lab/seeded_noise.py"}
CARRYING = {"deploy/lab/execution.py", "deploy/lab/ray_sites.py"}  # who may import the module that opens one
# Where the word may stand: the lab, the command, and what says NOT PRIVATE of such a run.
NAMING = {
    "deploy/lab/resuming.py", "deploy/lab/simulate.py", "deploy/lab/execution.py", "deploy/lab/studies.py",
    "deploy/lab/run.py",
    "deploy/cli/simulate.py", "server/job.py", "privacy/report/history.py",
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    paths = [p for room in ROOMS for p in (SOURCE / room).rglob("*.py")]
    return {str(p.relative_to(SOURCE)): ast.parse(p.read_text()) for p in paths}


def imported(tree: ast.Module, module: str) -> set[str]:
    """What ``tree`` takes from ``module``; ``*`` for the module itself, however it is imported."""
    found: set[str] = set()
    parent, _, name = module.rpartition(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == parent and name in {a.name for a in node.names}:
            found.add("*")
        elif isinstance(node, ast.Import) and module in {a.name for a in node.names}:
            found.add("*")
        elif isinstance(node, ast.Constant) and node.value == module:  # import_module("...")
            found.add("*")
    return found


def test_only_the_lab_opens_a_block() -> None:
    taken = {path: imported(tree, "fedveil.privacy.dp.debug_noise") for path, tree in modules().items()}
    assert {p for p, names in taken.items() if names} == ASKING
    assert {p for p, names in taken.items() if names & {"seeded", "*"}} == OPENING
    lab = {p for p, tree in modules().items() if imported(tree, "fedveil.deploy.lab.seeded_noise")}
    assert lab == CARRYING


@pytest.mark.parametrize(
    "code",
    [
        "from fedveil.privacy.dp.debug_noise import seeded",
        "from fedveil.privacy.dp import debug_noise",
        "import fedveil.privacy.dp.debug_noise as d",
        "import importlib\nimportlib.import_module('fedveil.privacy.dp.debug_noise')",
    ],
)
def test_the_check_sees_every_way_to_import_it(code: str) -> None:
    """Negative control."""
    assert imported(ast.parse(code), "fedveil.privacy.dp.debug_noise") & {"seeded", "*"}


def test_the_word_stands_nowhere_else() -> None:
    word = "debug_noise_seed"
    named = {p for p in modules() if word in (SOURCE / p).read_text()}
    assert named == NAMING
    assert not {p for p in named if p.startswith(("client/", "common/", "privacy/secagg/", "privacy/dp/"))}


def test_no_setting_and_no_plan_has_such_a_field() -> None:
    for model in (SiteSettings, Federation, PrivacyPlan):
        assert "seed" not in str([n for n in model.model_json_schema().get("properties", {}) if "noise" in n])
        assert "debug" not in str(model.model_json_schema())
