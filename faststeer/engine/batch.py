"""The rows that the Engine generates together: their tables and cache on the device, and the two passes, prefill and
decode. Nothing here waits for the device, and every tensor that a decode step reads keeps its address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.engine.cache import FrozenCache, RowCache
from faststeer.engine.linear import FastLinears
from faststeer.engine.requests import Request
from faststeer.engine.sampling import Mode, Sampling, choose
from faststeer.hf import Steering, find_hook_points
from faststeer.hf.cache import cache_argument
from faststeer.hf.changes import changing

FULL, SLIDING = "full_attention", "sliding_attention"


class EngineBatch:
    """The batch of rows on the device: cache, tables, and the passes over them.

    Row i is the i-th live sequence. Its tables: `long` = last token, its length in the cache (the column of its next
    token), seed, top-k; `int` = slot, position of the last token counted from the prompt's end, sequence; `real` =
    temperature, top-p. A row that is not live has slot -1 and length 0, and what a step computes for it is ignored.
    """

    def __init__(self, model: nn.Module, rows: int, length: int, frozen: bool = False) -> None:
        self.model, self.rows, self.length = model, rows, length
        points = find_hook_points(model)
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        self.device, self.dtype = embedding.device, embedding.dtype
        self.steering: Steering | None = None
        self.cache = (FrozenCache if frozen else RowCache)(points.n_layers, rows, length)
        with torch.inference_mode():
            self.long = torch.zeros(4, rows, dtype=torch.int64, device=self.device)
            self.int = torch.zeros(3, rows, dtype=torch.int32, device=self.device)
            self.real = torch.zeros(2, rows, dtype=torch.float32, device=self.device)
            self.int[0] = -1
        self.linears = FastLinears(model)  # what passes are to run in
        self.probes: list[int] = []  # sites
        self.projections = torch.zeros(0)  # [rows, sites, length, k]
        self._cache_argument = cache_argument(model)

    @torch.inference_mode()
    def prefill(self, requests: Sequence[Request], first: int, prefix: int = 0, source: int = 0) -> Tensor:
        """Read the prompts (and what was generated before, when a request starts again) of requests whose rows are
        `first`, `first + 1`, ...; return each one's next token `[requests]`. Their first `prefix` tokens are taken from
        the row `source`, which must have been steered alike there."""
        logits = self.read_prompts(requests, first, prefix, source)
        return self._choose(logits, slice(first, first + len(requests)), max(request.mode for request in requests))

    @torch.inference_mode()
    def decode(self, n: int, width: int, mode: Mode) -> Tensor:
        """Read the last token of each of the first n rows, which have at most `width` with it; return the next ones
        `[n]`."""
        return self._choose(self.read_tokens(n, width), slice(n), mode)

    def read_prompts(self, requests: Sequence[Request], first: int, prefix: int = 0, source: int = 0) -> Tensor:
        """`[requests, vocabulary]`: logits at each one's last token."""
        lengths = [len(request.prompt) + len(request.tokens) for request in requests]
        ids = [(request.prompt + request.tokens)[prefix:] for request in requests]
        width = max(map(len, ids))
        each = torch.arange(len(ids), device=self.device)
        rows = first + each
        self._enter(requests, lengths, rows)
        tokens = self._sent([row + [0] * (width - len(row)) for row in ids])
        prompt, length = self._sent([[len(r.prompt), n] for r, n in zip(requests, lengths, strict=True)]).T.unsqueeze(2)
        column = torch.arange(prefix, prefix + width, device=self.device).expand(len(ids), -1)
        slot, _, sequence = (t.unsqueeze(1).expand(-1, width) for t in self.int[:, first : first + len(ids)])
        position = (column - prompt).int()
        self._place(torch.stack((torch.where(column < length, slot, -1), position, sequence)).flatten(1))
        self.cache.prefill(first, len(ids), prefix, source)
        with _only(self.model, each, length[:, 0] - prefix - 1) as logits_of:
            logits = logits_of(self._forward(tokens, column, None))
        if self.probes:
            known = self.projections[source, :, :prefix].expand(len(ids), -1, -1, -1)
            seen = torch.cat([known, self._probed().transpose(1, 2)], 2)
            self.projections[:, :, : prefix + width].index_copy_(0, rows, seen)
        return logits

    def read_tokens(self, n: int, width: int) -> Tensor:
        """`[n, vocabulary]`: logits at each row's last token, which is written at its column."""
        token, column = self.long[0, :n], self.long[1, :n]
        self._place(self.int[:, :n])
        self.cache.decode(column, width)
        logits = self._forward(token.unsqueeze(1), column.unsqueeze(1), self._masks(column, width))[:, -1]
        if self.probes:
            row = torch.arange(n, device=self.device)
            self.projections[row, :, column] = self._probed()[:, 0]
        # A row that is not live must not run out of the cache.
        column.add_(1).clamp_(max=self.length - 1)
        return logits

    def _choose(self, logits: Tensor, rows: slice, mode: Mode) -> Tensor:
        position = self.int[1, rows]
        sampling = Sampling(self.real[0, rows], self.long[3, rows], self.real[1, rows], self.long[2, rows])
        chosen = choose(logits, sampling, position.add_(1), mode)
        self.long[0, rows] = chosen.clamp(min=0)
        return chosen

    def _sent(self, numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        values = torch.tensor(numbers, dtype=dtype, device="cpu")
        if self.device.type != "cuda":
            return values.to(self.device)
        # From pinned memory the host does not wait for what runs.
        return values.pin_memory().to(self.device, non_blocking=True)

    def _forward(self, tokens: Tensor, position: Tensor, masks: Any) -> Tensor:
        of_cache = {self._cache_argument: self.cache}
        try:
            return self.model(
                input_ids=tokens, position_ids=position, attention_mask=masks, use_cache=True, **of_cache
            ).logits
        finally:
            self._place(self.int[:, :0])  # a pass of somebody else's meanwhile has rows of its own

    def _masks(self, column: Tensor, width: int) -> Any:
        """What a step's tokens may look at, as the model wants it: 0 or the least number, `[rows, 1, 1, width]`; a
        dict of them for a model that mixes kinds of attention. In the dtype of the queries, which keys share: cuDNN's
        attention would read the bits of another as its own."""
        dtype = self.cache.dtype
        behind = column.unsqueeze(1) - torch.arange(width, device=self.device)
        masks = {}
        for kind, window in windows(self.model.config).items():
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            least = torch.zeros(seen.shape, dtype=dtype, device=self.device)
            masks[kind] = least.masked_fill_(~seen, torch.finfo(dtype).min).view(-1, 1, 1, width)
        return masks.get("", masks)

    # Rows

    def _enter(self, requests: Sequence[Request], lengths: Sequence[int], rows: Tensor) -> None:
        """Write the tables of rows that begin."""
        pairs = list(zip(lengths, requests, strict=True))
        long = self._sent([[0, n, r.seed, r.top_k] for n, r in pairs])
        last = self._sent([[r.slot, n - len(r.prompt) - 1, r.sequence] for n, r in pairs], torch.int32)
        real = self._sent([[r.temperature, r.top_p] for r in requests], torch.float32)
        for table, numbers in ((self.long, long), (self.int, last), (self.real, real)):
            table.index_copy_(1, rows, numbers.T)
        if self.steering is not None:
            for request in requests:
                self.steering.forget(request.sequence)

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Row `source`, which has at most `length` tokens, becomes row `target`."""
        self.cache.move(source, target, length)
        for table in (self.long, self.int, self.real):
            table[:, target] = table[:, source]
        if self.probes:
            self.projections[target, :, :length] = self.projections[source, :, :length]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """A row that is not live any more."""
        self.long[1, row] = 0
        self.int[0, row] = -1

    @torch.inference_mode()
    def wipe(self, lengths: Sequence[int]) -> None:
        """Forget what the rows hold behind their first `lengths` tokens: a mask does not hide a NaN."""
        self.cache.wipe(self._sent(lengths))

    def _place(self, rows: Tensor) -> None:
        if self.steering is not None:
            self.steering.set_rows(rows, self.rows)

    # Probes

    @torch.inference_mode()
    def watch(self, sites: list[int], k: int) -> None:
        """Keep what the first k probe columns of these sites see, for every row and token; none for no sites."""
        shape = (self.rows, len(sites), self.length, k)
        if self.projections.shape != (shape if sites else (0,)):
            self.projections = torch.zeros(shape, dtype=torch.float32, device=self.device) if sites else torch.zeros(0)
        self.probes = sites

    @torch.inference_mode()
    def seen(self, row: int, length: int) -> Tensor | None:
        """`[sites, length, k]` of a row."""
        return self.projections[row, :, :length].clone() if self.probes else None

    def _probed(self) -> Tensor:
        """`[batch, tokens, sites, k]` of the pass just made."""
        assert self.steering is not None
        k = self.projections.shape[-1]
        values = torch.stack([self.steering.seen(site)[..., :k] for site in self.probes], dim=2)
        self.steering.clear_projections()
        return values


@contextmanager
def _only(model: nn.Module, row: Tensor, column: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let the unembedding compute the logits at one column of each row alone; gives what makes them
    `[rows, vocabulary]`. Where the model does not call it with the hidden states, all are computed and these taken."""
    unembedding: Any = model.get_output_embeddings()  # type: ignore[operator]

    thread = get_ident()  # another one's pass may be under way

    def at_columns(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0] if args and get_ident() == thread else None
        return (x[row, column].unsqueeze(1), *args[1:]) if isinstance(x, Tensor) and x.dim() == 3 else None

    def logits_of(logits: Tensor) -> Tensor:
        return logits[:, 0] if logits.shape[1] == 1 else logits[row, column]

    with changing() as changes:
        if unembedding is not None:
            changes.hook(unembedding.register_forward_pre_hook, at_columns)
        yield logits_of


def windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention that need masks, by the name under which the model looks for them ("" where it takes one
    mask), and the window of each."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if unknown := set(kinds or ()) - {FULL, SLIDING}:
        raise ValueError(f"the Engine has no cache for {', '.join(sorted(unknown))} layers: use model.generate")
    if kinds is None:
        return {"": window}
    return {kind: window if kind == SLIDING else None for kind in set(kinds)}
