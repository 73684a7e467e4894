"""Turn corpora that were split into word tokens back into plain text, because GPT-2 was trained on plain text."""

from __future__ import annotations

import re


def detokenize_ptb_style(text: str) -> str:
    """Undo Penn Treebank tokenization: restore quotes (``), brackets (-LRB-) and the spacing of punctuation and n't."""
    for old, new in (("-LRB-", "("), ("-RRB-", ")"), ("-LSB-", "["), ("-RSB-", "]"), ("-LCB-", "{"), ("-RCB-", "}")):
        text = text.replace(old, new)
    text = re.sub(r"(``|`) ?", lambda match: '"' if match[1] == "``" else "'", text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" (n't|'(?:s|m|d|re|ve|ll)\b)", r"\1", text, flags=re.IGNORECASE)
    return re.sub(r" ([.,;:!?)\]}%])", r"\1", re.sub(r"([(\[{$]) ", r"\1", text))


def detokenize_ptb(text: str) -> str:
    """Undo the tokenization of Mikolov's Penn Treebank, which has one sentence per line and N in place of each number.

    The line breaks and the N are not changed.
    """
    return detokenize_ptb_style(re.sub(r"^ | $", "", text, flags=re.MULTILINE)).replace("$ N", "$N")


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText tokenization (Merity et al. 2016): ` @-@ `, and spaces around headings and punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]}])", r"\1", re.sub(r"([(\[{]) ", r"\1", text))
    text = re.sub(r' "([^"\n]*) "', lambda match: f' "{match[1].lstrip()}"', text)
    text = re.sub(r" ('s|'t|'d|'m|'re|'ve|'ll|n't)\b", r"\1", text)
    text = re.sub(r"^ (=+) (.*?) \1 ?$", r"\1 \2 \1", text, flags=re.MULTILINE)
    return re.sub(r"^ | $", "", text, flags=re.MULTILINE)
