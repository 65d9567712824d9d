"""What a model's attention, MLPs and linear layers compute with while the Engine runs on a CPU: fewer and faster calls
for the same formulas. Where one token per row is read, the calls themselves are what costs.

    attention                  `ops.attention_branch_`, or its parts where heads are normed
    MLP                        `ops.gated_mlp`
    any other linear layer     the product of `linear.product_for`

An attention or an MLP is replaced where its own `forward` names nothing but what these formulas have; whatever else it
does (another rotation, biases on the scores, experts) keeps it as it is, and so do hooks inside it. The engine checks
the logits of the whole afterwards, and takes all of this back where they are not the model's own.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faststeer.engine.cache import RowCache
from faststeer.engine.linear import FEW, fast_forward, is_plain, most_rows, product_for
from faststeer.hf.cache import cache_in
from faststeer.hf.changes import Changes, Context
from faststeer.ops import attention_branch_, gated_mlp, rotary_attention_
from faststeer.ops.decode import Activation

# Every name that the forward passes of the attentions in question may use.
ATTENTION_NAMES = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "apply_rotary_pos_emb",
    "num_attention_heads", "num_key_value_heads", "head_dim", "scaling", "attn_logit_softcapping", "sliding_window",
    "shape", "view", "reshape", "transpose", "contiguous", "getattr", "config", "layer_idx", "update", "training",
    "attention_dropout", "_attn_implementation", "ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward",
}  # fmt: skip
MLP_NAMES = {"gate_proj", "up_proj", "gate_up_proj", "chunk", "down_proj", "act_fn", "activation_fn"}


class Layers(Context[None]):
    """What makes a model compute so, while it is entered. Weights and hooks are looked at anew each time.

    `whole`: attention and MLPs, too, not linear layers alone.
    """

    def __init__(self, model: nn.Module, whole: bool) -> None:
        self._model = model
        self.parts = _parts(model) if whole else []
        self.intact = False  # whether, while entered, all parts are as they were found

    def enter(self, changes: Changes) -> None:
        watched = torch.nn.modules.module._has_any_global_hook()
        intact = [part for part in self.parts if part.is_intact() and not watched]
        changes.on_undo(setattr, self, "intact", False)
        self.intact = len(intact) == len(self.parts)
        for part in intact:
            changes.replace(part.module, "forward", part.forward)
        for module in self._model.modules():
            # Inside a replaced attention too, which reads prompts by its own forward.
            if isinstance(module, nn.Linear) and is_plain(module):
                forward = fast_forward(module)
                if forward is not None:
                    changes.replace(module, "forward", forward)


class _Part:
    """A module that is replaced, and the linear layers in it."""

    def __init__(self, module: nn.Module, linears: Sequence[nn.Linear]) -> None:
        self.module, self.linears = module, linears
        self._own: Callable[..., Any] = type(module).forward
        self._dtype = linears[0].weight.dtype
        self._product = product_for(linears[0].weight)
        self._hooks = [hooks for m in linears for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def is_intact(self) -> bool:
        """Whether the module still has these linear layers, and each is nothing more: an adapter would take its
        place."""
        children = list(self.module.children())
        return "forward" not in self.module.__dict__ and all(
            is_plain(linear) and any(linear is child for child in children) for linear in self.linears
        )

    def _takes(self, x: Tensor) -> bool:
        """Not under autocast, say, nor where somebody looks at the linear layers."""
        return x.dtype == self._dtype and not any(self._hooks)

    def _linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        return self._product(x, module.weight, module.bias)


class Attention(_Part):
    def __init__(self, module: Any) -> None:
        together = "qkv_proj" in dict(module.named_children())
        readers = [module.qkv_proj] if together else [module.q_proj, module.k_proj, module.v_proj]
        super().__init__(module, [*readers, module.o_proj])
        self._readers, self._last = readers, module.o_proj
        self._size, self._layer = module.head_dim, module.layer_idx
        queries = module.o_proj.in_features
        others = (sum(reader.out_features for reader in readers) - queries) // 2
        self._sizes = [queries, others, others]
        self._scaling = float(module.scaling)
        self._softcap = float(getattr(module, "attn_logit_softcapping", None) or 0.0)
        self._norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None), None)
        self._whole = 0 if together or any(self._norms) else most_rows(module.o_proj.weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache, x = cache_in(kwargs), kwargs.get("hidden_states")
        if args or x is None or type(cache) is not RowCache or not cache.decoding or not self._takes(x):
            return self._own(self.module, *args, **kwargs)
        cosine, sine = (t[:, 0] for t in kwargs["position_embeddings"])
        mask = kwargs["attention_mask"][:, 0, 0]
        return self.attend(x[:, 0], cosine, sine, cache.column, mask, cache).unsqueeze(1), None

    def attend(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        column: Tensor,
        mask: Tensor | None,
        cache: RowCache,
        window: int = 0,
        tokens: int = 1,
    ) -> Tensor:
        """Of `[rows, hidden]`; cosine and sine `[rows, rotary]`, column `[rows]`, mask, window and tokens as
        `rotary_attention_` takes them."""
        stored = cache.rows_of(self._layer, self._sizes[1] // self._size, self._size, x)
        angles = cosine, sine, column
        how: dict[str, Any] = {"softcap": self._softcap, "window": window, "tokens": tokens}
        if FEW <= len(x) <= self._whole and mask is None:
            query, key, value, output = ((linear.weight, linear.bias) for linear in self.linears)
            return attention_branch_(x, query, key, value, output, *stored, *angles, self._scaling, **how)
        read: Sequence[Tensor] = [self._linear(reader, x) for reader in self._readers]
        if len(read) == 1:
            read = read[0].split(self._sizes, -1)
        q, k, v = map(self._heads, read, self._norms)
        attended = rotary_attention_(q, k, v, *stored, *angles, mask, self._scaling, **how)
        return self._linear(self._last, attended.flatten(1))

    def _heads(self, x: Tensor, norm: Any) -> Tensor:
        """`[n, heads, size]`, each head normed, or all of them together where the norm is as wide."""
        if norm is None:
            return x.view(x.shape[0], -1, self._size)
        if norm.weight.shape[-1] == self._size:
            return norm(x.view(x.shape[0], -1, self._size))
        return norm(x).view(x.shape[0], -1, self._size)


class MLP(_Part):
    def __init__(self, module: Any) -> None:
        children = dict(module.named_children())
        readers = [module.gate_up_proj] if "gate_up_proj" in children else [module.gate_proj, module.up_proj]
        super().__init__(module, [*readers, module.down_proj])
        self._readers, self._last = readers, module.down_proj
        self._act = module.act_fn if "act_fn" in children else module.activation_fn
        plain = not any(reader.bias is not None for reader in readers)
        self._fused = _activation(self._act) if plain else None
        self._whole = most_rows(module.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self._takes(x):
            return self._own(self.module, x)
        return self.compute(x.reshape(-1, x.shape[-1])).view(x.shape)

    def compute(self, flat: Tensor) -> Tensor:
        """Of `[rows, hidden]`."""
        if self._fused is not None and FEW <= len(flat) <= self._whole and not self._act._forward_hooks:
            weights = [reader.weight for reader in self._readers]
            gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
            return gated_mlp(flat, gate, up, self._last.weight, self._last.bias, self._fused)
        read = [self._linear(reader, flat) for reader in self._readers]
        gate, up = read if len(read) == 2 else read[0].chunk(2, -1)
        return self._linear(self._last, self._act(gate) * up)


def _activation(module: nn.Module) -> Activation | None:
    """The activation of `gated_linear` that a module computes; found by trying, bit for bit."""
    x = torch.linspace(-20, 20, 1001)
    known: dict[Activation, Tensor] = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    found = module(x)
    return next((name for name, expected in known.items() if torch.equal(found, expected)), None)


def own_forward(module: nn.Module) -> tuple[Any, set[str]]:
    """The `forward` of a module's class without decorators, and the names that it uses (none where it is not written
    in Python)."""
    function = inspect.unwrap(type(module).forward)
    return function, set(function.__code__.co_names) if isinstance(function, types.FunctionType) else set()


def _parts(model: nn.Module) -> list[Attention | MLP]:
    """The modules that have one of the two forms."""
    found: list[Attention | MLP] = []
    for module in model.modules():
        function, names = own_forward(module)
        children = {name for name, _ in module.named_children()}
        if not names or any(True for _ in module.parameters(recurse=False)):
            continue
        if not all(type(child) is nn.Linear for name, child in module.named_children() if name.endswith("_proj")):
            continue
        if "o_proj" in children and names <= ATTENTION_NAMES and _rotates_by_halves(function, module):
            found.append(Attention(module))
        elif children & {"gate_proj", "gate_up_proj"} and "down_proj" in children and names <= MLP_NAMES:
            found.append(MLP(module))
    return found


def _rotates_by_halves(function: types.FunctionType, module: Any) -> bool:
    """Whether an attention's rotation is `rotary_attention_`'s."""
    apply = function.__globals__.get("apply_rotary_pos_emb")
    if apply is None or "apply_rotary_pos_emb" not in function.__code__.co_names:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 1, module.head_dim, generator=generator) for heads in (3, 1))
    cosine, sine = (torch.randn(2, 1, module.head_dim, generator=generator) for _ in range(2))
    expected = []
    for x in (q, k):
        a, b = x.chunk(2, -1)
        expected.append(x * cosine.unsqueeze(1) + torch.cat([-b, a], -1) * sine.unsqueeze(1))
    try:
        return all(map(torch.equal, apply(q, k, cosine, sine), expected))
    except (TypeError, ValueError, RuntimeError):
        return False
