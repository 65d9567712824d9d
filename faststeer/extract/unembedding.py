"""Directions read off the unembedding: what makes chosen tokens likely, with the final norm between taken into account.

Only the direct path from the residual stream to the logits is meant; what later layers make of the direction is not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from faststeer.hf import find_hook_points
from faststeer.hf.anatomy import run_four_tokens
from faststeer.hf.batching import model_name
from faststeer.hf.changes import Changes, changing
from faststeer.hf.encoding import encode_texts
from faststeer.hf.hook_points import first_output, first_tensor, quiet
from faststeer.vector import HookPoint, SteeringVector, check_hook_point

Tokens = Sequence[int | str]


def unembedding(
    model: Any,
    tokenizer: Any,
    tokens: Tokens,
    against: Tokens | None = None,
    *,
    layers: Iterable[int] | None = None,
    at: HookPoint = "resid_pre",
) -> SteeringVector:
    """Return the unit direction along which the logits of `tokens` rise against those of `against`, the same for every
    layer.

    With u = mean unembedding row of `tokens` - mean row of `against`, the logit difference at the end of the model is u
    . norm(h). A final RMSNorm gives norm(h) = gain * h / rms(h), so that the direction is gain * u: the row of the
    unembedding is meant for the normed stream, and a unit of the stream counts as much as the gain lets it. A LayerNorm
    takes the mean of h away, so that gain * u loses its own mean as well. Both are read off the norm's values (Gemma's
    gain of 1 + weight included), not off its class. What is left out: 1 / rms(h), a positive factor, and the part of
    the gradient along h itself, with which the norm answers to a longer h; neither is a direction of its own.

    Args:
        tokens, against: token ids, or texts that are one token each. Without `against`: the mean row of the whole
            vocabulary, since what all logits gain alike changes no probability.
        layers, at: where the direction is meant to act (all layers).

    Raises:
        ValueError: no tokens, a text of several tokens, an id outside the vocabulary, the same token on both sides, a
            model without output embedding or with something else than a norm before it.
    """
    check_hook_point(at)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: load the model with its language model head")
    rows = head.weight.detach()
    wanted = _ids(tokenizer, tokens, rows.shape[0], "tokens")
    other = [] if against is None else _ids(tokenizer, against, rows.shape[0], "against")
    if shared := set(wanted) & set(other):
        raise ValueError(f"token(s) {sorted(shared)} are both in tokens and in against: leave them out of one")
    # A vocabulary's mean row in fp64 without a second copy of the whole matrix.
    mean = rows[other].double().mean(0) if other else rows.sum(0, dtype=torch.float64) / rows.shape[0]
    u = (rows[wanted].double().mean(0) - mean).cpu()
    norm = final_norm(model)
    direction = u * norm.gain
    if norm.centred:
        direction = direction - direction.mean()
    if not bool(direction.norm() > 0):
        raise ValueError("tokens and against have the same unembedding: there is no direction between them")
    points = find_hook_points(model)
    unit = (direction / direction.norm()).float()
    provenance = {"tokens": wanted, "against": other or "the mean of the vocabulary", "position": None}
    found = {layer: unit.clone() for layer in (range(points.n_layers) if layers is None else layers)}
    return SteeringVector(
        found, at=at, model=model_name(model), method="unembedding", scale="unit", provenance=provenance
    )


class FinalNorm(NamedTuple):
    """norm(h) = gain * (h - centred * mean(h)) / its rms + bias; gain `[hidden]` fp64 on the CPU."""

    gain: Tensor
    centred: bool


def final_norm(model: nn.Module) -> FinalNorm:
    """Find what is between the last layer and the unembedding, and read its gain off its values.

    Raises:
        ValueError: something else than one RMSNorm or LayerNorm (or nothing) is there.
    """
    found = _module_before_head(model)
    size = find_hook_points(model).hidden_size
    if found is None:
        return FinalNorm(torch.ones(size, dtype=torch.float64), False)
    name, module = found
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values: load the model into memory")
    norm = copy.deepcopy(module).to("cpu", torch.float64).eval()

    @torch.no_grad()
    def apply(x: Tensor) -> Tensor:
        return norm(x).double()

    # Rows of +1 and -1, which divide safely; large against any eps.
    x = torch.ones(size, dtype=torch.float64)
    x[1::2] = -1.0
    x = 1e3 * x
    centred = bool(torch.allclose(apply(x), apply(x + 1e3), rtol=1e-4, atol=1e-4))

    def shape(h: Tensor) -> Tensor:
        h = h - h.mean() if centred else h
        return h / h.pow(2).mean().sqrt()

    gain = (apply(x) - apply(-x)) / 2 / shape(x)
    bias = (apply(x) + apply(-x)) / 2
    other = 1e3 * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Norms of transformers compute in fp32 inside, whatever their input.
    if not torch.allclose(apply(other), gain * shape(other) + bias, rtol=1e-4, atol=1e-4 * float(gain.abs().max())):
        raise ValueError(
            f"{name}, a {type(module).__name__} before the unembedding, is neither an RMSNorm nor a LayerNorm: "
            "no direction in the residual stream belongs to a token"
        )
    return FinalNorm(gain, centred)


def _module_before_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The module whose input is the last layer's output and whose output is the unembedding's input; None where they
    are one tensor."""
    points = find_hook_points(model)
    last, head = points.layer(model, points.n_layers - 1), model.get_output_embeddings()  # type: ignore[operator]
    seen: dict[str, Tensor] = {}
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def note(changes: Changes, name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            if tensors and isinstance(output, Tensor):
                calls.append((name, module, tensors[0].detach(), output.detach()))

        changes.hook(module.register_forward_hook, hook, with_kwargs=True)

    def on_last(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["last"] = first_output(output).detach()

    def on_head(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["head"] = first_tensor(args, kwargs).detach()

    with quiet(model), changing() as changes:
        for name, module in model.named_modules():
            if name and not name.startswith(points.layers):
                note(changes, name, module)
        changes.hook(last.register_forward_hook, on_last)
        changes.hook(head.register_forward_pre_hook, on_head, with_kwargs=True)
        run_four_tokens(model)
    if "last" not in seen or "head" not in seen:
        raise ValueError(f"a forward pass of {type(model).__name__} does not reach its output embedding")

    def same(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and torch.equal(a.to("cpu"), b.to("cpu"))

    if same(seen["last"], seen["head"]):
        return None
    for name, module, received, sent in calls:
        if same(received, seen["last"]) and same(sent, seen["head"]):
            return name, module
    raise ValueError(
        f"{type(model).__name__} has more than one norm between its last layer and its unembedding: the stream "
        "is not read by the unembedding directly, so no direction in it belongs to a token"
    )


def _ids(tokenizer: Any, tokens: Tokens, vocabulary: int, what: str) -> list[int]:
    if isinstance(tokens, str) or not tokens:
        raise ValueError(f"{what} is {tokens!r}: expected a list of token ids or of texts of one token each")
    ids: list[int] = []
    for token in tokens:
        if isinstance(token, str):
            found = encode_texts(tokenizer, [token], begin=False)[0]
            if len(found) != 1:
                pieces = ", ".join(repr(tokenizer.decode([i])) for i in found)
                raise ValueError(
                    f"{what}: {token!r} is {len(found)} tokens ({pieces}): give one token, or its id; many tokenizers "
                    f"have one for {' ' + token!r}"
                )
            ids.append(found[0])
        elif isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ValueError(f"{what}: {token!r} is no token of a vocabulary of {vocabulary}")
        else:
            ids.append(token)
    return sorted(set(ids))
