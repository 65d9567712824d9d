"""What a server can be told, and what it refuses to be told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from faststeer.vllm.settings import ServerSettings


def config(**additional):
    return SimpleNamespace(additional_config=additional)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTSTEER_VLLM", raising=False)


class TestSwitch:
    @pytest.mark.parametrize("text", ["", "0", "off", "false", " 0 "])
    def test_off(self, monkeypatch, text):
        monkeypatch.setenv("FASTSTEER_VLLM", text)
        assert ServerSettings.of(config()) is None and ServerSettings.of(SimpleNamespace()) is None

    def test_off_when_nothing_is_said(self):
        assert ServerSettings.of(config()) is None and ServerSettings.of(config(other=1)) is None

    @pytest.mark.parametrize("text", ["1", "on", "True", "{}"])
    def test_on_by_the_environment(self, monkeypatch, text):
        monkeypatch.setenv("FASTSTEER_VLLM", text)
        assert ServerSettings.of(config()) == ServerSettings()

    def test_on_by_the_configuration(self):
        assert ServerSettings.of(config(faststeer=True)) == ServerSettings()
        assert ServerSettings.of(config(faststeer={"max_plans": 3})) == ServerSettings(max_plans=3)

    def test_the_configuration_comes_first(self, monkeypatch):
        monkeypatch.setenv("FASTSTEER_VLLM", '{"max_plans": 7}')
        assert ServerSettings.of(config()).max_plans == 7
        assert ServerSettings.of(config(faststeer=False)) is None


class TestValues:
    def test_are_kept_plain(self, tmp_path):
        found = ServerSettings.read({"folder": str(tmp_path), "hook_points": ["resid_post", "attn_out"]})
        assert found.folder == tmp_path.resolve() and found.hook_points == ("attn_out", "resid_post")
        assert len(ServerSettings(hook_points="all").hook_points) == 5

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"max_plan": 3}, "has no setting 'max_plan': it has folder, default_plan"),
            ({"max_plans": 0}, "max_plans is 0: expected a whole number from 1"),
            ({"when_full": "drop"}, "when_full is 'drop': expected wait or refuse"),
            ({"when_full": "refuse"}, "no max_plans says what is full"),
            ({"max_plan_bytes": None}, "max_plan_bytes is None"),
            ({"max_interventions": True}, "max_interventions is True"),
            ({"probe_columns": -1}, "probe_columns is -1: expected a whole number from 0"),
            ({"latched_gates": 1.5}, "latched_gates is 1.5"),
            ({"http_registration": 1}, "http_registration is 1: true or false"),
            ({"default_plan": 1}, "default_plan is 1"),
            ({"folder": "/no/such/folder"}, "there is no such folder"),
            ({"folder": 3}, "folder is 3"),
            ({"hook_points": []}, "expected a list of hook points, or 'all'"),
            ({"hook_points": ["resid"]}, "unknown hook point 'resid'"),
            ({"hook_points": [[]]}, r"unknown hook point \[\]"),
            (3, "settings are 3: expected true, false, or an object"),
            (None, "settings are None"),
        ],
        ids=str,
    )
    def test_refused(self, given, says):
        with pytest.raises(ValueError, match=says):
            ServerSettings.read(given)

    def test_an_environment_that_is_no_json(self, monkeypatch):
        monkeypatch.setenv("FASTSTEER_VLLM", "yes please")
        with pytest.raises(ValueError, match="FASTSTEER_VLLM is 'yes please': expected 1, 0, or a JSON object"):
            ServerSettings.of(config())
