"""What all tests share: one thread, here and in the processes that tests start, so that a run is the same anywhere,
quiet libraries, and how many examples hypothesis draws."""

import os
import sys
from pathlib import Path

import hypothesis
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # oracle.py, models.py and the like

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
transformers.logging.set_verbosity_error()

# Tests with a share of the examples ask for it by settings(parent=..., max_examples=examples(share)).
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.register_profile("full", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("FASTSTEER_TEST_PROFILE", "default"))
