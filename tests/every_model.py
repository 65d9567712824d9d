"""Small random models of every causal language model that transformers has, from their configurations alone, and what
is checked of each: `python tests/every_model.py` prints docs/models.md.

Sizes are made small by the names of the fields. Where sizes of a family depend on each other, `FITTING` says how. A
list with an entry per layer is cut down so that every kind of layer stays.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import faststeer as fs
from faststeer.hf import find_hook_points
from faststeer.hf.hook_points import HookPoints

N_LAYERS, HIDDEN, VOCAB = 4, 32, 101
_GROUPS: list[tuple[Any, str]] = [
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        HIDDEN,
        "hidden_size d_model n_embd emb_dim embed_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
        "input_embedding_size output_embedding_size backbone_hidden_size attention_hidden_size projection_dim "
        "out_hidden_size",
    ),
    (
        N_LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks num_layers_per_stack",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads num_kv_heads "
        "qk_rope_head_dim rotary_dim num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num "
        "mamba_n_heads mamba_num_heads n_mamba_heads index_n_heads index_topk linear_num_key_heads linear_num_heads "
        "linear_num_value_heads",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads num_query_groups num_experts_per_tok num_experts_per_token depth "
        "moe_topk moe_k moe_top_k rescale_every",
    ),
    (
        8,
        "head_dim d_head v_head_dim kv_channels dim_head attention_head_size attention_head_dim swa_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim query_pre_attn_scalar global_head_dim "
        "qk_nope_head_dim index_head_dim mamba_d_state state_size ssm_state_size d_rel",
    ),
    (
        48,
        "intermediate_size ffn_dim d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff dim_ff n_inner "
        "feed_forward_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size intermediate_size_mlp dense_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "decoder_sparse_step interleave_moe_layer_step first_k_dense_replace num_dense_layers moe_layer_start_index "
        "num_nextn_predict_layers num_kv_shared_layers n_layers_per_attn_res_block mamba_n_groups n_groups "
        "mamba_ngroups o_groups",
    ),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions"),
    (
        16,
        "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank gated_norm_rank adapter_rank "
        "loop_gate_rank mamba_dt_rank time_step_rank hc_lowrank router_hidden_size mamba_d_head mamba_head_dim "
        "mamba_headdim mamba_chunk_size chunk_size ngram_vocab_size_base",
    ),
    (
        64,
        "sliding_window sliding_window_size attention_window_size swa_window local_attention attention_chunk_size "
        "window_size rel_extent",
    ),
    (0.25, "initializer_range init_std initializer_factor"),
]
# No token ends a sequence, so that every generation has the length asked for.
_SMALL: dict[str, Any] = {
    **{name: value for value, names in _GROUPS for name in names.split()},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_LATENT = {"num_key_value_heads": 4}  # latent attention has as many keys as queries
_GLOBAL = "full_attention"
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
FITTING: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"), _LATENT),
    "dots3_note": {"text_config": _LATENT},
    "dots3_note_text": _LATENT,
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": [_GLOBAL] * 4,
        "rope_parameters": {_GLOBAL: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "dory": {"layer_types": [_GLOBAL] * 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {"loop_layer_index_start": 1, "loop_layer_index_end": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", _GLOBAL] * 2, "full_attn_idxs": [1, 3], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", _GLOBAL] * 2},
    "longcat_flash": {"head_dim": 4, "num_key_value_heads": 4},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
# Language models inside of models for images and sounds, which the list of causal language models does not have.
WRAPPERS = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "higgs_audio_v2": "HiggsAudioV2ForConditionalGeneration",
}
FAMILIES = {**CAUSAL, **WRAPPERS}
# One of each kind, for the shorter run.
KINDS = (
    "llama", "gpt_neox", "qwen3_moe", "gpt_oss", "deepseek_v3", "granite", "mamba", "mamba2", "rwkv", "xlstm", "jamba",
    "nemotron_h", "lfm2", "qwen3_next", "zamba2", "gemma3n_text", "gemma4_text", "gemma3", "qwen3_vl", "deepseek_v4",
    "dory", "mllama", "bert", "xlm",
)  # fmt: skip


# Building -------------------------------------------------------------------------------------------------------------


def _fields(config: type) -> set[str]:
    annotated = {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}
    return (annotated | set(inspect.signature(config.__init__).parameters)) - set(getattr(config, "attribute_map", {}))


def _small(config: type) -> dict[str, Any]:
    """Arguments for a small configuration of a class."""
    fields = _fields(config)
    arguments = {name: value for name, value in _SMALL.items() if name in fields}
    try:
        default: Any = config()
    except Exception:  # a class without a default of its own
        return arguments
    values = default.to_dict()
    for name in arguments:
        if values.get(name, 0) is None and not name.endswith("token_id"):
            arguments[name] = None
    counts = [name for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if name in arguments]
    size = max((values.get(name) or 0 for name in counts), default=0)
    lists = {name: value for name, value in values.items() if isinstance(value, (list, tuple)) and name in fields}
    per_layer = {name: value for name, value in lists.items() if len(value) == size > 0}
    if per_layer:
        kinds = [tuple(map(repr, column)) for column in zip(*per_layer.values(), strict=True)]
        chosen = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:6]
        chosen = (chosen * N_LAYERS)[: max(N_LAYERS, len(chosen))]
        arguments |= {name: len(chosen) for name in counts}
        arguments |= {name: [value[i] for i in chosen] for name, value in per_layer.items()}
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(default, name, None)) is not None:
            arguments[name] = _small(type(inner))
    return arguments


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    nested = {name: _merged(a[name], b[name]) for name in a.keys() & b.keys() if isinstance(a[name], dict)}
    return a | b | nested


def build(family: str) -> nn.Module:
    """A small random model in evaluation mode, always with the same weights. Raises what transformers raises."""
    config_class = CONFIG_MAPPING[family]
    config = config_class(**_merged(_small(config_class), FITTING.get(family, {})))
    torch.manual_seed(0)
    if family in WRAPPERS:
        model = getattr(transformers, WRAPPERS[family])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    # Norm weights of exactly one and biases of exactly zero would hide a wrong place or a wrong order.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval().requires_grad_(False)


# Checking -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A family's row in docs/models.md."""

    path: str
    level: str
    tested: str


