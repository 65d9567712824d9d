"""A steered model as a model of EleutherAI's lm-eval, whose tasks then measure what steering costs.

    from faststeer.evaluate.lm_eval import SteeredLM
    lm_eval.simple_evaluate(SteeredLM(model, tokenizer, plan), tasks=["arc_easy"])

The package lm-eval is needed for this module alone. Source: github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from faststeer.evaluate.generate import generator
from faststeer.evaluate.likelihood import ContinuationRow, ContinuationScore, score_rows
from faststeer.generator import SamplingParams
from faststeer.hf.batching import check_evaluating, padding_id
from faststeer.hf.encoding import End, apply_template, encode_texts
from faststeer.plan import Plan
from faststeer.progress import progress_bar

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError("faststeer.evaluate.lm_eval needs the package lm-eval: pip install lm-eval") from error


class SteeredLM(TemplateLM):
    """A model under a plan, as lm-eval asks it: log-likelihoods in mixed batches, generation by the Engine if it can.

    A request's context is the prompt, so that a plan's positions mean what they mean while generating.

    Args:
        plan: None for the unsteered model, to compare with.
        max_length: tokens of context and continuation; longer contexts lose their beginning, as is usual in lm-eval. By
            default what the model has positions for.

    Raises:
        ValueError: a model in training mode; a plan that does not fit the model, when it is first used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan | None = None,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        check_evaluating(model)
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.max_length = max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        ends = self.tokenizer.eos_token_id
        return padding_id(self.tokenizer) if ends is None else ends

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        end: End = "prompt" if add_generation_prompt else "begun"
        return apply_template(self.tokenizer, chat_history, end, "a prompt of lm-eval")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begin = self.tokenizer.bos_token
        # A chat template has written the begin-of-sequence token already.
        add = (begin is None or not string.startswith(begin)) if add_special_tokens is None else add_special_tokens
        return encode_texts(self.tokenizer, [string], begin=add)[0]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            room = self.max_length - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, the model has room for {self.max_length} with a "
                    "context: use shorter ones"
                )
            rows.append(ContinuationRow(context[-room:] or [self.prefix_token_id], continuation, self.plan))
        answers = [(score.total, score.greedy) for score in self._scored(rows, not disable_tqdm)]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rows, owners = [], []
        for number, (string,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                rows.append(ContinuationRow(context, continuation, self.plan))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scored(rows, not disable_tqdm), strict=True):
            totals[owner] += score.total
        return totals

    def _scored(self, rows: Sequence[ContinuationRow], progress: bool) -> list[ContinuationScore]:
        pad_id = padding_id(self.tokenizer)
        return score_rows(self.model, rows, pad_id=pad_id, batch_size=self.batch_size, progress=progress)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1], self.max_gen_toks), []).append(number)
        answering = generator(self.model, self.tokenizer, max_batch=self.batch_size, max_length=self.max_length)
        for (until, new, temperature, top_p), numbers in groups.items():
            room = max(1, self.max_length - new)
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            sampling = SamplingParams(new, temperature, top_p=top_p, stop=until)
            with progress_bar("Generating", len(prompts), not disable_tqdm) as advance:
                for completion in answering.complete(prompts, self.plan, sampling):
                    number = numbers[completion.index]
                    answers[number] = completion.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
                    advance()
        return answers


def _settings(asked: dict[str, Any], longest: int) -> tuple[Any, ...]:
    """Stop strings, new tokens, temperature, top-p of a request; lm-eval's tasks name them as transformers does."""
    until = asked.get("until") or []
    until = (until,) if isinstance(until, str) else tuple(until)
    new = asked.get("max_gen_toks") or asked.get("max_new_tokens") or longest
    sampling = bool(asked.get("do_sample", float(asked.get("temperature", 0.0) or 0.0) > 0))
    temperature = float(asked.get("temperature", 1.0) or 0.0) if sampling else 0.0
    return until, int(new), temperature, float(asked.get("top_p", 1.0))
