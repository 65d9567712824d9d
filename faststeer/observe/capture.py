"""Activations at any hook points, of prompts and of what is generated or given after them, in memory or streamed to
safetensors.

One batch is in memory at a time; a folder gets a file per batch, written whole or not at all, and a capture that was
interrupted goes on where it stopped. Nothing is averaged here: `extract` does that without keeping anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faststeer import tensor_files
from faststeer.artefacts import ArtefactStore, fingerprint
from faststeer.compile import layer_numbers
from faststeer.evaluate.generate import HuggingFace
from faststeer.files import FormatError, reading, write_atomically
from faststeer.generator import SamplingParams
from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.batching import (
    Prompt,
    TokenRow,
    check_evaluating,
    forward_arguments,
    model_device,
    pad_rows,
    padding_id,
)
from faststeer.hf.hooks import read
from faststeer.hf.steering import Steering, steer
from faststeer.intervention import Positions, position_range
from faststeer.observe.memory import in_batches, rows_in_batches
from faststeer.observe.tokens import rows
from faststeer.plan import Plan, Plans, plans_for
from faststeer.vector import HookPoint, check_hook_point

FORMAT = "faststeer.capture/1"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Captured:
    """One prompt's activations.

    Attributes:
        token_ids: prompt and completion, `[tokens]`, without the end-of-sequence token.
        n_prompt: how many of them are the prompt.
        positions: `[kept]`: where the kept tokens stand, counted from the prompt's end (-1: its last token). The last
            generated token has no activation, as the model was not given it again.
    """

    token_ids: list[int]
    n_prompt: int
    positions: Tensor
    _tensor: Callable[[HookPoint, int], Tensor]

    def __getitem__(self, where: tuple[HookPoint, int]) -> Tensor:
        """`[kept, hidden]` at (hook point, layer); KeyError where that was not captured."""
        return self._tensor(*where)

    @property
    def kept_ids(self) -> list[int]:
        """The tokens at `positions`."""
        return [self.token_ids[self.n_prompt + position] for position in self.positions.tolist()]


class Capture(tuple[Captured, ...]):
    """Activations of every prompt, in the prompts' order: `capture[3]["resid_pre", 14]` is `[kept, hidden]`. From a
    folder, a tensor is read when it is asked for."""

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Capture:
        """Open what `capture(..., folder=...)` wrote.

        Raises:
            FileNotFoundError: no such folder, or no capture in it.
            FormatError: a file that is damaged or something else; batches are missing; several captures in one folder.

        Activations are checked against their checksums when they are read (FormatError there, too).
        """
        folder = Path(folder)
        batches = _batches(folder)
        if not batches:
            raise FileNotFoundError(f"no capture in {folder}: expected batch-*.safetensors, as capture() writes them")
        if len(prints := {(batch.fingerprint, batch.total) for batch in batches}) > 1:
            raise FormatError(f"{folder} holds {len(prints)} different captures: give each a folder of its own")
        total = batches[0].total
        batch_of_prompt = {index: batch for batch in batches for index in batch.n_prompt}
        if len(batch_of_prompt) < sum(len(batch.n_prompt) for batch in batches):
            raise FormatError(f"{folder} holds a prompt twice: remove the file that was not written by capture()")
        if len(batch_of_prompt) < total:
            first = next(index for index in range(total) if index not in batch_of_prompt)
            raise FormatError(
                f"{folder} lacks {total - len(batch_of_prompt)} of {total} prompts (the first is {first}): the capture "
                "was interrupted; run it again with the same arguments, it goes on where it stopped"
            )
        return cls(batch_of_prompt[index].prompt(index) for index in range(total))


@torch.no_grad()
def capture(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plans: Plans | None = None,
    *,
    at: HookPoint | Sequence[HookPoint] = "resid_pre",
    layers: Iterable[int] | None = None,
    positions: Positions = "all",
    completions: Sequence[str | Sequence[int]] | None = None,
    max_new_tokens: int = 0,
    dtype: torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
    system: str | None = None,
    batch_size: int = 32,
    progress: bool = False,
    within: Callable[[Any, list[Plan | None]], Steering] = steer,
) -> Capture:
    """Take activations while the model reads prompts and what follows them, steered or not.

    Args:
        prompts: texts or chat message lists.
        plans: one for all prompts or one (or None) per prompt; what is captured is the stream as they leave it.
        at: hook point or points. layers: which (all).
        positions: tokens to keep, as in an intervention: "all", "prompt", "generated", "last", a slice counted from the
            prompt's end, one position.
        completions: texts or token ids that follow the prompts; or
        max_new_tokens: so many greedy tokens at most.
        dtype: of what is kept: float64, float32, bfloat16 or float16; by default the model's.
        folder: write batches there and keep none in memory. What is there from an interrupted run of the same capture
            is not computed again; a capture of other weights is another one (`faststeer.artefacts.fingerprint`).
        system: a system prompt put before every prompt.
        batch_size: rows that run together; halved, with a warning, where they do not fit into memory.
        progress: show a progress bar on stderr.
        within: what puts a batch's plans on the model: `steer`, or `freeze` or `ablate` with their other arguments
            given (functools.partial). Of frozen attention the steered rows are captured.

    Raises:
        ValueError: before any forward pass: as `steer`; positions that keep no token of some prompt; another number of
            plans or completions than prompts; both completions and max_new_tokens; a folder with another capture.
    """
    check_evaluating(model)
    if completions is not None and max_new_tokens:
        raise ValueError("completions and max_new_tokens are both given: follow the prompts with one of them")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 (none) or more")
    points: tuple[HookPoint, ...] = (check_hook_point(at),) if isinstance(at, str) else tuple(map(check_hook_point, at))
    numbers = layer_numbers(layers, find_hook_points(model).n_layers)
    token_rows = rows(tokenizer, prompts, completions, system)
    row_plans = plans_for(len(token_rows), plans)
    window = position_range(positions)
    _check_keeps(token_rows, *window, max_new_tokens)
    kind = dtype or next(model.parameters()).dtype
    if kind not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}: expected one of {', '.join(DTYPES)}")
    run = _BatchReader(model, tokenizer, token_rows, row_plans, points, numbers, window, max_new_tokens, kind, within)
    if folder is None:
        return Capture(rows_in_batches(list(map(len, token_rows)), batch_size, run, "Reading", progress))
    way = getattr(getattr(within, "func", within), "__qualname__", type(within)), getattr(within, "keywords", None)
    settings = points, numbers, window, max_new_tokens, kind, way
    store = _store(Path(folder), model, token_rows, row_plans, *settings)
    done = _done(store)
    left = [index for index in range(len(token_rows)) if index not in done]

    def read_and_write(group: list[int]) -> None:
        prompts = [left[index] for index in group]
        _write(store, len(token_rows), dict(zip(prompts, run(prompts), strict=True)), points, numbers)

    for _ in in_batches([len(token_rows[index]) for index in left], batch_size, read_and_write, "Reading", progress):
        pass
    return Capture.load(folder)


def _check_keeps(token_rows: Sequence[TokenRow], low: int, high: int, max_new_tokens: int) -> None:
    """The last generated token is not read by the model, so it cannot be kept."""
    for index, row in enumerate(token_rows):
        last = max(max_new_tokens - 2, -1) if max_new_tokens else len(row.completion) - 1
        if max(low, -len(row.prompt)) > min(high - 1, last):
            follows = "" if last >= 0 else "; nothing follows it: give completions or max_new_tokens (2 or more)"
            raise ValueError(
                f"positions [{low}, {high}) keep no token of prompt {index}, whose tokens stand at "
                f"{-len(row.prompt)}..{last}, counted from its end{follows}"
            )


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BatchReader:
    """Reads one batch after the other."""

    model: Any
    tokenizer: Any
    token_rows: list[TokenRow]
    plans: list[Plan | None]
    points: tuple[HookPoint, ...]
    layers: list[int]
    range: tuple[int, int]
    max_new_tokens: int
    dtype: torch.dtype
    within: Callable[[Any, list[Plan | None]], Steering]

    def __call__(self, group: list[int]) -> list[Captured]:
        chosen = [self.token_rows[index] for index in group]
        batch, ends = pad_rows(chosen, padding_id(self.tokenizer), model_device(self.model))
        first, behind = min(ends) + self.range[0], max(ends) + self.range[1]  # columns that some row keeps
        seen: dict[tuple[HookPoint, int], list[Tensor]] = {
            (at, layer): [] for at in self.points for layer in self.layers
        }
        passed = {key: 0 for key in seen}

        def keeper(at: HookPoint) -> Callable[[int, Tensor], Tensor]:
            def keep(layer: int, x: Tensor) -> Tensor:
                key = at, layer
                column = passed[key]
                passed[key] += x.shape[1]
                piece = x[-len(group) :, max(first - column, 0) : max(behind - column, 0)]
                seen[key].append(piece.to("cpu", self.dtype, copy=True))
                return x[:0]

            return keep

        with ExitStack() as stack:
            plans = [self.plans[index] for index in group]
            if any(plan is not None for plan in plans):
                steering = stack.enter_context(self.within(self.model, plans))
                if not self.max_new_tokens:
                    steering.set_prompt(ends)
            for at in self.points:
                stack.enter_context(read(self.model, at, self.layers, reduce=keeper(at)))
            if self.max_new_tokens:
                chosen = self._generate(chosen)
            else:
                self.model(**forward_arguments(self.model, batch))
        columns = {key: torch.cat(pieces, dim=1) for key, pieces in seen.items()}
        return [self._row(row, i, ends[i], max(first, 0), columns) for i, row in enumerate(chosen)]

    def _generate(self, chosen: list[TokenRow]) -> list[TokenRow]:
        """The rows with what they go on with, generated in the contexts that read them, as one batch in this order."""
        answering = HuggingFace(self.model, self.tokenizer, max_batch=len(chosen))
        answers = answering.complete([row.prompt for row in chosen], None, SamplingParams(self.max_new_tokens))
        return [TokenRow(chosen[answer.index].prompt, answer.token_ids) for answer in answers]

    def _row(
        self, row: TokenRow, i: int, end: int, first: int, columns: Mapping[tuple[HookPoint, int], Tensor]
    ) -> Captured:
        """Cut a row's own kept tokens from the columns, which begin with the batch's column `first`."""
        n = next(iter(columns.values())).shape[1]
        low = max(self.range[0], -len(row.prompt))
        high = min(self.range[1], len(row.completion), first + n - end)
        tensors = {key: x[i, end + low - first : max(end + high - first, 0)].clone() for key, x in columns.items()}
        return Captured(
            row.ids, len(row.prompt), torch.arange(low, max(high, low)), lambda at, layer: tensors[at, layer]
        )


# Files ----------------------------------------------------------------------------------------------------------------


def _store(
    folder: Path, model: nn.Module, token_rows: list[TokenRow], plans: list[Plan | None], *settings: Any
) -> ArtefactStore:
    """The folder, for the capture that is all of this."""
    shared = {id(plan): plan.to_json(inline=True) for plan in plans if plan is not None}
    tokens = [(row.prompt, row.completion) for row in token_rows]
    return ArtefactStore(
        folder, fingerprint(model), tokens, [shared.get(id(plan)) for plan in plans], list(map(str, settings))
    )


def _write(
    store: ArtefactStore,
    total: int,
    batch: Mapping[int, Captured],
    points: Sequence[HookPoint],
    layers: Sequence[int],
) -> None:
    """Write a batch's prompts as a file of the folder; `total`: prompts of the whole capture."""
    tensors: dict[str, Tensor] = {}
    for index, captured in batch.items():
        tensors[f"{index}.token_ids"] = torch.tensor(captured.token_ids)
        tensors[f"{index}.positions"] = captured.positions
        tensors |= {f"{index}.{at}.{layer}": captured[at, layer] for at in points for layer in layers}
    metadata = {
        "format": FORMAT,
        "fingerprint": store.key,
        "total": str(total),
        "n_prompt": json.dumps({index: captured.n_prompt for index, captured in batch.items()}),
    }
    write_atomically(store.folder / f"batch-{min(batch):07d}.safetensors", tensor_files.to_bytes(tensors, metadata))


