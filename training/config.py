"""A run's configuration: typed dataclasses, filled from a YAML file and the command line.

The text under each field is its `--help`. The defaults are the 124M reproduction (`configs/gpt2-124m.yaml`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from model import PRESETS, GPTConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class Run:
    """The run itself."""

    name: str = "gpt2-124m"
    """Name of the run: its directory under `dir`."""
    dir: str = "runs"
    """Directory that holds all runs."""
    seed: NonNegativeInt = 1337
    """Seed of initialisation, data order and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from the newest whole checkpoint: auto, if there is one; must, or stop; never: refuse a used directory."""
    allow_changes: bool = False
    """Let a resumed run have other optim.steps, optim.lr and optim.schedule than it began with."""


@dataclass
class Model:
    """The network."""

    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = "gpt2"
    """Shape of a released GPT-2, each part of which can be overridden; null: the fields below stand alone."""
    init_from: str = "scratch"
    """scratch, or a run, directory or hub id of a GPT-2 to fine-tune (its shape wins over preset)."""
    freeze_layers: NonNegativeInt = 0
    """Blocks, from the first on, that do not train; with any, the embeddings do not either."""
    n_layer: PositiveInt | None = None
    """Transformer blocks."""
    n_head: PositiveInt | None = None
    """Attention heads of a block."""
    n_embd: PositiveInt | None = None
    """Width of the residual stream, in channels; divisible by n_head."""
    block_size: PositiveInt | None = None
    """Longest sequence the model can take, in tokens (default: 1024)."""
    dropout: float = 0.0
    """Probability of dropping an activation in training, in [0, 1)."""


@dataclass
class Data:
    """What it reads."""

    dir: str = "data/fineweb-edu-10b"
    """Dataset directory: token shards and meta.json, as `python -m data.prepare` makes it; or see format."""
    format: Literal["tokens", "completions"] = "tokens"
    """tokens: one long text, cut into windows; completions: train.jsonl and val.jsonl with a "prompt" and a
    "completion" a line, of which the completion is learned."""
    pack: bool = False
    """Of completions: several training examples in a window, instead of each in one of its own, with padding."""
    batch_tokens: PositiveInt = 524288
    """Tokens of an optimizer step over all processes; a multiple of sequence_length."""
    sequence_length: PositiveInt = 1024
    """Tokens of a training window."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Windows a process computes at a time, at most; auto: as many as the memory estimate allows."""
    shuffle: bool = True
    """Visit the windows of an epoch in a pseudo-random order instead of as they stand."""


@dataclass
class Optim:
    """How it learns."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices inside the blocks, AdamW for the rest."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate (of AdamW)."""
    min_lr_ratio: ClosedUnitInterval = 0.1
    """Learning rate at the end, as a share of the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: a cosine to the end; wsd: constant, then linear over the last decay_fraction; constant."""
    warmup_steps: NonNegativeInt = 715
    """Steps of linear warm-up from zero."""
    steps: PositiveInt = 19073
    """Optimizer steps of the whole run."""
    decay_fraction: ClosedUnitInterval = 0.2
    """Share of the steps in which wsd decays."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of tensors of two dimensions and more."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient, 0 for no clipping."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: ClosedUnitInterval = 0.95
    """Muon's (Nesterov) momentum."""


@dataclass
class Eval:
    """How it is validated."""

    every: NonNegativeInt = 250
    """Steps between validations (also after the last step), 0 for never."""
    at_start: bool = True
    """Validate before the first step, too: what a model that has learned nothing scores."""
    tokens: PositiveInt = 10485760
    """Tokens of the validation split to score, from its beginning, or all it has; of completions, all."""
    hellaswag: bool = True
    """Score HellaSwag (completion convention) at each validation."""
    samples: NonNegativeInt = 4
    """Texts to sample at each validation, into samples.txt."""
    patience: NonNegativeInt = 0
    """Validations in a row without a lower loss after which the run ends early, 0 for never."""


@dataclass
class Checkpoint:
    """When it is saved."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints (also after the last step), 0 for only at the end."""
    every_minutes: NonNegativeFloat = 0.0
    """Minutes between checkpoints, beside `every`; 0 for none by the clock."""
    keep: PositiveInt = 3
    """Newest checkpoints to keep; the one with the best validation loss stays too."""
    on_error: Literal["stop", "continue"] = "stop"
    """When one cannot be written, a full disk say: stop the run, or say so and continue to the next."""


@dataclass
class Log:
    """What is reported."""

    every: PositiveInt = 10
    """Steps between progress lines; metrics.jsonl has every step."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Send the metrics to Weights & Biases too."""


@dataclass
class System:
    """What it runs on."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: cuda, then mps (not tested), then cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; weights stay float32. auto: bfloat16 where the processor computes in it,
    float16 (with a gradient scaler) on CUDA cards older than Ampere, float32 elsewhere."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the loss; auto: on CUDA, and on CPU for models and compilers that repay it."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """On several processes: ddp, a copy of the model on each; fsdp, a part; auto: fsdp where a copy does not fit."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""


