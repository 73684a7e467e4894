"""Parts of one dataset, which several processes prepare, and their merging."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from data.prepare.writer import SPLITS
from data.shards import PROGRESS_FILE, DatasetMeta, ShardWriter, open_split, read_meta
from data.tokenizer import load_tokenizer
from files import write_json


def merge_parts(directory: Path) -> DatasetMeta:
    """Merge the parts in `directory` into one dataset, with the same bytes as from a single run. Keeps the parts.

    Raises ValueError when a part is missing, damaged, or made with other settings than the first.
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
        names = dict.fromkeys(name for meta in parts.values() for name in getattr(meta, key))
        return {name: sum(getattr(meta, key).get(name, 0) for meta in parts.values()) for name in names}

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
    """Return all parts in order, after checking that they are complete and have the same settings."""
    found = sorted(directory.glob("part-*-of-*"))
    if not found:
        raise ValueError(f"{directory} has no parts to merge: make the parts with --part I/N --out {directory}")
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
            f"{directory} has parts of different divisions, {found[0].name} and {found[-1].name}: remove the old parts"
        )
    return parts


def part_directory(directory: Path, part: tuple[int, int]) -> Path:
    """Return the directory of part (index, count), which is `directory` itself when there is one part."""
    return directory if part[1] == 1 else directory / "part-{:03d}-of-{:03d}".format(*part)
