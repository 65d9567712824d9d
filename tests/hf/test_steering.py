"""The context manager: what happens to which token of which row, what is watched, changed, refused and put back."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import models
import pytest
import torch
from class_outputs import note_class_outputs
from placing import placed
from test_architectures import close, far, generate, hand_hook, logits, rich_plan
from test_hook_points import hooks_of
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

import faststeer as fs
from faststeer.hf import read

PROMPT, NEW = 6, 5
SOME = pytest.mark.parametrize("name", ["llama", "gpt2", "neox_parallel"])


@pytest.fixture
def model() -> nn.Module:
    return models.model("llama")


@pytest.fixture
def ids() -> Tensor:
    return models.tokens(3, PROMPT)


def d(seed: int = 0) -> Tensor:
    return models.direction(seed)


class Touched:
    """Notes at one hook point which tokens steering changes: what the module's class computes, and what its hooks
    see."""

    def __init__(self, model: nn.Module, name: str = "llama", at: str = "attn_out", layer: int = 1) -> None:
        modules = models.MODULES[name]
        module = model.get_submodule(modules.layers)[layer].get_submodule(getattr(modules, at))
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.restore = note_class_outputs(module, lambda output: self.note(self.before, output))
        self.handle = module.register_forward_hook(lambda _module, _args, output: self.note(self.after, output))

    @staticmethod
    def note(where: list[Tensor], output: Any) -> None:
        where.append((output if isinstance(output, Tensor) else output[0]).detach().clone())

    def tokens(self) -> Tensor:
        """`[rows, tokens]`, those of all passes in order."""
        self.restore()
        self.handle.remove()
        return (torch.cat(self.after, 1) != torch.cat(self.before, 1)).any(-1)

    def values(self) -> Tensor:
        return torch.cat(self.before, 1)


HERE = {"layers": 1, "at": "attn_out"}


# Which tokens ---------------------------------------------------------------------------------------------------------


@SOME
@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", range(-6, 9)),
        ("prompt", range(-6, 0)),
        ("generated", range(9)),
        ("last", [-1]),
        ("[-3:]", [-3, -2, -1]),
        ("[0:2]", [0, 1]),
        ("[-1:1]", [-1, 0]),
        ("[:-4]", [-6, -5]),
        (0, [0]),
        (2, [2]),
        (-2, [-2]),
    ],
    ids=str,
)
class TestPositions:
    def run(self, name: str, positions: Any, **more: Any) -> Tensor:
        """Which tokens are changed, two rows of 6 and 4 prompt tokens padded on the left, as [rows, r from -6 on]."""
        model = models.model(name)
        batch = models.left_padded([models.tokens(1, 6)[0], models.tokens(1, 4)[0]])
        with fs.steer(model, fs.Add(d(), positions=positions, **HERE)):
            touched = Touched(model, name)
            generate(model, batch, NEW, **more)
            return touched.tokens()

    def test_while_generating(self, name, positions, expected):
        touched = self.run(name, positions)
        assert touched.shape == (2, 6 + NEW - 1)
        for row, length in enumerate((6, 4)):
            steered = [r for r in range(-length, NEW - 1) if touched[row, r + 6]]
            assert steered == [r for r in expected if -length <= r < NEW - 1]

    def test_in_chunks(self, name, positions, expected):
        assert torch.equal(self.run(name, positions, prefill_chunk_size=4), self.run(name, positions))

    def test_without_cache(self, name, positions, expected):
        """Every pass sees all tokens, and takes each for what it is."""
        touched = self.run(name, positions, use_cache=False)
        start = 0
        for step in range(NEW):
            steered = [r for r in range(-6, step) if touched[0, start + r + 6]]
            assert steered == [r for r in expected if -6 <= r < step]
            start += 6 + step


def test_positions_in_a_right_padded_pass(model):
    prompts = [models.tokens(1, 6)[0], models.tokens(1, 3)[0]]
    with fs.steer(model, fs.Add(d(), positions="[-2:]", **HERE)):
        touched = Touched(model)
        logits(model, **{"ids" if k == "input_ids" else k: v for k, v in models.right_padded(prompts).items()})
    assert touched.tokens().int().tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]]


def test_positions_after_a_right_padded_prompt(model):
    """In a loop of one's own: what follows the padding is the first generated token of every row."""
    batch = models.right_padded([models.tokens(1, 6)[0], models.tokens(1, 3)[0]])
    cache, mask = DynamicCache(config=model.config), batch["attention_mask"]
    with fs.steer(model, fs.Add(d(), positions="[-1:1]", **HERE)):
        touched = Touched(model)
        logits(model, batch["input_ids"], attention_mask=mask, **models.cached(model, cache))
        for step in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            at = mask.sum(1, keepdim=True) - 1
            logits(
                model,
                models.tokens(2, 1, seed=step),
                attention_mask=mask,
                **models.cached(model, cache),
                position_ids=at,
            )
    assert touched.tokens()[0].int().tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
    assert touched.tokens()[1, [0, 1, 2, 6, 7]].int().tolist() == [0, 0, 1, 1, 0]


def test_positions_with_a_sliding_window():
    """A cache that forgets still counts its columns."""
    model, ids = models.build("mistral", sliding_window=4), models.tokens(2, 6)
    with fs.steer(model, fs.Add(d(), positions="[-1:3]", **HERE)):
        touched = Touched(model, "mistral")
        generate(model, ids, 6)
    assert touched.tokens()[0].int().tolist() == [0] * 5 + [1, 1, 1, 1] + [0, 0]


def test_a_conversation_goes_on_with_its_cache(model):
    """The prompt of the second turn ends where its input ends."""
    ids, cache = models.tokens(1, 5), DynamicCache(config=model.config)
    with fs.steer(model, fs.Add(d(), positions="[-1:1]", **HERE)):
        first = model.generate(ids, **models.cached(model, cache), max_new_tokens=3, do_sample=False)
        second = torch.cat([first, models.tokens(1, 4, seed=9)], 1)
        touched = Touched(model)
        model.generate(second, **models.cached(model, cache), max_new_tokens=3, do_sample=False)
    assert touched.tokens()[0].int().tolist() == [0] * (second.shape[1] - 7 - 1) + [1, 1, 0]


def test_embeddings_as_input(model, ids):
    plan = rich_plan("llama")
    with fs.steer(model, plan):
        expected = generate(model, ids)
        out = model.generate(
            inputs_embeds=model.get_input_embeddings()(ids),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, expected[0])
        close(torch.stack(out.logits, 1), expected[1])
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits(model, ids))


def test_set_prompt_per_row(model, ids):
    with fs.steer(model, fs.Add(d(), positions="last", **HERE)) as steering:
        steering.set_prompt([2, 4, 6])
        touched = Touched(model)
        logits(model, ids)
        assert touched.tokens().int().argmax(1).tolist() == [1, 3, 5]
        with pytest.raises(
            ValueError,
            match="batch has 2 rows, but set_prompt was given 3 numbers: give one for all rows or one per row",
        ):
            logits(model, ids[:2])
        steering.set_prompt(None)
        touched = Touched(model)
        logits(model, ids)
        assert touched.tokens().int().argmax(1).tolist() == [5, 5, 5]


