"""Writing files so that an interruption never leaves half of one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block succeeds.

    The temporary file lies in the same folder and has the same suffix. It is flushed to disk before
    it takes the place of `path`; on any exception, `KeyboardInterrupt` included, it is removed and
    `path` stays as it was.

    Parameters
    ----------
    path
        The file to write. Its folder must exist.

    Yields
    ------
    Path
        An empty file to write to.

    Raises
    ------
    OSError
        The folder is missing or cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    # O_EXCL refuses a planted link; mode 0o666 leaves the permissions to the umask.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync(target.parent)


def ensure_writable(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` if needed and prove, by writing a probe file, that it can be written.

    Permission bits say nothing to root or about read-only file systems, so a file is written.
    Call it before a long computation whose results go there.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OSError
        The folder cannot be created or written; the message names it and the reason.
    """
    folder = Path(folder)
    probe = folder / f".probe.{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        code = error.errno or errno.EIO
        message = f"output folder '{folder}' cannot be written: {os.strerror(code)}"
        raise OSError(code, message) from error
    return folder


def existing_file(path: str | os.PathLike[str]) -> Path:
    """`path` if it is a file.

    Raises
    ------
    FileNotFoundError
        There is nothing at `path`.
    CheckpointError
        `path` is a folder or a device.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file '{path}'")
    if not path.is_file():
        raise CheckpointError(f"'{path}' is not a file")
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
