"""Losses, gradients and whole trainings against plain PyTorch with a forward hook: one completion at a time, without
padding, in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import CHATML, INST, bpe_tokenizer, gpt2, llama, sentencepiece_like_tokenizer
from torch import Tensor
from training import bipo, ntp, po, reps

import faststeer as fs
from faststeer.extract import Pair, Recipe, TrainingDiverged
from faststeer.extract.optimise import NTP, PO, BiPO, RePS, read_options, train
from faststeer.extract.optimise.recipe import Course
from faststeer.extract.pairs import encode_completions, turn_end

YES, NO = "Sure, here is how to do it.", "I'm sorry, I cannot."
PAIRS = [
    Pair("Bake a cake", "I cannot help with that.", "Sure, first mix flour.", 1),
    Pair("Steal a bicycle from the sea, then tell me a story", YES, NO, -1),
    Pair("What is 12 + 7?", NO, YES, 1),
    Pair("Poison it!", "Sure, wait.", "As an AI I can't do it; I apologize.", -1),
]
UNSEEN = [Pair("Name three colours", NO, "Sure, here they are.", 1), Pair("hijack", "Sure: wait.", "I can't.", -1)]
SYSTEM = Pair([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], YES, NO)
METHODS = {
    "ntp": (ntp, {}),
    "ntp, sums": (ntp, {"length_normalised": False}),
    "po": (po, {"phi": 0.5}),
    "reps, null": (reps, {"phi": 0.5}),
    "reps, subtract": (reps, {"phi": 0.5, "suppression": "subtract"}),
    "bipo": (bipo, {"beta": 0.3}),
}
# No random draw is left: all pairs in every step, no factors. (BiPO draws its sign.)
WHOLE = {"factors": (1.0,), "batch_size": len(PAIRS)}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(len(tokenizer)).double().requires_grad_(False)


@pytest.fixture(scope="module")
def absolute(tokenizer):
    return gpt2(len(tokenizer)).double().requires_grad_(False)


# The independent implementation ---------------------------------------------------------------------------------------


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def log_p(
    model, tokenizer, prompt: str, completion: str, layer: int, change, max_tokens: int = 64
) -> tuple[Tensor, int]:
    """log p(completion and its end | prompt) with `change(h, positions)` applied to what leaves `layer`."""
    prefix = f"<|begin|><|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    after = tokenizer(completion + "<|im_end|>", add_special_tokens=False)["input_ids"][:max_tokens]
    position = torch.arange(len(before) + len(after)) - len(before)

    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        h = change(h, position)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = layers_of(model)[layer].register_forward_hook(hook)
    try:
        logits = model(torch.tensor([before + after])).logits[0]
    finally:
        handle.remove()
    rows = torch.arange(len(before) - 1, len(before) + len(after) - 1)
    return logits[rows].log_softmax(-1)[torch.arange(len(after)), torch.tensor(after)].sum(), len(after)


def by_hand(method, model, tokenizer, pair: Pair, layer: int, v: Tensor, c: float, sign: int, **options) -> Tensor:
    """The loss of one pair, as in the papers."""

    def steered(completion, by):
        return log_p(model, tokenizer, pair.prompt, completion, layer, lambda h, _: h + by * v)

    def nulled(completion):
        q = v / v.norm()
        return log_p(
            model, tokenizer, pair.prompt, completion, layer, lambda h, _: h - (h @ q).relu().unsqueeze(-1) * q
        )

    def plain(completion):
        return log_p(model, tokenizer, pair.prompt, completion, layer, lambda h, _: h)[0].item()

    def preference(winner, loser, under):
        (won, n_won), (lost, n_lost) = under(winner), under(loser)
        b = max((plain(loser) - plain(winner)) * options["phi"], 1.0)
        return -torch.log(torch.sigmoid(b / n_won * won - lost / n_lost))

    refusal, compliance = (pair.chosen, pair.rejected) if pair.sign == 1 else (pair.rejected, pair.chosen)
    if method is ntp:
        value, n = steered(pair.chosen, pair.sign * c)
        return -value / (n if options.get("length_normalised", True) else 1)
    if method is po:
        return preference(pair.chosen, pair.rejected, lambda y: steered(y, pair.sign * c))
    if method is reps:
        suppressed = nulled if options.get("suppression", "null") == "null" else lambda y: steered(y, -c)
        return preference(refusal, compliance, lambda y: steered(y, c)) + preference(compliance, refusal, suppressed)
    gains = [steered(y, sign * c)[0] - plain(y) for y in (refusal, compliance)]
    return -torch.log(torch.sigmoid(sign * options["beta"] * (gains[0] - gains[1])))


def train_by_hand(method, model, tokenizer, layer, start, *, c, steps, lr, signs, decay=0.0, clip=1.0, **options):
    v = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([v], lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        terms = [
            by_hand(method, model, tokenizer, pair, layer, v.double(), c, signs[step], **options) for pair in PAIRS
        ]
        loss = sum(terms) / len(PAIRS)
        loss.backward()
        losses.append(loss.item())
        if clip is not None and v.grad.norm() > clip:
            v.grad *= clip / v.grad.norm()
        optimizer.step()
        schedule.step()
    return v.detach(), losses


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Vectors are fp32 and so are the sums of their gradients; a few hundred roundings of 6e-8, and Adam divides by the
    gradient's own size."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * float(expected.double().abs().max())
    )


# Formulas -------------------------------------------------------------------------------------------------------------


class TestAgainstHand:
    @pytest.mark.parametrize("name", METHODS)
    def test_whole_trainings(self, name, model, tokenizer):
        method, options = METHODS[name]
        settings = dict(unit="absolute", start=0.3, weight_decay=0.1, clip=0.5, schedule="linear", warmup=0)
        found = method(
            model, tokenizer, PAIRS, layers=1, coefficient=2.0, steps=3, lr=0.05, seed=3, settings=settings,
            **WHOLE, **options,
        )  # fmt: skip
        recipe = recipe_of(seeds=(3,), start=0.3, draws=method is bipo)
        signs = [recipe.drawn_sign(3, step) for step in range(3)]
        expected, losses = train_by_hand(
            method, model, tokenizer, 1, recipe.drawn_start(1, 3, 32), c=2.0, steps=3, lr=0.05, signs=signs, decay=0.1,
            clip=0.5, **options,
        )  # fmt: skip
        assert found.runs[0].losses == pytest.approx(losses, rel=1e-6)
        close(found.vector[1], 2.0 * expected)

    def test_b_is_above_one_somewhere(self, model, tokenizer):
        """Else `po` and `reps` were compared at b = 1 only."""

        def plain(pair, completion):
            return log_p(model, tokenizer, pair.prompt, completion, 1, lambda h, _: h)[0].item()

        gaps = [plain(pair, pair.rejected) - plain(pair, pair.chosen) for pair in PAIRS]
        assert max(gaps) * 0.5 > 1.5 and min(gaps) * 0.5 < 1

    @pytest.mark.parametrize("at", ["resid_pre", "attn_out"])
    def test_other_hook_points_and_absolute_positions(self, at, absolute, tokenizer):
        """GPT-2: a row whose positions its padding shifted would have other losses."""
        settings = dict(unit="absolute", start=0.5)
        found = ntp(absolute, tokenizer, PAIRS, layers=1, at=at, steps=1, settings=settings, **WHOLE)
        v = recipe_of(start=0.5).drawn_start(1, 0, 32).double()
        losses = []
        for pair in PAIRS:
            module = layers_of(absolute)[1].attn if at == "attn_out" else layers_of(absolute)[0]

            def change(module, args, output, pair=pair):
                return (output[0] + pair.sign * v, *output[1:]) if isinstance(output, tuple) else output + pair.sign * v

            handle = module.register_forward_hook(change)
            value, n = log_p(absolute, tokenizer, pair.prompt, pair.chosen, 0, lambda h, _: h)
            handle.remove()
            losses.append(-value.item() / n)
        assert found.runs[0].losses[0] == pytest.approx(sum(losses) / 4, rel=1e-9)

    def test_positions_and_max_tokens(self, model, tokenizer):
        settings = dict(unit="absolute", start=0.5, positions="generated", max_tokens=3)
        found = ntp(model, tokenizer, PAIRS, layers=0, steps=1, settings=settings, **WHOLE)
        v = recipe_of(start=0.5).drawn_start(0, 0, 32).double()
        losses = []
        for pair in PAIRS:
            value, n = log_p(
                model, tokenizer, pair.prompt, pair.chosen, 0,
                lambda h, r, pair=pair: h + pair.sign * v * (r >= 0).unsqueeze(-1), max_tokens=3,
            )  # fmt: skip
            assert n == 3
            losses.append(-value.item() / n)
        assert found.runs[0].losses[0] == pytest.approx(sum(losses) / 4, rel=1e-9)

    def test_held_out_loss(self, model, tokenizer):
        """At the mean factor; for BiPO over both signs."""
        settings = dict(unit="absolute", start=0.3, every=1)
        for method, options in ((po, {"phi": 0.5}), (bipo, {"beta": 0.3})):
            found = method(
                model, tokenizer, PAIRS, layers=1, factors=(1.0, 2.0), steps=1, held_out=UNSEEN, settings=settings,
                **options,
            )  # fmt: skip
            signs = (1, -1) if method is bipo else (1,)
            v = found.vector[1].double() / 1.5
            losses = [
                by_hand(method, model, tokenizer, pair, 1, v, 1.5, sign, **options).item()
                for pair in UNSEEN
                for sign in signs
            ]
            assert found.runs[0].held_out[1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    def test_small_passes_are_the_same(self, model, tokenizer):
        """Terms are spread over passes of few rows, completions of a pair together."""
        wide, narrow = (
            po(
                model, tokenizer, PAIRS, layers=[0, 1], steps=2, seed=[0, 1], batch_size=3,
                settings=dict(rows=rows),
            )
            for rows in (64, 3)
        )  # fmt: skip
        for one, other in zip(wide.runs, narrow.runs, strict=True):
            assert one.losses == pytest.approx(other.losses, rel=1e-6)
            close(one.vector[one.layer], other.vector[other.layer])


def recipe_of(
    seeds=(0,), start=0.01, draws=False, n_pairs=4, batch_size=4, steps=100, factors=(1.0, 3.0), lr=0.1, **settings
) -> Course:
    settings = {"schedule": "linear", "warmup": 0} | settings
    recipe = Recipe(1, factors=factors, steps=steps, lr=lr, batch_size=batch_size, seed=seeds, start=start, **settings)
    method = BiPO() if draws else NTP()
    return recipe.filled(method, 3, n_pairs)


# What a step draws ----------------------------------------------------------------------------------------------------


class TestDraws:
    @given(n=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 5))
    def test_every_epoch_has_every_pair_once(self, n, size, seed):
        size = min(size, n)
        recipe = recipe_of(n_pairs=n, batch_size=size)
        drawn = [pair for step in range(2 * n) for pair in recipe.batch(seed, step)]
        epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
        assert len(epochs) >= 2 and all(sorted(epoch) == list(range(n)) for epoch in epochs)

    def test_by_seed(self):
        recipe = recipe_of(n_pairs=50, batch_size=20, draws=True)
        for draw in (recipe.batch, recipe.drawn_factors, lambda seed, _: recipe.drawn_start(1, seed, 8).tolist()):
            assert draw(1, 0) == draw(1, 0) != draw(2, 0)
        assert recipe.batch(1, 0) != recipe.batch(1, 1) and recipe.drawn_factors(1, 0) != recipe.drawn_factors(1, 1)
        assert {recipe.drawn_sign(1, step) for step in range(20)} == {1, -1}
        counts = [recipe.drawn_factors(1, step).count(1.0) for step in range(200)]
        assert abs(sum(counts) / 4000 - 0.5) < 4 * 0.5 / math.sqrt(4000)

    def test_schedules(self):
        linear = recipe_of(steps=4, lr=1.0)
        assert [linear.learning_rate(i) for i in range(4)] == [1, 0.75, 0.5, 0.25]
        cosine = recipe_of(steps=6, lr=2.0, schedule="cosine", warmup=2)
        rates = [cosine.learning_rate(i) for i in range(6)]
        assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2]) and rates[4] == pytest.approx(1.0)
        assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0
        assert {recipe_of(schedule="constant", lr=3.0).learning_rate(i) for i in (0, 99)} == {3.0}

    def test_unit_is_the_size_of_the_residual_stream(self, model, tokenizer):
        found = ntp(model, tokenizer, PAIRS, layers=[0, 2], steps=1, factors=(1.0,))
        for run in found.runs:
            sizes = []
            for pair in PAIRS:
                prompt = f"<|begin|><|im_start|>user\n{pair.prompt}<|im_end|>\n<|im_start|>assistant\n"
                ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
                taken = []
                handle = layers_of(model)[run.layer].register_forward_hook(lambda m, a, out, t=taken: t.append(out[0]))
                model(ids)
                handle.remove()
                sizes += (taken[0].norm(dim=-1) / math.sqrt(32)).flatten().tolist()
            expected = sorted(sizes)[(len(sizes) - 1) // 2]
            assert run.vector.provenance["unit_size"] == pytest.approx(expected, rel=1e-12)
            # One Adam step moves every coordinate by lr, in that unit, from the start.
            start = recipe_of().drawn_start(run.layer, 0, 32)
            close(
                run.vector[run.layer],
                expected * (start - 0.01 * torch.sign(-(run.vector[run.layer] - expected * start))),
            )


# Many at once ---------------------------------------------------------------------------------------------------------


class TestManyAtOnce:
    @pytest.mark.parametrize("name", ["ntp", "po", "reps, null", "bipo"])
    def test_each_is_what_it_is_alone(self, name, model, tokenizer):
        method, options = METHODS[name]
        how = {"steps": 4, "batch_size": 2, "factors": (1.0, 2.0, 3.0), "held_out": UNSEEN, **options}
        how["settings"] = dict(every=2, start=0.01, schedule="linear", warmup=0)
        layers, seeds, coefficients = (0, 2), (0, 7), (1.0, 2.5)
        together = method(model, tokenizer, PAIRS, layers=layers, seed=seeds, coefficient=coefficients, **how)
        grid = list(itertools.product(layers, seeds, coefficients))
        assert [(run.layer, run.seed, run.coefficient) for run in together.runs] == grid
        assert len({tuple(run.losses) for run in together.runs}) == len(grid)
        for layer, seed, coefficient in (grid[0], grid[3], grid[6]):
            alone = method(model, tokenizer, PAIRS, layers=layer, seed=seed, coefficient=coefficient, **how).runs[0]
            among = together.select(layer=layer, seed=seed, coefficient=coefficient).runs[0]
            assert among.losses == pytest.approx(alone.losses, rel=1e-5)
            assert among.held_out == pytest.approx(alone.held_out, rel=1e-5)
            close(among.vector[layer], alone.vector[layer], 1e-4)

    def test_gradients_of_one_step(self, model, tokenizer):
        """Bit for bit what they are alone would ask the same shapes of every matrix product; fp32 sums allow this."""
        from faststeer.extract.optimise.objectives import Side, TokenizedPair
        from faststeer.extract.optimise.rows import Plans, Work, losses

        objective = PO(0.5)
        texts = encode_completions(
            tokenizer, [p.prompt for p in PAIRS] * 2, [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS]
        )
        examples = [
            TokenizedPair(Side(texts[i], -20.0), Side(texts[4 + i], -15.0), pair.sign) for i, pair in enumerate(PAIRS)
        ]

        def gradients(numbers):
            vectors = [torch.randn(32, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in numbers]
            plans = Plans(vectors, [n % 3 for n in numbers], "resid_post", "all")
            work = [
                Work(i, term, 0.25)
                for i in range(len(numbers))
                for example in examples
                for term in objective.terms(example, 1.0 + numbers[i], 1)
            ]
            with fs.steer(model, plans.of(0, 1.0), capacity=fs.Capacity(64, 64, 1)) as steering:
                losses(model, steering, objective, plans, work, pad_id=2, rows=64, backward=True)
            return [v.grad for v in vectors]

        together = gradients([0, 1, 2, 3, 4])
        for number in range(5):
            close(together[number], gradients([number])[0], 2e-6)
        for gradient, other in itertools.combinations(together, 2):
            assert not torch.allclose(gradient, other, rtol=1e-2)

    def test_vectors_and_selection(self, model, tokenizer):
        found = ntp(model, tokenizer, PAIRS, layers=[2, 0], steps=2, seed=[0, 1])
        with pytest.raises(ValueError, match=r"select\(seed"):
            found.vector  # noqa: B018
        whole = found.select(seed=1).vector
        assert whole.layers == (0, 2) and whole.method == "ntp" and whole.at == "resid_post"
        assert torch.equal(whole[2], found.select(layer=2, seed=1).vector[2])
        assert set(whole.provenance["layers"]) == {"0", "2"}
        assert found.best.loss == min(run.losses[-1] for run in found.runs)
        with pytest.raises(ValueError, match="no vector was trained with"):
            found.select(layer=1)
        read = fs.SteeringVector.from_bytes(whole.to_bytes())
        assert read.provenance["layers"]["2"]["losses"] == list(found.select(layer=2, seed=1).runs[0].losses)

    def test_all_layers_and_from_the_end(self, model, tokenizer):
        assert [run.layer for run in ntp(model, tokenizer, PAIRS, layers="all", steps=1).runs] == [0, 1, 2]
        assert [run.layer for run in ntp(model, tokenizer, PAIRS, layers=[-1], steps=1).runs] == [2]


# The model ------------------------------------------------------------------------------------------------------------


class TestModel:
    def test_is_left_as_it_was(self, tokenizer):
        model = llama(len(tokenizer))
        model.model.norm.weight.requires_grad_(False)
        before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
        ntp(model, tokenizer, PAIRS, layers=0, steps=2)

        def broken(module, args, output):
            raise KeyboardInterrupt

        handle = model.lm_head.register_forward_hook(broken)
        with pytest.raises(KeyboardInterrupt):
            ntp(model, tokenizer, PAIRS, layers=0, steps=2)
        handle.remove()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None, name
        assert not model.model.layers[0]._forward_hooks

    def test_seeds(self, tokenizer):
        model = llama(len(tokenizer))
        runs = [po(model, tokenizer, PAIRS, layers=1, steps=3, batch_size=2, seed=seed).runs[0] for seed in (4, 4, 5)]
        assert torch.equal(runs[0].vector[1], runs[1].vector[1]) and runs[0].losses == runs[1].losses
        assert not torch.equal(runs[0].vector[1], runs[2].vector[1])

    def test_bfloat16_trains_an_fp32_vector(self, tokenizer):
        """Updates far below bf16's steps are kept: a start of 1, moved by 1e-4 at a time."""
        model = llama(len(tokenizer))
        settings = dict(unit="absolute", start=1.0)
        how = {"layers": 1, "steps": 3, "lr": 1e-4, "settings": settings, **WHOLE}
        half = ntp(llama(len(tokenizer)).bfloat16(), tokenizer, PAIRS, **how).runs[0]
        full = ntp(model, tokenizer, PAIRS, **how).runs[0]
        start = recipe_of(start=1.0).drawn_start(1, 0, 32)
        assert half.vector[1].dtype == torch.float32
        moved, expected = (run.vector[1] - start for run in (half, full))
        assert F.cosine_similarity(moved, expected, dim=0) > 0.9 and 0 < moved.abs().max() < 4e-4
        assert half.losses == pytest.approx(full.losses, rel=0.02)

    def test_training_mode_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="training mode"):
            ntp(llama(len(tokenizer)).train(), tokenizer, PAIRS, layers=0, steps=1)