@pytest.mark.parametrize("columns", [2.5, -1, "3", True, [2, 3.5], [], [[1, 2, 3]]], ids=repr)
def test_set_prompt_takes_numbers_of_columns(model, columns):
    steering = fs.steer(model, fs.Plan())
    with pytest.raises(ValueError, match=r"set_prompt was given .*: expected a whole number of columns from 0 on"):
        steering.set_prompt(columns)


def test_plans_from_an_iterator(model, ids):
    plan = fs.Plan([fs.Add(d(), 2.0, layers=0)])
    with fs.steer(model, [plan, None, plan]):
        expected = logits(model, ids)
    with fs.steer(model, iter([None, None, plan])) as steering:
        assert not torch.equal(logits(model, ids), expected)
        steering.assign(iter([plan, None, plan]))
        assert torch.equal(logits(model, ids), expected)


def test_what_is_no_capacity(model):
    with pytest.raises(TypeError, match=r"capacity is a int: expected faststeer\.Capacity"):
        fs.steer(model, fs.Plan(), capacity=5)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_tokens_without_a_batch_are_refused(model, shape):
    with fs.steer(model, fs.Add(d(), **HERE)), pytest.raises(ValueError, match=r"expected \[batch, tokens\]"):
        model(torch.ones(shape, dtype=torch.int64))


def test_the_default_device_is_of_no_matter(ids):
    """Scripts set it to the GPU; here to one where nothing can be computed."""
    plan = fs.Plan([fs.Add(d(), positions="last", **HERE), fs.Ablate(d(1), layers="all", when=fs.Gate(d(2), 0.0))])
    with torch.no_grad(), fs.steer(models.build("llama"), [plan, None, plan]) as steering:
        expected = steering.model(ids).logits
    model = models.build("llama")
    with torch.device("meta"), torch.no_grad(), fs.steer(model, [plan, None, plan]):
        assert torch.equal(model(ids).logits, expected)


def test_a_pass_over_what_is_no_sequence_is_refused(model):
    with fs.steer(model, fs.Add(d(), **HERE)), pytest.raises(ValueError, match="given attention_mask: expected input_"):
        model.model(attention_mask=torch.ones(1, 4))


def test_set_prompt_holds_again_after_generate(model, ids):
    with fs.steer(model, fs.Add(d(), positions="last", **HERE)) as steering:
        steering.set_prompt(2)
        generate(model, ids)
        touched = Touched(model)
        logits(model, ids)
    assert touched.tokens().int().argmax(1).tolist() == [1, 1, 1]


def test_each_layer_takes_its_own_direction(model, ids):
    v = fs.SteeringVector({0: d(1), 1: d(2)}, at="attn_out")
    with (
        hand_hook(model, "llama", "attn_out", 0, lambda x: x + 2.0 * d(1)),
        hand_hook(model, "llama", "attn_out", 1, lambda x: x + 2.0 * d(2)),
    ):
        both = logits(model, ids)
    with hand_hook(model, "llama", "attn_out", 1, lambda x: x + 2.0 * d(2)):
        last = logits(model, ids)
    with fs.steer(model, fs.Add(v, 2.0)):
        assert torch.equal(logits(model, ids), both)
    with fs.steer(model, fs.Add(v, 2.0, layers=-1)):
        assert torch.equal(logits(model, ids), last)


# Gates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_a_gate_decides_for_every_token(model, ids, kind, above):
    gate = fs.Gate(d(1), 0.02, kind=kind, above=above)
    with fs.steer(model, fs.Add(d(), when=gate, **HERE)):
        touched = Touched(model)
        generate(model, ids)
    values = touched.values() @ d(1)
    if kind == "cosine":
        values = values / touched.values().norm(dim=-1) / d(1).norm()
    assert torch.equal(touched.tokens(), (values > 0.02) == above)
    assert 0.2 < touched.tokens().float().mean() < 0.8, "some open, some closed, or nothing is shown"


@pytest.mark.parametrize(
    "where",
    [{}, {"layer": 0, "at": "resid_pre"}, {"layer": 0, "at": "mlp_out"}],
    ids=["where_it_acts", "resid_pre_0", "mlp_out_0"],
)
@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 4}, {"use_cache": False}], ids=["", "chunks", "no_cache"])
def test_a_latched_gate_decides_once_per_row(model, where, more):
    """Four rows, the last of them without the plan: the verdict on the last prompt token holds from there on."""
    ids, new = models.tokens(4, PROMPT, seed=3), 4
    at, layer = where.get("at", "attn_out"), where.get("layer", 1)
    with read(model, at=at, layers=[layer], tokens=[-1]) as seen:
        logits(model, ids)
    values = seen[layer][:, 0] @ d(1)
    threshold = float(values[:3].sort().values[1:].mean())  # between the second and the third
    threshold = float((values[:3].sort().values[1] + values[:3].sort().values[2]) / 2)
    plan = fs.Plan([fs.Add(d(), when=fs.Gate(d(1), threshold, latched=True, **where), **HERE)])
    with fs.steer(model, [plan, plan, plan, None]):
        touched = Touched(model)
        generate(model, ids, new, **more)
    tokens = touched.tokens()
    if more.get("use_cache") is False:  # the last pass has them all
        tokens = tokens[:, -(PROMPT + new - 1) :]
    for row in range(4):
        opened = row < 3 and bool(values[row] > threshold)
        assert tokens[row].tolist() == [False] * (PROMPT - 1) + [opened] * new
    assert 0 < int((values[:3] > threshold).sum()) < 3


def test_a_plan_assigned_after_the_prompt_is_undecided(model, ids):
    plan = fs.Plan([fs.Add(d(), when=fs.Gate(d(1), -1e6, latched=True), **HERE)])
    with fs.steer(model, fs.Plan()) as steering:
        touched = Touched(model)
        generate(model, ids, logits_processor=[AtStep(1, lambda: steering.assign(plan))])
        assert not touched.tokens().any()
        touched = Touched(model)
        generate(model, ids)
        assert touched.tokens()[:, PROMPT - 1 :].all(), "the next prompt is decided"


# Watching -------------------------------------------------------------------------------------------------------------


@SOME
def test_projections_are_what_read_sees(name):
    model, ids = models.model(name), models.tokens(2, PROMPT)
    points, subspace = models.points(name), torch.stack([d(1), 3 * d(2)])
    with fs.steer(
        model, fs.Plan([fs.Add(d(), 2.0, layers=0, at="resid_pre"), fs.Probe(subspace, layers="all", at=points)])
    ) as steering:
        for at in points:
            with read(model, at=at) as seen:
                logits(model, ids)
            unit = torch.nn.functional.normalize(subspace, dim=1)
            for layer in range(models.N_LAYERS):
                key = (at, layer) if at != "resid_post" or layer == models.N_LAYERS - 1 else ("resid_pre", layer + 1)
                found = steering.projections[key]
                assert found.shape == (2, PROMPT, 2) and found.dtype == torch.float32
                torch.testing.assert_close(found, seen[layer].view(2, PROMPT, -1) @ unit.T)
            steering.clear_projections()
        assert not steering.projections


