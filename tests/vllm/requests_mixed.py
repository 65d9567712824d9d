"""Requests for the tests of the engine, and what Hugging Face's model makes of them."""

from typing import Any

import torch

import faststeer as fs

SYSTEM = (
    "You are a helpful assistant. You answer questions about food, craft, writing, plants, objects, events and people. "
    "You answer in a few short sentences, and you say what you think. You never say too much, and you are always kind."
)
QUESTIONS = (
    "How do I bake a loaf of bread?", "How can I steal a bicycle?", "Tell me about a poem.", "What is a rainy day?",
    "How do I write a letter to a friend?", "How can I run a scam?", "Where does a rose grow?", "What is a lamp?",
)  # fmt: skip
# ServerSettings that every plan below can be had with.
SPECIAL = {"hook_points": "all", "latched_gates": 2, "max_directions": 100, "max_vectors": 128}


def token_ids(tokenizer: Any) -> list[list[int]]:
    """Prompts that begin alike for more than a block."""
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]


def plans(n: int = 32) -> list[fs.Plan]:
    """Different plans, of every kind, at every hook point, strong enough to change the text."""
    generator = torch.Generator().manual_seed(3)

    def direction(*shape: int, scale: float = 80.0) -> torch.Tensor:
        return scale * torch.nn.functional.normalize(torch.randn(*shape, 128, generator=generator), dim=-1)

    def made(i: int) -> list[fs.Intervention]:
        v, layer = direction(), i % 6
        return [
            lambda: [fs.Add(v, coefficient=1 + 0.1 * i, layers=layer)],
            lambda: [fs.Ablate(direction(2), layers="all", at=("resid_pre", "attn_out", "mlp_out"))],
            lambda: [fs.Add(v, layers=[layer], positions="generated"), fs.Clamp(direction(), low=0.5, layers=layer)],
            lambda: [fs.Rotate(v, direction(), 60.0, layers=range(2, 5), at="resid_mid")],
            lambda: [fs.Add(v, layers=1, positions="[-5:]", keep_norm=True), fs.Add(direction(), -1.0, layers=4)],
            lambda: [fs.Project(direction(100), layers=layer)],
            lambda: [fs.Add(v, 2.0, layers="all", when=fs.Gate(direction(), kind="cosine"))],
            lambda: [fs.Add(v, 1.5, layers=5, when=fs.Gate(direction(), layer=1, latched=True, above=i % 16 < 8))],
        ][i % 8]()  # fmt: skip

    return [fs.Plan(made(i)) for i in range(n)]


def mixed(prompts: list[list[int]], n: int = 64) -> list[tuple[list[int], fs.Plan | None]]:
    """Requests in which 32 plans, each for two prompts, alternate with none: every third has none."""
    steered = iter(plans() * 2)
    return [
        (prompts[(i * 5 + i // 8) % len(prompts)], None if i % 3 == 2 else next(steered, None))
        for i in range(n + n // 2)
    ]


def by_hugging_face(
    model: Any, requests: list[tuple[list[int], fs.Plan | None]], n_tokens: int = 20
) -> list[list[int]]:
    """Greedy tokens, every request alone in its batch row."""
    found: list[list[int]] = []
    for start in range(0, len(requests), 32):
        batch = requests[start : start + 32]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        with torch.no_grad(), fs.steer(model, [plan for _, plan in batch]):
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0,
                eos_token_id=[model.config.vocab_size + 1],
            )  # fmt: skip
        found += made[:, width:].tolist()
    return found


def by_engine(llm: Any, requests: list[tuple[list[int], fs.Plan | None]], n_tokens: int = 20, **more: Any) -> list[Any]:
    """The engine's answers, all requests at once."""
    from vllm import SamplingParams

    common = {"temperature": 0, "max_tokens": n_tokens, "ignore_eos": True, **more}
    parameters = [
        SamplingParams(**common, extra_args=None if plan is None else {"faststeer": plan}) for _, plan in requests
    ]
    return llm.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], parameters, use_tqdm=False)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [list(answer.outputs[0].token_ids) for answer in answers]
