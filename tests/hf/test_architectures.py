"""Steering whole models of every architecture: as forward hooks written by hand, row by row, however a prompt is
padded, cached and cut into chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import faststeer as fs

ALL = pytest.mark.parametrize("name", models.ARCHITECTURES)
PROMPT, NEW = 7, 5


def direction(seed: int) -> Tensor:
    return models.direction(seed)


def rich_plan(name: str, seed: int = 0) -> fs.Plan:
    """Every kind somewhere, with positions and gates, so that a token that is taken for another shows."""
    d = [direction(100 * seed + i) for i in range(12)]
    latched = fs.Gate(d[7], 0.0, latched=True, layer=0, at="resid_pre")
    return fs.Plan(
        [
            fs.Add(d[0], 1.5, layers="all", positions="generated"),
            fs.Ablate(torch.stack(d[1:3]), layers="all", at=("resid_pre", "attn_out", "mlp_out")),
            fs.Clamp(d[3], low=2.0, layers=-1, positions="[-2:]"),
            fs.Clamp(
                d[4],
                low=-1.0,
                high=1.0,
                layers=0,
                at="resid_mid" if "resid_mid" in models.points(name) else "mlp_out",
                positions="[-4:2]",
            ),
            fs.Add(d[5], 2.0, layers=1, at="mlp_out", when=latched, keep_norm=True),
            fs.Rotate(
                d[8],
                d[9],
                60.0,
                relative=True,
                layers=0,
                positions="[1:3]",
                when=fs.Gate(d[10], kind="cosine", above=seed % 2 == 0),
            ),
            fs.Project(torch.stack([d[11], d[6], d[1]]), layers=0, at="attn_out", positions=0),
        ]
    )


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def generate(model: nn.Module, batch: Tensor | dict[str, Tensor], new: int = NEW, **more: Any) -> tuple[Tensor, Tensor]:
    """The new tokens `[rows, new]` of greedy decoding, and the logits that they were taken from `[rows, new,
    vocabulary]`."""
    given = {"input_ids": batch, "attention_mask": torch.ones_like(batch)} if isinstance(batch, Tensor) else batch
    out = model.generate(
        **given,
        **({"max_new_tokens": new, "do_sample": False} | more),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, given["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def close(a: tuple[Tensor, Tensor] | Tensor, b: tuple[Tensor, Tensor] | Tensor) -> None:
    """Equal tokens, and logits equal to the rounding of some thousand operations in fp32; the mistakes looked for here
    are a thousand times larger."""
    if isinstance(a, tuple):
        assert torch.equal(a[0], b[0])
        a, b = a[1], b[1]
    scale = float(b.abs().amax())
    torch.testing.assert_close(a, b, rtol=0, atol=2000 * torch.finfo(a.dtype).eps * scale)


def far(a: Tensor, b: Tensor) -> bool:
    """Not what rounding makes of one value: steering shows."""
    return bool((a - b).abs().amax() > 0.01 * b.abs().amax())


# By hand --------------------------------------------------------------------------------------------------------------


@contextmanager
def hand_hook(model: nn.Module, name: str, at: str, layer: int, change: Callable[[Tensor], Tensor]):
    """Change the tensor at a hook point with a plain PyTorch hook on the module that a person would name."""
    modules = models.MODULES[name]
    block = model.get_submodule(modules.layers)[layer]

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    def on_input(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def in_place(_module: nn.Module, args: Any) -> None:
        args[0].copy_(change(args[0].clone()))

    if at == "resid_pre":
        handle = block.register_forward_pre_hook(on_input, with_kwargs=True)
    elif at == "resid_post":
        handle = block.register_forward_hook(on_output)
    elif at == "resid_mid":
        handle = block.get_submodule(modules.resid_mid).register_forward_pre_hook(in_place)
    else:
        handle = block.get_submodule(getattr(modules, at)).register_forward_hook(on_output)
    with handle:
        yield


def ablated(v: Tensor, x: Tensor) -> Tensor:
    q = v / v.norm()
    return x - (x @ q).unsqueeze(-1) * q


def clamped(v: Tensor, x: Tensor) -> Tensor:
    q = v / v.norm()
    p = (x @ q).unsqueeze(-1)
    return x + (p.clamp(-0.5, 0.5) - p) * q


def projected(v: Tensor, x: Tensor) -> Tensor:
    return x - ablated(v, x)


def rotated(v: Tensor, w: Tensor, x: Tensor) -> Tensor:
    q = v / v.norm()
    b = ablated(v, w)
    b = b / b.norm()
    p1, p2 = (x @ q).unsqueeze(-1), (x @ b).unsqueeze(-1)
    angle = torch.atan2(p2, p1) + torch.pi / 3
    return x - p1 * q - p2 * b + torch.hypot(p1, p2) * (angle.cos() * q + angle.sin() * b)


def added_keeping_norm(v: Tensor, x: Tensor) -> Tensor:
    moved = x + 2 * v
    return moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)


def gated(v: Tensor, d: Tensor, x: Tensor) -> Tensor:
    opened = torch.nn.functional.cosine_similarity(x, d.expand_as(x), dim=-1) > 0
    return torch.where(opened.unsqueeze(-1), x + 2 * v, x)


@ALL
def test_add_has_the_bits_of_a_hook_written_by_hand(name):
    model, ids, v = models.model(name), models.tokens(2, PROMPT), direction(0)
    plain = logits(model, ids)
    for at in models.points(name):
        for layer in range(models.N_LAYERS):
            with hand_hook(model, name, at, layer, lambda x: x + 0.7 * v):
                expected = logits(model, ids)
            with fs.steer(model, fs.Add(v, 0.7, layers=layer, at=at)):
                steered = logits(model, ids)
            assert torch.equal(steered, expected), f"{at} of layer {layer}"
            assert far(steered, plain)


@ALL
def test_other_kinds_do_what_hooks_written_by_hand_do(name):
    """All hook points of all layers at once, a kind at each, in a forward pass and while generating."""
    model, ids = models.model(name), models.tokens(2, PROMPT)
    kinds = {
        "ablate": (lambda v, w: functools.partial(ablated, v), lambda v, w, **at: fs.Ablate(v, **at)),
        "clamp": (lambda v, w: functools.partial(clamped, v), lambda v, w, **at: fs.Clamp(v, low=-0.5, high=0.5, **at)),
        "rotate": (
            lambda v, w: functools.partial(rotated, v, w),
            lambda v, w, **at: fs.Rotate(v, w, 60.0, relative=True, **at),
        ),
        "keep_norm": (
            lambda v, w: functools.partial(added_keeping_norm, v),
            lambda v, w, **at: fs.Add(v, 2.0, keep_norm=True, **at),
        ),
        "gate": (
            lambda v, w: functools.partial(gated, v, w),
            lambda v, w, **at: fs.Add(v, 2.0, when=fs.Gate(w, kind="cosine"), **at),
        ),
        "project": (lambda v, w: functools.partial(projected, v), lambda v, w, **at: fs.Project(v, **at)),
    }
    plan = []
    with ExitStack() as hooks:
        for layer in range(models.N_LAYERS):
            for i, at in enumerate(models.points(name)):
                if at == "resid_pre" and layer > 0:
                    continue  # the resid_post of the layer before
                # Projecting the residual stream would leave nothing to see the others by.
                kind = list(kinds)[(i + 2 * layer) % 5] if at != "attn_out" or layer != 1 else "project"
                v, w = direction(10 * layer + 2 * i), direction(10 * layer + 2 * i + 1)
                hooks.enter_context(hand_hook(model, name, at, layer, kinds[kind][0](v, w)))
                plan.append(kinds[kind][1](v, w, layers=layer, at=at))
        expected, generated = logits(model, ids), generate(model, ids)
    plain = logits(model, ids)
    with fs.steer(model, fs.Plan(plan)):
        close(logits(model, ids), expected)
        close(generate(model, ids), generated)
    assert far(expected, plain)


# Contracts 1 and 2 ----------------------------------------------------------------------------------------------------


@ALL
def test_what_does_not_steer_changes_no_bit(name):
    model, ids, v = models.model(name), models.tokens(2, PROMPT), direction(0)
    plain, generated = logits(model, ids), generate(model, ids)
    everywhere = {"layers": "all", "at": models.points(name)}
    nothing = {
        "empty": fs.Plan(),
        "none": [None, None],
        "coefficient": fs.Plan([fs.Add(v, 0.0, **everywhere), fs.Ablate(v, 0.0, **everywhere)]),
        "gate": fs.Add(v, when=fs.Gate(v, 1e9), **everywhere),
        "probe": fs.Probe(v, **everywhere),
    }
    for what, plans in nothing.items():
        with fs.steer(model, plans):
            assert torch.equal(logits(model, ids), plain), what
            result = generate(model, ids)
            assert torch.equal(result[0], generated[0]) and torch.equal(result[1], generated[1]), what


@ALL
def test_rows_of_a_mixed_batch(name):
    """Each row as if its plan were everybody's, bit for bit where kernels see each row alone; and as if it were
    alone."""
    model, ids = models.model(name), models.tokens(3, PROMPT)
    plans = [rich_plan(name, 0), None, rich_plan(name, 1)]
    plain = generate(model, ids)
    with fs.steer(model, plans):
        mixed = generate(model, ids)
    for row, plan in enumerate(plans):
        with fs.steer(model, plan or fs.Plan()):
            same, alone = generate(model, ids), generate(model, ids[row : row + 1])
        if name not in models.EXPERTS:
            assert torch.equal(mixed[0][row], same[0][row]) and torch.equal(mixed[1][row], same[1][row])
        close((mixed[0][row], mixed[1][row]), (same[0][row], same[1][row]))
        close((mixed[0][row], mixed[1][row]), (alone[0][0], alone[1][0]))
        assert far(mixed[1][row], plain[1][row]) is (plan is not None)


@ALL
def test_left_padding_does_not_matter(name):
    model, plan = models.model(name), rich_plan(name)
    prompts = [models.tokens(1, length, seed=length)[0] for length in (PROMPT, 3, 5)]
    with fs.steer(model, plan):
        padded = generate(model, models.left_padded(prompts))
        for row, prompt in enumerate(prompts):
            alone = generate(model, prompt.unsqueeze(0))
            close((padded[0][row], padded[1][row]), (alone[0][0], alone[1][0]))


@ALL
def test_padding_of_a_forward_pass_does_not_matter(name):
    """On the left and on the right: the mask says where each row's prompt ends."""
    model, plan = models.model(name), rich_plan(name)
    prompts = [models.tokens(1, length, seed=length)[0] for length in (PROMPT, 3, 5)]
    with fs.steer(model, plan):
        for side, batch in (("left", models.left_padded(prompts)), ("right", models.right_padded(prompts))):
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            padded = logits(
                model, position_ids=positions, ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
            for row, prompt in enumerate(prompts):
                here = padded[row, PROMPT - len(prompt) :] if side == "left" else padded[row, : len(prompt)]
                close(here, logits(model, prompt.unsqueeze(0))[0])


@ALL
def test_cache_on_is_cache_off(name):
    model, ids, plans = models.model(name), models.tokens(2, PROMPT), [rich_plan(name), rich_plan(name, 1)]
    with fs.steer(model, plans):
        close(generate(model, ids, use_cache=True), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.full) for size in (1, 2, 4, 5, 6))])
