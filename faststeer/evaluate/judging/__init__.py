"""Judges behind one interface: `judge(prompts, completions) -> [Verdict]`, batched.

    judge = judging.make("refusal")                              # words
    judge = judging.make("strongreject:./my-judge-model")        # a language model, by folder or name
    verdicts = judging.judged(judge, prompts, completions)
    verdicts.rate, verdicts.mean, verdicts.failures

What a judge could not read is a verdict too, with label and score None; it is counted, and never guessed.
"""

from faststeer.evaluate.judging.formats import FORMATS, JudgeFormat, read_format
from faststeer.evaluate.judging.interface import BaseJudge, Judge, Verdict, Verdicts, check_line, judged, signs
from faststeer.evaluate.judging.measures import Length, Perplexity, Repetition, repetition
from faststeer.evaluate.judging.models import Classifier, LanguageModelJudge, RefusalScore
from faststeer.evaluate.judging.registry import check_name, judge_names, make, register
from faststeer.evaluate.judging.words import Function, Pattern, Refusal, Sentiment, no_loop

__all__ = [
    "FORMATS",
    "BaseJudge",
    "Classifier",
    "Function",
    "Judge",
    "JudgeFormat",
    "LanguageModelJudge",
    "Length",
    "Pattern",
    "Perplexity",
    "Refusal",
    "RefusalScore",
    "Repetition",
    "Sentiment",
    "Verdict",
    "Verdicts",
    "check_line",
    "check_name",
    "judge_names",
    "judged",
    "make",
    "no_loop",
    "read_format",
    "register",
    "repetition",
    "signs",
]
