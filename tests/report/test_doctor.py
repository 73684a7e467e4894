"""report.doctor: runs with a known error are found, healthy ones are not."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import OPTIMIZER
from data.shards import HEADER_BYTES, open_split
from data.tokenizer import load_tokenizer
from report.diagnosis import dataset_findings, diagnose, encoding, passage_hashes, shared_text
from report.symptoms import CHECKS, Curves
from train import train as train_run

STEPS = 400


def healthy(rng, steps=STEPS, noise=0.05):
    """Losses like those of a small model: from ln(1024) down, with a little noise."""
    n = np.arange(1, steps + 1)
    return 4.2 + 2.7 / (1 + n / 25) + noise * rng.standard_normal(steps)


def curves(loss, *, val=None, resumed=(), config=None, step=None, **columns):
    n = len(loss)
    train = {"step": np.arange(1.0, n + 1) if step is None else step, "loss": np.asarray(loss, float)}
    for name, value in {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e4, "loss_scale": np.nan}.items():
        train[name] = np.broadcast_to(np.asarray(columns.get(name, value), float), (n,))
    val = {"step": np.array([0.0]), "loss": np.array([6.93])} if val is None else val
    settings = {"optim": {"lr": 1e-3, "warmup_steps": 20}, "data": {"batch_tokens": 2048}} | (config or {})
    return Curves(settings, train, val, list(resumed), vocab_size=1024, n_embd=64)


def titles(curves):
    return [finding.title for check in CHECKS if (finding := check(curves))]


def test_a_healthy_curve_has_no_finding():
    for seed in range(20):
        assert titles(curves(healthy(np.random.default_rng(seed)))) == []


@functools.cache
def broken_curves(seed):
    """Return a list with (expected title, curves) for each error that a curve shows."""
    return list(make_broken_curves(np.random.default_rng(seed)))


def make_broken_curves(rng):
    base = healthy(rng)
    n = np.arange(STEPS)
    validation = {"step": np.array([0.0, 200, 300, 400]), "loss": np.array([6.93, 4.6, 4.7, 4.9])}
    spiky = base.copy()
    spiky[[100, 150, 200, 250, 300]] += 2
    nan = base.copy()
    nan[50] = np.nan
    scale = 65536 * 0.5 ** (n // 10)
    fast_then_slow = np.where(n < 250, 1e4, 3e3)
    yield "the first loss is worse than random predictions", curves(base + 1, val={"step": [], "loss": []})
    yield "the first loss is too low for an untrained model", curves(base - 2, val={"step": [], "loss": []})
    yield "the model does not learn", curves(6.93 + 0.03 * rng.standard_normal(STEPS))
    yield "the training loss rises", curves(base + np.maximum(0, n - 200) / 100)
    yield "the start is unstable", curves(base + 1.5 * np.exp(-((n - 15) ** 2) / 50))
    yield "the learning rate is very high", curves(base, config={"optim": {"lr": 0.1, "warmup_steps": 20}})
    yield "the warm-up has 0 steps", curves(base, config={"optim": {"lr": 0.01, "warmup_steps": 0}})
    yield (
        "Muon's learning rate is very high",
        curves(base, config={"optim": {"name": "muon", "lr": 1e-3, "muon_lr": 1.0, "warmup_steps": 20}}),
    )
    yield "the loss has spikes", curves(spiky)
    yield "steps were skipped because their loss was not finite", curves(nan)
    yield "gradients overflow float16 too often", curves(base, loss_scale=scale)
    yield "the batch is too small", curves(healthy(rng, noise=0.3))
    yield "the gradient grows", curves(base, grad_norm=np.exp(n / 50))
    yield "the loss repeats with a period", curves(base + 0.2 * np.sin(2 * np.pi * n / 37))
    yield "the loss jumps where the run was resumed", curves(base + 0.6 * (n >= 200), resumed=[200])
    yield "the loss suddenly rises", curves(base + 0.6 * (n >= 200))
    yield "steps are missing or repeated in metrics.jsonl", curves(base, step=np.where(n < 200, n + 1.0, n + 9.0))
    yield "training became slower", curves(base, tokens_per_second=fast_then_slow)
    yield "the model overfits", curves(base, val=validation)
    yield "validation and training loss differ", curves(base, val={"step": np.array([400.0]), "loss": np.array([2.0])})


N_BROKEN = 20


@pytest.mark.parametrize("number", range(N_BROKEN))
def test_each_error_is_named(number):
    for seed in range(5):
        title, broken = broken_curves(seed)[number]
        assert title in titles(broken)


def test_all_checks_have_a_broken_curve():
    broken = [curves for _, curves in broken_curves(0)]
    assert len(broken) == N_BROKEN
    assert [check.__name__ for check in CHECKS if not any(map(check, broken))] == []


def test_all_findings_can_be_printed_as_json():
    for _, broken in broken_curves(0):
        json.dumps([finding._asdict() for check in CHECKS if (finding := check(broken))])


def test_passages_are_equal_exactly_if_their_hashes_are():
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype("<u2")
    hashes = passage_hashes(np.concatenate([tokens, tokens]))
    assert (hashes[:400] == hashes[500:900]).all()
    assert len(np.unique(hashes[:469])) == 469


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, python):
    """`corpora(name, texts, *options)`: a dataset of these texts with a tokenizer of 280 tokens."""
    directory = tmp_path_factory.mktemp("corpora")

    def make(name, texts, *options):
        source = directory / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        python("-m", "data.prepare", "text", source, "--out", directory / name, "--tokenizer", "bpe:280", *options)
        return directory / name

    return make


def sentences(seed, count=400, words="the sea a storm King ship of night and sleeps to England goes"):
    rng, words = np.random.default_rng(seed), words.split()
    return [" ".join(rng.choice(words, 40)) for _ in range(count)]


def test_tokens_of_another_tokenizer_are_found(corpora):
    good = corpora("sea", sentences(0))
    other = corpora("other", sentences(1, words="xylophone quartz jazz 1 22 333 fjord zebra / ( ) { } ++"))
    assert encoding(open_split(good, "train"), load_tokenizer(good)) is None
    assert encoding(open_split(good, "train"), load_tokenizer(other)).title.startswith("the data was encoded with")


def test_a_copied_validation_text_is_found(corpora):
    clean = corpora("clean", sentences(2))
    train = open_split(clean, "train")
    assert shared_text(train, open_split(clean, "val")) is None
    finding = shared_text(train, train)
    assert finding.title == "the validation text is part of the training text"


def test_each_dataset_of_a_mixture_is_checked(corpora, tmp_path):
    words = corpora("words-of-a-mixture", sentences(0))
    damaged = shutil.copytree(words, tmp_path / "cut")
    shard = next(damaged.glob("train_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    mixture = [{"dir": str(path), "weight": w} for path, w in ((words, 3.0), (damaged, 0.5), (tmp_path / "none", 0.5))]
    n_tokens = open_split(words, "train").n_tokens
    config = {"optim": {"steps": 10}, "data": {"batch_tokens": n_tokens, "mixture": mixture}}
    found = {finding.title: finding.evidence for finding in dataset_findings(config)}
    assert found["the text is repeated often"] == f"{words}: 7.5 epochs of {n_tokens:,} tokens"
    assert shard.name in found["the dataset is damaged"]
    assert str(tmp_path / "none") in found["the dataset was not checked"]
    assert len(found) == 3


def test_the_command_prints_findings_and_exits_with_status_1(tiny_run, train, python):
    run = train(tiny_run(**{"optim.steps": 60, "optim.lr": 1e-9, "data.batch_tokens": 256}))
    result = python("-m", "report.doctor", run, check=False)
    assert result.returncode == 1
    assert "problem: the model does not learn\n    seen: the loss began at" in result.stdout
    findings = json.loads(python("-m", "report.doctor", run, "--json", check=False).stdout)
    assert {"title", "evidence", "advice", "problem"} == findings[0].keys()


def test_a_directory_without_a_run_and_a_short_run_are_refused(tiny_run, train, python, tmp_path):
    assert "is not a run" in python("-m", "report.doctor", tmp_path, check=False).stderr
    with pytest.raises(ValueError, match="has 5 training steps with a finite loss: at least 40 are needed"):
        diagnose(train(tiny_run(**{"optim.steps": 5})))


@pytest.fixture(scope="module")
def speeches(corpora):
    """Three kinds of sentences."""
    kinds = (
        "the sea a storm King ship of night and",
        "sword war blood field drum foe the",
        "love rose eyes moon the of",
    )
    texts = [text for i in range(300) for kind in kinds for text in sentences(i, 1, kind)]
    return corpora("speeches", texts, "--val-fraction", "0.1")


HEALTHY = (
    {},
    {"optim.name": "muon", "optim.schedule": "wsd"},
    {"model.dropout": 0.1},
    {"optim.schedule": "constant", "optim.lr": 2e-3},
    {"model.n_layer": 1, "data.batch_tokens": 2048},
)
BROKEN = (
    ({"optim.warmup_steps": 0, "optim.lr": 4e-2}, "the warm-up has 0 steps"),
    ({"optim.lr": 0.2}, "the learning rate is very high"),
    ({"data.batch_tokens": 32, "data.micro_batch": 1}, "the batch is too small"),
)


@pytest.mark.slow
@pytest.mark.parametrize("changes", HEALTHY, ids=str)
def test_a_healthy_run_has_no_problem(changes, speeches, tiny_run, train):
    assert problems(train(short_run(tiny_run, speeches, changes))) == []


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "expected"), BROKEN, ids=str)
def test_a_broken_configuration_is_named(changes, expected, speeches, tiny_run, train):
    found = problems(train(short_run(tiny_run, speeches, changes)))
    assert any(expected in title for title in found), found


@pytest.mark.slow
def test_random_tokens_are_named(speeches, tiny_run, train, tmp_path):
    dataset = shutil.copytree(speeches, tmp_path / "random")
    for shard in dataset.glob("*.bin"):
        content = bytearray(shard.read_bytes())
        n = (len(content) - HEADER_BYTES) // 2
        content[HEADER_BYTES:] = np.random.default_rng(0).integers(0, 280, n).astype("<u2").tobytes()
        shard.write_bytes(content)
    assert "the data was encoded with another tokenizer, or is not text" in problems(
        train(short_run(tiny_run, dataset, {}))
    )


def change_meta(dataset, **changes):
    meta = json.loads((dataset / "meta.json").read_text())
    (dataset / "meta.json").write_text(json.dumps(meta | changes))


@pytest.mark.slow
def test_tokens_of_another_tokenizer_are_named_in_a_run(corpora, tiny_run, train, tmp_path):
    other = corpora("other-words", sentences(1, words="xylophone quartz jazz 1 22 333 fjord zebra / ( ) { } ++"))
    dataset = shutil.copytree(corpora("words", sentences(0)), tmp_path / "swapped")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, dataset)
    change_meta(dataset, tokenizer_sha256=json.loads((other / "meta.json").read_text())["tokenizer_sha256"])
    found = problems(train(short_run(tiny_run, dataset, {})))
    assert any("the data was encoded with another tokenizer" in title for title in found), found


@pytest.mark.slow
def test_text_in_an_order_with_a_period_is_named(corpora, tiny_run, train):
    kinds = ("the sea a storm King ship of night and", "sword war drum", "love rose eyes moon the of")
    texts = [text for i in range(20) for kind in kinds for text in sentences(i, 60, kind)]
    changes = {"data.shuffle": False, "optim.steps": 400}
    found = problems(train(short_run(tiny_run, corpora("acts", texts), changes)))
    assert "the loss repeats with a period" in found


@pytest.mark.slow
def test_training_on_the_validation_text_is_named(speeches, tiny_run, train, tmp_path):
    dataset = shutil.copytree(speeches, tmp_path / "copied")
    meta = json.loads((dataset / "meta.json").read_text())
    shutil.copy(dataset / "train_000000.bin", dataset / "val_000000.bin")
    (shard,) = meta["shards"]["train"]
    parts = {name: meta[name] | {"val": meta[name]["train"]} for name in ("tokens", "text_bytes", "documents")}
    change_meta(dataset, shards=meta["shards"] | {"val": [shard | {"file": "val_000000.bin"}]}, **parts)
    found = problems(train(short_run(tiny_run, dataset, {"eval.tokens": 10_000})))
    assert "the validation text is part of the training text" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recorded", "title"),
    [(True, "the loss jumps where the run was resumed"), (False, "the loss suddenly rises")],
    ids=["recorded", "not-recorded"],
)
def test_a_resume_without_the_optimizer_state_is_named(speeches, tiny_run, train, monkeypatch, recorded, title):
    """The error of many training scripts: they save the weights alone."""
    config = short_run(tiny_run, speeches, {"optim.schedule": "constant", "checkpoint.every": 100, "optim.lr": 3e-2})
    run = train(config)
    shutil.rmtree(run / "checkpoints" / "step-000200")
    state = run / "checkpoints" / "step-000100" / OPTIMIZER
    save_file({name: torch.zeros_like(value) for name, value in load_file(state).items()}, state)
    monkeypatch.setattr("checkpoints.verify", lambda path: None)
    train(config)
    if not recorded:
        (run / "provenance.json").unlink()
    assert title in problems(run)


@pytest.mark.slow
def test_weights_that_the_optimizer_does_not_change_are_named(speeches, tiny_run, prepare, train):
    with prepare(short_run(tiny_run, speeches, {"checkpoint.every": 100})) as run:
        run.model.transformer.h[1].requires_grad_(False)
        train_run(run)
    (finding,) = (f for f in diagnose(run.directory.path) if f.title == "weights do not change")
    assert finding.evidence.startswith(
        "4 of 10 matrices are equal in step-000100 and step-000200: transformer.h.1.attn"
    )


@pytest.mark.slow
def test_overflows_of_float16_are_named(speeches, tiny_run, prepare, train):
    with prepare(short_run(tiny_run, speeches, {"system.dtype": "float16"})) as run:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # most of the halvings of a diverging run
        train_run(run)
    assert "gradients overflow float16 too often" in problems(run.directory.path)


def short_run(tiny_run, dataset, changes):
    usual = {
        "data.dir": str(dataset),
        "data.batch_tokens": 1024,
        "data.micro_batch": 32,
        "optim.steps": 200,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 20,
        "eval.every": 100,
    }
    return tiny_run(**usual | changes)


def problems(run):
    return [finding.title for finding in diagnose(run) if finding.problem]
