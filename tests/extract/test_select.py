"""Selection: every figure of the table against hooks written by hand, every choice against brute force."""

from __future__ import annotations

import functools
import json
import math
import warnings
from itertools import product

import numpy as np
import pytest
import tiny_chat
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr

from faststeer import SteeringVector
from faststeer.extract import Candidates, candidates, select
from faststeer.extract.select import RefusalRow, _choose, _row
from faststeer.hf.batching import encode

TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL, EXACT = tiny_chat.llama(len(TOKENIZER)), tiny_chat.llama(len(TOKENIZER)).double()
HARMFUL, HARMLESS = tiny_chat.HARMFUL, tiny_chat.HARMLESS[:4]
IDS = list(range(100, 220))
BALANCED = list(range(100, 310))  # about half of the probability
FOUND = candidates(MODEL, TOKENIZER, HARMFUL, HARMLESS, positions=[-3, -1])
EVERYTHING = {"token_ids": IDS, "induce_above": -100.0, "kl_below": 100.0, "depth_below": 1.0}


def quiet_select(*args, **options):
    """`select`, failing if it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return select(MODEL, TOKENIZER, FOUND, *args, **options)


# The table


def log_probabilities(model, prompts, hooks=()):
    """`[prompts, vocabulary]` of the next token, one unpadded prompt at a time, under (module, pre-hook or hook, f)."""
    handles = []
    for module, before, change in hooks:
        if before:
            handles.append(module.register_forward_pre_hook(lambda m, args, f=change: (f(args[0]), *args[1:])))
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, f=change: (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
                )
            )
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in encode(TOKENIZER, prompts)]
    for handle in handles:
        handle.remove()
    return log_softmax(torch.stack(logits).double().numpy(), axis=-1)


def score(log_p):
    outside = [i for i in range(log_p.shape[1]) if i not in IDS]
    return (logsumexp(log_p[:, IDS], axis=-1) - logsumexp(log_p[:, outside], axis=-1)).mean()


@functools.cache
def measured_by_hand(model, position, layer):
    """induce, bypass, ablate, kl of one candidate, and the unsteered scores of harmful and harmless prompts."""
    direction = FOUND.directions[FOUND.positions.index(position), layer].float().to(next(model.parameters()).dtype)
    unit = direction / direction.norm()

    def adding(sign):
        return [(model.model.layers[layer], True, lambda h: h + sign * direction)]

    def wipe(h):
        return h - (h @ unit)[..., None] * unit

    wiping = [
        hook
        for block in model.model.layers
        for hook in ((block, True, wipe), (block.self_attn, False, wipe), (block.mlp, False, wipe))
    ]
    base = log_probabilities(model, HARMLESS)
    ablated = log_probabilities(model, HARMLESS, wiping)
    return (
        score(log_probabilities(model, HARMLESS, adding(1))),
        score(log_probabilities(model, HARMFUL, adding(-1))),
        score(log_probabilities(model, HARMFUL, wiping)),
        rel_entr(np.exp(base), np.exp(ablated)).sum(-1).mean(),
        score(log_probabilities(model, HARMFUL)),
        score(base),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_figure_of_the_table(batch_size):
    found = quiet_select(HARMFUL, HARMLESS, batch_size=batch_size, **EVERYTHING)
    assert [(row.position, row.layer) for row in found.table] == list(product([-3, -1], range(3)))
    ours, plain, exact = [], [], []
    for row in found.table:
        if row.layer == 0:  # the embedding of a token of the template
            assert row.violated == ("no direction",)
            assert all(math.isnan(x) for x in (row.induce, row.bypass, row.ablate, row.kl))
            continue
        unsteered = found.unsteered["harmful"], found.unsteered["harmless"]
        ours.append((row.induce, row.bypass, row.ablate, row.kl, *unsteered))
        plain.append(measured_by_hand(MODEL, row.position, row.layer))
        exact.append(measured_by_hand(EXACT, row.position, row.layer))
    assert len(ours) == 4
    tiny_chat.assert_no_worse(ours, plain, exact)


def test_the_chosen_candidate_and_what_is_kept_of_it(tmp_path):
    found = quiet_select(HARMFUL, HARMLESS, **EVERYTHING)
    possible = [row for row in found.table if row.violated != ("no direction",)]
    assert all(row.admissible for row in possible)
    assert found.relaxed == ()
    best = min(possible, key=lambda row: row.bypass - row.induce)
    assert found.chosen == best
    assert found.vector.layers == (best.layer,)
    direction = FOUND.directions[FOUND.positions.index(best.position), best.layer].float()
    assert torch.equal(found.vector[best.layer], direction)
    assert (found.vector.at, found.vector.method, found.vector.scale) == ("resid_pre", "dim", "raw")
    by_ablation = quiet_select(HARMFUL, HARMLESS, rule="arditi", **EVERYTHING)
    assert by_ablation.chosen == min(possible, key=lambda row: row.ablate)
    assert by_ablation.chosen != found.chosen, "the two rules cannot be told apart here"

    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(data["table"]) == 6
    assert data["table"][0]["induce"] is None
    assert data["chosen"] == found.chosen.to_dict()
    assert (data["rule"], data["relaxed"], data["refusal_tokens"]) == ("steering", [], IDS)
    assert data["n_prompts"] == {"harmful": 5, "harmless": 4}
    found.vector.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert loaded.provenance["position"] == best.position
    assert loaded.provenance["selection"]["scores"] == found.chosen.to_dict()


def test_limits_decide():
    free = quiet_select(HARMFUL, HARMLESS, **EVERYTHING)
    rows = [row for row in free.table if row.violated != ("no direction",)]
    values = sorted(row.kl for row in rows)
    limit = (values[1] + values[2]) / 2
    found = quiet_select(HARMFUL, HARMLESS, **EVERYTHING | {"kl_below": limit})
    assert [row.admissible for row in found.table if "no direction" not in row.violated] == [r.kl < limit for r in rows]
    assert found.chosen.kl < limit
    shallow = quiet_select(HARMFUL, HARMLESS, **EVERYTHING | {"depth_below": 0.5})
    assert shallow.limits["layer_below"] == 1.5
    assert shallow.chosen.layer == 1
    assert all(("layer" in row.violated) == (row.layer == 2) for row in shallow.table if row.layer)


def test_giving_up_a_constraint_is_said():
    with pytest.warns(UserWarning, match="given up: kl .*'kl_below': 0.0"):
        found = select(MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, **EVERYTHING | {"kl_below": 0.0})
    assert found.relaxed == ("kl",)
    assert not any(row.admissible for row in found.table)
    assert found.vector.provenance["selection"]["relaxed"] == ["kl"]


def test_half_way_is_between_the_unsteered_scores():
    with pytest.warns(UserWarning):
        found = select(MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, **EVERYTHING | {"induce_above": 1e6})
    middle = (found.unsteered["harmful"] + found.unsteered["harmless"]) / 2
    assert found.limits["half_way_above"] == middle
    assert all(("half way" in row.violated) == (row.induce <= middle) for row in found.table if row.layer)
    assert quiet_select(HARMFUL, HARMLESS, **EVERYTHING).limits["half_way_above"] == -100


def test_wrong_calls():
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        select(MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, rule="best")
    with pytest.raises(ValueError, match="harmful is empty"):
        select(MODEL, TOKENIZER, FOUND, [], HARMLESS)
    with pytest.raises(ValueError, match="harmless is one str"):
        select(MODEL, TOKENIZER, FOUND, HARMFUL, "Hi")
    with pytest.raises(ValueError, match="the model has 2 layers, the candidates 3"):
        select(tiny_chat.llama(len(TOKENIZER), layers=2), TOKENIZER, FOUND, HARMFUL, HARMLESS)
    narrow = Candidates(FOUND.positive_mean[..., :8], FOUND.negative_mean[..., :8], (-3, -1), "resid_pre", 1, 1)
    with pytest.raises(ValueError, match="hidden size 8"):
        select(MODEL, TOKENIZER, narrow, HARMFUL, HARMLESS)
    same = Candidates(FOUND.positive_mean, FOUND.positive_mean, (-3, -1), "resid_pre", 1, 1)
    with pytest.raises(ValueError, match="no candidate has a direction"):
        select(MODEL, TOKENIZER, same, HARMFUL, HARMLESS)


# The choice

numbers = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, math.nan, math.inf])
LIMITS = {"induce_above": 0.0, "kl_below": 0.5, "layer_below": 4.0, "half_way_above": -1.0}


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(-3, -1)), st.none() | st.tuples(*[numbers] * 4), min_size=1, max_size=8
    ),
    st.sampled_from(["steering", "arditi"]),
)
def test_choice_is_brute_force(measured, rule):
    table = [_row(layer, position, values and list(values), LIMITS) for (layer, position), values in measured.items()]

    def given_up(row):
        """Constraints that this row needs given up; None if no row like it may be chosen."""
        if not all(map(math.isfinite, (row.induce, row.bypass, row.ablate, row.kl))):
            return None
        faults = [
            ("induce", row.induce <= 0.0), ("kl", row.kl >= 0.5), ("layer", row.layer >= 4),
            ("half way", row.induce <= -1.0),
        ]  # fmt: skip
        return {name for name, fault in faults if fault}

    possible = [row for row in table if given_up(row) is not None]
    if not possible:
        with pytest.raises(ValueError, match="no candidate has finite scores"):
            _choose(table, rule)
        return
    order = ["induce", "kl", "layer", "half way"]
    # Half way last of all; else fewer before more; of equally many those named earlier.
    subsets = [{name for name, taken in zip(order, bits, strict=True) if taken} for bits in product([0, 1], repeat=4)]
    subsets.sort(key=lambda s: ("half way" in s, len(s), [order.index(name) for name in sorted(s, key=order.index)]))
    wanted = next(s for s in subsets if any(given_up(row) <= s for row in possible))
    allowed = [row for row in possible if given_up(row) <= wanted]
    value = {"steering": lambda row: row.bypass - row.induce, "arditi": lambda row: row.ablate}[rule]
    lowest = min(map(value, allowed))
    expected = min((row for row in allowed if value(row) == lowest), key=lambda row: (row.layer, row.position))
    chosen, relaxed = _choose(table, rule)
    assert chosen is expected
    assert set(relaxed) == wanted


def test_a_direction_that_does_nothing_is_no_way_out():
    idle = RefusalRow(1, -1, induce=-5.0, bypass=4.0, ablate=4.0, kl=0.0, violated=("induce", "half way"))
    costly = RefusalRow(2, -1, induce=-0.5, bypass=-2.0, ablate=-2.0, kl=9.0, violated=("induce", "kl"))
    assert _choose([idle, costly], "steering") == (costly, ("induce", "kl"))
    assert _choose([idle], "steering") == (idle, ("induce", "half way"))


def test_ties_go_to_the_earlier_layer_then_to_the_earlier_position():
    rows = [
        RefusalRow(layer, position, 1.0, -1.0, 0.0, 0.0, ()) for layer, position in ((3, -5), (2, -1), (2, -4), (2, -2))
    ]
    for rule in ("steering", "arditi"):
        assert _choose(rows, rule) == (rows[2], ())


# The filter