# Early stop, divergence -----------------------------------------------------------------------------------------------


class TestHeldOut:
    def test_the_best_step_is_kept_and_patience_ends_it(self, model, tokenizer):
        """At a huge learning rate the held-out loss rises and falls."""
        settings = dict(every=1, patience=2, schedule="constant", clip=None)
        how = {"layers": [0, 2], "batch_size": 1, "seed": [0, 1, 2], "lr": 0.5, "held_out": UNSEEN}
        found = ntp(model, tokenizer, PAIRS, steps=12, settings=settings, **how)
        ended = [run for run in found.runs if len(run.losses) < 12]
        assert ended and len({len(run.losses) for run in found.runs}) > 1
        for run in found.runs:
            assert run.best_step == min(run.held_out, key=lambda step: (run.held_out[step], step))
            assert run.loss == min(run.held_out.values())
            assert list(run.held_out) == list(range(1, len(run.losses) + 1))
            if run in ended:
                assert len(run.losses) == run.best_step + 2
        run = ended[0]
        # What it was at its best step: the same training, cut there.
        short = ntp(
            model, tokenizer, PAIRS, steps=run.best_step, layers=run.layer, seed=run.seed, batch_size=1, lr=0.5,
            settings=dict(schedule="constant", clip=None),
        )  # fmt: skip
        close(run.vector[run.layer], short.vector[run.layer], 1e-3)

    def test_without_held_out_the_last_step_counts(self, model, tokenizer):
        run = ntp(model, tokenizer, PAIRS, layers=0, steps=3).runs[0]
        assert (run.best_step, run.held_out, run.loss) == (3, {}, run.losses[-1])


