"""Positions and masks of padded texts and of tokens that follow cached ones."""

import torch

from kernels.document_attention import DocumentMask
from kernels.long_attention import Window
from kernels.masks import dense_mask, find_positions, make_mask

CPU = torch.device("cpu")
LEFT_PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def test_positions_count_from_the_cached_tokens_or_the_kept_ones():
    assert find_positions(None, None, 3, 2, CPU).tolist() == [3, 4]
    assert find_positions(LEFT_PADDED, None, 0, 4, CPU).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert find_positions(LEFT_PADDED, None, 2, 2, CPU).tolist() == [[0, 1], [2, 3]]


def test_no_mask_where_pytorch_s_causal_form_is_right():
    assert make_mask(None, None, 0, 5, CPU, causal=True) is None
    assert make_mask(None, None, 4, 1, CPU, causal=True) is None  # one query attends to every key
    assert make_mask(None, None, 0, 5, CPU, causal=False) is None


def test_queries_after_cached_tokens_attend_to_all_of_these():
    mask = make_mask(None, None, 2, 2, CPU, causal=True)
    assert mask.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]


def test_padding_is_attended_to_only_by_itself():
    causal = make_mask(LEFT_PADDED, None, 0, 4, CPU, causal=True)[0, 0].int().tolist()
    assert causal == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    both = make_mask(LEFT_PADDED, None, 0, 4, CPU, causal=False)[0, 0].int().tolist()
    assert both == [[1, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_documents_have_positions_and_masks_of_their_own():
    ids = torch.tensor([[7, 7, 7, 9]])
    assert find_positions(None, ids, 0, 4, CPU).tolist() == [[0, 1, 2, 0]]
    mask = make_mask(None, ids, 0, 4, CPU, causal=True)
    assert isinstance(mask, DocumentMask)
    x = torch.ones(1, 1, 4, 2)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert dense_mask(x, x, mask, False, None)[0, 0].int().tolist() == expected


def test_the_dense_mask_joins_all_that_keeps_a_query_from_a_key():
    x = torch.ones(1, 1, 3, 2)
    assert dense_mask(x, x, None, False, None) is None
    assert dense_mask(x, x, None, True, None).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    window = dense_mask(x, x, None, True, Window(2))
    assert window[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    padding = make_mask(torch.tensor([[0, 1, 1]]), None, 0, 3, CPU, causal=True)
    assert dense_mask(x, x, padding, False, None) is padding
