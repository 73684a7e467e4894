"""Positions and masks of padded texts and of tokens that follow cached ones."""

import torch

from kernels.masks import find_positions, make_mask

CPU = torch.device("cpu")
LEFT_PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def test_positions_count_from_the_cached_tokens_or_the_kept_ones():
    assert find_positions(None, 3, 2, CPU).tolist() == [3, 4]
    assert find_positions(LEFT_PADDED, 0, 4, CPU).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert find_positions(LEFT_PADDED, 2, 2, CPU).tolist() == [[0, 1], [2, 3]]


def test_no_mask_where_pytorch_s_causal_form_is_right():
    assert make_mask(None, 0, 5, CPU, causal=True) is None
    assert make_mask(None, 4, 1, CPU, causal=True) is None  # one query attends to every key
    assert make_mask(None, 0, 5, CPU, causal=False) is None


def test_queries_after_cached_tokens_attend_to_all_of_these():
    mask = make_mask(None, 2, 2, CPU, causal=True)
    assert mask.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]


def test_padding_is_attended_to_only_by_itself():
    causal = make_mask(LEFT_PADDED, 0, 4, CPU, causal=True)[0, 0].int().tolist()
    assert causal == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    both = make_mask(LEFT_PADDED, 0, 4, CPU, causal=False)[0, 0].int().tolist()
    assert both == [[1, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
