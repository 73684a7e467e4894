"""Generate text with a GPT: greedy decoding, sampling, beam search, streaming.

`generate` has the argument names and the semantics of transformers' method of the same name, so that tests can compare
the two token by token.

    options.py      GenerationOptions and GenerateOutput: what `generate` takes and returns
    prompts.py      prompts -> a checked batch of token ids and its mask
    decode.py       generate
    sampling.py     greedy decoding and sampling, Gumbel-softmax samples
    beam_search.py  beam search and beam sampling
    forward.py      what both loops share: the forward pass with a cache, the end of a row, recorded outputs
    fixed_step.py   a step with fixed shapes, which CUDA replays as a graph
    processors.py   changes to the scores of the next token: penalties, bans, temperature, top-k, top-p
    packed.py       pack_weights: a layout of the weights that is faster to decode with
    text.py         stream and generate_text: strings instead of token ids
    terminal.py     the work of sample.py: prompts in, text out
    interactive.py  sample.py --interactive

Shapes in this package: N rows (the prompts times the sequences returned for each, or times the beams), T tokens in each
row so far, including prompt and padding, V = vocab_size, B prompts, K beams per prompt.
"""

from generation.decode import generate
from generation.options import GenerateOutput, GenerationOptions
from generation.packed import pack_weights
from generation.sampling import gumbel_softmax
from generation.text import Completion, StreamedToken, generate_text, stream

__all__ = [
    "Completion",
    "GenerateOutput",
    "GenerationOptions",
    "StreamedToken",
    "generate",
    "generate_text",
    "gumbel_softmax",
    "pack_weights",
    "stream",
]
