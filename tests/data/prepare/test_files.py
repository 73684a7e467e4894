"""Directory walks: which files are documents, what is skipped, and when a source has changed."""

import os

import pytest

from data.prepare.files import display_name, files_revision, find_files
from data.prepare.source import ParseOptions, SourceFile
from data.prepare.text import read_chunks


def test_hidden_files_are_passed_over_and_suffixes_match_in_any_case(run, read_documents, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    for name in (".ipynb_checkpoints/a.txt", "__MACOSX/a.txt", "deep/.git/a.txt", "deep/c.Txt", "notes.doc"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(name)
    for name in ("a.txt", "B.TXT", "._a.txt"):
        (corpus / name).write_text(name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.txt").write_text("linked")
    (corpus / "link").symlink_to(tmp_path / "other")
    run("text", corpus, "--out", tmp_path / "out", "--val-fraction", 0)
    assert read_documents(tmp_path / "out", "train") == ["B.TXT", "a.txt", "deep/c.Txt"]
    printed = capsys.readouterr().err
    assert "corpus: 3 files to read; skipped (hidden, of another type, or a linked directory): 6: " in printed
    (corpus / "B.TXT").rename(corpus / "b.txt")
    names = [path.name for path in find_files(f"{corpus}/*.txt")]
    assert names == ["a.txt", "b.txt"]
    assert not capsys.readouterr().err


def test_edited_file_of_the_same_size_is_noticed(run, refused, tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("The first edition.\n")
    run("text", path, "--out", out, "--val-fraction", 0)
    status = path.stat()
    path.write_text("The final edition.\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    message = refused("text", path, "--out", out, "--val-fraction", 0)
    assert "the source files have changed (earlier: 19 bytes in 1 file, modified " in message
    path.write_text("The first edition.\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "the source files have changed" in refused("text", path, "--out", out, "--val-fraction", 0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    run("text", path, "--out", out, "--val-fraction", 0)


def test_revision_depends_on_names_both_ends_and_order(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    seen = set()
    for content in (b"x" * 200_000, b"x" * 199_999 + b"y", b"y" + b"x" * 199_999, b"x" * 200_001):
        for path in (a, b):
            path.write_bytes(content)
            os.utime(path, ns=(10**18, 10**18))
        seen |= {files_revision([a]), files_revision([b]), files_revision([a, b]), files_revision([b, a])}
    assert len(seen) == 16


def test_file_names_that_are_not_utf8(run, read_documents, tmp_path):
    directory = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(directory)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with open(directory + b"/caf\xe9.txt", "wb") as file:
        file.write(b"open")
    path = os.fsdecode(directory + b"/caf\xe9.txt")
    run("text", path, "--out", tmp_path / "out", "--val-fraction", 0)
    assert read_documents(tmp_path / "out", "train") == ["open"]
    assert display_name(path).endswith(r"caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(b"\0")
    # The standard error of a process shows such names escaped; that of pytest does not.
    with pytest.raises(ValueError, match="not a text file"):
        list(read_chunks(SourceFile(path, 1), 1_000, ParseOptions()))
