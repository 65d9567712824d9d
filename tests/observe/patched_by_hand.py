"""Single edges patched the slow way, one forward pass for each: a sender's steered output put in place of its unsteered
one in what a single receiver reads. Written out in the modules' own names for Llama, Qwen3, Gemma 2 and GPT-2; nothing
of faststeer is used."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import by_hand
import torch


def final_norm(model):
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


@torch.no_grad()
def writes(model, ids, case=None):
    """What every head and MLP adds to the residual stream, by name, `[tokens, hidden]`."""
    seen = {}
    with ExitStack() as stack:
        if case is not None:
            stack.enter_context(by_hand.added(model, case.layer, case.vector, case.coefficient, case.positions, 0))
        for i, layer in enumerate(by_hand.decoder_layers(model)):
            attention = by_hand.attention_of(layer)
            output = attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj

            def heads(module, args, out, i=i, layer=layer):
                z, hidden = args[0][0], out.shape[-1]
                weight = module.weight if hasattr(module, "nf") else module.weight.T  # [heads * size, hidden]
                size = weight.shape[0] // 4
                for head in range(4):
                    own = slice(head * size, (head + 1) * size)
                    written = z[:, own] @ weight[own]
                    if hasattr(layer, "pre_feedforward_layernorm"):  # through the norm behind attention
                        norm = layer.post_attention_layernorm
                        written = by_hand.share(norm, out[0], written)
                    seen[f"L{i}.H{head}"] = written.view(-1, hidden)

            last = layer.post_feedforward_layernorm if hasattr(layer, "post_feedforward_layernorm") else layer.mlp

            def mlp(module, args, out, i=i):
                seen[f"L{i}.MLP"] = out[0]

            stack.callback(output.register_forward_hook(heads).remove)
            stack.callback(last.register_forward_hook(mlp).remove)
        model(input_ids=ids, use_cache=False)
    return seen


@torch.no_grad()
def patched_logits(model, ids, receiver: str, difference):
    """Logits `[tokens, vocabulary]` of the unsteered model where one receiver reads `difference` besides."""
    with patched(model, receiver, difference):
        return model(input_ids=ids, use_cache=False).logits[0]


def writes_patched(model, ids, receiver: str, difference):
    """As `writes`, where one receiver reads `difference` besides."""
    with patched(model, receiver, difference):
        return writes(model, ids)


@contextmanager
def patched(model, receiver: str, difference):
    with ExitStack() as stack:
        if receiver == "logits":
            hook = final_norm(model).register_forward_pre_hook(lambda m, args: (args[0] + difference,))
            stack.callback(hook.remove)
        else:
            number, part = receiver[1:].split(".")
            layer = by_hand.decoder_layers(model)[int(number)]
            first, second = (getattr(layer, name) for name in by_hand.norm_names(layer))
            if part == "MLP":
                moved = second.register_forward_hook(lambda m, args, out: m.forward(args[0] + difference))
                stack.callback(moved.remove)
            else:
                _patch_projection(stack, by_hand.attention_of(layer), first, part[0], int(part[1:]), difference)
        yield


def _patch_projection(stack, attention, norm, kind: str, head: int, difference) -> None:
    stream = []
    stack.callback(norm.register_forward_pre_hook(lambda m, args: stream.append(args[0])).remove)
    fused = hasattr(attention, "c_attn")
    size = attention.head_dim
    projection = attention.c_attn if fused else getattr(attention, f"{kind.lower()}_proj")
    first = head * size + ("QKV".index(kind) * attention.split_size if fused else 0)

    def replace(module, args, out):
        other = module.forward(norm.forward(stream[-1] + difference))
        made = out.clone()
        made[..., first : first + size] = other[..., first : first + size]
        return made

    stack.callback(projection.register_forward_hook(replace).remove)
