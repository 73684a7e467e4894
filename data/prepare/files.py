"""Find the files of a source in directories and by patterns, recognize their types, and compute their revision."""

from __future__ import annotations

import glob
import hashlib
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub

FORMATS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = (".gz", ".zst")
_KINDS = ".txt, .jsonl, .csv, .parquet or .arrow, plain, .gz or .zst"
# A directory that macOS adds to archives. Its files are named like the real files, but hold no text.
_NOT_TEXT = "__MACOSX"
HASHED_BYTES = 1 << 16  # `files_revision` hashes this many bytes at the beginning and at the end of a file


def find_files(pattern: str) -> list[Path]:
    """Return the files that one file name, directory or glob matches, sorted.

    Raises FileNotFoundError when there is none, ValueError when a file has an unknown type. In a directory, files of an
    unknown type are not an error: they are skipped, and their number is printed.
    """
    path = Path(pattern)
    if path.is_dir():
        return _walk(path)
    found = [path] if path.is_file() else _glob(pattern)
    if not found:
        raise FileNotFoundError(f"no such file, directory or pattern: {pattern}")
    for file in found:
        if not file_format(file.name):
            raise ValueError(f"{display_name(file)} has an unknown type: expected {_KINDS}")
    return found


def is_remote(name: str) -> bool:
    """Return whether a name is an address in an object store, such as s3://bucket/a.jsonl, instead of a local path."""
    return "://" in name


def file_system(address: str) -> Any:
    """Return fsspec's file system for an address. Raises ValueError for an unknown protocol or a missing package."""
    if address.startswith("hf://"):
        return huggingface_hub.HfFileSystem()
    try:
        return fsspec.core.url_to_fs(address)[0]
    except (ImportError, ValueError) as error:  # ValueError: unknown protocol
        raise ValueError(f"{address} cannot be opened: {error}") from error


def find_remote_files(address: str) -> dict[str, int]:
    """Return the address and the size in bytes of each file that one address, directory or pattern matches, sorted.

    Raises FileNotFoundError when there is none, OSError when the store cannot be read, ValueError when a file has an
    unknown type. In a directory, files of an unknown type are not an error: they are skipped.
    """
    system = file_system(address)
    try:
        is_directory = system.isdir(address)
        found = system.find(address, detail=True) if is_directory else system.glob(address, detail=True)
    except Exception as error:  # each store has its own exceptions, for a failed network or denied access
        raise OSError(f"{address} cannot be listed: {error}") from error
    sizes = {}
    for path, status in sorted(found.items()):
        if status["type"] == "file" and (file_format(path) or not is_directory):
            sizes[system.unstrip_protocol(path)] = status["size"]
    if not sizes:
        raise FileNotFoundError(f"no such file, directory with text, or pattern: {address}")
    for name in sizes:
        if not file_format(name):
            raise ValueError(f"{name} has an unknown type: expected {_KINDS}")
    return sizes


def _glob(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, sorted. `glob` itself excludes hidden files from the matches of `*`."""
    paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    return sorted(path for path in paths if path.is_file() and _NOT_TEXT not in path.parts)


def _walk(directory: Path) -> list[Path]:
    """Return the files of a known type below a directory, without hidden ones, and print how many files were skipped.

    Linked directories are not entered. Raises FileNotFoundError when no file is found.
    """
    found: list[Path] = []
    passed_over: list[Path] = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        parts = path.relative_to(directory).parts
        hidden = any(part.startswith(".") or part == _NOT_TEXT for part in parts)
        usable = path.is_file() and not hidden and file_format(path.name)
        (found if usable else passed_over).append(path)
    if passed_over:
        names = ", ".join(display_name(path.relative_to(directory)) for path in passed_over[:3])
        print(
            f"{display_name(directory)}: {len(found):,} files to read; skipped (hidden, of another type, or a "
            f"linked directory): {len(passed_over):,}: {names}{', ...' if len(passed_over) > 3 else ''}",
            file=sys.stderr,
        )
    if not found:
        kinds = ", ".join(suffix + compression for compression in ("", *COMPRESSIONS) for suffix in FORMATS)
        raise FileNotFoundError(f"no text in {display_name(directory)}: expected files named {kinds}")
    return found


def compression(name: str) -> str:
    """Return the compression of a file by its name, ignoring case: ".gz", ".zst", or "" for none."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def file_format(name: str) -> str | None:
    """Return the type of a file by its name, ignoring case: a value of FORMATS, or None for another type."""
    return FORMATS.get(Path(name.lower().removesuffix(compression(name))).suffix)


def display_name(path: str | Path) -> str:
    r"""Return a file name for messages and JSON: bytes that are not UTF-8 become `\xNN`."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def files_revision(paths: Iterable[str | Path]) -> str:
    """Return a text that identifies the version of files whose source states no revision.

    For a local file, the revision changes when its name, size, modification time, beginning or end changes. For a file
    in an object store, the revision changes when its address changes, or when the store reports another version.
    """
    names = [str(path) for path in paths]
    if any(map(is_remote, names)):
        keys = (file_system(name).ukey(name) if is_remote(name) else files_revision([name]) for name in names)
        versions = "".join(f"{name} {key}\n" for name, key in zip(names, keys, strict=True))
        return f"{len(names):,} files, sha256 of names and versions {hashlib.sha256(versions.encode()).hexdigest()}"
    listing = hashlib.sha256()
    count = size = newest = 0
    for path in map(Path, names):
        status = path.stat()
        listing.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        with open(path, "rb") as file:
            listing.update(file.read(HASHED_BYTES))
            file.seek(max(0, status.st_size - HASHED_BYTES))
            listing.update(file.read(HASHED_BYTES))
        count, size, newest = count + 1, size + status.st_size, max(newest, status.st_mtime_ns)
    modified = datetime.fromtimestamp(newest // 10**9, UTC).isoformat()
    return (
        f"{size:,} bytes in {count:,} file{'s' if count > 1 else ''}, modified {modified}, sha256 of names, sizes, "
        f"times, beginnings and ends {listing.hexdigest()}"
    )