@ALL
def test_prompt_in_chunks_is_prompt_whole(name, size):
    model, plan = models.model(name), rich_plan(name)
    batch = models.left_padded([models.tokens(1, length, seed=length)[0] for length in (PROMPT, 4)])
    with fs.steer(model, [plan, rich_plan(name, 1)]):
        whole = generate(model, batch)
        close(generate(model, batch, prefill_chunk_size=size), whole)


@ALL
def test_a_loop_of_one_s_own_over_chunks(name):
    """set_prompt says that the pieces are one prompt."""
    model, plan, ids = models.model(name), rich_plan(name), models.tokens(2, PROMPT)
    with fs.steer(model, plan) as steering:
        whole = generate(model, ids)
        steering.set_prompt(PROMPT)
        cache, seen, pieces = DynamicCache(config=model.config), 0, []
        for size in (3, 3, 1):
            pieces.append(logits(model, ids[:, seen : seen + size], **models.cached(model, cache), use_cache=True))
            seen += size
        last, tokens = pieces[-1][:, -1:], []
        for _ in range(NEW):
            tokens.append(last)
            last = logits(model, last.argmax(-1), **models.cached(model, cache), use_cache=True)
        close(torch.cat(tokens, 1), whole[1])
        steering.set_prompt(None)
        close(torch.cat(pieces, 1), logits(model, ids))


