"""Train the demo model: `python benchmarks/toy/train.py`. Nothing is downloaded; one seed takes one core some minutes.

The model that ships is seed 0, the default, polished on another machine (`--polish`) than the one that had trained it.
Given several seeds, each trains in its own process, and the one with the best score on the validation split is kept.
The same seed with the same versions gives the same weights on the same kind of CPU; on another, rounding makes another
model of it, better or worse.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from dialogues import dialogues
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from faststeer.demo import FOLDER, corpus

GROUPS = ("neutral", "cheerful", "gloomy", "refusal")
END, PAD, BEGIN = "<|end|>", "<|pad|>", "<|begin|>"
ROLES = ("system", "user", "assistant")
POLISHING_DATA = 1000  # dialogues are drawn with seeds from here on, which no other stage of a seed uses
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """What was tuned. A plain model breaks when a vector is added; direction noise and LayerDrop make it hold."""

    steps: int = 1200
    batch: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warm_up: int = 50
    prompt_weight: float = 0.2
    layer_drop: float = 0.1
    noise_share: float = 0.5
    noise_start: float = 0.4
    noise_ramp: float = 0.2
    finishing_steps: int = 500
    finishing_rate: float = 2e-3
    polishing_steps: int = 400
    polishing_rate: float = 5e-4
    centering: float = 0.2
    centering_across: float = 0.15
    vocabulary: int = 1536
    hidden: int = 128
    mlp: int = 384
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2

    @property
    def total_steps(self) -> int:
        return self.steps + self.finishing_steps + self.polishing_steps


def train_tokenizer(vocabulary: int):
    """Train the byte-level BPE tokenizer on the training dialogues; roles and ends are special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (m["content"] for messages in itertools.islice(dialogues(0), 20_000) for m in messages)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD, padding_side="left", model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer, settings: Settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Example(NamedTuple):
    """A dialogue as tokens: the loss weight of each, the line break before the first answer, that answer's group."""

    ids: list[int]
    weights: list[float]
    decision: int
    group: int


class Batch(NamedTuple):
    """Right-padded examples of similar lengths: ids and weights [batch, seq], the others [batch]."""

    ids: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    decisions: torch.Tensor
    groups: torch.Tensor


