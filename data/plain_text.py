"""Read text files in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Refuse files that are not text."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

HEAD_BYTES = 1 << 12  # the encoding of a file is detected from this number of bytes at its beginning
# The byte-order marks. UTF-32 comes before UTF-16, because the mark of little-endian UTF-32 begins with the mark of
# little-endian UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = {
    b"PK\x03\x04": "a zip archive (.zip, .docx, .epub)",
    b"\x1f\x8b": "gzip data: name it .gz",
    b"\x28\xb5\x2f\xfd": "zstd data: name it .zst",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"%PDF-": "a PDF document",
    b"PAR1": "parquet data: name it .parquet",
}
_LINE_ENDS = re.compile(rb"\r\n?")
_ESCAPE = re.compile(r"\\(n|t|r|f|v|0|\\|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})")


def detect_encoding(head: bytes, name: str) -> tuple[str, int]:
    """Return the encoding of a file that begins with `head`, and the length of its byte-order mark in bytes (or 0).

    Without a mark the encoding is UTF-8. Raises ValueError, with `name` in the message, if the file is not text.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    for magic, kind in _BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is not a text file: it is {kind}; extract the text, or remove the file")
    refuse_nul(head, name)
    return "utf-8", 0


def refuse_nul(text: bytes, name: str) -> None:
    """Raise ValueError when `text` holds a NUL byte, which a text file never has."""
    if b"\0" in text:
        raise ValueError(
            f"{name} is not a text file: it holds NUL bytes; remove it, or save it as UTF-8 if it is UTF-16 or UTF-32 "
            "without a byte-order mark"
        )


def utf8_blocks(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Convert the content of a text file, given in blocks of bytes, to blocks of UTF-8 without a byte-order mark.

    Raises ValueError, naming the file, when its first HEAD_BYTES are not text, or when the file is not valid UTF-16 or
    UTF-32. Bytes that are not valid UTF-8 are not an error here: they are passed on unchanged.
    """
    iterator = iter(blocks)
    head = b""
    while len(head) < HEAD_BYTES and (block := next(iterator, b"")):
        head += block
    encoding, mark = detect_encoding(head[:HEAD_BYTES], name)
    rest = itertools.chain([head[mark:]], iterator)
    if encoding == "utf-8":
        yield from filter(None, rest)
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in rest:
            if text := decoder.decode(block):
                yield text.encode()
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise ValueError(f"{name} is not valid {encoding.upper()} ({error}): save it as UTF-8") from None


def read_utf8(path: Path) -> str:
    """Return the content of a small text file. The encoding is detected as in `utf8_blocks`, and line ends are kept.

    Raises ValueError naming the file when it is not a text file. For invalid UTF-8, the message also names the line.
    """
    data = b"".join(utf8_blocks([path.read_bytes()], str(path)))
    refuse_nul(data, str(path))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02X} is not UTF-8; save the file as UTF-8"
        ) from None


def line_feeds(text: bytes) -> tuple[bytes, int]:
    r"""Return `text` with each \r\n and each \r replaced by \n, and the number of replacements."""
    return _LINE_ENDS.subn(b"\n", text) if b"\r" in text else (text, 0)


def read_escapes(text: str) -> str:
    r"""Return the text of a command-line option, with each escape sequence replaced by its character.

    The sequences are `\n`, `\t`, `\r`, `\f`, `\v`, `\0`, `\\`, `\xNN`, `\uNNNN` and `\UNNNNNNNN`.
    """
    named = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}
    return _ESCAPE.sub(lambda found: named.get(found[1]) or chr(int(found[1][1:], 16)), text)


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    r"""Return a pattern that matches `separator` in the bytes of a text file, whose lines may end with \n, \r\n or \r.

    A \r alone matches as a line end only if a byte other than \n follows, so that no match ends inside a \r\n.
    """
    lines = separator.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))".join(re.escape(line.encode()) for line in lines))
