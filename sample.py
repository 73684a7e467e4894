"""Sample text from a GPT-2: a run of train.py, a checkpoint, a Hugging Face directory or a model on the hub.

python sample.py --prompt "To be"                             the newest run under runs/
python sample.py --model gpt2 --interactive                   a prompt a line, answered as it is generated
python sample.py --file prompts.txt --num-samples 4 --json    one object a sample
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import DEVICE_HELP, DTYPE_CHOICES, DTYPE_HELP, MODEL_HELP, at_least_one, ending

if TYPE_CHECKING:  # torch takes seconds to import: --help and a wrong argument need not wait for it
    from data.tokenizer import Tokenizer
    from generation import Completion
    from model import GPT

SEPARATOR = "-" * 15
MAX_NEW_TOKENS = 200  # unless said otherwise, and as far as they fit


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    add = parser.add_argument
    add("--model", help=f"{MODEL_HELP} (default: the newest run)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to continue (default: begin from <|endoftext|>)")
    what.add_argument("--file", type=Path, help="one prompt a line, or in *.jsonl one object with 'prompt' a line")
    what.add_argument("--interactive", action="store_true", help="ask for prompts until end of file (Ctrl-D)")
    add("--num-samples", type=int, default=1, metavar="N", help="of each prompt (default: 1)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts continued together (default: 8)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"default: {MAX_NEW_TOKENS}, or as many as fit after the longest prompt",
    )
    add("--temperature", type=float, help="below 1 likelier tokens gain, above 1 unlikely ones (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: from all)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest that reach probability P (default: 0.95)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search instead of sampling")
    add("--seed", type=int, help="same seed, same text; in float32 whatever the batch size (default: a new one)")
    add("--stream", action="store_true", help="print text as it is generated")
    add("--json", action="store_true", help="print an object a sample: prompt, text, tokens, logprobs, finish_reason")
    add("--show-probs", type=int, metavar="K", help="first print the K likeliest next tokens with their probabilities")
    add("--dtype", choices=DTYPE_CHOICES, default="auto", help=f"{DTYPE_HELP}. The weights are converted to it too")
    add("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(arguments)

    at_least_one(parser, args, "num_samples", "batch_size", "num_beams", "max_new_tokens", "show_probs")
    args.sampling = not args.greedy and args.num_beams == 1
    if not args.sampling and (args.temperature, args.top_k, args.top_p) != (None, None, None):
        parser.error("--temperature, --top-k and --top-p are for sampling: not with --greedy or --num-beams")
    if args.greedy and args.num_beams > 1:
        parser.error("--greedy and --num-beams exclude each other")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        parser.error(f"--temperature must be above 0, got {args.temperature}: --greedy takes the likeliest token")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be in 0..2^63 - 1, got {args.seed}")
    if 1 < args.num_beams < args.num_samples:
        parser.error(f"--num-beams {args.num_beams} finds as many results, fewer than --num-samples {args.num_samples}")
    if args.greedy and args.num_samples > 1:
        parser.error("--greedy has one result for a prompt: not with --num-samples")
    if (args.stream or args.interactive) and args.num_beams > 1:
        parser.error("beam search knows its text only at the end: not with --stream or --interactive")
    if args.json and (args.stream or args.interactive or args.show_probs):
        parser.error("--json is not for --stream, --interactive or --show-probs")
    return args


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: its lines that are not blank or, of a .jsonl file, their "prompt"."""
    try:
        # not splitlines(), which also cuts at characters that a prompt may hold, such as U+2028 and form feeds
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
        raise ValueError(f"{path} holds no prompt")
    return prompts


