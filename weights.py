"""Read and write GPT-2's files in the layout of Hugging Face transformers: config.json and files of tensors.

Parameters have the same names here as in transformers, but transformers stores some matrices transposed. This module
does not import the model's classes: it takes the fields of `GPTConfig` as a dictionary, and can load the weights of any
`nn.Module` whose parameters have GPT-2's names.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints import choose_checkpoint, is_run
from checks import LARGEST_FIELD, check_positive, check_shared_fields
from files import apply_umask
from openai_checkpoint import convert_hparams, is_openai_checkpoint, read_openai_tensors
from other_formats import conversion_hint

# transformers stores these matrices as Conv1D weights, (in, out), and nn.Linear stores (out, in). They are selected by
# name, because attn.c_proj is square and its shape does not show whether it is transposed.
CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
# Names of buffers that hold the causal mask in old checkpoints. These buffers are not parameters, and are skipped.
STALE_BUFFER = re.compile(r"h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$")

# The parameters that compute queries: all rows of q_attn, and the first n_embd rows of c_attn.
QUERIES = re.compile(r"transformer\.h\.(\d+)\.(attn\.c_attn|crossattention\.q_attn)\.(weight|bias)$")

# Fields of config.json for which only GPT-2's value is implemented. Another value means another architecture.
FIXED_CONFIG = {"model_type": "gpt2", "tie_word_embeddings": True}
BIDIRECTIONAL = "gpt2-bidirectional"  # the model_type of a model that is not causal, and therefore not a GPT-2
# Fields that affect the attention scores, with GPT-2's values. Other values of the two scale_ fields multiply the
# scores by a factor: `load_weights` multiplies the weights of the queries by this factor. reorder_and_upcast_attn
# changes only the precision in which transformers computes the scores: both values are accepted.
ATTENTION_CONFIG = {
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}
# transformers' name of an activation function -> its name in ACTIVATIONS of kernels/gelu.py.
ACTIVATION_NAMES = {
    **{name: name for name in ("gelu_new", "gelu", "relu", "silu", "tanh")},
    "gelu_pytorch_tanh": "gelu_new",
    "swish": "silu",
}
# Fields that GPT-2 does not have, each with the values that mean the same as a missing field. Other values are refused.
ABSENT_CONFIG: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "pruned_heads": (None, {})}
# Other fields that transformers writes, with their default values. Only heads.DoubleHeads depends on some of them.
INERT_CONFIG = {
    "initializer_range": 0.02,
    "pad_token_id": None,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "use_cache": True,
}
# transformers' name -> GPTConfig's name. GPTConfig has one dropout rate in place of transformers' three rates.
CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "attn_pdrop": "dropout",
    "embd_pdrop": "dropout",
    "resid_pdrop": "dropout",
    "add_cross_attention": "cross_attention",
    "n_inner": "n_inner",
    "activation_function": "activation",
    "layer_norm_epsilon": "layer_norm_epsilon",
}
# Fields that only this repository defines. They are written only if the attention is not full.
ATTENTION_FIELDS = ("attention", "window_size", "lsh_buckets", "lsh_rounds")
# The fields of the model's shape, each with other names under which a config.json may have it.
SHAPE_ALIASES = {
    "vocab_size": (),
    "n_positions": ("max_position_embeddings", "n_ctx"),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
}
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
# Default values of the fields that a config.json may omit.
DEFAULT_CONFIG: dict[str, Any] = {
    **dict.fromkeys(DROPOUTS, 0.1),
    **ATTENTION_CONFIG,
    "add_cross_attention": False,
    "causal": True,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
# The limits of fields for which LARGEST_FIELD, the limit of all other sizes, is too high. If a damaged config.json has
# a huge n_layer, building the model could take hours.
LARGEST = {"n_layer": 10_000}

# OpenAI's names of the released models -> their names on the hub. 117M and 345M are earlier names of 124M and 355M.
OPENAI_NAMES = {
    "117M": "gpt2",
    "124M": "gpt2",
    "345M": "gpt2-medium",
    "355M": "gpt2-medium",
    "774M": "gpt2-large",
    "1558M": "gpt2-xl",
}

# Files that hold all weights, in the order in which they are looked for. If the weights are divided into several files,
# an index lists them: model.safetensors.index.json or pytorch_model.bin.index.json.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def locate(name_or_dir: str | Path) -> Path:
    """Return the directory that holds a model's files.

    A directory is returned unchanged, unless it is the directory of a run: then one of its checkpoints is returned. Any
    other name is the name of a model on the Hugging Face hub, or OpenAI's name of it, such as 124M: its snapshot is
    downloaded if it is not in the local cache yet.

    Raises:
        FileNotFoundError: the name is neither a directory nor a model that could be downloaded; or a run has no
            checkpoint.
        ValueError: the checkpoint of a run is damaged.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return choose_checkpoint(path) if is_run(path) else path
    name = OPENAI_NAMES.get(str(name_or_dir), str(name_or_dir))
    if path.is_file():
        expected = "expected a directory that holds config.json and model.safetensors"
        raise FileNotFoundError(f"{name} is a file, {expected}{conversion_hint(path)}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no such model directory: {name}")
    # imported here: a local directory does not need the hub's client
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(snapshot.glob("*.safetensors")):  # older models on the hub have pytorch_model.bin instead
            patterns = ["*.json", "*.txt", "pytorch_model.bin", "pytorch_model-*.bin"]
            snapshot = Path(snapshot_download(name, allow_patterns=patterns))
    # A proxy that refuses to connect causes an HTTPError, and a name that no model can have an HFValidationError.
    except (OSError, HTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is not a directory, and as a hub id it could not be fetched ({reason}). "
            f"Check the name and the network, or give a directory that holds config.json and model.safetensors"
        ) from error
    return snapshot


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError, naming the file, if the file does not hold a JSON object."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested lists
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected an object")
    return fields