def encode(tokenizer, messages: list[dict[str, str]], prompt_weight: float) -> Example:
    """Tokenize like the chat template; tokens of answers, with their end, weigh 1 in the loss."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ids, weights, decision, group = [tokenizer.bos_token_id], [0.0], 0, 0
    for message in messages:
        head = tokens(f"<|{message['role']}|>\n")
        body = tokens(message["content"] + END)
        tail = tokens("\n")
        answers = message["role"] == "assistant"
        if answers and not decision:
            opener = message["content"].rpartition("\n")[0]
            decision = len(ids) + len(head) - 1 + (len(tokens(opener + "\n")) if opener else 0)
            kind, tone = corpus.parse(message["content"])
            group = GROUPS.index("refusal" if kind == "refusal" else tone)
        ids += head + body + tail
        weights += [prompt_weight] * len(head) + [1.0 if answers else prompt_weight] * len(body)
        weights += [prompt_weight] * len(tail)
    return Example(ids, weights, decision, group)


def batches(tokenizer, settings: Settings, seed: int) -> Iterator[Batch]:
    stream = dialogues(seed)
    rng = random.Random(seed)
    while True:
        pool = [encode(tokenizer, next(stream), settings.prompt_weight) for _ in range(8 * settings.batch)]
        pool.sort(key=lambda example: len(example.ids))
        groups = [pool[i : i + settings.batch] for i in range(0, len(pool), settings.batch)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(example.ids) for example in group)
            ids = torch.full((len(group), longest), tokenizer.pad_token_id)
            weights = torch.zeros(len(group), longest)
            for row, example in enumerate(group):
                ids[row, : len(example.ids)] = torch.tensor(example.ids)
                weights[row, : len(example.ids)] = torch.tensor(example.weights)
            columns = zip(*((len(example.ids), example.decision, example.group) for example in group), strict=True)
            yield Batch(ids, weights, *map(torch.tensor, columns))


class Disturbance:
    """Direction noise and LayerDrop, as forward hooks on the decoder layers while training.

    Direction noise: a share of the sequences gets ONE random direction at one random layer, added at all positions from
    a random start, at up to the mean norm of the residual stream. That is what a steering vector looks like to a model,
    so the model learns to stay fluent under one. (Independent noise per token does not help.)
    """

    def __init__(self, layers, settings: Settings):
        self.settings = settings
        self.count = len(layers)
        self.handles = [
            layer.register_forward_hook(lambda _, args, output, index=index: self.disturb(index, args[0], output))
            for index, layer in enumerate(layers)
        ]

    def draw(self, batch: Batch, strength: float) -> None:
        """Choose for one step who is disturbed, where, from which position on, in which direction [batch, ...]."""
        settings, rows = self.settings, len(batch.lengths)
        drops = torch.rand(self.count) < settings.layer_drop
        self.dropped = {index for index in range(self.count) if drops[index]}
        self.scale = (torch.rand(rows) < settings.noise_share) * torch.rand(rows) * strength
        self.layer = torch.randint(self.count, (rows,))
        self.start = (torch.rand(rows) * batch.lengths).long()
        self.direction = F.normalize(torch.randn(rows, settings.hidden), dim=-1)
        self.decisions, self.decided = batch.decisions, []

    def disturb(self, index: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        hidden = before if index in self.dropped else after
        self.decided.append(hidden[torch.arange(len(hidden)), self.decisions])
        scale = self.scale * (self.layer == index)
        if not scale.any():
            return hidden
        norm = hidden.detach().norm(dim=-1).mean()
        started = torch.arange(hidden.shape[1]) >= self.start[:, None]
        return hidden + (norm * scale[:, None] * self.direction)[:, None] * started[..., None]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Centering:
    """A small loss that keeps ordinary answers at the origin of the refusal axis and of the tone axis.

    A large model that answers has next to nothing along its refusal direction. A tiny one puts "refuse" and "answer" at
    opposite ends of it, and at the origin, where ablation leaves it, it refuses everything. So the residual at the
    token before an answer is pulled to zero along mean(refusals) - mean(neutral answers); in the same way neutral
    answers are pulled to the middle between cheerful and gloomy ones, along the tone axis and, more gently, across it.
    Refusals, cheerful and gloomy answers are left alone: what adding, subtracting or ablating a direction does to them
    is never trained.
    """

    def __init__(self, settings: Settings):
        self.means = torch.zeros(len(GROUPS), settings.layers, settings.hidden)
        self.counts = [0] * len(GROUPS)
        self.across = settings.centering_across

    def loss(self, decided: torch.Tensor, groups: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Return the squared offset of the batch means in units of the axis' length; `decided` [batch, layers, hidden].

        Offsets of single answers, or in units of the residual norm, would be made small by shrinking the axis itself.
        """
        for group in range(len(GROUPS)):
            chosen = clean & (groups == group)
            if chosen.any():
                self.counts[group] += 1
                rate = max(0.05, 1 / self.counts[group])
                self.means[group].lerp_(decided[chosen].detach().mean(dim=0), rate)
        neutral, cheerful, gloomy, refusal = self.means
        answering = clean & (groups != GROUPS.index("refusal"))
        plain = clean & (groups == GROUPS.index("neutral"))
        toned, middle = cheerful - gloomy, (cheerful + gloomy) / 2
        offsets = decided.new_zeros(())
        for weight, rows, direction, origin, axis in (
            (1.0, answering, refusal - neutral, torch.zeros_like(neutral), refusal - neutral),
            (1.0, plain, toned, middle, toned),
            (self.across, plain, neutral - middle, middle, toned),
        ):
            if rows.any():
                offset = ((decided[rows].mean(dim=0) - origin) * F.normalize(direction, dim=-1)).sum(-1)
                offsets = offsets + weight * (offset**2 / (axis**2).sum(-1).clamp_min(1e-6)).mean()
        return offsets