def load(args: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """The model, its weights packed for decoding, and its tokenizer."""
    from device import find_device, find_dtype
    from generation import pack_weights
    from training.checkpoint import load_model

    device = find_device(args.device, "--device")
    model, tokenizer, _ = load_model(args.model, dtype=find_dtype(args.dtype, device), device=device)
    pack_weights(model)
    return model, tokenizer


def decoding_options(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, prompts: list[str]) -> dict[str, Any]:
    """The keyword arguments of `generate` that the flags stand for, checked against the longest prompt."""
    from generation import encode_prompt, prepare, read_options

    longest = max((encode_prompt(tokenizer, prompt) for prompt in prompts), key=len)
    room = max(1, model.config.block_size - len(longest))
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens or min(MAX_NEW_TOKENS, room)}
    options["eos_token_id"] = tokenizer.eot
    if args.sampling:
        options["do_sample"] = True
        options["temperature"] = 0.8 if args.temperature is None else args.temperature
        options["top_k"] = args.top_k
        options["top_p"] = 0.95 if args.top_p is None else args.top_p
    elif args.num_beams > 1:
        options |= {"num_beams": args.num_beams, "num_return_sequences": args.num_samples}
    prepare(model, [longest], None, read_options(**options))  # refuses what is impossible before anything is printed
    return options


def print_probabilities(model: GPT, tokenizer: Tokenizer, prompt: str, count: int) -> None:
    """A table of the `count` tokens that the model thinks likeliest to come next."""
    import torch

    from generation import Reader, encode_prompt, read_options

    if count > model.config.vocab_size:
        raise ValueError(f"--show-probs {count} is more than the vocabulary of {model.config.vocab_size}")
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.transformer.wte.weight.device)
    with torch.no_grad():
        logits, _ = Reader(model, ids, None, read_options(max_new_tokens=1))(ids)
    probabilities, tokens = logits[0].softmax(dim=-1).topk(count)
    print(f"{'probability':>11}  {'id':>5}  token")
    for probability, token in zip(probabilities.tolist(), tokens.tolist(), strict=True):
        print(f"{probability:11.4f}  {token:5}  {tokenizer.decode([token])!r}")


def print_stream(model: GPT, tokenizer: Tokenizer, prompt: str, seed: int, options: dict[str, Any]) -> None:
    import torch

    from generation import stream

    generator = torch.Generator(model.transformer.wte.weight.device).manual_seed(seed)
    for piece in stream(model, tokenizer, prompt, generator=generator, **options):
        print(piece.text, end="", flush=True)
    print()


def interact(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, seed: int) -> None:
    """Answer prompts until end of file. A prompt that does not fit is explained, and the next one asked for."""
    import contextlib

    with contextlib.suppress(ImportError):  # absent on Windows; with it, input() has line editing and history
        import readline  # noqa: F401
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if not prompt.strip():
            continue
        try:
            options = decoding_options(args, model, tokenizer, [prompt])
            if args.show_probs:
                print_probabilities(model, tokenizer, prompt, args.show_probs)
            for _ in range(args.num_samples):
                print_stream(model, tokenizer, prompt, seed, options)
                seed += 1
        except ValueError as error:
            print(f"{error}", file=sys.stderr)


def complete(
    args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, prompts: list[str], seed: int, options: dict[str, Any]
) -> list[Completion]:
    """All samples of all prompts, with a progress bar on a terminal if they take more than one batch."""
    from tqdm import tqdm

    from generation import generate_text

    if args.num_beams == 1:  # samples count towards the batch size as prompts do
        prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    hide = True if len(prompts) <= args.batch_size else None  # None: where stderr is no terminal
    with tqdm(total=len(prompts), disable=hide, unit="prompt", leave=False) as bar:
        return generate_text(
            model, tokenizer, prompts, batch_size=args.batch_size, seed=seed, progress=bar.update, **options
        )


def run(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.file) if args.file else [args.prompt]
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    model, tokenizer = load(args)
    if args.interactive:
        interact(args, model, tokenizer, seed)
        return
    options = decoding_options(args, model, tokenizer, prompts)
    if args.show_probs:
        for prompt in prompts:
            print_probabilities(model, tokenizer, prompt, args.show_probs)
    if args.stream:
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(args.num_samples)):
            print(prompt, end="")
            print_stream(model, tokenizer, prompt, seed + number, options)
            print(SEPARATOR)
        return
    for completion in complete(args, model, tokenizer, prompts, seed, options):
        if args.json:
            print(json.dumps(completion._asdict()))
        else:
            print(completion.prompt + completion.text, SEPARATOR, sep="\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = parse_arguments(parser, arguments)
    with ending(parser):
        run(args)


if __name__ == "__main__":
    main()