def find_config(directory: str | Path) -> Path:
    """Return the file that describes a directory's model: config.json, or hparams.json in OpenAI's layout."""
    return Path(directory) / ("hparams.json" if is_openai_checkpoint(Path(directory)) else "config.json")


@dataclass(frozen=True)
class StoredModel:
    """A model on disk. Its configuration has been read and checked; `load_weights` reads its tensors."""

    directory: Path
    config_file: Path  # see `find_config`
    # The fields of config_file by transformers' names, with default values for the fields that the file lacks.
    fields: dict[str, Any]

    @property
    def is_openai(self) -> bool:
        """True if the files have OpenAI's layout."""
        return self.config_file.name == "hparams.json"

    def config_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `GPTConfig`. If the three dropout rates differ, warn and use the largest."""
        fields, dropouts = self.fields, {self.fields[name] for name in DROPOUTS}
        if len(dropouts) > 1:
            found = f"{self.config_file} has dropout rates {sorted(dropouts)}"
            warnings.warn(f"{found}: {max(dropouts)} is used for all", stacklevel=2)
        ours = {ours: fields[theirs] for theirs, ours in CONFIG_FIELDS.items()}
        activation = ACTIVATION_NAMES[fields["activation_function"]]
        ours |= {name: fields[name] for name in ATTENTION_FIELDS if name in fields}
        return ours | {"dropout": max(dropouts), "causal": fields["causal"], "activation": activation}


def open_model(directory: str | Path) -> StoredModel:
    """Read and check the configuration of the model in a directory.

    Raises:
        FileNotFoundError: the directory has no config.json or hparams.json, see `find_config`.
        ValueError: the file is not JSON, describes another architecture than GPT-2's, lacks a field, or has a field
            with an impossible value. The message names the file and the field.
    """
    path = find_config(directory)
    if not path.is_file():
        hint = conversion_hint(path.parent)
        raise FileNotFoundError(f"{directory} is not a model directory: it has no {path.name}{hint}")
    described = read_json(path)
    if path.name == "hparams.json":
        described = convert_hparams(described, path)
    fields = DEFAULT_CONFIG | described
    for name, aliases in SHAPE_ALIASES.items():
        for alias in aliases:
            if alias in fields and fields.setdefault(name, fields[alias]) != fields[alias]:
                raise ValueError(f"{path}: {alias} is {fields[alias]!r}, expected {name} = {fields[name]!r}")
    if fields.get("model_type") == BIDIRECTIONAL and fields["causal"] is False:
        fields["model_type"] = "gpt2"
    for name, value in FIXED_CONFIG.items():
        if (found := fields.get(name, value)) != value:
            raise ValueError(f"{path}: {name} is {found!r}, but only GPT-2's {value!r} is implemented")
    for name, values in ABSENT_CONFIG.items():
        if fields.get(name) not in values:
            raise ValueError(f"{path}: {name} is {fields[name]!r}, which is not implemented: expected no such field")
    if missing := [name for name in ("model_type", *CONFIG_FIELDS) if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        check_config(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return StoredModel(Path(directory), path, fields)


def query_scale(fields: dict[str, Any], name: str) -> float:
    """Return the factor for the queries that the parameter `name` computes, or 1 if it computes no queries.

    Our attention divides the product of query and key by √D. transformers does not divide by √D if scale_attn_weights
    is False. If scale_attn_by_inverse_layer_idx is True, transformers also divides the scores of layer l, counted from
    0, by l + 1. If the queries are multiplied by the factor, our attention computes the same scores as transformers.

    Args:
        fields: the `fields` of a `StoredModel`.
        name: the name of a parameter, with the prefix `transformer.`.
    """
    match = QUERIES.match(name)
    if not match:
        return 1.0
    scale = 1.0 if fields["scale_attn_weights"] else math.sqrt(fields["n_embd"] / fields["n_head"])
    return scale / (int(match[1]) + 1) if fields["scale_attn_by_inverse_layer_idx"] else scale


def check_config(fields: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, if a field of a `StoredModel` has an impossible value or type."""
    for name in (*SHAPE_ALIASES, "n_inner"):
        value, largest = fields[name], LARGEST.get(name, LARGEST_FIELD)
        if value is None and name == "n_inner":  # None means 4 n_embd
            continue
        check_positive(name, value)
        if value > largest:
            raise ValueError(f"{name} must be at most {largest:,}, got {value:,}")
    for name in DROPOUTS:
        value = fields[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    for name in ("add_cross_attention", "causal", *ATTENTION_CONFIG):
        if not isinstance(fields[name], bool):
            raise ValueError(f"{name} must be true or false, got {fields[name]!r}")
    # Search a tuple and not the dict, because the value may be a list, which is not hashable.
    if fields["activation_function"] not in tuple(ACTIVATION_NAMES):
        found, expected = fields["activation_function"], ", ".join(ACTIVATION_NAMES)
        raise ValueError(f"activation_function is {found!r}, expected one of {expected}")
    check_shared_fields(fields | {"dropout": max(fields[name] for name in DROPOUTS)})


def find_weight_files(directory: Path) -> list[Path]:
    """Return the files of a directory that hold its weights: one of WEIGHT_FILES, or the files that an index names.

    Raises:
        FileNotFoundError: the directory has neither weights nor an index.
        ValueError: an index is damaged, or names a file outside of the directory.
    """
    for name in WEIGHT_FILES:
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            return [path]
        if not index.is_file():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(
                f"{index} has no weight_map, which says which file holds which tensor: download the model again"
            )
        for tensor, file in places.items():
            if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+", file) or file in (".", ".."):
                raise ValueError(
                    f"{index}: weight_map names the file {file!r} for {tensor}, expected the name of a file in the "
                    f"same directory"
                )
        return [directory / file for file in sorted(set(places.values()))]
    raise FileNotFoundError(
        f"{directory} holds no weights: expected model.safetensors, pytorch_model.bin, or the index of several such "
        f"files{conversion_hint(directory)}"
    )


def read_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in a directory's model.safetensors or pytorch_model.bin, or in the shards of either.

    To save memory, one tensor is read at a time (from a file that PyTorch before version 1.6 wrote, all tensors at
    once). The largest tensor of a file comes first, while the caller holds few other tensors.

    Raises:
        FileNotFoundError, ValueError: there are no weights, or a file is damaged; see `find_weight_files`.
    """
    for path in find_weight_files(Path(directory)):
        yield from read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in a safetensors file."""
    try:
        with safe_open(path, framework="pt") as tensors:
            names = sorted(tensors.keys(), key=lambda name: -math.prod(tensors.get_slice(name).get_shape()))
        for name in names:
            # Reopen the file for each tensor, so that the memory of the previous tensor is released.
            with safe_open(path, framework="pt") as tensors:
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download or copy it again") from error


def read_pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in a file that torch.save wrote, without executing code that it contains."""
    state = unpickle_weights_only(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors by name")
    check_pickled(path, state)  # a separate function, because a loop variable here would keep a tensor in memory
    for name in sorted(state, key=lambda name: -state[name].numel()):
        yield name, state.pop(name)
        if zipfile.is_zipfile(path):  # reopen the file for each tensor, as read_safetensors does
            state = unpickle_weights_only(path)


def unpickle_weights_only(path: Path) -> Any:
    """Return the object in a file that torch.save wrote, without executing code that it contains.

    All tensors are on the CPU. They are memory-mapped, unless PyTorch before version 1.6 wrote the file. Raises
    ValueError if the file is damaged, or holds objects other than tensors and Python's basic types.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling a damaged file can raise any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as plain tensors ({reason}), and no other pickle is loaded, because it could "
            f"execute code: save its state_dict() as model.safetensors with the program that wrote it"
        ) from error


