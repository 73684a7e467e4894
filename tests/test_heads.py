"""Classification and multiple choice against transformers' classes, sentence vectors against those of single rows."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2DoubleHeadsModel
from transformers import GPT2ForSequenceClassification as TheirClassifier

from heads import DoubleHeads, SequenceClassifier, encode
from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig

V, C, T = 70, 24, 10
PAD = V - 1
SHAPES = [
    {"n_layer": 1, "n_head": 1, "n_embd": 8},
    {"n_layer": 2, "n_head": 3, "n_embd": C},
    {"n_layer": 3, "n_head": 2, "n_embd": 32},
]


def their_config(num_labels=2, shape=SHAPES[1], **options):
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    return GPT2Config(vocab_size=V, n_positions=32, num_labels=num_labels, **shape, **pdrop, **special, **options)


def randomized(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def padded(lengths, side):
    """Return ids (B, T) with lengths[i] tokens and padding in row i, their attention mask and their positions."""
    torch.manual_seed(1)
    ids = torch.randint(PAD, (len(lengths), T))
    positions = torch.arange(T)
    sizes = torch.tensor(lengths)[:, None]
    mask = (positions < sizes if side == "right" else positions >= T - sizes).long()
    return ids.masked_fill(mask == 0, PAD), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def assert_same_gradients(ours, theirs):
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        name = name.removeprefix("gpt.")
        gradient = expected[name].grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            gradient = gradient.T
        if name.endswith("summary.bias"):  # shifts the scores of all choices equally: its exact gradient is zero
            assert parameter.grad.abs() < 1e-5
        else:
            assert_close(parameter.grad, gradient, 2e-4)


def small_gpt():
    config = GPTConfig(vocab_size=V, block_size=32, n_layer=2, n_head=3, n_embd=C)
    return randomized(GPT(config))


LABELS = [
    pytest.param(2, torch.tensor([0, 1, 1]), id="two classes"),
    pytest.param(5, torch.tensor([4, 0, 2]), id="five classes"),
    pytest.param(1, torch.tensor([0.3, -2.0, 1.5]), id="regression"),
    pytest.param(3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), id="several classes may apply"),
]


@pytest.mark.parametrize(("num_labels", "labels"), LABELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_classifier_equals_that_of_transformers(tmp_path, num_labels, labels, side, shape):
    theirs = randomized(TheirClassifier(their_config(num_labels, shape)))
    theirs.save_pretrained(tmp_path)
    ours = SequenceClassifier.from_pretrained(tmp_path)
    assert ours.strategy == "last"
    assert ours.num_labels == num_labels
    assert not ours.training
    ids, mask, positions = padded([10, 3, 6], side)
    expected = theirs(ids, attention_mask=mask, position_ids=positions, labels=labels)
    output = ours(ids, attention_mask=mask, labels=labels)
    assert_close(output.logits, expected.logits)
    assert_close(output.loss, expected.loss)
    expected.loss.backward()
    output.loss.backward()
    if shape["n_layer"] > 1:
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_transformers_loads_our_classifier(tmp_path, num_labels):
    ours = SequenceClassifier(small_gpt(), num_labels)
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(theirs.score.weight, ours.score.weight)
    ids = torch.randint(V, (1, T))
    assert_close(ours(ids).logits, theirs(ids).logits)
    again = SequenceClassifier.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_transformers_accepts_padded_rows_with_our_classifier(tmp_path):
    """transformers recognizes padding by its id, here the id of end-of-text, which no encoded text contains."""
    ours = SequenceClassifier(small_gpt(), 3).eval()
    ours.save_pretrained(tmp_path, eos_token_id=PAD)
    ids, mask, _ = padded([10, 3, 6], "right")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_close(ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)


def test_config_equals_that_of_transformers(tmp_path):
    for num_labels in (1, 2, 3):
        theirs = TheirClassifier(their_config(num_labels))
        theirs.config.pad_token_id = None
        theirs.save_pretrained(tmp_path / "theirs")
        config = GPTConfig(vocab_size=V, block_size=32, n_layer=2, n_head=3, n_embd=C)
        SequenceClassifier(GPT(config), num_labels).save_pretrained(tmp_path / "ours")
        expected, ours = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours"))
        del expected["transformers_version"]
        expected["summary_first_dropout"] = 0.1  # has no effect on this class
        expected["n_ctx"] = 32  # for llama.cpp and mlx-lm
        assert ours == expected


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_strategy_all(side):
    """Texar's all_time: one product with the concatenated states of all tokens, followed by zeros."""
    gpt = small_gpt()
    classifier = SequenceClassifier(gpt, 3, "all", max_length=12)
    ids, mask, _ = padded([10, 3, 6], side)
    logits = classifier(ids, attention_mask=mask).logits
    for row, length in enumerate([10, 3, 6]):
        alone = ids[row : row + 1][mask[row : row + 1].bool()].view(1, length)
        states = gpt(alone).last_hidden_state[0]
        weight = classifier.score.weight.view(3, 12, C)
        expected = sum(weight[:, position] @ states[position] for position in range(length))
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(classifier(alone).logits[0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="13 tokens is longer than max_length 12"):
        classifier(torch.zeros(1, 13, dtype=torch.long))
    assert SequenceClassifier(gpt, 3, "all").max_length == 32
    with pytest.raises(ValueError, match="max_length is 33, expected 1 to block_size 32"):
        SequenceClassifier(gpt, 3, "all", max_length=33)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": 3}, 'id2label is 3, expected an object with the keys "0", "1", ...'),
        ({"id2label": ["a", "b", "c"]}, "id2label is"),
        ({"id2label": {"zero": "a", "1": "b", "2": "c"}}, "id2label is"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "id2label is"),
        ({"id2label": {"0": "a", "1": 2, "2": "c"}}, "id2label is .*, expected a text for each class"),
        ({"classifier_strategy": ["all"]}, r"classifier_strategy is \['all'\], expected 'last'"),
        ({"classifier_max_length": "20"}, "classifier_max_length must be an integer, got '20'"),
        ({"classifier_max_length": 99}, "classifier_max_length is 99, expected 1 to block_size 32"),
        ({"problem_type": "regression"}, "problem_type is a regression of 3 values"),
    ],
    ids=str,
)
def test_fields_of_a_classifier_with_another_shape_are_refused(tmp_path, fields, message):
    SequenceClassifier(small_gpt(), 3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        SequenceClassifier.from_pretrained(tmp_path)


def test_strategy_token():
    gpt = small_gpt()
    classifier = SequenceClassifier(gpt, 3, "token")
    ids = torch.randint(V, (2, T))
    labels = torch.randint(3, (2, T))
    labels[0, 4:] = IGNORE_INDEX
    output = classifier(ids, labels=labels)
    expected = gpt(ids).last_hidden_state @ classifier.score.weight.T
    torch.testing.assert_close(output.logits, expected)
    kept = labels != IGNORE_INDEX
    torch.testing.assert_close(output.loss, F.cross_entropy(expected[kept], labels[kept]))
    one = SequenceClassifier(gpt, 1, "token")
    numbers = torch.randn(2, T)
    torch.testing.assert_close(one(ids, labels=numbers).loss, F.mse_loss(one(ids).logits[..., 0], numbers))


@pytest.mark.parametrize("strategy", ["last", "all", "token"])
def test_integer_labels_with_one_class_are_binary(strategy):
    classifier = SequenceClassifier(small_gpt(), 1, strategy)
    shape = (3, T) if strategy == "token" else (3,)
    ids, labels = torch.randint(V, (3, T)), torch.randint(2, shape)
    labels[0] = IGNORE_INDEX
    output = classifier(ids, labels=labels)
    p = output.logits[..., 0][1:].sigmoid()
    expected = -torch.where(labels[1:] == 1, p, 1 - p).log().mean()
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match=r"labels hold 2, outside 0..1 \(classes 2\)"):
        classifier(ids, labels=torch.full(shape, 2))


