"""Programs that run a checkpoint of this repository give the same numbers. `pytest -s` prints the differences."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from data.tokenizer import load_tokenizer
from generation import generate
from model import GPT
from tests.clients.conftest import DOCUMENT, KINDS, PROMPT

pytestmark = pytest.mark.slow
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
NEW_TOKENS = 30


def load(directory):
    return GPT.from_pretrained(directory), load_tokenizer(directory)


def greedy(model, ids):
    """Return the tokens that follow `ids`."""
    return generate(model, [ids], max_new_tokens=NEW_TOKENS)[0, len(ids) :].tolist()


def until_eot(ids, tokenizer):
    return ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_logits_and_text(checkpoint, largest_difference, kind):
    model, tokenizer = load(checkpoint(kind))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint(kind)).eval()
    ids = tokenizer.encode(PROMPT)
    assert AutoTokenizer.from_pretrained(checkpoint(kind))(PROMPT)["input_ids"] == ids
    largest_difference(model(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits)
    generated = pipeline("text-generation", model=str(checkpoint(kind)))(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False
    )
    assert generated[0]["generated_text"] == tokenizer.decode(until_eot(greedy(model, ids), tokenizer))


def test_ctranslate2_gives_the_same_logits_and_tokens(checkpoint, tmp_path, largest_difference):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    for kind in KINDS:
        model, tokenizer = load(checkpoint(kind))
        ids = tokenizer.encode(PROMPT)
        converter = ctranslate2.converters.TransformersConverter(str(checkpoint(kind)))
        generator = ctranslate2.Generator(converter.convert(str(tmp_path / kind)), compute_type="float32")
        output = generator.forward_batch([ids])
        largest_difference(model(torch.tensor([ids])).logits[0], torch.from_numpy(np.array(output))[0])
        names = AutoTokenizer.from_pretrained(checkpoint(kind)).convert_ids_to_tokens(ids)
        (result,) = generator.generate_batch([names], max_length=NEW_TOKENS, include_prompt_in_result=False)
        assert result.sequences_ids[0] == until_eot(greedy(model, ids), tokenizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_runtime_gives_the_same_logits_at_any_length(checkpoint, tmp_path, largest_difference):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    model, _ = load(checkpoint("bpe:400"))

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    path = tmp_path / "model.onnx"
    length = torch.export.Dim("length", min=2, max=64)
    example = torch.zeros(1, 8, dtype=torch.long)
    torch.onnx.export(Logits(), (example,), path, input_names=["ids"], dynamic_shapes=({1: length},), dynamo=True)
    session = onnxruntime.InferenceSession(path)
    for n in (2, 9, 33, 64):
        ids = torch.randint(model.config.vocab_size, (1, n))
        (theirs,) = session.run(None, {"ids": ids.numpy()})
        largest_difference(model(ids).logits, torch.from_numpy(theirs))


def test_lm_evaluation_harness_gives_the_same_log_probabilities(checkpoint, largest_difference):
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # A space at the end of a context would be counted as a part of the continuation.
    texts = [(PROMPT, " is 3 leagues away"), ("DUKE:", "\nThe court"), ("no ox shall", " stay me on the way.")]
    for kind in KINDS:
        model, tokenizer = load(checkpoint(kind))
        ours = []
        for context, continuation in texts:
            given, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            ours.append(sum(log_probs[i - 1, ids[i]] for i in range(len(given), len(ids))))
        lm = HFLM(pretrained=str(checkpoint(kind)), device="cpu", dtype="float32")
        requests = [Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(texts)]
        theirs = [log_prob for log_prob, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        largest_difference(torch.stack(ours), torch.tensor(theirs))


@pytest.mark.skipif(not LLAMA_CPP, reason="set LLAMA_CPP to the sources of llama.cpp, which have convert_hf_to_gguf.py")
@pytest.mark.parametrize("kind", ["gpt2", "bpe:400"])
def test_llama_cpp_gives_the_same_tokens_and_logits(checkpoint, tmp_path, largest_difference, kind):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    model, tokenizer = load(checkpoint(kind))
    path = tmp_path / "model.gguf"
    documented = re.search(r"python -c '\n(.*?)' runs/mine", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    program = [Path(LLAMA_CPP) / "convert_hf_to_gguf.py"] if kind == "gpt2" else ["-c", textwrap.dedent(documented)]
    command = [sys.executable, *program, checkpoint(kind), "--outfile", path, "--outtype", "f32"]
    environment = os.environ | {"PYTHONPATH": f"{LLAMA_CPP}:{LLAMA_CPP}/gguf-py"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1, n_threads_batch=1
    )
    for text in (PROMPT, "DUKE:\nThe court  of 33 France's \n\n naïve 日本 \t end"):
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    ids = tokenizer.encode(PROMPT)
    theirs.eval(ids)
    # llama.cpp computes GELU with a table of float16 values.
    logits = torch.from_numpy(theirs.scores[: len(ids)].copy())
    largest_difference(model(torch.tensor([ids])).logits[0], logits, limit=1e-2)
    for token in greedy(model, ids):
        assert int(theirs.scores[theirs.n_tokens - 1].argmax()) == token
        theirs.eval([token])
