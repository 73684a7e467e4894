"""The comparison of windows: the table agrees with the validation losses of its runs, and a second call repeats it."""

import json
import statistics
from pathlib import Path

import pytest

from scripts import windows
from training.config import parse_config
from training.run_directory import read_metrics


def test_each_way_is_a_setting_of_its_own():
    found = [parse_config(["--data.dir", "x", *flags]).data for flags in windows.WAYS.values()]
    assert [(data.windows, data.shift, data.document_mask) for data in found] == [
        ("packed", False, False),
        ("packed", True, False),
        ("aligned", False, False),
        ("packed", False, True),
        ("aligned", False, True),
    ]


def test_another_held_out_dataset_is_scored_again(verses, python, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text("Other words.\n" * 50)
    scored, other = [], tmp_path / "other"
    python("-m", "data.prepare", "text", tmp_path / "other.txt", "--out", other, "--tokenizer", "char")

    def evaluate(arguments):
        scored.append(arguments[arguments.index("--data") + 1])
        Path(arguments[arguments.index("--json") + 1]).write_text(
            json.dumps([{"metric": "loss", "value": len(scored)}])
        )

    monkeypatch.setattr(windows, "evaluate", evaluate)
    losses = [windows.score(tmp_path, str(held_out), []) for held_out in (verses, other, verses)]
    assert (losses, scored) == ([1, 2, 1], [str(verses), str(other)])
    with pytest.raises(FileNotFoundError):
        windows.score(tmp_path, str(tmp_path / "missing"), [])


@pytest.mark.slow
def test_the_table_has_mean_and_deviation_of_both_losses(tiny_run, write_config, verses, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WAYS", {name: windows.WAYS[name] for name in ("packed", "packed, mask")})
    config = write_config(tiny_run("x", **{"eval.every": 3}))
    arguments = ["--held-out", verses, "--seeds", 1, 2, "--dir", tmp_path / "runs", "--optim.steps", 3]

    def table():
        windows.main(["--config", str(config), *map(str, arguments)])
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]

    first = table()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first]
    assert rows[0] == ["windows", "with context across borders", "each document by itself"]
    for row, name, column in ((rows[2], "packed", 1), (rows[3], "packed-mask", 2)):
        # The validation of training is what this column has.
        runs = [read_metrics(tmp_path / "runs" / f"{name}-seed_{seed}" / "metrics.jsonl") for seed in (1, 2)]
        losses = [next(r["loss"] for r in reversed(run) if r["split"] == "val") for run in runs]
        assert row[0].replace(", ", "-") == name
        assert row[column] == f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        assert row[1] != row[2]
    before = (tmp_path / "runs" / "packed-seed_1" / "metrics.jsonl").read_bytes()
    assert table() == first
    assert (tmp_path / "runs" / "packed-seed_1" / "metrics.jsonl").read_bytes() == before
