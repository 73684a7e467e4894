"""Test that a config.json of transformers is read completely, or refused with the field named."""

import json

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2CLS

from heads import SequenceClassifier
from model import ACTIVATIONS, GPT, GPTConfig
from tests.transformers_models import OURS, edit_config, transformers_model
from weights import ACTIVATION_NAMES, open_model, query_scale


@pytest.fixture
def directory(tmp_path):
    """Return a directory that transformers wrote."""
    transformers_model().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', but only GPT-2's 'gpt2' is implemented"),
        ({"activation_function": "mish"}, "activation_function is 'mish', expected one of gelu_new, gelu, relu"),
        ({"activation_function": ["gelu"]}, r"activation_function is \['gelu'\]"),
        ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon must be in \(0, 1\), got 0.0"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx must be true or false, got 1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_inner": 0}, "n_inner must be a positive integer, got 0"),
        ({"n_head": 3}, r"n_embd \(16\) must be divisible by n_head \(3\)"),
        ({"vocab_size": None}, "vocab_size must be a positive integer"),
        ({"n_layer": "2"}, "n_layer must be a positive integer, got '2'"),
        ({"n_layer": 10**9}, "n_layer must be at most 10,000, got 1,000,000,000"),
        ({"vocab_size": 10**30}, "vocab_size must be at most"),
        ({"scale_attn_weights": None}, "scale_attn_weights must be true or false, got None"),
        ({"reorder_and_upcast_attn": "no"}, "reorder_and_upcast_attn must be true or false, got 'no'"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon must be in \(0, 1\), got '1e-5'"),
        ({"n_inner": "64"}, "n_inner must be a positive integer, got '64'"),
        ({"n_ctx": 12}, "n_ctx is 12, expected n_positions = 24"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, expected n_head = 2"),
        ({"max_position_embeddings": 48}, "max_position_embeddings is 48, expected n_positions = 24"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config is .*, which is not implemented"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*, which is not implemented"),
        ({"attn_pdrop": [0.1]}, r"attn_pdrop must be in \[0, 1\), got \[0.1\]"),
        ({"resid_pdrop": "0.1"}, r"resid_pdrop must be in \[0, 1\), got '0.1'"),
        ({"embd_pdrop": 1.0}, r"embd_pdrop must be in \[0, 1\), got 1.0"),
        ({"add_cross_attention": "no"}, "add_cross_attention must be true or false, got 'no'"),
        ({"causal": None}, "causal must be true or false, got None"),
    ],
)
def test_another_architecture_is_refused(directory, fields, message):
    edit_config(directory, **fields)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        GPT.from_pretrained(directory)


VARIANTS = st.fixed_dictionaries(
    {},
    optional={
        "vocab_size": st.integers(1, 200),
        "n_positions": st.integers(8, 64),
        "n_layer": st.integers(1, 4),
        "n_head": st.sampled_from([1, 2, 4, 8]),
        "n_embd": st.sampled_from([8, 16, 24, 40]),
        "n_inner": st.none() | st.integers(1, 100),
        "activation_function": st.sampled_from(sorted(ACT2CLS)),
        "layer_norm_epsilon": st.sampled_from([1e-12, 1e-6, 1e-5, 1e-2, 0.5]),
        "scale_attn_weights": st.booleans(),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
        "reorder_and_upcast_attn": st.booleans(),
        "add_cross_attention": st.booleans(),
        "tie_word_embeddings": st.sampled_from([True, True, True, False]),
        "attn_pdrop": st.sampled_from([0, 0.1, 0.5]),
        "resid_pdrop": st.sampled_from([0, 0.1, 0.5]),
        "embd_pdrop": st.sampled_from([0.0, 0.1, 1]),
        "initializer_range": st.floats(0.01, 0.3),
        "use_cache": st.booleans(),
        "summary_type": st.sampled_from(["cls_index", "last", "mean"]),
        "summary_activation": st.sampled_from([None, "tanh"]),
        "pad_token_id": st.none() | st.just(0),
        "eos_token_id": st.none() | st.just(0),
        "dtype": st.sampled_from(["float32", "float16"]),
    },
)


