"""Look at a dataset: `python -m data.inspect DIR`.

Prints what `meta.json` states, verifies the shards, counts documents and duplicates among them, shows the first ones
decoded, and draws how long they are.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command import ending
from data.shards import DatasetMeta, Split, list_shards, open_split, read_meta
from data.tokenizer import Tokenizer, load_tokenizer

READ_TOKENS = 1 << 22


@dataclass(frozen=True)
class Survey:
    """One entry a document, in order. lengths: tokens without end-of-text; digests: equal where the tokens are."""

    lengths: np.ndarray
    digests: np.ndarray


def read_documents(split: Split, end_of_text: int) -> Iterator[np.ndarray]:
    """The tokens of each document without its end-of-text. Memory: the longest document and a few megabytes."""
    rest = np.empty(0, np.uint16)
    first = True
    for start in range(0, split.n_tokens, READ_TOKENS):
        tokens = np.empty(min(READ_TOKENS, split.n_tokens - start), np.uint16)
        split.read(start, tokens)
        tokens = np.concatenate([rest, tokens])
        begins = np.flatnonzero(tokens == end_of_text).tolist()
        # A shard of someone else's may begin within a document.
        if begins and begins[0] > 0 and first:
            yield tokens[: begins[0]]
        first = first and not begins
        for begin, end in itertools.pairwise(begins):
            yield tokens[begin + 1 : end]
        rest = tokens[begins[-1] if begins else 0 :]
    yield rest[1:] if len(rest) and rest[0] == end_of_text else rest


def survey(split: Split, end_of_text: int) -> Survey:
    """Lengths and digests of all documents of a split."""
    lengths, digests = array("q"), array("Q")
    for tokens in read_documents(split, end_of_text):
        lengths.append(len(tokens))
        digests.append(int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()))
    return Survey(np.array(lengths), np.array(digests))


def draw_histogram(splits: dict[str, Survey], path: Path) -> None:
    """Draw the number of documents by tokens, on logarithmic axes, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    longest = max(int(documents.lengths.max()) for documents in splits.values())
    bins = np.geomspace(1, max(longest, 2) + 1, 60).tolist()
    for name, documents in splits.items():
        lengths = np.maximum(documents.lengths, 1)
        axes.hist(lengths, bins=bins, histtype="step", label=f"{name}, median {np.median(lengths):,.0f}")
    axes.set(xscale="log", yscale="log", xlabel="tokens in a document", ylabel="documents")
    axes.legend()
    figure.savefig(path, dpi=120)


def read_epochs(config: Path, train_tokens: int) -> float:
    """How often a run with this configuration sees the train split.

    Raises ValueError when the file does not say how long the run is, FileNotFoundError when it is not there.
    """
    import yaml

    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        return settings["optim"]["steps"] * settings["data"]["batch_tokens"] / train_tokens
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{config} does not set optim.steps and data.batch_tokens ({error})") from None


def describe(meta: DatasetMeta | None) -> str:
    """The lines of `meta.json` that a reader wants first."""
    if meta is None:
        return "no meta.json: taken as GPT-2 tokens, nothing to verify them against"
    lines = [f"source      {meta.source}", f"revision    {meta.revision}"]
    lines += [f"filter      {meta.filter}"] if meta.filter else []
    lines += [f"tokenizer   {meta.tokenizer}, vocabulary {meta.vocab_size:,}", f"validation  {meta.validation}"]
    lines += [f"versions    {', '.join(f'{name} {version}' for name, version in meta.versions.items())}"]
    noted = {name.replace("_", " "): count for name, count in meta.skipped.items() if count}
    return "\n".join([*lines, f"noted       {noted}"] if noted else lines)


def inspect(directory: Path, shown: int, histogram: Path, config: Path | None) -> None:
    """Print and draw all of it. Raises ValueError for a damaged dataset, OSError when it cannot be read."""
    meta = read_meta(directory)
    print(describe(meta))
    tokenizer: Tokenizer = load_tokenizer(directory if meta else "gpt2")
    splits: dict[str, Survey] = {}
    for name in ("train", "val"):
        if not (meta.tokens.get(name) if meta else list_shards(directory, name)):
            print(f"\n{name}: none")
            continue
        split = open_split(directory, name)
        if meta is not None:
            split.verify()
        documents = splits[name] = survey(split, tokenizer.eot)
        if meta is not None and len(documents.lengths) != meta.documents[name]:
            raise ValueError(
                f"{name} has {len(documents.lengths):,} documents, meta.json says {meta.documents[name]:,}"
            )
        _print_split(name, split, documents, tokenizer, shown)
    if not splits:
        raise FileNotFoundError(f"{directory} has no shards: make some with python -m data.prepare")
    if len(splits) == 2:
        shared = np.isin(splits["val"].digests, splits["train"].digests).sum()
        print(f"\n{shared:,} documents of val are also in train")
    if config is not None and "train" in splits:
        epochs = read_epochs(config, int(splits["train"].lengths.sum()) + len(splits["train"].lengths))
        print(f"{config}: {epochs:.2f} epochs of train")
    draw_histogram(splits, histogram)
    print(f"lengths drawn in {histogram}")


def _print_split(name: str, split: Split, documents: Survey, tokenizer: Tokenizer, shown: int) -> None:
    lengths = documents.lengths
    verified = ", sha256 verified" if split.meta is not None else ""
    print(f"\n{name}: {split.n_tokens:,} tokens in {len(lengths):,} documents; shards: {len(split.paths)}{verified}")
    low, middle, high = (int(value) for value in np.percentile(lengths, (5, 50, 95)))
    print(f"tokens in a document: mean {lengths.mean():,.0f}, median {middle:,}, most {lengths.max():,}; ", end="")
    print(f"nine in ten between {low:,} and {high:,}")
    repeated = len(documents.digests) - len(np.unique(documents.digests))
    print(f"{repeated:,} documents repeat an earlier one ({repeated / len(lengths):.2%})")
    for i, tokens in zip(range(shown), read_documents(split, tokenizer.eot), strict=False):
        text = tokenizer.decode(tokens[:200].tolist())
        print(f"--- {name} document {i + 1}, {len(tokens):,} tokens\n{text[:400]}{' ...' if len(tokens) > 200 else ''}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description="Look at a dataset of token shards.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--documents", type=int, default=2, metavar="N", help="documents to show of each split (default 2)"
    )
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="default: DIR/tokens-per-document.png")
    parser.add_argument("--config", type=Path, metavar="YAML", help="estimate how many epochs this run would make")
    args = parser.parse_args(arguments)
    with ending(parser):
        histogram = args.histogram or args.directory / "tokens-per-document.png"
        inspect(args.directory, args.documents, histogram, args.config)


if __name__ == "__main__":
    main()
