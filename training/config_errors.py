"""Explain errors in a configuration: the field, the file that sets it, what was expected, and similar names.

An argument `fields` is always a dictionary from "section.field" to the type of this field.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# Names of settings in other programs, and our field for each. `suggestion` finds similar names without an entry here.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "max_steps": "optim.steps",
    "max_iters": "optim.steps",
    "batch_size": "data.batch_tokens",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "dataset": "data.dir",
    "eval_interval": "eval.every",
    "save_steps": "checkpoint.every",
    "model_name_or_path": "model.init_from",
}
EXPECTED: dict[Any, list[str]] = {
    bool: ["true", "false"],
    float: ["a number"],
    str: ["a text"],
    type(None): ["null"],
    PositiveInt: ["an integer above 0"],
    NonNegativeInt: ["an integer of at least 0"],
    PositiveFloat: ["a number above 0"],
    NonNegativeFloat: ["a number of at least 0"],
    ClosedUnitInterval: ["a number in [0, 1]"],
    tuple[float, float]: ["two numbers"],
}


def read_fields(path: Path, fields: dict[str, Any], flags: set[str]) -> dict[str, Any]:
    """Return the values in a configuration file, as a dictionary from "section.field" to the value.

    The file may also have the names in `flags` at its top level, as in the output of --print_config.

    Raises ValueError, which names the file, if the file is unreadable, is not a configuration or has an unknown field.
    """
    sections = list(dict.fromkeys(name.partition(".")[0] for name in fields))
    form = f"expected sections ({', '.join(sections)}) with fields, such as optim: {{lr: 3.0e-4}}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): --config needs a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        tab = ": YAML is indented with spaces, not with tabs" if "\\t" in str(error.problem) else ""
        raise ValueError(f"{path}{line} is not YAML ({error.problem}){tab}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has {'no content' if content is None else 'no sections'}: {form}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in sections and not isinstance(value, dict):
            raise ValueError(f"section {name} of {path} has no fields: {form}")
        values |= (
            {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, dict) else {str(name): value}
        )
    for name in values:
        if name not in fields and name not in flags:
            raise ValueError(f"{path} has an unknown field {name}{suggestion(name, fields)}")
    return values


def suggestion(unknown: str, fields: dict[str, Any], prefix: str = "") -> str:
    """Return the end of a message about an unknown field: similar fields, each with `prefix`, or how to list all."""
    last = unknown.rpartition(".")[2].replace("-", "_")
    by_last = {name.rpartition(".")[2]: name for name in fields}
    near = [name for name in fields if name.endswith(f".{last}")]
    if not near and last in OTHER_NAMES:
        near = [OTHER_NAMES[last]]
    near = near or difflib.get_close_matches(unknown, fields, 1)
    near = near or [by_last[name] for name in difflib.get_close_matches(last, by_last, 1)]
    if not near:
        return "; `train.py --help` lists all names"
    return f"; did you mean {' or '.join(prefix + name for name in near)}?"


def explain(message: str, arguments: list[str], fields: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    """Rewrite jsonargparse's error message in plain words. A message of an unknown form is returned unchanged.

    `arguments` is the command line. `files` maps the path of each configuration file to its values (`read_fields`).
    """
    if unknown := re.search(r"unrecognized arguments: (--)?([^\s=]+)", message):
        option, name = unknown.groups()
        if option is None and name.endswith((".yaml", ".yml")):
            return f"unexpected argument {name}; did you mean --config {name}?"
        return message.strip() + (suggestion(name, fields, "--") if option else "")
    found = re.match(r'Parser key "([\w.]+)"', message)
    if found is None or found[1] not in fields:
        return message.strip()
    name = found[1]
    given = re.search(r"(?:Given value|Got value|convert \w+ to \w+|with base \d+): (.*)", message)
    given = given or re.search(r"Not of type \w+: (.*) does not conform", message)
    setting = [path for path, values in files.items() if name in values]
    overridden = any(argument.partition("=")[0] == f"--{name}" for argument in arguments)
    where = f" in {setting[-1]}" if setting and not overridden else ""
    return f"{name}{where}: expected {expected(fields[name])}" + (f", got {given[1]}" if given else "")


def expected(kind: Any) -> str:
    """Return a description of the values that a type allows, such as "an integer above 0"."""
    if get_origin(kind) is list:
        return f"a list of {expected(get_args(kind)[0])}"
    if is_dataclass(kind):
        return "{" + ", ".join(f"{name}: {expected(part)}" for name, part in get_type_hints(kind).items()) + "}"
    parts = [kind] if kind in EXPECTED or get_origin(kind) is Literal else get_args(kind)
    words = [word for part in parts for word in (get_args(part) if get_origin(part) is Literal else EXPECTED[part])]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
