"""The examples of the README and of docs/start.md run on the real model and do what their comments say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")


def test_the_example_does_what_its_comments_say(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    answers = [text.split("assistant\n")[-1] for text in eval(capsys.readouterr().out)]
    gloomy, usual = (SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in answers)
    assert gloomy <= -0.05 and usual >= gloomy + 0.5, answers


def test_get_started_runs(tmp_path, monkeypatch, capsys):
    """docs/start.md, one block after the other: the first row is gloomier than the second."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", START, re.DOTALL):
        exec(compile(example, "docs/start.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    answers = [text.split("assistant\n")[-1] for text in eval(printed[0])]
    gloomy, usual = (SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in answers)
    assert usual >= gloomy + 0.5, answers
    assert len(printed) >= 3 and (tmp_path / "gloomy.json").is_file() and len(names["vector"].layers) == 29
