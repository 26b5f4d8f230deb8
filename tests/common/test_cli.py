"""The command as a process of its own: what the operating system refuses it, and signals that end it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

FEDVEIL = [sys.executable, "-c", "from fedveil.common.cli import main; main()"]


def ended(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FEDVEIL, *map(str, arguments)], stderr=subprocess.PIPE, text=True, check=False, **more)  # type: ignore[call-overload]


def two_lines(done: subprocess.CompletedProcess[str], word: str) -> None:
    first, second = done.stderr.splitlines()
    assert first.startswith("StoreError: ")
    assert word in first
    assert second.startswith("  what to do: ")
    assert done.returncode == 52


def test_a_file_that_does_not_fit_on_the_disk_is_a_store_error(tmp_path: Path) -> None:
    """The write itself fails, and such an error has no file's name."""

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    done = ended("provision", "new", tmp_path / "pki", "--site", "a", stdout=subprocess.DEVNULL, preexec_fn=little)
    two_lines(done, "File too large")


def command(line: str) -> list[str]:
    """A command that consists of one line."""
    code = f"""
import errno, sys, typer
from fedveil.common import cli
app = typer.Typer()
@app.command()
def only():
    {line}
cli.build = lambda: app
cli.main()
"""
    return [sys.executable, "-c", code]


def test_a_closed_output_hides_neither_an_error_nor_its_exit_code(tmp_path: Path) -> None:
    done = ended("plan", tmp_path / "nope", preexec_fn=lambda: os.close(1))
    assert done.returncode == 10, done.stderr
    assert done.stderr.startswith("ConfigError: ")
    assert ended("--help", preexec_fn=lambda: os.close(1)).returncode == 0


def test_too_many_open_files_is_a_store_error() -> None:
    run = command("raise OSError(errno.EMFILE, 'a value')")
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    two_lines(done, "Too many open files")
    assert "a value" not in done.stderr


def test_output_that_cannot_be_written_is_a_store_error() -> None:
    with Path("/dev/full").open("w") as full:
        two_lines(ended("ledger", "--help", stdout=full), "No space left on device")


@pytest.mark.parametrize("line", ["typer.echo('x')", "print('x')", "print('x' * 100_000)"])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(line: str) -> None:
    """Also where the output is still buffered when the command has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command(line), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
