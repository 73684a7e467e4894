"""Merge the parts of a dataset that several processes have prepared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.prepare.encode import SPLIT_OF_SOURCE, split_by_hash
from data.prepare.filters import SeenDocuments
from data.prepare.writer import (
    SPLITS,
    begin_progress,
    read_complete_meta,
    refuse_links,
    refuse_other_settings,
    refuse_shards,
    save_tokenizer,
)
from data.shards import PROGRESS_FILE, DatasetMeta, ShardWriter, Split, open_split
from data.tokenizer import load_tokenizer

BLOCK_TOKENS = 1 << 22  # tokens read at once
# The entries of `meta.json` that are equal in all parts and in the merged dataset.
SHARED = ("tokenizer", "tokenizer_sha256", "source", "revision", "filter", "validation", "shard_tokens")


def merge_parts(directory: Path) -> DatasetMeta:
    """Merge the parts in `directory` into one dataset. Keeps the parts.

    The result has the same bytes as a dataset from a single run. There is one exception: with --deduplicate, a single
    run keeps all copies of a document that is cut into several chunks or divided between the splits, and this function
    keeps only the first copy.

    Returns the content of `meta.json`. If `directory` has a complete dataset already, does nothing else. Raises
    ValueError when a part is missing, damaged, or made with other settings than the first part or that dataset, or when
    a split is empty.
    """
    if (meta := read_complete_meta(directory)) is not None:
        for part in filter(Path.is_dir, sorted(directory.glob("part-*-of-*"))):
            if made := read_complete_meta(part):
                remedy = f"delete the files in {directory} (not its directories), or use another --out for the parts"
                refuse_other_settings(directory, vars(meta), {key: getattr(made, key) for key in SHARED}, remedy)
        print(f"{directory} is complete already: nothing to do")
        return meta
    parts = _find_parts(directory)
    _refuse_empty(list(parts.values()))
    refuse_links(directory)
    if not (directory / PROGRESS_FILE).exists():
        refuse_shards(directory)
    first = next(iter(parts.values()))
    progress = begin_progress(directory, {"parts": len(parts)})
    tokenizer = load_tokenizer(next(iter(parts)))
    save_tokenizer(tokenizer, directory, progress["kept"])
    writers = {split: ShardWriter(directory, split, first.shard_tokens, tokenizer.eot) for split in SPLITS}
    # --deduplicate compared documents only within each part, so the same document may be in several parts.
    seen = SeenDocuments(directory) if "without duplicates" in first.filter.split("; ") else None
    if seen is not None:
        seen.clear()  # deletes the hashes that an interrupted merge may have left
    repeated, repeated_bytes, n_documents = 0, dict.fromkeys(SPLITS, 0), 0
    for split, writer in writers.items():
        writer.restore(writer.state())
        for part, meta in parts.items():
            if not meta.tokens[split]:
                continue
            opened = open_split(part, split)
            opened.verify()
            if seen is None:
                for tokens in _blocks(opened):
                    writer.write(tokens)
                continue
            for tokens, lengths in _documents(opened, tokenizer.eot):
                new = seen.find_new(tokens, lengths, n_documents)
                kept = np.repeat(new, lengths)
                writer.write(tokens[kept])
                n_documents, repeated = n_documents + len(new), repeated + int((~new).sum())
                repeated_bytes[split] += int(tokenizer.token_bytes()[tokens[~kept]].sum())

    def total(key: str) -> dict[str, int]:
        names = dict.fromkeys(name for meta in parts.values() for name in getattr(meta, key))
        return {name: sum(getattr(meta, key).get(name, 0) for meta in parts.values()) for name in names}

    text_bytes, skipped = total("text_bytes"), total("skipped")
    merged = replace(
        first,
        part="",
        shards={split: writer.finish() for split, writer in writers.items()},
        tokens={split: writer.n_tokens for split, writer in writers.items()},
        documents={split: writer.n_documents for split, writer in writers.items()},
        text_bytes={split: text_bytes[split] - repeated_bytes[split] for split in text_bytes},
        skipped=skipped | ({"duplicate": skipped.get("duplicate", 0) + repeated} if repeated else {}),
    )
    merged.save(directory)
    (directory / PROGRESS_FILE).unlink()
    if seen is not None:
        seen.remove()
    return merged


def _refuse_empty(parts: list[DatasetMeta]) -> None:
    """Raise ValueError if a split has no documents, as a single run does."""
    validation = parts[0].validation
    optional = validation in (SPLIT_OF_SOURCE.description, split_by_hash(0).description)
    empty = [split for split in SPLITS if not any(meta.documents[split] for meta in parts)]
    if empty and not (empty == ["val"] and optional):
        raise ValueError(
            f"none of the documents of the {len(parts)} parts is in the {empty[0]} split ({validation}): prepare the "
            "parts again from more documents, with another --val-fraction, or with --val-fraction 0 to have no "
            "validation split"
        )


def _blocks(split: Split) -> Iterator[np.ndarray]:
    """Iterate over the tokens of a split in blocks. A block is valid only until the next one, which uses its memory."""
    buffer = np.empty(BLOCK_TOKENS, np.uint16)
    for start in range(0, split.n_tokens, BLOCK_TOKENS):
        tokens = buffer[: split.n_tokens - start]
        split.read(start, tokens)
        yield tokens


def _documents(split: Split, eot: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over groups of whole documents: (tokens of the group, number of tokens of each document)."""
    rest = np.empty(0, np.uint16)
    for block in _blocks(split):
        tokens = np.concatenate([rest, block])
        begins = np.flatnonzero(tokens == eot)
        rest = tokens[begins[-1] :]
        yield tokens[: begins[-1]], np.diff(begins)
    yield rest, np.array([len(rest)])


def _find_parts(directory: Path) -> dict[Path, DatasetMeta]:
    """Return the directory and `meta.json` of each part, in order.

    Raises ValueError unless all parts are complete and have the same settings.
    """
    found = sorted(directory.glob("part-*-of-*"))
    if not found:
        raise ValueError(f"{directory} has no parts to merge: make the parts with --part I/N --out {directory}")
    count = int(found[0].name.rpartition("-")[2])
    parts: dict[Path, DatasetMeta] = {}
    for index in range(1, count + 1):
        part = part_directory(directory, (index, count))
        meta = read_complete_meta(part) if part in found else None
        if meta is None:
            raise ValueError(f"{part} is not complete: run the same command with --part {index}/{count} first")
        parts[part] = meta
        for key in SHARED:
            if getattr(meta, key) != getattr(parts[found[0]], key):
                raise ValueError(f"{part} differs from {found[0]} in {key}: prepare it again")
    if len(found) != count:
        raise ValueError(
            f"{directory} has parts of different divisions, {found[0].name} and {found[-1].name}: remove the old parts"
        )
    return parts


def part_directory(directory: Path, part: tuple[int, int]) -> Path:
    """Return the directory of part I of N, where `part` is (I, N). A single part is in `directory` itself."""
    return directory if part[1] == 1 else directory / "part-{:03d}-of-{:03d}".format(*part)
