"""What an error tells a person to change exists, and is in the file that it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedveil
from fedveil.common import cli
from fedveil.common.contract import DataContract
from fedveil.common.contract.agreement import Quality
from fedveil.common.contract.columns import Column
from fedveil.common.settings import Federation, SiteSettings

ROOMS = ("common", "privacy", "client", "server", "deploy")
FILES = {"federation.toml": Federation, "site.toml": SiteSettings}
SECTIONS = {
    file: {s: set(f.annotation.model_fields) for s, f in kind.model_fields.items()} for file, kind in FILES.items()
}
FIELDS = {f for sections in SECTIONS.values() for fields in sections.values() for f in fields}
# Names of things that are set elsewhere: Python arguments, columns of a contract.
ELSEWHERE = {
    "batch_first", "track_running_stats", "max_norm", "use_base", "fixed_level",
    *DataContract.model_fields, *Quality.model_fields, *Column.model_fields,
}  # fmt: skip
# What a plan has beside its settings: from the roster, and what follows from the rest.
OF_A_PLAN = {"sites", "grid", "clamp"}
AT = re.compile(r"\[([a-z]+)\] ((?:[a-z_]+)(?:(?:, | or | and )[a-z_]+)*)?")
IN = re.compile(r"([a-z_]+)(?: = [^ ,;)]+)? in \[([a-z]+)\]")


def texts(node: ast.AST, constants: dict[str, str]) -> str:
    """The words of an expression, names of the module's own texts replaced by them."""
    parts = []
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            parts.append(n.value)
        elif isinstance(n, ast.Name) and n.id in constants:
            parts.append(constants[n.id])
    return " ".join(parts) if not isinstance(node, ast.JoinedStr) else "".join(parts)


def hints() -> Iterator[tuple[str, str]]:
    """``(where, words)`` of every ``hint=`` in the source, and of every table of remedies."""
    for room in ROOMS:
        for path in sorted((Path(fedveil.__file__).parent / room).resolve().rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            constants, where = {}, f"{room}/{path.name}"
            for n in tree.body:
                if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
                    if isinstance(n.value, ast.Constant) and isinstance(n.value.value, str):
                        constants[n.targets[0].id] = n.value.value
                    elif n.targets[0].id.startswith("_REMED") and isinstance(n.value, ast.Dict):
                        yield from ((f"{where}:{v.lineno}", texts(v, {})) for v in n.value.values)
            for n in ast.walk(tree):
                if isinstance(n, ast.Call):
                    yield from (
                        (f"{where}:{n.lineno}", texts(k.value, constants)) for k in n.keywords if k.arg == "hint"
                    )


HINTS = [(where, words) for where, words in hints() if words]


def test_there_are_hints():
    assert len(HINTS) > 400
    assert sum("site.toml" in words or "[site]" in words for _, words in HINTS) > 10


def named(words: str) -> Iterator[tuple[str, str]]:
    """Every ``(section, name)`` that a hint speaks of."""
    for section, names in AT.findall(words):
        if any(section in s for s in SECTIONS.values()) and names:
            yield section, re.split(", | or | and ", names)[0]
            yield from ((section, n) for n in re.split(", | or | and ", names)[1:] if n in FIELDS or "_" in n)
    yield from ((section, name) for name, section in IN.findall(words))


NOT_NAMES = {"of", "in", "on", "and", "or"}


def test_a_setting_that_a_hint_names_exists_in_the_file_that_it_names():
    wrong = []
    for where, words in HINTS:
        files = [f for f in FILES if f in words]
        at_site = where.startswith("client/") or "preflight" in where or "site_process" in where
        for section, name in named(words):
            if name in NOT_NAMES:
                continue
            possible = files or (["site.toml"] if at_site else list(FILES))
            if not any(name in SECTIONS[f].get(section, ()) for f in possible):
                wrong.append(f"{where}: [{section}] {name}: {words}")
    assert not wrong, "\n".join(wrong)


def test_a_section_is_of_the_file_that_is_named_beside_it():
    wrong = []
    for where, words in HINTS:
        known = {s for sections in SECTIONS.values() for s in sections}
        for section, file in re.findall(r"\[([a-z]+)\](?: [a-z_]+)? (?:of|in) (federation\.toml|site\.toml)", words):
            if section in known and section not in SECTIONS[file]:
                wrong.append(f"{where}: {words}")
    assert not wrong, "\n".join(wrong)


def test_every_name_with_an_underscore_is_one_that_somebody_can_set():
    wrong = [
        f"{where}: {name}: {words}"
        for where, words in HINTS
        for name in re.findall(r"(?<![\w./'-])[a-z]+(?:_[a-z]+)+(?![\w.(])", words)
        if name not in FIELDS | ELSEWHERE
    ]
    assert not wrong, "\n".join(wrong)


def test_no_hint_tells_to_change_what_follows_from_the_rest():
    """The grid, the clamp and the least number of members are computed; nobody can choose them."""
    computed = re.compile(r"(coarser|finer|another) grid|clamp|min_members")
    wrong = [f"{where}: {words}" for where, words in HINTS if computed.search(words)]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def options() -> set[str]:
    found, todo = set(), [cli.load(name) for name in cli.COMMANDS]
    while todo:
        command = todo.pop()
        todo += list(getattr(command, "commands", {}).values())
        found |= {o for p in command.params for o in p.opts if o.startswith("--")}
    return found


def test_every_option_that_a_hint_names_exists_and_its_setting_is_named_beside_it(options):
    """A site's table comes from options or from site.toml: who reads the hint may have used either."""
    wrong = []
    table = SECTIONS["site.toml"]["data"]
    for where, words in HINTS:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", words):
            setting = option[2:].replace("-", "_")
            if option not in options and option != "--isolation":  # flower-superlink's own
                wrong.append(f"{where}: {option}: {words}")
            elif where.startswith("client/") and setting in table and "[data]" not in words:
                wrong.append(f"{where}: {setting} in [data] of site.toml: {words}")
    assert not wrong, "\n".join(wrong)


def test_the_nearest_plan_speaks_of_settings():
    privacy = SECTIONS["federation.toml"]["privacy"]
    names = set()
    for path in sorted((Path(fedveil.__file__).parent / "privacy").resolve().rglob("*.py")):
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(n, ast.Call):
                for k in (k for k in n.keywords if k.arg == "nearest"):
                    dicts = [d for d in ast.walk(k.value) if isinstance(d, ast.Dict)]
                    names |= {key.value for d in dicts for key in d.keys if isinstance(key, ast.Constant)}
    assert len(names) > 3
    assert names <= privacy | OF_A_PLAN