def test_projections_of_every_token_generated(model, ids):
    with fs.steer(model, fs.Ablate(d(), layers="all", at="resid_pre", probe=True)) as steering:
        generate(model, ids, NEW)
        found = steering.projections
        assert set(found) == {("resid_pre", 0), ("resid_pre", 1)}
        assert all(t.shape == (3, PROMPT + NEW - 1, 1) for t in found.values())
        logits(model, ids)
        assert steering.projections["resid_pre", 0].shape == (3, 2 * PROMPT + NEW - 1, 1)
        assert torch.equal(
            steering.projections["resid_pre", 0][:, :PROMPT], steering.projections["resid_pre", 0][:, -PROMPT:]
        )
        logits(model, ids[:2])
        with pytest.raises(ValueError, match=r"different batch sizes were probed: call clear_projections\(\) between"):
            steering.projections  # noqa: B018


def test_projections_of_rows_with_different_probes(model, ids):
    one, two = fs.Plan([fs.Probe(d(1), **HERE)]), fs.Plan([fs.Probe(torch.stack([d(2), d(3)]), **HERE)])
    with fs.steer(model, [one, two, None]) as steering, read(model, at="attn_out", layers=[1]) as seen:
        logits(model, ids)
    found, unit = (
        steering.projections["attn_out", 1],
        torch.nn.functional.normalize(torch.stack([d(1), d(2), d(3)]), dim=1),
    )
    torch.testing.assert_close(found[0, :, 0], seen[1][0] @ unit[0])
    torch.testing.assert_close(found[1], seen[1][1] @ unit[1:].T)
    assert not found[0, :, 1].any() and not found[2].any()


def test_hidden_states_are_the_steered_ones(model, ids):
    with torch.no_grad(), fs.steer(model, fs.Add(d(), 2.0, layers=(0, 1), at=("resid_pre", "resid_post"))):
        states = model(ids, output_hidden_states=True).hidden_states
        with read(model, at="resid_pre") as pre, read(model, at="resid_post") as post:
            model(ids)
    embedded = model.get_input_embeddings()(ids)
    # transformers captures what enters the first layer before a hook can change it there, and what leaves a layer
    # after it.
    assert torch.equal(pre[0], embedded + 2.0 * d())
    assert torch.equal(states[0], pre[0])
    assert torch.equal(states[1], pre[1]) and torch.equal(states[1], post[0])
    assert torch.equal(states[2], model.model.norm(post[1]))


def test_hooks_of_the_user_keep_working(model, ids):
    """They see the steered stream, may change it further, and are still there afterwards."""
    layer, seen = model.model.layers[0], []
    add = fs.Add(d(), 2.0, layers=0)
    with fs.steer(model, add), read(model, at="resid_post", layers=[0]) as steered:
        logits(model, ids)
    with layer.register_forward_hook(lambda _m, _a, output: seen.append(output.clone())):
        with layer.register_forward_hook(lambda _m, _a, output: output + d(5)), fs.steer(model, add):
            both = logits(model, ids)
            assert torch.equal(seen[-1], steered[0])
        plain = logits(model, ids)
        assert torch.equal(seen[-1], steered[0] - 2.0 * d()) or not torch.equal(seen[-1], steered[0])
    with fs.steer(model, fs.Plan([add, fs.Add(d(5), layers=0)])):
        torch.testing.assert_close(both, logits(model, ids))
    assert not torch.equal(both, plain) and len(seen) == 2


def test_a_model_that_the_user_steers_already(ids):
    """Hook points are found, and ours come first, on a model that has a hook which changes its layers."""
    model = models.build("llama")
    handle = model.model.layers[0].register_forward_hook(lambda _m, _a, output: output + d(5))
    with fs.steer(model, fs.Add(d(), 2.0, layers=0)):
        both = logits(model, ids)
    handle.remove()
    with fs.steer(model, fs.Plan([fs.Add(d(), 2.0, layers=0), fs.Add(d(5), layers=0)])):
        torch.testing.assert_close(both, logits(model, ids))


# Sampling -------------------------------------------------------------------------------------------------------------


def test_sampling_with_a_seed(model, ids):
    def sample() -> Tensor:
        torch.manual_seed(5)
        return model.generate(ids, do_sample=True, temperature=0.7, max_new_tokens=8)

    plain = sample()
    with hand_hook(model, "llama", "resid_post", 0, lambda x: x + 2.0 * d()):
        expected = sample()
    with fs.steer(model, fs.Add(d(), 2.0, layers=0)):
        assert torch.equal(sample(), expected)
    with fs.steer(model, [None] * 3):
        assert torch.equal(sample(), plain)
    assert not torch.equal(plain, expected)


def test_return_sequences_share_the_plan_of_their_prompt(model, ids):
    with fs.steer(
        model, [fs.Plan([fs.Add(d(), **HERE)]), None, fs.Plan([fs.Add(d(1), positions="generated", **HERE)])]
    ):
        touched = Touched(model)
        out = model.generate(ids, do_sample=True, num_return_sequences=2, max_new_tokens=4)
    assert out.shape[0] == 6
    tokens = touched.tokens().int()
    assert tokens.tolist() == [[1] * 9] * 2 + [[0] * 9] * 2 + [[0] * 6 + [1] * 3] * 2


def test_beams_and_return_sequences(model, ids):
    with fs.steer(model, [rich_plan("llama"), None, rich_plan("llama", 1)]):
        out = model.generate(ids, num_beams=4, num_return_sequences=2, max_new_tokens=4, do_sample=False)
    for row, plan in enumerate([rich_plan("llama"), fs.Plan(), rich_plan("llama", 1)]):
        with fs.steer(model, plan):
            alone = model.generate(
                ids[row : row + 1], num_beams=4, num_return_sequences=2, max_new_tokens=4, do_sample=False
            )
        assert torch.equal(out[2 * row : 2 * row + 2], alone)


# Changing plans -------------------------------------------------------------------------------------------------------


