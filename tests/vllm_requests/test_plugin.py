"""What the plugin refuses to start with, and what it does to a vLLM process in which it is off; without any vLLM."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from strategies import randn

import faststeer as fs
from faststeer.vllm import plan, plugin
from faststeer.vllm.admission import admit
from faststeer.vllm.frontend import FrontEnd
from faststeer.vllm.modes import check_modes
from faststeer.vllm.requests import PAYLOAD_KEY, received
from faststeer.vllm.settings import ServerSettings
from faststeer.vllm.switch import is_on

LIGHT = {
    "",
    ".file_kinds",
    ".version",
    ".vllm",
    ".vllm.plugin",
    ".vllm.switch",
    ".vllm.admission",
    ".vllm.server",
    ".vllm.modes",
    ".vllm.wrapping",
}


def config(**changed):
    parts = {
        "parallel_config": SimpleNamespace(enable_dbo=False, prefill_context_parallel_size=1),
        "compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "model_config": SimpleNamespace(is_encoder_decoder=False, runner_type="generate"),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    for name, value in changed.items():
        part, _, field = name.partition("__")
        if not field:
            parts[part] = value
        elif field == "enable_sp":
            parts[part].pass_config.enable_sp = value
        else:
            setattr(parts[part], field, value)
    return SimpleNamespace(**parts)


class TestModes:
    def test_usual(self):
        check_modes(config())
        check_modes(config(model_config__runner_type="draft"))

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"speculative_config": SimpleNamespace(method="ngram")}, "speculative decoding"),
            ({"kv_transfer_config": SimpleNamespace(kv_connector="any")}, "KV connectors"),
            ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
            ({"parallel_config__use_ubatching": True}, "micro-batching"),
            ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
            ({"compilation_config__enable_sp": True}, "sequence parallelism"),
            ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
            ({"model_config__is_encoder_decoder": True}, "encoder-decoder models"),
            ({"model_config__runner_type": "pooling"}, "pooling models"),
        ],
        ids=str,
    )
    def test_refused(self, changed, says):
        with pytest.raises(RuntimeError, match=rf"cannot steer with .*{says}.*: switch that off, or start without"):
            check_modes(config(**changed))


class TestVersions:
    @pytest.fixture
    def version(self, monkeypatch):
        def be(text):
            vllm = ModuleType("vllm")
            vllm.__version__ = text
            monkeypatch.setitem(sys.modules, "vllm", vllm)

        return be

    @pytest.mark.parametrize("text", ["0.24.0", "0.25.1", "0.32.0+cpu", "0.33.0rc1"])
    def test_known(self, version, text):
        version(text)
        assert plugin.unsupported() == ""

    @pytest.mark.parametrize("text", ["0.23.9", "0.26.0", "0.3.2", "1.32.0", "0.34.0"])
    def test_unknown_is_refused_where_it_is_switched_on_and_left_alone_elsewhere(self, version, monkeypatch, text):
        version(text)
        monkeypatch.setenv("FASTSTEER_VLLM", "1")
        with pytest.raises(RuntimeError, match=rf"steers vLLM 0\.24, .*; this is {text}, .*FASTSTEER_VLLM=0"):
            plugin.register()
        monkeypatch.setenv("FASTSTEER_VLLM", "0")
        plugin.register()  # such a vLLM has not even a worker to be wrapped


class TestOff:
    def test_the_entry_point_imports_nothing_heavy(self):
        code = "import sys, faststeer.vllm.plugin, faststeer.vllm.server, faststeer.vllm.modes; print(*sys.modules)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert {name for name in found if name.partition(".")[0] == "faststeer"} == {f"faststeer{n}" for n in LIGHT}
        assert not {"torch", "transformers", "scipy", "numpy", "safetensors"} & set(found)

    def test_is_on(self, monkeypatch):
        monkeypatch.delenv("FASTSTEER_VLLM", raising=False)

        def asked(**additional):
            return is_on(SimpleNamespace(additional_config=additional))

        assert not asked() and not asked(other=1) and not asked(faststeer=False) and not is_on(SimpleNamespace())
        assert asked(faststeer=True) and asked(faststeer={}) and asked(faststeer=3)  # the last is refused when read
        monkeypatch.setenv("FASTSTEER_VLLM", "1")
        assert asked() and not asked(faststeer=False)
        monkeypatch.setenv("FASTSTEER_VLLM", "yes please")
        assert asked()


class TestAdmission:
    """What becomes of a request's parameters."""

    add = fs.Add(randn(0, 8), layers=0)

    @pytest.fixture
    def front(self):
        return FrontEnd(ServerSettings(max_dose=None), 2, 8)

    def test_without_a_plan_they_are_as_they_were(self, front):
        for extra in (None, {}, {"other": 1}):
            given = SimpleNamespace(extra_args=extra)
            assert admit(front, given) is given and admit(None, given) is given
        pooling = SimpleNamespace()
        assert admit(front, pooling) is pooling

    def test_with_one_they_are_a_copy(self, front):
        given = SimpleNamespace(extra_args={**plan(self.add), "other": 1})
        admitted = admit(front, given)
        assert isinstance(given.extra_args[PAYLOAD_KEY], str) and admitted.extra_args["other"] == 1
        assert received(admitted.extra_args).ranges

    def test_off(self, front):
        with pytest.raises(ValueError, match="this server does not steer: start it with FASTSTEER_VLLM=1"):
            admit(None, SimpleNamespace(extra_args=plan(self.add)))
        for on in (None, front):
            assert admit(on, SimpleNamespace(extra_args=plan(None))).extra_args == {}

    def test_what_positions_are_unknown_of_is_refused(self, front):
        given = SimpleNamespace(extra_args=plan(self.add))
        with pytest.raises(ValueError, match="whose prompt grows while it runs"):
            admit(front, given, "a", resumable=True)
        front.register_plan("usual", fs.Plan([self.add]))
        usual = FrontEnd(ServerSettings(max_dose=None, default_plan="usual"), 2, 8)
        usual.registry = front.registry
        beam, plain = "cmpl-1-0-77-beam-3", SimpleNamespace(extra_args=None)
        with pytest.raises(ValueError, match="do without beam search, or start without default_plan"):
            admit(usual, plain, beam)
        assert admit(front, plain, beam, resumable=True) is plain and admit(usual, plain, "cmpl-1-0") is not plain
        assert admit(usual, SimpleNamespace(extra_args=plan(None)), beam).extra_args == {}
