"""Check a dataset and describe it: `python -m data.check DIR`.

Verifies the shards, prints the main entries of `meta.json`, counts documents and duplicates, shows the beginning of the
first documents as text, and draws a histogram of the document lengths.
"""

from __future__ import annotations

if not __package__:  # started as `python data/check.py`: the imports below would fail
    raise SystemExit("Run this in the root of the repository: python -m data.check")

import hashlib
import itertools
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

from command import CommandParser, ending
from data.shards import DatasetMeta, Split, list_shards, open_split, read_meta
from data.tokenizer import Tokenizer, load_tokenizer

READ_TOKENS = 1 << 22  # tokens read at once
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class DocumentStatistics:
    """The length and a hash of each document of a split, in the order of the split.

    lengths: (documents,) int64, the number of tokens of each document, not counting end-of-text;
    digests: (documents,) uint64, hashes of the documents' tokens: documents with equal tokens have equal hashes.
    """

    lengths: np.ndarray
    digests: np.ndarray


def read_documents(split: Split, end_of_text: int) -> Iterator[np.ndarray]:
    """Iterate over the documents of a split: the tokens of each, (n,) uint16, without its end-of-text."""
    rest = np.empty(0, np.uint16)
    first = True
    for start in range(0, split.n_tokens, READ_TOKENS):
        tokens = np.empty(min(READ_TOKENS, split.n_tokens - start), np.uint16)
        split.read(start, tokens)
        tokens = np.concatenate([rest, tokens])
        begins = np.flatnonzero(tokens == end_of_text).tolist()
        # A split that another program wrote may begin without end-of-text. Its first tokens are a document too.
        if begins and begins[0] > 0 and first:
            yield tokens[: begins[0]]
        first = first and not begins
        for begin, end in itertools.pairwise(begins):
            yield tokens[begin + 1 : end]
        rest = tokens[begins[-1] if begins else 0 :]
    yield rest[1:] if len(rest) and rest[0] == end_of_text else rest


def measure_documents(split: Split, end_of_text: int) -> DocumentStatistics:
    """Return lengths and digests of all documents of a split."""
    lengths, digests = array("q"), array("Q")
    for tokens in read_documents(split, end_of_text):
        lengths.append(len(tokens))
        digests.append(int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()))
    return DocumentStatistics(np.array(lengths), np.array(digests))


def draw_histogram(splits: dict[str, DocumentStatistics], path: Path) -> None:
    """Draw a histogram of tokens per document, on logarithmic axes, and save it as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    longest = max(int(documents.lengths.max()) for documents in splits.values())
    bins = np.geomspace(1, max(longest, 2) + 1, 60).tolist()
    for name, documents in splits.items():
        lengths = np.maximum(documents.lengths, 1)  # a logarithmic axis cannot show 0
        axes.hist(lengths, bins=bins, histtype="step", label=f"{name}, median {np.median(lengths):,.0f}")
    axes.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel="documents")
    axes.legend()
    figure.savefig(path, dpi=120)


def read_epochs(config: Path, train_tokens: int) -> float:
    """Return how many epochs a run with the configuration file `config` makes. An epoch has `train_tokens` tokens.

    Raises FileNotFoundError when the file does not exist, ValueError when the file is not YAML or does not set
    optim.steps and data.batch_tokens.
    """
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        return settings["optim"]["steps"] * settings["data"]["batch_tokens"] / train_tokens
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{config} does not set optim.steps and data.batch_tokens ({error})") from None


def describe(meta: DatasetMeta | None) -> str:
    """Return the main entries of `meta.json` as lines of text. If `meta` is None, say that there is no `meta.json`."""
    if meta is None:
        return "no meta.json: the tokens are assumed to be GPT-2's, and there are no hashes to verify"
    lines = [f"source      {meta.source}", f"revision    {meta.revision}"]
    lines += [f"filter      {meta.filter}"] if meta.filter else []
    lines += [f"tokenizer   {meta.tokenizer}, vocabulary {meta.vocab_size:,}", f"validation  {meta.validation}"]
    lines += [f"versions    {', '.join(f'{name} {version}' for name, version in meta.versions.items())}"]
    unusual = {name.replace("_", " "): count for name, count in meta.skipped.items() if count}
    return "\n".join([*lines, f"unusual     {unusual}"] if unusual else lines)


def check_dataset(directory: Path, shown: int, histogram: Path, config: Path | None) -> None:
    """Verify the dataset, print its description and draw the histogram.

    Args:
        directory: the dataset.
        shown: the number of documents of each split to print.
        histogram: path of the PNG.
        config: a configuration file, or None. With a file, print how many epochs its run makes over the train split.

    Raises:
        ValueError: when the dataset is incomplete or damaged, or `config` does not set the length of a run.
        OSError: when a file cannot be read or written.
    """
    meta = read_meta(directory)
    print(describe(meta))
    tokenizer: Tokenizer = load_tokenizer(directory if meta else "gpt2")
    if meta is not None:
        _check_tokenizer(directory, meta, tokenizer)
    splits: dict[str, DocumentStatistics] = {}
    for name in ("train", "val"):
        if not (meta.tokens.get(name) if meta else list_shards(directory, name)):
            print(f"\n{name}: none")
            continue
        split = open_split(directory, name)
        if meta is not None:
            split.verify()
        documents = splits[name] = measure_documents(split, tokenizer.eot)
        if meta is not None:
            _check_counts(name, split, tokenizer, meta)
        _print_split(name, split, documents, tokenizer, shown)
    if not splits:
        raise FileNotFoundError(f"{directory} has no shards: make a dataset with python -m data.prepare")
    if len(splits) == 2:
        shared = np.isin(splits["val"].digests, splits["train"].digests).sum()
        print(f"\n{shared:,} documents of val are also in train")
    if config is not None and "train" in splits:
        epochs = read_epochs(config, int(splits["train"].lengths.sum()) + len(splits["train"].lengths))
        print(f"{config}: {epochs:.2f} epochs of train")
    draw_histogram(splits, histogram)
    print(f"histogram of document lengths: {histogram}")


def _check_tokenizer(directory: Path, meta: DatasetMeta, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the tokenizer beside the shards is not the one that `meta.json` states."""
    for key, found in (
        ("tokenizer_sha256", tokenizer.fingerprint),
        ("vocab_size", tokenizer.vocab_size),
        ("tokenizer", tokenizer.kind),
    ):
        _compare(f"the tokenizer in {directory}: {key}", found, getattr(meta, key))