class AtStep(LogitsProcessor):
    """Does something between two tokens."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act, self.calls = step, act, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.calls == self.step:
            self.act()
        self.calls += 1
        return scores


class TestAssign:
    a, b = fs.Plan([fs.Add(d(), **HERE)]), fs.Plan([fs.Ablate(d(1), layers=0, at="resid_pre"), fs.Add(d(1), **HERE)])

    def test_from_the_next_forward_pass_on(self, model, ids):
        with fs.steer(model, self.a) as steering:
            first = logits(model, ids)
            steering.assign(self.b)
            second = logits(model, ids)
            steering.assign([None, self.a, self.b])
            mixed = logits(model, ids)
            steering.assign(fs.Plan())
            none = logits(model, ids)
        plain = logits(model, ids)
        assert torch.equal(none, plain)
        assert torch.equal(mixed, torch.stack([plain[0], first[1], second[2]]))
        with fs.steer(model, self.b):
            assert torch.equal(second, logits(model, ids))

    @pytest.mark.parametrize(
        ("start", "later", "expected"),
        [
            ("nothing", lambda self: self.a, [[0, 0, 1, 1]] * 3),
            ("nothing", lambda self: [self.a, None, self.b], [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]),
            ("rows", lambda self: [self.a, None, self.b], [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]),
            ("a", lambda self: fs.Plan(), [[1, 1, 0, 0]] * 3),
            ("a", lambda self: [None, self.a, None], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
        ],
        ids=["on", "on_for_some", "from_rows", "off", "off_for_some"],
    )
    def test_while_generating_from_the_next_token_on(self, model, ids, start, later, expected):
        """Called after the second token was chosen: the pass of that token is the first with the new plans. Columns: r
        = -1, 0, 1, 2."""
        plans = {"nothing": fs.Plan(), "rows": [None] * 3, "a": self.a}[start]
        with fs.steer(model, plans) as steering:
            touched = Touched(model)
            generate(model, ids, 4, logits_processor=[AtStep(1, lambda: steering.assign(later(self)))])
        assert touched.tokens()[:, PROMPT - 1 :].int().tolist() == expected

    def test_while_generating_with_beams(self, model, ids):
        with fs.steer(model, [self.a, None, None]) as steering:
            touched = Touched(model)
            model.generate(
                ids,
                num_beams=2,
                max_new_tokens=4,
                do_sample=False,
                logits_processor=[AtStep(1, lambda: steering.assign([None, None, self.a]))],
            )
        expected = [[1, 1, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
        assert touched.tokens()[:, PROMPT - 1 :].int().tolist() == expected

    def test_a_latched_row_whose_plan_stays_keeps_its_verdict(self, model, ids):
        """Its plan was assigned before its prompt: what other rows get meanwhile is nothing to it."""
        latched = fs.Plan([fs.Add(d(), when=fs.Gate(d(1), -1e6, latched=True), **HERE)])
        with fs.steer(model, [latched, None, latched]) as steering:
            touched = Touched(model)
            generate(model, ids, 4, logits_processor=[AtStep(1, lambda: steering.assign([latched, self.a, None]))])
        assert touched.tokens()[:, PROMPT - 1 :].int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]

    def test_addresses_stay(self, model, ids):
        """Contract 6 in spirit: what a captured graph would read is where it was."""

        def addresses() -> list[int]:
            return [table.data_ptr() for table in steering.tables]

        with fs.steer(model, [self.a, None, self.b]) as steering:
            logits(model, ids)
            before = addresses()
            for plans in ([None, self.b, self.a], [rich_plan("llama"), self.a, self.b], [None] * 3):
                steering.assign(plans)
                logits(model, ids)
                assert addresses() == before

    def test_another_number_of_rows(self, model, ids):
        with fs.steer(model, [self.a, None, self.b]) as steering:
            steering.assign([self.b, None])
            two = logits(model, ids[:2])
            steering.assign(self.b)
            assert torch.equal(logits(model, ids[:2])[0], two[0])

    def test_before_entering(self, model, ids):
        steering = fs.steer(model, self.a)
        steering.assign(self.b)
        with steering:
            steered = logits(model, ids)
        with fs.steer(model, self.b):
            assert torch.equal(steered, logits(model, ids))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (lambda: fs.Add(d(), layers=2), "layer 2 is out of range"),
            (lambda: [fs.Add(d(), layers=0), fs.Add(torch.ones(8), layers=0), None], "hidden size 8, the model has 32"),
            (lambda: [fs.Add(d(i), layers=0) for i in range(9)], r"capacity exceeded.*Capacity\(slots=\.\.\.\)"),
            (lambda: fs.Ablate(torch.randn(25, 32), layers=0), r"capacity exceeded.*Capacity\(vectors=\.\.\.\)"),
            (lambda: [fs.Add(d(i), layers="all") for i in range(3)] * 10, "capacity exceeded|rows"),
            (lambda: [None, 3, None], r"plans\[1\] is a int: expected a Plan, an intervention, or None"),
            (lambda: [], "list of plans is empty: give one Plan or None per row"),
            (lambda: None, "plans is a NoneType: expected a Plan or a list with one Plan or None per row of the batch"),
            (lambda: "plan", "plans is a str"),
        ],
        ids=["layer", "hidden", "slots", "vectors", "many", "type", "empty", "None", "str"],
    )
    def test_refused_and_nothing_changed(self, model, ids, bad, message):
        with fs.steer(model, [self.a, None, self.b], capacity=fs.Capacity(slots=8, vectors=24, entries=12)) as steering:
            before, hooks = logits(model, ids), hooks_of(model)
            with pytest.raises((ValueError, TypeError), match=message):
                steering.assign(bad())
            assert torch.equal(logits(model, ids), before)
            assert hooks_of(model) == hooks


def test_assigning_a_point_the_model_does_not_have_changes_nothing():
    model, ids = models.build("neox_parallel"), models.tokens(2, 4)
    good, bad = (
        fs.Add(d(), layers=0),
        fs.Plan([fs.Add(d(), layers=0, at="attn_out"), fs.Add(d(1), layers=1, at="resid_mid")]),
    )
    with fs.steer(model, good) as steering:
        before, hooks = logits(model, ids), hooks_of(model)
        with pytest.raises(
            ValueError,
            match="attn_out, mlp_out, resid_post; no layer has it, as attention and MLP run in parallel",
        ):
            steering.assign(bad)
        assert torch.equal(logits(model, ids), before)
        assert hooks_of(model) == hooks


# Entering and leaving -------------------------------------------------------------------------------------------------


class TestContexts:
    add, wipe = fs.Add(d(), 3.0, layers=0), fs.Ablate(d(), layers=0)

    @pytest.mark.parametrize("where", ["in the block", "in a layer", "in generate"])
    def test_an_exception_inside(self, ids, where):
        model = models.build("llama")
        fs.hf.find_hook_points(model)
        before, plain = hooks_of(model), logits(model, ids)

        def fail(*_args):
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"), fs.steer(model, rich_plan("llama")):
            if where == "in the block":
                fail()
            elif where == "in a layer":
                with model.model.layers[1].register_forward_pre_hook(fail):
                    logits(model, ids)
            else:
                generate(model, ids, logits_processor=[AtStep(1, fail)])
        assert hooks_of(model) == before
        assert torch.equal(logits(model, ids), plain)

    def test_a_failed_pass_leaves_no_trace_in_the_next(self, model, ids):
        def fail(*_args):
            raise RuntimeError("stop")

        with fs.steer(model, rich_plan("llama")):
            expected, generated = logits(model, ids), generate(model, ids)
            with pytest.raises(RuntimeError, match="stop"):
                generate(model, ids[:2], logits_processor=[AtStep(1, fail)])
            assert torch.equal(logits(model, ids), expected)
            assert torch.equal(generate(model, ids)[1], generated[1])

    def test_a_plan_that_does_not_fit_is_refused_before_the_model_is_touched(self):
        """By steer(...) itself, not on entering."""
        model = models.build("neox_parallel")
        fs.hf.find_hook_points(model)
        before = hooks_of(model)
        with pytest.raises(ValueError, match="attention and MLP run in parallel"):
            fs.steer(
                model, fs.Plan([fs.Add(d(), layers=0, at="attn_out"), fs.Add(d(), layers=0, at="resid_mid")])
            ).__enter__()
        assert hooks_of(model) == before
        with pytest.raises(ValueError, match="attention and MLP run in parallel"):
            fs.steer(model, fs.Add(d(), layers=0, at="resid_mid"))

    def test_nested_contexts_act_in_the_order_of_entering(self, model, ids):
        with fs.steer(model, self.add), fs.steer(model, self.wipe):
            add_then_wipe = logits(model, ids)
        with fs.steer(model, self.wipe), fs.steer(model, self.add):
            wipe_then_add = logits(model, ids)
        with fs.steer(model, fs.Plan([self.add, self.wipe])):
            torch.testing.assert_close(add_then_wipe, logits(model, ids), rtol=1e-5, atol=1e-4)
        with fs.steer(model, fs.Plan([self.wipe, self.add])):
            torch.testing.assert_close(wipe_then_add, logits(model, ids), rtol=1e-5, atol=1e-4)
        assert far(add_then_wipe, wipe_then_add)

    def test_nested_contexts_keep_their_order_when_plans_change(self, model, ids):
        """The outer one acts first also where it had nothing to do when it was entered."""
        with fs.steer(model, fs.Plan()) as outer, fs.steer(model, self.wipe):
            outer.assign(self.add)
            later = logits(model, ids)
        with fs.steer(model, self.add), fs.steer(model, self.wipe):
            assert torch.equal(later, logits(model, ids))

    def test_nested_contexts_with_plans_per_row(self, model, ids):
        with fs.steer(model, [self.add, None, self.add]), fs.steer(model, [None, self.wipe, self.wipe]):
            nested = generate(model, ids)
        for row, plan in enumerate(([self.add], [self.wipe], [self.add, self.wipe])):
            with fs.steer(model, fs.Plan(plan)):
                close((nested[0][row], nested[1][row]), tuple(t[row] for t in generate(model, ids)))

    def test_steering_with_named_points_inside_another(self, model, ids):
        """Confirming them runs the model: the outer context's rows, probes and prompts are not disturbed by it."""
        points = fs.HookPoints(
            layers="model.layers", attn_out="self_attn", mlp_out="mlp", resid_mid="post_attention_layernorm"
        )
        with fs.steer(model, [fs.Plan([self.add, fs.Probe(d(2), layers=1)]), None, None]) as outer:
            expected = logits(model, ids)
            with fs.steer(model, fs.Plan(), hook_points=points):
                assert torch.equal(logits(model, ids), expected)
            assert all(t.shape[:2] == (3, 2 * PROMPT) for t in outer.projections.values())

    @pytest.mark.parametrize("first_out", ["outer", "inner"])
    def test_left_in_any_order(self, ids, first_out):
        model = models.build("llama")
        fs.hf.find_hook_points(model)
        before, plain = hooks_of(model), generate(model, ids)
        contexts = {
            "outer": fs.steer(model, self.add),
            "inner": fs.steer(model, fs.Ablate(d(1), positions="generated", layers=1)),
        }
        for context in contexts.values():
            context.__enter__()
        contexts.pop(first_out).__exit__(None, None, None)
        (stays,) = contexts.values()
        left = generate(model, ids)
        stays.__exit__(None, None, None)
        with fs.steer(model, self.add if first_out == "inner" else fs.Ablate(d(1), positions="generated", layers=1)):
            assert torch.equal(left[1], generate(model, ids)[1])
        assert hooks_of(model) == before and torch.equal(generate(model, ids)[1], plain[1])

    def test_two_models_at_once(self, ids):
        one, two = models.model("llama"), models.model("gpt2")
        alone = []
        for model, plan in ((one, self.add), (two, self.wipe)):
            with fs.steer(model, plan):
                alone.append(generate(model, ids))
        with fs.steer(one, self.add), fs.steer(two, self.wipe):
            for model, expected in zip((one, two), alone, strict=True):
                assert torch.equal(generate(model, ids)[1], expected[1])

    def test_entered_again(self, model, ids):
        steering = fs.steer(model, self.add)
        with steering:
            first = logits(model, ids)
            with pytest.raises(RuntimeError, match="active already: make another one to nest"):
                steering.__enter__()
        plain = logits(model, ids)
        with steering:
            assert torch.equal(logits(model, ids), first)
        assert torch.equal(logits(model, ids), plain)

    def test_a_generate_of_the_user_comes_back(self, ids):
        model, calls = models.build("llama"), []
        original = model.generate

        def own(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        model.generate = own
        with fs.steer(model, fs.Add(d(), positions="last", **HERE)):
            touched = Touched(model)
            model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
        assert touched.tokens().int().tolist() == [[0] * 5 + [1, 0]] * 3
        assert calls == [1] and model.__dict__["generate"] is own

    def test_a_model_without_generate(self, model, ids):
        base = models.build("llama").model
        with torch.no_grad(), fs.steer(base, self.add):
            assert torch.isfinite(base(ids).last_hidden_state).all()
        assert "generate" not in base.__dict__

    def test_what_it_says_of_itself(self, model):
        with fs.backend("auto"):
            steering = fs.steer(model, self.add, path="hooks")
            assert (steering.path, steering.backend, steering.why) == ("hooks", "cpu", "path='hooks' was chosen")
            steering = fs.steer(model, self.add, path="fused")
            assert (steering.path, steering.backend, steering.why) == ("fused", "cpu", "")
        with fs.backend("reference"):
            assert steering.backend == "reference"


class TestBatches:
    plans = (fs.Plan([fs.Add(d(), layers=0)]), None)
    message = "batch has 3 rows, but there are 2 plans: give one plan per row, in order, or a single plan for all rows"

    def test_wrong_number_of_rows_in_a_pass(self, model, ids):
        with fs.steer(model, self.plans):
            with pytest.raises(ValueError, match=self.message):
                logits(model, ids)
            assert torch.isfinite(logits(model, ids[:2])).all()

    @pytest.mark.parametrize(
        "more",
        [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}],
        ids=["greedy", "beams", "sequences"],
    )
    def test_wrong_number_of_rows_in_generate(self, model, ids, more):
        with fs.steer(model, self.plans):
            with pytest.raises(ValueError, match=self.message):
                model.generate(ids, max_new_tokens=2, **more)
            with pytest.raises(ValueError, match="batch has 4 rows, but there are 2 plans"):
                model.generate(models.tokens(4, 3), max_new_tokens=2, **more)
            assert model.generate(ids[:2], max_new_tokens=2).shape == (2, PROMPT + 2)

    def test_a_layer_alone_is_refused(self, model):
        message = r"outside the model's forward pass.*use faststeer\.hook\(\.\.\.\)"
        with fs.steer(model, fs.Add(d(), layers=0, at="mlp_out")), pytest.raises(RuntimeError, match=message):
            model.model.layers[0].mlp(torch.zeros(1, 2, 32))


