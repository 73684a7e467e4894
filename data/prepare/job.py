"""The work of one `python -m data.prepare`: start or continue a dataset, encode the source, describe the result.

The main process reads the source, divides it into chunks and writes the shards. Worker processes parse, encode and
check the chunks. Results are written in the order of the source, so the shards do not depend on the number of workers.
A progress file records what has been written, so that an interrupted run can continue and ends with the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.prepare.documents import Documents, parse
from data.prepare.encode import Encoder, ValidationRule, encode_in_order, read_batches
from data.prepare.held_out import SHORT_TEXT, has_few_documents
from data.prepare.source import Source
from data.prepare.writer import (
    SPLITS,
    TOKENIZER_FILES,
    DatasetWriter,
    PrepareProgress,
    begin_progress,
    refuse_links,
    refuse_other_settings,
    refuse_shards,
    save_tokenizer,
)
from data.shards import PROGRESS_FILE, DatasetMeta, read_meta
from data.tokenizer import Tokenizer, load_tokenizer, parse_kind, train_tokenizer
from files import write_json

# A chunk has about CHUNK_BYTES bytes. If the shards are small, it has fewer, but at least MIN_CHUNK_BYTES. The size of
# the chunks of a single document does not depend on the shards (see `read_chunks`).
CHUNK_BYTES, MIN_CHUNK_BYTES = 4 << 20, 1 << 16
SAVE_SECONDS = 5  # the progress file is updated after this many seconds, or earlier if a shard is complete
SMALL_BYTES = 1 << 25  # a source of fewer bytes is encoded in this process, because starting workers would take longer
# A BPE is trained on about this many bytes from the beginning of the train split: more hardly changes its merges.
BPE_TRAINING_BYTES = 1 << 28


def make_tokenizer(kind: str, source: Source, validation: ValidationRule) -> Tokenizer:
    """Return GPT-2's tokenizer, or one made from the source: "char" from all text, "bpe:N" from the train split.

    Raises ValueError when there is too little text for N tokens.
    """

    def texts() -> Iterator[str]:
        read = 0
        for batch in read_batches(source, range(len(source.files)), (0, 0), CHUNK_BYTES):
            for chunk in batch:
                for text in parse(chunk, source.options, Documents()).texts:
                    if kind == "char" or not validation.candidate(chunk, text):
                        yield text.decode()
                        read += len(text)
                if kind != "char" and read > BPE_TRAINING_BYTES:
                    return

    tokenizer = train_tokenizer(kind, texts())
    size = parse_kind(kind)
    if size is not None and tokenizer.vocab_size < size:
        raise ValueError(
            f"the train split has too little text for {kind}: it gives {tokenizer.vocab_size:,} tokens; "
            f"use --tokenizer bpe:{tokenizer.vocab_size} or fewer"
        )
    return tokenizer


@dataclass(frozen=True)
class Job:
    """Everything that the bytes of a dataset depend on, and the directory for the dataset.

    source: the text;
    out: directory of the dataset, or of this part of it;
    tokenizer: kind of the tokenizer: "gpt2", "char" or "bpe:N";
    validation: which documents form the validation split;
    shard_tokens: number of tokens in a full shard;
    part: (I, N) prepares only part I of N, where I is 1 to N; (1, 1) prepares the whole dataset;
    given: an existing tokenizer to use; None to use GPT-2's or to make one from the source.
    """

    source: Source
    out: Path
    tokenizer: str
    validation: ValidationRule
    shard_tokens: int
    part: tuple[int, int] = (1, 1)
    given: Tokenizer | None = None

    @property
    def files(self) -> range:
        """Indices of the files of this part: the first files are part 1, the next ones part 2, and so on."""
        index, count = self.part
        n = len(self.source.files)
        return range(n * (index - 1) // count, n * index // count)

    def settings(self) -> dict[str, Any]:
        """Return the settings as in `meta.json`. A run can continue only a dataset with the same settings."""
        return {
            "tokenizer": self.tokenizer,
            "source": self.source.name,
            "revision": self.source.revision,
            "filter": self.source.filter,
            "validation": self.validation.description,
            "shard_tokens": self.shard_tokens,
            "part": "" if self.part[1] == 1 else "{} of {}".format(*self.part),
        }


def prepare_dataset(job: Job, workers: int | None = None) -> DatasetMeta:
    """Make the dataset, continue it, or find that it is complete. Returns the content of its `meta.json`.

    `workers` is the number of processes that encode: by default one per core, or only this process for a small source.
    Raises ValueError for text or settings that cannot be used, OSError when a file cannot be read or written.
    """
    lock = FileLock(job.out / ".lock")
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        refuse_links(job.out)
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another `data.prepare` is running in {job.out}: wait for it, or choose another --out") from None
    except OSError as error:
        raise OSError(f"cannot write to {job.out}: {error.strerror}; choose another --out") from error
    try:
        return _run(job, workers)
    finally:
        # Do not delete the lock file. Another process may have opened it already, and would then lock a deleted file,
        # which later processes cannot see.
        lock.release()


def _run(job: Job, workers: int | None) -> DatasetMeta:
    """Do the work of `prepare_dataset`. The caller holds the lock on the directory."""
    progress = _begin(job)
    if progress is None:
        meta = read_meta(job.out)
        assert meta is not None
        print(f"{job.out} is complete already: nothing to do")
        return meta
    kept = progress["kept"]
    if "tokenizer_sha256" in progress:
        tokenizer = load_tokenizer(job.out)
    else:
        if job.tokenizer != "gpt2" and not job.given:
            print(f"making a {job.tokenizer} tokenizer from the text ...", file=sys.stderr)
        tokenizer = job.given or make_tokenizer(job.tokenizer, job.source, job.validation)
        save_tokenizer(tokenizer, job.out, kept)
        progress |= {"tokenizer_sha256": tokenizer.fingerprint, "tokenizer_given": job.given is not None}
        write_json(job.out / PROGRESS_FILE, progress)
    if job.tokenizer != "char" and not tokenizer.bulk_encoder.startswith("gigatoken"):
        print(f"gigatoken is not installed: encoding with {tokenizer.bulk_encoder}, which is slower", file=sys.stderr)

    deduplicate = job.source.options.filters.deduplicate
    dataset = DatasetWriter(job.out, job.validation, job.shard_tokens, tokenizer.eot, deduplicate=deduplicate)
    # Call `restore` even if no state was saved: it deletes what an earlier run wrote before it was interrupted.
    dataset.restore(progress.get("state", dataset.state()))
    _encode(job, tokenizer, dataset, progress, workers)
    if job.source.options.separator and not dataset.counted["separators"]:
        separator = job.source.options.separator
        print(f"the separator {separator!r} does not occur: each text file is one document", file=sys.stderr)
    if job.part[1] == 1:
        _refuse_empty(job, dataset, kept)
    return _finish(job, tokenizer, dataset)


def _begin(job: Job) -> dict[str, Any] | None:
    """Return the content of the progress file, or None when the dataset is complete. Makes the file for a new dataset.

    Keys of the file: those of `begin_progress`; "tokenizer_sha256" and "tokenizer_given", if there is a tokenizer;
    "state", if a state has been saved. Raises ValueError when the directory holds shards that this command did not
    write, or a dataset with other settings or another tokenizer.
    """
    path = job.out / PROGRESS_FILE
    settings = job.settings()
    meta = read_meta(job.out)
    used, was_given = None, False  # the fingerprint of the dataset's tokenizer, and whether it was given
    if path.exists():
        progress = json.loads(path.read_text(encoding="utf-8"))
        is_older = "kept" not in progress  # older versions did not write this entry
        if "state" in progress and is_older:
            raise ValueError(
                f"{job.out} was begun by an older version, which cut texts in other places: delete it to start again"
            )
        if "state" not in progress and (is_older or progress["settings"] != settings):
            # No state has been saved yet, so start again.
            progress = begin_progress(job.out, settings)
        earlier = progress["settings"]
        used, was_given = progress.get("tokenizer_sha256"), progress.get("tokenizer_given", False)
    elif meta is not None:
        progress = None
        earlier, used, was_given = vars(meta), meta.tokenizer_sha256, meta.tokenizer_given
    else:
        refuse_shards(job.out)
        progress, earlier = begin_progress(job.out, settings), settings
    remedy = "choose another --out, or delete it to start again"
    refuse_other_settings(job.out, earlier, settings, remedy)
    expected = job.given or (make_tokenizer(job.tokenizer, job.source, job.validation) if was_given else None)
    if expected and used not in (None, expected.fingerprint):
        raise ValueError(f"{job.out} was prepared with another {job.tokenizer} tokenizer: {remedy}")
    return progress


def _encode(
    job: Job, tokenizer: Tokenizer, dataset: DatasetWriter, progress: dict[str, Any], workers: int | None
) -> None:
    """Encode the source from the recorded position on. Save the state after each shard and every few seconds."""
    limit = min(CHUNK_BYTES, max(MIN_CHUNK_BYTES, job.shard_tokens // 4))
    total = sum(job.source.files[i].size for i in job.files)
    # The encoder checks a fixed number of documents per shard, also in a dataset that is smaller than a shard. For such
    # a dataset, pass a low estimate of its tokens (few texts have more than 8 bytes per token).
    encoder = Encoder(tokenizer, job.source.options, job.validation, min(job.shard_tokens, max(1, total // 8)))
    if workers is None:
        workers = 1 if total < SMALL_BYTES else available_cores()
    file, chunk = dataset.counted["position"]
    batches = read_batches(job.source, job.files, (file, chunk), limit)
    saved, shards = time.monotonic(), -1
    bar = PrepareProgress(total, dataset)
    for chunks, encoded in encode_in_order(batches, encoder, job.out, workers):
        dataset.add(chunks, encoded)
        bar.update()
        finished = sum(len(writer.finished) for writer in dataset.writers.values())
        if finished != shards or time.monotonic() - saved > SAVE_SECONDS:
            progress["state"] = dataset.state()
            write_json(job.out / PROGRESS_FILE, progress)
            saved, shards = time.monotonic(), finished
    bar.close()


def _refuse_empty(job: Job, dataset: DatasetWriter, kept: list[str]) -> None:
    """If a split has no documents, remove everything that was written, and raise ValueError.

    The files in `kept` were there before and stay. An empty validation split is allowed if the fraction of the
    validation rule is 0.
    """
    documents = {split: writer.n_documents for split, writer in dataset.writers.items()}
    empty = [split for split in SPLITS if not documents[split]]
    if not empty or (empty == ["val"] and job.validation.fraction == 0):
        return
    dataset.discard()
    for name in {PROGRESS_FILE, *TOKENIZER_FILES} - set(kept):
        (job.out / name).unlink(missing_ok=True)
    names = [file.name for file in job.source.files]
    if len(empty) == len(SPLITS):
        filters = job.source.options.filters.describe()
        raise ValueError(
            f"no text in {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: every document is empty"
            + (f" or left out by the filters ({filters}): choose others" if filters else "")
        )
    if has_few_documents(job.source):  # `hold_out_end` found no border
        raise ValueError(
            f"the text cannot be divided: its end is held out for validation, from the border of a line, or of a word "
            f"if it has at least {SHORT_TEXT:,} bytes. Give more text, or use --val-fraction 0 for no validation split"
        )
    raise ValueError(
        f"none of {sum(documents.values())} documents is in the {empty[0]} split ({job.validation.description}), and "
        "documents are never divided: give more documents, divide the text into documents with --separator, choose "
        "another --val-fraction, or use --val-fraction 0 to have no validation split"
    )


def _finish(job: Job, tokenizer: Tokenizer, dataset: DatasetWriter) -> DatasetMeta:
    shards = {split: writer.finish() for split, writer in dataset.writers.items()}
    meta = DatasetMeta(
        **job.settings(),
        tokenizer_sha256=tokenizer.fingerprint,
        tokenizer_given=job.given is not None,
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
    if dataset.seen is not None:
        dataset.seen.remove()
    return meta


def available_cores() -> int:
    """Return the number of cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    names = ("tiktoken", "tokenizers", "pyarrow", "zstandard")
    return {"encoder": tokenizer.bulk_encoder, **{name: importlib.metadata.version(name) for name in names}}
