"""CoreAttention against softmax attention written out, and its cache against a full forward."""

from __future__ import annotations

import pytest
import torch

from megatron_amd.errors import InputError
from megatron_amd.models.attention import CoreAttention
from megatron_amd.models.kv_cache import Bundle, Segment, kv_cache

# isort: split
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

WIDTH = 8


def make_attention(heads=4, groups=4, mask_type=AttnMaskType.causal, softmax_scale=None, **fields) -> CoreAttention:
    config = TransformerConfig(
        num_layers=2, hidden_size=heads * WIDTH, num_attention_heads=heads, num_query_groups=groups,
        **{"attention_dropout": 0.0, **fields},
    )  # fmt: skip
    return CoreAttention(config, 2, mask_type, "self", softmax_scale=softmax_scale)


def make_inputs(queries, keys, rows, heads, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, rows, heads, WIDTH), (keys, rows, groups, WIDTH), (keys, rows, groups, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def literal_attention(query, key, value, allowed, bias=None, scale=WIDTH**-0.5):
    """Loops over rows and heads. `allowed`: bool [sq, sk]. Returns [sq, b, np * hn]."""
    heads, groups = query.shape[2], key.shape[2]
    rows = []
    for b in range(query.shape[1]):
        outputs = []
        for h in range(heads):
            group = h // (heads // groups)
            scores = scale * query[:, b, h] @ key[:, b, group].t()
            if bias is not None:
                scores = scores + bias[min(b, bias.shape[0] - 1), h]
            weights = torch.where(allowed, scores, float("-inf")).softmax(dim=-1)
            outputs.append(weights @ value[:, b, group])
        rows.append(torch.cat(outputs, dim=-1))
    return torch.stack(rows, dim=1)


def lower_triangle(size):
    return torch.ones(size, size, dtype=torch.bool).tril()


def assert_same_with_gradients(actual, expected, inputs):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, direction, retain_graph=True),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
def test_causal(heads, groups):
    inputs = make_inputs(5, 5, 3, heads, groups)
    actual = make_attention(heads, groups)(*inputs, None)
    assert_same_with_gradients(actual, literal_attention(*inputs, lower_triangle(5)), inputs)


