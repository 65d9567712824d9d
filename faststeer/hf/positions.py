"""Where the tokens of a forward pass stand, counted from the end of each row's prompt. Everything is derived on the
device from the pass's own inputs and what its stream knows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from faststeer.hf.cache import cache_in, length_of

SAY = "say where it ends by steering.set_prompt(columns)"
UNREADABLE = (
    f"the attention mask is of a kind that does not show where a prompt ends: give a mask of two dimensions, or {SAY}"
)


@dataclass(eq=False)
class Inputs:
    """The arguments of a forward pass, as far as they say where its rows stand."""

    batch: int
    length: int
    device: torch.device
    cache: Any
    mask: Any
    position_ids: Any
    ids: bool  # whether it was given tokens, not embeddings
    packed: bool
    traced: bool  # by a compiler
    recorded: bool  # a graph is made of what runs: what it reads must be made in it, or be there as long as it is

    @classmethod
    def of(cls, arguments: Mapping[str, Any], traced: bool) -> Inputs:
        ids, cache = arguments.get("input_ids"), cache_in(arguments)
        tokens = _first_states(arguments) if ids is None else ids
        packed = arguments.get("cu_seq_lens_q") is not None or hasattr(cache, "free_blocks")  # paged
        mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
        recorded = traced or (tokens.is_cuda and torch.cuda.is_current_stream_capturing())
        if tokens.ndim < 2:
            raise ValueError(f"the tokens have shape {list(tokens.shape)}: expected [batch, tokens], ids.unsqueeze(0)")
        shape, device = tokens.shape, tokens.device
        return cls(shape[0], shape[1], device, cache, mask, position_ids, ids is not None, packed, traced, recorded)

    def past(self) -> int | Tensor | None:
        """Cached tokens. Of a static cache it may be a tensor: reading it would wait for a GPU. None: the cache is a
        recurrent state, which does not count them."""
        past: int | Tensor | None = 0 if self.packed else length_of(self.cache)
        if isinstance(past, Tensor) and past.is_cpu and not self.traced:
            return int(past)
        return past


def _first_states(arguments: Mapping[str, Any]) -> Tensor:
    """`[batch, tokens, ...]`: the embeddings, or what else the module that runs the layers was given for hidden states
    or tokens."""
    if (embeds := arguments.get("inputs_embeds")) is not None:
        return embeds
    named = {name: each for name, each in arguments.items() if isinstance(each, Tensor) and each.ndim == 3}
    states = [each for each in named.values() if each.is_floating_point()]
    states += [each for name, each in named.items() if name.endswith("input_ids")]  # codes of sounds
    if not states:
        raise ValueError(
            f"the module that runs the layers was given {', '.join(arguments) or 'nothing'}: expected input_ids, "
            "inputs_embeds or hidden states, which say where its rows stand"
        )
    return states[0]


class Prompts:
    """Where the prompts of some sequences end.

    Attributes:
        begin: the column where generated tokens begin (`[1]` or `[batch]` where that is not one number); None: not
            known.
        why: why not.
    """

    def __init__(self, begin: int | Tensor | None, why: str = "", mask: Mask | None = None) -> None:
        self.begin, self.why = begin, why
        self._mask = mask
        self._ends: Tensor | None = None  # [batch], of prompts that are padded on the right

    def placed(self, rows: Tensor, inputs: Inputs, past: int | Tensor) -> Tensor:
        """Rows `[3, batch * length]` whose positions are 0, with their positions: 0, 1, ... for tokens behind the
        prompt; -1 for a row's own last prompt token."""
        begin = self.begin
        if begin is None:
            raise ValueError(self.why)
        behind = past - begin if isinstance(past, int) and isinstance(begin, int) else -1
        if behind >= 0 and inputs.length == 1 and not inputs.recorded:
            return rows.add(_position_only(inputs.device), alpha=behind)  # one call, in every step of decoding
        return torch.stack((rows[0], self._positions(begin, inputs, past), rows[2]))

    def _positions(self, begin: int | Tensor, inputs: Inputs, past: int | Tensor) -> Tensor:
        column = torch.arange(inputs.length, dtype=torch.int32, device=inputs.device) + past
        if isinstance(begin, Tensor):
            begin = begin.to(inputs.device).reshape(-1, 1)
            if begin.shape[0] not in (1, inputs.batch):
                raise ValueError(
                    f"the batch has {inputs.batch} rows, but set_prompt was given {begin.shape[0]} numbers: give one "
                    "for all rows or one per row"
                )
        position = column - begin
        if (ends := self.ends()) is not None:
            ends = for_rows(ends.to(inputs.device), inputs.batch).unsqueeze(-1)
            position = torch.where(position >= 0, position, column - ends)
        return position.to(torch.int32).expand(inputs.batch, -1).reshape(-1).contiguous()

    def ends(self) -> Tensor | None:
        """`[batch]`: the column behind each row's last prompt token, where it may lie in front of `begin`."""
        if self._mask is not None:
            self._ends, self._mask = self._mask.ends(self.begin), None  # type: ignore[arg-type]
        return self._ends


