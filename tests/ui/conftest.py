from __future__ import annotations

import pytest
import torch

from faststeer import demo


@pytest.fixture(scope="session")
def playground():
    """The demo model's, on one thread."""
    from faststeer.ui import demo_playground

    torch.set_num_threads(1)
    return demo_playground(*demo.load())
