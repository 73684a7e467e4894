"""Test each step of pattern-exploiting training against numbers that are computed in another way."""

import csv
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch

from classification import encode, fit, load_classifier
from classify import main
from cloze import check_pattern, class_scores, make_clozes, read_verbalizer, score_all
from data.tokenizer import train_tokenizer
from heads import SequenceClassifier
from model import GPT, GPTConfig
from pet import Member, draw, pattern_loss, pseudo_label, soft_labels

THINGS = [("forest", "wood"), ("lake", "water"), ("river", "water"), ("oak", "wood")]
TEXTS = [
    (f"{number}. {start} {thing}", kind) for number in range(6) for start in ("A", "The") for thing, kind in THINGS
]
WORDS = ["--verbalizer", "tree=wood", "--verbalizer", "sea=water", "--verbalizer", "wet=water"]
PATTERNS = ["--pattern", "{text}: {label}", "--pattern", "{label}? {text}."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe:300", [f"{text}: tree? sea. wet" for text, _ in TEXTS])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def directory(save_model, tokenizer, model):
    return save_model(model, tokenizer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    for name, rows in {"few": TEXTS[:8], "many": TEXTS[8:40], "val": TEXTS[40:]}.items():
        with open(directory / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return directory


def run_pet(directory, files, out, *flags, train=True):
    given = f"--model {directory} --unlabeled {files}/many.csv --val {files}/val.csv --out {out} --device cpu"
    few = ["--train", f"{files}/few.csv"] if train else []
    main(["pet", *given.split(), "--dtype", "float32", "--batch-size", "8", *few, *PATTERNS, *WORDS, *flags])


# ---- patterns and their scores


def log_probability(model, ids):
    """Return the log-probability of each token after the first, from one forward pass for each of them."""
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(dim=-1) for i in range(1, len(ids))]
    return [float(row[ids[i]]) for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize("pattern", ["{text}: {label}", "{label}? {text}.", "It: {text} ({label}), {{x}}."])
def test_the_score_of_a_class_is_the_log_probability_of_the_whole_text(tokenizer, model, pattern):
    verbalizer = read_verbalizer(["tree=wood", "sea=water", "wet=water"])
    texts = ["The oak", "A", "12. The river {label}"]
    clozes = make_clozes(texts, pattern, verbalizer.words, tokenizer, 32)
    found = score_all(model, clozes, verbalizer, 2, torch.float32)
    for text, row in zip(texts, found, strict=True):
        whole = {}
        for word in verbalizer.words:
            filled = pattern.replace("{label}", word).replace("{{x}}", "{x}").replace("{text}", text)
            whole[word] = sum(log_probability(model, [tokenizer.eot, *tokenizer.encode(filled)]))
        expected = torch.tensor([(whole["sea"] + whole["wet"]) / 2, whole["tree"]])
        torch.testing.assert_close(row.log_softmax(dim=-1), expected.log_softmax(dim=-1), atol=1e-4, rtol=0)


def test_scores_are_not_rounded_to_the_precision_of_autocast():
    verbalizer = read_verbalizer(["tree=wood", "sea=water", "wet=water"])
    scores = torch.tensor([[-301.0, -300.5, -303.25]])
    with torch.autocast("cpu", torch.bfloat16):
        found = verbalizer.class_means(scores)
    torch.testing.assert_close(found, torch.tensor([[-301.875, -301.0]]))


def test_with_the_blank_last_the_score_is_that_of_the_words_alone(tokenizer, model):
    verbalizer = read_verbalizer([" tree=wood", " sea=water"])
    (cloze,) = make_clozes(["The oak"], "{text}:{label}", verbalizer.words, tokenizer, 32)
    context = [tokenizer.eot, *tokenizer.encode("The oak:")]
    words = [tokenizer.encode(word) for word in (" sea", " tree")]
    assert cloze.fillings == [context + words[1], context + words[0]]
    expected = [sum(log_probability(model, context + word)[len(context) - 1 :]) for word in words]
    shared = 0.0  # log-probability of the tokens that both words begin with, which the score leaves out
    for i in range(cloze.start - len(context)):
        shared += log_probability(model, context + words[0])[len(context) - 1 + i]
    found = score_all(model, [cloze], verbalizer, 1, torch.float32)[0]
    torch.testing.assert_close(found, torch.tensor(expected) - shared, atol=1e-4, rtol=0)


def test_a_long_text_is_cut_until_the_longest_word_fits(tokenizer, capsys):
    words = ["tree", "a very long word"]
    (cloze,) = make_clozes(["The forest. " * 20], "{text}: {label}", words, tokenizer, 32)
    assert max(map(len, cloze.fillings)) <= 32
    assert min(map(len, cloze.fillings)) > 8
    texts = [tokenizer.decode(filling[1:]) for filling in cloze.fillings]
    assert texts[0].removesuffix(": tree") == texts[1].removesuffix(": a very long word")
    assert texts[0].startswith("The forest. The forest")
    assert "1 of 1 texts are too long" in capsys.readouterr().err
    with pytest.raises(ValueError, match="and a word have more than 5 tokens: shorten it"):
        make_clozes(["The forest"], "{text}: {label}", words, tokenizer, 5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{text} It was", "expected {text} once and {label} once"),
        ("{text} {label} {label}", "expected {text} once and {label} once"),
        ("{text} {label} {other}", "expected {text} once and {label} once"),
        ("{text} {label!r}", "expected {text} once and {label} once"),
        ("{text} {label} }", "Single '}' encountered in format string; write {{ for a brace"),
    ],
)
def test_a_pattern_with_other_fields_is_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["good"], "'good': expected WORD=CLASS"),
        (["=x", "b=y"], "'=x': expected WORD=CLASS"),
        (["a=x", "a=y"], "'a=y': 'a' already stands for the class 'x'"),
        (["a=x", "b=x"], "names 1 class, expected at least two"),
    ],
)
def test_a_verbalizer_needs_a_word_for_at_least_two_classes(pairs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_verbalizer(pairs)


# ---- the three steps


def test_soft_labels_of_two_known_distributions():
    first, second = torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([[0.4, 0.6], [0.1, 0.9]])
    found = soft_labels([first.log(), second.log() + 7.0], [0.75, 0.25], 2.0)  # a constant changes nothing
    for row, a, b in zip(found, first, second, strict=True):
        # the weighted geometric mean, to the power of 1 / temperature
        mean = [(float(a[k]) ** 0.75 * float(b[k]) ** 0.25) ** 0.5 for k in range(2)]
        assert row.tolist() == pytest.approx([mean[0] / sum(mean), mean[1] / sum(mean)], abs=1e-6)
    assert torch.equal(soft_labels([first, second], [0, 0], 1.0), soft_labels([first, second], [0.3, 0.3], 1.0))


def test_the_loss_of_a_pattern_adds_that_of_the_language_model(tokenizer, model):
    verbalizer = read_verbalizer(["tree=wood", "sea=water"])
    clozes = make_clozes(["The oak", "A lake"], "{text}: {label}", verbalizer.words, tokenizer, 32)
    texts = [[tokenizer.eot, *tokenizer.encode(text)] for text in ("The river", "A")]
    loss = pattern_loss(model, clozes, [1, 0], texts, verbalizer, 0.25)
    scores = class_scores(model, clozes, verbalizer).detach().log_softmax(dim=-1)
    log_probs = [value for ids in texts for value in log_probability(model, ids)]
    expected = 0.75 * -float(scores[0, 1] + scores[1, 0]) / 2 + 0.25 * -sum(log_probs) / len(log_probs)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert pattern_loss(model, clozes, [1, 0], texts, verbalizer, 0.0).item() == pytest.approx(
        -float(scores[0, 1] + scores[1, 0]) / 2, abs=1e-5
    )


def test_the_unlabeled_texts_are_drawn_in_epochs():
    texts = [[i] for i in range(7)]
    drawn = [text[0] for start in range(0, 21, 3) for text in draw(texts, start, 3, 5)]
    assert [sorted(drawn[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]


def test_pseudo_labels_grow_in_the_proportion_of_the_classes_and_follow_the_scores():
    verbalizer = read_verbalizer(["tree=wood", "sea=water"])
    scores = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    chosen = pseudo_label([Member(0, scores)], [0.5], [0, 1, 1], verbalizer, 2, seed=1)
    assert np.bincount(list(chosen.values())).tolist() == [4, 8]  # with the labeled texts 5 and 10
    assert all(int(scores[i].argmax()) == label for i, label in chosen.items())
    third = pseudo_label([Member(0, scores)], [0.5], [0, 1, 1], verbalizer, 3, seed=1)
    assert np.bincount(list(third.values())).tolist() == [24, 48]
    without = pseudo_label([Member(0, scores)], [1.0], [], verbalizer, 2, seed=1)
    assert np.bincount(list(without.values())).tolist() == [10, 10]
    everything = pseudo_label([Member(0, scores)], [1.0], [0, 1] * 50, verbalizer, 4, seed=1)
    assert sorted(everything) == list(range(400))  # there are fewer texts than wanted


def test_pseudo_labels_come_from_a_quarter_of_the_models():
    verbalizer = read_verbalizer(["tree=wood", "sea=water"])
    sure = [Member(0, torch.tensor([[9.0, 0.0]] * 30)), Member(1, torch.tensor([[0.0, 9.0]] * 30))]
    answers = {frozenset(pseudo_label(sure, [1, 1], [], verbalizer, 2, seed).values()) for seed in range(20)}
    assert answers == {frozenset({0}), frozenset({1})}  # one model at a time


def test_one_hot_soft_labels_give_the_classifier_of_classify_train(directory, files, tmp_path):
    flags = f"--model {directory} --train {files}/few.csv --val {files}/val.csv --device cpu --dtype float32"
    main(["train", *flags.split(), "--out", str(tmp_path / "hard"), "--epochs", "3", "--lr", "3e-3"])
    args = Namespace(model=str(directory), checkpoint=None, device="cpu", dtype="float32", seed=1337, strategy="last")
    vars(args).update(
        max_length=None, freeze_layers=0, batch_size=16, epochs=3, lr=3e-3, patience=2, out=tmp_path / "soft"
    )
    classifier, tokenizer = load_classifier(args, ["water", "wood"])
    one_hot = {"water": [1.0, 0.0], "wood": [0.0, 1.0]}
    texts, labels = zip(*TEXTS[:8], strict=True)
    val_texts, val_labels = zip(*TEXTS[40:], strict=True)
    train_examples = encode(texts, [one_hot[label] for label in labels], tokenizer, 32)
    val_examples = encode(val_texts, [["water", "wood"].index(label) for label in val_labels], tokenizer, 32)
    fit(classifier, tokenizer, train_examples, val_examples, args)
    hard, soft = (SequenceClassifier.from_pretrained(tmp_path / name).state_dict() for name in ("hard", "soft"))
    for name, tensor in hard.items():
        assert torch.equal(soft[name], tensor), name
    moved = torch.linalg.vector_norm(hard["score.weight"] - load_classifier(args, ["a", "b"])[0].score.weight)
    assert moved > 1e-3


# ---- the command


def test_pet_writes_a_classifier_that_has_learned(directory, files, tmp_path, capsys):
    given = ("--lr", "3e-3", "--pattern-epochs", "20", "--models-per-pattern", "1", "--epochs", "10", "--alpha", "0.01")
    run_pet(directory, files, tmp_path / "out", *given, "--temperature", "1")
    output = capsys.readouterr().out
    assert "pattern 1, before training: accuracy" in output
    assert "generation 1, pattern 2, seed 2338: 8 labeled texts, accuracy 1.0000 on the validation texts" in output
    main(["predict", "--model", str(tmp_path / "out"), "--file", str(files / "val.csv"), "--device", "cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == [kind for _, kind in TEXTS[40:]]


def test_the_soft_labels_of_the_command_are_those_of_its_ensemble(directory, files, tmp_path, monkeypatch):
    """Zero-shot: the ensemble is the model itself with each pattern, so the soft labels can be computed here."""
    seen = {}

    def remember(classifier, tokenizer, train_examples, val_examples, args):
        seen["labels"] = torch.tensor([example.label for example in train_examples])

    monkeypatch.setattr("pet.fit", remember)
    run_pet(directory, files, tmp_path / "out", train=False)
    args = Namespace(model=str(directory), checkpoint=None, device="cpu", seed=0, strategy="last")
    vars(args).update(max_length=None, freeze_layers=0)
    classifier, tokenizer = load_classifier(args, ["water", "wood"])
    verbalizer = read_verbalizer(["tree=wood", "sea=water", "wet=water"])
    scores = [
        score_all(
            classifier.gpt,
            make_clozes([text for text, _ in TEXTS[8:40]], pattern, verbalizer.words, tokenizer, 32),
            verbalizer,
            7,
            torch.float32,
        )
        for pattern in ("{text}: {label}", "{label}? {text}.")
    ]
    expected = ((scores[0] + scores[1]) / 2 / 2.0).softmax(dim=-1)
    torch.testing.assert_close(seen["labels"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("train", [True, False])
def test_later_generations_learn_from_more_texts(directory, files, tmp_path, capsys, train):
    given = ("--generations", "3", "--models-per-pattern", "1", "--pattern-epochs", "1", "--epochs", "1")
    run_pet(directory, files, tmp_path / "out", *given, train=train)
    found = re.findall(r"generation (\d), pattern \d, seed \d+: (\d+) labeled texts", capsys.readouterr().out)
    sizes = {generation: int(size) for generation, size in found}
    assert list(sizes) == (["1", "2", "3"] if train else ["2", "3"])
    assert sorted(sizes.values()) == list(sizes.values())
    assert sizes["3"] > sizes["2"] >= (10 if train else 1)
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "1"], "--alpha must be at least 0 and below 1, got 1.0"),
        (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--generations", "0"], "--generations must be at least 1, got 0"),
        (["--models-per-pattern", "0"], "--models-per-pattern must be at least 1, got 0"),
        (["--pattern", "{text}"], "--pattern '{text}': expected {text} once and {label} once"),
        (["--verbalizer", "mud"], "--verbalizer 'mud': expected WORD=CLASS"),
        (["--val", "OTHER"], "has classes without a word: stone; name one with --verbalizer WORD=stone"),
        (["--unlabeled", "missing.csv"], "missing.csv"),
        (["--max-length", "3"], "and a word have more than 3 tokens"),
    ],
)
def test_bad_input_gives_a_message_and_creates_nothing(directory, files, tmp_path, capsys, flags, message):
    (tmp_path / "other.csv").write_text("text,label\nA rock,stone\n")
    flags = [str(tmp_path / "other.csv") if flag == "OTHER" else flag for flag in flags]
    with pytest.raises(SystemExit) as exit:
        run_pet(directory, files, tmp_path / "out", *flags)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
