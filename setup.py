"""Builds faststeer. Everything is said in pyproject.toml; this file is where compiled back ends join in.

`FASTSTEER_BUILD` says what to build: `auto` (what this machine can), `none` (a pure wheel), `cuda` or `cpu` (that one,
or fail). There are no compiled sources yet, so `auto` is `none` and asking for one fails loudly instead of installing
something else.
"""

import os

from setuptools import setup

wanted = os.environ.get("FASTSTEER_BUILD", "auto")
if wanted not in ("auto", "none", "cuda", "cpu"):
    raise SystemExit(f"FASTSTEER_BUILD={wanted!r}: expected auto, none, cuda or cpu")
if wanted in ("cuda", "cpu"):
    raise SystemExit(f"FASTSTEER_BUILD={wanted}: this version of faststeer has no compiled back end; use auto or none")

setup()
