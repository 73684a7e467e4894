"""Generation in one thread: requests wait in one queue and are answered one after the other."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from generation import generate_text, stream
from generation.forward import ends_with_stop_string
from generation.options import GenerationOptions
from generation.prompts import encode_prompt, prepare_prompts
from model import GPT
from serve.completions import CompletionRequest, Part, RequestError, TokenInfo

MAX_WAITING = 128  # requests in the queue; further requests are refused


class Canceled(Exception):
    """Raised in the engine's thread to end a request, because its client has disconnected or the server stops."""


class Job:
    """A request and the queue of its events: parts of completions, then an error if one occurs, and None at the end."""

    def __init__(self, request: CompletionRequest) -> None:
        self.request = request
        self.events: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        self.prompt_tokens = 0  # total number of tokens of the prompts; 0 until the engine begins to answer
        self.canceled = False
        self._loop = asyncio.get_running_loop()

    def send(self, event: Part | Exception | None) -> None:
        """Add an event. Any thread may call this method."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine:
    """Generates completions, one request after the other, in a thread of its own."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._current: Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="completions", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel all requests, and wait until the thread has ended."""
        with self._changed:
            self._stopping = True
            for job in (*self._queue, *filter(None, [self._current])):
                job.canceled = True
                job.send(None)
            self._changed.notify()
        self._thread.join()

    def submit(self, request: CompletionRequest) -> Job:
        """Add a request to the queue. Raises RequestError with status 429 if the queue is full."""
        with self._changed:
            if len(self._queue) >= MAX_WAITING:
                raise RequestError(f"{MAX_WAITING} requests are waiting already: try again later", 429)
            job = Job(request)
            self._queue.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Remove a request from the queue, or end its generation after the current token."""
        with self._changed:
            job.canceled = True
            if job in self._queue:
                self._queue.remove(job)
        job.send(None)

    @property
    def n_active(self) -> int:
        """The number of requests that wait or are being answered."""
        with self._changed:
            return len(self._queue) + (self._current is not None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                job = self._current = self._queue.popleft()
            try:
                for part in self._complete(job):
                    job.send(part)
            except Canceled:
                pass
            except ValueError as error:  # the request is impossible for this model
                job.send(RequestError(str(error)))
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                job.send(error)
            job.send(None)

    def _complete(self, job: Job) -> Iterator[Part]:
        """Yield the parts of all completions of a request."""
        request = job.request
        prompts = [encode_prompt(self.tokenizer, prompt) for prompt in request.prompts]
        job.prompt_tokens = sum(map(len, prompts))
        # Check all prompts before the first part is sent: a response that has begun can no longer have an error status.
        for prompt in prompts:
            check_prompt(self.model, self.tokenizer, prompt, request)
        seed = random.SystemRandom().randrange(2**32) if request.seed is None else request.seed
        for i, prompt in enumerate(prompts):
            echo = self.tokenizer.decode([t for t in prompt if t != self.tokenizer.eot]) if request.echo else ""
            if request.num_beams > 1:
                parts = self._search(job, prompt, i * request.n)
                yield from (part._replace(text=echo + part.text) for part in parts)
                continue
            for index in range(i * request.n, (i + 1) * request.n):
                if echo:
                    yield Part(index, echo, [], 0, None)
                yield from self._sample(job, prompt, index, seed + index)

    def _sample(self, job: Job, prompt: list[int], index: int, seed: int) -> Iterator[Part]:
        """Yield a completion token by token. Hold back text that may be the beginning of a stop string."""
        request = job.request
        options: dict[str, Any] = {"sliding": request.sliding, "eos_token_id": self.tokenizer.eot}
        if request.temperature > 0:  # 0 means greedy decoding, as in OpenAI's protocol
            generator = torch.Generator(self.model.transformer.wte.weight.device).manual_seed(seed)
            options |= {"do_sample": True, "temperature": request.temperature, "generator": generator}
            options |= {"top_k": request.top_k or None, "top_p": request.top_p}
        text, shown = "", 0
        held: list[TokenInfo] = []
        tokens = stream(self.model, self.tokenizer, prompt, max_new_tokens=request.max_tokens, **options)
        for count, streamed in enumerate(tokens, 1):
            if job.canceled:
                raise Canceled
            text += streamed.text
            ended = streamed.token == self.tokenizer.eot
            if not ended and request.logprobs is not None:
                held.append(self._describe(streamed.token, streamed.logits, request.logprobs))
            stop = find_stop(text, request.stop)
            if stop is not None:
                yield Part(index, text[shown:stop], held, 1, "stop")
                return
            last = ended or count == request.max_tokens
            until = len(text) if last else len(text) - stop_overlap(text, request.stop)
            yield Part(index, text[shown:until], held, 1, ("stop" if ended else "length") if last else None)
            shown, held = until, []

    def _search(self, job: Job, prompt: list[int], first: int) -> Iterator[Part]:
        """Yield the results of beam search for a prompt, each as one part, after the search has ended."""
        request = job.request

        def check(ids: Tensor, scores: Tensor) -> Tensor:
            if job.canceled:
                raise Canceled
            return scores

        results = generate_text(
            self.model,
            self.tokenizer,
            [prompt],  # type: ignore[list-item]  # encoded already
            max_new_tokens=request.max_tokens,
            num_beams=request.num_beams,
            num_return_sequences=request.n,
            stop_strings=list(request.stop) or None,
            stop_in_prompt=False,
            sliding=request.sliding,
            logits_processor=check,
        )
        for index, result in enumerate(results, first):
            tokens = [TokenInfo(self._label(t), p, []) for t, p in zip(result.tokens, result.logprobs, strict=True)]
            text = result.text[: find_stop(result.text, request.stop)]
            at_stop = bool(request.stop) and ends_with_stop_string(result.tokens, request.stop, self.tokenizer)
            # An end-of-text token that ended the result is counted, although `tokens` does not contain it.
            at_eot = result.finish_reason == "stop" and not at_stop
            yield Part(index, text, tokens, len(tokens) + at_eot, result.finish_reason)

    def _describe(self, token: int, logits: Tensor, count: int) -> TokenInfo:
        """Return a token with its log-probability and the `count` most probable tokens. logits is (V,)."""
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        alternatives = [(self._label(t), p) for t, p in zip(ids.tolist(), values.tolist(), strict=True)]
        return TokenInfo(self._label(token), float(logprobs[token]), alternatives)

    def _label(self, token: int) -> str:
        """Return the text of a token. If its bytes are not whole characters, return "bytes:\\xf0", as OpenAI does."""
        text = self.tokenizer.decode_bytes([token])
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def check_prompt(model: GPT, tokenizer: Tokenizer, prompt: list[int], request: CompletionRequest) -> None:
    """Raise ValueError if a prompt has ids outside the vocabulary, or is too long together with the new tokens."""
    options = GenerationOptions(max_new_tokens=request.max_tokens, sliding=request.sliding, tokenizer=tokenizer)
    vocab_size = options.n_choices(model.config.vocab_size)
    # Checked here too, because `prepare_prompts` cannot put an id of more than 64 bits into a tensor.
    if outside := [token for token in prompt if not 0 <= token < vocab_size]:
        raise ValueError(f"prompt contains the token id {outside[0]}, outside 0..{vocab_size - 1}")
    prepare_prompts(model, [prompt], None, options)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the first index in `text` at which a stop string begins, or None if `text` contains no stop string."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def stop_overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of a stop string, or 0."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