class TestRefused:
    @pytest.mark.parametrize(
        ("plans", "message"),
        [
            (
                lambda: fs.Add(torch.ones(31), layers=0),
                "Add: a direction has hidden size 31, the model has 32: was it found in another model",
            ),
            (
                lambda: fs.Add(d(), layers=2),
                r"Add: layer 2 is out of range: the model has layers 0\.\.1 \(or -2\.\.-1\)",
            ),
            (lambda: fs.Ablate(torch.zeros(32), layers=0), "Ablate's direction is zero"),
            (
                lambda: fs.Ablate(torch.stack([d(), d()]), layers=0),
                "Ablate's direction: the directions are linearly dependent",
            ),
            (lambda: fs.Add(d()), "needs layers="),
            (lambda: fs.Add(fs.SteeringVector({5: d()})), "layer 5 is out of range"),
            (lambda: [fs.Plan([fs.Add(d(), layers=0)]), "x"], r"plans\[1\] is a str"),
            (lambda: [], "list of plans is empty"),
            (lambda: None, "expected a Plan or a list"),
            (lambda: 3, "expected a Plan or a list"),
        ],
        ids=["hidden", "layer", "zero", "dependent", "no_layers", "vector_layer", "type", "empty", "None", "int"],
    )
    def test_plans(self, model, plans, message):
        before = hooks_of(model)
        with pytest.raises((ValueError, TypeError), match=message):
            fs.steer(model, plans())
        assert hooks_of(model) == before

    @pytest.mark.parametrize(
        ("capacity", "message"),
        [
            (
                fs.Capacity(slots=1, vectors=9, entries=9),
                r"2 different plans, 1 slots: use a larger Capacity\(slots=\.\.\.\)",
            ),
            (fs.Capacity(slots=2, vectors=2, entries=9), r"do not fit into 2 .*Capacity\(vectors=\.\.\.\)"),
            (
                fs.Capacity(slots=2, vectors=9, entries=1),
                r"needs 2 entries, a slot holds 1: use a larger Capacity\(entries=\.\.\.\)",
            ),
        ],
        ids=["slots", "vectors", "entries"],
    )
    def test_capacity(self, model, capacity, message):
        plans = [fs.Plan([fs.Add(d(), layers="all")]), fs.Plan([fs.Ablate(torch.stack([d(1), d(2)]), layers=0)])]
        with pytest.raises(ValueError, match=message):
            fs.steer(model, plans, capacity=capacity)


