"""Every family of docs/models.md has what its row says, and its row says what was tested."""

from __future__ import annotations

from pathlib import Path

import every_model
import models
import pytest
import torch
import transformers
from packaging.version import Version

import faststeer as fs

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="the families and caches are those of transformers 5.24"
)
TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in every_model.KINDS else pytest.mark.full) for f in sorted(every_model.FAMILIES)],
)
def test_as_the_table_says(family):
    """`python tests/every_model.py > docs/models.md` writes the table anew."""
    row = every_model.line(family, every_model.check(family))
    assert row in TABLE, f"docs/models.md has another row for {family}: {row}"


def test_refused_for_a_property_of_the_model():
    """At most five, and nothing else is wrong."""
    assert "WRONG" not in TABLE
    assert TABLE.startswith(every_model.HEAD) and TABLE.endswith(every_model.TAIL)
    assert TABLE.count("| - | refused |") <= 5


def test_a_loop_of_one_s_own_over_a_recurrent_cache():
    """A Mamba's cache does not count its tokens; where the prompt ends is known all the same."""
    model = every_model.build("mamba")
    v, ids = torch.randn(every_model.HIDDEN, generator=torch.Generator().manual_seed(0)), every_model._tokens(2, 5)
    plan = fs.Plan([fs.Add(v, layers=1, positions="last"), fs.Add(-2 * v, layers=2, positions="generated")])
    with torch.no_grad(), fs.steer(model, plan):
        expected = model.generate(
            ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits
        for _ in range(2):  # a second prompt starts anew
            output = model(ids, use_cache=True)
            for logits in expected:
                torch.testing.assert_close(output.logits[:, -1], logits)
                output = model(logits.argmax(-1, keepdim=True), **models.cached(model, models.cache_of(output)))


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_a_recurrent_state_from_elsewhere_says_nothing_of_its_prompt(family):
    model = every_model.build(family)
    v, ids = torch.ones(every_model.HIDDEN), every_model._tokens(1, 5)
    with torch.no_grad():
        state = models.cached(model, models.cache_of(model(ids, use_cache=True)))
        with fs.steer(model, fs.Add(v, layers=1)):
            model(ids[:, :1], **state, use_cache=True)
        with (
            fs.steer(model, fs.Add(v, layers=1, positions="generated")),
            pytest.raises(ValueError, match=r"recurrent state was made outside of this context.*positions='all'"),
        ):
            model(ids[:, :1], **state, use_cache=True)
