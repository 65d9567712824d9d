"""`faststeer search`: the setting that brings about a behaviour at the least price, and its replay."""

from faststeer.behaviours.search.record import COSTS, load, plan_text, rows, setting_text
from faststeer.behaviours.search.run import replay, search
from faststeer.behaviours.search.settings import SearchSettings

__all__ = ["COSTS", "SearchSettings", "load", "plan_text", "replay", "rows", "search", "setting_text"]
