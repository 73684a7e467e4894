"""What the pages have in common: one HTML file each, with its styles, scripts and data inside, that asks for nothing
from a network."""

from __future__ import annotations

import argparse
import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from command import ending

if TYPE_CHECKING:  # torch takes seconds to import, and --help need not wait for it
    from data.tokenizer import Tokenizer


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write `template`, a file in templates/, filled with `values`, which are escaped. Raises OSError."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}): choose another place with --out") from error
    print(f"{path}  ({path.stat().st_size / 1e6:.2f} MB)")


def plotly_script() -> Any:
    """plotly.js, to stand in a page as it is."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def pack(values: np.ndarray) -> dict[str, str]:
    """An array as plotly.js reads it from JSON, in base64: half the size of digits, and exact."""
    kind = {"float64": "f8", "float32": "f4", "int32": "i4"}[values.dtype.name]
    shape = {"shape": ",".join(map(str, values.shape))} if values.ndim > 1 else {}
    return {"dtype": kind, "bdata": base64.b64encode(values.tobytes()).decode(), **shape}


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text; of one that is only a part of a character, its bytes, as ⟨F0 9F⟩."""

    def label(token: int) -> str:
        piece = tokenizer.decode_bytes([token])
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return f"⟨{piece.hex(' ').upper()}⟩"

    return [label(token) for token in ids]


def command_line(
    name: str,
    description: str | None,
    add_arguments: Callable[[Callable[..., Any]], None],
    run: Callable[[argparse.Namespace], None],
) -> None:
    """`python -m name`, from its arguments to its exit: errors are a sentence and status 2, Ctrl-C is 130."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser.add_argument)
    args = parser.parse_args()
    with ending(parser):
        run(args)
