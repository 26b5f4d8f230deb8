"""CPU seconds (user and system) from the shell's point of view: every command's help, and ``import fedveil``."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer

from fedveil.common.cli import build

TARGET_HELP_S, TARGET_IMPORT_S, REPEATS = 0.3, 0.1, 3


def helps(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group, the program itself first."""
    yield words
    if isinstance(command, click.Group):
        for name in command.commands:
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from helps(found, (*words, name))


def cpu(*arguments: str) -> float:
    """The least CPU seconds of a few runs of this Python with ``arguments``."""
    found = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(found)


@pytest.mark.bench
def test_starting() -> None:
    rows = {"python -c pass": cpu("-c", "pass"), "import fedveil": cpu("-c", "import fedveil")}
    for words in helps(typer.main.get_command(build())):
        rows[" ".join(["fedveil", *words, "--help"])] = cpu("-m", "fedveil", *words, "--help")
    print(f"\nCPU seconds (targets: help {TARGET_HELP_S}, import {TARGET_IMPORT_S})")
    for name, seconds in rows.items():
        print(f"{seconds:6.3f}  {name}")
    assert len(rows) > 50