# Gradients ------------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, ids: Tensor, plans: Any) -> Tensor:
    with fs.steer(model, plans):
        return model(ids).logits.pow(2).mean()


class TestGradients:
    def test_match_finite_differences(self):
        """Of a direction and a coefficient, through a whole model in fp64. Both are on a grid that fp32 holds exactly,
        since the tables are fp32."""
        model, ids, step = models.build("gpt2").double(), models.tokens(2, 4), 2.0**-12
        v = (d() * 64).round().div(64).double().requires_grad_()
        c = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

        def loss(v: Tensor, c: Tensor) -> Tensor:
            return loss_of(
                model, ids, fs.Plan([fs.Add(v, c, layers=0, at="resid_mid"), fs.Add(v, layers=1, positions="[-2:]")])
            )

        loss(v, c).backward()
        with torch.no_grad():
            for i in (0, 7, 31):
                move = step * torch.eye(32, dtype=torch.float64)[i]
                slope = (loss((v + move).requires_grad_(), c) - loss((v - move).requires_grad_(), c)) / (2 * step)
                torch.testing.assert_close(v.grad[i], slope, rtol=1e-4, atol=1e-7)
            slope = (loss(v, (c + step).requires_grad_()) - loss(v, (c - step).requires_grad_())) / (2 * step)
            torch.testing.assert_close(c.grad, slope, rtol=1e-4, atol=1e-7)

    @SOME
    @pytest.mark.parametrize(
        ("kind", "by_hand"),
        [
            (lambda v, w, **at: fs.Ablate(v, **at), "ablated"),
            (lambda v, w, **at: fs.Clamp(v, low=-0.5, high=0.5, **at), "clamped"),
            (lambda v, w, **at: fs.Rotate(v, w, 60.0, relative=True, **at), "rotated"),
            (lambda v, w, **at: fs.Add(v, 2.0, keep_norm=True, **at), "added_keeping_norm"),
            (lambda v, w, **at: fs.Add(v, 2.0, when=fs.Gate(w.detach(), kind="cosine"), **at), "gated"),
            (lambda v, w, **at: fs.Project(v, **at), "projected"),
        ],
        ids=["ablate", "clamp", "rotate", "keep_norm", "gate", "project"],
    )
    def test_are_those_of_hooks_written_by_hand(self, name, kind, by_hand):
        import test_architectures

        model, ids, formula = models.model(name), models.tokens(2, 4), getattr(test_architectures, by_hand)
        for at in ("attn_out", "resid_mid", "resid_post"):
            if at not in models.points(name):
                continue
            v, w, v2, w2 = (d(i).requires_grad_() for i in (1, 2, 1, 2))
            extra = [w] if by_hand in ("rotated", "gated") else []
            with hand_hook(model, name, at, 0, lambda x, v=v, extra=extra: formula(v, *extra, x)):
                model(ids).logits.pow(2).mean().backward()
            loss_of(model, ids, kind(v2, w2, layers=0, at=at)).backward()
            torch.testing.assert_close(v2.grad, v.grad, rtol=1e-3, atol=1e-4 * float(v.grad.abs().max()))
            if by_hand == "rotated":
                torch.testing.assert_close(w2.grad, w.grad, rtol=1e-3, atol=1e-4 * float(w.grad.abs().max()))

    def test_through_a_one_sided_clamp(self, model, ids):
        v = d().requires_grad_()
        loss_of(model, ids, fs.Clamp(v, low=0.5, layers=0)).backward()
        assert torch.isfinite(v.grad).all() and v.grad.any()

    def test_only_where_they_act(self, model, ids):
        """A plan of one row, or of tokens behind those that the loss sees, gets none from the others."""
        one, two = d(1).requires_grad_(), d(2).requires_grad_()
        with fs.steer(model, [fs.Plan([fs.Add(one, layers=0)]), fs.Plan([fs.Add(two, layers=0)]), None]):
            model(ids).logits[0].pow(2).mean().backward()
        assert one.grad.any() and (two.grad is None or not two.grad.any())

    def test_two_plans_that_start_equal(self, model, ids):
        """Trained from one starting point, each gets the gradient of its own row."""
        one, two = (torch.zeros(32, requires_grad=True) for _ in range(2))
        with fs.steer(model, [fs.Plan([fs.Add(one, layers=0)]), fs.Plan([fs.Add(two, layers=0)]), None]):
            (model(ids).logits[0].pow(2).mean() + 3 * model(ids).logits[1].pow(2).mean()).backward()
        alone = torch.zeros(32, requires_grad=True)
        with fs.steer(model, fs.Add(alone, layers=0)):
            (3 * model(ids).logits[1].pow(2).mean()).backward()
        assert two.grad is not None, "the second plan's gradient went to the first"
        torch.testing.assert_close(two.grad, alone.grad)
        assert not torch.equal(one.grad, two.grad)

    def test_a_step_of_training_takes_effect(self, model, ids):
        v = torch.zeros(32, requires_grad=True)
        optimizer = torch.optim.SGD([v], lr=0.5)
        with fs.steer(model, fs.Add(v, layers=0)):
            losses = []
            for _ in range(4):
                optimizer.zero_grad()
                losses.append(model(ids).logits.pow(2).mean())
                losses[-1].backward()
                optimizer.step()
            with torch.no_grad():
                trained = model(ids).logits
        assert all(after < before for before, after in itertools.pairwise(losses))
        with hand_hook(model, "llama", "resid_post", 0, lambda x: x + v):
            torch.testing.assert_close(trained, logits(model, ids))

    def test_a_trained_coefficient_warns_of_nothing(self, model, ids, recwarn):
        loss_of(model, ids, fs.Add(d(), torch.tensor(2.0, requires_grad=True), layers=0)).backward()
        assert not [w for w in recwarn if "requires_grad" in str(w.message)]

    def test_of_the_weights(self, ids):
        """Steering is part of the forward pass that is trained."""
        grads = []
        for steered in (True, False):
            model = models.build("gpt2").requires_grad_(True)
            if steered:
                loss_of(
                    model,
                    ids,
                    fs.Plan([fs.Add(d(), 2.0, layers=0, at="resid_mid"), fs.Add(d(1), layers=1, at="mlp_out")]),
                ).backward()
            else:
                with (
                    hand_hook(model, "gpt2", "resid_mid", 0, lambda x: x + 2.0 * d()),
                    hand_hook(model, "gpt2", "mlp_out", 1, lambda x: x + d(1)),
                ):
                    model(ids).logits.pow(2).mean().backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
        for name, grad in grads[0].items():
            torch.testing.assert_close(
                grad, grads[1][name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
class TestCheckpointing:
    def run(
        self, name: str, ids: Tensor, checkpointed: bool, plan: Any, **kind: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model = models.build(name).requires_grad_(True).train()
        if checkpointed:
            model.gradient_checkpointing_enable(**kind)
        v = d().requires_grad_()
        with fs.steer(model, plan(v)):
            loss = model(ids, use_cache=False).logits.pow(2).mean()
            loss.backward()
        return loss.detach(), {"v": v.grad} | {key: p.grad for key, p in model.named_parameters()}

    @pytest.mark.parametrize("reentrant", [None, False], ids=["default", "non_reentrant"])
    @pytest.mark.parametrize(
        "plan",
        [
            lambda v: fs.Plan(
                [fs.Add(v.detach(), 2.0, layers="all", at="resid_mid"), fs.Add(v, layers=1, at="resid_mid")]
            ),
            lambda v: fs.Plan([fs.Add(v, 2.0, layers=0, at="attn_out"), fs.Ablate(v, layers=(0, 1))]),
            lambda v: fs.Plan(
                [fs.Add(v, 2.0, layers="all", when=fs.Gate(d(3), latched=True, layer=0, at="resid_pre"))]
            ),
        ],
        ids=["resid_mid", "several", "latched"],
    )
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_equals_no_checkpointing(self, name, ids, plan, reentrant):
        kind = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        plain, checkpointed = self.run(name, ids, False, plan), self.run(name, ids, True, plan, **kind)
        torch.testing.assert_close(checkpointed[0], plain[0])
        for key, grad in plain[1].items():
            torch.testing.assert_close(
                checkpointed[1][key], grad, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )

    REFUSED = "several forward passes before one backward pass.*call backward after each, or switch checkpointing off"

    @pytest.mark.parametrize("at", ["attn_out", "resid_mid", "resid_post"])
    @pytest.mark.parametrize("checkpointed", [(0, 1), (0,), (1,)], ids=str)
    def test_several_passes_are_refused_or_right(self, ids, at, checkpointed):
        """Whichever layers are checkpointed (transformers can leave some out), and whether or not their hooks run
        again."""
        grads = []
        for switched_on in (False, True):
            model = models.build("llama").requires_grad_(True).train()
            if switched_on:
                model.gradient_checkpointing_enable()
                for i, layer in enumerate(model.model.layers):
                    layer.gradient_checkpointing = i in checkpointed
            plan = fs.Plan(
                [
                    fs.Add(d(), 3.0, layers="all", at=at, positions="last"),
                    fs.Ablate(d(1), layers="all", at=at, positions="[:-1]"),
                ]
            )
            with fs.steer(model, plan):
                ends_early = torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)  # other positions in the same shape
                loss = model(ids).logits.pow(2).mean() + model(ids, attention_mask=ends_early).logits.mean()
                try:
                    loss.backward()
                except RuntimeError as error:
                    assert switched_on and "several forward passes before one backward pass" in str(error)
                    return
            grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

    def test_two_passes_over_the_same_embeddings_are_refused_or_right(self, ids):
        """One tensor enters the first layer twice, with prompts that end elsewhere."""
        grads = []
        for switched_on in (False, True):
            model = models.build("llama").requires_grad_(True).train()
            if switched_on:
                model.gradient_checkpointing_enable()
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            ends_early = torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)
            with fs.steer(model, fs.Add(d(), 3.0, layers="all", at="attn_out", positions="last")):
                loss = model(inputs_embeds=embedded).logits.pow(2).mean()
                loss = loss + model(inputs_embeds=embedded, attention_mask=ends_early).logits.pow(2).mean()
                try:
                    loss.backward()
                except RuntimeError as error:
                    assert switched_on and "checkpointing" in str(error)
                    return
            grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

    def test_a_pass_without_gradient_in_between_is_refused_or_right(self, ids):
        """An evaluation between a forward pass and its backward pass."""
        grads = []
        for switched_on in (False, True):
            model = models.build("llama").requires_grad_(True).train()
            if switched_on:
                model.gradient_checkpointing_enable()
            with fs.steer(model, fs.Add(d(), 3.0, layers="all", at="attn_out", positions="last")):
                loss = model(ids).logits.pow(2).mean()
                logits(model, ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]] * 3))
                try:
                    loss.backward()
                except RuntimeError as error:
                    assert switched_on and "several forward passes before one backward pass" in str(error)
                    return
            grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

    def test_one_backward_after_each_pass(self, ids):
        model = models.build("llama").requires_grad_(True).train()
        model.gradient_checkpointing_enable()
        with fs.steer(model, fs.Add(d(), layers=0)):
            for _ in range(3):
                model(ids).logits.mean().backward()

    def test_a_probe_is_written_once(self, ids):
        """Layers run again in the backward pass: what they see there was seen already."""
        model = models.build("llama").requires_grad_(True).train()
        model.gradient_checkpointing_enable()
        with fs.steer(model, fs.Probe(d(), layers=(0, 1), at="attn_out")) as steering:
            model(ids).logits.mean().backward()
        assert {key: t.shape for key, t in steering.projections.items()} == {
            ("attn_out", 0): (3, PROMPT, 1),
            ("attn_out", 1): (3, PROMPT, 1),
        }


