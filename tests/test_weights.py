"""Test that models are exchanged with transformers in both directions, and that damaged files are refused."""

import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model

import weights
from model import GPT, GPTConfig
from tests.transformers_models import OURS, edit_config, transformers_model
from weights import CONV1D, locate, read_tensors

ROOT = Path(__file__).parent.parent


@pytest.fixture
def saved(tmp_path):
    """Return a directory that transformers wrote, and the model that it was written from."""
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", theirs


@pytest.fixture
def ours():
    torch.manual_seed(1)
    return GPT(OURS).eval()


def edit_tensors(directory, edit):
    """Replace the tensors in model.safetensors by `edit(tensors)`."""
    tensors = edit(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def assert_same_weights(ours, theirs):
    """Assert that all weights are equal bit for bit; transformers' Conv1D weights are transposed first."""
    expected = dict(theirs.named_parameters())
    expected.pop("lm_head.weight", None)
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name].T if CONV1D.search(name) else expected[name]), name


# ---- saving


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
@pytest.mark.parametrize("cross_attention", [False, True])
def test_transformers_loads_what_we_save(tmp_path, max_shard_size, cross_attention):
    torch.manual_seed(1)
    ours = GPT(GPTConfig(**vars(OURS) | {"cross_attention": cross_attention})).eval()
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs) is GPT2LMHeadModel
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert_same_weights(ours, theirs)
    assert_same_weights(GPT.from_pretrained(tmp_path), theirs)


def test_saved_files_equal_those_of_transformers(saved, tmp_path):
    directory, theirs = saved
    GPT.from_pretrained(directory).save_pretrained(tmp_path / "ours")
    assert {path.name for path in directory.iterdir()} == {path.name for path in (tmp_path / "ours").iterdir()}
    expected = json.loads((directory / "config.json").read_text()) | {"n_ctx": 24}  # for llama.cpp and mlx-lm
    expected.pop("transformers_version")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == expected
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "ours", directory))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_saved_files_name_the_end_of_text_token(tmp_path):
    vocab = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4}
    for size, given, written in [(50257, None, 50256), (90, None, None), (90, 3, 3)]:
        GPT(GPTConfig(vocab_size=size, **vocab)).save_pretrained(tmp_path, eos_token_id=given)
        for file in ("config.json", "generation_config.json"):
            fields = json.loads((tmp_path / file).read_text())
            assert fields["eos_token_id"] == fields["bos_token_id"] == written


def test_saving_replaces_the_shards_of_a_previous_model(ours, tmp_path):
    ours.save_pretrained(tmp_path, max_shard_size="10KB")
    other = GPT(OURS)
    other.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    assert torch.equal(GPT.from_pretrained(tmp_path).transformer.wte.weight, other.transformer.wte.weight)
    ours.save_pretrained(tmp_path, max_shard_size="10KB")
    assert torch.equal(GPT.from_pretrained(tmp_path).transformer.wte.weight, ours.transformer.wte.weight)


def test_the_dtype_is_saved_and_loaded(ours, tmp_path):
    ours.bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in GPT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_transformers_refuses_a_model_that_is_not_causal(tmp_path):
    encoder = GPT(GPTConfig(**vars(OURS) | {"causal": False}))
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2-bidirectional"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == encoder.config
    edit_config(tmp_path, model_type="gpt2")  # as older versions wrote it
    assert GPT.from_pretrained(tmp_path).config == encoder.config
    edit_config(tmp_path, model_type="gpt2-bidirectional", causal=True)
    with pytest.raises(ValueError, match="model_type is 'gpt2-bidirectional'"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
def test_saved_files_have_the_mode_that_the_umask_gives(ours, tmp_path, max_shard_size):
    before = os.umask(0o027)
    try:
        ours.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    finally:
        os.umask(before)
    files = list((tmp_path / "model").iterdir())
    assert len(files) == 3 or max_shard_size == "10KB"
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


# ---- loading


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
def test_we_load_what_transformers_saves(tmp_path, max_shard_size):
    theirs = transformers_model(add_cross_attention=True)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    ours = GPT.from_pretrained(tmp_path)
    assert not ours.training
    assert ours.config.cross_attention
    assert ours.config.dropout == 0.1
    assert_same_weights(ours, theirs)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in ours.parameters())


