"""OpenAI's protocol for completions: parse a request, and format the parts of a response.

https://platform.openai.com/docs/api-reference/completions describes the protocol. The fields `top_k`, `num_beams` and
`sliding` are additions of this server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

MAX_TOKENS = 4096  # new tokens of one completion
MAX_CHOICES = 16  # completions of one request: the number of prompts times n
MAX_STOPS = 8  # stop strings of one request
MAX_STOP_LENGTH = 200  # characters of one stop string
MAX_LOGPROBS = 20  # alternatives that are returned for each token
MAX_BEAMS = 16
# Unsupported fields, with the values at which they have no effect. A request with another value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
IGNORED = {"user"}  # fields without effect: with `user`, a client names the person for whom it sends the request
SAMPLING = ("temperature", "top_p", "top_k", "seed")  # a request for beam search must not have these fields


class RequestError(ValueError):
    """Raised for a request that the server refuses. `status` is the HTTP status of the error response."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request. Its fields are those of OpenAI's protocol and the additions that the module docstring names."""

    prompts: list[str | list[int]]
    model: Any = None  # name of the model, which the application checks; None: the server's only model
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    num_beams: int = 1
    n: int = 1
    seed: int | None = None  # None: random
    logprobs: int | None = None  # number of alternatives for each token; None: return no log-probabilities
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False  # whether a stream ends with the numbers of tokens
    echo: bool = False  # whether the text of a completion begins with the prompt
    sliding: bool = False  # allow more tokens than block_size; the model sees only the last block_size tokens


class TokenInfo(NamedTuple):
    """A new token, its log-probability, and the most probable tokens at its position."""

    text: str
    logprob: float
    alternatives: list[tuple[str, float]]  # (text, log-probability) of the most probable tokens


class Part(NamedTuple):
    """A whole completion, or a part of a completion that is generated in several parts."""

    number: int  # index of this completion among all completions of the request
    text: str
    tokens: list[TokenInfo]  # without end-of-text; may be empty if the request asks for no log-probabilities
    n_tokens: int  # number of new tokens, including end-of-text if it ended the completion
    finish_reason: Literal["stop", "length"] | None  # None if another part of the completion follows


