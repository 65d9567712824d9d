"""CAA against a loop over single, unpadded pairs."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_chat
import torch

from faststeer.extract.caa import answer_rows, caa, caa_table
from faststeer.extract.pairs import Pair
from faststeer.hf.batching import encode

TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL = tiny_chat.llama(len(TOKENIZER)).double()
PAIRS = [
    Pair("Is it wrong?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)"),
    Pair("Shall we bake a cake or steal it?\n (A) Bake\n (B) Steal", "(B)", "(A)"),
    Pair("Name three", "I cannot", "Sure, here", sign=-1),
]


def by_hand(layer):
    """The mean difference of a block's output at the letter, which is the second token of "(A)"."""
    differences = []
    for pair in PAIRS:
        texts = (pair.chosen, pair.rejected) if pair.sign > 0 else (pair.rejected, pair.chosen)
        states = []
        for text in texts:
            ids = encode(TOKENIZER, [pair.prompt])[0] + TOKENIZER(text, add_special_tokens=False)["input_ids"]
            seen = []
            handle = MODEL.model.layers[layer].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
            with torch.no_grad():
                MODEL(torch.tensor([ids]))
            handle.remove()
            length = len(TOKENIZER(text, add_special_tokens=False)["input_ids"])
            places = {"(A)": 1, "(B)": 1, "I cannot": 0, "Sure, here": 0}
            states.append(seen[0][len(ids) - length + places[text]])
        differences.append(states[0] - states[1])
    return torch.stack(differences).mean(0).numpy()


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_mean_difference_at_the_answer_token(batch_size):
    found = caa_table(MODEL, TOKENIZER, PAIRS, batch_size=batch_size)
    assert (found.at, found.method, found.scale, found.positions) == ("resid_post", "caa", "raw", (None,))
    for layer in range(3):
        oracle = by_hand(layer)
        assert np.abs(found.directions[0, layer].numpy() - oracle).max() <= 1e-9 * np.abs(oracle).max()
    vector = caa(MODEL, TOKENIZER, PAIRS)
    assert vector.layers == (0, 1, 2)
    assert vector.provenance["n_pairs"] == 3


def test_what_follows_the_answer_token_is_not_read():
    longer = [Pair(p.prompt, p.chosen + " and so on", p.rejected + "!", p.sign) for p in PAIRS]
    ours = caa_table(MODEL, TOKENIZER, longer).directions
    assert torch.equal(ours, caa_table(MODEL, TOKENIZER, PAIRS).directions)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (PAIRS[:1], "pairs has 1 pair"),
        ([], "pairs is empty"),
        ([Pair("Hi", "Yes"), PAIRS[0]], r"pairs\[0\] has no rejected completion"),
        ([PAIRS[0], Pair("Hi", "Yes", "Yes, sir")], r"pairs\[1\]: one completion begins the other"),
    ],
)
def test_pairs_that_cannot_be_used(pairs, message):
    with pytest.raises(ValueError, match=message):
        answer_rows(TOKENIZER, pairs)
