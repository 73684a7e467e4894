"""One reader for text: encodings, marks, line ends and escapes, for every division into blocks."""

import codecs
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


ENCODINGS = ["utf-8-sig", "utf-8", "utf-16", "utf-32", "latin-1"]
CHARACTERS = st.characters(exclude_categories=["Cs"], max_codepoint=0xFF) | st.characters(exclude_categories=["Cs"])


def their_text(data):
    """Return the text that Python's own decoders find, which need to be told the encoding."""
    for marks, encoding in (
        ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"),
        ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16"),
    ):
        if data.startswith(marks):
            return data.decode(encoding)
    return data.decode("utf-8-sig")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(CHARACTERS, max_size=20),
    encoding=st.sampled_from(ENCODINGS),
    edit=st.none() | st.tuples(st.integers(0, 30), st.binary(max_size=2)),
)
def test_random_bytes_are_read_as_python_decodes_them_or_refused_by_name(tmp_path, text, encoding, edit):
    data = text.encode(encoding, errors="replace")
    if edit is not None:
        data = data[: edit[0]] + edit[1] + data[edit[0] + 1 :]
    path = tmp_path / "random.txt"
    path.write_bytes(data)
    try:
        found = read_utf8(path)
    except ValueError as error:
        message = str(error)
        found = None
    if found is None:
        assert "random.txt" in message
        assert edit is not None or "\0" in text or encoding == "latin-1"
    else:
        assert found == their_text(data)
        assert "\0" not in found


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
