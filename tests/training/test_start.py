"""What a resumed run may change, and what is refused."""

import pytest
import torch

from processes import Processes
from training.config import Config, MixturePart
from training.start import find_start, fixed_settings, refuse_changes

FIELDS = [(s, f) for s, fields in Config().to_dict().items() for f in fields]


def test_changes_in_a_resumed_run_are_listed_with_old_and_new_values():
    before = fixed_settings(Config())
    now = Config()
    now.run.seed, now.optim.weight_decay, now.optim.steps = 1, 0.2, 5000
    with pytest.raises(
        ValueError, match=r"run.seed was 1337, is 1; optim.steps was 19073, is 5000; optim.weight_decay"
    ):
        refuse_changes(before, fixed_settings(now), allow=False)
    with pytest.raises(ValueError, match=r"run.seed was 1337, is 1; optim.weight_decay was 0.1, is 0.2"):
        refuse_changes(before, fixed_settings(now), allow=True)


def test_a_setting_that_an_older_checkpoint_lacks_had_its_default():
    before, now = fixed_settings(Config()), Config()
    del before["data"]["windows"]
    refuse_changes(before, fixed_settings(now), allow=False)
    now.data.windows = "aligned"
    with pytest.raises(ValueError, match=r"data\.windows was 'packed', is 'aligned'"):
        refuse_changes(before, fixed_settings(now), allow=False)


@pytest.mark.parametrize("name", ["steps", "lr", "schedule"])
def test_length_rate_and_schedule_may_change_with_allow_changes(name):
    now = Config()
    setattr(now.optim, name, {"steps": 5, "lr": 1.0, "schedule": "wsd"}[name])
    refuse_changes(fixed_settings(Config()), fixed_settings(now), allow=True)
    with pytest.raises(ValueError, match=f"optim.{name} was"):
        refuse_changes(fixed_settings(Config()), fixed_settings(now), allow=False)


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_each_field_in_a_resumed_run(section, field):
    """The recipe may not change, its schedule only with allow_changes, and hardware and reports may always change."""
    before, now = Config(), Config()
    value = getattr(getattr(now, section), field)
    changed = (value + 1) if isinstance(value, int | float) and not isinstance(value, bool) else f"not {value}"
    changed = [MixturePart("a", 1)] if field == "mixture" else changed
    setattr(getattr(now, section), field, changed)
    schedule = ("steps", "lr", "muon_lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_fraction")
    fixed = section == "optim" or (section, field) in (
        ("run", "seed"), ("run", "branch_from"), ("data", "format"), ("data", "batch_tokens"),
        ("data", "sequence_length"), ("data", "shuffle"), ("data", "windows"), ("data", "shift"), ("data", "mixture"),
        ("data", "document_mask"),
    )  # fmt: skip
    for allow in (False, True):
        if fixed and not (allow and section == "optim" and field in schedule):
            with pytest.raises(ValueError, match=rf"{section}\.{field} was"):
                refuse_changes(fixed_settings(before), fixed_settings(now), allow=allow)
        else:
            refuse_changes(fixed_settings(before), fixed_settings(now), allow=allow)


def test_other_hardware_and_other_reports_are_the_same_run():
    now = Config()
    now.data.micro_batch, now.system.device, now.eval.every, now.checkpoint.keep, now.log.every = 3, "cpu", 7, 9, 1
    refuse_changes(fixed_settings(Config()), fixed_settings(now), allow=False)


def test_all_processes_start_from_the_model_that_the_main_process_chose(tiny_run, train, tmp_path, monkeypatch):
    """The run of model.init_from saves a checkpoint after the main process has chosen one."""
    source = tiny_run("source", **{"optim.steps": 3})
    first = train(source) / "checkpoints" / "step-000003"
    config, broadcast = tiny_run("tuned", **{"model.init_from": str(first.parent.parent)}), []
    monkeypatch.setattr(Processes, "broadcast", lambda self, value: broadcast.append(value) or value)

    def start(rank):
        processes = Processes(rank, 2, torch.device("cpu"), torch.float32)
        return find_start(config, tmp_path / "runs" / "tuned" / "checkpoints", processes)

    assert start(0).model.directory == first
    train(tiny_run("source", **{"optim.steps": 4, "run.allow_changes": True}))
    monkeypatch.setattr(Processes, "broadcast", lambda self, value: broadcast[0])
    assert start(1).model.directory == first
