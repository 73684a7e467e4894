"""For a source with few documents, hold out the end of the text for validation: a whole document would be too much."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from data.plain_text import HEAD_BYTES, detect_encoding
from data.prepare.documents import Documents, parse
from data.prepare.encode import ValidationRule
from data.prepare.files import compression, file_format, is_remote
from data.prepare.source import Source, SourceFile
from data.prepare.text import LONGEST_PIECE, named_errors, open_file, text_blocks
from data.tokenizer import Tokenizer

MANY_DOCUMENTS = 20  # with at least this many documents, a hash of each document decides its split
# Borders are searched at most this many bytes before and after the place that gives the split its requested size.
SEARCHED_BYTES = 1 << 20
# A text of fewer bytes is not divided between words, only at the border of a file, a paragraph or a line.
SHORT_TEXT = 1_000
# An estimate of the bytes per token, for a tokenizer that will be made from the text.
BYTES_PER_TOKEN = 3.0

_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
# A match ends at a border: the beginning of a paragraph or a line, or the space before a word.
_BORDERS = {
    "paragraph": re.compile(rb"\S[ \t]*" + _LINE_END + rb"(?:[ \t]*" + _LINE_END + rb")+(?=[^\r\n])"),
    "line": re.compile(rb"\S[ \t]*" + _LINE_END + rb"+(?=[^\r\n])"),
    "word": re.compile(rb"[^\s](?=[ ][!-~\x80-\xff])"),
}


def has_few_documents(source: Source) -> bool:
    """Return whether the source has fewer than MANY_DOCUMENTS files, all of them text files of one document each."""
    return (
        len(source.files) < MANY_DOCUMENTS
        and not source.options.separator
        and all(file.split is None and file_format(file.name) == "text" for file in source.files)
    )


def hold_out_end(
    source: Source, rule: ValidationRule, kind: str, tokenizer: Tokenizer | None
) -> tuple[Source, ValidationRule]:
    """Return the source with the end of its text as the validation split, and the rule that describes this split.

    The split has about the size that `rule` asks for, and begins at a border of a file, paragraph, line or word (see
    `_find_border`). If there is no such border, `source` and `rule` are returned unchanged. Documents that the filters
    leave out do not count, and are not divided.

    Args:
        source: a source for which `has_few_documents` is true.
        rule: states the fraction of the text to hold out, and perhaps a number of tokens, which is then a maximum.
        kind: kind of the tokenizer.
        tokenizer: the tokenizer, or None when it will be made from the text.
    """
    lengths = [_text_length(file) if _is_kept(file, source) else 0 for file in source.files]
    total = sum(lengths)
    size = max(1, round(total * rule.fraction))
    if rule.tokens is not None:
        # So far, `size` is a tenth of the text, because of other sources, at most one document in ten is held out.
        # Measure the bytes per token at the end of the text, because this part is held out.
        last = next((i for i in reversed(range(len(lengths))) if lengths[i]), 0)
        sample = b"".join(_read_part(source.files[last], max(0, lengths[last] - SEARCHED_BYTES // 4), lengths[last]))
        size = max(1, min(size, round(rule.tokens * _bytes_per_token(sample, kind, tokenizer))))
    found = _find_border(source, lengths, total - size, size)
    if found is None:
        return source, rule
    index, offset, border = found
    files: list[SourceFile] = []
    for i, (file, length) in enumerate(zip(source.files, lengths, strict=True)):
        if i == index and offset:
            # `size`, for the progress display, counts bytes of the stored file, but `offset` those of the decoded text.
            first = round(file.size * offset / length)
            files.append(replace(file, split="train", end=offset, size=first))
            files.append(replace(file, split="val", begin=offset, end=length, size=file.size - first))
        else:
            files.append(replace(file, split="val" if i >= index else "train"))
    held_out = sum(lengths[index:]) - offset
    description = f"the last {held_out:,} of {total:,} bytes of the text, from the border of a {border}"
    return replace(source, files=tuple(files)), ValidationRule(description, rule.fraction or 0.1)


def _is_kept(file: SourceFile, source: Source) -> bool:
    """Return whether the filters keep the document of a text file."""
    if not source.options.filters.by_text:
        return True
    chunk, *more = itertools.islice(source.read(file, LONGEST_PIECE), 2)
    return bool(more or parse(chunk, source.options, Documents()).texts)  # a document of several chunks is always kept


def _bytes_per_token(sample: bytes, kind: str, tokenizer: Tokenizer | None) -> float:
    text = sample.decode(errors="replace")
    if kind == "char" or tokenizer is None:
        return len(sample) / max(len(text), 1) if kind == "char" else BYTES_PER_TOKEN
    return len(sample) / max(len(tokenizer.encode(text)), 1)


def _text_length(file: SourceFile) -> int:
    """Return the number of bytes of the file's text as UTF-8, without a byte-order mark."""
    with named_errors(file.name), open_file(file.name) as raw:
        if not is_remote(file.name) and not compression(file.name):
            encoding, mark = detect_encoding(raw.read(HEAD_BYTES), file.name)
            if encoding == "utf-8":
                return file.size - mark
            raw.seek(0)
        return sum(map(len, text_blocks(file, raw)))