LENGTHS = (6, 3, 5)
NEW = 3


def check(family: str) -> Row:
    """Check a family against hooks written by hand and against each row alone. Raises AssertionError; a family that
    transformers cannot build or run small, or that is refused, gets a row that says so."""
    try:
        model = build(family)
        plain = _logits(model, _tokens(3, 6))
    except Exception as error:
        return Row("-", "not tried", f"no small one runs: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
    try:
        points = find_hook_points(model)
    except ValueError as error:
        return Row("-", "refused", str(error).partition(": ")[2].partition("; steer a single")[0])
    _check_hooks(model, points)
    _check_rows(model, points, plain)
    tested = _check_padding(model, points) + _check_generate(model, points)
    assert torch.equal(_logits(model, _tokens(3, 6)), plain), "the model is not as it was"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if _ours(m)), "a hook stays"
    return Row(fs.steer(model, [None]).path, _level(points), ", ".join(["hooks", "rows", "restored", *tested]))


def _ours(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(hasattr(hook, "faststeer_order") for hook in hooks)


def _level(points: HookPoints) -> str:
    whole = [i for i in range(points.n_layers) if points.has("attn_out", i)]
    lacking = []
    for at in ("resid_pre", "resid_post"):
        if layers := [str(i) for i in range(points.n_layers) if not points.has(at, i)]:
            lacking.append(f"no {at} in layer{'s' * (len(layers) > 1)} {', '.join(layers)}")
    inside = "attn_out, mlp_out" + (", resid_mid" if whole and points.has("resid_mid", whole[0]) else "")
    parts = ["resid_pre, resid_post", *lacking]
    if whole:
        some = "" if len(whole) == points.n_layers else f" in {len(whole)} of {points.n_layers} layers"
        parts.append(inside + some)
    if points.streams != (1, 1):
        parts.append(f"{max(points.streams)} streams per token, all steered")
    return "; ".join(parts)


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(length))


