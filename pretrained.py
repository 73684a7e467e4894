"""Find and load a trained model: a run of train.py, a checkpoint, a directory in transformers' layout, or the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from checkpoints import choose_checkpoint, is_run, list_checkpoints
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT, GPTConfig
from weights import StoredModel, find_config, locate, open_model

PADDING_LIMIT = 128  # padding a vocabulary to a multiple of 64 or 128, for speed, adds fewer tokens than this


def resolve_model(name_or_dir: str | None, runs: str = "runs", checkpoint: str | None = None) -> str:
    """Return the model directory or hub name that the options `--model` and `--checkpoint` select.

    If `name_or_dir` is None, it stands for the run in the directory `runs` that wrote a checkpoint last. The directory
    of a run is replaced by one of its checkpoints, which `choose_checkpoint` selects and names on stderr. Any other
    value is returned unchanged.

    Raises:
        FileNotFoundError: the run or its requested checkpoint does not exist, or a directory holds runs or checkpoints
            but is not a model.
        ValueError: the checkpoint is damaged, or `checkpoint` has an unknown value or is given for a model that is not
            a run.
    """
    if name_or_dir is None:
        found = [path for run in Path(runs).glob("*/checkpoints") for path in list_checkpoints(run)]
        if not found:
            raise FileNotFoundError(
                f"there is no run with a checkpoint in {runs}/: train a model, or name one with --model"
            )
        name_or_dir = str(max(found, key=lambda path: path.stat().st_mtime).parent.parent)
    directory = Path(name_or_dir).expanduser()
    if is_run(directory):
        return str(choose_checkpoint(directory, checkpoint))
    beside = sorted(run.parent.name for run in directory.parent.glob("*/checkpoints"))
    names_a_run = directory.parent != Path() and (beside or directory.parent == Path(runs))  # False for hub names
    if names_a_run and not directory.exists():
        others = f"the runs in {directory.parent} are {', '.join(beside)}" if beside else "there are no runs beside it"
        raise FileNotFoundError(f"{name_or_dir} does not exist; {others}")
    inside = [run.parent.name for run in directory.glob("*/checkpoints")]
    if (inside or list_checkpoints(directory)) and not find_config(directory).is_file():
        held = f"runs: {', '.join(sorted(inside))}" if inside else f"the checkpoints of {directory.parent}"
        raise FileNotFoundError(f"{name_or_dir} is not a model, but holds {held}; give one of them")
    if checkpoint is not None:
        raise ValueError(f"--checkpoint selects a checkpoint of a run, but {name_or_dir} is not a run: omit it")
    return name_or_dir


class ModelFiles(NamedTuple):
    """The files of a trained model, before its weights are loaded. The tokenizer matches the configuration."""

    name: str  # directory or hub name, as `resolve_model` returns it
    stored: StoredModel
    config: GPTConfig  # its vocab_size may include padding (see `fit_vocabulary`)
    tokenizer: Tokenizer

    @property
    def directory(self) -> Path:
        """The directory that holds the files."""
        return self.stored.directory


def find_model(name_or_dir: str | None, checkpoint: str | None = None) -> ModelFiles:
    """Find the model that the options `--model` and `--checkpoint` select, and read its configuration and tokenizer.

    Raises:
        OSError: there is no such model.
        ValueError: the files are damaged, or the tokenizer does not belong to the model.
    """
    name = resolve_model(name_or_dir, checkpoint=checkpoint)
    stored = open_model(locate(name))  # before the tokenizer, so that an empty directory gives an error about the model
    config, tokenizer = GPTConfig(**stored.config_arguments()), load_tokenizer(stored.directory)
    check_vocabulary(config.vocab_size, tokenizer, stored.directory)
    return ModelFiles(name, stored, config, tokenizer)


def load_model(
    name_or_dir: str | None,
    *,
    checkpoint: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[GPT, Tokenizer, str]:
    """Load the model that `--model` and `--checkpoint` select, in eval mode, and remove the padding of its vocabulary.

    Returns:
        The model, its tokenizer, and the directory or hub name that it was loaded from.

    Raises what `find_model` raises, and ValueError if the weights are damaged or missing.
    """
    found = find_model(name_or_dir, checkpoint)
    model = GPT.from_pretrained(found.directory, dtype=dtype, device=device)
    fit_vocabulary(model, found.tokenizer, found.directory)
    return model, found.tokenizer, found.name


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
    """Remove from a model, in place, the tokens that a tokenizer lacks.

    Many trainers pad the vocabulary, for example from 50,257 to 50,304 tokens. The added ids have no text and must not
    be sampled.

    Raises ValueError if the tokenizer does not belong to the model in `directory`.
    """
    check_vocabulary(model.config.vocab_size, tokenizer, directory)
    if model.config.vocab_size > tokenizer.vocab_size:
        model.resize_token_embeddings(tokenizer.vocab_size)


def extend_positions(model: GPT, block_size: int) -> GPT:
    """Return a model with position embeddings for `block_size` tokens, which shares all other weights with `model`.

    The new position embeddings are interpolated linearly between the learned ones, so that each position lies between
    positions that the model was trained with (Chen et al. 2023, "Extending context window via position interpolation").
    The model needs some fine-tuning to use the new embeddings.
    """
    old = model.transformer.wpe.weight.detach()
    new = F.interpolate(old.T.unsqueeze(0), block_size, mode="linear", align_corners=True)[0].T.contiguous()
    # Build a new model, because the modules of attention="lsh" depend on block_size.
    with torch.device("meta"):
        longer = GPT(replace(model.config, block_size=block_size))
    longer.load_state_dict(model.state_dict() | {"transformer.wpe.weight": new}, assign=True)
    return longer
