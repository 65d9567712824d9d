"""A sweep's store as one self-contained HTML page, and its figures as PNGs.

    Store -> findings -> choose -> page, figures

The page needs no server and asks nothing of the network: its content security policy forbids it.
"""

from faststeer.report.choice import Choice, choose
from faststeer.report.figures import figures
from faststeer.report.findings import Findings, Measure, Point, findings
from faststeer.report.page import page

__all__ = ["Choice", "Findings", "Measure", "Point", "choose", "figures", "findings", "page"]
