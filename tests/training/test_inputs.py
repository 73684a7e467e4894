"""The windows that a run's configuration chooses, in runs that stop and resume."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from training.run_directory import read_metrics


def losses(run, split="train"):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == split]


@pytest.mark.parametrize("changes", [{"data.shift": True}, {"data.windows": "aligned"}], ids=["shift", "aligned"])
def test_a_run_with_other_windows_learns_and_resumes_bit_for_bit(tiny_run, train, changes, capsys):
    config = tiny_run("whole", **{"checkpoint.every": 8, "optim.steps": 40, "eval.every": 40}, **changes)
    run = train(config)
    last = run / "checkpoints" / "step-000040"
    whole, records = load_file(last / "model.safetensors"), losses(run)
    assert records[-1] < records[0] - 0.5
    assert losses(run, "val")
    assert ("aligned windows, " in capsys.readouterr().out) == ("data.windows" in changes)
    shutil.rmtree(last)
    train(config)
    assert losses(run) == records
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    (field, value) = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{field} was {value!r}"):
        train(tiny_run("whole", **{"optim.steps": 40}))