@functools.lru_cache(maxsize=64)
def _position_only(device: torch.device) -> Tensor:
    """`[3, 1]`: what is added to rows to move them by one position."""
    with torch.inference_mode(False):
        return torch.tensor([[0], [1], [0]], dtype=torch.int32, device=device)


def for_rows(table: Tensor, rows: int) -> Tensor:
    """A table with an entry (in its last dimension) per row of the prompt, for the rows that these have become."""
    before = table.shape[-1]
    if before in (1, rows):
        return table
    if rows % before:
        raise ValueError(f"the batch has {rows} rows, but {before} when its prompt was read: {SAY}")
    return table.repeat_interleave(rows // before, -1)


@dataclass
class Mask:
    """`[batch, columns]`, not 0 where a token is real, whose last column is `edge` - 1; to the left of it all are."""

    real: Tensor
    edge: int | Tensor | None  # None: as far right as the prompt goes, or further

    def ends(self, begin: int | Tensor) -> Tensor:
        """`[batch]`: the column behind each row's last prompt token."""
        width = self.real.shape[1]
        column = torch.arange(1, width + 1, device=self.real.device)
        if self.edge is not None:
            column = column + (self.edge - width)
        elif isinstance(begin, Tensor):
            column = column + (begin.to(column.device) - width).clamp(min=0)
        elif begin > width:
            column = column + (begin - width)
        return (column * (self.real != 0) * (column <= begin)).amax(1).to(torch.int32)


def mask_of(inputs: Inputs, past: int | Tensor, outermost: Tensor | None) -> Mask | str | None:
    """The mask of a pass that is or begins a prompt; None: nothing is masked; a text: it cannot be read."""
    mask = inputs.mask
    if isinstance(mask, Mapping):  # by kind of attention
        masks = [each for each in mask.values() if each is not None]
        mask = max(masks, key=lambda each: each.shape[-1], default=None)
    if outermost is not None and outermost.shape[0] == inputs.batch:
        mask = outermost
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return UNREADABLE
    if mask.ndim == 2:
        return Mask(mask, None)
    if isinstance(past, int) and mask.shape[-1] < past + inputs.length:
        return UNREADABLE
    # By queries and columns: padding may not look at itself.
    column = torch.arange(inputs.length, device=mask.device)
    own = mask[:, 0, column if mask.shape[2] > 1 else torch.zeros_like(column), column + past]
    if own.dtype is torch.bool:
        return Mask(own, past + inputs.length)
    hidden = own < -1000  # what is added to scores: 0 or a bias leaves a token visible
    if not inputs.recorded and not bool((hidden | ((own >= -100) & (own <= 0))).all()):
        return UNREADABLE  # between the two, NaN, or a mask of 0 and 1
    return Mask(~hidden, past + inputs.length)
