"""Rows of evaluation data from the hub, when the hub cannot be reached."""

import logging

import pytest

from eval.rows import load_hub_rows


def test_the_error_of_a_missing_network_comes_without_its_retries(monkeypatch):
    shown = []

    def load_dataset(*arguments, **options):
        shown.append(logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING))
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        OSError, match=r"^a/b \(test\) could not be fetched from the hub: Couldn't reach 'a/b' on the Hub$"
    ):
        load_hub_rows("a/b", None, "test")
    assert shown == [False]