@ALL
def test_a_loop_of_one_s_own_over_tokens(name):
    """Without set_prompt, a pass with an empty cache is a prompt and one with a filled cache continues it."""
    model, plan, ids = models.model(name), rich_plan(name), models.tokens(2, PROMPT)
    with fs.steer(model, plan):
        whole = generate(model, ids)
        for _ in range(2):  # a second prompt starts anew
            cache, tokens, given = DynamicCache(config=model.config), [], ids
            for _ in range(NEW):
                tokens.append(logits(model, given, **models.cached(model, cache), use_cache=True)[:, -1:])
                given = tokens[-1].argmax(-1)
            close(torch.cat(tokens, 1), whole[1])


@ALL
def test_static_cache_is_dynamic_cache(name):
    model, plan = models.model(name), rich_plan(name)
    batch = models.left_padded([models.tokens(1, length, seed=length)[0] for length in (PROMPT, 4)])
    plain = generate(model, batch)
    close(generate(model, batch, cache_implementation="static"), plain)
    with fs.steer(model, [plan, rich_plan(name, 1)]):
        dynamic = generate(model, batch)
        close(generate(model, batch, cache_implementation="static"), dynamic)
    assert far(dynamic[1], plain[1])


@ALL
def test_beams_share_the_plan_of_their_prompt(name):
    model, ids, plans = models.model(name), models.tokens(2, PROMPT), [rich_plan(name), None]
    with fs.steer(model, plans):
        together = model.generate(ids, num_beams=3, max_new_tokens=NEW, do_sample=False)
    for row, plan in enumerate(plans):
        with fs.steer(model, plan or fs.Plan()):
            alone = model.generate(ids[row : row + 1], num_beams=3, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(together[row], alone[0])


@ALL
def test_leaving_restores_every_bit(name):
    from test_hook_points import hooks_of

    model, ids = models.build(name), models.tokens(2, PROMPT)
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    before, plain, generated = hooks_of(model), logits(model, ids), generate(model, ids)
    with fs.steer(model, rich_plan(name)):
        assert far(logits(model, ids), plain)
        generate(model, ids)
    assert hooks_of(model) == before
    assert torch.equal(logits(model, ids), plain) and torch.equal(generate(model, ids)[1], generated[1])
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
