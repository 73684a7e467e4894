"""Write a corpus for experiments on a GPU, about 250 MB of Python source, from the installed packages:

    python -m scripts.python_files data/python.jsonl
    python -m data.prepare text data/python.jsonl --out data/python --tokenizer bpe:50257 --val-fraction 0.01

Each file is a document. The first line of a document is the path of the file. So the prompt of a model that is trained
on this corpus can begin with a path that says what the file is about.
"""

from __future__ import annotations

if not __package__:  # started by its path: the imports below would fail
    raise SystemExit("Run this in the root of the repository: python -m scripts.python_files")

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from command import CommandParser, ending

FEWEST, MOST = 500, 200_000  # characters of a file: shorter files hardly contain code, longer ones are mostly tables
LEFT_OUT = {"plotly"}  # its files are generated and nearly equal


def documents(packages: Path) -> Iterator[str]:
    """Yield the files, without duplicates, in the order of a hash of their paths.

    This order mixes the packages: eval.tokens uses the beginning of the validation split, which then has many of them.
    """
    seen = set()
    paths = {path.relative_to(packages).as_posix(): path for path in packages.rglob("*.py")}
    for name in sorted(paths, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            text = paths[name].read_text(encoding="utf-8")
        except ValueError:  # an old file in another encoding
            continue
        digest = hashlib.sha256(text.encode()).digest()  # so that not all texts stay in memory
        if FEWEST <= len(text) <= MOST and digest not in seen and name.split("/")[0] not in LEFT_OUT:
            seen.add(digest)
            yield f"# {name}\n{text}"


def main() -> None:
    parser = CommandParser(
        prog="python -m scripts.python_files",
        description="Write the Python files of the installed packages as JSON lines.",
    )
    parser.add_argument("out", type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path(sysconfig.get_path("purelib")),
        metavar="DIR",
        help="default: the packages of this Python",
    )
    args = parser.parse_args()
    with ending(parser):
        if not args.packages.is_dir():
            raise FileNotFoundError(f"--packages {args.packages}: there is no such directory")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(args.packages))


if __name__ == "__main__":
    main()
