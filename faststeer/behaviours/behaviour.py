"""The Behaviour type and its file: one JSON file, or a folder whose behaviour.json names further files.

A behaviour is refused as a whole if its held-out prompts are not held out, or a set of prompts cannot be contrasted;
nothing is repaired in silence.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faststeer.behaviours.layouts import pairs_of, read_records
from faststeer.evaluate.judging import check_name
from faststeer.evaluate.judging.registry import RENAMED
from faststeer.extract.pairs import Pair
from faststeer.files import UNREADABLE, FormatError, json_file, write_atomically
from faststeer.hf.batching import Prompt, check_prompts
from faststeer.hf.prompts import load_prompts

FORMAT = "faststeer.behaviour/2"
# What the judges of files of the first format are called now: there "refusal" and "sentiment" were other ones.
OF_FORMAT_1 = RENAMED | {"refusal": "refusal:substrings", "sentiment": "sentiment:words"}
DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")
SETS = ("positive", "negative", "induce", "suppress")


@dataclass(frozen=True)
class BehaviourSplit:
    """Prompts of one split.

    Args:
        positive: prompts that show the behaviour; negative: prompts that do not.
        induce: prompts on which the vector is to bring the behaviour about; by default the negative ones.
        suppress: prompts on which it is to take it away; by default the positive ones.
        pairs: prompts with a wanted and an unwanted completion.
    """

    positive: Sequence[Prompt]
    negative: Sequence[Prompt]
    induce: Sequence[Prompt] = ()
    suppress: Sequence[Prompt] = ()
    pairs: Sequence[Pair] = ()

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            object.__setattr__(self, name, check_prompts(getattr(self, name), name))
        for name, default in (("induce", self.negative), ("suppress", self.positive)):
            given = getattr(self, name)
            object.__setattr__(self, name, check_prompts(given, name) if given else default)
        object.__setattr__(self, "pairs", list(self.pairs))


@dataclass(frozen=True)
class Behaviour:
    """What a vector is to stand for.

    Args:
        name, description: what it is.
        judge: name of a judge (`faststeer.evaluate.judging.make`) that says which answers show the behaviour, and which
            its opposite.
        train, validation, test: prompts to extract from, to select on, and to measure on; they share none.
        paired: whether positive[i] and negative[i] differ in the behaviour alone.
        coherence: name of the judge of whether an answer is coherent.
        about: anything else, such as source and licence.

    Raises:
        ValueError: an unknown judge, fewer than two training prompts a side, a prompt twice in a set
            or in two splits, pairs of sides that differ in number.
    """

    name: str
    description: str
    judge: str
    train: BehaviourSplit
    validation: BehaviourSplit
    test: BehaviourSplit
    paired: bool = False
    coherence: str = "no-loop"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.judge)
        check_name(self.coherence)
        for side in ("positive", "negative"):
            if len(prompts := getattr(self.train, side)) < 2:
                raise ValueError(
                    f"behaviour {self.name!r}: train, {side} has {len(prompts)} prompt: a contrast needs at least two"
                )
        if self.paired and len(self.train.positive) != len(self.train.negative):
            raise ValueError(
                f"behaviour {self.name!r} is paired, but train has {len(self.train.positive)} positive and "
                f"{len(self.train.negative)} negative prompts"
            )
        self._check_twice()

    def _check_twice(self) -> None:
        """Held-out prompts are to be held out, and a prompt given twice counts twice unasked."""
        of_split: dict[str, str] = {}
        for split in SPLITS:
            here: dict[str, str] = {}
            for name in SETS:
                of_set: dict[str, str] = {}
                for number, prompt in enumerate(getattr(getattr(self, split), name)):
                    key, place = repr(prompt), f"{split}, {name}[{number}]"
                    # A split's prompts to induce and suppress on may be its others; its two sides share none.
                    same_side = here.get(key) if name == "negative" else None
                    if earlier := of_set.get(key) or of_split.get(key) or same_side:
                        raise ValueError(
                            f"behaviour {self.name!r}: {place} is the same prompt as {earlier}: {str(prompt)[:60]!r}; "
                            "leave one of them out"
                        )
                    of_set[key] = place
                here = of_set | here
            of_split |= here

    def to_json(self) -> str:
        """The behaviour as one JSON file, which `load` reads."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "description": self.description,
            "judge": self.judge,
            "coherence": self.coherence,
            "paired": self.paired,
            **({"about": dict(self.about)} if self.about else {}),
        }
        for split in SPLITS:
            part: BehaviourSplit = getattr(self, split)
            data[split] = {"positive": part.positive, "negative": part.negative}
            data[split] |= {name: getattr(part, name) for name in SETS[2:] if not self._is_default(part, name)}
            if part.pairs:
                data[split]["pairs"] = [_pair_dict(pair) for pair in part.pairs]
        return json.dumps(data, ensure_ascii=False, indent=1)

    @staticmethod
    def _is_default(part: BehaviourSplit, name: str) -> bool:
        return getattr(part, name) == (part.negative if name == "induce" else part.positive)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the behaviour to one JSON file, atomically."""
        write_atomically(path, self.to_json() + "\n")
        return Path(path)


def names() -> list[str]:
    """Return the names of the behaviours that come with the package (for any chat model)."""
    return sorted(path.stem for path in DATA.glob("*.json"))


def load(name_or_path: str | os.PathLike[str]) -> Behaviour:
    """Return a behaviour that comes with the package, or one from a JSON file or a folder with behaviour.json.

    The file is an object: "format" ("faststeer.behaviour/2"), "name", "description", "judge", optionally "coherence",
    "paired" and "about", and "train", "validation" and "test", each an object with the lists of prompts "positive" and
    "negative" and optionally "induce", "suppress" and "pairs" (`BehaviourSplit`). A list may be given as the name of a
    file beside it: prompts in any format of `load_prompts` or any of the layouts of `read_records`, pairs in one of the
    layouts that have them.

    Raises:
        FileNotFoundError: no behaviour of that name and no such file.
        FormatError: a file that holds no behaviour, with the place in it; what `Behaviour` refuses.
    """
    if isinstance(name_or_path, str) and name_or_path in names():
        path = DATA / f"{name_or_path}.json"
    else:
        path = Path(name_or_path)
        path = path / "behaviour.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no behaviour {str(name_or_path)!r}: expected one of {', '.join(names())}, a JSON file, or a folder with "
            "behaviour.json"
        )
    return behaviour_from(json_file(path), str(path), path.parent)


def behaviour_from(data: Any, path: str, folder: Path) -> Behaviour:
    """The behaviour that an object says, as `load` reads it from a file.

    Args:
        path: what errors call it. folder: where the files are that it names.

    Raises:
        FormatError, FileNotFoundError: as `load`.
    """
    old = isinstance(data, dict) and data.get("format") == "faststeer.behaviour/1"
    if not isinstance(data, dict) or not (old or data.get("format") == FORMAT):
        raise FormatError(f'{path} holds no behaviour: expected an object with "format": {FORMAT!r}')
    known = {"format", "name", "description", "judge", "coherence", "paired", "about", *SPLITS}
    if unknown := set(data) - known:
        raise FormatError(f"{path} has {', '.join(sorted(unknown))}: a behaviour has {', '.join(sorted(known))}")
    for name in ("name", "judge", *SPLITS):
        if name not in data:
            raise FormatError(f"{path} has no {name!r}")
    judges = {"judge": str(data["judge"]), "coherence": str(data.get("coherence", "no-loop"))}
    if old:
        judges = {what: OF_FORMAT_1.get(name, name) for what, name in judges.items()}
    try:
        splits = {name: _split(data[name], f"{path}, {name}", folder) for name in SPLITS}
        return Behaviour(
            str(data["name"]),
            str(data.get("description", "")),
            judges["judge"],
            splits["train"],
            splits["validation"],
            splits["test"],
            coherence=judges["coherence"],
            paired=bool(data.get("paired", False)),
            about=dict(data.get("about", {})),
        )
    except FileNotFoundError:
        raise
    except (OSError, *UNREADABLE) as error:  # OSError: what is named beside it can be no file's name
        raise FormatError(f"{path}: {error}") from error


def of_prompts(
    name: str,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    judge: str = "refusal",
    coherence: str = "no-loop",
) -> Behaviour:
    """Return a behaviour of two sets of prompts, split 60 : 20 : 20 into train, validation and test.

    Prompts are put in the order of a checksum of their own text and cut there, so that the order in which they are
    given does not matter, and few change their split when some are added.

    Raises:
        ValueError: too few prompts to have two for training and one in each other split a side; as `Behaviour`.
    """
    positive, negative = check_prompts(positive, "positive"), check_prompts(negative, "negative")
    parts: dict[str, dict[str, list[Prompt]]] = {split: {} for split in SPLITS}
    for side, prompts in (("positive", positive), ("negative", negative)):
        order = sorted(range(len(prompts)), key=lambda n: zlib.crc32(repr(prompts[n]).encode()))
        held_out = max(len(prompts) // 5, 1)
        cuts = (order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out])
        for split, chosen in zip(SPLITS, cuts, strict=True):
            parts[split][side] = [prompts[n] for n in sorted(chosen)]
            if len(chosen) < (2 if split == "train" else 1):
                raise ValueError(
                    f"{len(prompts)} {side} prompts are too few to hold a fifth out twice and train on two: give at "
                    "least 4 a side"
                )
    train, validation, test = (BehaviourSplit(parts[split]["positive"], parts[split]["negative"]) for split in SPLITS)
    return Behaviour(name, "", judge, train, validation, test, coherence=coherence)


def _pair_dict(pair: Pair) -> dict[str, Any]:
    data: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen}
    if pair.rejected is not None:
        data["rejected"] = pair.rejected
    return data | ({"sign": pair.sign} if pair.sign != 1 else {})


def _split(data: Any, where: str, folder: Path) -> BehaviourSplit:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {type(data).__name__}: expected an object with positive and negative prompts")
    if unknown := set(data) - {*SETS, "pairs"}:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}: expected {', '.join(SETS)} or pairs")
    for name in ("positive", "negative"):
        if name not in data:
            raise ValueError(f"{where} has no {name!r}")
    try:
        sets = {name: _prompts(data[name], folder) for name in SETS if name in data}
        return BehaviourSplit(**sets, pairs=_pairs(data.get("pairs", []), folder))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _prompts(given: Any, folder: Path) -> list[Prompt]:
    return prompts_of_file(folder / given) if isinstance(given, str) else given


def prompts_of_file(path: Path, field: str | None = None) -> list[Prompt]:
    """Read prompts from a file in one of the layouts (`read_records`), or in any format of `load_prompts`.

    A layout says more than a column: an Alpaca instruction has an input, a HarmBench behaviour a context. `field` names
    the column instead.
    """
    if field is None and path.suffix in (".csv", ".tsv", ".json", ".jsonl"):
        try:
            return [record.prompt for record in read_records(path)]
        except ValueError:
            pass  # none of the layouts: a list of prompts, or what load_prompts says is wrong with it
    return load_prompts(path, field=field)


def _pairs(given: Any, folder: Path) -> list[Pair]:
    if isinstance(given, str):
        return pairs_of(read_records(folder / given))
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise ValueError("pairs is no list of objects with prompt, chosen and rejected")
    made = []
    for number, item in enumerate(given):
        if unknown := set(item) - {"prompt", "chosen", "rejected", "sign"}:
            raise ValueError(
                f"pairs[{number}] has {', '.join(sorted(unknown))}: expected prompt, chosen, rejected, sign"
            )
        try:
            made.append(Pair(**item))
        except (TypeError, ValueError) as error:
            raise ValueError(f"pairs[{number}]: {error}") from error
    return made
