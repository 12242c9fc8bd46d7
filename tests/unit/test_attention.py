"""CoreAttention against softmax attention written out, and its cache against a full forward."""

from __future__ import annotations

import pytest
import torch

from megatron_amd.errors import InputError
from megatron_amd.models.attention import CoreAttention, kv_cache

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


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_decoding_equals_full_forward(heads, groups):
    """Prompts of 4, 1 and 3 tokens, then tokens one by one at each row's own position; a row is dropped midway."""
    lengths, total = torch.tensor([4, 1, 3]), 7
    attention = make_attention(heads, groups).eval()
    query, key, value = (tensor.detach() for tensor in make_inputs(total, total, 3, heads, groups))
    expected = literal_attention(query, key, value, lower_triangle(total))
    rows = torch.arange(3)

    def one_token(tensor, rows, positions):
        return tensor[positions, rows].unsqueeze(0)

    with kv_cache(attention, 3, total) as cache:
        cache.start(4)
        prompt = [torch.full_like(tensor[:4], 1e3) for tensor in (query, key, value)]  # padding must not be seen
        for row, length in enumerate(lengths.tolist()):
            for padded, tensor in zip(prompt, (query, key, value), strict=True):
                padded[:length, row] = tensor[:length, row]
        output = attention(*prompt, None)
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(output[:length, row], expected[:length, row], rtol=1e-12, atol=1e-12)
        for step in range(3):
            if step == 1:  # row 0 ends; the last row takes its place
                order = cache.keep(torch.tensor([False, True, True]))
                assert order.tolist() == [2, 1]
                rows = rows[order]
            positions = lengths[rows] + step
            cache.step(positions[:, None], 4 + step + 1)
            output = attention(*(one_token(tensor, rows, positions) for tensor in (query, key, value)), None)
            torch.testing.assert_close(output[0], expected[positions, rows], rtol=1e-12, atol=1e-12)


def test_several_tokens_at_once_after_the_prompt():
    attention = make_attention(4, 2).eval()
    query, key, value = (tensor.detach() for tensor in make_inputs(6, 6, 2, 4, 2))
    expected = literal_attention(query, key, value, lower_triangle(6))
    with kv_cache(attention, 2, 6) as cache:
        cache.start(3)
        attention(query[:3], key[:3], value[:3], None)
        cache.step(torch.arange(3, 6).expand(2, 3), 6)
        output = attention(query[3:], key[3:], value[3:], None)
    torch.testing.assert_close(output, expected[3:], rtol=1e-12, atol=1e-12)


def test_cache_is_taken_off_after_an_error():
    attention = make_attention()
    with pytest.raises(RuntimeError), kv_cache(attention, 1, 4):
        attention(*make_inputs(9, 9, 1, 4, 4), None)  # nothing was announced
    assert attention.cache is None
