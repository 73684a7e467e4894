"""Write HTML pages. A page is one file that contains its styles, scripts and data, so it opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from data.tokenizer import Tokenizer
from files import PARTIAL_SUFFIX


def render_page(template: str, **values: Any) -> str:
    """Fill `template`, a file in templates/, with `values`. Characters with a meaning in HTML are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, template: str, *, links: Sequence[str] = (), **values: Any) -> None:
    """Render a page as `render_page` does, and write it to `path`.

    links: the names, without .html, of pages in the same directory that this page links to.

    Raises OSError if the file cannot be written.
    """
    page = render_page(template, page=path.stem, links=links, **values)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}): choose another file with --out") from error
    print(f"{path}  ({path.stat().st_size / 1e6:.2f} MB)")


def plotly_script() -> Markup:
    """Return the source of plotly.js, marked as HTML so that the template does not escape its characters."""
    return Markup(get_plotlyjs())


def pack(values: np.ndarray) -> dict[str, str]:
    """Encode an array in base64, in the form that plotly.js reads."""
    kind = {"float64": "f8", "float32": "f4", "int32": "i4"}[values.dtype.name]
    shape = {"shape": ",".join(map(str, values.shape))} if values.ndim > 1 else {}
    return {"dtype": kind, "bdata": base64.b64encode(values.tobytes()).decode(), **shape}


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token. A token with an incomplete character is shown as its bytes: ⟨F0 9F⟩."""

    def label(token: int) -> str:
        text = tokenizer.decode_bytes([token])
        try:
            return text.decode()
        except UnicodeDecodeError:
            return f"⟨{text.hex(' ').upper()}⟩"

    return [label(token) for token in ids]