@pytest.mark.parametrize("strategy", ["last", "all", "token"])
def test_saved_and_loaded(tmp_path, strategy):
    ours = SequenceClassifier(small_gpt(), 3, strategy, max_length=20).eval()
    ours.save_pretrained(tmp_path, eos_token_id=5)
    again = SequenceClassifier.from_pretrained(tmp_path)
    ids = torch.randint(V, (2, T))
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert (again.strategy, again.max_length) == (strategy, 20)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 5
    half = SequenceClassifier.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_close(half(ids).logits.float(), ours(ids).logits, 5e-2)
    with pytest.raises(ValueError, match=r"unknown: score\.weight"):
        GPT.from_pretrained(tmp_path)


def test_a_language_model_cannot_be_loaded_as_a_classifier(tmp_path):
    small_gpt().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: score\.weight"):
        SequenceClassifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: multiple_choice_head\.summary\.weight"):
        DoubleHeads.from_pretrained(tmp_path)


def test_fine_tuning_learns_with_frozen_blocks():
    gpt = small_gpt()
    gpt.freeze(layers=2)
    classifier = SequenceClassifier(gpt, 2).train()
    before = copy.deepcopy(gpt.transformer.h.state_dict())
    ids = torch.randint(PAD, (32, T))
    labels = (ids[:, -1] < 35).long()
    optimizer = torch.optim.Adam([p for p in classifier.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        loss = classifier(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in gpt.transformer.h.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"strategy": "first"}, "strategy is 'first', expected 'last', 'all' or 'token'"),
    ],
)
def test_impossible_classifiers(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(small_gpt(), **arguments)


@pytest.mark.parametrize(
    ("num_labels", "labels", "message"),
    [
        (3, torch.tensor([0, 3]), r"labels hold 3, outside 0..2 \(classes 3\)"),
        (3, torch.tensor([0, 1, 2]), r"labels has shape \(3,\), expected \(2,\)"),
        (3, torch.zeros(2), r"labels has shape \(2,\), expected \(2, 3\)"),
        (1, torch.zeros(2, 2), r"labels has shape \(2, 2\), expected \(2,\) or \(2, 1\)"),
    ],
)
def test_wrong_labels(num_labels, labels, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(small_gpt(), num_labels)(torch.zeros(2, 4, dtype=torch.long), labels=labels)


# ---- double heads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", ["last", "given"])
def test_double_heads_equal_those_of_transformers(tmp_path, shape, tokens):
    theirs = randomized(GPT2DoubleHeadsModel(their_config(shape=shape)))
    theirs.save_pretrained(tmp_path)
    ours = DoubleHeads.from_pretrained(tmp_path)
    ids = torch.randint(V, (2, 3, T))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, IGNORE_INDEX)
    inputs = {"labels": labels, "mc_labels": torch.tensor([2, 0])}
    if tokens == "given":
        inputs["mc_token_ids"] = torch.randint(T, (2, 3))
    expected = theirs(ids, **inputs)
    output = ours(ids, **inputs, return_logits=True)
    assert_close(output.logits, expected.logits)
    assert_close(output.mc_logits, expected.mc_logits)
    assert_close(output.loss, expected.loss)
    assert_close(output.mc_loss, expected.mc_loss)
    (expected.loss + 2 * expected.mc_loss).backward()
    (output.loss + 2 * output.mc_loss).backward()
    if shape["n_layer"] > 1:
        assert_same_gradients(ours, theirs)


def test_transformers_loads_our_double_heads(tmp_path):
    ours = DoubleHeads(small_gpt()).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = GPT2DoubleHeadsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(V, (2, 3, T))
    assert_close(ours(ids).mc_logits, theirs.eval()(ids).mc_logits)
    assert_close(ours(ids).logits, theirs(ids).logits)
    again = DoubleHeads.from_pretrained(tmp_path)
    assert torch.equal(again(ids).mc_logits, ours(ids).mc_logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_choices_score_as_single_rows(side):
    ours = DoubleHeads(small_gpt()).eval()
    ids, mask, _ = padded([10, 3, 6, 1], side)
    output = ours(ids.view(2, 2, T), attention_mask=mask.view(2, 2, T))
    for row in range(4):
        alone = ours(ids[row][mask[row].bool()].view(1, 1, -1)).mc_logits
        torch.testing.assert_close(output.mc_logits.flatten()[row], alone[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, r"shape \(2, 4\), expected \(B, N, T\)"),
        ({"mc_labels": torch.tensor([0, 3])}, r"mc_labels hold 3, outside 0..2 \(choices 3\)"),
        ({"mc_token_ids": torch.full((2, 3), 4)}, r"mc_token_ids hold 4, outside 0..3 \(tokens 4\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\), expected \(2, 3, 4\)"),
    ],
)
def test_misuse_of_double_heads(inputs, message):
    with pytest.raises(ValueError, match=message):
        DoubleHeads(small_gpt())(**{"input_ids": torch.zeros(2, 3, 4, dtype=torch.long)} | inputs)


# ---- sentence vectors


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_encode_gives_each_row_the_vector_it_has_alone(side):
    gpt = small_gpt()
    ids, mask, _ = padded([10, 3, 6, 1], side)
    last, mean = (encode(gpt, ids, mask, pooling) for pooling in ("last", "mean"))
    for row in range(4):
        states = gpt(ids[row][mask[row].bool()].view(1, -1)).last_hidden_state[0]
        torch.testing.assert_close(last[row], states[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean[row], states.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode(gpt, ids[:1]), last[:1])
    torch.testing.assert_close(encode(gpt, ids[:1], pooling="mean"), mean[:1])
    mask[2] = 0
    with pytest.raises(ValueError, match="row 2 of attention_mask keeps no token"):
        encode(gpt, ids, mask)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        encode(gpt, ids, pooling="max")


@pytest.mark.parametrize(("field", "value"), [("summary_activation", "tanh"), ("summary_type", "mean")])
def test_double_heads_with_another_summary_are_refused(tmp_path, field, value):
    GPT2DoubleHeadsModel(their_config(1, **{field: value})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field} is '{value}', and only"):
        DoubleHeads.from_pretrained(tmp_path)