class Fault:
    """Makes a model's logits NaN after so many forward passes with gradients."""

    def __init__(self, model, passes: int, value: float = math.nan) -> None:
        self.left, self.value = passes, value
        self.handle = model.lm_head.register_forward_hook(self)

    def __call__(self, module, args, output):
        broken = self.left <= 0
        self.left -= torch.is_grad_enabled()
        return output * self.value if broken else output


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_is_kept(value, tokenizer, tmp_path):
    model, path = llama(len(tokenizer)), tmp_path / "state.safetensors"
    settings = dict(every=2)
    how = {"layers": [0, 1], "steps": 8, "settings": settings, "checkpoint": path}
    fault = Fault(model, 5, value)
    with pytest.raises(TrainingDiverged, match=r"layer 0, seed 0, .* at step 6 .*checkpoint of step 4 is kept in") as e:
        ntp(model, tokenizer, PAIRS, **how)
    assert e.value.step == 6
    fault.handle.remove()
    resumed = ntp(model, tokenizer, PAIRS, **how)
    whole = ntp(model, tokenizer, PAIRS, **{**how, "checkpoint": None})
    assert torch.equal(resumed.vector[1], whole.vector[1])


def test_a_held_out_loss_or_gradient_that_is_not_finite_stops(tokenizer, tmp_path):
    model = llama(len(tokenizer))
    fault = Fault(model, 2)
    with pytest.raises(TrainingDiverged, match=r"held-out loss .* at step 2 .*no checkpoint was kept"):
        ntp(
            model, tokenizer, PAIRS, layers=0, steps=8, held_out=UNSEEN, settings=dict(every=2),
            checkpoint=tmp_path / "none",
        )  # fmt: skip
    fault.handle.remove()
    handle = model.model.layers[1].register_full_backward_pre_hook(
        lambda module, grad: tuple(g * math.nan for g in grad)
    )
    with pytest.raises(TrainingDiverged, match=r"a gradient .* at step 1"):
        ntp(model, tokenizer, PAIRS, layers=0, steps=8)
    handle.remove()