def test_names_without_the_transformer_prefix_are_loaded(tmp_path):
    theirs = transformers_model()
    GPT2Model.save_pretrained(theirs.transformer, tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_weights(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_of_old_checkpoints_are_ignored(saved, prefix):
    directory, theirs = saved

    def add_buffers(tensors):
        tensors = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(2):
            tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    edit_tensors(directory, add_buffers)
    assert_same_weights(GPT.from_pretrained(directory), theirs)


@pytest.mark.parametrize("which", ["both", "head alone"])
def test_a_file_with_a_head_is_loaded(saved, which):
    directory, theirs = saved
    # Of two tied tensors, the save_model function of safetensors keeps one.
    drop = "transformer.wte.weight" if which == "head alone" else ""

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        return {name: tensor for name, tensor in tensors.items() if name != drop}

    edit_tensors(directory, add_head)
    assert_same_weights(GPT.from_pretrained(directory), theirs)


def test_an_untied_head_is_refused(saved):
    directory, _ = saved
    edit_tensors(directory, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
        GPT.from_pretrained(directory)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin_is_loaded(saved, zipped):
    directory, theirs = saved
    state = theirs.state_dict()
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (directory / "model.safetensors").unlink()
    assert_same_weights(GPT.from_pretrained(directory), theirs)


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_executes_code_is_refused(saved, tmp_path):
    directory, theirs = saved
    torch.save(theirs.state_dict() | {"trap": Trap(tmp_path / "executed")}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
        GPT.from_pretrained(directory)
    assert not (tmp_path / "executed").exists()
    (directory / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        GPT.from_pretrained(directory)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"model": {"wte.weight": torch.zeros(2)}},
            "holds a dict under the key 'model', expected only tensors by name",
        ),
        ({3: torch.zeros(2)}, "holds a Tensor under the key 3, expected only tensors by name"),
        ({"wte.weight": torch.zeros(2, 2).to_sparse()}, "wte.weight is a sparse_coo tensor, expected a dense tensor"),
        ({"wte.weight": torch.zeros(2, device="meta")}, "wte.weight is a meta tensor"),
        ([torch.zeros(2)], "holds a list, expected a dictionary of tensors by name"),
        (torch.zeros(2), "holds a Tensor, expected a dictionary"),
    ],
    ids=str,
)
def test_a_pytorch_model_bin_of_another_shape_is_refused(saved, state, message):
    directory, _ = saved
    torch.save(state, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin.* {message}"):
        GPT.from_pretrained(directory)


def write_pickled_shards(directory, state, trap=None):
    """Replace model.safetensors by two .bin files and their index, as transformers wrote them up to version 4."""
    (directory / "model.safetensors").unlink()
    names = sorted(state)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part} | (trap or {}), directory / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_shards_of_pytorch_model_bin_are_loaded(saved):
    directory, theirs = saved
    write_pickled_shards(directory, dict(theirs.state_dict()))
    assert_same_weights(GPT.from_pretrained(directory), theirs)
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin"):
        GPT.from_pretrained(directory)


def test_a_shard_that_executes_code_is_refused(saved, tmp_path):
    directory, theirs = saved
    write_pickled_shards(directory, dict(theirs.state_dict()), {"trap": Trap(tmp_path / "executed")})
    with pytest.raises(ValueError, match=r"00001-of-00002\.bin cannot be read as plain tensors"):
        GPT.from_pretrained(directory)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("place", ["../other/{}", "/{}", "sub/{}", "..", "", "a\\b", 3, ["{}"], None])
def test_only_files_of_the_directory_itself_are_read(saved, tmp_path, kind, place):
    directory, _ = saved
    (tmp_path / "other").mkdir()
    (directory / "sub").mkdir()
    source = (directory / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
    (directory / "sub" / "model.safetensors").write_bytes(source.read_bytes())
    if place == "/{}":
        place = str(source)
    place = place.format("model.safetensors") if isinstance(place, str) else place
    (directory / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"wte.weight": place}}))
    with pytest.raises(ValueError, match=rf"{kind}\.index\.json: weight_map names the file .* for wte\.weight"):
        GPT.from_pretrained(directory)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 3}])