def compare_with_transformers(options, directory):
    """Save a model with these options by transformers and load it: assert equal logits, or an error that names one."""
    theirs = transformers_model(**options)
    theirs.save_pretrained(directory)
    try:
        ours = GPT.from_pretrained(directory, dtype=torch.float32)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert any(f"config.json: {name} " in message for name in options), message
        return False
    generator = torch.Generator().manual_seed(0)
    config = ours.config
    ids = torch.randint(config.vocab_size, (2, 8), generator=generator)
    inputs = {}
    if config.cross_attention:
        inputs["encoder_hidden_states"] = torch.randn(2, 5, config.n_embd, generator=generator)
    expected = theirs.float()(ids, **inputs).logits
    torch.testing.assert_close(ours(ids, **inputs).logits, expected, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(directory / "again")
    again = GPT2LMHeadModel.from_pretrained(directory / "again").eval()
    torch.testing.assert_close(again(ids, **inputs).logits, expected, atol=1e-4, rtol=1e-4)
    return True


@pytest.mark.filterwarnings("ignore:.*dropout rates")
@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        ({"scale_attn_weights": False, "add_cross_attention": True}, True),
        ({"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3}, True),
        ({"activation_function": "gelu", "n_inner": 7, "layer_norm_epsilon": 0.1}, True),
        ({"activation_function": "relu", "attn_pdrop": 0, "resid_pdrop": 0.5, "embd_pdrop": 0.1}, True),
        ({"activation_function": "swish", "n_head": 8, "use_cache": False}, True),
        ({"activation_function": "tanh"}, True),
        ({"activation_function": "mish"}, False),
        ({"tie_word_embeddings": False}, False),
    ],
    ids=str,
)
def test_a_variant_of_transformers_is_loaded_or_refused(options, loaded, tmp_path):
    assert compare_with_transformers(options, tmp_path) is loaded


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*dropout rates")
def test_100_random_configurations_of_transformers_are_loaded_rightly_or_refused_by_name(tmp_path_factory):
    outcomes = []

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(options=VARIANTS)
    def compare(options):
        # transformers has no such shape: it refuses to make the model.
        hypothesis.assume(options.get("n_embd", 16) % options.get("n_head", 2) == 0)
        outcomes.append(compare_with_transformers(options, tmp_path_factory.mktemp("variant")))

    compare()
    print(f"{sum(outcomes)} of {len(outcomes)} configurations are equal, the others are refused by name")
    assert sum(outcomes) > 40


def test_each_activation_has_a_name_in_transformers():
    assert set(ACTIVATION_NAMES.values()) == set(ACTIVATIONS)
    assert set(ACTIVATION_NAMES) <= set(ACT2CLS)


def test_a_missing_or_malformed_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        GPT.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for content, message in [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "lacks model_type, vocab_size, n_positions"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_model(tmp_path).config_arguments()


def test_equivalent_configurations_are_loaded(directory):
    edit_config(directory, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True)
    assert GPTConfig(**open_model(directory).config_arguments()) == OURS
    edit_config(directory, n_ctx=24, num_hidden_layers=2, quantization_config=None)
    assert GPTConfig(**open_model(directory).config_arguments()) == OURS
    fields = json.loads((directory / "config.json").read_text())
    del fields["n_head"]
    (directory / "config.json").write_text(json.dumps(fields | {"num_attention_heads": 2}))
    assert GPTConfig(**open_model(directory).config_arguments()) == OURS
    edit_config(directory, n_head=2, attn_pdrop=0.2)
    with pytest.warns(UserWarning, match=r"\[0.1, 0.2\]: 0.2 is used for all"):
        assert open_model(directory).config_arguments()["dropout"] == 0.2


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=4,
)


def edit_json(data, path):
    """Set or delete up to three fields of a JSON object, or entries of the objects in it, at random."""
    fields = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        target = fields
        name = data.draw(st.sampled_from(sorted(target)))
        while isinstance(target[name], dict) and target[name] and data.draw(st.booleans()):
            target = target[name]
            name = data.draw(st.sampled_from(sorted(target)))
        if data.draw(st.integers(0, 3)) and name in target:
            target[name] = data.draw(JSON_VALUES)
        else:
            del target[name]
        if not fields:
            break
    path.write_text(json.dumps(fields))


@pytest.mark.filterwarnings("ignore:.*dropout rates")
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(data=st.data())
def test_a_random_edit_of_a_json_file_loads_rightly_or_names_the_file(data, tmp_path_factory):
    kind, name = data.draw(
        st.sampled_from([(GPT, "config.json"), (GPT, "index"), (SequenceClassifier, "config.json")]), label="file"
    )
    directory = tmp_path_factory.mktemp("edited")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=2)).eval()
    model = SequenceClassifier(model, 3).eval() if kind is SequenceClassifier else model
    model.save_pretrained(directory, **({"max_shard_size": 100} if name == "index" else {}))
    path = directory / ("model.safetensors.index.json" if name == "index" else name)
    edit_json(data, path)
    try:
        again = kind.from_pretrained(directory)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        gpt = again if kind is GPT else again.gpt
        # Another number of heads, or a model that is not causal, is another model with the same tensors.
        expected = GPT(gpt.config) if kind is GPT else SequenceClassifier(GPT(gpt.config), 3)
        fields = open_model(directory).fields
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            tensor[: fields["n_embd"]] *= query_scale(fields, name.removeprefix("gpt."))
        expected.load_state_dict(state)
        assert gpt.config.n_head == fields["n_head"]
        assert gpt.config.causal == fields["causal"]
        ids = torch.tensor([[1, 4, 2]])
        assert torch.equal(again(ids).logits, expected.eval()(ids).logits)
        return
    assert str(directory) in message
