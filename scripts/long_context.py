"""Train a small model on a task that needs tokens from far back: `python -m scripts.long_context full window lsh`.

The first half of a sequence is a table: each token is a pair of a place (a key, not the token's position) and the
symbol of this place. Each place occurs 16 times, in random order. Each token of the second half is only a place, and
the model has to copy the symbol of this place from the table. Each sequence has new random symbols.
docs/long-context.md has the results.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.long_context")

import math
import time

import torch
from torch import Tensor

from command import CommandParser, at_least_one, ending
from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig
from training.config import Optim
from training.optim import make_optimizers

COPIES = 16  # tokens of the table that hold the same place
# The number of symbols, and how many of them one sequence uses. Because a sequence uses only a few, the model can first
# learn an easier task: to read from the table which symbols occur in it. Then it learns where in the table to look.
SYMBOLS, USED = 16, 4


def make_sequence(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places, the symbols and the targets of a new sequence, (length,) each.

    Ids 0 to SYMBOLS - 1 are symbols, and the ids of places begin at SYMBOLS + 1. In the second half (the questions),
    the id SYMBOLS hides each symbol, and the target is the hidden symbol. In the first half (the table), all targets
    are IGNORE_INDEX.
    """
    n_places = length // 2 // COPIES
    used = torch.randperm(SYMBOLS, generator=generator)[:USED]
    symbol_at = used[torch.randint(USED, (n_places,), generator=generator)]
    order = [torch.randperm(length // 2, generator=generator) % n_places for _ in range(2)]
    table, questions = (symbol_at[places] for places in order)
    symbols = torch.cat([table, torch.full_like(questions, SYMBOLS)])
    return SYMBOLS + 1 + torch.cat(order), symbols, torch.cat([torch.full_like(table, IGNORE_INDEX), questions])


def answer(model: GPT, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the mean loss of the answers in a new sequence, in nats, and the fraction of right answers, as scalars."""
    places, symbols, targets = make_sequence(model.config.block_size, generator)
    embed = model.transformer.wte
    output = model(inputs_embeds=(embed(places) + embed(symbols))[None], targets=targets[None], return_logits=True)
    assert output.logits is not None
    assert output.loss is not None
    right = output.logits[0].argmax(dim=-1) == targets
    return output.loss, right[targets != IGNORE_INDEX].float().mean()


def share_keys(model: GPT) -> None:
    """Make the keys of a model with one layer equal to its queries, as in the Reformer.

    They stay equal in training, because a hook gives both of them the sum of their gradients.
    """

    def sum_gradients(gradient: Tensor) -> Tensor:
        query, key, value = gradient.chunk(3)
        return torch.cat([query + key, query + key, value])

    for name in ("weight", "bias"):
        parameter = model.get_parameter(f"transformer.h.0.attn.c_attn.{name}")
        query, key, _ = parameter.detach().chunk(3)
        key.copy_(query)
        parameter.register_hook(sum_gradients)


def make_model(attention: str, length: int, buckets: int, rounds: int, shared: bool) -> GPT:
    """Return a model with one layer of one head. Only this layer and the final LayerNorm are trained.

    `buckets` and `rounds` are used with attention lsh only. With `shared`, the keys are equal to the queries.
    """
    vocab_size = SYMBOLS + 1 + length // 2 // COPIES
    config = GPTConfig(
        vocab_size,
        block_size=length,
        n_layer=1,
        n_head=1,
        n_embd=64,
        attention=attention,
        lsh_buckets=buckets,
        lsh_rounds=rounds,
    )
    model = GPT(config)
    # The model only has to learn where to look. So the token embeddings stay random vectors, and the position
    # embeddings are 0.
    model.freeze()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
        model.transformer.wpe.weight.zero_()
        model.get_parameter("transformer.h.0.attn.c_attn.weight").mul_(4)
    if shared:
        share_keys(model)
    return model


def train(model: GPT, steps: int) -> tuple[float, float]:
    """Train on one sequence per step. Return the mean loss and accuracy of the answers in four new sequences."""
    optimizers = make_optimizers(model, Optim(name="muon", lr=0.003, weight_decay=0.0))
    generator = torch.Generator().manual_seed(1337)
    for step in range(1, steps + 1):
        loss, right = answer(model, generator)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            print(f"  step {step:>4}  loss {loss.item():.4f}  right {right.item():.1%}", flush=True)
    model.eval()
    with torch.no_grad():
        final_loss, final_right = torch.tensor([answer(model, generator) for _ in range(4)]).mean(dim=0).tolist()
    return final_loss, final_right


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(
        prog="python -m scripts.long_context", description="Train a small model to copy symbols from far back."
    )
    parser.add_argument("attention", nargs="+", choices=("full", "window", "lsh"), help="kinds of attention")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="sequences to train on (default: %(default)s)")
    parser.add_argument("--buckets", type=int, default=64, help="hash values of lsh attention (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="hashing rounds of lsh attention (default: %(default)s)")
    parser.add_argument("--shared", action="store_true", help="make the keys equal to the queries, as in the Reformer")
    args = parser.parse_args(arguments)
    at_least_one(parser, args, "length", "steps", "rounds")
    if args.length % (2 * COPIES):
        parser.error(f"--length {args.length} must be divisible by {2 * COPIES}: {COPIES} copies of each place")
    with ending(parser):
        print(f"one of the {USED} symbols of a sequence at random: loss {math.log(USED):.4f}, right {1 / USED:.1%}")
        for attention in args.attention:
            torch.manual_seed(1337)
            model = make_model(attention, args.length, args.buckets, args.rounds, args.shared)
            began = time.process_time()
            loss, right = train(model, args.steps)
            seconds = (time.process_time() - began) / args.steps
            print(f"{attention:<8}loss {loss:.4f}  right {right:.1%}  {seconds:.2f} CPU seconds a step", flush=True)


if __name__ == "__main__":
    main()
