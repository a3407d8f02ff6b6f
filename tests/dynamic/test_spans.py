"""Tables of spans: tokens are gathered and decisions written back at each sample's own places."""

from __future__ import annotations

import torch

from dynamic.spans import gather, span_table, write
from llava.segments import Span

CPU = torch.device("cpu")
SPANS = [[Span(1, 4), Span(5, 6)], [], [Span(0, 2)]]  # two images, none, one


def test_gathered_tokens_are_those_of_the_spans() -> None:
    hidden = torch.arange(3 * 6 * 2, dtype=torch.float32).view(3, 6, 2).requires_grad_()
    table = span_table(SPANS, CPU)
    tokens = gather(hidden, table)
    assert tokens.shape == (3, 3, 2)
    torch.testing.assert_close(tokens[0], hidden[0, 1:4])
    torch.testing.assert_close(tokens[1], torch.cat([hidden[0, 5:6], torch.zeros(2, 2)]))
    torch.testing.assert_close(tokens[2], torch.cat([hidden[2, 0:2], torch.zeros(1, 2)]))
    tokens.sum().backward()
    touched = hidden.grad[..., 0]
    assert touched.tolist() == [[0, 1, 1, 1, 0, 1], [0] * 6, [1, 1, 0, 0, 0, 0]]


def test_values_are_written_to_the_spans_alone() -> None:
    table = span_table(SPANS, CPU)
    new = torch.arange(2.0, 11.0).view(3, 3).requires_grad_()
    written = write(torch.ones(3, 6), table, new)
    assert written.tolist() == [[1, 2, 3, 4, 1, 5], [1] * 6, [8, 9, 1, 1, 1, 1]]
    (written**2).sum().backward()
    assert new.grad.tolist() == [[4, 6, 8], [10, 0, 0], [16, 18, 0]]


def test_weights_make_a_mean_over_samples() -> None:
    table = span_table(SPANS, CPU)
    torch.testing.assert_close(table.weights, torch.tensor([1 / 6, 1 / 6, 1 / 3]))


def test_without_any_span_there_is_a_row_of_padding() -> None:
    hidden = torch.randn(2, 5, 3)
    table = span_table([[], []], CPU)
    assert not table.valid.any()
    assert table.weights.tolist() == [0.0]
    assert not gather(hidden, table).any()
    values = torch.rand(2, 5)
    assert torch.equal(write(values, table, torch.full((1, 1), 7.0)), values)
