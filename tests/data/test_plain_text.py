"""One reader for text: encodings, marks, line ends and escapes, for every division into blocks."""

import random

import pytest

from data.plain_text import line_feeds, read_escapes, read_utf8, separator_pattern, utf8_blocks


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_encodings_with_a_mark_are_decoded_for_every_division_into_blocks(encoding):
    text = "naïve — 日本語 👩‍👩‍👧\r\n" * 300
    data = ("\ufeff" + text).encode(encoding)
    rng = random.Random(0)
    for longest in (1, 2, 5, 7_000, 10**6):
        blocks, start = [], 0
        while start < len(data):
            blocks.append(data[start : (start := start + rng.randint(1, longest))])
        assert b"".join(utf8_blocks(blocks, "a.txt")).decode() == text


def test_read_utf8_names_file_and_line(tmp_path):
    path = tmp_path / "latin1.csv"
    path.write_bytes(b"text\ncaf\xe9 open\n")
    with pytest.raises(ValueError, match=r"latin1\.csv, line 2: byte 0xE9 is not UTF-8; save the file as UTF-8"):
        read_utf8(path)


def test_line_feeds_and_escapes():
    assert line_feeds(b"a\r\nb\rc\nd\r\r\n") == (b"a\nb\nc\nd\n\n", 4)
    assert line_feeds(b"a\nb") == (b"a\nb", 0)
    assert read_escapes(r"\n\t\r\\n\x41\u263a\q") == "\n\t\r\\nA☺\\q"
    assert read_escapes("<|endoftext|>\n") == "<|endoftext|>\n"


def test_separators_match_every_line_end():
    pattern = separator_pattern("\n---\n")
    for text in (b"a\n---\nb", b"a\r\n---\r\nb", b"a\r---\rb", b"a\r\n---\nb"):
        found = pattern.search(text)
        assert found
        assert text[: found.start()] == b"a"
        assert text[found.end() :] == b"b"
    assert not pattern.search(b"a\r\n---\r")  # \n may follow