@pytest.mark.parametrize("bias_rows", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_bias(bias_rows, causal):
    inputs = make_inputs(5, 5, 3, 6, 2)
    bias = torch.randn(bias_rows, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    mask_type = AttnMaskType.causal if causal else AttnMaskType.padding
    actual = make_attention(6, 2, mask_type)(*inputs, None, attention_bias=bias)
    allowed = lower_triangle(5) if causal else torch.ones(5, 5, dtype=torch.bool)
    assert_same_with_gradients(actual, literal_attention(*inputs, allowed, bias), [*inputs, bias])


def test_mask_for_cross_attention():
    """More keys than queries, with Megatron's convention that True forbids."""
    inputs = make_inputs(3, 6, 1, 4, 4)
    forbidden = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    forbidden[..., 4:] = True
    actual = make_attention(mask_type=AttnMaskType.padding)(*inputs, forbidden)
    assert_same_with_gradients(actual, literal_attention(*inputs, ~forbidden[0, 0]), inputs)


def test_call_overrides_mask_type():
    inputs = make_inputs(4, 4, 2, 4, 4)
    actual = make_attention()(*inputs, None, attn_mask_type=AttnMaskType.no_mask)
    expected = literal_attention(*inputs, torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_softmax_scale():
    inputs = make_inputs(4, 4, 2, 4, 4)
    actual = make_attention(softmax_scale=0.5)(*inputs, None)
    expected = literal_attention(*inputs, lower_triangle(4), scale=0.5)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_layer_scaling_equals_megatron():
    """Megatron divides the scores by the layer's number and multiplies them back before its softmax."""
    inputs = make_inputs(4, 4, 2, 4, 4)
    actual = make_attention(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True)(*inputs, None)
    expected = literal_attention(*inputs, lower_triangle(4))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"window_size": (4, 0)},
        {"softmax_type": "off-by-one"},
        {"context_parallel_size": 2},
        {"attention_dropout": 0.1},
    ],
)
def test_unsupported_kinds_are_refused(fields):
    with pytest.raises(InputError, match=rf"transformer\.{next(iter(fields))}"):
        make_attention(**fields)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_flat_passes_equal_full_forward(heads, groups, with_bias):
    """Rows of different lengths, read in pieces beside rows that decode, out of order; then a row takes another's
    place, and a new sequence the place that became free."""
    total = 7
    attention = make_attention(heads, groups).eval()
    query, key, value = (tensor.detach() for tensor in make_inputs(total, total, 3, heads, groups))
    bias = torch.randn(1, heads, total, total, dtype=torch.float64) if with_bias else None
    expected = literal_attention(query, key, value, lower_triangle(total), bias)
    cache = kv_cache(attention, 3, total, torch.device("cpu"))
    sequences = {0: 0, 1: 1, 2: 2}  # row of the cache -> sequence

    def check(decoding, segments):
        tokens = [(sequences[row], position) for row, position in decoding]
        tokens += [(sequences[row], start + i) for row, start, count in segments for i in range(count)]
        numbers, positions = (torch.tensor(column) for column in zip(*tokens, strict=True))
        cache.expect(decoding, [Segment(*segment) for segment in segments])
        flat = [tensor[positions, numbers].unsqueeze(1) for tensor in (query, key, value)]
        flat_bias = None if bias is None else bias[:, :, positions]
        with cache.attached():
            output = attention(*flat, None, attention_bias=flat_bias)
        torch.testing.assert_close(output[:, 0], expected[positions, numbers], rtol=1e-12, atol=1e-12)

    check([], [(0, 0, 3), (1, 0, 1), (2, 0, 2)])
    check([(1, 1)], [(2, 2, 2), (0, 3, 1)])
    check([(0, 4), (2, 4)], [])
    check([(2, 5), (0, 5), (1, 2)], [])
    check([(0, 6), (1, 3), (2, 6)], [])
    cache.move(1, 0)
    sequences[0] = 1
    check([(0, 4)], [])
    sequences[1] = 0
    check([(0, 5)], [(1, 0, 5)])
    assert attention.cache is None


def test_prompts_of_nearly_one_length_are_read_together():
    """As bundles, padded or not; others by themselves, in the order of their tokens."""
    total, heads, groups = 9, 6, 2
    attention = make_attention(heads, groups).eval()
    query, key, value = (tensor.detach() for tensor in make_inputs(total, total, 8, heads, groups))
    expected = literal_attention(query, key, value, lower_triangle(total), None)
    cache = kv_cache(attention, 8, total, torch.device("cpu"))
    segments = [
        Segment(0, 0, 1), Segment(1, 0, 8), Segment(2, 0, 7), Segment(3, 0, 9), Segment(4, 2, 3), Segment(5, 0, 2),
        Segment(6, 0, 2),
    ]  # fmt: skip
    cache.expect([], [Segment(4, 0, 2)])  # what the fifth segment looks back on
    with cache.attached():
        attention(*(tensor[:2, 4].unsqueeze(1) for tensor in (query, key, value)), None)
    cache.expect([(7, 0)], segments)
    kinds = [(piece.rows if isinstance(piece, Bundle) else piece.row) for piece in cache.bundles]
    assert kinds == [0, slice(1, 4), 4, slice(5, 7)]
    assert [piece.length for piece in cache.bundles] == [1, 24, 3, 4]
    tokens = [(7, 0)] + [(row, start + i) for row, start, count in segments for i in range(count)]
    rows, positions = (torch.tensor(column) for column in zip(*tokens, strict=True))
    with cache.attached():
        output = attention(*(tensor[positions, rows].unsqueeze(1) for tensor in (query, key, value)), None)
    torch.testing.assert_close(output[:, 0], expected[positions, rows], rtol=1e-12, atol=1e-12)


def test_cache_is_taken_off_after_an_error():
    attention = make_attention()
    cache = kv_cache(attention, 1, 4, torch.device("cpu"))
    cache.expect([], [Segment(0, 0, 9)])
    with pytest.raises(IndexError), cache.attached():
        attention(*make_inputs(9, 9, 1, 4, 4), None)
    assert attention.cache is None
