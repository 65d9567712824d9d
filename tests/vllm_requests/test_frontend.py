"""What the front end makes of a request's payload: defaults, and that what it remembers is never out of date."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from strategies import randn

import faststeer as fs
from faststeer.vllm.client import plan
from faststeer.vllm.frontend import FrontEnd, front_end
from faststeer.vllm.requests import PAYLOAD_KEY, received
from faststeer.vllm.settings import ServerSettings


def vector(seed: int = 0) -> fs.SteeringVector:
    return fs.SteeringVector({0: randn(seed, 8)})


def digest_of(front: FrontEnd, payload) -> str:
    return received({PAYLOAD_KEY: front.wire(payload)}).digest


class TestFrontEnd:
    def test_the_default_plan(self, tmp_path):
        vector().save(tmp_path / "v.safetensors")
        (tmp_path / "calm.json").write_text('{"add": "v"}')
        front = FrontEnd(ServerSettings(max_dose=None, folder=tmp_path, default_plan="calm"), 2, 8)
        assert digest_of(front, None) == digest_of(front, "calm") and front.wire("none") is None
        assert FrontEnd(ServerSettings(max_dose=None, folder=tmp_path), 2, 8).wire(None) is None

    def test_a_default_plan_that_does_not_fit_ends_the_start(self, tmp_path):
        (tmp_path / "calm.json").write_text('{"add": "v"}')
        with pytest.raises(ValueError, match="no vector is registered as 'v'"):
            FrontEnd(ServerSettings(max_dose=None, folder=tmp_path, default_plan="calm"), 2, 8)

    def test_nothing_out_of_date(self, tmp_path):
        front, path = FrontEnd(ServerSettings(max_dose=None, folder=tmp_path), 2, 8), tmp_path / "v.safetensors"
        text, seen = '{"add": "v"}', []
        for number in range(2):
            vector(number).save(path)
            os.utime(path, ns=(number, number))
            seen.append(digest_of(front, text))
        front.register_vector("v", vector(2))
        seen.append(digest_of(front, text))
        front.register_vector("v", vector(3))
        seen.append(digest_of(front, text))
        front.registry.remove_vector("v")
        assert digest_of(front, text) == seen[1] and len(set(seen)) == 4
        assert front.wire(text) is front.wire(text)  # remembered
        path.unlink()
        with pytest.raises(ValueError, match="no vector is registered as 'v'"):
            front.wire(text)

    def test_does_not_remember_without_end(self):
        front = FrontEnd(ServerSettings(max_dose=None), 2, 8)
        texts = [plan(fs.Add(randn(0, 8), i, layers=0))[PAYLOAD_KEY] for i in range(1, 1100)]
        for text in texts:
            front.wire(text)
        assert len(front._read) == 1024 and front._read_bytes == sum(
            len(text) + len(wire["plan"]) for text, (_, _, wire) in front._read.items()
        )

    def test_what_the_tables_lack_is_refused(self):
        front = FrontEnd(ServerSettings(max_dose=None), 2, 8)
        with pytest.raises(ValueError, match="this server is built with resid_pre, resid_post alone"):
            front.wire(fs.Plan([fs.Add(randn(0, 8), layers=0, at="mlp_out")]))

    def test_registering_is_checked(self):
        front = FrontEnd(ServerSettings(max_dose=None), 2, 8)
        with pytest.raises(ValueError, match="hidden size 9, the model has 8"):
            front.register_vector("v", fs.SteeringVector({0: randn(0, 9)}))
        with pytest.raises(ValueError, match="layer 2 is out of range"):
            front.register_plan("p", fs.Plan([fs.Add(randn(0, 8), layers=2)]))
        with pytest.raises(ValueError, match="the plan does nothing"):
            front.register_plan("p", "none")
        front.register_vector("v", vector())
        front.register_plan("p", '{"add": "v"}')
        assert front.about()["plans"] == ["p"] and digest_of(front, "p") == digest_of(front, '{"add": "v"}')

    def test_of_an_engine(self):
        front = FrontEnd(ServerSettings(max_dose=None), 2, 8)
        processor = SimpleNamespace(input_processor=SimpleNamespace(faststeer=front))
        assert front_end(processor) is front and front_end(SimpleNamespace(llm_engine=processor)) is front
        with pytest.raises(RuntimeError, match="faststeer is off in this engine: set FASTSTEER_VLLM=1"):
            front_end(SimpleNamespace())
