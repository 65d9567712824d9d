"""One prompt answered twice, token by token: unsteered and steered are the two rows of one batch.

The model is steered only while a token is computed, so that an answer that nobody waits for any more leaves nothing
behind. It never serves many: whoever does takes the Engine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from faststeer.engine import end_tokens
from faststeer.engine.sampling import Mode, Sampling, choose
from faststeer.hf import Steering, find_hook_points, steer
from faststeer.hf.batching import check_evaluating, encode, model_device
from faststeer.hf.cache import cache_argument, cache_in
from faststeer.intervention import Ablate, Add, Probe
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

Op = Literal["add", "ablate"]
OPS: tuple[Op, ...] = ("add", "ablate")
REACH = 2.0  # of a raw vector, whose own length is the natural unit, and of an ablation, where 2 reflects


@dataclass(frozen=True)
class Control:
    """Where one vector's controls stand: `Add(vector, strength, layers)` or `Ablate(vector, strength, layers)`."""

    strength: float = 0.0
    layers: tuple[int, ...] = ()
    op: Op = "add"


@dataclass(frozen=True)
class PlaygroundAnswers:
    """Both answers as far as they are.

    Attributes:
        unsteered, steered: the texts.
        tokens: those that have been read, as text, of each answer behind the prompt's: `[unsteered, steered]`.
        n_prompt: how many of them are the prompt's.
        projections: `[2, layers, tokens, vectors]` fp32, what has been read of each answer projected on each vector at
            the `resid_post` of every layer, after steering; the shorter answer is padded with NaN.
        drawn: tokens drawn so far, of each answer.
        done: both have ended.
    """

    unsteered: str
    steered: str
    tokens: tuple[list[str], list[str]]
    n_prompt: int
    projections: Tensor
    drawn: tuple[int, int]
    done: bool


