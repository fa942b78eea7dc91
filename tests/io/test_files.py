"""Atomic writing and the probe of the output folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mnp_fast.io import atomic_path, ensure_writable


def test_atomic_path_replaces_the_file_on_success(tmp_path: Path) -> None:
    target = tmp_path / "result.npz"
    target.write_text("old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_nothing_behind(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    target = tmp_path / "result.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "result.txt"):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "result.txt").stat().st_mode) == 0o640


def test_atomic_path_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "missing" / "file"):
        pass


def test_ensure_writable_creates_and_leaves_the_folder_empty(tmp_path: Path) -> None:
    folder = ensure_writable(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_ensure_writable_names_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output folder '.*file/out' cannot be written"):
        ensure_writable(tmp_path / "file" / "out")


def test_ensure_writable_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output folder '.*file' cannot be written"):
        ensure_writable(tmp_path / "file")


def test_ensure_writable_finds_a_file_system_without_files() -> None:
    # Nobody, root included, can make files in /proc.
    with pytest.raises(OSError, match="output folder '/proc/self' cannot be written"):
        ensure_writable("/proc/self")
