"""The configuration of a run: typed dataclasses, filled from a YAML file and the command line.

The text below each field is its help text in `train.py --help`. The defaults reproduce GPT-2 124M, as
`configs/gpt2-124m.yaml` does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from command import fail
from model import PRESETS, GPTConfig
from pretrained import ModelFiles
from training.config_errors import explain, read_fields
from weights import ATTENTION_FIELDS

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class Run:
    """Settings of the run itself."""

    name: str = "gpt2-124m"
    """Name of the run, and of its directory inside `dir`."""
    dir: str = "runs"
    """Directory that holds all runs."""
    seed: NonNegativeInt = 1337
    """Seed of initialization, data order and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Resume from the newest undamaged checkpoint. auto: if there is one; must: always, with an error if there is none;
    never: start a new run, with an error if there is a checkpoint."""
    allow_changes: bool = False
    """Allow a resumed run to change optim.steps, learning rates and the schedule."""
    branch_from: str | None = None
    """RUN@STEP, such as runs/stable@1000: start after this step of another run, with its optimizer state, and change
    only what allow_changes permits. RUN alone: its newest checkpoint. See docs/branches.md."""


@dataclass
class Model:
    """Settings of the network."""

    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = "gpt2"
    """Size of a released GPT-2; the fields below override parts of it. null: use only the fields below."""
    init_from: str = "scratch"
    """scratch for random weights, or a run, directory or hub id of a GPT-2 to fine-tune. Its size replaces preset."""
    freeze_layers: NonNegativeInt = 0
    """Number of blocks, from the first, that are not trained. If any are frozen, the embeddings are too."""
    n_layer: PositiveInt | None = None
    """Number of Transformer blocks."""
    n_head: PositiveInt | None = None
    """Number of attention heads in each block."""
    n_embd: PositiveInt | None = None
    """Width of the residual stream in channels, divisible by n_head."""
    block_size: PositiveInt | None = None
    """Maximum sequence length of the model, in tokens (default: 1024). With init_from, a larger value than that of the
    model extends its position embeddings by interpolation."""
    attention: Literal["full", "window", "lsh"] | None = None
    """Earlier tokens that a token attends to (default: full, or as in init_from). full: all; window: the last
    window_size; lsh: those whose keys have the same hash as its query. See docs/long-context.md."""
    window_size: PositiveInt | None = None
    """Tokens that a token attends to with attention window, itself included (default: 256)."""
    lsh_buckets: PositiveInt | None = None
    """Number of hash values of attention lsh, 1 or even (default: 64). In each round, a token attends to at most
    2 block_size / lsh_buckets tokens."""
    lsh_rounds: PositiveInt | None = None
    """Number of rounds of hashing of attention lsh (default: 2). More rounds find more of the similar keys."""
    dropout: float = 0.0
    """Probability of setting an activation to zero during training, in [0, 1)."""


@dataclass
class MixturePart:
    """One dataset of a mixture."""

    dir: str
    """Directory of the dataset."""
    weight: PositiveFloat
    """Weight of this dataset. Its fraction of the windows is this number divided by the sum of all weights."""


@dataclass
class Data:
    """Settings of the training data."""

    dir: str = "data/fineweb-edu-10b"
    """Directory of the dataset: token shards and meta.json, as `python -m data.prepare` writes them. With format
    completions: train.jsonl and val.jsonl."""
    format: Literal["tokens", "completions"] = "tokens"
    """tokens: one long text, cut into windows. completions: train.jsonl and val.jsonl, each line with a "prompt" and a
    "completion". Only the completion is learned."""
    pack: bool = False
    """With completions, put several examples into each window. Otherwise each window has one example and padding."""
    batch_tokens: PositiveInt = 524288
    """Tokens per optimizer step over all processes, a multiple of sequence_length."""
    sequence_length: PositiveInt = 1024
    """Tokens per training window."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of windows per forward pass on a process. auto: as many as the memory estimate allows."""
    shuffle: bool = True
    """Visit the windows of each epoch in a pseudorandom order instead of the order of the text."""
    windows: Literal["packed", "aligned"] = "packed"
    """packed: cut the text every sequence_length tokens. aligned: begin windows at documents, and cut few documents."""
    shift: bool = False
    """With packed windows, cut the text at other places in each epoch, which gives each token another context."""
    document_mask: bool = False
    """Each token attends to its own document (or packed example) only, and positions begin at 0 in each of them."""
    mixture: list[MixturePart] = field(default_factory=list)
    """Several datasets instead of dir: [{dir: DIR, weight: NUMBER}, ...]. The weights are proportions of windows."""


