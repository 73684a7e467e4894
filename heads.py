"""GPT-2 for other ends than the next token: classification, multiple choice, sentence vectors.

Each head sits on a GPT, whose trunk it shares rather than copies: `SequenceClassifier(GPT.from_pretrained("gpt2"), 3)`
starts fine-tuning from the released weights, and `classifier.gpt.freeze(layers=6)` keeps half of them. Saved
directories are those of transformers' class of the same purpose. Shapes as in model.py; K is the number of classes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig, GPTOutput, check_shape
from weights import INERT_CONFIG, load_weights, locate, read_config, read_json, save_weights

Strategy = Literal["last", "all", "token"]


def last_kept(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The state of each row's last token that is not padding, wherever the padding is. (B, T, C) -> (B, C)."""
    if attention_mask is None:
        return x[:, -1]
    places = torch.arange(x.size(1), device=x.device)
    last = (attention_mask.bool() * places).argmax(dim=-1)
    return x[torch.arange(len(x), device=x.device), last]


def encode(
    model: GPT, input_ids: Tensor, attention_mask: Tensor | None = None, pooling: Literal["last", "mean"] = "last"
) -> Tensor:
    """A vector for each sequence: the last hidden state of its last kept token, or the mean over its kept tokens.

    input_ids (B, T) and attention_mask (B, T), 1 to keep, padded on either side -> (B, C). Wrap it in torch.no_grad()
    unless the trunk is to be trained. Raises ValueError for another pooling, or a row of which nothing is kept.
    """
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling is {pooling!r}, expected 'last' or 'mean'")
    x = model(input_ids, attention_mask=attention_mask, return_logits=False).last_hidden_state
    if attention_mask is not None and not (kept := attention_mask.bool().any(dim=-1)).all():
        raise ValueError(f"row {int(kept.long().argmin())} of attention_mask keeps no token")
    if pooling == "last":
        return last_kept(x, attention_mask)
    if attention_mask is None:
        return x.mean(dim=1)
    weights = attention_mask.bool().to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)


def read_trunk(directory: Path) -> GPT:
    """The trunk that a directory's config.json describes, on the meta device: shapes without values."""
    with torch.device("meta"):
        return GPT(GPTConfig(**read_config(directory)))


def save_with_head(
    model: SequenceClassifier | DoubleHeads,
    directory: str | Path,
    architecture: str,
    fields: dict[str, Any],
    eos_token_id: int | None,
) -> None:
    """Write trunk and head in one state dict, as the transformers class `architecture` with its own config fields."""
    state = {name.removeprefix("gpt."): tensor for name, tensor in model.state_dict().items()}
    config = asdict(model.gpt.config)
    save_weights(state, config, directory, eos_token_id=eos_token_id, architecture=architecture, extra_config=fields)


