"""Write the two splits of a dataset, count its documents, record the position in the source, and show the progress."""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.encode import Encoded, ValidationRule
from data.prepare.filters import SeenDocuments
from data.prepare.source import Chunk
from data.shards import META_FILE, PROGRESS_FILE, DatasetMeta, ShardWriter, list_shards, read_meta
from data.tokenizer import Tokenizer, load_tokenizer
from files import write_json

SPLITS = ("train", "val")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # the files that `Tokenizer.save` writes


def read_complete_meta(directory: Path) -> DatasetMeta | None:
    """Return `meta.json` if the dataset in `directory` is complete, else None.

    A dataset that has both `meta.json` and the progress file is not complete: the process that made it was killed.
    Raises FileNotFoundError for a missing directory.
    """
    return None if (directory / PROGRESS_FILE).exists() else read_meta(directory)


def refuse_other_settings(directory: Path, earlier: dict[str, Any], settings: dict[str, Any], remedy: str) -> None:
    """Raise ValueError if the dataset in `directory` has other settings (`earlier`) than `settings`.

    Both have the keys of `meta.json`; only the keys of `settings` are compared. `remedy` ends the error message.
    """
    changed = [key for key in settings if earlier[key] != settings[key]]
    # With the files, a tokenizer made from them changes, and "validation", if it states the sizes of a held-out end.
    if "revision" in changed and {"revision", "validation", "tokenizer_sha256"}.issuperset(changed):
        raise ValueError(
            f"{directory} was prepared from another version: the source files have changed (earlier: "
            f"{earlier['revision']}; now: {settings['revision']}); {remedy}"
        )
    if changed:
        described = "; ".join(f"{key} {earlier[key]!r}, now {settings[key]!r}" for key in changed)
        raise ValueError(f"{directory} was prepared with other options ({described}): {remedy}")


def refuse_links(directory: Path) -> None:
    """Raise ValueError for a symbolic link in an incomplete dataset: writing to it would change a file somewhere else.

    The directory of a part made with --part may be a link, because `merge_parts` only reads it.
    """
    if (directory / META_FILE).is_file() and not (directory / PROGRESS_FILE).exists():
        return  # the dataset is complete, so nothing is written
    links = sorted(path for path in directory.iterdir() if path.is_symlink() and not path.match("part-*-of-*"))
    if links:
        raise ValueError(f"{links[0]} is a link, which would be written through: remove it, or choose another --out")


def refuse_shards(directory: Path) -> None:
    """Raise ValueError if the directory of a new dataset has shards: they would be deleted or mixed with new ones."""
    if any(list_shards(directory, split) for split in SPLITS):
        raise ValueError(f"{directory} has shards that this command did not write: choose another --out")