# Kinds of models ------------------------------------------------------------------------------------------------------


class TestKindsOfModels:
    def test_bf16(self, ids):
        """Computed in fp32 and rounded once: the bits of a hook that does the same."""
        model, v = models.build("llama").bfloat16(), d()
        plain = logits(model, ids)
        for at in models.points("llama"):
            with hand_hook(model, "llama", at, 1, lambda x: (x.float() + 0.7 * v).bfloat16()):
                expected = logits(model, ids)
            with fs.steer(model, fs.Add(v, 0.7, layers=1, at=at)):
                assert torch.equal(logits(model, ids), expected)
            assert not torch.equal(expected, plain)
        with fs.steer(model, [None, rich_plan("llama"), None]):
            mixed = logits(model, ids)
        assert mixed.dtype == torch.bfloat16
        assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[2], plain[2]) and far(mixed[1], plain[1])

    def test_bf16_directions_in_a_bf16_model(self, ids):
        """As extraction from such a model gives them: what is ablated from the last layer's output is gone."""
        model, v = models.build("llama").bfloat16(), d().bfloat16()
        with fs.steer(model, fs.Ablate(v, layers=1)) as _, read(model, at="resid_post", layers=[1]) as seen:
            logits(model, ids)
        h, q = seen[1].double(), v.double() / v.double().norm()
        rounding = torch.finfo(torch.bfloat16).eps / 2 * h.norm(dim=-1) + 1e-5 * h.norm(dim=-1)
        assert ((h @ q).abs() <= rounding).all()

    def test_fp16_and_fp64(self, ids):
        for dtype, compute in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
            model = models.build("llama").to(dtype)
            v = d().to(compute)
            with hand_hook(model, "llama", "resid_post", 0, lambda x, v=v: (x.to(v.dtype) + 1.5 * v).to(x.dtype)):
                expected = logits(model, ids)
            with fs.steer(model, fs.Add(d(), 1.5, layers=0)):
                assert torch.equal(logits(model, ids), expected)

    def test_a_device_map(self, ids, tmp_path):
        models.build("llama").save_pretrained(tmp_path)
        model = type(models.model("llama")).from_pretrained(tmp_path, device_map={"": "cpu"})
        self.compare(model, ids)

    @pytest.mark.parametrize(
        "on_disk",
        [["model.layers.1"], ["model.layers.0"], ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]],
        ids=len,
    )
    def test_offloaded_to_disk(self, ids, tmp_path, on_disk):
        models.build("llama").save_pretrained(tmp_path / "model")
        parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = {part: "disk" if part in on_disk else "cpu" for part in parts}
        model = type(models.model("llama")).from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        assert any(p.is_meta for p in model.parameters())
        self.compare(model, ids)

    def test_with_accelerate_hooks(self, ids, tmp_path):
        import accelerate

        model = models.build("gpt2")
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        self.compare(model, ids, "gpt2")

    def compare(self, model: nn.Module, ids: Tensor, name: str = "llama") -> None:
        plans, plain = [rich_plan(name), None, rich_plan(name, 1)], models.model(name)
        with fs.steer(plain, plans):
            expected, generated = logits(plain, ids), generate(plain, ids)
        # Weights that were loaded may lie otherwise in memory, and kernels sum them in another order.
        with fs.steer(model, plans):
            close(logits(model, ids), expected)
            close(generate(model, ids), generated)
        close(logits(model, ids), logits(plain, ids))

    def test_a_copy_of_a_steered_model_is_a_model_of_its_own(self, ids):
        """Copied outside of any context."""
        model = models.build("gpt2")
        with fs.steer(model, fs.Add(d(), layers=0)):
            steered = logits(model, ids)
        twin = copy.deepcopy(model)
        with fs.steer(twin, fs.Add(d(), layers=0)):
            assert torch.equal(logits(twin, ids), steered)
            assert not torch.equal(logits(model, ids), steered)

    def test_in_inference_mode(self, model, ids):
        plan = rich_plan("llama")
        with fs.steer(model, plan):
            expected = logits(model, ids)
            with torch.inference_mode():
                assert torch.equal(model(ids).logits, expected)
            assert torch.equal(logits(model, ids), expected)