def parse_request(body: bytes) -> CompletionRequest:
    """Parse the body of an HTTP request. If it is invalid, raise RequestError, whose message says what to change."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"the body is a JSON {type(fields).__name__}, expected an object with a prompt")
    best_of = (None, 1, fields.get("n"))  # with these values, best_of discards no completion
    for name, neutral in (NEUTRAL | {"best_of": best_of}).items():
        if fields.pop(name, None) not in neutral:
            raise RequestError(f"{name} is not supported: omit it")
    read = _Reader({name: value for name, value in fields.items() if value is not None and name not in IGNORED})
    sampling = [name for name in SAMPLING if name in read.fields]
    options = read.pop("stream_options", dict, {})
    request = CompletionRequest(
        prompts=_prompts(read.fields.pop("prompt", "")),
        model=read.fields.pop("model", None),
        max_tokens=read.number("max_tokens", int, 16, 1, MAX_TOKENS),
        temperature=read.number("temperature", float, 1.0, 0, 100),
        top_p=read.number("top_p", float, 1.0, 1e-9, 1),
        top_k=read.number("top_k", int, 0, 0, 1_000_000),
        num_beams=read.number("num_beams", int, 1, 1, MAX_BEAMS),
        n=read.number("n", int, 1, 1, MAX_CHOICES),
        seed=read.number("seed", int, None, 0, 2**62),
        logprobs=read.number("logprobs", int, None, 0, MAX_LOGPROBS),
        stop=_stops(read.fields.pop("stop", [])),
        stream=read.pop("stream", bool, False),
        include_usage=options.get("include_usage") is True,
        echo=read.pop("echo", bool, False),
        sliding=read.pop("sliding", bool, False),
    )
    if read.fields:
        raise RequestError(f"unknown field {', '.join(sorted(read.fields))}: omit it, or correct its name")
    if request.num_beams > 1 and sampling:
        raise RequestError(f"{', '.join(sampling)} affect only sampling, not beam search: omit them, or num_beams")
    _check(request)
    return request


def _check(request: CompletionRequest) -> None:
    """Raise RequestError if the values of two fields cannot be combined."""
    if len(request.prompts) * request.n > MAX_CHOICES:
        raise RequestError(
            f"{len(request.prompts)} prompts times n {request.n} is more than {MAX_CHOICES}: send several requests"
        )
    if request.echo and request.logprobs is not None:
        raise RequestError("echo with logprobs is not supported: omit one of them")
    if request.num_beams > 1 and request.n > request.num_beams:
        raise RequestError(f"n {request.n} is more than num_beams {request.num_beams}: raise num_beams or lower n")


class _Reader:
    """Takes values from a request and checks their types. Fields that are left in `fields` at the end are unknown."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def pop(self, name: str, kind: type, default: Any) -> Any:
        """Return the field `name`, or `default` if it is missing. Raises RequestError if it is not of type `kind`."""
        value = self.fields.pop(name, default)
        if not isinstance(value, kind):
            raise RequestError(f"{name} is {_shown(value)}, expected {_KINDS[kind]}")
        return value

    def number(self, name: str, kind: type, default: Any, low: float, high: float) -> Any:
        """Return the number in the field `name`, or `default` if the field is missing.

        Raises RequestError if the value is not a number of the type `kind`, or is outside [low, high].
        """
        if name not in self.fields:
            return default
        value = self.fields.pop(name)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not whole):
            raise RequestError(f"{name} is {_shown(value)}, expected {_KINDS[kind]}")
        if not low <= value <= high:  # this condition is also true for NaN
            raise RequestError(f"{name} is {_shown(value)}, expected {_KINDS[kind]} from {low:g} to {high:g}")
        return kind(value)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def _shown(value: Any) -> str:
    """Return the JSON text of a value for an error message, cut to 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Return the prompts in the field "prompt", which is a text, token ids, or a list of texts or of lists of ids.

    Raises RequestError if the field has another value, or a text that is not valid Unicode.
    """

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or is_ids(p) for p in prompts):
        raise RequestError(
            f"prompt is {_shown(prompt)}, expected a text, token ids, or a list of texts or of token ids"
        )
    _check_characters("prompt", [text for text in prompts if isinstance(text, str)])
    return prompts


def _stops(stop: Any) -> tuple[str, ...]:
    """Return the stop strings in the field "stop", which is a text or a list of at most MAX_STOPS texts.

    Raises RequestError if the field has another value, or a text that is empty, too long or not valid Unicode.
    """
    stops = [stop] if isinstance(stop, str) else stop
    valid = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops)
    if not valid or len(stops) > MAX_STOPS:
        raise RequestError(
            f"stop is {_shown(stop)}, expected a text or a list of at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} "
            f"characters"
        )
    _check_characters("stop", stops)
    return tuple(stops)


def _check_characters(name: str, texts: Sequence[str]) -> None:
    """Raise RequestError if a text in the field `name` is not valid Unicode, and therefore cannot be encoded."""
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise RequestError(f"{name} contains a lone surrogate, which is not a character: remove it")


def choice(part: Part, *, with_logprobs: bool, offset: int = 0) -> dict[str, Any]:
    """Return a part as an entry of "choices", a field of the response.

    `offset` is the total length, in characters, of the tokens in the earlier parts of the same completion.
    """
    logprobs = None
    if with_logprobs:
        offsets = [offset]
        for token in part.tokens:
            offsets.append(offsets[-1] + len(token.text))
        logprobs = {
            "tokens": [token.text for token in part.tokens],
            "token_logprobs": [token.logprob for token in part.tokens],
            "top_logprobs": [dict(token.alternatives) for token in part.tokens],
            "text_offset": offsets[:-1],
        }
    return {"text": part.text, "index": part.number, "logprobs": logprobs, "finish_reason": part.finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens in the format of the field "usage"."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def join(parts: Sequence[Part]) -> list[Part]:
    """Join the parts of each completion. Returns one part for each completion, in the order of the completions."""
    joined: dict[int, list[Part]] = {}
    for part in parts:
        joined.setdefault(part.number, []).append(part)
    return [
        Part(
            index,
            "".join(part.text for part in own),
            [token for part in own for token in part.tokens],
            sum(part.n_tokens for part in own),
            own[-1].finish_reason,
        )
        for index, own in sorted(joined.items())
    ]
