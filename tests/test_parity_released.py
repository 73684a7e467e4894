"""Results of the released weights, if the hub or its local cache provides them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from data.tokenizer import load_tokenizer
from generation import generate
from model import GPT, GPTConfig

pytestmark = pytest.mark.network

PARAMETERS = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
ROOT = Path(__file__).parent.parent


def released(name):
    """Load the released model, or skip the test. A separate process fetches it, because this one may be offline."""
    need = 4 * PARAMETERS[name] * 1.5
    if psutil.virtual_memory().available < need:
        pytest.skip(f"{name} needs {need / 1e9:.1f} GB of memory")
    fetch = (
        "import sys, weights\ntry: print(weights.locate(sys.argv[1]))\nexcept OSError as error: sys.exit(str(error))"
    )
    online = os.environ | {"HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", fetch, name], cwd=ROOT, env=online, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    return GPT.from_pretrained(run.stdout.strip())


@pytest.fixture(scope="module")
def gpt2():
    return released("gpt2")


# Results of the 124M model that the tests of transformers and of other implementations contain.
FLAG = [464, 1605, 6056, 338, 7577, 389, 2266, 11, 4171, 290]  # "The American flag's colors are red, blue and"
FLAG_LOGITS = {
    0: [-36.2872, -35.0111, -38.0791, -40.5161, -41.3758, -34.9191],
    8: [-0.4879, 1.0927, -3.0591, -11.6097, -8.8209, -1.0988],
    9: [-74.8958, -72.4673, -75.6806, -83.4975, -78.3614, -74.6660],
}
TODAY = [8888, 356, 460, 467, 284]  # "Today we can go to"
NEXT = {
    262: -80.64992,
    257: -81.82211,
    670: -82.49638,
    1175: -82.70538,
    597: -82.73981,
    3993: -82.82906,
    674: -83.12396,
    1194: -83.35417,
    3996: -83.40708,
    477: -83.73032,
}
WPE = """-.0188 -.1974 .0040 .0113 .0638 -.1050 .0369 -.1680 -.0491 -.0565
         -.0025 .0135 -.0042 .0151 .0166 -.1381 -.0063 -.0461 .0267 -.2042"""
DOG = """464 3290 373 1043 287 257 2214 1474 262 16246 286 2688 290 2688 27262 13 198 198 464 3290"""


def test_position_embeddings(gpt2):
    expected = torch.tensor([float(value) for value in WPE.split()])
    torch.testing.assert_close(gpt2.transformer.wpe.weight.flatten()[:20], expected, atol=6e-5, rtol=0)


@torch.no_grad()
def test_logits(gpt2):
    logits = gpt2(torch.tensor([FLAG])).logits[0]
    for row, expected in FLAG_LOGITS.items():
        torch.testing.assert_close(logits[row, [0, 1, 2, -3, -2, -1]], torch.tensor(expected), atol=2e-3, rtol=0)


@torch.no_grad()
def test_next_tokens(gpt2):
    top = gpt2(torch.tensor([TODAY])).logits[0, -1].topk(10)
    assert top.indices.tolist() == list(NEXT)
    torch.testing.assert_close(top.values, torch.tensor(list(NEXT.values())), atol=2e-3, rtol=0)


@torch.no_grad()
def test_greedy(gpt2):
    expected = [int(token) for token in DOG.split()]
    ids = torch.tensor([expected[:2]])
    while ids.size(1) < len(expected):
        ids = torch.cat([ids, gpt2(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert ids[0].tolist() == expected


def continued(gpt2, texts, prompts, **options):
    """Return the prompts continued by `generate` as one left-padded batch, up to the length of the longest text."""
    tokenizer = load_tokenizer("gpt2")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    new = max(len(tokenizer.encode(text)) - len(prompt) for text, prompt in zip(texts, ids, strict=True))
    rows = generate(gpt2, ids, max_new_tokens=new, eos_token_id=tokenizer.eot, **options).tolist()
    width = len(rows[0]) - new
    return [tokenizer.decode(row[width - len(prompt) :]) for row, prompt in zip(rows, ids, strict=True)]


def test_greedy_text(gpt2):
    text = (
        "The Manhattan bridge is a major artery for the city's subway system, and the bridge is one of the busiest in"
    )
    assert continued(gpt2, [text], ["The Manhattan bridge"]) == [text]


def test_left_padded_batch(gpt2):
    texts = [
        "Hello, my dog is a little bit of a mess. I'm not sure if he's going",
        "Today, I'm going to be doing a lot of research on this. I",
    ]
    assert continued(gpt2, texts, ["Hello, my dog is a little", "Today, I"]) == texts


def test_two_beams(gpt2):
    text = "The dog was found in the backyard of a home in the 6500 block of South Main Street"
    assert continued(gpt2, [text], ["The dog"], num_beams=2) == [text]


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in [*PARAMETERS][1:])])
@torch.no_grad()
def test_all_four_sizes(name, request):
    """Each model has its preset's shape, and its loss is far below that of a uniform guess, 10.8 nats per token."""
    model = request.getfixturevalue("gpt2") if name == "gpt2" else released(name)
    assert model.num_parameters() == PARAMETERS[name]
    preset = GPTConfig.preset(name)
    assert (model.config.n_layer, model.config.n_head, model.config.n_embd) == (
        preset.n_layer,
        preset.n_head,
        preset.n_embd,
    )
    flag = torch.tensor([FLAG])
    assert model(flag, labels=flag).loss.item() < 6.0