@dataclass
class Optim:
    """Settings of the optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all parameters. muon: Muon for the matrices inside the blocks, AdamW for the rest."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate of AdamW."""
    min_lr_ratio: ClosedUnitInterval = 0.1
    """Learning rate at the end of the run, as a fraction of the peak (not used by the schedule constant)."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. cosine: falls along a cosine curve until the last step; wsd: is constant, then
    falls linearly in the last decay_fraction of the steps; constant: does not fall."""
    warmup_steps: NonNegativeInt = 715
    """Steps in which the learning rate rises linearly from zero."""
    steps: PositiveInt = 19073
    """Optimizer steps of the whole run."""
    decay_fraction: ClosedUnitInterval = 0.2
    """Fraction of the steps in which the schedule wsd decays."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of tensors with two or more dimensions."""
    cautious_decay: bool = False
    """With Muon: decay an element of a matrix only if the update moves it toward zero (docs/recipes.md)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the averages of the gradient and its square, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon, added to the denominator."""
    grad_clip: NonNegativeFloat = 1.0
    """Maximum norm of the gradient of all parameters; 0: no clipping."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: ClosedUnitInterval = 0.95
    """Nesterov momentum of Muon, in [0, 1)."""


@dataclass
class Eval:
    """Settings of validation during training."""

    every: NonNegativeInt = 250
    """Steps between validations; there is also one after the last step. 0: no validation."""
    at_start: bool = True
    """Also validate before the first step, which shows the loss of an untrained model."""
    tokens: PositiveInt = 10485760
    """Tokens to score, from the beginning of the validation split; with format completions, all. If a resumed
    run has another number, it forgets its lowest loss so far, and patience counts from zero."""
    final_tokens: PositiveInt | None = None
    """Tokens to score in another pass after the last step (null: no such pass), so that eval.tokens can be small. If
    it changes, a finished run repeats its last validation."""
    hellaswag: bool = True
    """Score HellaSwag during training, in the convention "completion" (see eval/hellaswag.py)."""
    hellaswag_every: PositiveInt = 1000
    """Steps between evaluations on HellaSwag, which take longer than the other parts of a validation. HellaSwag is
    scored at the first validation after each multiple of this number, and at the last step."""
    samples: NonNegativeInt = 4
    """Number of texts to sample at each validation, written to samples.txt."""
    patience: NonNegativeInt = 0
    """End the run after this many validations in a row without a lower loss; 0: never."""


@dataclass
class Checkpoint:
    """Settings of checkpoints."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints; there is also one after the last step. 0: only that one."""
    every_minutes: NonNegativeFloat = 0.0
    """Also save a checkpoint when the last one is this many minutes old; 0: never."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep, in addition to the one with the best validation loss."""
    on_error: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written, for example on a full disk: stop, or print the error and continue."""


@dataclass
class Log:
    """Settings of progress reports."""

    every: PositiveInt = 10
    """Steps between progress lines. metrics.jsonl has every step."""
    to: list[Literal["wandb", "tensorboard", "trackio"]] = field(default_factory=list)
    """Send the metrics to these too. wandb: Weights & Biases; tensorboard: event files in the run's directory;
    trackio: Trackio's local database."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Mode of Weights & Biases. offline and online also add wandb to log.to. If log.to has wandb, disabled means
    online."""


@dataclass
class System:
    """Settings of the hardware."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to train on. auto: the first of cuda, mps (not tested) and cpu that exists."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; weights stay float32. auto: bfloat16 where it is faster than float32, float16 (with
    a gradient scaler) on CUDA cards older than Ampere, otherwise float32."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model and its loss with torch.compile. auto: on CUDA, and for large models on a CPU with a C++
    compiler."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Strategy on several processes. ddp: each has the whole model; fsdp: each has a part of it; auto: fsdp only on
    GPUs, if ddp would fill more than half of the free memory."""
    activation_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of storing them; it saves memory."""
    deterministic: bool = False
    """Use only operators that give the same bits in every run, so that a run also resumes bit for bit on a GPU. This is
    slower on a GPU. A run on a CPU is deterministic without it."""


