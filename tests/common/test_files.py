"""Files that are whole or absent after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedveil.common import files


def test_a_file_is_made_and_replaced_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    files.write_durably(path, b"old")
    files.write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["c.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_before_the_new_name_leaves_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "c.json"
    files.write_durably(path, b"old")

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), crash)
    with pytest.raises(OSError, match="power cut"):
        files.write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(fd: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "bytes")
        fsync(fd)

    def named(self: Path, target: Path) -> Path:
        seen.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    files.write_durably(tmp_path / "c.json", b"new")
    assert seen == ["bytes", "name", "folder"]


def test_what_was_half_written_is_gone_after_an_error_and_after_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")
    part = tmp_path / ".part-a.csv"

    def broken_off() -> None:
        with files.replacing(path) as name:
            name.write_bytes(b"new")
            assert part.read_bytes() == b"new"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert (os.listdir(tmp_path), path.read_bytes()) == (["a.csv"], b"old")
    part.write_bytes(b"left by a killed process")
    with files.replacing(path) as part:
        assert not part.exists()
        part.write_bytes(b"new")
    assert (os.listdir(tmp_path), path.read_bytes()) == (["a.csv"], b"new")


def test_a_scratch_folder_of_a_killed_process_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a[1].csv"
    with files.scratch(path) as living:
        assert living.stat().st_mode & 0o777 == 0o700
        (living / "x").touch()
        left = tmp_path / f".{path.name}.scratch-left"
        left.mkdir()
        (left / "x").touch()
        others = [tmp_path / f".{path.name}.kept", tmp_path / ".b.csv.scratch-other"]
        for other in others:
            other.mkdir()
        with files.scratch(path) as second:
            assert second != living
        assert not left.exists()
        assert (living / "x").exists()
    assert sorted(tmp_path.iterdir()) == sorted(others)
