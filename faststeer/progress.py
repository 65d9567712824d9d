"""How far long work is, and how long it will take, said on stderr."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

REPORT_SECONDS = 10.0  # between two lines of progress where there is no terminal
LEAST_SHARE = 1 / 20  # of the steps are done before the time left is said
LONG_SECONDS = 180.0  # above which a forecast says what takes less


@contextmanager
def progress_bar(
    description: str, total: int, shown: bool, *, weights: Sequence[float] | None = None, least: int | None = None
) -> Iterator[Callable[..., None]]:
    """Yield `advance(text=None, finished=None)`, to call after each of `total` steps, with a new description and the
    number of finished steps if the caller likes. The first call may say how many were finished before the work began.
    Where `shown`, it moves a progress bar on stderr with the time left; where stderr is no terminal, it prints a line
    every REPORT_SECONDS instead.

    Args:
        weights: how much work each step is, where steps differ.
        least: the time left is said once so many steps are done. By default a part of them (LEAST_SHARE, at least two):
            the first ones also take what is done once, and their number says little.
    """
    if not shown:
        yield lambda text=None, finished=None: None
        return
    console, work = Console(stderr=True), [0.0, *accumulate([1.0] * total if weights is None else weights)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(description, total=total, left="")
    least = max(2, math.ceil(LEAST_SHARE * total)) if least is None else least
    start = last = time.monotonic()
    first, steps = None, 0

    def advance(text: str | None = None, finished: int | None = None) -> None:
        nonlocal last, first, steps
        now, steps, text = time.monotonic(), steps + 1 if finished is None else finished, text or description
        first = first if first is not None else finished or 0
        left = ""
        if first + least <= steps < total:
            seconds = (now - start) / (work[steps] - work[first]) * (work[-1] - work[steps])
            left = f"about {duration(seconds)} left"
        bar.update(task, completed=steps, description=text, left=left)
        if bar.disable and left and now - last >= REPORT_SECONDS:
            last = now
            console.print(f"{text}: {steps} of {total}, {left}", highlight=False)

    with bar:
        yield advance


def duration(seconds: float) -> str:
    """Seconds as a text for people: "8 s", "3 min", "2 h 10 min"."""
    if seconds < 100:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def forecast(what: str, seconds: float, less: str = "") -> None:
    """Say on stderr how long work will take that was timed on a part of it, and where it is long, what takes less."""
    text = f"{what}: about {duration(seconds)}"
    if seconds > LONG_SECONDS and less:
        text += f". {less}"
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
