"""Find and load a trained model: from a run of train.py, a checkpoint, a directory in transformers' layout, or the hub.

A checkpoint is a directory in transformers' layout, with the state of training and a manifest beside the model:

    checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                               trainer/optimizer.safetensors trainer/state.json   manifest.json

training/checkpoint.py writes checkpoints. This module finds the newest one that is complete and undamaged.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from files import file_sha256
from model import GPT
from weights import locate

PADDING_LIMIT = 128  # vocabularies are padded to a multiple of 64 or 128 for speed: by fewer entries than this

MANIFEST = "manifest.json"  # size and sha256 of every other file of the checkpoint
STATE = "trainer/state.json"
OPTIMIZER = "trainer/optimizer.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a run's `checkpoints` directory in the order of their steps, without verifying them."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verify(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with the size and the hash in its manifest.

    Raises:
        ValueError, OSError: a file is missing or differs. The message names the first such file.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} is not a manifest ({error})") from None
    for name, (size, sha256) in listed.items():
        path = checkpoint / name
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{checkpoint / MANIFEST} lists {name!r}, expected only files of the checkpoint")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, but its manifest says {size:,}")
        if file_sha256(path) != sha256:
            raise ValueError(f"{path} has another sha256 than its manifest says")
    if missing := {"config.json", STATE, OPTIMIZER} - listed.keys():
        raise ValueError(f"{checkpoint / MANIFEST} does not list {', '.join(sorted(missing))}")


def find_newest(directory: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint of a run that matches its manifest, and the damaged ones that are newer.

    directory is the run's `checkpoints`. A damaged checkpoint is named on stderr, skipped and left unchanged. The first
    result is None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but all of them are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
        except (OSError, ValueError) as error:
            print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
            damaged.append(path)
        else:
            return path, damaged
    if damaged:
        raise ValueError(f"every checkpoint in {directory} is damaged: move them away to start from the beginning")
    return None, []


def resolve_model(name_or_dir: str | None, runs: str = "runs") -> str:
    """Return the model directory or hub name that the option `--model` selects.

    None selects the newest run in the directory `runs`. A run's directory is replaced by its newest undamaged
    checkpoint. Any other value is returned unchanged.

    Raises:
        FileNotFoundError: there is no run, no such run beside the others, or the run has no checkpoint.
        ValueError: every checkpoint of the run is damaged.
    """
    if name_or_dir is None:
        found = [path for run in Path(runs).glob("*/checkpoints") for path in list_checkpoints(run)]
        if not found:
            raise FileNotFoundError(
                f"there is no run with a checkpoint in {runs}/: train a model, or name one with --model"
            )
        name_or_dir = str(max(found, key=lambda path: path.stat().st_mtime).parent.parent)
    path = Path(name_or_dir).expanduser()
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir():
        beside = sorted(run.parent.name for run in path.parent.glob("*/checkpoints"))
        if beside and not path.exists() and path.parent != Path():  # "gpt2" may be a name on the hub
            raise FileNotFoundError(f"{name_or_dir} does not exist; the runs in {path.parent} are {', '.join(beside)}")
        return name_or_dir
    newest, _ = find_newest(checkpoints)
    if newest is None:
        raise FileNotFoundError(f"{name_or_dir} has no checkpoint yet")
    return str(newest)


def load_model(
    name_or_dir: str | None, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer, str]:
    """Load the model that the option `--model` selects (see `resolve_model`), in eval mode.

    Returns:
        The model, its tokenizer, and the directory or hub name that it was loaded from.

    Raises:
        OSError: there is no such model.
        ValueError: the files are damaged, or the tokenizer does not belong to the model (see `fit_vocabulary`).
    """
    name = resolve_model(name_or_dir)
    directory = locate(name)
    tokenizer = load_tokenizer(directory)
    model = GPT.from_pretrained(directory, dtype=dtype, device=device)
    fit_vocabulary(model, tokenizer, directory)
    return model, tokenizer, name


def check_vocabulary(vocab_size: int, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Raise ValueError if a tokenizer does not belong to a model with `vocab_size` tokens in `directory`.

    The model may have up to PADDING_LIMIT - 1 more tokens than the tokenizer.
    """
    if not 0 <= vocab_size - tokenizer.vocab_size < PADDING_LIMIT:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, but the model has {vocab_size}: they do "
            f"not belong together; name a directory that holds the model and its own tokenizer.json"
        )


def fit_vocabulary(model: GPT, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Remove the tokens that a tokenizer lacks from a model in place.

    Many trainers pad the vocabulary, from 50,257 to 50,304 tokens for example. An id beyond the tokenizer has no text:
    without its row, it can neither be chosen nor take a part of the probability.

    Raises ValueError if the tokenizer does not belong to the model in `directory`.
    """
    check_vocabulary(model.config.vocab_size, tokenizer, directory)
    if model.config.vocab_size > tokenizer.vocab_size:
        model.resize_token_embeddings(tokenizer.vocab_size)
