"""Recognize the model files of other programs, to name the command that converts them."""

from __future__ import annotations

import struct
from pathlib import Path

LLM_C_MAGIC = 20240326  # the first int32 of a model of llm.c

# Instructions for transformers 4: version 5 cannot read Flax, TensorFlow or Megatron files, and cannot save a model
# that it has read from GGUF.
_TRANSFORMERS_4 = 'with transformers 4 (`pip install "transformers<5"{package}`), run '
_LOAD_AND_SAVE = '`AutoModelForCausalLM.from_pretrained("{directory}", {option}).save_pretrained("NEW")`'


def is_llm_c(path: Path) -> bool:
    """Return whether a file is a model of llm.c."""
    with open(path, "rb") as file:
        return file.read(4) == struct.pack("<i", LLM_C_MAGIC)


def conversion_hint(path: Path) -> str:
    """Return the end of an error message, which says how to convert a file. The result is "" if the format is unknown.

    The text has the form "; it is a file of PROGRAM: run COMMAND". If `path` is a directory, the text names the first
    file in the directory that has a known format.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and (found := _recognize(file)):
            program, remedy = found
            return f"; {file.name if path.is_dir() else 'it'} is a file of {program}: {remedy}"
    return ""


def _recognize(file: Path) -> tuple[str, str] | None:
    """Return the program that wrote a file, and an instruction to convert the file. None if the format is unknown."""
    directory = file.parent
    if file.name in ("model_optim_rng.pt", "latest_checkpointed_iteration.txt"):
        # Megatron-LM writes DIR/latest_checkpointed_iteration.txt and DIR/iter_NNNNNNN/mp_rank_NN/model_optim_rng.pt.
        path = directory / "iter_NNNNNNN" if file.suffix == ".txt" else directory.parent
        command = (
            "`python -m transformers.models.megatron_gpt2.checkpoint_reshaping_and_interoperability "
            f"--convert_checkpoint_from_megatron_to_transformers --load_path {path} --save_path NEW`"
        )
        return "Megatron-LM", _TRANSFORMERS_4.format(package="") + command
    if file.suffix in (".pt", ".pth"):
        return "PyTorch, such as nanoGPT writes", f"run `python -m scripts.convert {file} --out NEW`"
    if file.suffix == ".bin" and is_llm_c(file):
        return "llm.c", f"run `python -m scripts.convert {file} --out NEW`"
    if file.suffix == ".gguf":
        command = _LOAD_AND_SAVE.format(directory=directory, option=f'gguf_file="{file.name}"')
        return "llama.cpp", f"{_TRANSFORMERS_4.format(package=' gguf')}{command}, and the same with AutoTokenizer"
    if file.name == "flax_model.msgpack":
        command = _LOAD_AND_SAVE.format(directory=directory, option="from_flax=True")
        return "Flax", _TRANSFORMERS_4.format(package=" flax") + command
    if file.name == "tf_model.h5":
        command = _LOAD_AND_SAVE.format(directory=directory, option="from_tf=True")
        return "TensorFlow", _TRANSFORMERS_4.format(package=" tensorflow tf-keras") + command
    return None