def _padded() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Prompts of several lengths, and the batch of them with padding on the left."""
    prompts = [_tokens(1, length)[0] for length in LENGTHS]
    width = max(LENGTHS)
    pads = [torch.zeros(width - len(prompt), dtype=torch.long) for prompt in prompts]
    ids = torch.stack([torch.cat(parts) for parts in zip(pads, prompts, strict=True)])
    mask = torch.stack([torch.cat([pad, torch.ones_like(p)]) for pad, p in zip(pads, prompts, strict=True)])
    return prompts, {"input_ids": ids, "attention_mask": mask}


def _logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def _direction(points: HookPoints, seed: int) -> Tensor:
    return torch.randn(points.hidden_size, generator=torch.Generator().manual_seed(1000 + seed))


def _has(points: HookPoints, at: str) -> list[int]:
    return [i for i in range(points.n_layers) if points.has(at, i)]


@contextmanager
def _by_hand(model: nn.Module, points: HookPoints, at: str, v: Tensor) -> Iterator[None]:
    """Add v to what every layer takes, or gives, with plain PyTorch hooks."""

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] + v, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + v}

    def behind(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output + v if isinstance(output, Tensor) else (output[0] + v, *output[1:])

    layers = model.get_submodule(points.layers)
    with ExitStack() as hooks:
        for i in _has(points, at):
            layer = layers[i]  # type: ignore[index]
            if at == "resid_pre":
                hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            else:
                hooks.enter_context(layer.register_forward_hook(behind))
        yield


def _check_hooks(model: nn.Module, points: HookPoints) -> None:
    ids, v = _tokens(3, 6), _direction(points, 0)
    plain = _logits(model, ids)
    for at in ("resid_pre", "resid_post"):
        with _by_hand(model, points, at, v):
            expected = _logits(model, ids)
        assert not torch.equal(expected, plain)
        plan = fs.Add(v, 1.0, layers=_has(points, at), at=at)
        for path in ("hooks", "auto"):
            with fs.steer(model, plan, path=path):  # type: ignore[arg-type]
                _close(_logits(model, ids), expected, f"{at}, {path}", exact=path == "hooks")


def _has_experts(model: nn.Module) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


def _plans(points: HookPoints) -> list[fs.Plan | None]:
    layers = _has(points, "resid_post")
    one = fs.Add(_direction(points, 1), 1.0, layers=layers)
    other = fs.Ablate(_direction(points, 2), layers=layers)
    return [fs.Plan([one]), None, fs.Plan([other, fs.Add(_direction(points, 3), 0.5, layers=[0], at="resid_pre")])]


def _check_rows(model: nn.Module, points: HookPoints, plain: Tensor) -> None:
    ids, plans = _tokens(3, 6), _plans(points)
    with fs.steer(model, [None, None, None], path="hooks"):
        assert torch.equal(_logits(model, ids), plain), "not steered, and not the model's own bits"
    with fs.steer(model, plans, path="hooks"):
        mixed = _logits(model, ids)
    # Kernels of experts see rows in groups: is the model's own row bit for bit the same when its neighbours change?
    others = _tokens(3, 6).flip(1)
    own = all(
        torch.equal(_logits(model, torch.cat([o[:1], ids[1:2], o[2:]]))[1], plain[1]) for o in (others, ids.flip(0))
    )
    _close(mixed[1], plain[1], "the row without a plan", exact=own and not _has_experts(model))
    for row, plan in enumerate(plans):
        alone = _logits(model, ids[row : row + 1])
        if not _near(alone[0], plain[row]):
            continue  # the model's own matter
        with fs.steer(model, plan or fs.Plan()):
            _close(mixed[row], _logits(model, ids[row : row + 1])[0], f"row {row} alone")


def _check_padding(model: nn.Module, points: HookPoints) -> list[str]:
    batch = _padded()[1]
    v = _direction(points, 4)
    try:
        plain = _logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    except Exception:
        return ["no padding"]
    with _by_hand(model, points, "resid_post", v):
        expected = _logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    plan = fs.Add(v, 1.0, layers=_has(points, "resid_post"))
    with fs.steer(model, plan, path="hooks"):
        steered = _logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"].bool()
    _close(steered[real], expected[real], "with padding", exact=True)
    return ["padding"] if torch.isfinite(plain[real]).all() else ["padding of its own kind"]


def _check_generate(model: nn.Module, points: HookPoints) -> list[str]:
    """Plans with positions, under generate on a batch with padding on the left: as hooks written by hand that count the
    passes, and as each prompt alone where that is so by hand."""
    prompts, batch = _padded()
    singles = [{"input_ids": p[None], "attention_mask": torch.ones_like(p[None])} for p in prompts]
    try:
        plain = _generate(model, batch)
        mixing = not any(_near(plain[row], _generate(model, singles[row])[0]) for row in range(3))
    except Exception:
        return ["no generate"]
    layers, last, generated = _has(points, "resid_post"), _direction(points, 5) / 2, _direction(points, 6) / 2
    plan = fs.Plan(
        [
            fs.Add(last, 1.0, layers=layers, positions="last"),
            fs.Add(generated, 1.0, layers=layers, positions="generated"),
        ]
    )

    def by_hand(given: dict[str, Tensor]) -> Tensor:
        with _by_hand_in_generate(model, points, last, generated):
            return _generate(model, given)

    runs = [*([] if mixing else [batch]), *singles]
    expected = [by_hand(given) for given in runs]
    with fs.steer(model, plan):
        _close(_generate(model, runs[0]), expected[0], "generate by the default path")
    with fs.steer(model, plan, path="hooks"):
        found = [_generate(model, given) for given in runs]
    for ours, hand in zip(found, expected, strict=True):
        _close(ours, hand, "generate")
    if mixing:
        return ["generate by one prompt at a time (the model itself mixes rows)"]
    assert not _near(found[0], plain), "nothing was steered"
    alone = [row for row in range(3) if _near(expected[0][row], expected[1 + row][0])]
    for row in alone:
        _close(found[0][row], found[1 + row][0], f"generate, row {row}")
    return ["generate" if len(alone) == 3 else "generate (by hand, too, padding shows in a row)"]


@contextmanager
def _by_hand_in_generate(model: nn.Module, points: HookPoints, last: Tensor, generated: Tensor) -> Iterator[None]:
    """Add a direction at the last token of the prompt and another at every later one, behind every layer."""
    prompt, end, length = 0, 0, 0  # columns of the prompt, of all passes up to this one, and of this one

    def begin(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal prompt, end, length
        names = ("input_ids", "inputs_embeds", "hidden_states", "audio_input_ids")
        given = (*map(kwargs.get, names), *args)
        length = next(x.shape[1] for x in given if isinstance(x, Tensor))
        prompt = prompt or length
        end = length if length >= prompt else end + length  # without a cache every pass reads everything

    def behind(_module: nn.Module, _args: Any, output: Any) -> Any:
        x = (output if isinstance(output, Tensor) else output[0]).clone()
        columns = x.movedim(1 + (points.streams[0] > 1), 0)  # a layer may take the last ones alone
        index = torch.arange(end - columns.shape[0], end)
        columns[index == prompt - 1] += last
        columns[index >= prompt] += generated
        return x if isinstance(output, Tensor) else (x, *output[1:])

    with ExitStack() as hooks:
        hooks.enter_context(points.owner(model).register_forward_pre_hook(begin, with_kwargs=True))
        for i in _has(points, "resid_post"):
            hooks.enter_context(points.layer(model, i).register_forward_hook(behind))
        yield


def _generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits `[rows, new, vocabulary]` that greedy decoding chose from."""
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return torch.stack(model.generate(**batch, **settings).logits, 1)


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal to the rounding of some thousand operations in fp32; the mistakes looked for are a thousand times as
    large."""
    finite = torch.isfinite(b)
    scale = float(b[finite].abs().amax()) if finite.any() else 1.0
    return torch.allclose(a, b, rtol=0, atol=4000 * torch.finfo(a.dtype).eps * scale, equal_nan=True)


def _close(a: Tensor, b: Tensor, what: str, exact: bool = False) -> None:
    assert torch.equal(a, b) if exact else _near(a, b), f"{what}: off by {float((a - b).abs().max()):.3g}"


# The table ------------------------------------------------------------------------------------------------------------

HEAD = """# Models

