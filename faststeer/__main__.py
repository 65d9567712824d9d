"""`python -m faststeer` is the command line."""

from faststeer.cli import app

app(prog_name="faststeer")