@dataclass
class Config:
    """All of it; a combination that cannot work is a ValueError that names the fields and the mend."""

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
                f"data.batch_tokens {data.batch_tokens} is no multiple of data.sequence_length {data.sequence_length}: "
                f"take {nearest}"
            )
        if data.pack and data.format != "completions":
            raise ValueError("data.pack is for data.format completions: tokens are one text that fills every window")
        if optim.schedule != "constant" and optim.warmup_steps >= optim.steps:
            raise ValueError(
                f"optim.warmup_steps {optim.warmup_steps} leaves nothing of optim.steps {optim.steps}: "
                f"lower the one or raise the other"
            )
        if not all(0 <= beta < 1 for beta in optim.betas):
            raise ValueError(f"optim.betas {list(optim.betas)} must lie in [0, 1)")
        if optim.muon_momentum >= 1:
            raise ValueError(f"optim.muon_momentum {optim.muon_momentum} must lie in [0, 1): at 1 nothing is learned")
        if self.eval.patience and not self.eval.every:
            raise ValueError("eval.patience counts validations, and eval.every 0 makes none: set eval.every")
        if self.run.name in ("", ".", "..") or Path(self.run.name).name != self.run.name:
            raise ValueError(f"run.name {self.run.name!r} must be the name of one directory under run.dir")
        if model.init_from == "scratch":
            if model.freeze_layers:
                raise ValueError("model.freeze_layers freezes untrained weights: set model.init_from, or leave it at 0")
            shape = self.model_config(vocab_size=1)  # raises what GPTConfig finds
            if data.sequence_length > shape.block_size:
                raise ValueError(
                    f"data.sequence_length {data.sequence_length} is above model.block_size {shape.block_size}: "
                    f"shorten the one or raise the other"
                )

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The GPTConfig of a model from scratch, its vocabulary that of the dataset's tokenizer."""
        model = self.model
        fields: dict[str, Any] = {"n_layer": None, "n_head": None, "n_embd": None, "block_size": 1024}
        if model.preset is not None:
            fields.update(zip(("n_layer", "n_head", "n_embd"), PRESETS[model.preset], strict=True))
        for name in fields:
            fields[name] = getattr(model, name) or fields[name]
            if fields[name] is None:
                raise ValueError(f"model.{name} is needed where model.preset is null")
        try:
            return GPTConfig(vocab_size=vocab_size, dropout=model.dropout, **fields)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have begun with, but for the model and the dataset themselves."""
        fields = self.to_dict()
        data = {name: fields["data"][name] for name in ("format", "batch_tokens", "sequence_length", "shuffle")}
        return {"run": {"seed": self.run.seed}, "data": data, "optim": fields["optim"]}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the YAML file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def refuse_changes(before: dict[str, Any], now: dict[str, Any], *, allow: bool) -> None:
    """Raise a ValueError that lists what differs between two identities of a run, old and new.

    With `allow` (run.allow_changes) the length of the run, its learning rates and its schedule may differ.
    """
    course = {"steps", "lr", "muon_lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_fraction"}
    changed = [
        f"{section}.{name} was {before.get(section, {}).get(name)!r}, is {value!r}"
        for section, fields in now.items()
        for name, value in fields.items()
        if before.get(section, {}).get(name) != value and not (allow and section == "optim" and name in course)
    ]
    if changed:
        raise ValueError(
            f"this run was started with another configuration: {'; '.join(changed)}. Set these back, or give the new "
            f"run a run.name of its own; run.allow_changes true lets optim.steps, learning rates and schedule change"
        )


@dataclass
class Flags:
    """What one start of a run is asked for, beside its configuration."""

    dry_run: str | None = None
    mfu: float = 0.4
    verify: bool = False
    profile: bool = False


def parse_config(arguments: list[str] | None = None) -> Config:
    """The configuration alone of what `parse_command_line` reads."""
    return parse_command_line(arguments)[0]


def parse_command_line(arguments: list[str] | None = None) -> tuple[Config, Flags]:
    """What a command line asks for; exits with status 2 and a sentence when it cannot work."""
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config FILE.yaml] [--SECTION.FIELD VALUE ...] [--dry-run] [--verify] [--profile]",
        description="Train a GPT-2: `python train.py ...`, or `torchrun --nproc_per_node=N train.py ...`.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, metavar="FILE", help="YAML file; flags after it override it"
    )
    parser.add_argument(
        "--dry-run", nargs="?", const="", metavar="8xH100",
        help="say what the run would take, here or on the hardware named, check the dataset, and train nothing",
    )  # fmt: skip
    parser.add_argument(
        "--mfu", type=PositiveFloat, default=0.4, help="share of the peak FLOP/s --dry-run reckons with"
    )
    parser.add_argument("--verify", action="store_true", help="hold the dataset's shards against their hashes first")
    parser.add_argument(
        "--profile", action="store_true", help="trace three steps into trace.json in the run's directory"
    )
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(section.default_factory, section.name)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        flags = Flags(**{field.name: parsed[field.name] for field in dataclasses.fields(Flags)})
        return Config(**{section.name: parsed[section.name] for section in dataclasses.fields(Config)}), flags
    except (ArgumentError, ValueError) as error:
        refuse(str(error))


def refuse(message: str) -> NoReturn:
    """Say what is wrong with the configuration, with the nearest name where one is unknown, and exit with status 2."""
    names = [(section, name) for section, fields in Config().to_dict().items() for name in fields]
    known = {f"{section}.{name}" for section, name in names} | {name for _, name in names}
    for unknown in re.findall(r"(?:unrecognized arguments: --|[Oo]ption ')([\w.]+)", message):
        near = difflib.get_close_matches(unknown, known, 1)
        message += f"; did you mean {near[0]}?" if near else "; `train.py --help` lists all there are"
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)
