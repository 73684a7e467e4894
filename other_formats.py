"""Recognize the model files of other programs, to name the command that converts them."""

from __future__ import annotations

import struct
from pathlib import Path

LLM_C_MAGIC = 20240326  # the first int32 of a model of llm.c

_TRANSFORMERS_4 = 'with transformers 4 (`pip install "transformers<5"`), run '
_LOAD_AND_SAVE = '`AutoModelForCausalLM.from_pretrained("{directory}", {option}).save_pretrained("NEW")`'


def is_llm_c(path: Path) -> bool:
    """Return whether a file is a model of llm.c."""
    with open(path, "rb") as file:
        return file.read(4) == struct.pack("<i", LLM_C_MAGIC)


def conversion_hint(path: Path) -> str:
    """Return how to convert a file, or a directory with such a file: "; it is ..., which ...". Empty if unknown."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and (found := _recognize(file)):
            program, remedy = found
            return f"; {file.name if path.is_dir() else 'it'} is a file of {program}: {remedy}"
    return ""


def _recognize(file: Path) -> tuple[str, str] | None:
    """Return the program that wrote a file and the way to convert it, None for a file of an unknown kind."""
    directory = file.parent
    if file.name == "model_optim_rng.pt" or file.name == "latest_checkpointed_iteration.txt":
        model = file if file.suffix == ".pt" else directory / "iter_NNNNNNN" / "mp_rank_00" / "model_optim_rng.pt"
        command = f"`python -m transformers.models.megatron_gpt2.convert_megatron_gpt2_checkpoint {model}`"
        return "Megatron-LM", _TRANSFORMERS_4 + command
    if file.suffix in (".pt", ".pth"):
        return "PyTorch, such as nanoGPT writes", f"run `python -m scripts.convert {file} --out NEW`"
    if file.suffix == ".bin" and is_llm_c(file):
        return "llm.c", f"run `python -m scripts.convert {file} --out NEW`"
    if file.suffix == ".gguf":
        command = _LOAD_AND_SAVE.format(directory=directory, option=f'gguf_file="{file.name}"')
        return "llama.cpp", f"with transformers and `pip install gguf`, run {command}, and the same with AutoTokenizer"
    if file.name == "flax_model.msgpack":
        return "Flax", _TRANSFORMERS_4 + _LOAD_AND_SAVE.format(directory=directory, option="from_flax=True")
    if file.name == "tf_model.h5":
        return "TensorFlow", _TRANSFORMERS_4 + _LOAD_AND_SAVE.format(directory=directory, option="from_tf=True")
    return None
