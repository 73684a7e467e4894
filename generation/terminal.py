"""The work of sample.py after its arguments are checked: read prompts, load the model, generate and print."""

from __future__ import annotations

import argparse
import json
import os
import random
import stat
import sys
import unicodedata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.tokenizer import Tokenizer
from device import find_device, find_dtype
from generation.decode import generate
from generation.options import GenerateOutput, GenerationOptions
from generation.packed import pack_weights
from generation.prompts import encode_prompt, prepare_prompts
from generation.text import Completion, generate_text, stream
from model import GPT
from pretrained import load_model

SEPARATOR = "-" * 15  # printed after each sample if there are several


def run(args: argparse.Namespace) -> None:
    """Generate and print what the arguments of sample.py request."""
    prompts = find_prompts(args)
    samples = len(prompts) * args.num_samples
    rows = 1 if args.stream else min(args.batch_size, samples) * args.num_beams
    model, tokenizer, *_ = load(args, rows)
    seed = first_seed(args)
    options = decoding_options(args, model, tokenizer, prompts)
    several = samples > 1
    if args.show_probs:
        for prompt in prompts:
            print_probabilities(model, tokenizer, prompt, args.show_probs)
    if args.stream:
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(args.num_samples)):
            print(printable(prompt), end="")
            print_stream(model, tokenizer, prompt, seed + number, options)
            if several:
                print(SEPARATOR)
        return
    for completion in complete(args, model, tokenizer, prompts, seed, options):
        if args.json:
            print(json.dumps(completion._asdict()))
        else:
            print(printable(completion.prompt + completion.text))
            if several:
                print(SEPARATOR)


def load(args: argparse.Namespace, rows: int = 1) -> tuple[GPT, Tokenizer, str, str]:
    """Load the model that the arguments select, and prepare it to decode `rows` rows at a time.

    Decoding another number of rows works too, but may be slower.

    Returns the model, its tokenizer, the directory or hub name that it was loaded from, and a description of its size.
    """
    device = find_device(args.device, "--device")
    dtype = find_dtype(args.dtype, device, decoding=True)
    model, tokenizer, name = load_model(args.model, checkpoint=args.checkpoint, dtype=dtype, device=device)
    # The parameters are counted before pack_weights, because packed weights are not parameters.
    size = f"{model.num_parameters():,} parameters, sees up to {model.config.block_size:,} tokens"
    pack_weights(model, rows)
    return model, tokenizer, name, size


def first_seed(args: argparse.Namespace) -> int:
    """Return --seed or, if it is not given, a random seed."""
    return random.SystemRandom().randrange(2**32) if args.seed is None else args.seed


def find_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of --prompt or --file, or else the text that is piped or redirected to standard input.

    Without any of these, return a single empty prompt.
    """
    if args.file:
        return read_prompts(args.file)
    if args.prompt is not None:
        return [args.prompt]
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # stdin is closed, or a test or another program replaced it
        return [""]
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):  # stdin is a terminal or /dev/null
        return [""]
    return [sys.stdin.read().removesuffix("\n")]


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file: its lines that are not blank or, in a .jsonl file, the "prompt" of each object.

    Raises ValueError if the file is not UTF-8 text, has an invalid line, or has no prompt.
    """
    try:
        # str.splitlines() would also split at characters that a prompt may contain, such as U+2028 and form feeds.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
                line.encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected an object with a text "prompt" ({error!r})'
                ) from None
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} contains no prompt")
    return prompts


def decoding_options(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, prompts: list[str]) -> dict[str, Any]:
    """Return the keyword arguments of `generate` that the command line selects.

    Raises ValueError if the model cannot continue the longest prompt with these arguments.
    """
    longest = max((encode_prompt(tokenizer, prompt) for prompt in prompts), key=len)
    room = max(1, model.config.block_size + 1 - len(longest))  # + 1: the last new token is never an input
    fitting = args.default_new_tokens if args.sliding else min(args.default_new_tokens, room)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens or fitting, "sliding": args.sliding}
    options |= {"eos_token_id": tokenizer.eot, "stop_strings": args.stop or None}
    if args.sampling:
        options["do_sample"] = True
        options["temperature"] = 0.8 if args.temperature is None else args.temperature
        options["top_k"] = args.top_k
        options["top_p"] = 0.95 if args.top_p is None else args.top_p
    elif args.num_beams > 1:
        options |= {"num_beams": args.num_beams, "num_return_sequences": args.num_samples}
    # An impossible request fails here, before anything is printed.
    prepare_prompts(model, [longest], None, GenerationOptions(tokenizer=tokenizer, **options))
    return options


def printable(text: str) -> str:
    """Return text for the standard output. On a terminal, replace control characters by escapes, such as \\x1b.

    In text from a model or a file, they could move the cursor, or change the terminal's title and colors. Line breaks
    and tabs are kept.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def print_probabilities(model: GPT, tokenizer: Tokenizer, prompt: str, count: int) -> None:
    """Print a table of the `count` most probable next tokens. Raises ValueError if the vocabulary has fewer tokens."""
    if count > model.config.vocab_size:
        raise ValueError(f"--show-probs {count} is more than the vocabulary of {model.config.vocab_size}")
    ids = [encode_prompt(tokenizer, prompt)]
    output = generate(model, ids, max_new_tokens=1, return_dict=True, output_logits=True)
    assert isinstance(output, GenerateOutput)
    assert output.logits is not None
    probabilities, tokens = output.logits[0][0].softmax(dim=-1).topk(count)
    print(f"{'probability':>11}  {'id':>5}  token")
    for probability, token in zip(probabilities.tolist(), tokens.tolist(), strict=True):
        print(f"{probability:11.4f}  {token:5}  {tokenizer.decode([token])!r}")


def print_stream(model: GPT, tokenizer: Tokenizer, prompt: str, seed: int, options: dict[str, Any]) -> str:
    """Continue a prompt once, print the continuation token by token while it is generated, and return it."""
    generator = torch.Generator(model.transformer.wte.weight.device).manual_seed(seed)
    text = ""
    for streamed in stream(model, tokenizer, prompt, generator=generator, **options):
        text += streamed.text
        print(printable(streamed.text), end="", flush=True)
    print()
    return text


def complete(
    args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, prompts: list[str], seed: int, options: dict[str, Any]
) -> list[Completion]:
    """Return all samples of all prompts. On a terminal, show a progress bar if there are several batches."""
    if args.num_beams == 1:  # repeat a prompt for each of its samples, so that a batch has at most batch_size samples
        prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    hide = True if len(prompts) <= args.batch_size else None  # None hides the bar if stderr is not a terminal
    with tqdm(total=len(prompts), disable=hide, unit="prompt", leave=False) as bar:
        return generate_text(
            model, tokenizer, prompts, batch_size=args.batch_size, seed=seed, progress=bar.update, **options
        )