This table has every causal language model of transformers that can be built with small random weights, and the
language models inside models for images and sounds. `python tests/every_model.py` prints it, and a test compares it
with the models.

- *path*: how faststeer steers the residual stream by default, by fused layers or by hooks
  ([Concepts](concepts.md#fused-layers-and-hooks)).
- *hook points*: those that the layers have ([Concepts](concepts.md#hook-points)).
- *tested*: what was compared.
    - "hooks": steering equals hand-written hooks.
    - "rows": each row of a mixed batch equals that row alone, and rows without a plan are bit for bit the model's
      own.
    - "restored": after steering the model is what it was.
    - "padding": with padding on the left, steering equals hand-written hooks.
    - "generate": `generate` with plans that depend on positions, with padding and a cache, equals hand-written hooks
      and each prompt alone.

"By hand, too, padding shows in a row" means that the model itself reads padding into its states, with and without
steering.

| family | path | hook points | tested |
|---|---|---|---|
"""
TAIL = """
## Quantised weights

Steering acts on hidden states, so weights may have any form that the model's own forward pass can use. The table was
tested on a small Llama in fp32 and bf16, bit for bit against hand-written hooks, with padding and with rows without a
plan (`tests/hf/test_quantised.py`):

| weights | path | a plan per row | Engine | fold |
|---|---|---|---|---|
| torchao int8, weights only | fused | yes | yes | refused |
| torchao int8, activations per token as well | hooks | yes | yes | refused |
| bitsandbytes int8 | hooks | yes | yes | refused |
| bitsandbytes NF4 | fused | yes | yes | refused |
| PyTorch's dynamic quantisation | hooks | refused | refused | refused |

- A layer that quantises its input is steered by hooks. A fused norm sums in another order than the model's own norm.
  That can change the last bit of a row's largest number, and with it the scale of the row.
- PyTorch's dynamic quantisation has one scale for the whole batch, so each row depends on the others, steered or not.
  One plan for all rows works as a hook does; different plans are refused.
- bitsandbytes on a CPU packs 4-bit weights again in the first pass in evaluation mode without gradients, with another
  rounding. So outputs before and after that pass differ, steered or not.
- `fold` changes only plain weights: fold first and quantise afterwards. A GGUF file is dequantised when it is loaded.
"""


def line(family: str, row: Row) -> str:
    return f"| {family} | {row.path} | {row.level} | {row.tested} |\n"


def main(write: Callable[[str], Any] = sys.stdout.write) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    write(HEAD)
    for family in sys.argv[1:] or sorted(FAMILIES):
        try:
            row = check(family)
        except Exception as error:
            row = Row("-", "WRONG", f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " "))
        write(line(family, row))
        sys.stdout.flush()
    write(TAIL)


if __name__ == "__main__":
    main()