def _check_counts(name: str, split: Split, tokenizer: Tokenizer, meta: DatasetMeta) -> None:
    """Raise ValueError when a count of `meta.json` is wrong for this split, or a token is outside the vocabulary."""
    _compare(f"{name}: tokens", split.n_tokens, meta.tokens[name])
    text_bytes, token_bytes = 0, tokenizer.token_bytes()
    position = documents = 0
    for shard in meta.shards[name]:
        begun = 0
        for start in range(position, position + shard.tokens, READ_TOKENS):
            tokens = np.empty(min(READ_TOKENS, position + shard.tokens - start), np.uint16)
            split.read(start, tokens)
            begun += int(np.count_nonzero(tokens == tokenizer.eot))
            if tokens.max() >= tokenizer.vocab_size:
                raise ValueError(f"{shard.file} holds the token {tokens.max()}, outside the vocabulary")
            text_bytes += int(token_bytes[tokens].sum())
        _compare(f"{shard.file}: documents", begun, shard.documents)
        position, documents = position + shard.tokens, documents + begun
    _compare(f"{name}: documents", documents, meta.documents[name])
    if name in meta.text_bytes:  # `data.prepare download` does not know the text, so it leaves this entry out
        _compare(f"{name}: text_bytes", text_bytes, meta.text_bytes[name])


def _compare(name: str, found: object, stated: object) -> None:
    if found != stated:
        raise ValueError(f"{name} is {found}, meta.json says {stated}: prepare the dataset again")


def _print_split(name: str, split: Split, documents: DocumentStatistics, tokenizer: Tokenizer, shown: int) -> None:
    lengths = documents.lengths
    verified = ", sha256 verified" if split.meta is not None else ""
    print(f"\n{name}: {split.n_tokens:,} tokens in {len(lengths):,} documents; shards: {len(split.paths)}{verified}")
    low, middle, high = (int(value) for value in np.percentile(lengths, (5, 50, 95)))
    print(f"tokens per document: mean {lengths.mean():,.0f}, median {middle:,}, longest {lengths.max():,}; ", end="")
    print(f"90% have between {low:,} and {high:,}")
    repeated = len(documents.digests) - len(np.unique(documents.digests))
    print(f"{repeated:,} documents repeat an earlier one ({repeated / len(lengths):.2%})")
    for i, tokens in zip(range(shown), read_documents(split, tokenizer.eot), strict=False):
        # Show control characters as escapes, because a terminal would execute the control sequences of a text.
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", tokenizer.decode(tokens[:200].tolist()))
        print(f"--- {name} document {i + 1}, {len(tokens):,} tokens\n{text[:400]}{' ...' if len(tokens) > 200 else ''}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(prog="python -m data.check", description="Check a dataset of token shards and describe it.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--documents", type=int, default=2, metavar="N", help="number of documents of each split to show (default 2)"
    )
    parser.add_argument(
        "--histogram",
        type=Path,
        metavar="PNG",
        help="where to save the histogram (default: DIR/tokens-per-document.png)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="print how many epochs a run with this configuration makes"
    )
    args = parser.parse_args(arguments)
    with ending(parser, needs_reader=True):
        histogram = args.histogram or args.directory / "tokens-per-document.png"
        check_dataset(args.directory, args.documents, histogram, args.config)


if __name__ == "__main__":
    main()
