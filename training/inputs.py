"""What a run begins with: its dataset, its tokenizer and its first weights, refused before anything is created."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from data.completions import CompletionWindows
from data.loader import TokenWindows, Windows
from data.shards import list_shards, open_split
from data.tokenizer import Tokenizer, load_tokenizer
from eval.hellaswag import read_questions
from model import GPT, GPTConfig
from pretrained import resolve_model
from training.config import Config
from weights import load_weights, locate, read_config

# What each released shape is trained with, tokens of a step and peak learning rate of AdamW (configs/gpt2-*.yaml).
RECIPES = {
    "gpt2": (524_288, 6e-4),
    "gpt2-medium": (524_288, 3e-4),
    "gpt2-large": (524_288, 2.5e-4),
    "gpt2-xl": (1_048_576, 6e-4),
}
MAX_EPOCHS = 4  # repeated more often, text is worth ever less (Muennighoff et al. 2023, "Data-Constrained LMs")


@dataclass(frozen=True)
class Inputs:
    """A dataset, open, with the tokenizer it was made with or, for text, is read with."""

    train: Windows
    val: Windows | None  # a dataset may have none, where eval.every is 0
    tokenizer: Tokenizer
    prompts: list[list[int]]  # token ids to sample from at validation
    n_cut: int = 0  # training prompts that were too long, and lost their beginning

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all training windows, padding included, as data.batch_tokens counts them."""
        return len(self.train) * self.train.sequence_length


def open_inputs(config: Config, *, verify: bool, checkpoint: Path | None = None) -> Inputs:
    """Open and check what the configuration names; with `verify`, every shard's hash too.

    Text is read with the tokenizer of the `checkpoint` to go on from, where there is one.

    Raises ValueError or OSError that names what is missing or damaged, and the mend.
    """
    if config.data.format == "completions":
        if verify:
            raise ValueError(
                "--verify holds shards against their hashes, and data.format completions has none: leave it out"
            )
        inputs = open_completions(config, checkpoint)
    else:
        inputs = open_tokens(config, verify=verify)
    if config.eval.every and config.eval.hellaswag:
        if inputs.tokenizer.kind == "char":
            raise ValueError("eval.hellaswag has characters that a char tokenizer lacks: set it to false")
        read_questions("completion")  # fetched now: a missing network should not show at the first validation
    return inputs


def open_tokens(config: Config, *, verify: bool) -> Inputs:
    """Token shards, and the tokenizer beside them; GPT-2's where there is no meta.json."""
    directory = Path(config.data.dir)
    train, val = open_split(directory, "train"), None
    if list_shards(directory, "val") or (train.meta and train.meta.shards.get("val")):
        val = open_split(directory, "val")
    elif config.eval.every:
        raise FileNotFoundError(
            f"{directory} has no val shards (*val_NNNNNN.bin): prepare it again with a part held out, or train without "
            f"validation, --eval.every 0"
        )
    if verify:
        for split in (train, val) if val else (train,):
            split.verify()
    tokenizer = load_tokenizer(config.data.dir if train.meta else "gpt2")
    length = config.data.sequence_length
    return Inputs(
        TokenWindows(train, length, tokenizer.vocab_size),
        TokenWindows(val, length, tokenizer.vocab_size, tokens=config.eval.tokens) if val else None,
        tokenizer,
        [[tokenizer.eot]],
    )


def open_completions(config: Config, checkpoint: Path | None) -> Inputs:
    """Prompts and completions, encoded with the tokenizer beside the first weights; GPT-2's from scratch."""
    directory, length = Path(config.data.dir), config.data.sequence_length
    tokenizer = load_tokenizer(find_weights(config, checkpoint) or "gpt2")
    train = CompletionWindows(directory / "train.jsonl", tokenizer, length, pack=config.data.pack)
    val = CompletionWindows(directory / "val.jsonl", tokenizer, length, pack=False)  # each by itself, as it is used
    return Inputs(train, val, tokenizer, val.prompts, train.n_cut)


def find_weights(config: Config, checkpoint: Path | None) -> Path | None:
    """The directory of the first weights: a checkpoint to go on from, else model.init_from, else None (scratch)."""
    if checkpoint is None and config.model.init_from != "scratch":
        return locate(resolve_model(config.model.init_from))
    return checkpoint


def model_shape(config: Config, tokenizer: Tokenizer, source: Path | None) -> GPTConfig:
    """The model's shape: as configured or, with model.init_from, that of `source`, the directory its weights are in.

    Raises ValueError where the two, or their tokenizers, do not go together.
    """
    asked = config.model
    if source is not None and load_tokenizer(source) != tokenizer:
        raise ValueError(
            f"{source} and {config.data.dir} have different tokenizers: prepare the text again with the tokenizer that "
            f"the model was trained with"
        )
    if source is None or asked.init_from == "scratch":
        return config.model_config(tokenizer.vocab_size)
    shape = dataclasses.replace(GPTConfig(**read_config(source)), dropout=asked.dropout)
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if getattr(asked, name) not in (None, getattr(shape, name)):
            raise ValueError(
                f"model.{name} is {getattr(asked, name)}, {source} has {getattr(shape, name)}: leave it out"
            )
    if asked.freeze_layers > shape.n_layer:
        raise ValueError(f"model.freeze_layers {asked.freeze_layers} is above {source}'s {shape.n_layer}: lower it")
    if config.data.sequence_length > shape.block_size:
        raise ValueError(f"data.sequence_length {config.data.sequence_length} is above {source}'s {shape.block_size}")
    return shape


def make_model(shape: GPTConfig, source: Path | None, seed: int) -> GPT:
    """A GPT on the CPU, in float32, with the weights in `source`, or from scratch: the same for every rank."""
    if source is None:
        torch.manual_seed(seed)
        return GPT(shape)
    with torch.device("meta"):
        model = GPT(shape)
    load_weights(model, source, dtype=torch.float32, device="cpu")
    return model


def warnings(config: Config, inputs: Inputs) -> list[str]:
    """What can be trained, but is seldom meant: a small batch with a large batch's learning rate, too little text."""
    data, optim, model = config.data, config.optim, config.model
    found = []
    as_released = model.init_from == "scratch" and not (model.n_layer or model.n_head or model.n_embd)
    if model.preset and as_released:
        batch_tokens, lr = RECIPES[model.preset]
        share = data.batch_tokens / batch_tokens
        if share <= 0.5 and optim.lr >= lr:
            found.append(
                f"data.batch_tokens {data.batch_tokens:,} is {1 / share:.0f} times below the {batch_tokens:,} that "
                f"optim.lr {optim.lr:g} goes with: the loss will be noisy; more processes do not change it. Raise it "
                f"(micro-batches accumulate), or lower optim.lr to about {lr * share**0.5:.1e}"
            )
    epochs = optim.steps * data.batch_tokens / inputs.epoch_tokens
    if epochs > MAX_EPOCHS:
        steps = MAX_EPOCHS * inputs.epoch_tokens // data.batch_tokens
        found.append(
            f"{optim.steps:,} steps repeat {data.dir} {epochs:.1f} times; after about {MAX_EPOCHS} it teaches little "
            f"that is new: prepare more text, or lower optim.steps to {steps:,}"
        )
    if inputs.n_cut:
        found.append(
            f"{inputs.n_cut:,} prompts are longer than data.sequence_length {data.sequence_length} leaves room for: "
            f"their beginnings were cut off; raise it to keep them"
        )
    return found
