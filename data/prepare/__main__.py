"""The command `python -m data.prepare SOURCE --out DIR`, which makes a dataset of token shards from text."""

from __future__ import annotations

if not __package__:  # started as `python data/prepare`: the imports below would fail
    raise SystemExit("Run this in the root of the repository: python -m data.prepare")

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from command import CommandParser, ending
from data.plain_text import read_escapes
from data.prepare.encode import SPLIT_OF_SOURCE, ValidationRule, split_by_hash
from data.prepare.executors import EXECUTORS, SlurmOptions, run_tasks
from data.prepare.filters import Filters, check_languages
from data.prepare.held_out import has_few_documents, hold_out_end
from data.prepare.hub import PRESETS, TOKENIZED, download, hub_source
from data.prepare.job import Job, prepare_dataset
from data.prepare.merge import merge_parts, part_directory
from data.prepare.shakespeare import shakespeare_source
from data.prepare.source import ParseOptions, Source
from data.prepare.text import text_source, unused_separators
from data.prepare.tokens import token_source
from data.prepare.writer import SPLITS, read_complete_meta, refuse_other_settings
from data.shards import MAX_SHARD_TOKENS, DatasetMeta
from data.tokenizer import load_tokenizer, parse_kind
from data.tokenizer_files import END_OF_TEXT


def _parse_part(text: str) -> tuple[int, int]:
    if text == "env":
        for rank, world in (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE")):
            if rank in os.environ and world in os.environ:
                return int(os.environ[rank]) + 1, int(os.environ[world])
        raise argparse.ArgumentTypeError("neither SLURM_PROCID and SLURM_NTASKS nor RANK and WORLD_SIZE are set")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a part: expected I/N with I from 1 to N, such as 1/8, or env"
        )
    return int(index), int(count)


def _whole_number(text: str) -> int:
    digits = text.replace("_", "").replace(",", "")
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(digits)


def _shard_tokens(text: str) -> int:
    value = _whole_number(text)
    if value > MAX_SHARD_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is above {MAX_SHARD_TOKENS:,}, the maximum for one shard")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction: expected a number from 0 to below 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m data.prepare", description="Make a dataset of token shards from text.")
    shared = _shared_options()
    commands = parser.add_subparsers(dest="command", required=True, metavar="SOURCE")
    commands.add_parser("shakespeare", parents=[shared], help="38 plays, three of which are held out for validation")
    text = commands.add_parser(
        "text", parents=[shared], help="your own files: .txt, .jsonl, .csv, .parquet or .arrow; plain, .gz or .zst"
    )
    text.add_argument("files", nargs="+", metavar="FILE|DIR|GLOB")
    text.add_argument(
        "--text-key", default="text", metavar="KEY", help="JSON key or table column that holds the text (default: text)"
    )
    text.add_argument(
        "--separator",
        metavar="TEXT",
        type=read_escapes,
        help=r"text between the documents of a .txt file, such as '\n\n' (default: a file is one document)",
    )
    tokens = commands.add_parser(
        "tokens",
        parents=[shared],
        help="documents that are already tokenized: Megatron-LM's .bin and .idx, datatrove's .ds and .ds.index",
    )
    tokens.add_argument("files", nargs="+", metavar="FILE|DIR")
    hub = commands.add_parser("hf", parents=[shared], help="a dataset of the Hugging Face hub, or a local copy of one")
    hub.add_argument("dataset", metavar="DATASET|DIR")
    hub.add_argument("--name", help="configuration of the dataset, such as sample-10BT")
    hub.add_argument(
        "--split", help="read only this split (default: train, and validation, if there is one, as validation split)"
    )
    hub.add_argument(
        "--text-key", default="text", metavar="KEY", help="column or JSON key that holds the text (default: text)"
    )
    for preset, (dataset, name) in PRESETS.items():
        described = " ".join(filter(None, (dataset, name)))
        command = commands.add_parser(preset, parents=[shared], help=f"the dataset {described} of the hub")
        command.add_argument("--from", dest="copy", metavar="DIR", help="read this local copy of the dataset")
    fetching = commands.add_parser("download", help="download shards that are already tokenized")
    fetching.add_argument("tokenized", choices=list(TOKENIZED))
    fetching.add_argument("--out", type=Path, metavar="DIR", help="directory of the dataset (default: data/NAME)")
    merging = commands.add_parser("merge", help="merge the parts made with --part")
    merging.add_argument("directory", type=Path, metavar="DIR")
    return parser


