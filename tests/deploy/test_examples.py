"""Every command that an example's README shows runs, in its order, in a copy of the example's folder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.common import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a reader has to see: by example, a part of a command and what it prints.
SAYS = {
    "persons": {
        "contract check": "k counts persons, with up to 3 rows each",
        "data check": "verified release",
        "mondrian": "k = 12",
        "data risk": "0.2500",
        "plan": "hides one person",
    },
}


def test_every_example_is_run() -> None:
    assert {p.parent.name for p in EXAMPLES.glob("*/README.md")} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_its_commands_run_as_they_stand_there(name, tmp_path, monkeypatch) -> None:
    shutil.copytree(EXAMPLES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    commands = re.findall(r"^    fedveil (.*)$", Path("README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) > 5
    seen = dict.fromkeys(SAYS[name], "")
    for command in commands:
        pin = Path("consortium/consortium.pub")
        words = [pin.read_text().strip() if w == "KEY" else w for w in shlex.split(command)]
        done = CliRunner().invoke(cli.build(), words, env={"COLUMNS": "200"})
        assert done.exit_code == 0, (command, done.exception)
        seen |= {part: seen[part] + done.output for part in seen if part in command}
    for part, words in SAYS[name].items():
        assert words in seen[part], part
