"""Errors of the user: exit status 2, a message that says what to do, and nothing created on the disk."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from train import main


@pytest.fixture
def refused(tiny_run, write_config, monkeypatch, capsys, tmp_path):
    """`refused(**changes)`: the message with which train.py refuses such a configuration, without creating anything."""

    def run(**changes):
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(write_config(tiny_run(**changes)))])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().err

    return run


@pytest.fixture
def damaged(verses, tmp_path):
    """A copy of the dataset that the test damages."""
    return shutil.copytree(verses, tmp_path / "damaged")


def overwrite(path, offset, value, kind="<i4"):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.array([value], kind).tobytes())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("shakespeare", "shakespeare --tokenizer bpe:4096"),
        ("shakespeare-char", "shakespeare --tokenizer char"),
        ("shakespeare-gpt2", "shakespeare"),
        ("shakespeare-of-mine", "SOURCE"),
        ("openwebtext", "openwebtext"),
    ],
)
def test_a_missing_dataset_is_named_with_the_command_that_makes_it(refused, tmp_path, name, source):
    message = refused(**{"data.dir": str(tmp_path / name)})
    assert (
        f"no dataset at {tmp_path}/{name}: make it with `python -m data.prepare {source} --out {tmp_path}/{name}`"
        in message
    )


def test_the_default_configuration_without_its_dataset_names_the_command(python, tmp_path):
    result = python("train.py", "--run.dir", tmp_path, "--data.dir", tmp_path / "fineweb-edu-10b", check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "python -m data.prepare fineweb-edu-10b" in result.stderr


def test_a_shard_with_a_wrong_magic_number(refused, damaged):
    overwrite(damaged / "train_000000.bin", 0, 7)
    assert "is not a token shard: it begins with 7, expected 20240520" in refused(**{"data.dir": str(damaged)})


def test_a_shard_with_a_wrong_version(refused, damaged):
    overwrite(damaged / "train_000000.bin", 4, 9)
    assert "has format version 9, expected 1" in refused(**{"data.dir": str(damaged)})


def test_a_truncated_shard(refused, damaged):
    os.truncate(damaged / "val_000000.bin", 1500)
    assert "val_000000.bin is truncated" in refused(**{"data.dir": str(damaged)})


def test_a_directory_without_shards(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no train shards" in refused(**{"data.dir": str(tmp_path / "empty")})


def test_a_text_shorter_than_one_window(refused):
    changes = {"model.block_size": 32768, "data.sequence_length": 32768, "data.batch_tokens": 32768}
    assert "not one window of sequence_length 32768" in refused(**changes)


def test_a_token_outside_the_vocabulary(tiny_run, write_config, python, damaged):
    overwrite(damaged / "train_000000.bin", 1024 + 2 * 100, 60_000, "<u2")
    result = python("train.py", "--config", write_config(tiny_run(**{"data.dir": str(damaged)})), check=False)
    assert result.returncode == 2
    assert "token 60000 at position 100 of the train split" in result.stderr
    assert "train_000000.bin) is outside the vocabulary of" in result.stderr


@pytest.fixture
def checkpoint(tiny_run, train, tmp_path):
    """A checkpoint outside of a run."""
    run = train(tiny_run("first", **{"optim.steps": 3}))
    moved = shutil.copytree(run / "checkpoints" / "step-000003", tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "runs")
    return moved


def test_a_model_with_another_tokenizer(checkpoint, refused, python, verses, tmp_path):
    source, other = verses.parent / "verses.jsonl", tmp_path / "other"
    python("-m", "data.prepare", "text", source, "--out", other, "--tokenizer", "bpe:300", "--val-fraction", "0.1")
    message = refused(**{"model.init_from": str(checkpoint), "data.dir": str(other)})
    assert "have different tokenizers: prepare the text again" in message


@pytest.mark.parametrize("name", ["gpt2", "a--b"])  # the hub's client refuses the second name
def test_a_hub_name_without_a_network(refused, name):
    message = refused(**{"model.init_from": name})
    assert f"'{name}' is not a directory, and as a hub id it could not be fetched" in message
    assert "give a directory that holds config.json" in message


def test_a_directory_without_write_permission(tiny_run, write_config, tmp_path):
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir(mode=0o555)
    command = [sys.executable, "train.py", "--config", write_config(tiny_run(**{"run.dir": str(forbidden)}))]
    if os.geteuid() == 0:  # root may write everywhere unless it drops that capability
        if shutil.which("setpriv") is None:
            pytest.skip("as root, this test needs setpriv from util-linux")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "cannot write to" in result.stderr
    assert "(Permission denied): choose another run.dir" in result.stderr


def test_a_run_dir_that_is_a_file(tiny_run, write_config, python, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_run(**{"run.dir": str(tmp_path / "file")})
    result = python("train.py", "--config", write_config(config), check=False)
    assert result.returncode == 2
    assert "choose another run.dir" in result.stderr


def test_a_file_that_is_not_yaml(python, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: [:\n")
    result = python("train.py", "--config", tmp_path / "a.yaml", check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_cuda_on_a_machine_without_it(refused):
    assert "system.device is cuda, but PyTorch finds no such device" in refused(**{"system.device": "cuda"})


def test_a_checkpoint_with_too_few_layers(checkpoint, refused):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    changes = {"model.init_from": str(checkpoint), "model.n_layer": 3}
    assert "missing: transformer.h.2" in refused(**changes)


def test_a_size_that_contradicts_init_from(checkpoint, refused):
    message = refused(**{"model.init_from": str(checkpoint), "model.n_layer": 5})
    assert "model.n_layer is 5" in message
    assert "has 2: omit the field" in message


def test_fewer_positions_than_init_from_has(checkpoint, refused):
    message = refused(**{"model.init_from": str(checkpoint), "model.block_size": 16, "data.sequence_length": 16})
    assert "model.block_size is 16" in message
    assert "has 32, and positions can only be added" in message


def test_an_attention_that_does_not_exist_or_fit(checkpoint, refused):
    message = refused(**{"model.init_from": str(checkpoint), "model.attention": "lsh", "model.dropout": 0.1})
    assert "model.dropout must be 0 with attention lsh" in message
    message = refused(**{"model.init_from": str(checkpoint), "model.attention": "lsh", "model.lsh_buckets": 3})
    assert "model.lsh_buckets must be 1 or even, got 3" in message
