"""The operator: what steering does to the rows of one tensor. Knows tables and rows; knows no model, no plan and no
hook."""

from faststeer.ops.reference import latch, steer
from faststeer.ops.tables import Rows, Tables

__all__ = ["Rows", "Tables", "latch", "steer"]