class SequenceClassifier(nn.Module):
    """Classes of whole sequences or of each token: transformers' GPT2ForSequenceClassification, and Texar's strategies.

    Args:
        gpt: the trunk.
        num_labels: K.
        strategy: what the classes are read off. `last` (Texar's cls_time): the last kept token of each sequence. `all`
            (all_time): all its tokens side by side, each with weights of its own. `token` (time_wise): each token by
            itself, for itself.
        max_length: the longest sequence that it is meant for, in tokens, and for `all` can take; None is block_size.

    The loss follows from K and the type of the labels, as in transformers. One class: labels in floats are a regression
    (squared error), in integers 0 and 1 a binary classification (logistic). Several: integers are the class (B,),
    floats of 0 to 1 (B, K) say of each class whether it holds (logistic, several may).
    """

    def __init__(
        self, gpt: GPT, num_labels: int = 2, strategy: Strategy = "last", max_length: int | None = None
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        if strategy not in ("last", "all", "token"):
            raise ValueError(f"strategy is {strategy!r}, expected 'last', 'all' or 'token'")
        self.gpt, self.num_labels, self.strategy = gpt, num_labels, strategy
        self.labels = [f"LABEL_{index}" for index in range(num_labels)]  # the classes' names
        self.max_length = gpt.config.block_size if max_length is None else max_length
        if not 1 <= self.max_length <= gpt.config.block_size:
            raise ValueError(f"max_length is {max_length}, expected 1 to block_size {gpt.config.block_size}")
        n_inputs = gpt.config.n_embd * (self.max_length if strategy == "all" else 1)
        weight = gpt.transformer.wte.weight
        self.score = nn.Linear(n_inputs, num_labels, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> GPTOutput:
        """Logits of the classes, (B, K) or with strategy `token` (B, T, K); with labels also the loss.

        Args:
            input_ids, attention_mask: (B, T). Padding is known by the mask alone.
            labels: (B,) integers or floats, (B, K) floats; with `token` (B, T) or (B, T, K). Integers may be
                IGNORE_INDEX, for padding.
            inputs: what else `GPT.forward` takes: inputs_embeds, position_ids, head_mask, output_hidden_states, ...
        """
        output = self.gpt(input_ids, attention_mask=attention_mask, return_logits=False, **inputs)
        x = output.last_hidden_state
        if self.strategy == "last":
            x = last_kept(x, attention_mask)
        elif self.strategy == "all":
            x = self._side_by_side(x, attention_mask)
        logits = self.score(x)
        return output._replace(logits=logits, loss=None if labels is None else self._loss(logits, labels))

    def _side_by_side(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, max_length * C): kept tokens from the left, zeros after them."""
        B, T, C = x.shape
        if self.max_length < T:
            raise ValueError(f"a sequence of {T} tokens is longer than max_length {self.max_length}")
        if attention_mask is not None:
            kept = attention_mask.bool()
            order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)  # kept first, in their order
            x = (x * kept.unsqueeze(-1)).gather(1, order.unsqueeze(-1).expand(B, T, C))
        return F.pad(x, (0, 0, 0, self.max_length - T)).flatten(1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        places = tuple(logits.shape[:-1])
        if labels.is_floating_point() and self.num_labels == 1:
            check_shape("labels", labels, places, (*places, 1))
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if labels.is_floating_point():
            check_shape("labels", labels, (*places, self.num_labels))
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        check_shape("labels", labels, places)
        logits, labels = logits.flatten(0, -2), labels.flatten()
        K = max(2, self.num_labels)
        self.gpt.check_ids("labels", labels.masked_fill(labels == IGNORE_INDEX, 0), K, "classes")
        if self.num_labels > 1:
            return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
        counts = labels != IGNORE_INDEX
        losses = F.binary_cross_entropy_with_logits(
            logits[:, 0], labels.clamp(min=0).to(logits.dtype), reduction="none"
        )
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """A classifier that was saved here or by transformers, in eval mode; errors as of `GPT.from_pretrained`."""
        directory = locate(name_or_dir)
        gpt = read_trunk(directory)
        fields = read_json(directory / "config.json")
        labels = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves these out
        num_labels = len(labels)
        if fields.get("problem_type") == "regression" and num_labels > 1:
            raise ValueError(f"{directory}: a regression of {num_labels} values; here a regression has one")
        with torch.device("meta"):
            strategy = fields.get("classifier_strategy", "last")
            model = cls(gpt, num_labels, strategy, fields.get("classifier_max_length"))
        load_weights(model, directory, dtype=dtype, device=device)
        model.labels = [label for _, label in sorted(labels.items(), key=lambda item: int(item[0]))]
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, eos_token_id: int | None = None) -> None:
        """Write the classifier as transformers writes a GPT2ForSequenceClassification, which with `last` it is."""
        fields: dict[str, Any] = {}
        if self.labels != ["LABEL_0", "LABEL_1"]:
            numbers = {label: i for i, label in enumerate(self.labels)}
            fields = {"id2label": dict(enumerate(self.labels)), "label2id": numbers}
        if self.max_length != self.gpt.config.block_size:
            fields["classifier_max_length"] = self.max_length
        if self.strategy != "last":
            fields["classifier_strategy"] = self.strategy
        architecture = "GPT2ForSequenceClassification" if self.strategy == "last" else type(self).__name__
        save_with_head(self, directory, architecture, fields, eos_token_id)


class DoubleHeadsOutput(NamedTuple):
    """What `DoubleHeads` returns for N choices of each of B questions; a loss is None without its labels."""

    loss: Tensor | None  # (), of the language model, in nats a token
    mc_loss: Tensor | None  # (), of the choice, in nats a question
    logits: Tensor | None  # (B, N, T, V); None where only the loss was asked for
    mc_logits: Tensor  # (B, N)
    last_hidden_state: Tensor  # (B, N, T, C)


class DoubleHeads(nn.Module):
    """Multiple choice beside language modelling, as Radford et al. 2018: transformers' GPT2DoubleHeadsModel."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        weight = gpt.transformer.wte.weight
        summary = nn.Linear(gpt.config.n_embd, 1, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(summary.weight, std=0.02)
        nn.init.zeros_(summary.bias)
        self.multiple_choice_head = nn.ModuleDict({"summary": summary})  # the name that it has in transformers
        self.dropout = nn.Dropout(gpt.config.dropout)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        return_logits: bool | None = None,
    ) -> DoubleHeadsOutput:
        """One pass over N choices of each of B questions.

        Args:
            input_ids, attention_mask: (B, N, T), a choice a row.
            mc_token_ids: (B, N), the place in each row that the choice is read off; None is the last kept token.
            labels: (B, N, T) token ids, shifted here, IGNORE_INDEX where none counts.
            mc_labels: (B,), the right choice.
            return_logits: of the language model; None gives them only when there are no `labels`.
        """
        check_shape("input_ids (questions, choices, tokens)", input_ids, ("B", "N", "T"))
        B, N, T = input_ids.shape
        for what, tensor in {"attention_mask": attention_mask, "labels": labels}.items():
            if tensor is not None:
                check_shape(what, tensor, (B, N, T))
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        output = self.gpt(
            input_ids.flatten(0, 1),
            attention_mask=mask,
            labels=None if labels is None else labels.flatten(0, 1),
            return_logits=return_logits,
        )
        x = output.last_hidden_state
        if mc_token_ids is None:
            summary = last_kept(x, mask)
        else:
            check_shape("mc_token_ids", mc_token_ids, (B, N))
            self.gpt.check_ids("mc_token_ids", mc_token_ids, T, "tokens")
            summary = x[torch.arange(B * N, device=x.device), mc_token_ids.flatten()]
        mc_logits = self.multiple_choice_head["summary"](self.dropout(summary)).view(B, N)
        mc_loss = None
        if mc_labels is not None:
            check_shape("mc_labels", mc_labels, (B,))
            self.gpt.check_ids("mc_labels", mc_labels, N, "choices")
            mc_loss = F.cross_entropy(mc_logits.float(), mc_labels)
        logits = None if output.logits is None else output.logits.unflatten(0, (B, N))
        return DoubleHeadsOutput(output.loss, mc_loss, logits, mc_logits, x.unflatten(0, (B, N)))

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """Double heads that were saved here or by transformers, in eval mode; errors as of `GPT.from_pretrained`."""
        directory = locate(name_or_dir)
        gpt = read_trunk(directory)
        fields = read_json(directory / "config.json")
        for name in ("summary_activation", "summary_type", "summary_use_proj"):  # inert without this head
            if (found := fields.get(name, INERT_CONFIG[name])) != INERT_CONFIG[name]:
                raise ValueError(f"{directory}: {name} is {found!r}, and only {INERT_CONFIG[name]!r} is implemented")
        with torch.device("meta"):
            model = cls(gpt)
        load_weights(model, directory, dtype=dtype, device=device)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, eos_token_id: int | None = None) -> None:
        """Write both heads as transformers writes a GPT2DoubleHeadsModel."""
        fields = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "summary_first_dropout": self.dropout.p}
        save_with_head(self, directory, "GPT2DoubleHeadsModel", fields, eos_token_id)
