"""The dataset and the tokenizer of a run. They are checked before the run creates any file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.aligned import AlignedWindows
from data.completions import CompletionWindows
from data.loader import TokenWindows, TrainingWindows, Windows
from data.mixture import MixtureWindows
from data.shards import Split, list_shards, open_split
from data.tokenizer import Tokenizer, load_tokenizer
from eval.hellaswag import read_questions
from eval.reference import losses_to_beat
from pretrained import ModelFiles
from training.config import Config, Data

# Batch size in tokens and peak learning rate for each preset with AdamW, as in configs/gpt2-*.yaml. They are repeated
# here because an installation may lack these files.
RECIPES = {
    "gpt2": (524_288, 6e-4),
    "gpt2-medium": (524_288, 3e-4),
    "gpt2-large": (524_288, 2.5e-4),
    "gpt2-xl": (1_048_576, 6e-4),
}
MAX_EPOCHS = 4  # further repetitions of a text teach much less (Muennighoff et al. 2023, "Data-Constrained LMs")


@dataclass(frozen=True)
class Inputs:
    """An open dataset and its tokenizer."""

    train: TrainingWindows
    val: dict[str, Windows]  # dataset directory -> its windows; several for a mixture; empty only if eval.every is 0
    tokenizer: Tokenizer
    prompts: list[list[int]]  # token ids of the prompts from which each validation samples texts
    notes: list[str] = field(default_factory=list)  # about the data, printed when the run starts
    n_cut: int = 0  # number of training prompts that were too long, and whose beginning was cut off
    final_val: dict[str, Windows] = field(default_factory=dict)  # like `val`, for eval.final_tokens; {} if that is null
    reference_losses: list[tuple[str, float]] = field(default_factory=list)  # (model, nats per token) for loss.png
    bytes_per_token: float | None = None  # mean UTF-8 bytes per token of the training split; None if not known

    @property
    def epoch_tokens(self) -> int:
        """Number of tokens in all training windows. Padding counts, as it does in data.batch_tokens."""
        return len(self.train) * self.train.sequence_length

    @property
    def validation_fingerprint(self) -> str | None:
        """A text made of hashes of the validation data, equal for equal data; None without validation data."""
        fingerprints = [windows.fingerprint for windows in self.val.values()]
        return " ".join(fingerprints) or None

    @property
    def validation_tokens(self) -> int:
        """Number of targets that each validation scores, 0 without validation data."""
        return count_targets(self.val)

    @property
    def final_tokens(self) -> int:
        """Number of targets that the additional validation after the last step scores, 0 without eval.final_tokens."""
        return count_targets(self.final_val)


def count_targets(val: dict[str, Windows]) -> int:
    """Return the number of targets in the validation windows of all datasets."""
    return sum(windows.count(np.arange(len(windows))) for windows in val.values())


def open_inputs(config: Config, initial: ModelFiles | None, *, verify: bool) -> Inputs:
    """Open and check the dataset; with `verify`, also the hash of each shard. Download HellaSwag if the run scores it.

    Raises ValueError or OSError if a file is missing or damaged, or if the configuration does not fit the dataset.
    """
    if config.data.format == "completions":
        if verify:
            raise ValueError(
                "--verify compares shards with their hashes, and data.format completions has none: omit the option"
            )
        inputs = open_completions(config, initial)
    else:
        inputs = open_datasets(config, verify=verify)
    if initial is not None and initial.tokenizer != inputs.tokenizer:
        names, resumes = ", ".join(dataset_names(config.data)), config.model.init_from == "scratch"
        raise ValueError(
            f"{initial.directory} and {names} have different tokenizers: prepare the text again with the tokenizer "
            f"that the model was trained with{', or choose another run.name' if resumes else ''}"
        )
    if config.eval.every and config.eval.hellaswag:
        if inputs.tokenizer.kind == "char":
            raise ValueError("eval.hellaswag has characters that a char tokenizer lacks: set it to false")
        read_questions("completion")  # downloads them: without a network, the run ends here and not at validation
    if config.data.mixture:  # no reference loss was measured on a mixture
        return inputs
    references = losses_to_beat(config.data.dir, inputs.train.source, inputs.tokenizer.kind)
    return dataclasses.replace(inputs, reference_losses=references)


def open_datasets(config: Config, *, verify: bool) -> Inputs:
    """Open the token shards of data.dir or of all datasets of data.mixture.

    Raises ValueError if the datasets of a mixture have different tokenizers.
    """
    mixture, names = config.data.mixture, dataset_names(config.data)
    parts = [open_tokens(config, name, verify=verify) for name in names]
    if not mixture:
        return parts[0]
    for part, opened in zip(mixture, parts, strict=True):
        if opened.tokenizer != parts[0].tokenizer:
            raise ValueError(
                f"data.mixture: {mixture[0].dir} and {part.dir} have different tokenizers: prepare one of them again "
                f"with --tokenizer DIR, the directory of the other"
            )
    return Inputs(
        MixtureWindows([opened.train for opened in parts], [part.weight for part in mixture]),
        {name: windows for opened in parts for name, windows in opened.val.items()},
        parts[0].tokenizer,
        parts[0].prompts,
        [note for opened in parts for note in opened.notes],
        final_val={name: windows for opened in parts for name, windows in opened.final_val.items()},
    )


def open_tokens(config: Config, dataset: str, *, verify: bool) -> Inputs:
    """Open the token shards and the tokenizer in a directory. Without a meta.json, the tokenizer is GPT-2's.

    Raises ValueError or OSError if shards are missing or damaged, or if the tokenizer is not the one that meta.json
    states.
    """
    directory = Path(dataset)
    train, val = open_split(directory, "train"), None
    # A downloaded dataset does not state the size of its text.
    text_bytes = train.meta.text_bytes.get("train") if train.meta else None
    if list_shards(directory, "val") or (train.meta and train.meta.shards.get("val")):
        val = open_split(directory, "val")
    elif config.eval.every:
        raise FileNotFoundError(
            f"{directory} has no val shards (*val_NNNNNN.bin): prepare it again with a validation split, or train "
            f"without validation, --eval.every 0"
        )
    if verify:
        for split in (train, val) if val else (train,):
            split.verify()
    tokenizer = load_tokenizer(dataset if train.meta else "gpt2")
    if train.meta and tokenizer.fingerprint != train.meta.tokenizer_sha256:
        raise ValueError(
            f"the tokenizer in {dataset} is not the one that its meta.json states: restore tokenizer.json, or prepare "
            f"the dataset again"
        )
    length, windows = config.data.sequence_length, training_windows(config, train, tokenizer)
    eot = tokenizer.eot if config.data.document_mask else None

    def validation_windows(tokens: int | None) -> dict[str, Windows]:
        if val is None or tokens is None:
            return {}
        return {dataset: TokenWindows(val, length, tokenizer.vocab_size, tokens=tokens, mask_eot=eot)}

    return Inputs(
        windows,
        validation_windows(config.eval.tokens),
        tokenizer,
        [[tokenizer.eot]],
        [f"{dataset}: {windows.summary}"] if isinstance(windows, AlignedWindows) else [],
        final_val=validation_windows(config.eval.final_tokens),
        bytes_per_token=text_bytes / train.n_tokens if text_bytes else None,
    )


def training_windows(config: Config, split: Split, tokenizer: Tokenizer) -> TokenWindows | AlignedWindows:
    """Divide the train split into windows, in the way that data.windows, data.shift and data.document_mask select."""
    data, n, eot = config.data, tokenizer.vocab_size, tokenizer.eot
    if data.windows == "aligned":
        return AlignedWindows(split, data.sequence_length, n, eot, document_mask=data.document_mask)
    mask_eot = eot if data.document_mask else None
    return TokenWindows(split, data.sequence_length, n, shift=data.shift, mask_eot=mask_eot)


def open_completions(config: Config, initial: ModelFiles | None) -> Inputs:
    """Open prompts and completions, encoded with the tokenizer of the initial model (GPT-2's if `initial` is None)."""
    directory, length = Path(config.data.dir), config.data.sequence_length
    tokenizer = load_tokenizer("gpt2") if initial is None else initial.tokenizer
    train = CompletionWindows(
        directory / "train.jsonl", tokenizer, length, pack=config.data.pack, document_mask=config.data.document_mask
    )
    # In validation, each example has a window of its own, because the trained model will read one prompt at a time.
    val = CompletionWindows(directory / "val.jsonl", tokenizer, length, pack=False)
    return Inputs(train, {config.data.dir: val}, tokenizer, val.prompts, n_cut=train.n_cut)


def dataset_names(data: Data) -> list[str]:
    """Return the directories of the training data, several only for a mixture."""
    return [part.dir for part in data.mixture] or [data.dir]


def count_epochs(config: Config, inputs: Inputs) -> dict[str, float]:
    """Return how many times the run reads each dataset. The keys are the directories of the datasets."""
    tokens, train = config.optim.steps * config.data.batch_tokens, inputs.train
    if not isinstance(train, MixtureWindows):
        return {config.data.dir: tokens / inputs.epoch_tokens}
    windows = [tokens * float(fraction) / train.sequence_length for fraction in train.fractions]
    return {part.dir: n / len(own) for part, own, n in zip(config.data.mixture, train.parts, windows, strict=True)}


def describe_epochs(config: Config, inputs: Inputs) -> str:
    """Return the number of epochs of each dataset, such as "0.95 epochs of data/fineweb-edu-10b"."""
    return ", ".join(f"{epochs:.2f} epochs of {name}" for name, epochs in count_epochs(config, inputs).items())


def warnings(config: Config, inputs: Inputs) -> list[str]:
    """Return warnings: the learning rate was chosen for a larger batch, text repeats too often, or prompts are cut."""
    data, optim, model = config.data, config.optim, config.model
    found = []
    as_released = model.init_from == "scratch" and not (model.n_layer or model.n_head or model.n_embd)
    if model.preset and as_released:
        batch_tokens, lr = RECIPES[model.preset]
        fraction = data.batch_tokens / batch_tokens
        # Warn only with AdamW. With Muon, runs with a high optim.lr and small batches train well.
        if fraction <= 0.5 and optim.lr >= lr and optim.name == "adamw":
            found.append(
                f"data.batch_tokens {data.batch_tokens:,} is {1 / fraction:.0f} times below the {batch_tokens:,} for "
                f"which optim.lr {optim.lr:g} was chosen: the loss will be noisy, and more processes do not change "
                f"that. Raise data.batch_tokens (micro-batches accumulate), or lower optim.lr to about "
                f"{lr * fraction**0.5:.1e}"
            )
    for name, epochs in count_epochs(config, inputs).items():
        if epochs > MAX_EPOCHS:
            steps = int(optim.steps * MAX_EPOCHS / epochs)
            fewer = f"optim.steps to {steps:,}" if steps > optim.warmup_steps else "data.batch_tokens and optim.steps"
            found.append(
                f"{optim.steps:,} steps repeat {name} {epochs:,.1f} times, and after about {MAX_EPOCHS} repetitions a "
                f"text teaches little more: prepare more text, or lower {fewer}"
            )
    if inputs.n_cut:
        found.append(
            f"{inputs.n_cut:,} prompts are too long for data.sequence_length {data.sequence_length}, and their "
            f"beginnings were cut off: raise it to keep them"
        )
    return found