def _shared_options() -> CommandParser:
    """Return a parser with the options that all sources have."""
    shared = CommandParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the dataset")
    shared.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="KIND|DIR",
        help="gpt2 (default), char, bpe:N, or the directory of a dataset or checkpoint whose tokenizer to use",
    )
    shared.add_argument(
        "--add-end-of-text",
        action="store_true",
        help="add <|endoftext|>, which separates documents, to the tokenizer of --tokenizer DIR if it lacks it",
    )
    held_out = shared.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction",
        type=_fraction,
        metavar="F",
        help="hold out this fraction of the documents, chosen by hash (default: 0.01)",
    )
    held_out.add_argument(
        "--val-tokens",
        type=_whole_number,
        metavar="N",
        help="hold out documents, one in ten by hash, until they have N tokens; of fewer than 20 text files, hold out "
        "the end: N tokens or, if this is less, a tenth of the text",
    )
    held_out.add_argument(
        "--val", choices=["first-shard"], help="hold out the first documents, as many as fill a shard"
    )
    shared.add_argument(
        "--shard-tokens",
        type=_shard_tokens,
        default=100_000_000,
        metavar="N",
        help="tokens per shard (default: 100000000)",
    )
    shared.add_argument(
        "--workers", type=_whole_number, metavar="N", help="number of processes that encode (default: one per core)"
    )
    shared.add_argument(
        "--part",
        type=_parse_part,
        metavar="I/N",
        help="prepare only part I of N of the files; env takes I and N from Slurm's or torchrun's variables",
    )
    shared.add_argument(
        "--executor",
        choices=EXECUTORS,
        help="prepare all parts in --tasks tasks, which datatrove runs on this machine (local), on a Slurm cluster or "
        "on Ray, and merge them",
    )
    shared.add_argument("--tasks", type=_whole_number, metavar="N", help="number of tasks; each prepares one part")
    shared.add_argument("--slurm-partition", metavar="NAME", help="partition for --executor slurm")
    shared.add_argument("--slurm-time", metavar="HH:MM:SS", default="24:00:00", help="time limit of a task on Slurm")
    kept = shared.add_argument_group("which documents are kept")
    kept.add_argument(
        "--min-chars", type=_whole_number, metavar="N", default=0, help="leave out documents of fewer than N characters"
    )
    kept.add_argument(
        "--max-chars", type=_whole_number, metavar="N", help="leave out documents of more than N characters"
    )
    kept.add_argument(
        "--language",
        action="append",
        metavar="CODE",
        default=[],
        help="keep only documents in this language, such as en (repeat it for more languages); needs py3langid",
    )
    kept.add_argument("--deduplicate", action="store_true", help="leave out documents that equal an earlier one")
    shared.add_argument(
        "--strict",
        action="store_true",
        help="stop at an empty document or invalid UTF-8 (default: skip the document, or replace the invalid bytes)",
    )
    return shared


def _job(args: argparse.Namespace) -> Job:
    """Build the job from the options. Raises ValueError if options contradict each other or the source."""
    if args.add_end_of_text and not Path(args.tokenizer).is_dir():
        raise ValueError("--add-end-of-text needs --tokenizer DIR: the other tokenizers have an end-of-text token")
    given = None
    if Path(args.tokenizer).is_dir():
        given = load_tokenizer(args.tokenizer, add_end_of_text=args.add_end_of_text)
    kind = given.kind if given else args.tokenizer
    parse_kind(kind)
    if args.command == "tokens":
        if not given and kind != "gpt2":
            raise ValueError(
                "the tokens exist already: give the directory of the tokenizer that made them, --tokenizer DIR"
            )
        source = token_source(args.files, given or load_tokenizer(kind))
    else:
        source = _source(args)
    source = _filtered(source, args)
    part = args.part or (1, args.tasks or 1)  # with --executor but no --part, this job only checks the options
    count = part[1]
    if count > len(source.files):
        raise ValueError(f"{len(source.files)} files cannot make {count} parts: a part is at least one file")
    validation = _validation(args, source)
    if validation.tokens and (count > 1 or (args.val and kind.startswith("bpe") and not given)):
        raise ValueError("--val-tokens and --val first-shard need the whole source in order: use --val-fraction here")
    if validation.fraction and not args.val and has_few_documents(source):
        known = given or (load_tokenizer(kind) if kind == "gpt2" else None)
        source, validation = hold_out_end(source, validation, kind, known)
        print(f"validation split: {validation.description}", file=sys.stderr)
    out = part_directory(args.out, part)
    return Job(source, out, kind, validation, args.shard_tokens, part, given)


