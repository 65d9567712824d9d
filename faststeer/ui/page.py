"""The playground's page: controls, the two answers, the heat map. What they mean is in `answers`; nothing is computed
here. Needs gradio."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

# Before gradio is imported: nothing is reported, no runs are recorded, no newer version is looked for.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from faststeer.extras import needed_for

with needed_for("the playground", "ui"):
    import gradio as gr

from faststeer.ui.answers import OPS, Control, Playground, PlaygroundAnswers
from faststeer.ui.heat import escaped, heat_map

FIGURE_EVERY = 2.0  # seconds between heat maps while answers stream: one takes the browser longer than many tokens
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#unsteered textarea, #steered textarea { font-size: 1.02rem; line-height: 1.5; }
#steered textarea { border-left: 3px solid var(--primary-500); }
#prompt .submit-button {
  background: var(--button-primary-background-fill); color: var(--button-primary-text-color);
  border-radius: var(--button-small-radius); padding: 4px 14px;
}
#status { color: var(--body-text-color-subdued); min-height: 1.5em; }
"""


def theme() -> Any:
    """Fonts that every system has: gradio's own themes ask the network for theirs."""
    return gr.themes.Soft(
        primary_hue="blue",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def page(playground: Playground, *, max_new_tokens: int = 64, system: str | None = None) -> Any:
    """The page as `gradio.Blocks`, see `server.serve`. PlaygroundAnswers come anew whenever a control is changed."""
    asks = _Asks(playground)
    names = list(playground.vectors)
    with gr.Blocks(title="faststeer playground", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            f"## faststeer playground\n{playground.name}: {playground.n_layers} layers, "
            f"hidden size {playground.hidden_size}"
        )
        session, kept = gr.State(""), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = [component for number in range(len(names)) for component in _vector(playground, number)]
                reset = gr.Button("All strengths to 0", size="sm", elem_id="reset")
                with gr.Accordion("Generation", open=False):
                    system_box = gr.Textbox(system or "", label="System prompt", lines=1, elem_id="system")
                    length = gr.Slider(1, 512, max_new_tokens, step=1, label="Longest answer, tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the likeliest token)")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    next(iter(playground.examples), ""),
                    label="Prompt",
                    lines=1,  # Enter asks; with more it would begin a line
                    placeholder="Write a prompt",
                    elem_id="prompt",
                    submit_btn="Answer",
                )
                if playground.examples:
                    gr.Examples(playground.examples, prompt, label="Examples")
                with gr.Row():
                    unsteered, steered = (
                        gr.Textbox(
                            label=label,
                            lines=6,
                            max_lines=20,
                            interactive=False,
                            elem_id=label.lower(),
                            min_width=240,  # on a phone, the answers stand one below the other
                        )
                        for label in ("Unsteered", "Steered")
                    )
                status = gr.Markdown("", elem_id="status")
        watch = gr.Dropdown(
            [(name, number) for number, name in enumerate(names)],
            value=0,
            label="Heat map",
            info="What the residual stream has along this vector, after every layer (steering included) and at every "
            "token",
            elem_id="watch",
        )
        plot = gr.Plot(show_label=False, elem_id="heat")
        inputs = [session, watch, prompt, system_box, length, temperature, seed, *controls]
        outputs = [unsteered, steered, status, plot, kept]
        changed = [control.change for control in controls]
        changed += [control.change for control in (system_box, length, temperature, seed)]
        # An example's click changes the prompt, but so does every key.
        triggers = [prompt.submit, *changed]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # Asks run beside each other, and one stops as soon as its page has sent another: see `_Asks`.
        asking: dict[str, Any] = hidden | {"trigger_mode": "multiple", "concurrency_limit": None}
        blocks.load(asks.new_session, None, session, **hidden).then(asks.answer, inputs, outputs, **asking)
        gr.on(triggers, asks.answer, inputs, outputs, **asking)
        watch.change(asks.look, [kept, watch], plot, **hidden)
        sliders = controls[::3]
        reset.click(lambda: [0.0] * len(sliders), None, sliders, **hidden)
    return blocks


def _vector(playground: Playground, number: int) -> tuple[Any, Any, Any]:
    """One vector's controls: strength, layers, what is done with it."""
    name, vector = list(playground.vectors.items())[number]
    start, reach = playground.start[name], playground.reach(name)
    reach = max(reach, abs(start.strength))
    with gr.Group():
        slider = gr.Slider(
            -reach, reach, start.strength, step=reach / 40, label=name, elem_id=f"strength-{number}", buttons=[]
        )
        with gr.Row():
            layers = gr.Dropdown(
                list(vector.layers), value=list(start.layers), multiselect=True, label="Layers", scale=3, min_width=120
            )
            op = gr.Dropdown(list(OPS), value=start.op, label="How", scale=1, min_width=110)
    return slider, layers, op


class _Asks:
    """What the page asks for. Of one page's asks only the newest goes on: a slider that is dragged sends many."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        self._sessions, self._numbers = itertools.count(), itertools.count(1)
        self._newest: dict[str, int] = {}

    def new_session(self) -> str:
        return f"page {next(self._sessions)}"

    def answer(
        self,
        session: str,
        watch: int,
        prompt: str,
        system: str,
        length: int,
        temperature: float,
        seed: int,
        *controls: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the page's outputs as the answers grow."""
        self._newest[session] = number = next(self._numbers)
        if not prompt.strip():  # as when the page is opened
            yield "", "", "Write a prompt and press Enter.", gr.skip(), gr.skip()
            return
        try:
            chosen = _read(self._playground, controls)
            drawn_at = time.perf_counter()
            for answers in self._playground.stream(
                prompt,
                chosen,
                system=system,
                max_new_tokens=int(length),
                temperature=float(temperature or 0),
                seed=int(seed or 0),
            ):
                if self._newest[session] != number:
                    return
                now = time.perf_counter()
                figure, kept = gr.skip(), gr.skip()
                if answers.done or now - drawn_at > FIGURE_EVERY:
                    drawn_at = now
                    # The title's layers are those of this ask, also when another vector is looked at later.
                    titles = _titles(self._playground, chosen)
                    figure, kept = heat_map(answers, watch, titles[watch]), (answers, titles)
                yield answers.unsteered, answers.steered, _status(answers), figure, kept
        except ValueError as error:
            yield "", "", f"**{error}**", gr.skip(), gr.skip()

    def look(self, kept: tuple[PlaygroundAnswers, list[str]] | None, watch: int) -> Any:
        """The same answers along another vector."""
        return gr.skip() if kept is None else heat_map(kept[0], watch, kept[1][watch])


def _read(playground: Playground, values: tuple[Any, ...]) -> dict[str, Control]:
    groups = zip(playground.vectors, values[::3], values[1::3], values[2::3], strict=True)
    return {
        name: Control(float(strength or 0), tuple(map(int, layers or ())), op) for name, strength, layers, op in groups
    }


def _titles(playground: Playground, controls: dict[str, Control]) -> list[str]:
    watched = playground.watched(controls)
    return [f"projection on {escaped(name)}<br>(its direction at layer {layer})" for name, layer in watched.items()]


def _status(answers: PlaygroundAnswers) -> str:
    unsteered, steered = answers.drawn
    drawn = f"{unsteered} tokens unsteered, {steered} steered"
    if not answers.done:
        return f"{drawn} ..."
    return f"{drawn}." + (" The answers are the same." if answers.unsteered == answers.steered else "")