@dataclass
class Config:
    """The configuration of a run.

    Raises ValueError if a value is not allowed or fields cannot be combined; the message says what to change.
    """

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    system: System = field(default_factory=System)

    def __post_init__(self) -> None:
        data, optim, model = self.data, self.optim, self.model
        if data.batch_tokens % data.sequence_length:
            nearest = max(1, round(data.batch_tokens / data.sequence_length)) * data.sequence_length
            raise ValueError(
                f"data.batch_tokens {data.batch_tokens} is not a multiple of data.sequence_length "
                f"{data.sequence_length}: use {nearest}"
            )
        if data.pack and data.format != "completions":
            raise ValueError("data.pack needs data.format completions: with data.format tokens, every window is full")
        if data.document_mask and data.format == "completions" and not data.pack:
            raise ValueError("data.document_mask needs data.pack: otherwise each window has one example only")
        self._check_mixture()
        if data.format == "completions" and (data.windows == "aligned" or data.shift):
            raise ValueError("data.windows aligned and data.shift need data.format tokens: examples are never cut")
        if data.shift and data.windows == "aligned":
            raise ValueError(
                "data.shift moves the cuts of packed windows, but aligned windows begin at documents: omit one of them"
            )
        if optim.schedule != "constant" and optim.warmup_steps >= optim.steps:
            raise ValueError(
                f"optim.warmup_steps {optim.warmup_steps} must be below optim.steps {optim.steps}: "
                f"lower optim.warmup_steps or raise optim.steps"
            )
        if not all(0 <= beta < 1 for beta in optim.betas):
            raise ValueError(f"optim.betas {list(optim.betas)} must be in [0, 1)")
        if optim.muon_momentum >= 1:
            raise ValueError(f"optim.muon_momentum {optim.muon_momentum} must be in [0, 1): with 1, nothing is learned")
        if optim.cautious_decay and optim.name != "muon":
            raise ValueError("optim.cautious_decay is a form of Muon's weight decay: set optim.name muon, or omit it")
        if self.eval.patience and not self.eval.every:
            raise ValueError("eval.patience counts validations, but with eval.every 0 there are none: set eval.every")
        self._check_final_tokens()
        if self.run.seed >= 2**64:
            raise ValueError(f"run.seed {self.run.seed} is too large: PyTorch's generators need a seed below 2^64")
        if self.run.name in ("", ".", "..") or Path(self.run.name).name != self.run.name:
            raise ValueError(f"run.name {self.run.name!r} must be the name of one directory under run.dir")
        if model.init_from == "scratch":
            if model.freeze_layers:
                raise ValueError(
                    "model.freeze_layers would freeze untrained weights: set model.init_from, or freeze no layers"
                )
            shape = self.model_config(vocab_size=1)  # raises the errors of GPTConfig
            if data.sequence_length > shape.block_size:
                raise ValueError(
                    f"data.sequence_length {data.sequence_length} is above model.block_size {shape.block_size}: "
                    f"lower data.sequence_length or raise model.block_size"
                )

    def _check_final_tokens(self) -> None:
        """Raise ValueError if eval.final_tokens is set with eval.every 0 or completions, or is at most eval.tokens."""
        final, tokens = self.eval.final_tokens, self.eval.tokens
        if final is None:
            return
        if not self.eval.every:
            raise ValueError("eval.final_tokens needs validations, and eval.every 0 has none: set eval.every")
        if self.data.format == "completions":
            raise ValueError(
                "eval.final_tokens needs data.format tokens: completions are all scored at each validation"
            )
        if final <= tokens:
            raise ValueError(
                f"eval.final_tokens {final} is not above eval.tokens {tokens}: lower eval.tokens, or set "
                f"eval.final_tokens to null"
            )

    def _check_mixture(self) -> None:
        """Raise ValueError if data.mixture has a dataset twice, or is combined with completions."""
        mixture = self.data.mixture
        if mixture and self.data.format == "completions":
            raise ValueError("data.mixture needs data.format tokens: write the examples into one file to mix them")
        paths = [Path(part.dir).resolve() for part in mixture]
        if twice := next((part.dir for part, path in zip(mixture, paths, strict=True) if paths.count(path) > 1), None):
            raise ValueError(f"data.mixture has {twice} twice: list it once, with the sum of its weights")

    def model_config(self, vocab_size: int, initial: ModelFiles | None = None) -> GPTConfig:
        """Return the configuration of the model to train: a new model, or the one that model.init_from names.

        Args:
            vocab_size: number of tokens of the dataset's tokenizer. The model gets this vocabulary, without the padding
                that the vocabulary of `initial` may have.
            initial: the model that the run starts from; None for new weights. If it is given although model.init_from
                is scratch, the run resumes or branches, and the shape comes from the section `model`.

        Raises ValueError if the section `model` is not valid or contradicts the model that model.init_from names, or
        if data.sequence_length is above the block size. This is model.block_size, or that model's own if
        model.block_size is not set.
        """
        asked = self.model
        if initial is None or asked.init_from == "scratch":
            fields = self._shape_from_scratch()
        else:
            fields = self._shape_of(initial)
        fields |= {name: value for name in ATTENTION_FIELDS if (value := getattr(asked, name)) is not None}
        try:
            return GPTConfig(**fields | {"vocab_size": vocab_size, "dropout": asked.dropout})
        except ValueError as error:
            raise ValueError(f"model.{error}") from None

    def _shape_from_scratch(self) -> dict[str, Any]:
        """Return the size fields of GPTConfig: those of model.preset, overridden by the fields of `model`."""
        model = self.model
        fields: dict[str, Any] = {"n_layer": None, "n_head": None, "n_embd": None, "block_size": 1024}
        if model.preset is not None:
            fields.update(zip(("n_layer", "n_head", "n_embd"), PRESETS[model.preset], strict=True))
        for name in fields:
            fields[name] = getattr(model, name) or fields[name]
            if fields[name] is None:
                raise ValueError(f"model.{name} is required if model.preset is null")
        return fields

    def _shape_of(self, initial: ModelFiles) -> dict[str, Any]:
        """Return GPTConfig's fields for `initial`, the model that the run starts from, with this run's block size."""
        model, directory, found = self.model, initial.directory, initial.config
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(model, name) not in (None, getattr(found, name)):
                raise ValueError(
                    f"model.{name} is {getattr(model, name)}, but {directory} has {getattr(found, name)}: omit "
                    f"the field"
                )
        block_size = model.block_size or found.block_size
        if block_size < found.block_size:
            raise ValueError(
                f"model.block_size is {block_size}, but {directory} has {found.block_size}, and positions can only be "
                f"added: omit the field, and set data.sequence_length for shorter windows"
            )
        if model.freeze_layers > found.n_layer:
            raise ValueError(
                f"model.freeze_layers {model.freeze_layers} is above the {found.n_layer} layers of {directory}: "
                f"lower it"
            )
        if self.data.sequence_length > block_size:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is above the block size {block_size} of "
                f"{directory}: lower it, or raise model.block_size"
            )
        return dataclasses.asdict(found) | {"block_size": block_size}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain values, as in the YAML file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass
class Flags:
    """Options of one start of train.py that are not part of the configuration."""

    dry_run: str | None = None  # None: train; otherwise the hardware to estimate for, or "" for this machine
    mfu: float | None = None  # for --dry-run: assumed fraction of the peak FLOP/s; None: estimate each part of a step
    verify: bool = False  # compare the shards of the dataset with their hashes before training
    profile: bool = False  # write a trace of three steps to trace.json

    def __post_init__(self) -> None:
        if self.mfu is not None and self.dry_run is None:
            raise ValueError("--mfu is for the estimate of --dry-run: add --dry-run, or omit --mfu")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"--mfu {self.mfu:g} is above 1: use a fraction, such as 0.4 for 40%")


def parse_config(arguments: list[str] | None = None) -> Config:
    """Return the configuration that `parse_command_line` reads, without the flags."""
    return parse_command_line(arguments)[0]


@functools.cache
def make_parser() -> ArgumentParser:
    """Return the parser of train.py's command line. It is cached, because reading the help texts of fields is slow."""
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config FILE.yaml] [--SECTION.FIELD VALUE ...] [--dry-run] [--verify] [--profile]",
        description="Train a GPT-2: `python train.py ...`, or `torchrun --nproc_per_node=N train.py ...`.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, metavar="FILE", help="YAML file; options after it override its values"
    )
    parser.add_argument(
        "--dry-run", nargs="?", const="", metavar="8xH100",
        help="check the dataset and print what the run needs, here or on the given hardware, without training",
    )  # fmt: skip
    parser.add_argument(
        "--mfu", type=PositiveFloat | None, default=None,
        help="fraction of the peak FLOP/s that --dry-run assumes, instead of an estimate of each part of a step",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="compare the shards of the dataset with their hashes first"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of three steps to trace.json in the run's directory"
    )
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(section.default_factory, section.name)
    return parser


def parse_command_line(arguments: list[str] | None = None) -> tuple[Config, Flags]:
    """Return the configuration and the flags of train.py's command line (default: the arguments of this process).

    An error ends the process with a message and exit status 2.
    """
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    names = {
        f"{section}.{name}": kind
        for section, part in get_type_hints(Config).items()
        for name, kind in get_type_hints(part).items()
    }
    try:
        given = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
        given += [path for option, path in itertools.pairwise(arguments) if option == "--config"]
        files = {path: read_fields(Path(path), names, set(get_type_hints(Flags))) for path in given}
    except ValueError as error:
        fail(f"train.py: {error}")
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        flags = Flags(**{field.name: parsed[field.name] for field in dataclasses.fields(Flags)})
        return Config(**{section.name: parsed[section.name] for section in dataclasses.fields(Config)}), flags
    except ArgumentError as error:
        fail(f"train.py: {explain(str(error), arguments, names, files)}")
    except ValueError as error:
        fail(f"train.py: {error}")