def check_pickled(path: Path, state: dict[Any, Any]) -> None:
    """Raise ValueError unless `state` maps names to dense tensors."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds a {type(tensor).__name__} under the key {name!r}, expected only tensors by name: save "
                f"the model's state_dict() alone"
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
            raise ValueError(f"{path}: {name} is a {kind.removeprefix('torch.')} tensor, expected a dense tensor")


def load_weights(
    model: nn.Module, stored: StoredModel, *, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Replace a model's parameters with the tensors of `stored`, each converted to `dtype` and moved to `device`.

    The model may be on the meta device. dtype=None keeps the dtype of the file.

    Raises:
        FileNotFoundError: there are no weights, or a file of OpenAI's layout is missing.
        ValueError: tensors are missing, unknown, not floating-point or have the wrong shape (all are listed); two
            tensors for the same parameter differ; or a file is damaged.
    """
    directory, fields = stored.directory, stored.fields
    wanted = {name.removeprefix("gpt."): parameter for name, parameter in model.named_parameters()}
    seen: set[str] = set()
    unknown: list[str] = []
    misshapen: list[str] = []
    not_floating: list[str] = []
    for source, tensor in read_openai_tensors(directory) if stored.is_openai else read_tensors(directory):
        if STALE_BUFFER.search(source):
            continue
        # GPT-2's output head is the token embedding, so lm_head.weight is a second name of transformer.wte.weight.
        # Files that transformers' GPT2Model saved lack the prefix "transformer.".
        name = "transformer.wte.weight" if source == "lm_head.weight" else source
        name = name if name in wanted else f"transformer.{name}"
        if name not in wanted:
            unknown.append(source)
            continue
        if CONV1D.search(name):
            tensor = tensor.T
        parameter = wanted[name]
        if tensor.shape != parameter.shape:
            misshapen.append(f"{source} {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        elif not tensor.is_floating_point():
            not_floating.append(f"{source} {str(tensor.dtype).removeprefix('torch.')}")
        else:
            if (scale := query_scale(fields, name)) != 1:
                queries = tensor[: fields["n_embd"]].float() * scale
                tensor = torch.cat((queries, tensor[fields["n_embd"] :].float())).to(tensor.dtype)
            value = torch.empty_like(parameter, device=device, dtype=dtype or tensor.dtype).copy_(tensor)
            if name in seen and not torch.equal(value, parameter):
                if name != "transformer.wte.weight":
                    raise ValueError(f"{directory} holds two different tensors {source}: download the model again")
                raise ValueError(f"{directory}: lm_head.weight is not transformer.wte.weight, but GPT-2 ties them")
            torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
        seen.add(name)
    missing = [name for name in wanted if name not in seen]
    found = {"missing": missing, "unknown": unknown, "misshapen": misshapen, "not floating-point": not_floating}
    if problems := "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names):
        raise ValueError(f"the tensors in {directory} do not match its {stored.config_file.name}: {problems}")


def save_weights(
    state: dict[str, Tensor],
    config: dict[str, Any],
    directory: str | Path,
    *,
    eos_token_id: int | None = None,
    max_shard_size: int | str = "50GB",
    architecture: str = "GPT2LMHeadModel",
    extra_config: dict[str, Any] | None = None,
) -> None:
    """Write a state dict and its configuration as transformers writes a GPT-2.

    Args:
        state: tensors with the names and shapes of our modules.
        config: the fields of GPTConfig, by name.
        directory: created if it does not exist.
        eos_token_id: the id of the tokenizer's end-of-text token. None means 50256 if the vocabulary has 50257
            tokens, otherwise no such token.
        max_shard_size: weights above this size are divided into several files.
        architecture: name of the class that loads the files. If the model is not causal, config.json names
            BidirectionalGPT2 instead.
        extra_config: additional fields of config.json.
    """
    from huggingface_hub import save_torch_state_dict  # imported here: loading a model does not need it

    if eos_token_id is None and config["vocab_size"] == 50257:
        eos_token_id = 50256
    special = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    fields: dict[str, Any] = {theirs: config[ours] for theirs, ours in CONFIG_FIELDS.items()}
    fields["architectures"] = [architecture]
    fields["dtype"] = str(state["transformer.wte.weight"].dtype).removeprefix("torch.")
    fields["n_ctx"] = fields["n_positions"]  # the name that llama.cpp and mlx-lm read
    fields |= FIXED_CONFIG | ATTENTION_CONFIG | INERT_CONFIG | special | (extra_config or {})
    if not config["causal"]:
        # Other programs would apply the causal mask if the model_type were GPT-2's. They refuse an unknown model_type.
        fields |= {"causal": False, "model_type": BIDIRECTIONAL, "architectures": ["BidirectionalGPT2"]}
    if config["attention"] != "full":
        fields |= {name: config[name] for name in ATTENTION_FIELDS}
    if architecture == "GPT2ForSequenceClassification":
        fields["pad_token_id"] = eos_token_id  # without it, transformers refuses batches of more than one row
    generation = special | {"_from_model_config": True, "use_cache": True}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": fields, "generation_config.json": generation}.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: (t.T if CONV1D.search(name) else t).contiguous() for name, t in state.items()}
    save_torch_state_dict(tensors, directory, max_shard_size=max_shard_size)
    for path in directory.glob("model*.safetensors"):
        apply_umask(path)