class Playground:
    """A model and vectors to steer it with.

        playground = Playground(model, tokenizer, {"refusal": vector})
        for answers in playground.stream("How do I bake bread?", {"refusal": Control(1.0, layers=(4,))}):
            print(answers.steered)

    Args:
        vectors: by name.
        start: where controls stand at first; by default at strength 0 and a vector's own layers, all of them where it
            has an `op` or up to three, else the middle one.
        examples: prompts to offer.
        name: what to call the model.

    Raises:
        ValueError: a vector of another hidden size or with layers that the model does not have, one that is meant
            for something other than adding or ablating, a model in training mode.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        vectors: Mapping[str, SteeringVector],
        *,
        start: Mapping[str, Control] | None = None,
        examples: Sequence[str] = (),
        name: str = "the model",
    ) -> None:
        check_evaluating(model)
        if not vectors:
            raise ValueError("no vectors: expected at least one to steer with")
        points = find_hook_points(model)
        for label, vector in vectors.items():
            _check_vector(label, vector, points.n_layers, points.hidden_size)
        self.model, self.tokenizer, self.vectors = model, tokenizer, dict(vectors)
        self.n_layers, self.hidden_size = points.n_layers, points.hidden_size
        self.start = {label: _first(vector) for label, vector in vectors.items()} | dict(start or {})
        self.examples, self.name = list(examples), name
        self._one_at_a_time = threading.Lock()
        self._cache_argument = cache_argument(model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int | None = positions

    def plan(self, controls: Mapping[str, Control]) -> Plan:
        """The interventions that the controls ask for, in the order of the vectors; strength 0 and no layers: none.

        Raises:
            ValueError: an unknown vector or op, a layer that the vector does not have, a strength that is not finite.
        """
        if unknown := [name for name in controls if name not in self.vectors]:
            raise ValueError(f"there is no vector {unknown[0]!r}: expected one of {', '.join(self.vectors)}")
        interventions: list[Add | Ablate] = []
        for name, vector in self.vectors.items():
            control = controls.get(name, Control())
            if control.op not in OPS:
                raise ValueError(f"{name}: unknown op {control.op!r}: expected {' or '.join(OPS)}")
            if missing := [layer for layer in control.layers if layer not in vector]:
                raise ValueError(f"{name} has no direction for layer {missing[0]}: it has {list(vector.layers)}")
            if control.strength and control.layers:
                kind = Add if control.op == "add" else Ablate
                interventions.append(kind(vector, control.strength, layers=sorted(control.layers)))
        return Plan(interventions)

    def watched(self, controls: Mapping[str, Control]) -> dict[str, int]:
        """Of each vector the layer whose direction is watched at every layer: the first that it acts at."""
        return {
            name: min(controls[name].layers) if name in controls and controls[name].layers else vector.layers[0]
            for name, vector in self.vectors.items()
        }

    def reach(self, name: str) -> float:
        """The end of a vector's slider: 2 for a vector whose length means something; for a unit vector, whose
        coefficient is in units of the residual stream, twice what a token's norm is at its layers."""
        vector = self.vectors[name]
        if vector.scale == "raw" or self.start[name].op == "ablate":
            return REACH
        ids = torch.tensor(encode(self.tokenizer, ["Hello. How are you today?"])).to(model_device(self.model))
        with torch.inference_mode():
            states = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        # The median: in many models the first token is a hundred times as long as all others.
        norms = [states[layer][0].float().norm(dim=-1).median().item() for layer in vector.layers]
        return float(f"{2 * max(norms):.1g}")

    def stream(
        self,
        prompt: str,
        controls: Mapping[str, Control],
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[PlaygroundAnswers]:
        """Yield both answers after every token, until both have ended.

        Both rows draw with the same random numbers: what differs between them is the steering's doing.

        Raises:
            ValueError: an empty prompt, controls that do not fit, a prompt longer than the model has positions.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty: write something to answer")
        ids = encode(self.tokenizer, [prompt], system or None)[0]
        if self._positions is not None and len(ids) >= self._positions:
            raise ValueError(f"the prompt has {len(ids)} tokens, and the model positions for {self._positions}")
        limit = max_new_tokens if self._positions is None else min(max_new_tokens, self._positions - len(ids))
        return self._run(ids, self._steering(controls, len(ids)), limit, temperature, seed)

    def _run(
        self, prompt: list[int], steering: Steering, limit: int, temperature: float, seed: int
    ) -> Iterator[PlaygroundAnswers]:
        """Read, then draw one token per row; a row that has ended goes on unheard until the other ends, too."""
        ends, device = set(end_tokens(self.model, self.tokenizer)), model_device(self.model)
        sampling = Sampling(
            torch.full((2,), temperature, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.ones(2, device=device),
            torch.full((2,), seed, dtype=torch.int64, device=device),
        )
        mode = Mode.TEMPERATURE if temperature > 0 else Mode.GREEDY
        inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt, prompt], device=device), "use_cache": True}
        rows: tuple[list[int], list[int]] = ([], [])
        ended = [False, False]
        for count in range(limit):
            inputs["attention_mask"] = torch.ones(2, len(prompt) + count, dtype=torch.int64, device=device)
            with self._one_at_a_time, torch.inference_mode():
                with steering:
                    output = self.model(**inputs)
                drawn = choose(output.logits[:, -1], sampling, torch.full_like(sampling.seed, count), mode)
            if bool((drawn < 0).any()):
                which = "steered" if drawn[0] >= 0 else "unsteered"
                raise ValueError(f"the {which} model's logits are not finite: take a smaller strength")
            for row, token in enumerate(drawn.tolist()):
                ended[row] |= token in ends
                if not ended[row]:
                    rows[row].append(token)
            done = count + 1 == limit or all(ended)
            yield self._answers(prompt, rows, steering, done)
            if done:
                return
            inputs |= {"input_ids": drawn.unsqueeze(1), self._cache_argument: cache_in(output)}

    def _answers(
        self, prompt: list[int], rows: tuple[list[int], list[int]], steering: Steering, done: bool
    ) -> PlaygroundAnswers:
        decode = self.tokenizer.decode
        seen = torch.stack([value.cpu() for value in steering.projections.values()], 1)  # [2, layers, tokens, k]
        tokens = []
        for row, drawn in enumerate(rows):
            read = [*prompt, *drawn][: seen.shape[2]]
            seen[row, :, len(read) :] = torch.nan
            tokens.append([decode([token]) for token in read])
        texts = [decode(row, skip_special_tokens=True) for row in rows]
        n_drawn = len(rows[0]), len(rows[1])
        return PlaygroundAnswers(texts[0], texts[1], (tokens[0], tokens[1]), len(prompt), seen, n_drawn, done)

    def _steering(self, controls: Mapping[str, Control], n_prompt: int) -> Steering:
        """Row 0 unsteered, row 1 steered, both watched. The probe comes last, so that it sees what is steered."""
        plan, watched = self.plan(controls), self.watched(controls)
        directions = torch.stack([self.vectors[name][layer] for name, layer in watched.items()])
        probe = Probe(directions, layers="all", at="resid_post")
        steering = steer(self.model, [Plan([probe]), Plan([*plan, probe])])
        steering.set_prompt(n_prompt)
        return steering


def _check_vector(name: str, vector: SteeringVector, n_layers: int, hidden_size: int) -> None:
    if vector.hidden_size != hidden_size:
        raise ValueError(
            f"the vector {name!r} has hidden size {vector.hidden_size}, the model {hidden_size}: it was found in "
            f"another model ({vector.model or 'not named in its file'}); give the model it belongs to"
        )
    if beyond := [layer for layer in vector.layers if layer >= n_layers]:
        raise ValueError(
            f"the vector {name!r} has a direction for layer {beyond[0]}, the model has layers 0..{n_layers - 1}: it "
            "was found in another model"
        )
    if vector.op not in (None, *OPS):
        raise ValueError(
            f"the vector {name!r} is meant to {vector.op}, and the playground adds or ablates: write a plan, and take "
            "faststeer generate --plan"
        )


def _first(vector: SteeringVector) -> Control:
    layers = vector.layers
    if len(layers) > 3 and vector.op is None:
        layers = (layers[len(layers) // 2],)
    return Control(0.0, layers, "ablate" if vector.op == "ablate" else "add")
