"""Read datasets of the Hugging Face hub, streamed or from a local copy. Download shards that are already tokenized."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from data.prepare.documents import Documents, raw_documents
from data.prepare.encode import SPLIT_OF_SOURCE
from data.prepare.files import FORMATS, file_format, files_revision
from data.prepare.source import Chunk, ParseOptions, Source, SourceFile
from data.prepare.text import read_chunks, text_filter
from data.prepare.writer import begin_progress, read_complete_meta, refuse_links, refuse_other_settings, save_tokenizer
from data.shards import HEADER_BYTES, PROGRESS_FILE, TOKEN, DatasetMeta, ShardMeta, read_header
from data.tokenizer import load_tokenizer
from files import file_sha256

# name of the subcommand: (dataset on the hub, configuration)
PRESETS = {
    "fineweb-edu-10b": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb-10b": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "climbmix": ("karpathy/climbmix-400b-shuffle", None),
    "dclm": ("mlfoundations/dclm-baseline-1.0", None),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "tinystories": ("roneneldan/TinyStories", None),
}
# name of the dataset: repository on the hub with its shards
TOKENIZED = {"fineweb-10b": "kjj0/fineweb10B-gpt2"}
# Matches the title line of an article of WikiText. Titles of sections have more equals signs: ` = = Section = = `.
_ARTICLE = re.compile(r" = [^=].* = \n")


def hub_source(
    dataset: str, name: str | None, split: str | None, options: ParseOptions, articles: bool = False
) -> Source:
    """Return a dataset of the hub as a source.

    Args:
        dataset: id on the hub, or a local directory (a copy of the dataset, or the output of `datasets.save_to_disk`).
        name: configuration of the dataset, or None for a dataset with only one configuration.
        split: read only this split. With None, read "train", and also "validation" as the validation split if there is
            one.
        options: how the files become documents.
        articles: join the rows into articles. WikiText needs this, because its rows are single lines.

    Raises:
        OSError: when the hub cannot be reached.
        ValueError: for a missing configuration or split, an unknown type of file, or a damaged local directory.
    """
    local = Path(dataset).is_dir()
    commit = "" if local else _dataset_info(dataset).sha
    found = (_saved_files(Path(dataset)) if local else {}) or _data_files(dataset, name, commit or None)
    if split is None:
        chosen = {"train": "train", "validation": "val"} if "validation" in found else {"train": None}
    else:
        chosen = {split: None}
    missing = chosen.keys() - found.keys()
    if missing:
        raise ValueError(f"{dataset} has no split {missing.pop()!r}, only {', '.join(found)}: choose one with --split")
    kinds = [kind for kind in FORMATS.values() if kind != "text" or not articles]
    files = []
    for theirs, ours in chosen.items():
        for path in found[theirs]:
            if file_format(path) not in kinds:
                raise ValueError(f"{dataset} is stored as {Path(path).name}: expected files of type {', '.join(kinds)}")
            files.append(SourceFile(path, Path(path).stat().st_size if local else _hub_size(path), ours))
    by_article = functools.partial(_read_articles, files=tuple(files), options=options)
    read = by_article if articles else functools.partial(read_chunks, options=options)
    described = ", ".join(filter(None, ["hf " + (Path(dataset).name if local else dataset), name, split]))
    revision = files_revision(file.name for file in files) if local else commit
    return Source(
        described,
        revision,
        tuple(files),
        read,
        "rows joined into articles" if articles else text_filter(options),
        options,
    )


def _dataset_info(dataset: str) -> Any:
    """Return the hub's description of a dataset: `sha` is its newest commit, `siblings` are its files."""
    try:
        return huggingface_hub.HfApi().dataset_info(dataset, files_metadata=True, timeout=30)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"cannot reach dataset {dataset} on the Hugging Face hub ({reason}): check the network, or copy the "
            "dataset's directory to this machine and give that (`hf DIR`, or --from DIR for a preset)"
        ) from error


def _hub_size(address: str) -> int:
    return huggingface_hub.HfFileSystem().info(address)["size"]


def _saved_files(directory: Path) -> dict[str, list[str]]:
    """Return the files of each split of a directory from `datasets.save_to_disk`, or {} for any other directory.

    Raises ValueError for a damaged directory.
    """
    try:
        if (index := directory / "dataset_dict.json").is_file():
            splits = {name: directory / name for name in json.loads(index.read_text(encoding="utf-8"))["splits"]}
        elif (directory / "state.json").is_file():
            splits = {"train": directory}
        else:
            return {}
        found = {}
        for split, folder in splits.items():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            found[split] = [str(folder / file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} is not a complete directory of datasets.save_to_disk ({error}): save the dataset again"
        ) from None
    return found


