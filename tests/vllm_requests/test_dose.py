"""The dose of a plan, against the largest change that it makes to rows of the measured norm."""

from __future__ import annotations

import math
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import faststeer as fs
from faststeer import ops
from faststeer.compile import compile_plan
from faststeer.program import Capacity, Program
from faststeer.vllm.client import plan as client_plan
from faststeer.vllm.dose import check_dose
from faststeer.vllm.frontend import FrontEnd
from faststeer.vllm.settings import ServerSettings

N_LAYERS, HIDDEN = 3, 16
NORMS = {0: 2.0, 1: 3.0, 2: 5.0, 3: 7.0}


def direction(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def dose(plan: fs.Plan) -> float:
    """The largest dose that the check says a plan has."""
    with pytest.raises(ValueError, match="dose") as refused:
        check_dose(compile_plan(plan, N_LAYERS, HIDDEN), NORMS, N_LAYERS, -1.0)
    return float(re.search(r"is ([-\d.e+]+):", str(refused.value))[1])


@pytest.mark.parametrize(
    ("at", "layer", "norm"),
    [("resid_pre", 0, 2.0), ("resid_pre", 2, 5.0), ("resid_post", 0, 3.0), ("resid_post", 2, 7.0)]
    + [(at, layer, norm) for at in ("attn_out", "resid_mid", "mlp_out") for layer, norm in ((0, 3.0), (2, 7.0))],
)
def test_an_addition_is_measured_by_the_stream_at_its_hook_point(at, layer, norm):
    v = direction(1)
    for coefficient in (0.5, -4.0, 1e30):
        found = dose(fs.Plan([fs.Add(v, coefficient, layers=layer, at=at)]))
        assert found == pytest.approx(abs(coefficient) * float(v.norm()) / norm, rel=1e-3)


@hypothesis.given(st.data(), st.integers(0, 10**6))
def test_no_row_is_changed_by_more_than_its_dose(data, seed):
    """Steered by the op, from rows of the measured norm that lie as the entry is worst for."""
    v = direction(seed)
    q = v / v.norm()
    kind = data.draw(st.sampled_from(["add", "ablate", "clamp", "project", "rotate"]))
    number = data.draw(st.floats(-100, 100))
    high = data.draw(st.one_of(st.none(), st.floats(number, 200)))
    intervention = {
        "add": lambda: fs.Add(v, number, layers=0, at="resid_post"),
        "ablate": lambda: fs.Ablate(v, number, layers=0, at="resid_post"),
        "clamp": lambda: fs.Clamp(v, number, high, layers=0, at="resid_post"),
        "project": lambda: fs.Project(v, layers=0, at="resid_post"),
        "rotate": lambda: fs.Rotate(v, direction(seed + 1), number, layers=0, at="resid_post"),
    }[kind]()
    plan = fs.Plan([intervention])
    rows = torch.cat([direction(seed + 2, 8), q[None], -q[None]])
    rows = NORMS[1] * rows / rows.norm(dim=-1, keepdim=True)
    program = Program(N_LAYERS, HIDDEN, Capacity(slots=1, vectors=4, entries=4))
    program.load(0, plan)
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    steered = ops.steer(rows, program.tables(4), zeros.expand(3, -1), None)
    length = float(steered.norm(dim=-1).max()) / NORMS[1]
    limit = dose(plan) if compile_plan(plan, N_LAYERS, HIDDEN) else 0.0
    assert length <= 1 + limit * (1 + 1e-3) + 1e-5


def test_entries_of_one_hook_point_add_up_whatever_their_gates_and_positions():
    v, gate = direction(3), fs.Gate(direction(4))
    one = fs.Plan([fs.Add(v, 2.0, layers=1)])
    many = fs.Plan(
        [fs.Add(v, 2.0, layers=1), fs.Add(v, -2.0, layers=1, when=gate), fs.Add(v, 2.0, layers=1, positions="last")]
    )
    assert dose(many) == pytest.approx(3 * dose(one), rel=1e-3)
    spread = fs.Plan([fs.Add(v, 2.0, layers=0), fs.Add(v, 2.0, layers=1)])
    assert dose(spread) == pytest.approx(2 * float(v.norm()) / NORMS[1], rel=1e-3)  # layers do not add up


@pytest.mark.parametrize("clamp", [(-5.0, None), (None, 5.0), (-5.0, 5.0), (-1e38, 1e38)])
def test_a_clamp_that_pulls_towards_zero_has_no_dose(clamp):
    assert dose(fs.Plan([fs.Clamp(direction(5), *clamp, layers=0)])) == 0.0


def test_a_front_end_refuses_what_is_too_strong_and_says_how_to_mend_it():
    v = direction(6)
    front = FrontEnd(ServerSettings(max_dose=4.0), N_LAYERS, HIDDEN)
    payload = client_plan(fs.Add(v, 3.0, layers=0))["faststeer"]
    with pytest.raises(RuntimeError, match="before the workers have told the norms"):
        front.wire(payload)
    assert front.wire(None) is None and front.wire("none") is None
    front.learn([[(0, 1.0), (1, float(v.norm()))], [(1, float(v.norm())), (2, 1.0), (3, 1.0)]])
    assert front.wire(payload) is not None
    for coefficient in (4.1, -1e38):
        strong = client_plan(fs.Add(v, coefficient, layers=0))["faststeer"]
        with pytest.raises(ValueError, match=r"dose at resid_pre of layer 1 is .*at most 4: use a smaller coef.*null"):
            front.wire(strong)
        with pytest.raises(ValueError, match="dose"):
            front.register_plan("strong", strong)
    assert front.about()["max_dose"] == 4.0 and math.isclose(front.about()["norms"][1], float(v.norm()))
    anything = FrontEnd(ServerSettings(max_dose=None), N_LAYERS, HIDDEN)
    assert anything.wire(client_plan(fs.Add(v, 1e38, layers=0))["faststeer"]) is not None


def test_a_default_plan_that_is_too_strong_is_refused_when_the_norms_are_known(tmp_path):
    direction_ = fs.SteeringVector({0: direction(7)})
    direction_.save(tmp_path / "v.safetensors")
    (tmp_path / "usual.json").write_text('{"add": "v", "coefficient": 1000}')
    front = FrontEnd(ServerSettings(folder=tmp_path, default_plan="usual"), N_LAYERS, HIDDEN)
    with pytest.raises(ValueError, match="dose"):
        front.learn([list(NORMS.items())])


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "8", [8]])
def test_settings(value):
    with pytest.raises(ValueError, match=r"max_dose is .*a number above 0, or null for no limit"):
        ServerSettings(max_dose=value)
    assert ServerSettings(max_dose=None).max_dose is None and ServerSettings(max_dose=3).max_dose == 3
