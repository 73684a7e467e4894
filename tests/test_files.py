"""Safe writing of files: the old content survives a failed write, and errors name the file."""

import hashlib
import json
import os

import pytest

from files import PARTIAL_SUFFIX, check_writable, file_sha256, write_json


def test_write_json_replaces_the_file_and_leaves_no_partial_file(tmp_path):
    path = tmp_path / "a.json"
    for value in ({"loss": 1.5}, {"name": "naïve"}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_failed_write_names_the_file_and_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.json: No space left on device"):
        write_json(path, 2)
    assert json.loads(path.read_text()) == 1
    assert (tmp_path / f"a.json{PARTIAL_SUFFIX}").exists()


def test_a_path_that_cannot_be_written_is_refused_and_a_check_writes_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    check_writable(tmp_path / "a")
    check_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    with pytest.raises(FileNotFoundError, match=f"there is no directory {tmp_path}/none"):
        check_writable(tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError, match="it is a directory, expected the name of a file"):
        check_writable(tmp_path)
    read_only = []  # root may write everywhere, so say that these are read-only
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) not in read_only)
    for place, path in ((tmp_path / "a", tmp_path / "a"), (tmp_path, tmp_path / "new")):
        read_only[:] = [(place, os.W_OK)]
        with pytest.raises(PermissionError, match=f"cannot write {path}: it is read-only"):
            check_writable(path)
