"""The row cache against lists: whatever is written, moved and refilled, a row reads its own tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faststeer.engine.cache import RowCache

ROWS, LENGTH, HEADS, SIZE = 4, 12, 2, 3


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("psm"), st.integers(0, ROWS - 1), st.integers(1, 6)), max_size=25), st.randoms()
)
def test_rows_read_what_was_written(actions, random):
    cache = RowCache(2, ROWS, LENGTH)
    kept: list[list[float]] = [[0.0] for _ in range(ROWS)]
    counter = iter(range(1, 10_000))

    def numbers(rows: int, tokens: int) -> torch.Tensor:
        made = torch.tensor([[float(next(counter)) for _ in range(tokens)] for _ in range(rows)])
        return made.view(rows, 1, tokens, 1).expand(-1, HEADS, -1, SIZE)

    cache.prefill(0, ROWS)
    for layer in range(2):
        cache.update(torch.zeros(ROWS, HEADS, 1, SIZE), torch.zeros(ROWS, HEADS, 1, SIZE), layer)
    for action, row, n in actions:
        if action == "p":  # a prompt, padded on the right
            new, length = numbers(1, n), random.randint(1, n)
            cache.prefill(row, 1)
            found = [cache.update(new + layer, -new - layer, layer) for layer in range(2)]
            assert torch.equal(found[1][0], new + 1)
            kept[row] = new[0, 0, :length, 0].tolist()
        elif action == "s":  # a step of the first rows
            if max(map(len, kept[: row + 1])) >= LENGTH:
                continue
            new, column = numbers(row + 1, 1), torch.tensor([len(tokens) for tokens in kept[: row + 1]])
            for i in range(row + 1):
                kept[i].append(float(new[i, 0, 0, 0]))
            cache.decode(column, width := int(column.max()) + 1)
            for layer in range(2):
                keys, values = cache.update(new + layer, -new - layer, layer)
                assert keys.shape == values.shape == (row + 1, HEADS, width, SIZE)
                for i in range(row + 1):
                    expected = torch.tensor(kept[i]).view(1, -1, 1).expand(HEADS, -1, SIZE) + layer * (
                        expected_shift(kept[i])
                    )
                    assert torch.equal(keys[i, :, : len(kept[i])], expected)
                    assert torch.equal(values[i, :, : len(kept[i])], -expected)
        else:
            target = n % ROWS
            cache.move(row, target, len(kept[row]))
            kept[target] = list(kept[row])


def expected_shift(tokens: list[float]) -> torch.Tensor:
    """Layer 1 holds the numbers plus one, but for the zeros that were there at the beginning."""
    return (torch.tensor(tokens) != 0).float().view(1, -1, 1)


def test_layers_of_different_sizes():
    """A row moves in each of them; nothing is lost when the second turns out to be another."""
    cache = RowCache(3, ROWS, LENGTH)
    cache.prefill(1, 1)
    written = []
    for layer, (heads, size) in enumerate([(2, 3), (2, 3), (4, 5)]):
        keys, values = torch.randn(1, heads, 4, size), torch.randn(1, heads, 4, size)
        cache.update(keys, values, layer)
        written.append((keys, values))
    cache.move(1, 3, 4)
    cache.decode(torch.tensor([0, 4, 0, 4]), 4)
    for layer, pair in zip(cache.layers, written, strict=True):
        for store, new in zip((layer.keys, layer.values), pair, strict=True):
            assert torch.equal(store[3, :, :4], new[0]) and torch.equal(store[1, :, :4], new[0])
            assert not store[0].any() and store.is_contiguous()