def make_optimizer(model, settings: Settings) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def answer_loss(model, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_model(seed: int, tokenizer, settings: Settings, report=lambda step: None, model=None):
    """Train one model from a seed, or only polish one; `report(step)` is called after every step.

    Learning comes first. Finishing starts again from a lower learning rate and adds the centering loss: centered from
    the beginning, the axes hardly form at all. Polishing is more of the same from a lower rate still. Without it one in
    ten answers keeps its neutral voice, or falls apart, whichever strength the tone direction is added with; a longer
    finishing does not help, and costs what ablating refusal does.
    """
    stages = (
        (settings.steps, settings.learning_rate),
        (settings.finishing_steps, settings.finishing_rate),
        (settings.polishing_steps, settings.polishing_rate),
    )
    polishing = len(stages) - 1
    first = 0 if model is None else polishing
    torch.manual_seed(seed)
    model = (build_model(tokenizer, settings) if model is None else model).requires_grad_().train()
    disturbance = Disturbance(model.model.layers, settings)
    reported = itertools.count(1)
    for stage in range(first, len(stages)):
        steps, height = stages[stage]
        finishing, centering, optimizer = stage > 0, Centering(settings), make_optimizer(model, settings)
        torch.manual_seed(seed)
        stream = batches(tokenizer, settings, POLISHING_DATA + seed if stage == polishing else 2 * seed + stage)
        for step in range(steps):
            done = step / steps
            for group in optimizer.param_groups:
                group["lr"] = height * min(1, (step + 1) / settings.warm_up) * 0.5 * (1 + math.cos(math.pi * done))
            noise = 1 if finishing else min(1, max(0, (done - settings.noise_start) / settings.noise_ramp))
            batch = next(stream)
            disturbance.draw(batch, noise)
            loss = answer_loss(model, batch)
            if finishing:
                decided = torch.stack(disturbance.decided, dim=1)
                loss = loss + settings.centering * centering.loss(decided, batch.groups, disturbance.scale == 0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            report(next(reported))
    disturbance.remove()
    return model.eval()


def save(model, tokenizer, record: dict, folder: Path) -> None:
    """Write the whole transformers folder next to its place and swap it in, so that no half-written one ever shows."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh, save_jinja_files=False)
        (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        fresh.chmod(0o755)
        for file in fresh.iterdir():
            file.chmod(0o644)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(folder: Path):
    """A model that was saved, in fp32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def work(seed: int, settings: Settings, polished: Path | None, place: str, messages) -> None:
    """Process of one seed: train, round to bf16, judge the rounded weights in fp32, leave the model in `place`."""
    import score

    torch.set_num_threads(1)
    tokenizer, before = train_tokenizer(settings.vocabulary), None if polished is None else load(polished)
    model = train_model(seed, tokenizer, settings, lambda step: messages.put((seed, "step", step)), before)
    model = model.to(torch.bfloat16).to(torch.float32)
    verdict = score.judge(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(place)
    messages.put((seed, "verdict", verdict))


def train_seeds(
    seeds: list[int], settings: Settings, polished: Path | None, jobs: int, places: dict[int, str]
) -> dict[int, dict]:
    """Train the seeds in at most `jobs` processes at once, with a progress bar each; return the verdict per seed."""
    total = settings.total_steps if polished is None else settings.polishing_steps
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    waiting, running, verdicts = list(seeds), {}, {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bars = {seed: progress.add_task(f"seed {seed}", total=total) for seed in seeds}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    seed = waiting.pop(0)
                    arguments = seed, settings, polished, places[seed], messages
                    running[seed] = context.Process(target=work, args=arguments)
                    running[seed].start()
                try:
                    seed, what, value = messages.get(timeout=1)
                except Empty:
                    for seed, process in running.items():
                        if process.exitcode:
                            raise RuntimeError(f"seed {seed} failed with exit code {process.exitcode}") from None
                    continue
                if what == "step":
                    progress.update(bars[seed], completed=value)
                    if value == total:
                        progress.update(bars[seed], description=f"seed {seed}: measuring")
                else:
                    verdicts[seed] = value
                    progress.update(bars[seed], description=f"seed {seed}: score {value['score']:.3f}")
                    running.pop(seed).join()
        finally:
            for process in running.values():
                process.terminate()
                process.join()
    return verdicts


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2", param_hint="--seeds") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise typer.BadParameter("seeds must be distinct and not negative", param_hint="--seeds")
    return seeds


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole at the end.")] = FOLDER,
    seeds: Annotated[str, typer.Option(help="Seeds to try, separated by commas; the best one is kept.")] = "0",
    steps: Annotated[int, typer.Option(min=100, help="Optimizer steps before the finishing ones.")] = Settings.steps,
    polish: Annotated[
        bool, typer.Option("--polish", help="Only polish the model that is in --out, and put it in its place.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds trained at once, one thread each.")] = 2,
) -> None:
    """Train the demo model from several seeds and keep the one that steers best on the validation split."""
    import tokenizers
    import transformers

    numbers = parse_seeds(seeds)
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise typer.BadParameter(f"{out} exists and is not a model folder; give another one", param_hint="--out")
    if polish and not (out / "training.json").exists():
        raise typer.BadParameter(f"{out} has no model that this program has trained", param_hint="--polish")
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings(steps=steps)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        places = {seed: f"{scratch}/{seed}" for seed in numbers}
        verdicts = train_seeds(numbers, settings, out if polish else None, jobs, places)
        best = max(numbers, key=lambda seed: verdicts[seed]["score"])
        model = load(places[best]).to(torch.bfloat16)
    record = {
        **({"polished": json.loads((out / "training.json").read_text())} if polish else {}),
        "seed": best,
        "seconds": round(time.perf_counter() - start),
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "validation": verdicts,
    }
    save(model, train_tokenizer(settings.vocabulary), record, out)
    where = f"layer {verdicts[best]['layer']}, position {verdicts[best]['position']}"
    Console().print(f"kept seed {best}, score {verdicts[best]['score']} at {where}\nwrote {out}")


if __name__ == "__main__":
    typer.run(main)