@dataclass(frozen=True)
class _Batch:
    """One file of a capture.

    Attributes:
        total: prompts of the whole capture.
        n_prompt: tokens of each prompt in this file, by the prompt's number.
    """

    path: Path
    file: tensor_files.TensorFile
    fingerprint: str
    total: int
    n_prompt: dict[int, int]

    @classmethod
    def read(cls, path: Path) -> _Batch:
        with tensor_files.opened(path, FORMAT, *_fault(path)) as file:
            total = int(file.words["total"])
            n_prompt = {int(index): n for index, n in file.json("n_prompt").items()}
            if not n_prompt or not all(0 <= index < total and type(n) is int for index, n in n_prompt.items()):
                raise ValueError("its prompts are not numbered as capture() does")
            parts = {name.partition(".")[2] for name in file.names}
            if set(file.names) != {f"{index}.{part}" for index in n_prompt for part in parts}:
                raise ValueError("it does not have the same tensors for each prompt")
            return cls(path, file, file.words["fingerprint"], total, n_prompt)

    def prompt(self, index: int) -> Captured:
        n_prompt = self.n_prompt[index]
        with reading(*_fault(self.path)):
            ids, positions = self.file.tensors((f"{index}.token_ids", f"{index}.positions")).values()
            if any(tensor.ndim != 1 or tensor.dtype != torch.int64 for tensor in (ids, positions)):
                raise ValueError(f"the tokens of prompt {index} are no rows of whole numbers")
            places = positions + n_prompt
            if not 0 < n_prompt <= len(ids) or not bool(((places >= 0) & (places < len(ids))).all()):
                raise ValueError(f"the positions of prompt {index} are outside its tokens")
        return Captured(ids.tolist(), n_prompt, positions, lambda at, layer: self._tensor(f"{index}.{at}.{layer}"))

    def _tensor(self, name: str) -> Tensor:
        if name not in self.file.names:
            raise KeyError(name)
        with reading(*_fault(self.path)):
            return self.file.tensor(name)


def _fault(path: Path) -> tuple[str, str]:
    return f"{path} is no batch of a capture", "delete it and capture again, or take another folder"


def _batches(folder: Path) -> list[_Batch]:
    """The batches in a folder."""
    return [_Batch.read(path) for path in sorted(folder.glob("batch-*.safetensors"))]


def _done(store: ArtefactStore) -> set[int]:
    """The prompts that a folder holds already."""
    done: set[int] = set()
    for batch in _batches(store.folder):
        if batch.fingerprint != store.key:
            raise FormatError(
                f"{store.folder} holds another capture ({batch.path.name}: of other prompts, plans, layers or "
                "settings, of a model with other weights, or of an older version of faststeer): take another folder "
                "or empty this one"
            )
        done |= set(batch.n_prompt)
    return done
