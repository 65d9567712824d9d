"""The README's example runs on the real model and does what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_example_does_what_its_comments_say(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    answers = [text.split("assistant\n")[-1] for text in eval(capsys.readouterr().out)]
    gloomy, usual = (SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in answers)
    assert gloomy <= -0.05 and usual >= gloomy + 0.5, answers
