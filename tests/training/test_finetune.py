"""Fine-tuning: the loss on completions only, early stopping, frozen blocks, and the benefit of a trained model."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.completions import CompletionWindows
from data.loader import IGNORE_INDEX, Loader, validation_batches
from data.prepare.shakespeare import HELD_OUT, read_plays
from data.tokenizer import load_tokenizer, train_tokenizer
from eval.loss import split_loss
from eval.rows import read_rows
from model import GPT, GPTConfig
from report.run_log import read_run_log
from training.config import parse_config
from training.inputs import open_inputs
from training.run_directory import read_metrics

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana"}
PAIRS = [(f"The capital of {country} is", f" {city}.") for country, city in CAPITALS.items()]


def write_pairs(path, pairs):
    rows = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs]
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("char", [prompt + completion for prompt, completion in PAIRS] + ["\n"])


@pytest.fixture(scope="module")
def untrained(tokenizer, tmp_path_factory):
    """The directory of an untrained model."""
    directory = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32))
    model.save_pretrained(directory, eos_token_id=tokenizer.eot)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def pairs(tmp_path):
    directory = tmp_path / "pairs"
    directory.mkdir()
    write_pairs(directory / "train.jsonl", PAIRS)
    write_pairs(directory / "val.jsonl", PAIRS[:2])
    return directory


def windows_of(path, tokenizer, T=64, pack=False):
    """Return the windows of a file, and all their inputs and targets, (n, T) each."""
    windows = CompletionWindows(path, tokenizer, T, pack=pack)
    rows = np.empty((2, len(windows), T), dtype=np.int64)
    for w in range(len(windows)):
        windows.read(w, rows[0, w], rows[1, w])
    return windows, rows[0], rows[1]


def test_the_loss_of_two_rows_equals_the_loss_computed_by_hand(untrained, tokenizer, tmp_path):
    """By hand means token by token for each example, without batch, padding or windows."""
    pairs = [("The capital of Peru is", " Lima."), ("Cuba", " is a")]
    model = GPT.from_pretrained(untrained)
    nats, count = 0.0, 0
    for prompt, completion in pairs:
        ids = tokenizer.encode(prompt)
        for token in [*tokenizer.encode(completion), tokenizer.eot]:
            with torch.no_grad():
                nats -= model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)[token].item()
            ids, count = [*ids, token], count + 1
    assert count == len(" Lima.") + 1 + len(" is a") + 1

    windows = CompletionWindows(write_pairs(tmp_path / "two.jsonl", pairs), tokenizer, 64, pack=False)
    for micro_batch in (1, 2):
        result = split_loss(model, windows, tokenizer.token_bytes(), micro_batch=micro_batch)
        assert result.loss == pytest.approx(nats / count, abs=1e-6)
        assert result.tokens == count
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(" Lima. is a"), abs=1e-6)


def test_every_completion_token_has_the_same_weight_for_any_micro_batch(untrained, tokenizer, pairs):
    """The gradients of micro-batches with different numbers of targets add up to the gradient of the batch."""
    windows, inputs, targets = windows_of(pairs / "train.jsonl", tokenizer)
    model = GPT.from_pretrained(untrained)
    model(torch.tensor(inputs), targets=torch.tensor(targets)).loss.backward()
    whole = model.transformer.wte.weight.grad.clone()
    for micro_batch, world_size in ((1, 1), (4, 1), (2, 2), (2, 3)):
        model.zero_grad()
        weights = []
        for rank in range(world_size):
            loader = Loader(
                windows, batch_tokens=6 * 64, micro_batch=micro_batch, seed=1, rank=rank, world_size=world_size
            )
            for rows, wanted, weight, _ in next(loader):
                (model(rows, targets=wanted).loss * weight).backward()
                weights.append(weight)
            loader.close()
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert len({round(weight, 6) for weight in weights if weight}) > 1
        assert torch.allclose(model.transformer.wte.weight.grad, whole, atol=1e-6)


def test_prompts_and_padding_have_no_loss(pairs, tokenizer):
    _, inputs, targets = windows_of(pairs / "train.jsonl", tokenizer)
    for (prompt, completion), row, wanted in zip(PAIRS, inputs, targets, strict=True):
        text, answer = tokenizer.encode(prompt + completion), tokenizer.encode(completion)
        assert row[: len(text)].tolist() == text
        assert (wanted != IGNORE_INDEX).nonzero()[0].tolist() == list(range(len(prompt) - 1, len(text)))
        assert wanted[wanted != IGNORE_INDEX].tolist() == [*answer, tokenizer.eot]


def test_packed_windows_hold_the_same_examples_in_fewer_windows(pairs, tokenizer):
    padded, _, apart = windows_of(pairs / "train.jsonl", tokenizer)
    packed, inputs, together = windows_of(pairs / "train.jsonl", tokenizer, pack=True)
    assert len(padded) == 6
    assert len(packed) < 6
    assert together[together != IGNORE_INDEX].tolist() == apart[apart != IGNORE_INDEX].tolist()
    seen = [i for row in inputs for i in row.tolist()]
    for prompt, completion in PAIRS:  # complete, in one of the windows
        example = tokenizer.encode(prompt + completion)
        assert any(seen[i : i + len(example)] == example for i in range(len(seen)))
    assert padded.fingerprint != packed.fingerprint


def test_a_long_prompt_loses_its_beginning_and_never_its_completion(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "long.jsonl", [("The capital of France is " * 5 + "France", " Paris."), PAIRS[0]])
    windows, inputs, targets = windows_of(path, tokenizer, T=40)
    assert windows.n_cut == 1
    assert tokenizer.decode(inputs[0].tolist()).endswith("is France Paris.")
    assert tokenizer.decode([i for i in targets[0].tolist() if i not in (IGNORE_INDEX, tokenizer.eot)]) == " Paris."


def test_validation_is_the_same_on_any_number_of_processes(pairs, tokenizer):
    windows = CompletionWindows(pairs / "train.jsonl", tokenizer, 64, pack=False)
    seen = []
    for world_size in (1, 2, 4, 7):
        total, targets = 0.0, []
        for rank in range(world_size):
            for batch in validation_batches(windows, micro_batch=2, rank=rank, world_size=world_size):
                total += batch.weight
                targets += batch.targets[batch.targets != IGNORE_INDEX].tolist()
        assert total == pytest.approx(1, abs=1e-12)
        seen.append(targets)
    assert all(targets == seen[0] for targets in seen)


def finetune(untrained, pairs, tmp_path, *flags):
    given = f"""
        --config configs/finetune-jsonl.yaml --model.init_from {untrained} --data.dir {pairs} --run.dir {tmp_path}/runs
        --model.dropout 0 --system.device cpu --system.dtype float32 --data.sequence_length 64 --data.batch_tokens 384
        --optim.lr 1e-2 --optim.steps 80 --optim.warmup_steps 5 --eval.every 20 --checkpoint.every 20
        --eval.samples 0
    """
    return parse_config([*given.split(), *flags])


def pad_vocabulary(source, directory, tokenizer, n):
    """Write a model with `n` more tokens than its tokenizer, which are the most probable ones."""
    model = GPT.from_pretrained(source)
    model.resize_token_embeddings(tokenizer.vocab_size + n)
    with torch.no_grad():
        model.transformer.wte.weight[-n:] = 30 * model.transformer.wte.weight[:1]
    model.save_pretrained(directory, eos_token_id=tokenizer.eot)
    tokenizer.save(directory)
    return directory


def test_a_model_with_a_padded_vocabulary_is_tuned_as_without_padding(
    untrained, pairs, tokenizer, tmp_path, train, python
):
    """The run samples at each validation and resumes, and sample.py loads its checkpoint."""
    padded = pad_vocabulary(untrained, tmp_path / "padded", tokenizer, 20)
    flags = [
        "--optim.steps",
        "4",
        "--optim.warmup_steps",
        "1",
        "--eval.every",
        "2",
        "--checkpoint.every",
        "2",
        "--eval.samples",
        "2",
    ]
    runs = {}
    for name, source in (("plain", untrained), ("padded", padded)):
        run = train(finetune(source, pairs, tmp_path, *flags, "--run.name", name))
        shutil.rmtree(run / "checkpoints" / "step-000004")
        train(finetune(source, pairs, tmp_path, *flags, "--run.name", name))
        runs[name] = run
        python("sample.py", "--model", run, "--max-new-tokens", "5")
    plain, other = (GPT.from_pretrained(run / "checkpoints" / "step-000004") for run in runs.values())
    assert other.config == plain.config
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert (runs["padded"] / "samples.txt").read_bytes() == (runs["plain"] / "samples.txt").read_bytes()


def test_a_model_with_too_many_tokens_is_refused(untrained, pairs, tokenizer, tmp_path, train):
    padded = pad_vocabulary(untrained, tmp_path / "padded", tokenizer, 128)
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the model has \d+: they do not belong together"):
        train(finetune(padded, pairs, tmp_path))
    assert not (tmp_path / "runs").exists()


def test_completions_are_learned_and_sample_py_continues_in_the_same_format(untrained, pairs, tmp_path, train, python):
    run = train(
        finetune(untrained, pairs, tmp_path, "--optim.steps", "120", "--eval.every", "60", "--eval.samples", "1")
    )
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"]
    assert losses[-1] < 0.2 < 3 < losses[0]
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert f"==== step 120, sample 1\n{PAIRS[0][0]}{PAIRS[0][1]}\n" in samples
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in PAIRS), encoding="utf-8")
    done = python("sample.py", "--model", run, "--file", prompts, "--greedy", "--json", "--dtype", "float32")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == [completion for _, completion in PAIRS]
    assert {answer["finish_reason"] for answer in answers} == {"stop"}


def test_packed_examples_are_learned_too(untrained, pairs, tmp_path, train):
    run = train(finetune(untrained, pairs, tmp_path, "--data.pack", "true", "--eval.patience", "0"))
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "train"]
    assert losses[-1] < 0.05 < 3 < losses[0]


def test_early_stopping_names_the_best_checkpoint(untrained, pairs, tmp_path, train, capsys):
    write_pairs(pairs / "val.jsonl", [("The capital of Cuba is", " Rome.")])  # training makes this loss worse
    config = finetune(
        untrained, pairs, tmp_path, "--eval.patience", "2", "--eval.every", "10", "--checkpoint.every", "10"
    )
    run = train(config)
    losses = {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "val"}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 20 < 80
    assert json.loads((run / "status.json").read_text()) == {"status": "finished", "step": best + 20}
    assert (
        f"lowest validation loss, {losses[best]:.4f}: {run / 'checkpoints' / f'step-{best:06d}'}"
        in capsys.readouterr().out
    )
    assert (run / "checkpoints" / f"step-{best:06d}").is_dir()  # kept, although keep is 1
    train(config)  # a finished run does not continue
    assert max(r["step"] for r in read_metrics(run / "metrics.jsonl")) == best + 20


def test_frozen_blocks_do_not_move(untrained, pairs, tmp_path, train):
    run = train(finetune(untrained, pairs, tmp_path, "--model.freeze_layers", "1"))
    before, after = GPT.from_pretrained(untrained), GPT.from_pretrained(run / "checkpoints" / "step-000080")
    moved = {name for name, p in before.state_dict().items() if not torch.equal(p, after.state_dict()[name])}
    assert moved == {name for name in moved if name.startswith(("transformer.h.1.", "transformer.ln_f."))}
    assert len(moved) == 14


def test_more_frozen_blocks_than_the_model_has_are_refused(untrained, pairs, tmp_path, train):
    with pytest.raises(ValueError, match=r"model.freeze_layers 3 is above the 2 layers of .*: lower it"):
        train(finetune(untrained, pairs, tmp_path, "--model.freeze_layers", "3"))


def test_the_report_names_the_validation_set(untrained, pairs, tmp_path, train):
    run = train(finetune(untrained, pairs, tmp_path, "--optim.steps", "6", "--eval.every", "3"))
    found = read_run_log(run, "run").validation
    assert (found.tokens, found.tokenizer) == (0, load_tokenizer(untrained).kind)
    assert str(found) == "completions in at most 64 tokens"


def test_another_validation_set_is_refused(untrained, pairs, tmp_path, train):
    """The best loss and the patience compare losses, which must be on the same validation set."""
    config = finetune(untrained, pairs, tmp_path, "--optim.steps", "10")
    train(config)
    write_pairs(pairs / "val.jsonl", PAIRS[2:4])
    with pytest.raises(ValueError, match=r"dataset.validation_sha256 was '\w+ padded', is '\w+ padded'"):
        train(config)


def test_muon_resumes_with_all_blocks_frozen(untrained, pairs, tmp_path, train):
    """Muon then has no matrix, and an optimizer without parameters has no state to load."""
    flags = ("--model.freeze_layers", "2", "--optim.name", "muon", "--optim.steps", "4", "--checkpoint.every", "2")
    config = finetune(untrained, pairs, tmp_path, *flags, "--optim.warmup_steps", "0", "--checkpoint.keep", "2")
    run = train(config)
    expected = GPT.from_pretrained(run / "checkpoints" / "step-000004").state_dict()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    train(config)
    again = GPT.from_pretrained(run / "checkpoints" / "step-000004").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_resuming_does_not_need_the_initial_model(untrained, pairs, tmp_path, train):
    base = shutil.copytree(untrained, tmp_path / "base")
    config = finetune(base, pairs, tmp_path, "--optim.steps", "10", "--checkpoint.every", "5", "--checkpoint.keep", "2")
    run = train(config)
    shutil.rmtree(base)
    shutil.rmtree(run / "checkpoints" / "step-000010")
    train(config)
    assert (run / "checkpoints" / "step-000010").is_dir()


def test_fine_tuning_on_text_beats_training_from_scratch(verses, tiny_run, train, python, tmp_path):
    """configs/finetune-shakespeare.yaml with a run on similar text as the initial model, on a short text."""
    start = train(tiny_run("start", **{"optim.steps": 60}))
    text = tmp_path / "text"
    text.mkdir()
    for n in range(12):
        (text / f"{n}.txt").write_text(
            f"DUKE:\nThe ox of France is {n} leagues away,\nand no court shall stay me.\n" * 3
        )
    data = tmp_path / "data"
    python("-m", "data.prepare", "text", text, "--out", data, "--tokenizer", verses, "--val-fraction", 0.2)
    assert load_tokenizer(data) == load_tokenizer(verses)
    flags = [
        "--config",
        "configs/finetune-shakespeare.yaml",
        "--data.dir",
        str(data),
        "--run.dir",
        str(tmp_path / "runs"),
    ]
    flags += ["--data.batch_tokens", "128", "--data.sequence_length", "32", "--optim.steps", "13", "--optim.lr", "3e-3"]
    flags += [
        "--optim.warmup_steps",
        "2",
        "--system.device",
        "cpu",
        "--system.dtype",
        "float32",
        "--model.dropout",
        "0",
    ]
    final = {}
    shape = ["--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32", "--model.block_size", "32"]
    for name, model in {"tuned": [str(start)], "scratch": ["scratch", *shape]}.items():
        run = train(parse_config([*flags, "--run.name", name, "--model.init_from", *model]))
        records = [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"]
        final[name] = records[-1]["loss"]
    assert final["tuned"] < 0.7 * final["scratch"]


def test_with_a_document_mask_packed_examples_are_learned_as_if_each_had_its_own_window(untrained, tokenizer, pairs):
    model = GPT.from_pretrained(untrained)
    results = []
    for pack, mask in ((False, False), (True, True), (True, False)):
        windows = CompletionWindows(pairs / "train.jsonl", tokenizer, 64, pack=pack, document_mask=mask)
        loader = Loader(windows, batch_tokens=len(windows) * 64, micro_batch=2, seed=1)
        loss = torch.zeros(())
        for inputs, targets, weight, documents in next(loader):
            loss = loss + model(inputs, targets=targets, document_ids=documents).loss * weight
        loader.close()
        model.zero_grad()
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((len(windows), loss, gradient))
    (n_alone, alone, expected), (n_packed, packed, found), (_, unmasked, _) = results
    assert n_packed < n_alone
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (unmasked - alone).abs() > 1e-4


def test_a_model_can_be_trained_further_on_longer_windows_with_another_attention(tiny_run, train):
    start = train(tiny_run("short", **{"optim.steps": 3})) / "checkpoints" / "step-000003"
    changes = {"model.init_from": str(start), "model.block_size": 64, "data.sequence_length": 64, "optim.steps": 4}
    changes |= {"model.attention": "window", "model.window_size": 16, "checkpoint.every": 2}
    config = tiny_run("long", **changes)
    last = train(config) / "checkpoints" / "step-000004"
    found = GPT.from_pretrained(last).config
    assert (found.block_size, found.attention, found.window_size) == (64, "window", 16)
    weights = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    train(config)  # resumes from step 2, whose checkpoint has all positions
    assert (last / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match=r"model.window_size was 16, is 8"):
        train(tiny_run("long", **changes | {"model.window_size": 8}))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "The", "answer": " a"}', "line 2: expected .*completion"),
        ('{"prompt": "The", "completion": ""}', "line 2: expected .*not empty"),
        ('{"prompt": 3, "completion": " a"}', "line 2: expected .*must be text"),
        ('{"prompt": "The"', "line 2: not JSON"),
        (
            '{"prompt": "The", "completion": "%s"}' % ("a" * 70),
            "line 2: a completion of 71 tokens .*sequence_length 64",
        ),
        ('{"prompt": "Q", "completion": "1"}', "line 2: .*'Q'"),
    ],
)
def test_an_invalid_example_is_named_with_its_line(pairs, untrained, tmp_path, train, line, said):
    (pairs / "train.jsonl").write_text('{"prompt": "The", "completion": " a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        train(finetune(untrained, pairs, tmp_path))
    assert not (tmp_path / "runs").exists()


def test_missing_files_and_impossible_settings_are_refused(pairs, untrained, tmp_path, train, capsys):
    with pytest.raises(ValueError, match="--verify compares shards"):
        open_inputs(finetune(untrained, pairs, tmp_path), None, verify=True)
    (pairs / "val.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.jsonl.*move a tenth"):
        train(finetune(untrained, pairs, tmp_path))
    for flags, said in [
        (["--data.format", "tokens", "--data.pack", "true"], "data.pack needs data.format completions"),
        (["--eval.every", "0"], "eval.patience counts validations"),
    ]:
        with pytest.raises(SystemExit):
            finetune(untrained, pairs, tmp_path, *flags)
        assert said in capsys.readouterr().err


DEMO = Path("runs/shakespeare")
needs_demo = pytest.mark.skipif(not (DEMO / "checkpoints").is_dir(), reason="`make demo` has not been run here")
SHORT = ["--data.sequence_length", "128", "--data.batch_tokens", "2048", "--optim.lr", "1e-3", "--model.dropout", "0"]
SHORT += ["--eval.every", "60", "--eval.samples", "1", "--checkpoint.every", "60"]


def last_bits(run):
    """Return the bits per byte of the first and of the last validation."""
    found = [record["bits_per_byte"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"]
    return found[0], found[-1]


@pytest.mark.slow
@needs_demo
def test_fine_tuning_the_demo_on_prose_beats_training_from_scratch(train, python, tmp_path):
    """The corpus is 300 passages of an encyclopedia that the demo was not trained on."""
    passages = sorted({row["passage"] for row in read_rows("boolq/none/validation")})[:300]
    text, data = tmp_path / "passages.jsonl", tmp_path / "data"
    text.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8")
    python("-m", "data.prepare", "text", text, "--out", data, "--tokenizer", "data/shakespeare", "--val-fraction", 0.15)
    flags = ["--config", "configs/finetune-shakespeare.yaml", "--data.dir", str(data), "--optim.steps", "39", *SHORT]
    flags += ["--run.dir", str(tmp_path / "runs")]
    shape = ["--model.n_layer", "3", "--model.n_head", "4", "--model.n_embd", "128", "--model.block_size", "256"]
    tuned = train(parse_config([*flags, "--run.name", "tuned", "--model.init_from", str(DEMO)]))
    scratch = train(parse_config([*flags, "--run.name", "scratch", "--model.init_from", "scratch", *shape]))
    (before, after), (_, from_scratch) = last_bits(tuned), last_bits(scratch)
    print(f"bits per byte: {before:.4f} before, {after:.4f} after; from scratch {from_scratch:.4f}")
    assert after < before - 0.3
    assert after < from_scratch - 0.3


@pytest.mark.slow
@needs_demo
def test_fine_tuning_the_demo_on_answers(train, tmp_path):
    """The prompt is a speech and the name of the next speaker, the completion is the next speech."""
    speeches = [speech for name in sorted(HELD_OUT) for speech in read_plays()[name].split("\n\n") if "\n" in speech]
    pairs = []
    for said, answer in itertools.pairwise(speech for speech in speeches if len(speech) < 200):
        name, _, words = answer.partition("\n")
        pairs.append((f"{said}\n\n{name}\n", words))
    write_pairs(tmp_path / "train.jsonl", pairs[100:])
    write_pairs(tmp_path / "val.jsonl", pairs[:100])
    flags = [
        "--config",
        "configs/finetune-jsonl.yaml",
        "--data.dir",
        str(tmp_path),
        "--run.dir",
        str(tmp_path / "runs"),
    ]
    flags += [*SHORT, "--optim.steps", "60", "--optim.warmup_steps", "6", "--model.init_from", str(DEMO)]
    run = train(parse_config(flags))
    before, after = last_bits(run)
    print(f"bits per byte of the answers: {before:.4f} before, {after:.4f} after")
    assert after < before - 0.05
    assert pairs[0][0] in (run / "samples.txt").read_text(encoding="utf-8")
