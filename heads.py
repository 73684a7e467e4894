"""GPT-2 for tasks other than predicting the next token: classification, multiple choice and sentence vectors.

A model with a head uses the GPT that it is given, without a copy. For example, this classifier starts from the released
weights, and its embeddings and half of its blocks are frozen:

    classifier = SequenceClassifier(GPT.from_pretrained("gpt2"), 3)
    classifier.gpt.freeze(layers=6)

Models are saved in the format of the corresponding transformers class, if there is one. Shapes are written as in
model.py; K is the number of classes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from checks import check_ids, check_shape
from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig, GPTOutput
from weights import INERT_CONFIG, StoredModel, load_weights, locate, open_model, read_json, save_weights

Strategy = Literal["last", "all", "token"]


def last_kept(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the hidden state of the last token that the mask keeps in each row, (B, T, C) -> (B, C).

    Padding may be on either side. If a row keeps no token, the result is the state of its first token.
    """
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(x.size(1), device=x.device)
    last = (attention_mask.bool() * positions).argmax(dim=-1)
    return x[torch.arange(len(x), device=x.device), last]


def encode(
    model: GPT, input_ids: Tensor, attention_mask: Tensor | None = None, pooling: Literal["last", "mean"] = "last"
) -> Tensor:
    """Return a vector for each sequence. Call this function under torch.no_grad() unless gradients are needed.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 1 for a token to keep and 0 for padding, on either side.
        pooling: "last" returns the final hidden state of the last kept token, "mean" the mean over all kept tokens.

    Returns:
        (B, C).

    Raises:
        ValueError: `pooling` is unknown, or a row keeps no token.
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


def make_trunk(stored: StoredModel) -> GPT:
    """Build the GPT of a stored model on the meta device: its parameters have shapes, but no values yet."""
    with torch.device("meta"):
        return GPT(GPTConfig(**stored.config_arguments()))


def save_with_head(
    model: SequenceClassifier | DoubleHeads,
    directory: str | Path,
    architecture: str,
    fields: dict[str, Any],
    eos_token_id: int | None,
) -> None:
    """Write GPT and head as one state dict, in transformers' layout. Add the entries of `fields` to config.json.

    `architecture` is the name of the class that loads the files.
    """
    state = {name.removeprefix("gpt."): tensor for name, tensor in model.state_dict().items()}
    config = asdict(model.gpt.config)
    save_weights(state, config, directory, eos_token_id=eos_token_id, architecture=architecture, extra_config=fields)


def read_labels(path: Path, fields: dict[str, Any]) -> list[str]:
    """Return the names of the classes in the `fields` of the config.json at `path`, in the order of the class indices.

    If id2label is missing or empty, the names are LABEL_0 and LABEL_1. Raises ValueError if id2label is anything else
    than an object with the keys "0", "1", ... whose values are the names.
    """
    names = fields.get("id2label")
    if names is None or names == {}:
        return ["LABEL_0", "LABEL_1"]  # the default names, which transformers does not write into config.json
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise ValueError(f'{path}: id2label is {names!r}, expected an object with the keys "0", "1", ...')
    labels = [names[str(i)] for i in range(len(names))]
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: id2label is {names!r}, expected a text for each class")
    return labels


class SequenceClassifier(nn.Module):
    """A classifier of sequences or tokens, like transformers' GPT2ForSequenceClassification but with three strategies.

    Args:
        gpt: the language model whose hidden states are classified.
        num_labels: K, the number of classes.
        strategy: the input of the classifier. `last`: the hidden state of the last token that is not padding. `all`:
            the hidden states of all tokens that are not padding, concatenated and padded with zeros up to max_length.
            `token`: the hidden state of one token; each token is classified separately.
        max_length: the longest sequence in tokens; None means block_size. Only strategy `all` enforces this limit.

    The loss depends on K and on the dtype of the labels:
        K = 1, floats: squared error (regression).
        K = 1, integers 0 and 1: logistic loss (binary classification). transformers uses the squared error here.
        K > 1, integers: cross-entropy; the integers are class indices.
        K > 1, K floats from 0 to 1: logistic loss of each class (several classes may apply).
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
        self.labels = [f"LABEL_{index}" for index in range(num_labels)]  # names of the classes
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
        """Return the logits, (B, K) or, with strategy `token`, (B, T, K), and the loss if labels are given.

        Args:
            input_ids, attention_mask: (B, T). Only the mask says which tokens are padding: without it, none are.
            labels: (B,) integers; (B, K) floats; or, with K = 1, (B,) floats. With `token`, (B, T) replaces (B,), and
                (B, T, K) replaces (B, K). Integer labels equal to IGNORE_INDEX, for example at padding, have no loss.
            inputs: other arguments of `GPT.forward`: inputs_embeds, position_ids, head_mask, output_hidden_states, ...
        """
        output = self.gpt(input_ids, attention_mask=attention_mask, return_logits=False, **inputs)
        x = output.last_hidden_state
        if self.strategy == "last":
            x = last_kept(x, attention_mask)
        elif self.strategy == "all":
            x = self._concatenate(x, attention_mask)
        logits = self.score(x)
        return output._replace(logits=logits, loss=None if labels is None else self._loss(logits, labels))

    def _concatenate(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Concatenate the states of the tokens that are not padding, then zeros. (B, T, C) -> (B, max_length * C)."""
        B, T, C = x.shape
        if self.max_length < T:
            raise ValueError(f"a sequence of {T} tokens is longer than max_length {self.max_length}")
        if attention_mask is not None:
            kept = attention_mask.bool()
            order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)  # kept tokens first, order unchanged
            x = (x * kept.unsqueeze(-1)).gather(1, order.unsqueeze(-1).expand(B, T, C))
        return F.pad(x, (0, 0, 0, self.max_length - T)).flatten(1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        shape = tuple(logits.shape[:-1])  # (B,), or (B, T) with strategy `token`
        if labels.is_floating_point() and self.num_labels == 1:
            check_shape("labels", labels, shape, (*shape, 1))
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if labels.is_floating_point():
            check_shape("labels", labels, (*shape, self.num_labels))
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        check_shape("labels", labels, shape)
        logits, labels = logits.flatten(0, -2), labels.flatten()
        K = max(2, self.num_labels)
        check_ids("labels", labels.masked_fill(labels == IGNORE_INDEX, 0), K, "classes")
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
        """Load a classifier that `save_pretrained` or transformers has saved, and put it in eval mode.

        The arguments and the errors are those of `GPT.from_pretrained`.
        """
        stored = open_model(locate(name_or_dir))
        gpt, path = make_trunk(stored), stored.directory / "config.json"
        fields = read_json(path)
        labels = read_labels(path, fields)
        if fields.get("problem_type") == "regression" and len(labels) > 1:
            raise ValueError(f"{path}: problem_type is a regression of {len(labels)} values, expected 1 value")
        max_length = fields.get("classifier_max_length")
        if max_length is not None and type(max_length) is not int:
            raise ValueError(f"{path}: classifier_max_length must be an integer, got {max_length!r}")
        try:
            with torch.device("meta"):
                model = cls(gpt, len(labels), fields.get("classifier_strategy", "last"), max_length)
        except ValueError as error:
            raise ValueError(f"{path}: classifier_{error}") from None
        load_weights(model, stored, dtype=dtype, device=device)
        model.labels = labels
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, eos_token_id: int | None = None) -> None:
        """Write the classifier. With strategy `last`, transformers can load it as a GPT2ForSequenceClassification."""
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
    """The result of `DoubleHeads` for B questions with N choices each. A loss is None if its labels were not given."""

    loss: Tensor | None  # (), language modeling, in nats per token
    mc_loss: Tensor | None  # (), multiple choice, in nats per question
    logits: Tensor | None  # (B, N, T, V), or None: see return_logits of `DoubleHeads.forward`
    mc_logits: Tensor  # (B, N)
    last_hidden_state: Tensor  # (B, N, T, C)


class DoubleHeads(nn.Module):
    """A GPT with a second head, for multiple choice (Radford et al. 2018), like transformers' GPT2DoubleHeadsModel."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        weight = gpt.transformer.wte.weight
        summary = nn.Linear(gpt.config.n_embd, 1, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(summary.weight, std=0.02)
        nn.init.zeros_(summary.bias)
        self.multiple_choice_head = nn.ModuleDict({"summary": summary})  # transformers' name
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
        """Return a score for each choice, and the outputs of the GPT, for B questions with N choices each.

        Args:
            input_ids, attention_mask: (B, N, T), one row per choice.
            mc_token_ids: (B, N), the position in each row of the token whose state is scored. None means the last token
                that is not padding.
            labels: (B, N, T) token ids, which `GPT.forward` shifts by one; the loss ignores IGNORE_INDEX.
            mc_labels: (B,), the index of the correct choice.
            return_logits: whether to return the language model's logits. None means: only if `labels` is None.
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
            check_ids("mc_token_ids", mc_token_ids, T, "tokens")
            summary = x[torch.arange(B * N, device=x.device), mc_token_ids.flatten()]
        mc_logits = self.multiple_choice_head["summary"](self.dropout(summary)).view(B, N)
        mc_loss = None
        if mc_labels is not None:
            check_shape("mc_labels", mc_labels, (B,))
            check_ids("mc_labels", mc_labels, N, "choices")
            mc_loss = F.cross_entropy(mc_logits.float(), mc_labels)
        logits = None if output.logits is None else output.logits.unflatten(0, (B, N))
        return DoubleHeadsOutput(output.loss, mc_loss, logits, mc_logits, x.unflatten(0, (B, N)))

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """Load a model with both heads that `save_pretrained` or transformers has saved, and put it in eval mode.

        The arguments and the errors are those of `GPT.from_pretrained`.
        """
        stored = open_model(locate(name_or_dir))
        gpt, directory = make_trunk(stored), stored.directory
        fields = read_json(directory / "config.json")
        for name in ("summary_activation", "summary_type", "summary_use_proj"):  # GPT itself ignores these fields
            if (found := fields.get(name, INERT_CONFIG[name])) != INERT_CONFIG[name]:
                raise ValueError(f"{directory}: {name} is {found!r}, and only {INERT_CONFIG[name]!r} is implemented")
        with torch.device("meta"):
            model = cls(gpt)
        load_weights(model, stored, dtype=dtype, device=device)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, eos_token_id: int | None = None) -> None:
        """Write GPT and both heads in the format of transformers' GPT2DoubleHeadsModel."""
        fields = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "summary_first_dropout": self.dropout.p}
        save_with_head(self, directory, "GPT2DoubleHeadsModel", fields, eos_token_id)