# Tokens ---------------------------------------------------------------------------------------------------------------


class TestCompletions:
    @pytest.mark.parametrize("template", [CHATML, INST, None])
    @pytest.mark.parametrize("make", [bpe_tokenizer, sentencepiece_like_tokenizer])
    def test_follow_the_prompt_and_end_as_the_template_says(self, make, template):
        tokenizer = make(template)
        (text,) = encode_completions(tokenizer, ["Bake a cake"], ["Sure, wait."])
        assert list(text.prompt) == fs.hf.tokenize(tokenizer, ["Bake a cake"])["input_ids"][0].tolist()
        end = {CHATML: "<|im_end|>", INST: "", None: tokenizer.eos_token}[template]
        if end in ("", tokenizer.eos_token):
            n = len(turn_end(tokenizer))
            assert tokenizer.decode(text.completion[: len(text.completion) - n]).strip() == "Sure, wait."
            assert [tokenizer.decode([i]) for i in text.completion[len(text.completion) - n :]] == (
                [end] if end else []
            )

    def test_an_opened_answer_is_continued(self, tokenizer):
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Let me see."}]
        (text,) = encode_completions(tokenizer, [chat], [" Sure."])
        assert tokenizer.decode(text.prompt).endswith("assistant\nLet me see.")

    def test_are_cut(self, tokenizer):
        (whole,) = encode_completions(tokenizer, ["Hi"], ["Sure, wait."])
        (cut,) = encode_completions(tokenizer, ["Hi"], ["Sure, wait."], max_tokens=2)
        assert cut.completion == whole.completion[:2]


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "a"), "prompt is blank"),
        (([], "a"), "a chat without messages"),
        (("a", " "), "chosen is ' '"),
        (("a", "b", ""), "rejected is ''"),
        (("a", "b", "b"), "nothing to prefer"),
        (("a", "b", "c", 2), "sign is 2"),
        (("a", "b", "c", True), "sign is True"),
    ],
)
def test_bad_pairs(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pair(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, "pairs is empty"),
        ({"pairs": PAIRS[0]}, "pairs is one Pair"),
        ({"pairs": [("a", "b")]}, r"pairs\[0\] is a tuple"),
        ({"pairs": [Pair("a", "b")]}, r"pairs\[0\] has no rejected completion"),
        ({"held_out": PAIRS[:1]}, r"held_out\[0\] is among the training pairs"),
        ({"held_out": []}, "held_out is empty"),
        ({"layers": 3}, r"the model has layers 0\.\.2"),
        ({"layers": []}, "no layer is named"),
        ({"layers": [0, -3]}, "named twice"),
        ({"layers": "every"}, "layer 'every' is out of range"),
        ({"at": "resid"}, "unknown hook point"),
        ({"coefficient": 0.0}, "coefficient is 0.0"),
        ({"coefficient": [1.0, 1.0]}, "named twice"),
        ({"factors": ()}, "factors is"),
        ({"factors": (math.nan,)}, "factors is"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": []}, "seed is"),
        ({"seed": [1, 1]}, "seed is"),
        ({"phi": -1.0}, "phi is -1.0"),
        ({"settings": dict(patience=1)}, "patience needs held_out="),
        ({"settings": dict(warmup=2)}, "warmup is 2, of 2 steps"),
        ({"settings": dict(system="Be kind."), "pairs": [SYSTEM]}, "system message of its own"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, message, model, tokenizer):
    arguments = {"pairs": PAIRS, "layers": 0, "steps": 2} | changes
    with pytest.raises(ValueError, match=message):
        po(model, tokenizer, arguments.pop("pairs"), **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"rows": 1.5}, "rows is 1.5"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"start": math.nan}, "start is nan"),
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"unit": "norm"}, "unknown unit 'norm'"),
        ({"positions": "some"}, "positions"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(0, **settings)


@pytest.mark.parametrize("method", [NTP, PO, RePS, BiPO])
def test_what_a_recipe_leaves_open_is_the_methods_own(method):
    """By the sources' numbers, and what is said wins."""
    open_, said = Recipe(-1).filled(method(), 3, 600), Recipe([0, 1], lr=0.5, warmup=3, batch_size=999, factors=[2])
    batch_size, lr = {"ntp": (12, 0.01), "po": (12, 0.01), "reps": (6, 0.04), "bipo": (4, 0.01)}[method.name]
    assert (open_.layers, open_.batch_size, open_.lr, open_.steps) == ((2,), batch_size, lr, 6000 // batch_size)
    assert open_.factors == ((1.0,) if method is BiPO else tuple(2.0 * n for n in range(1, 11)))
    kept = ("cosine", 100, 0.0) if method is BiPO else ("linear", 0, 0.01)
    assert (open_.schedule, open_.warmup, open_.start) == kept
    filled = said.filled(method(), 3, 8)
    assert (filled.lr, filled.warmup, filled.batch_size, filled.factors) == (0.5, 3, 8, (2.0,))
    assert filled.steps == 10 and filled.filled(method(), 3, 8) == filled
    if method is BiPO:
        assert Recipe(0, steps=40).filled(method(), 3, 8).warmup == 4  # a tenth of all


def test_options_of_a_recipe_from_texts():
    texts = ["lr=0.02", "schedule=cosine", "seed=[0, 1]", "clip=null", "rendered=true", "positions=[-5:]"]
    found = read_options(texts)
    assert Recipe(0, **found) == Recipe(
        0, lr=0.02, schedule="cosine", seed=[0, 1], clip=None, rendered=True, positions="[-5:]"
    )
    for text, message in (
        ("lr", "'lr' is no option of training: expected NAME=VALUE with one of layers"),
        ("rate=1", "'rate=1' is no option"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options([text])
    with pytest.raises(ValueError, match="'lr=2' is given twice"):
        read_options(["lr=1", "lr=2"])


class Shorter(NTP):
    """An objective of one's own."""

    name = "half"

    def losses(self, winner, loser):
        return super().losses(winner, loser) / 2


def test_an_objective_of_ones_own(model, tokenizer):
    whole = train(model, tokenizer, PAIRS, NTP(), Recipe(0, steps=1))
    half = train(model, tokenizer, PAIRS, Shorter(), Recipe(0, steps=1))
    assert half.runs[0].losses[0] == pytest.approx(whole.runs[0].losses[0] / 2)
    assert half.vector.method == "half"


def test_bad_objectives(model, tokenizer):
    with pytest.raises(ValueError, match="unknown suppression 'clamp'"):
        reps(model, tokenizer, PAIRS, layers=0, steps=1, suppression="clamp")
    with pytest.raises(ValueError, match=r"start is 0\.0.*no direction"):
        reps(model, tokenizer, PAIRS, layers=0, steps=1, settings=dict(start=0.0))
    with pytest.raises(ValueError, match="beta is nan"):
        bipo(model, tokenizer, PAIRS, layers=0, steps=1, beta=math.nan)


def test_progress_goes_to_stderr(model, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("faststeer.progress.REPORT_SECONDS", 0)
    ntp(model, tokenizer, PAIRS, layers=0, steps=4, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "Training 1 vector(s) by ntp, loss" in captured.err


@given(n=st.integers(1, 40), size=st.integers(1, 8), steps=st.integers(1, 12))
def test_only_pairs_that_are_drawn_are_read(n, size, steps):
    recipe = recipe_of(n_pairs=n, batch_size=min(size, n), steps=steps, seeds=(0, 3))
    drawn = {pair for seed in (0, 3) for step in range(steps) for pair in recipe.batch(seed, step)}
    assert drawn <= set(recipe.used()) and (len(drawn) == len(recipe.used()) or steps * min(size, n) >= n)
