"""The configuration: its defaults, and errors that name the field."""

import dataclasses
import re
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data.shards import open_split
from training.config import Config, parse_config
from training.estimate import count_parameters
from training.inputs import RECIPES, warnings

FIELDS = [(s, f) for s, fields in Config().to_dict().items() for f in fields]


def refused(capsys, *arguments):
    """Return the message with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_defaults_are_the_124m_reproduction():
    config = parse_config([])
    assert config.model_config(50257).n_layer == 12
    assert (config.data.batch_tokens, config.optim.steps, config.optim.lr) == (524288, 19073, 6e-4)


def test_file_then_flags(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {preset: gpt2-medium, dropout: 0.1}\noptim: {lr: 1.0e-3, steps: 900}\n")
    config = parse_config(["--config", str(file), "--optim.lr", "3e-4", "--model.n_layer", "4"])
    shape = config.model_config(100)
    assert (config.optim.lr, config.optim.steps) == (3e-4, 900)
    assert (shape.n_layer, shape.n_head, shape.n_embd, shape.dropout, shape.vocab_size) == (4, 16, 1024, 0.1, 100)


shipped = pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)


@shipped
def test_shipped_configurations_are_valid_and_named_after_themselves(path):
    assert parse_config(["--config", str(path)]).run.name == path.stem


@shipped
def test_the_command_in_a_configuration_file_makes_its_dataset(path, tmp_path):
    missing = tmp_path / Path(parse_config(["--config", str(path)]).data.dir).name
    commands = re.findall(r"data\.prepare (.+) --out \S+(.*)", path.read_text())
    assert commands or path.stem == "finetune-jsonl"  # its pairs are the user's own
    for source, options in commands:
        if source.startswith("text "):  # the user's own text: the message cannot know its name
            continue
        with pytest.raises(FileNotFoundError, match=f"`python -m data.prepare {source}{options} --out {missing}`"):
            open_split(missing, "train")


@pytest.mark.parametrize(
    ("name", "n_parameters", "batch_tokens", "lr", "min_lr_ratio", "warmup_steps", "steps"),
    [
        ("124m", 124_439_808, 524_288, 6e-4, 0.1, 715, 19_073),
        ("350m", 354_823_168, 524_288, 3e-4, 0.0, 700, 60_000),
        ("774m", 774_030_080, 524_288, 2.5e-4, 0.0, 700, 286_102),
        ("1558m", 1_557_611_200, 1_048_576, 6e-4, 0.1, 700, 32_000),
    ],
)
def test_the_four_sizes(name, n_parameters, batch_tokens, lr, min_lr_ratio, warmup_steps, steps):
    config = parse_config(["--config", f"configs/gpt2-{name}.yaml"])
    optim = config.optim
    assert count_parameters(config.model_config(50257)) == n_parameters
    assert (config.data.batch_tokens, optim.lr, optim.min_lr_ratio, optim.warmup_steps, optim.steps) == (
        batch_tokens, lr, min_lr_ratio, warmup_steps, steps
    )  # fmt: skip
    assert (optim.betas, optim.eps, optim.weight_decay, optim.grad_clip) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    assert config.model.dropout == 0.0
    assert RECIPES[config.model.preset] == (batch_tokens, lr)


def inputs_of(tokens):
    """Return a stand-in for a dataset with this number of tokens, with the attributes that `warnings` reads."""
    return SimpleNamespace(train=None, epoch_tokens=tokens, n_cut=0)


def test_a_small_batch_with_the_learning_rate_of_a_large_one_gives_a_warning():
    config = parse_config(["--data.batch_tokens", "65536"])
    (warning,) = warnings(config, inputs_of(10**10))
    assert "65,536 is 8 times below the 524,288 for which optim.lr 0.0006 was chosen" in warning
    assert "lower optim.lr to about 2.1e-04" in warning
    assert not warnings(parse_config(["--data.batch_tokens", "65536", "--optim.lr", "2e-4"]), inputs_of(10**10))
    assert not warnings(parse_config(["--data.batch_tokens", "491520"]), inputs_of(10**10))
    muon = ["--config", "configs/gpt2-124m-muon.yaml", "--data.batch_tokens", "65536"]
    assert not warnings(parse_config(muon), inputs_of(10**10))


def test_more_than_four_epochs_give_a_warning():
    config = Config()
    tokens = config.optim.steps * config.data.batch_tokens
    (warning,) = warnings(config, inputs_of(tokens // 5))
    assert "repeat data/fineweb-edu-10b 5.0 times" in warning
    assert "lower optim.steps to 15,258" in warning
    (warning,) = warnings(config, inputs_of(10_000))  # not even the warm-up fits
    assert warning.endswith("prepare more text, or lower data.batch_tokens and optim.steps")
    assert not warnings(config, inputs_of(tokens // 4 + 1))


def test_the_124m_file_equals_the_defaults():
    assert parse_config(["--config", "configs/gpt2-124m.yaml"]).to_dict() == Config().to_dict()


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_a_wrong_type_names_the_field(capsys, tmp_path, section, field):
    file = tmp_path / "a.yaml"
    file.write_text(f"{section}: {{{field}: [1, {{a: b}}]}}\n")
    assert f"{section}.{field}" in refused(capsys, "--config", str(file))


def out_of_range():
    """Yield (section.field, value) with a value below the range of each number and one outside of each choice."""
    for section, parts in typing.get_type_hints(Config).items():
        for field, kind in typing.get_type_hints(parts, include_extras=True).items():
            words = str(kind)
            if "Literal" in words:
                yield f"{section}.{field}", "nonsense"
            if "int" in words.lower() or "float" in words.lower() or "Interval" in words:
                yield f"{section}.{field}", "[-1.0, 0.5]" if "tuple" in words else "-1"


def test_the_generated_cases_cover_most_fields():
    assert len({name for name, _ in out_of_range()}) > 35


@pytest.mark.parametrize(("name", "value"), sorted(out_of_range()))
def test_a_value_out_of_range_names_the_field(capsys, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    assert name in refused(capsys, f"--{name}={value}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("section", list(Config().to_dict()))
def test_an_unknown_key_is_named_with_the_nearest_known(capsys, tmp_path, section):
    known = next(iter(Config().to_dict()[section]))
    file = tmp_path / "a.yaml"
    file.write_text(f"{section}: {{{known}x: 1}}\n")
    message = refused(capsys, "--config", str(file))
    assert f"{file} has an unknown field {section}.{known}x; did you mean {section}.{known}?" in message
    assert f"did you mean --{section}.{known}?" in refused(capsys, f"--{section}.{known}x", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.n_head", "5"], "model.n_embd (768) must be divisible by n_head (5)"),
        (
            ["--data.batch_tokens", "1000"],
            "data.batch_tokens 1000 is not a multiple of data.sequence_length 1024: use 1024",
        ),
        (["--data.sequence_length", "2048"], "data.sequence_length 2048 is above model.block_size 1024"),
        (["--optim.warmup_steps", "9", "--optim.steps", "9"], "optim.warmup_steps 9 must be below optim.steps 9"),
        (["--optim.betas", "[0.9, 1.0]"], "optim.betas [0.9, 1.0] must be in [0, 1)"),
        (["--optim.muon_momentum", "1.0"], "optim.muon_momentum 1.0 must be in [0, 1)"),
        (["--optim.cautious_decay", "true"], "optim.cautious_decay is a form of Muon's weight decay"),
        (["--model.dropout", "1.5"], "model.dropout must be in [0, 1), got 1.5"),
        (["--model.preset", "null"], "model.n_layer is required if model.preset is null"),
        (["--model.freeze_layers", "2"], "model.freeze_layers would freeze untrained weights"),
        (["--run.name", "../x"], "run.name '../x' must be the name of one directory"),
        (["--data.format", "completions", "--data.windows", "aligned"], "data.windows aligned and data.shift need"),
        (
            ["--data.mixture", '[{"dir": "a", "weight": 1}]', "--data.format", "completions"],
            "data.mixture needs data.format tokens",
        ),
        (
            ["--data.mixture", '[{"dir": "a", "weight": 1}, {"dir": "a", "weight": 2}]'],
            "data.mixture has a twice: list it once",
        ),
        (
            ["--data.mixture", '[{"dir": "a", "weight": 1}, {"dir": "b/../a/", "weight": 2}]'],
            "data.mixture has a twice: list it once",
        ),
        (["--data.mixture", '[{"dir": "a", "weight": 0}]'], "data.mixture"),
        (["--data.format", "completions", "--data.document_mask", "true"], "data.document_mask needs data.pack"),
        (["--data.windows", "aligned", "--data.shift", "true"], "data.shift moves the cuts of packed windows"),
        (["--eval.final_tokens", "9", "--eval.tokens", "9"], "eval.final_tokens 9 is not above eval.tokens 9"),
        (["--eval.final_tokens", "9", "--eval.every", "0"], "eval.final_tokens needs validations"),
        (["--eval.final_tokens", "9", "--data.format", "completions"], "eval.final_tokens needs data.format tokens"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read (No such file or directory)"),
        (["--config", "configs"], "configs cannot be read (Is a directory)"),
        (["configs/shakespeare.yaml"], "did you mean --config configs/shakespeare.yaml?"),
        (["--run.seed", str(2**64)], "run.seed 18446744073709551616 is too large"),
        (["--lr", "1"], "did you mean --optim.lr?"),
        (["--learning_rate=1"], "did you mean --optim.lr?"),
        (["--optim.learning_rate", "1"], "did you mean --optim.lr?"),
        (["--optim.learning-rate", "1"], "did you mean --optim.lr?"),
        (["--every", "1"], "did you mean --eval.every or --checkpoint.every or --log.every?"),
        (["--step", "1"], "did you mean --optim.steps?"),
        (["--unlike.anything", "1"], "`train.py --help` lists all names"),
        (["--model.preset", "gpt3"], "model.preset: expected gpt2, gpt2-medium, gpt2-large, gpt2-xl or null, got gpt3"),
        (["--optim.steps", "0"], "optim.steps: expected an integer above 0, got 0\n"),
        (["--optim.steps", "2.5"], "optim.steps: expected an integer above 0, got '2.5'\n"),
        (["--optim.lr", "nan"], "optim.lr: expected a number above 0, got nan\n"),
        (["--optim.lr", "fast"], "optim.lr: expected a number above 0, got 'fast'"),
        (["--system.compile", "maybe"], "system.compile: expected auto, true or false, got maybe"),
        (["--mfu", "40", "--dry-run", "8xH100"], "--mfu 40 is above 1: use a fraction, such as 0.4 for 40%"),
        (["--mfu", "0.4"], "--mfu is for the estimate of --dry-run: add --dry-run"),
        (["--log.to", "[paper]"], "log.to: expected a list of wandb, tensorboard or trackio"),
    ],
)
def test_impossible_combinations_are_refused(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


SECTIONS = "expected sections (run, model, data, optim, eval, checkpoint, log, system) with fields"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", f"FILE has no content: {SECTIONS}"),
        ("# nothing\n", f"FILE has no content: {SECTIONS}"),
        ("- optim\n", f"FILE has no sections: {SECTIONS}"),
        ("optim:\n", f"section optim of FILE has no fields: {SECTIONS}"),
        ("optim: 5\n", f"section optim of FILE has no fields: {SECTIONS}"),
        ("optim:\n\tlr: 1\n", "FILE, line 2 is not YAML"),
        ("optim:\n\tlr: 1\n", "YAML is indented with spaces, not with tabs"),
        ("optim: {lr: 1\n", "FILE, line 2 is not YAML (expected ',' or '}'"),
        ("optim: {lr: \x00}\n", "FILE is not YAML"),
        ("lr: 1\n", "FILE has an unknown field lr; did you mean optim.lr?"),
        ("optm: {lr: 1}\n", "FILE has an unknown field optm.lr; did you mean optim.lr?"),
        (
            "model: {preset: gpt3}\n",
            "model.preset in FILE: expected gpt2, gpt2-medium, gpt2-large, gpt2-xl or null, got",
        ),
    ],
)
def test_an_error_in_a_file_names_the_file(capsys, tmp_path, content, message):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    for arguments in (["--config", str(file)], [f"--config={file}"]):
        assert message.replace("FILE", str(file)) in refused(capsys, *arguments)


def test_an_error_on_the_command_line_does_not_name_the_file(capsys, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {preset: gpt2}\n")
    assert "a.yaml" not in refused(capsys, "--config", str(file), "--model.preset", "gpt3")


def test_every_field_has_a_help_text(python):
    text = " ".join(python("train.py", "--help").stdout.split())
    for section, field in FIELDS:
        described = re.search(rf" --{section}.{field} \S+ (.*?) \(type:", text)
        assert described, f"{section}.{field}"
        assert 10 < len(described[1]) < 200, described[1]


def test_printed_configuration_can_be_read_back(tmp_path, python):
    printed = python("train.py", "--print_config", "--optim.lr", "1e-3").stdout
    (tmp_path / "a.yaml").write_text(printed)
    assert yaml.safe_load(printed)["optim"]["lr"] == 1e-3
    assert parse_config(["--config", str(tmp_path / "a.yaml")]).optim == dataclasses.replace(Config().optim, lr=1e-3)