def _filtered(source: Source, args: argparse.Namespace) -> Source:
    """Return `source` with the filters that the options choose.

    Raises ValueError for an unknown language, or a condition on the text if the source consists of tokens.
    """
    filters = Filters(args.min_chars, args.max_chars, tuple(args.language), args.deduplicate)
    if filters.by_text and args.command == "tokens":
        raise ValueError("--min-chars, --max-chars and --language need text, and these documents are tokens already")
    check_languages(filters.languages)
    described = "; ".join(filter(None, (source.filter, filters.describe())))
    return replace(source, filter=described, options=replace(source.options, filters=filters))


def _source(args: argparse.Namespace) -> Source:
    if args.command == "text":
        source = text_source(args.files, ParseOptions(args.text_key, args.separator, args.strict))
        if names := unused_separators(source):
            print(
                f"notice: {names[0]} contains {END_OF_TEXT}, which is read as ordinary text. If it separates "
                f"documents, use --separator '{END_OF_TEXT}'",
                file=sys.stderr,
            )
        return source
    if args.command == "hf":
        return hub_source(args.dataset, args.name, args.split, ParseOptions(args.text_key, strict=args.strict))
    if args.command in PRESETS:
        dataset, name = PRESETS[args.command]
        articles = args.command == "wikitext-103"
        return hub_source(args.copy or dataset, name, None, ParseOptions(strict=args.strict), articles)
    return shakespeare_source()


def _validation(args: argparse.Namespace, source: Source) -> ValidationRule:
    # Do not reword the first argument of a rule: a run can continue a dataset only if this text has not changed.
    if any(file.split for file in source.files):
        if (args.val or args.val_tokens or args.val_fraction) is not None:
            raise ValueError(
                f"{args.command} defines its own validation split: omit --val, --val-tokens, --val-fraction"
            )
        return SPLIT_OF_SOURCE
    if args.val:
        return ValidationRule("first shard", 1.0, args.shard_tokens)
    if args.val_tokens:
        return ValidationRule(f"one document in ten by hash, {args.val_tokens} tokens", 0.1, args.val_tokens)
    return split_by_hash(0.01 if args.val_fraction is None else args.val_fraction)


def _report(out: Path, meta: DatasetMeta) -> None:
    """Print the sizes of the dataset and what was unusual about its documents."""
    print(f"{out}: {meta.tokenizer}, vocabulary {meta.vocab_size:,}")
    for split in SPLITS:
        print(f"  {split:<5} {meta.tokens[split]:15,} tokens, documents: {meta.documents[split]:,}")
    text = sum(meta.text_bytes.values())
    print(f"shards: {sum(map(len, meta.shards.values()))}" + (f", from {text / 1e6:,.1f} MB of text" if text else ""))
    for name, message in (
        ("empty", "empty documents skipped"),
        ("too_short", "documents shorter than --min-chars left out"),
        ("too_long", "documents longer than --max-chars left out"),
        ("other_language", "documents in other languages left out"),
        ("duplicate", "documents that equal an earlier one left out"),
        ("carriage_returns", r"line ends changed from \r\n or \r to \n"),
        ("invalid_utf8", "documents in which invalid UTF-8 was replaced with U+FFFD"),
        (
            "longer_than_shard",
            "documents longer than a shard, which continue in the next one (to avoid this, raise --shard-tokens)",
        ),
    ):
        if meta.skipped.get(name):
            print(f"{message}: {meta.skipped[name]:,}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; run the same command again to continue\n"):
        if args.command == "merge":
            out, meta = args.directory, merge_parts(args.directory)
        elif args.command == "download":
            out = args.out or Path("data", args.tokenized)
            meta = download(args.tokenized, out)
        else:
            if (args.executor is None) != (args.tasks is None):
                raise ValueError("--executor and --tasks N belong together: give both")
            job = _job(args)
            if args.executor and args.part is None:
                given = sys.argv[1:] if arguments is None else arguments
                if args.out.is_dir() and (earlier := read_complete_meta(args.out)):
                    settings = job.settings() | {"part": ""}
                    refuse_other_settings(args.out, vars(earlier), settings, "choose another --out")
                slurm = SlurmOptions(args.slurm_partition, args.slurm_time)
                run_tasks(args.executor, given, args.out, args.tasks, args.workers or 1, slurm)
                if args.executor == "slurm":
                    return
                out, meta = args.out, merge_parts(args.out)
            else:
                out, meta = job.out, prepare_dataset(job, args.workers)
        _report(out, meta)


if __name__ == "__main__":
    main()
