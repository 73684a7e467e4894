"""Write JSON atomically, check outputs, delete directories, flush renames to disk, and hash files.

Uses only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# Files and directories are written under their final name plus this suffix, and renamed when they are complete.
PARTIAL_SUFFIX = ".partial"


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON. After a crash the file holds either the old content or the new one.

    Raises OSError, naming the path, if the file cannot be written.
    """
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            # The content must be on the disk before the rename, or a power failure can leave an empty file.
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    os.replace(temporary, path)
    sync_directory(path.parent)


def check_writable(path: Path) -> None:
    """Raise OSError, naming the path, if a file at `path` could not be written. The check itself writes nothing.

    A command calls this function before long work, whose result would otherwise be lost.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory, expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is read-only for this user, choose another place")


def discard(path: Path) -> None:
    """Delete a directory or file that is not needed any more. If `path` is a link, only the link is deleted.

    An error is printed on stderr and not raised, because the files that remain only use space.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            # Rename the directory first. Then it does not look complete if the process is killed during the deletion.
            shutil.rmtree(path if path.suffix == PARTIAL_SUFFIX else path.rename(f"{path}{PARTIAL_SUFFIX}"))
    except OSError as error:
        print(f"{path} could not be deleted ({error}): delete it to free its space", file=sys.stderr)


def apply_umask(path: Path) -> None:
    """Give the file at `path` the permissions of a new file, which depend on the process's umask.

    Libraries that write a temporary file first, such as safetensors, leave a file that only its owner can read.
    """
    probe = path.with_name(path.name + ".mode")
    probe.touch()  # a new file, because os.umask cannot read the umask without changing it for all threads
    path.chmod(probe.stat().st_mode)
    probe.unlink()


def sync_directory(directory: Path) -> None:
    """Flush `directory` to the disk, so that the renames inside it survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the sha256 of the file at `path`, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