def _data_files(dataset: str, name: str | None, revision: str | None) -> dict[str, list[str]]:
    """Return the local paths or hf:// addresses of the files of each split."""
    import datasets  # imported here: the import takes 0.6 s, and `data.prepare text` does not need it

    try:
        builder = datasets.load_dataset_builder(dataset, name, revision=revision)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        # A script defines this dataset. Do not execute it: read the parquet files that the hub made with it.
        builder = datasets.load_dataset_builder(dataset, name, revision="refs/convert/parquet")
    except (ValueError, OSError) as error:
        raise ValueError(f"{dataset} cannot be used: {str(error).strip()}") from error
    found = {split: [str(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    if any("/partial-" in path for paths in found.values() for path in paths):
        raise ValueError(
            f"{dataset} is on the hub only as a script, and its conversion to parquet is not complete: "
            "copy its files to this machine and use `hf DIR`"
        )
    return found


def _read_articles(
    file: SourceFile, limit: int, files: tuple[SourceFile, ...], options: ParseOptions
) -> Iterator[Chunk]:
    """Join the rows of WikiText, which are single lines, into articles, and yield those that begin in `file`.

    `files` are all files of the source: an article may continue in the next file of its split.
    """
    done: list[str] = []
    first, size = 1, 0

    def chunk(last: bool = False) -> Chunk:
        data = "".join(json.dumps({options.text_key: text}) + "\n" for text in done).encode()
        return Chunk(file, "jsonl", first, file.size if last else 0, data)

    for article in _articles(file, limit, files, options):
        done.append(article)
        size += len(article)
        if size >= limit:
            yield chunk()
            first, size, done = first + len(done), 0, []
    yield chunk(last=True)


def _articles(file: SourceFile, limit: int, files: tuple[SourceFile, ...], options: ParseOptions) -> Iterator[str]:
    """Iterate over the articles that begin in `file`. Each reaches from its title to the next."""
    split = [other for other in files if other.split == file.split]
    lines: list[str] = []
    begun = file == split[0]  # rows before the first title continue an article of an earlier file, if there is one
    for other in split[split.index(file) :]:
        if other != file and not begun:
            return
        for line in _rows(other, limit, options):
            is_title = _ARTICLE.fullmatch(line) is not None
            if is_title and any(lines):
                yield "".join(lines)
                lines = []
            if is_title and other != file:
                return
            begun = begun or is_title
            if begun:
                lines.append(line)
    if any(lines):
        yield "".join(lines)


def _rows(file: SourceFile, limit: int, options: ParseOptions) -> Iterator[str]:
    """Iterate over the texts of the rows of a file."""
    for chunk in read_chunks(file, limit, options):
        for _, text in raw_documents(chunk, options, Documents()):
            yield text.decode(errors="surrogateescape") if isinstance(text, bytes) else text or ""


def download(name: str, directory: Path) -> DatasetMeta:
    """Download shards that are already tokenized, check header and sha256 of each, and write `meta.json`.

    Files that are already in `directory` are not downloaded again. If `directory` has the complete dataset, nothing is
    downloaded or checked. Returns the content of `meta.json`. Raises OSError when the hub cannot be reached, ValueError
    for a damaged shard, or if `directory` has another dataset.
    """
    repository = TOKENIZED[name]
    source = f"hf {repository}, already tokenized"
    if directory.is_dir() and (meta := read_complete_meta(directory)) is not None:
        refuse_other_settings(directory, vars(meta), {"source": source}, "choose another --out")
        return meta
    info = _dataset_info(repository)
    directory.mkdir(parents=True, exist_ok=True)
    refuse_links(directory)
    progress = begin_progress(directory, {"download": repository})
    tokenizer = load_tokenizer("gpt2")
    save_tokenizer(tokenizer, directory, progress["kept"])
    shards: dict[str, list[ShardMeta]] = {"train": [], "val": []}
    listed = sorted((file for file in info.siblings if file.rfilename.endswith(".bin")), key=lambda f: f.rfilename)
    for number, file in enumerate(listed, 1):
        print(f"{number}/{len(listed)} {file.rfilename}")
        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    repository, file.rfilename, repo_type="dataset", revision=info.sha, local_dir=directory
                )
            )
        except Exception as error:
            raise OSError(
                f"{file.rfilename} could not be downloaded ({error}): run the same command again to continue"
            ) from error
        tokens = read_header(path)
        sha256 = file_sha256(path)
        if sha256 != file.lfs.sha256:
            path.unlink()
            raise ValueError(
                f"{path} was damaged in the download (wrong sha256) and has been removed: run the same command again"
            )
        documents = int(np.count_nonzero(np.fromfile(path, TOKEN, offset=HEADER_BYTES) == tokenizer.eot))
        shards["val" if "_val_" in path.name else "train"].append(ShardMeta(path.name, tokens, documents, sha256))
    meta = DatasetMeta(
        tokenizer="gpt2",
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        source=source,
        revision=info.sha,
        filter="",
        validation=SPLIT_OF_SOURCE.description,
        shard_tokens=max(shard.tokens for listed in shards.values() for shard in listed),
        tokens={split: sum(shard.tokens for shard in listed) for split, listed in shards.items()},
        documents={split: sum(shard.documents for shard in listed) for split, listed in shards.items()},
        text_bytes={},
        shards={split: tuple(listed) for split, listed in shards.items()},
    )
    meta.save(directory)
    (directory / PROGRESS_FILE).unlink()
    return meta
