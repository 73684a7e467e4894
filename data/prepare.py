"""Text to token shards, in one command: `python -m data.prepare SOURCE --out DIR`.

One process reads, cuts the source into pieces and writes; workers parse, encode and check them. Results are written in
the order of the source, so the bytes do not depend on the number of workers, and what has been written is recorded as
it grows, so that a run stopped anywhere continues there and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from command import ending
from data.encode import SPLITS, DatasetWriter, Encoder, Progress, Validation, encode_in_order, read_batches
from data.shards import (
    MAX_SHARD_TOKENS,
    PROGRESS_FILE,
    DatasetMeta,
    ShardWriter,
    list_shards,
    open_split,
    read_meta,
    write_json,
)
from data.sources import Options, Source
from data.sources.hub import PRESETS, TOKENIZED, download, hub_source
from data.sources.shakespeare import shakespeare_source
from data.sources.text import Documents, parse, text_source
from data.tokenizer import Tokenizer, load_tokenizer, parse_kind, train_tokenizer

PIECE_BYTES, MIN_PIECE_BYTES = 4 << 20, 1 << 16
SAVE_SECONDS = 5
SMALL_BYTES = 1 << 25
# A BPE is learnt from the first so many bytes of the train split; more text hardly moves its merges.
BPE_TRAINING_BYTES = 1 << 28


def make_tokenizer(kind: str, source: Source, validation: Validation) -> Tokenizer:
    """GPT-2's tokenizer, or one made from the source: "char" from all of it, "bpe:N" from its train split.

    Raises ValueError when the text is too little for N tokens.
    """

    def texts() -> Iterator[str]:
        read = 0
        for batch in read_batches(source, range(len(source.files)), (0, 0), PIECE_BYTES):
            for piece in batch:
                for text in parse(piece, source.options, Documents()).texts:
                    if kind == "char" or not validation.candidate(piece, text):
                        yield text.decode()
                        read += len(text)
                if kind != "char" and read > BPE_TRAINING_BYTES:
                    return

    tokenizer = train_tokenizer(kind, texts())
    size = parse_kind(kind)
    if size is not None and tokenizer.vocab_size < size:
        raise ValueError(
            f"the train split is too little text for {kind}: it gives {tokenizer.vocab_size:,} tokens; "
            f"use --tokenizer bpe:{tokenizer.vocab_size} or fewer"
        )
    return tokenizer


@dataclass(frozen=True)
class Job:
    """What the bytes of a dataset depend on, and where it goes. `part` is (index from 1, count).

    `tokenizer` is the kind, and `given` one that there is already; None to make it, or to take GPT-2's.
    """

    source: Source
    out: Path
    tokenizer: str
    validation: Validation
    shard_tokens: int
    part: tuple[int, int] = (1, 1)
    given: Tokenizer | None = None

    @property
    def files(self) -> range:
        """The files of this part: part 1 the first of them, part 2 the next ..."""
        index, count = self.part
        n = len(self.source.files)
        return range(n * (index - 1) // count, n * index // count)

    def settings(self) -> dict[str, Any]:
        """As `meta.json` states them."""
        return {
            "tokenizer": self.tokenizer,
            "source": self.source.name,
            "revision": self.source.revision,
            "filter": self.source.filter,
            "validation": self.validation.description,
            "shard_tokens": self.shard_tokens,
            "part": "" if self.part[1] == 1 else "{} of {}".format(*self.part),
        }


def prepare(job: Job, workers: int | None = None) -> DatasetMeta:
    """Make the dataset, or go on with it, or find it complete. Returns its description.

    `workers` processes encode: by default one for each core, or this one alone where starting others would take longer.
    Raises ValueError for text or options that cannot be used, OSError when something cannot be read or written.
    """
    lock = FileLock(job.out / ".lock")
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another `data.prepare` is at work in {job.out}: wait for it, or choose another --out") from None
    except OSError as error:
        raise OSError(f"cannot write to {job.out}: {error.strerror}; choose another --out") from error
    try:
        return _prepare(job, workers)
    finally:
        lock.release()
        (job.out / ".lock").unlink(missing_ok=True)


def _prepare(job: Job, workers: int | None) -> DatasetMeta:
    progress = _begin(job)
    if progress is None:
        meta = read_meta(job.out)
        assert meta is not None
        print(f"{job.out} is complete already: nothing to do")
        return meta
    if "tokenizer_sha256" in progress:
        tokenizer = load_tokenizer(job.out)
    else:
        if job.tokenizer != "gpt2" and not job.given:
            print(f"making a {job.tokenizer} tokenizer from the text ...", file=sys.stderr)
        tokenizer = job.given or make_tokenizer(job.tokenizer, job.source, job.validation)
        tokenizer.save(job.out)
        progress["tokenizer_sha256"] = tokenizer.fingerprint
        write_json(job.out / PROGRESS_FILE, progress)
    if job.tokenizer != "char" and not tokenizer.bulk_encoder.startswith("gigatoken"):
        print(f"gigatoken is not installed here: encoding with {tokenizer.bulk_encoder}, slower", file=sys.stderr)

    dataset = DatasetWriter(job.out, job.validation, job.shard_tokens, tokenizer.eot)
    # At the beginning too: what an earlier run left before its first record must not stay.
    dataset.restore(progress.get("state", dataset.state()))
    _encode(job, tokenizer, dataset, progress, workers)
    if job.part[1] == 1:
        _refuse_empty(job, dataset)
    return _finish(job, tokenizer, dataset)


def _begin(job: Job) -> dict[str, Any] | None:
    """What is recorded of this run and earlier ones, None when the dataset is complete."""
    path = job.out / PROGRESS_FILE
    settings = job.settings()
    meta = read_meta(job.out)
    used = None  # the tokenizer's hash, where one was made or given
    if path.exists():
        progress = json.loads(path.read_text(encoding="utf-8"))
        earlier, used = progress["settings"], progress.get("tokenizer_sha256")
        if "state" not in progress and earlier != settings:
            # Nothing was made yet, so other options, or a file that was mended, begin anew.
            progress, earlier = {"settings": settings}, settings
            write_json(path, progress)
    elif meta is not None:
        progress = None
        earlier, used = {key: getattr(meta, key) for key in settings}, meta.tokenizer_sha256
    elif list_shards(job.out, "train") or list_shards(job.out, "val"):
        raise ValueError(f"{job.out} holds shards that this command did not write: choose another --out")
    else:
        progress, earlier = {"settings": settings}, settings
        write_json(path, progress)
    if earlier != settings:
        changed = "; ".join(
            f"{key} {earlier[key]!r}, now {settings[key]!r}" for key in settings if earlier[key] != settings[key]
        )
        raise ValueError(
            f"{job.out} was prepared with other options ({changed}): choose another --out, or delete it to start again"
        )
    if job.given and used not in (None, job.given.fingerprint):
        raise ValueError(
            f"{job.out} was prepared with another {job.tokenizer} tokenizer: choose another --out, or delete it to "
            f"start again"
        )
    return progress


def _encode(
    job: Job, tokenizer: Tokenizer, dataset: DatasetWriter, progress: dict[str, Any], workers: int | None
) -> None:
    limit = min(PIECE_BYTES, max(MIN_PIECE_BYTES, job.shard_tokens // 4))
    total = sum(job.source.files[i].size for i in job.files)
    # a shard that will not be full is checked as often as a full one; few texts have more than 8 bytes a token
    encoder = Encoder(tokenizer, job.source.options, job.validation, min(job.shard_tokens, max(1, total // 8)))
    if workers is None:
        workers = 1 if total < SMALL_BYTES else available_cores()
    file, piece = dataset.counted["position"]
    batches = read_batches(job.source, job.files, (file, piece), limit)
    saved, shards = time.monotonic(), -1
    bar = Progress(total, dataset)
    for pieces, encoded in encode_in_order(batches, encoder, job.out, workers):
        dataset.add(pieces, encoded)
        bar.update()
        finished = sum(len(writer.finished) for writer in dataset.writers.values())
        if finished != shards or time.monotonic() - saved > SAVE_SECONDS:
            progress["state"] = dataset.state()
            write_json(job.out / PROGRESS_FILE, progress)
            saved, shards = time.monotonic(), finished
    bar.close()


def _refuse_empty(job: Job, dataset: DatasetWriter) -> None:
    documents = {split: writer.n_documents for split, writer in dataset.writers.items()}
    empty = [split for split in SPLITS if not documents[split]]
    if not empty or (empty == ["val"] and job.validation.fraction == 0):
        return
    dataset.discard()
    for name in (PROGRESS_FILE, "tokenizer.json", "tokenizer_config.json"):
        (job.out / name).unlink(missing_ok=True)
    names = [file.name for file in job.source.files]
    if len(empty) == len(SPLITS):
        raise ValueError(
            f"no text in {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: every document is empty"
        )
    raise ValueError(
        f"no document of {sum(documents.values())} fell into the {empty[0]} split ({job.validation.description}), and "
        "none is ever cut in two: give more documents, cut the text into documents with --separator, choose another "
        "--val-fraction, or do without validation with --val-fraction 0"
    )


def _finish(job: Job, tokenizer: Tokenizer, dataset: DatasetWriter) -> DatasetMeta:
    shards = {split: writer.finish() for split, writer in dataset.writers.items()}
    meta = DatasetMeta(
        **job.settings(),
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        tokens={split: writer.n_tokens for split, writer in dataset.writers.items()},
        documents={split: writer.n_documents for split, writer in dataset.writers.items()},
        text_bytes=dataset.counted["text_bytes"],
        shards=shards,
        skipped=dataset.counted["skipped"],
        versions=_versions(tokenizer),
    )
    meta.save(job.out)
    (job.out / PROGRESS_FILE).unlink()
    return meta


def available_cores() -> int:
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    names = ("tiktoken", "tokenizers", "pyarrow", "zstandard")
    return {"encoder": tokenizer.bulk_encoder, **{name: importlib.metadata.version(name) for name in names}}


def merge(directory: Path) -> DatasetMeta:
    """Join the parts in `directory` into one dataset, the same bytes as from a single run. The parts stay.

    Raises ValueError when a part is missing, damaged, or made with other options than the first.
    """
    if (meta := read_meta(directory)) is not None:
        print(f"{directory} is complete already: nothing to do")
        return meta
    parts = _find_parts(directory)
    first = next(iter(parts.values()))
    write_json(directory / PROGRESS_FILE, {"settings": {"parts": len(parts)}})
    tokenizer = load_tokenizer(next(iter(parts)))
    tokenizer.save(directory)
    writers = {split: ShardWriter(directory, split, first.shard_tokens, tokenizer.eot) for split in SPLITS}
    buffer = np.empty(1 << 22, np.uint16)
    for split, writer in writers.items():
        writer.restore(writer.state())
        for part, meta in parts.items():
            if not meta.tokens[split]:
                continue
            opened = open_split(part, split)
            opened.verify()
            for start in range(0, opened.n_tokens, len(buffer)):
                tokens = buffer[: opened.n_tokens - start]
                opened.read(start, tokens)
                writer.write(tokens)

    def total(key: str) -> dict[str, int]:
        return {name: sum(getattr(meta, key)[name] for meta in parts.values()) for name in getattr(first, key)}

    merged = replace(
        first,
        part="",
        shards={split: writer.finish() for split, writer in writers.items()},
        tokens=total("tokens"),
        documents=total("documents"),
        text_bytes=total("text_bytes"),
        skipped=total("skipped"),
    )
    merged.save(directory)
    (directory / PROGRESS_FILE).unlink()
    return merged


def _find_parts(directory: Path) -> dict[Path, DatasetMeta]:
    """All parts in order, each complete and made alike."""
    found = sorted(directory.glob("part-*-of-*"))
    if not found:
        raise ValueError(f"{directory} has no part-I-of-N: make the parts with --part I/N --out {directory}")
    count = int(found[0].name.rpartition("-")[2])
    parts: dict[Path, DatasetMeta] = {}
    for index in range(1, count + 1):
        part = part_directory(directory, (index, count))
        meta = read_meta(part) if part in found and not (part / PROGRESS_FILE).exists() else None
        if meta is None:
            raise ValueError(f"{part} is not complete: run the same command with --part {index}/{count} first")
        parts[part] = meta
        for key in ("tokenizer_sha256", "source", "revision", "filter", "validation", "shard_tokens"):
            if getattr(meta, key) != getattr(parts[found[0]], key):
                raise ValueError(f"{part} differs from {found[0]} in {key}: prepare it again")
    if len(found) != count:
        raise ValueError(
            f"{directory} has parts of different counts, {found[0].name} and {found[-1].name}: remove the old"
        )
    return parts


def part_directory(directory: Path, part: tuple[int, int]) -> Path:
    """Where part (index, count) goes; the dataset itself when there is one part."""
    return directory if part[1] == 1 else directory / "part-{:03d}-of-{:03d}".format(*part)


def _parse_part(text: str) -> tuple[int, int]:
    if text == "env":
        for rank, world in (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE")):
            if rank in os.environ and world in os.environ:
                return int(os.environ[rank]) + 1, int(os.environ[world])
        raise argparse.ArgumentTypeError("neither SLURM_PROCID and SLURM_NTASKS nor RANK and WORLD_SIZE are set")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: expected I/N with I from 1 to N, such as 1/8, or env")
    return int(index), int(count)


def _whole_number(text: str) -> int:
    digits = text.replace("_", "").replace(",", "")
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(digits)


def _shard_tokens(text: str) -> int:
    value = _whole_number(text)
    if value > MAX_SHARD_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is above {MAX_SHARD_TOKENS:,}, the most that a shard can count")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Turn text into token shards.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the dataset goes")
    shared.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="KIND|DIR",
        help="gpt2 (default), char, bpe:N; or as a dataset or checkpoint has it",
    )
    held_out = shared.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction", type=_fraction, metavar="F", help="share of the documents held out, by hash (default 0.01)"
    )
    held_out.add_argument(
        "--val-tokens", type=_whole_number, metavar="N", help="hold out documents, one in ten by hash, up to N tokens"
    )
    held_out.add_argument("--val", choices=["first-shard"], help="hold out the first documents, one shard of them")
    shared.add_argument(
        "--shard-tokens", type=_shard_tokens, default=100_000_000, metavar="N", help="default 100000000"
    )
    shared.add_argument("--workers", type=_whole_number, metavar="N", help="processes (default: one for each core)")
    shared.add_argument(
        "--part",
        type=_parse_part,
        default=(1, 1),
        metavar="I/N",
        help="do one part, from 1/N to N/N; env: as Slurm or torchrun say",
    )
    shared.add_argument("--strict", action="store_true", help="stop at empty documents and invalid UTF-8")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SOURCE")
    commands.add_parser("shakespeare", parents=[shared], help="38 plays, three of them held out")
    text = commands.add_parser(
        "text", parents=[shared], help="your own files: .txt, .jsonl, .parquet; plain, .gz, .zst"
    )
    text.add_argument("files", nargs="+", metavar="FILE|DIR|GLOB")
    text.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or parquet column (default text)")
    text.add_argument("--separator", metavar="TEXT", help="between the documents of a .txt (default: a file is one)")
    hub = commands.add_parser("hf", parents=[shared], help="a dataset of the Hugging Face hub, or a local copy of one")
    hub.add_argument("dataset", metavar="DATASET|DIR")
    hub.add_argument("--name", help="configuration, such as sample-10BT")
    hub.add_argument("--split", help="default: train, with validation where there is one as the validation split")
    hub.add_argument("--text-key", default="text", metavar="KEY", help="column or JSON key (default text)")
    for preset, (dataset, name) in PRESETS.items():
        described = " ".join(filter(None, (dataset, name)))
        command = commands.add_parser(preset, parents=[shared], help=f"hf {described}")
        command.add_argument("--from", dest="copy", metavar="DIR", help="a local copy of the dataset's directory")
    fetching = commands.add_parser("download", help="shards that are already tokenized")
    fetching.add_argument("tokenized", choices=list(TOKENIZED))
    fetching.add_argument("--out", type=Path, metavar="DIR", help="where the shards go (default: data/ and the name)")
    merging = commands.add_parser("merge", help="join the parts made with --part")
    merging.add_argument("directory", type=Path, metavar="DIR")
    return parser


def _job(args: argparse.Namespace) -> Job:
    given = load_tokenizer(args.tokenizer) if Path(args.tokenizer).is_dir() else None
    kind = given.kind if given else args.tokenizer
    parse_kind(kind)
    if args.command == "text":
        options = Options(args.text_key, args.separator, args.strict)
        source = text_source(args.files, options)
    elif args.command == "hf":
        options = Options(args.text_key, strict=args.strict)
        source = hub_source(args.dataset, args.name, args.split, options)
    elif args.command in PRESETS:
        dataset, name = PRESETS[args.command]
        options = Options(strict=args.strict)
        articles = args.command == "wikitext-103"
        source = hub_source(args.copy or dataset, name, None, options, articles)
    else:
        source = shakespeare_source()
    count = args.part[1]
    if count > len(source.files):
        raise ValueError(f"{len(source.files)} files cannot make {count} parts: a part is at least one file")
    chosen = args.val or args.val_tokens or args.val_fraction
    if any(file.split for file in source.files):
        if chosen is not None:
            raise ValueError(f"{args.command} has its own validation documents: leave --val... out")
        validation = Validation("as the source has it", 0.0)
    elif args.val:
        validation = Validation("first shard", 1.0, args.shard_tokens)
    elif args.val_tokens:
        validation = Validation(f"one document in ten by hash, {args.val_tokens} tokens", 0.1, args.val_tokens)
    else:
        fraction = 0.01 if args.val_fraction is None else args.val_fraction
        validation = Validation(f"{fraction:g} of the documents by hash", fraction)
    if validation.tokens and (count > 1 or (args.val and kind.startswith("bpe") and not given)):
        raise ValueError("--val-tokens and --val first-shard need the whole source in order: use --val-fraction here")
    out = part_directory(args.out, args.part)
    return Job(source, out, kind, validation, args.shard_tokens, args.part, given)


def _report(out: Path, meta: DatasetMeta) -> None:
    counts = (f"{meta.tokens[split]:,} {split} tokens (documents: {meta.documents[split]:,})" for split in SPLITS)
    print(f"{out}: {', '.join(counts)}; {meta.tokenizer}, vocabulary {meta.vocab_size:,}")
    text = sum(meta.text_bytes.values())
    print(f"shards: {sum(map(len, meta.shards.values()))}" + (f", from {text / 1e6:,.1f} MB of text" if text else ""))
    for name, said in (
        ("empty", "empty documents passed over"),
        ("invalid_utf8", "documents with U+FFFD put for invalid UTF-8"),
        (
            "longer_than_shard",
            "documents longer than a shard, going on in the next (as readers expect; or raise --shard-tokens)",
        ),
    ):
        if meta.skipped.get(name):
            print(f"{said}: {meta.skipped[name]:,}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; the same command goes on from here\n"):
        if args.command == "merge":
            out, meta = args.directory, merge(args.directory)
        elif args.command == "download":
            out = args.out or Path("data", args.tokenized)
            meta = download(args.tokenized, out)
        else:
            job = _job(args)
            out, meta = job.out, prepare(job, args.workers)
        _report(out, meta)


if __name__ == "__main__":
    main()