class TestGivenRows:
    """A loop that keeps its own account of slots, positions and sequences."""

    def test_equals_what_is_derived(self, model, ids):
        plain = logits(model, ids)
        plans = [fs.Plan([fs.Add(d(i), 2.0, layers="all", positions=p)]) for i, p in enumerate(("last", "[:-1]"))]
        with fs.steer(model, [plans[0], None, plans[1]]):
            expected = logits(model, ids)
        batch, length = ids.shape
        slot, sequence = (torch.tensor(t).repeat_interleave(length) for t in ([5, -1, 2], [7, 0, 3]))
        rows = placed(slot, torch.arange(-length, 0).repeat(batch), sequence)
        with fs.steer(model, [None], capacity=fs.Capacity(slots=6, vectors=50, entries=50)) as steering:
            steering.set_rows(rows, n_sequences=8)
            steering.load(5, plans[0])
            steering.load(2, plans[1])
            assert torch.equal(logits(model, ids), expected)
            steering.load(2, None)
            assert not torch.equal(logits(model, ids)[2], expected[2])
            rows[0] = -1
            assert torch.equal(logits(model, ids), plain)

    def test_a_sequence_that_starts_anew_forgets_its_gate(self, model, ids):
        gate = fs.Gate(d(1), -1e9, latched=True)
        plan = fs.Plan([fs.Add(d(), 2.0, layers=0, when=gate, positions="generated")])
        ends, after = (placed(0, p, [0, 1, 2]) for p in (-1, 0))
        first = ids[:, :1]
        with fs.steer(model, [None]) as steering:
            steering.load(0, plan)
            steering.set_rows(ends, n_sequences=3)
            plain = logits(model, first)
            steering.set_rows(after, n_sequences=3)
            assert not torch.equal(logits(model, first), plain)
            steering.forget(1)
            steered = logits(model, first)
            assert torch.equal(steered[1], plain[1]) and not torch.equal(steered[2], plain[2])

    def test_wrong_number_of_rows(self, model, ids):
        with fs.steer(model, [None]) as steering:
            steering.set_rows(placed([0]), n_sequences=1)
            with pytest.raises(RuntimeError, match="was given 1 rows, but the forward pass has 3 x 6 tokens"):
                logits(model, ids)