def _read_part(file: SourceFile, begin: int, end: int) -> Iterator[bytes]:
    """Iterate, in blocks, over the bytes begin..end - 1 of the file's text as UTF-8."""
    with named_errors(file.name), open_file(file.name) as raw:
        if not is_remote(file.name) and not compression(file.name):
            encoding, mark = detect_encoding(raw.read(HEAD_BYTES), file.name)
            if encoding == "utf-8":
                raw.seek(mark + begin)
                yield raw.read(end - begin)
                return
            raw.seek(0)
        yield from text_blocks(replace(file, begin=begin, end=end), raw)


def _find_border(source: Source, lengths: list[int], target: int, size: int) -> tuple[int, int, str] | None:
    """Return (index of the file, offset in its text, kind) of a border near byte `target` of all text.

    Returns None if there is no border. `lengths` are the numbers of bytes of text in the files, and `size` is the
    requested size of the split in bytes. Searches one kind of border after the other, in the order below. Of the first
    kind that is found, chooses the border nearest to `target`:

    1. A paragraph or a file, if the split then has between size / 2 and max(2 * size, total / 10) bytes, where `total`
       is the sum of `lengths`.
    2. A line.
    3. Any paragraph or file.
    4. A word, if the text has at least SHORT_TEXT bytes.
    """
    total, begin = sum(lengths), 0
    candidates: dict[str, list[tuple[int, int, int]]] = {"paragraph": [], "line": [], "word": []}
    for i, length in enumerate(lengths):
        if 0 < begin < total:
            candidates["paragraph"].append((begin, i, 0))
        low, high = max(0, target - SEARCHED_BYTES - begin), min(length, target + SEARCHED_BYTES - begin)
        if low < high:
            text = b"".join(_read_part(source.files[i], low, high))
            last = low + len(text.rstrip())  # only white space follows this place, so a border after it is not used
            for kind, pattern in _BORDERS.items():
                places = (low + match.end() for match in pattern.finditer(text))
                candidates[kind] += [(begin + at, i, at) for at in places if at < last]
        begin += length
    near = [c for c in candidates["paragraph"] if size / 2 <= total - c[0] <= max(2 * size, total / 10)]
    for border, found in (
        ("paragraph", near),
        ("line", candidates["line"]),
        ("paragraph", candidates["paragraph"]),
        ("word", candidates["word"] if total >= SHORT_TEXT else []),
    ):
        if found:
            _, i, offset = min(found, key=lambda place: (abs(place[0] - target), place[0]))
            return i, offset, border if offset else "file"
    return None