def begin_progress(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the progress file of a new dataset, and return its content.

    "kept" lists the files of a tokenizer that were in the directory before the dataset was begun.
    """
    path = directory / PROGRESS_FILE
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8")).get("kept", [])
    else:
        kept = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    progress = {"settings": settings, "kept": kept}
    write_json(path, progress)
    return progress


def save_tokenizer(tokenizer: Tokenizer, directory: Path, kept: list[str]) -> None:
    """Save the tokenizer of a new dataset, or find that it was there before (`kept` of `begin_progress`).

    Raises ValueError if another tokenizer was there before: its files would be overwritten.
    """
    if not kept:
        tokenizer.save(directory)
        return
    try:
        found = load_tokenizer(directory)
    except (OSError, ValueError):  # the files are damaged, or belong to a tokenizer of another kind
        found = None
    if found != tokenizer:
        (directory / PROGRESS_FILE).unlink()
        raise ValueError(
            f"{directory / kept[0]} belongs to another tokenizer than this dataset, and would be overwritten: "
            "remove it, or choose another directory"
        )


class PrepareProgress:
    """Shows megabytes per second, tokens and remaining time, in one line on a terminal, else in a new line every 10 s.

    Args:
        total: bytes of the source.
        dataset: the dataset that is written.
    """

    def __init__(self, total: int, dataset: DatasetWriter) -> None:
        self.total = max(total, 1)
        self.dataset = dataset
        self.began = time.monotonic()
        self.first_source = dataset.counted["source_bytes"]
        self.first_text = sum(dataset.counted["text_bytes"].values())
        self.terminal = sys.stderr.isatty()
        self.shown = self.began

    def update(self, last: bool = False) -> None:
        """Show the progress if enough time has passed since it was last shown. With `last`, always show it."""
        now = time.monotonic()
        if not last and now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown, seconds = now, max(now - self.began, 1e-3)
        source = self.total if last else self.dataset.counted["source_bytes"]
        text = sum(self.dataset.counted["text_bytes"].values()) - self.first_text
        tokens = sum(writer.n_tokens for writer in self.dataset.writers.values())
        left = seconds * (self.total - source) / max(source - self.first_source, 1)
        when = f"in {timedelta(seconds=round(seconds))}" if last else f"{timedelta(seconds=round(left))} left"
        line = f"{min(source / self.total, 1):4.0%} {text / seconds / 1e6:7.1f} MB/s {tokens:15,} tokens {when}"
        # The escape sequence erases the end of an earlier, longer line.
        print(f"\r{line}\x1b[K" if self.terminal else f"{line}\n", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the final numbers and end the line."""
        self.update(last=True)
        if self.terminal:
            print(file=sys.stderr)


class DatasetWriter:
    """Writes the two splits of a dataset and records the counts and the position in the source.

    `counted` is a part of the progress file, from which an interrupted run continues:
        position: which chunk to read next: [index of its file in the source, index of the chunk in this file];
        source_bytes: bytes of the source that have been read;
        text_bytes: for each split, the number of UTF-8 bytes of its text;
        skipped: counts of unusual documents, as in `meta.json`;
        separators: how often the separator of the documents was found;
        open_split: the split of the last document, for a chunk that continues this document;
        open_tokens: the number of tokens of the last document so far;
        val_is_full: whether a document was left out of the validation split because of `validation.tokens`;
        documents: with `deduplicate`, the number of documents so far, including duplicates.

    With `deduplicate`, a document that equals an earlier one is left out.
    """

    def __init__(
        self,
        directory: Path,
        validation: ValidationRule,
        shard_tokens: int,
        end_of_text: int,
        *,
        deduplicate: bool = False,
    ) -> None:
        self.seen = SeenDocuments(directory) if deduplicate else None
        self.writers = {split: ShardWriter(directory, split, shard_tokens, end_of_text) for split in SPLITS}
        self.validation = validation
        self.shard_tokens = shard_tokens
        self.counted: dict[str, Any] = {
            "position": [0, 0],
            "source_bytes": 0,
            "text_bytes": dict.fromkeys(SPLITS, 0),
            "skipped": {"empty": 0, "invalid_utf8": 0, "longer_than_shard": 0},
            "separators": 0,
            "open_split": "train",
            "open_tokens": 0,
            "val_is_full": False,
            "documents": 0,
        }

    def add(self, chunks: list[Chunk], encoded: Encoded) -> None:
        """Write the documents of `chunks`, the next chunks of the source. `encoded` holds these documents."""
        counted = self.counted
        if self.seen is not None:
            encoded = self._without_duplicates(encoded, self.seen)
        if len(encoded.lengths):
            self._count_long(encoded)
            val = self._assign(encoded)
            counted["open_split"] = "val" if val[-1] else "train"
            ends = np.cumsum(encoded.lengths)
            # Consecutive documents of the same split are copied as one slice, because the split changes rarely.
            begins = np.flatnonzero(np.diff(val, prepend=not val[0]))
            parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
            for begin, end in itertools.pairwise([*begins.tolist(), len(val)]):
                first = ends[begin - 1] if begin else 0
                parts["val" if val[begin] else "train"].append(encoded.tokens[first : ends[end - 1]])
            for split, chosen in (("train", ~val), ("val", val)):
                self.writers[split].write(np.concatenate([encoded.tokens[:0], *parts[split]]))
                counted["text_bytes"][split] += int(encoded.text_bytes[chosen].sum())
        counted["skipped"]["empty"] += encoded.empty
        counted["skipped"]["invalid_utf8"] += encoded.invalid_utf8
        for reason, n in {"carriage_returns": encoded.carriage_returns, **encoded.filtered}.items():
            if n:
                counted["skipped"][reason] = counted["skipped"].get(reason, 0) + n
        counted["separators"] += encoded.separators
        counted["source_bytes"] += sum(chunk.source_bytes for chunk in chunks)
        file, index = chunks[-1].position
        counted["position"] = [file, index + 1]

    def _without_duplicates(self, encoded: Encoded, seen: SeenDocuments) -> Encoded:
        """Return `encoded` without duplicates of earlier documents. Parts of a long document are never left out."""
        new = seen.find_new(encoded.tokens, encoded.lengths, self.counted["documents"]) | ~encoded.whole
        self.counted["documents"] += len(new)
        filtered = encoded.filtered | {"duplicate": int((~new).sum())}
        return replace(encoded.only(new), filtered=filtered)

    def _assign(self, encoded: Encoded) -> np.ndarray:
        """Return, for each document, whether it goes to the validation split: (documents,) bool."""
        val = encoded.candidate.copy()
        if encoded.continues:
            val[0] = self.counted["open_split"] == "val"
        limit, written = self.validation.tokens, self.writers["val"].n_tokens
        for i in np.flatnonzero(val) if limit is not None else ():
            # Take whole documents while they fit into `limit`, but at least one document. After the first document that
            # does not fit, take no more.
            if not (encoded.continues and i == 0):
                self.counted["val_is_full"] |= bool(written and written + encoded.lengths[i] > limit)
                val[i] = not self.counted["val_is_full"]
            written += int(encoded.lengths[i]) * bool(val[i])
        return val

    def _count_long(self, encoded: Encoded) -> None:
        """Count the documents longer than a shard, each once, although a document may arrive in several batches."""
        lengths = encoded.lengths.copy()
        before = self.counted["open_tokens"] if encoded.continues else 0
        lengths[0] += before
        long = np.count_nonzero(lengths > self.shard_tokens) - (before > self.shard_tokens)
        self.counted["skipped"]["longer_than_shard"] += int(long)
        self.counted["open_tokens"] = int(lengths[-1])

    def state(self) -> dict[str, Any]:
        """Write all pending data to the disk. Then return, as a JSON value, what `restore` needs."""
        for writer in self.writers.values():
            writer.flush()
        if self.seen is not None:
            self.seen.flush()
        return {"counted": self.counted, **{split: writer.state() for split, writer in self.writers.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state`: delete everything that was written after the state was saved."""
        self.counted = self.counted | state["counted"]
        for split, writer in self.writers.items():
            writer.restore(state[split])
        if self.seen is not None and not self.counted["documents"]:
            self.seen.clear()  # an earlier run with other settings may have left its hashes of documents

    def discard(self) -> None:
        """Delete everything that was written."""
        for writer in self.writers.values():
            writer.restore({"finished": [], "tokens": 0, "documents": 0})
        if self.seen is not None:
            self.seen.remove()
