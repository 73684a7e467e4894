"""Datasets of the Hugging Face hub, read as they arrive, or from a local copy of one; and shards already tokenized."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import PROGRESS_FILE, DatasetMeta, ShardMeta, file_sha256, read_header, read_meta, write_json
from data.sources import File, Options, Piece, Source
from data.sources.text import file_format, listing_sha256, open_file, open_parquet, read_pieces, text_filter
from data.tokenizer import load_tokenizer

# command: (dataset, configuration)
PRESETS = {
    "fineweb-edu-10b": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb-10b": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "tinystories": ("roneneldan/TinyStories", None),
}
TOKENIZED = {"fineweb-10b": "kjj0/fineweb10B-gpt2"}
_ARTICLE = re.compile(r" = [^=].* = \n")


def hub_source(dataset: str, name: str | None, split: str | None, options: Options, articles: bool = False) -> Source:
    """The files of `dataset`, a hub id or a local directory laid out like one, in configuration `name`.

    Without `split`, "train", and "validation" where there is one as the validation split; with it, that one alone.
    `articles`: rows are lines, to be joined into WikiText's articles. Raises OSError when the hub cannot be reached,
    ValueError for a configuration, split or kind of file that is not there.
    """
    local = Path(dataset).is_dir()
    commit = "" if local else _dataset_info(dataset).sha
    found = _data_files(dataset, name, commit or None)
    if split is None:
        chosen = {"train": "train", "validation": "val"} if "validation" in found else {"train": None}
    else:
        chosen = {split: None}
    missing = chosen.keys() - found.keys()
    if missing:
        raise ValueError(f"{dataset} has no split {missing.pop()!r} but {', '.join(found)}: name one with --split")
    files = []
    for theirs, ours in chosen.items():
        for path in found[theirs]:
            if not file_format(path):
                raise ValueError(f"{dataset} is stored as {Path(path).name}: expected .parquet, .jsonl or .txt files")
            files.append(File(path, Path(path).stat().st_size if local else _hub_size(path), ours))
    read = functools.partial(_read_articles if articles else read_pieces, options=options)
    described = ", ".join(filter(None, ["hf " + (Path(dataset).name if local else dataset), name, split]))
    revision = listing_sha256(files) if local else commit
    return Source(
        described,
        revision,
        tuple(files),
        read,
        "rows joined into articles" if articles else text_filter(options),
        options,
    )


def _dataset_info(dataset: str) -> Any:
    """What the hub says of a dataset: `sha`, its newest commit, and `siblings`, its files."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, files_metadata=True, timeout=30)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"cannot reach dataset {dataset} on the Hugging Face hub ({reason}); where there is no way to the hub, "
            "bring a copy of the dataset's directory and give that (`hf DIR`, or --from DIR for a preset)"
        ) from error


def _hub_size(address: str) -> int:
    from huggingface_hub import HfFileSystem

    return HfFileSystem().info(address)["size"]


def _data_files(dataset: str, name: str | None, revision: str | None) -> dict[str, list[str]]:
    """Paths or hf:// addresses by split."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, name, revision=revision)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        # The hub keeps a conversion of datasets that are made by a script.
        builder = datasets.load_dataset_builder(dataset, name, revision="refs/convert/parquet")
    except (ValueError, OSError) as error:
        raise ValueError(f"{dataset} cannot be used: {str(error).strip()}") from error
    found = {split: [str(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    if any("/partial-" in path for paths in found.values() for path in paths):
        raise ValueError(
            f"{dataset} is on the hub only as a script, and its conversion is not complete: use a copy of it"
        )
    return found


def _read_articles(file: File, limit: int, options: Options) -> Iterator[Piece]:
    """WikiText's rows are lines; a document is an article, from one title of the first order to the next."""
    lines: list[str] = []
    done: list[str] = []
    first, size = 1, 0

    def piece(last: bool = False) -> Piece:
        data = "".join(json.dumps({options.text_key: text}) + "\n" for text in done).encode()
        return Piece(file, "jsonl", first, file.size if last else 0, data)

    with open_file(file.name) as raw:
        for batch in open_parquet(raw, file.name).iter_batches(columns=[options.text_key]):
            for line in batch.column(0).to_pylist():
                if _ARTICLE.fullmatch(line) and any(lines):
                    done.append("".join(lines))
                    size, lines = size + len(done[-1]), []
                    if size >= limit:
                        yield piece()
                        first, size, done = first + len(done), 0, []
                lines.append(line)
    done += ["".join(lines)] if any(lines) else []
    yield piece(last=True)


def download(name: str, directory: Path) -> DatasetMeta:
    """Fetch shards that are already tokenized, hold each against its header and the hub's sha256, and describe them.

    What is there is not fetched again. Raises OSError when the hub cannot be reached, ValueError for a bad shard.
    """
    from huggingface_hub import hf_hub_download

    if directory.is_dir() and (meta := read_meta(directory)) is not None:
        return meta
    repository = TOKENIZED[name]
    info = _dataset_info(repository)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PROGRESS_FILE, {"settings": {"download": repository}})
    tokenizer = load_tokenizer("gpt2")
    shards: dict[str, list[ShardMeta]] = {"train": [], "val": []}
    listed = sorted((file for file in info.siblings if file.rfilename.endswith(".bin")), key=lambda f: f.rfilename)
    for number, file in enumerate(listed, 1):
        print(f"{number}/{len(listed)} {file.rfilename}")
        try:
            path = Path(
                hf_hub_download(repository, file.rfilename, repo_type="dataset", revision=info.sha, local_dir=directory)
            )
        except Exception as error:
            raise OSError(f"{file.rfilename} did not arrive ({error}); the same command goes on from here") from error
        tokens = read_header(path)
        sha256 = file_sha256(path)
        if sha256 != file.lfs.sha256:
            path.unlink()
            raise ValueError(f"{path} arrived damaged and was removed: run the same command again")
        documents = int(np.count_nonzero(np.fromfile(path, "<u2", offset=1024) == tokenizer.eot))
        shards["val" if "_val_" in path.name else "train"].append(ShardMeta(path.name, tokens, documents, sha256))
    tokenizer.save(directory)
    meta = DatasetMeta(
        tokenizer="gpt2",
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        source=f"hf {repository}, already tokenized",
        revision=info.sha,
        filter="",
        validation="as the source has it",
        shard_tokens=max(shard.tokens for listed in shards.values() for shard in listed),
        tokens={split: sum(shard.tokens for shard in listed) for split, listed in shards.items()},
        documents={split: sum(shard.documents for shard in listed) for split, listed in shards.items()},
        text_bytes={},
        shards={split: tuple(listed) for split, listed in shards.items()},
    )
    meta.save(directory)
    (directory / PROGRESS_FILE).unlink()
    return meta
