"""The playground: one prompt answered unsteered and steered beside each other, with vectors on sliders.

`answers` and `heat` know no page and need no extra; `page` and `server` need gradio (`pip install 'faststeer[ui]'`).
"""

from faststeer.ui.answers import Control, Playground, PlaygroundAnswers
from faststeer.ui.demo import demo_playground

__all__ = ["Control", "Playground", "PlaygroundAnswers", "demo_playground"]
