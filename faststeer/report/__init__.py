"""A sweep's store, or a study's JSON, as one self-contained HTML page, and its figures as PNGs.

    Store -> findings -> choose -> page, figures
    JSON of a study -> study_page, study_figures

A page needs no server and asks nothing of the network: its content security policy forbids it.
"""

from faststeer.report.choice import SettingChoice, choose
from faststeer.report.figures import figures
from faststeer.report.findings import Findings, Measure, Point, findings
from faststeer.report.page import page
from faststeer.report.projections import Projected, projected
from faststeer.report.search import search_page
from faststeer.report.study import study_figures, study_page

__all__ = [
    "Findings",
    "Measure",
    "Point",
    "Projected",
    "SettingChoice",
    "choose",
    "figures",
    "findings",
    "page",
    "projected",
    "search_page",
    "study_figures",
    "study_page",
]
