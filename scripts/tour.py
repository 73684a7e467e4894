"""Execute the guided tour, docs/tour.ipynb, and store its outputs: `python -m scripts.tour`.

The tour loads the model of the demo (`make demo`). The environment variables TOUR_MODEL and TOUR_DATA select another
run and its dataset. If a cell raises an error, the file does not change and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"
TIMEOUT = 600  # seconds for one cell


def execute(path: Path, **environment: str) -> NotebookNode:
    """Execute a notebook in a new process, in the notebook's directory as Jupyter does. Return it with its outputs.

    Args:
        path: the notebook; the file does not change.
        environment: additional environment variables of the process.

    Raises:
        CellExecutionError: a cell raised an error, which the message contains.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:
        # The client and the kernel communicate through Unix sockets. With TCP, another process could take the port
        # after the client has chosen it and before the kernel binds it.
        connection = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            record_timing=False,  # without times, the stored file depends only on the results
            resources={"metadata": {"path": str(path.parent)}},
            config=connection,
        )
        client.execute(env=os.environ | environment)
    # Remove the version of Python, which the client has added: it differs from machine to machine.
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.executed_sources = hash_sources(notebook)
    return notebook


def hash_sources(notebook: NotebookNode) -> str:
    """Return a hash of a notebook's code cells. `execute` stores this hash in the notebook.

    If the stored hash is not that of the present cells, the code was changed after the outputs were stored.
    """
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.tour", description="Execute docs/tour.ipynb in place.")
    parser.parse_args(arguments)
    try:
        notebook = execute(TOUR)
    except CellExecutionError as error:
        sys.exit(f"{TOUR.name} was not written, because a cell raised an error:\n{error}")
    nbformat.write(notebook, TOUR)


if __name__ == "__main__":
    main()
