"""Part 2 of the GPU check: logits must equal those of transformers, gradients and tokens must equal those of a CPU."""

from __future__ import annotations

import tempfile
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from device import DTYPES
from generation import generate
from model import GPT, GPTConfig
from scripts.gpu_check.report import Report, Settings, relative_difference
from training.distributed import distribute

# Precision -> largest allowed relative difference of the gradient from that of a CPU in float32.
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
# Precision -> factor of the loss before backward. float16 cannot represent small gradients, so its factor is large.
SCALE = {"float32": 1, "bfloat16": 1, "float16": 2**12}
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14], [3], [100, 50, 25, 12, 6], [2, 4]]


def check_parity(settings: Settings, report: Report) -> None:
    """Compare logits with transformers, and gradients and greedy tokens with a CPU."""
    torch.set_float32_matmul_precision("highest")  # no TF32, which rounds the inputs of products to 10 mantissa bits
    theirs, ours = make_twins(settings.shape, 0.02, settings.device)
    ids = torch.randint(settings.shape.vocab_size, (2, settings.tokens), device=settings.device)
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max()
    report.at_most("float32 logits equal transformers', absolute", float(difference), 1e-5)
    check_gradients(settings, report)
    # With large weights, the best logit is far above the second best, so rounding does not change the tokens.
    check_tokens(make_twins(settings.shape, 0.1, settings.device)[1], settings, report)


def make_twins(shape: GPTConfig, spread: float, device: str) -> tuple[Any, GPT]:
    """Return a GPT-2 of transformers and a GPT of this repository with the same random weights.

    `spread` is the standard deviation of the weights.
    """
    disable_progress_bar()  # otherwise `save_pretrained` would show a progress bar
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs: Any = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = GPT.from_pretrained(directory, device=device)
    return theirs.to(device), ours


def gradients(settings: Settings, device: str, dtype: str, *, compiled: bool) -> list[Tensor]:
    """Return the gradient of each parameter for the loss of one training step on `device`."""
    torch.manual_seed(1)
    model = GPT(settings.shape).train()
    ids = torch.randint(settings.shape.vocab_size, (2, settings.tokens + 1)).to(device)
    here = Settings(device="cuda" if device == "cuda" else "cpu", tiny=settings.tiny)
    processes = here.processes(DTYPES[dtype])
    loss_function = distribute(
        model.to(device), processes, compiled=compiled, sharded=False, sequence_length=settings.tokens
    )
    with processes.autocast():
        loss = loss_function(ids[:, :-1], ids[:, 1:])
    (loss * SCALE[dtype]).backward()
    return [parameter.grad / SCALE[dtype] for parameter in model.parameters() if parameter.grad is not None]


def check_gradients(settings: Settings, report: Report) -> None:
    """Compare the gradient in each precision, compiled and not, with that of a CPU in float32."""
    report.say("computing the gradient on the CPU in float32")
    expected = gradients(settings, "cpu", "float32", compiled=False)
    for dtype, compiled in product(DTYPES, (False, True) if settings.compiles else (False,)):
        found = gradients(settings, settings.device, dtype, compiled=compiled)
        name = f"the gradient in {dtype}, {'compiled' if compiled else 'not compiled'}, equals the CPU's, relative"
        report.at_most(name, relative_difference(found, expected), GRADIENT_LIMIT[dtype])


@torch.no_grad()
def check_tokens(model: GPT, settings: Settings, report: Report) -> None:
    """Check that greedy decoding gives the same tokens on this device and on a CPU, with and without a cache.

    A prompt in a padded batch must also get the same tokens as alone. At the end, the model is on the CPU.
    """
    new = 24 if settings.tiny else 64
    together = generate(model, PROMPTS, max_new_tokens=new)
    assert isinstance(together, Tensor)
    alone: list[Any] = [generate(model, [prompt], max_new_tokens=new) for prompt in PROMPTS]
    same = [torch.equal(row[-new:], one[0, -new:]) for row, one in zip(together, alone, strict=True)]
    report.check("a prompt in a padded batch gets the tokens that it gets alone", all(same), same)
    ids = torch.tensor([PROMPTS[0]], device=settings.device)
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    report.check("the tokens with a cache equal those without one", torch.equal(ids, alone[0]), f"{new} tokens")
    on_cpu = generate(model.cpu(), PROMPTS, max_new_tokens=new)
    assert isinstance(on_cpu, Tensor)
    report.check(
        "greedy tokens equal those of the CPU", torch.equal(together.cpu(), on_cpu), f"{on_cpu.numel()} tokens"
    )
