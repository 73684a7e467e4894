"""The commands that make the datasets with known names, for error messages about a missing dataset.

The table is in a module of its own, so that code that reads a dataset does not import the code that makes datasets.
"""

from __future__ import annotations

from pathlib import Path

# name of the dataset's directory: arguments of `python -m data.prepare`
PREPARE_ARGUMENTS = {
    "shakespeare": "shakespeare --tokenizer bpe:4096",
    "shakespeare-char": "shakespeare --tokenizer char",
    "shakespeare-gpt2": "shakespeare",
    "fineweb-edu-10b": "fineweb-edu-10b",
    "fineweb-10b": "fineweb-10b",
    "fineweb-100b": "hf HuggingFaceFW/fineweb --name sample-100BT --val first-shard",
    "openwebtext": "openwebtext",
    "climbmix": "climbmix",
    "dclm": "dclm",
    "wikitext-103": "wikitext-103",
    "tinystories": "tinystories",
}


def prepare_command(directory: Path) -> str:
    """Return the command that makes the dataset in `directory`, with the placeholder SOURCE for an unknown name."""
    return f"python -m data.prepare {PREPARE_ARGUMENTS.get(directory.name, 'SOURCE')} --out {directory}"