def test_an_index_without_files_is_refused(saved, content):
    directory, _ = saved
    (directory / "model.safetensors").rename(directory / "shard.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        GPT.from_pretrained(directory)


def test_integer_tensors_are_refused(saved):
    directory, _ = saved
    name = "transformer.wte.weight"
    edit_tensors(directory, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(ValueError, match=r"not floating-point: transformer\.wte\.weight int8"):
        GPT.from_pretrained(directory)


def test_weights_are_converted_to_the_dtype_asked_for(saved):
    directory, theirs = saved
    ours = GPT.from_pretrained(directory, dtype=torch.bfloat16, device="cpu")
    theirs.bfloat16()
    assert_same_weights(ours, theirs)


def test_all_wrong_tensors_are_listed(saved):
    directory, _ = saved

    def spoil(tensors):
        del tensors["transformer.h.1.ln_1.bias"], tensors["transformer.wpe.weight"]
        tensors["transformer.h.0.attn.c_proj.weight"] = torch.zeros(16, 15)
        return tensors | {"transformer.h.2.ln_1.bias": torch.zeros(16), "score.weight": torch.zeros(2, 16)}

    edit_tensors(directory, spoil)
    with pytest.raises(ValueError, match=r"do not match its config\.json") as caught:
        GPT.from_pretrained(directory)
    for part in (
        "missing: transformer.wpe.weight, transformer.h.1.ln_1.bias;",
        "unknown: ",
        "transformer.h.2.ln_1.bias",
        "score.weight",
        "misshapen: transformer.h.0.attn.c_proj.weight (15, 16), expected (16, 16)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
def test_damaged_files_are_refused(tmp_path, max_shard_size):
    transformers_model().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    for damaged in (content[:-100], content[:4], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read"):
            GPT.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=file.name if max_shard_size == "10KB" else "no weights"):
        GPT.from_pretrained(tmp_path)


# ---- the hub


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_is_refused(tmp_path):
    for name in (tmp_path / "none", "./none", "../none", "a b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such model directory"):
            locate(name)


class Refuse(socketserver.StreamRequestHandler):
    """A proxy that lets nothing through."""

    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture
def firewall():
    """The address of a proxy that refuses all connections."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever).start()
        yield "http://{}:{}".format(*server.server_address)
        server.shutdown()


@pytest.mark.parametrize("network", ["offline", "no server", "firewall"])
def test_a_hub_name_without_a_network_is_refused_with_one_line(tmp_path, network, firewall):
    """Run in a subprocess, because the hub's client reads its environment variables only once."""
    program = "import model\ntry: model.GPT.from_pretrained('gpt2')\nexcept FileNotFoundError as error: print(error)"
    environment = {"HF_HUB_OFFLINE": str(int(network == "offline")), "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    if network == "firewall":
        environment["HTTPS_PROXY"] = firewall
    else:
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no server listens here
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("'gpt2' is not a directory, and as a hub id it could not be fetched ("), run.stderr
    assert len(run.stdout.strip().splitlines()) == 1
    assert time.monotonic() - began < 30


def test_pytorch_model_bin_is_downloaded_only_where_the_hub_has_no_safetensors(saved, monkeypatch):
    directory, theirs = saved
    wanted = []

    def snapshot_download(name, allow_patterns):
        wanted.append((name, "pytorch_model.bin" in allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_weights(GPT.from_pretrained("openai-community/gpt2"), theirs)
    assert wanted == [("openai-community/gpt2", False)]
    torch.save(theirs.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert_same_weights(GPT.from_pretrained("gpt2"), theirs)
    assert wanted[1:] == [("gpt2", False), ("gpt2", True)]


# ---- memory

# VmHWM counts from the start of the program. ru_maxrss would include the memory of the process that started it.
PEAK = """
import re, sys, torch, safetensors, model
import torch._dynamo
directory, dtype = sys.argv[1:]
model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=2, vocab_size=2, block_size=2))
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
gpt = model.GPT.from_pretrained(directory, dtype=getattr(torch, dtype))
print((peak() - before) / sum(p.numel() * p.element_size() for p in gpt.parameters()))
"""


def loading_peak(directory, dtype="float32"):
    """Return the memory that loading adds to a process's peak, divided by the size of the loaded weights."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(directory), dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


SMALL_VOCAB = GPTConfig(vocab_size=4000, n_layer=6)
GPT2, MEDIUM = GPTConfig.preset("gpt2"), GPTConfig.preset("gpt2-medium")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize(
    ("config", "files", "dtype"),
    [
        pytest.param(SMALL_VOCAB, "safetensors", "float32", id="small"),
        *(
            pytest.param(GPT2, files, "float32", id=f"gpt2 {files}", marks=pytest.mark.slow)
            for files in ("safetensors", "shards", "head", "bin")
        ),
        pytest.param(GPT2, "safetensors", "bfloat16", id="gpt2 bfloat16", marks=pytest.mark.slow),
        pytest.param(MEDIUM, "safetensors", "float32", id="gpt2-medium", marks=pytest.mark.slow),
    ],
)
def test_loading_needs_at_most_1_3_times_the_memory_of_the_weights(tmp_path, config, files, dtype):
    max_shard_size = "200MB" if files == "shards" else "50GB"
    GPT(config).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    if files == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    if files == "head":
        edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    ratio = loading_peak(tmp_path, dtype)
    print(f"peak of loading: {ratio:.2f} x the weights")
    assert 0.9 < ratio <= 1.3  # a value below 0.9 would show an error in the measurement


def test_tensors_are_read_one_at_a_time_from_large_to_small(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    sizes = [tensor.numel() for _, tensor in read_tensors(tmp_path)]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == ours.num_parameters()


def test_the_only_unpickling_is_restricted_to_weights():
    source = Path(weights.__file__).read_text()
    assert source.count("torch.load") == source.count("weights_only=True") == 1
    assert "import pickle" not in source
