"""What ran: the versions that results, stores and reports name."""

from __future__ import annotations

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of faststeer, PyTorch and transformers."""
    import torch
    import transformers

    return {"faststeer": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
