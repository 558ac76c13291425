"""The page: what is on it, and what happens when something is pressed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from vivace.cache import POLICIES
from vivace.config import PRESETS
from vivace.serve.http.server import Server
from vivace.serve.model import Model
from vivace.serve.ui.compare import Way, compare
from vivace.serve.ui.draw import State, Studio
from vivace.serve.ui.form import NO_CACHE, Form, defaults, restored, sizes, takes
from vivace.serve.ui.look import asset, part

Fields = dict[str, Any]  # name of a Form's field, or "editing" -> gradio component

NAMES = tuple(Form.__dataclass_fields__)
FITTED = (*NAMES, "editing")
MOST_RUNNING = 64  # events of all visitors at a time, besides those that wait in the engine's queue
OWN: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "undocumented"}

# Before an event goes out the picture to edit is sent, and the parts with fields of their own say what these hold:
# input.js and lora.js.
PROMPT, EDIT, LORA = (NAMES.index(name) for name in ("prompt", "edit", "lora"))
SEND = (
    f"async (...values) => {{ values[{EDIT}] = await window.vivace.send(values[{PROMPT}]); "
    f"values[{LORA}] = window.vivace.loras ? window.vivace.loras() : values[{LORA}]?.chosen || []; return values; }}"
)
# gradio tells of a choice twice, and a late second answer would undo what was typed since the first: it asks nothing.
ONCE = "(alias) => alias === window.vivace.model ? null : (window.vivace.model = alias)"
# After a broken connection gradio loads the page anew: what was asked for has not to be typed again.
ASKED = "(typed) => { try { return typed || sessionStorage.getItem('vivace.asked') || ''; } catch { return typed; } }"
READY = "() => document.body.setAttribute('data-ready', '')"
DIE = "() => String(Math.floor(Math.random() * 2 ** 32))"


def page(studio: Studio) -> gr.Blocks:
    """The page of a server's picture models."""
    server = studio.server
    models = [alias for alias, model in server.engine.models.items() if model.media == "image"]
    with gr.Blocks(title="Vivace", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(asset("header.html"), elem_id="header", apply_default_css=False, js_on_load=asset("header.js"))
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, elem_id="prompt", placeholder="What to draw")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Column(elem_id="view"), gr.Tabs(elem_id="tabs"):
                with gr.Tab("Picture", id="picture"):
                    stage = part("stage")
                with gr.Tab("Compare", id="compare"):
                    ways, both = _comparing()
                    against = part("compare")
            with gr.Column(elem_id="settings"):
                fields = {"prompt": prompt, **_settings(server, models)}
            with gr.Column(elem_id="made"):
                gallery = part("gallery")
        happen = _Happenings(studio)
        order = [fields[name] for name in NAMES]
        idle: dict[str, Any] = {"fn": None, "js": "() => window.vivace.idle()"}
        drawn = gr.on([draw.click, prompt.submit], happen.draw, order, stage, js=SEND, **OWN)
        compared = both.click(happen.compare, [*order, *ways], against, js=SEND, **OWN)
        for event in (drawn, compared):  # `then` would not come after one that fails
            event.success(**idle)
            event.failure(**idle)
        cancel.click(happen.cancel, **OWN)
        fitted = [fields[name] for name in FITTED]
        # Not `change`: that comes of `again` too, and would undo it.
        fields["model"].input(happen.model, fields["model"], fitted, js=ONCE, **OWN)
        gallery.again(happen.again, None, fitted, **OWN)
        blocks.load(None, prompt, prompt, js=ASKED).then(None, js=READY)
        blocks.unload(happen.cancel)
    most = server.engine.most_queued + MOST_RUNNING
    return blocks.queue(max_size=most, default_concurrency_limit=None, api_open=False)


class _Happenings:
    """What the page's events do. gradio reads the types of `request` and `event` to know what to hand in."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    async def draw(self, request: gr.Request, *values: Any) -> AsyncIterator[State]:
        form = Form(**dict(zip(NAMES, values, strict=True)))
        async for state in self.studio.draw(form, visitor=request.session_hash):
            yield state

    async def compare(self, request: gr.Request, *values: Any) -> AsyncIterator[State]:
        form = Form(**dict(zip(NAMES, values[:-4], strict=True)))
        preset, cache, other_preset, other_cache = values[-4:]
        ways = (Way(preset=preset, cache=cache), Way(preset=other_preset, cache=other_cache))
        async for state in compare(self.studio, form, ways=ways, visitor=request.session_hash):
            yield state

    def cancel(self, request: gr.Request) -> None:
        self.studio.cancel(request.session_hash)

    def model(self, alias: Any) -> list[Any]:
        return _updates({} if alias is None else _fitted(self.studio.server.engine.model(alias)))

    def again(self, event: gr.EventData) -> list[Any]:
        known = restored(event._data, self.studio.server)
        model = self.studio.server.engine.model(known.get("model"))
        if "lora" in known:
            known["lora"] = _loras(model, known["lora"])
        fitted = _fitted(model) if "model" in known else {}
        return _updates(fitted | {name: {**fitted.get(name, {}), "value": value} for name, value in known.items()})


def _comparing() -> tuple[list[Any], gr.Button]:
    names, caches = list(PRESETS), [NO_CACHE, *POLICIES]
    with gr.Row(elem_id="ways"):
        ways: list[Any] = []
        for side, preset in (("Left", names[0]), ("Right", names[-1])):
            with gr.Column(min_width=200):
                ways.append(gr.Dropdown(names, value=preset, label=f"{side}: preset", elem_id=f"{side.lower()}-preset"))
                ways.append(
                    gr.Dropdown(caches, value=NO_CACHE, label=f"{side}: step cache", elem_id=f"{side.lower()}-cache")
                )
        both = gr.Button("Draw both", variant="primary", elem_id="both")
    return ways, both


def _settings(server: Server, models: list[str]) -> Fields:
    model = server.engine.models[models[0]]
    own = _fitted(model)
    found: Fields = {}
    with gr.Row(elem_classes="pair"):
        found["model"] = gr.Dropdown(models, value=models[0], label="Model", elem_id="model", min_width=120)
        found["preset"] = gr.Dropdown(list(PRESETS), label="Preset", elem_id="preset", min_width=120, **own["preset"])
    with gr.Row(elem_classes="pair"):
        found["size"] = gr.Dropdown(label="Size", allow_custom_value=True, elem_id="size", min_width=120, **own["size"])
        with gr.Row(elem_id="seeds"):
            found["seed"] = gr.Textbox(label="Seed", placeholder="any", elem_id="seed", max_lines=1, min_width=60)
            die = gr.Button("⚄", elem_id="die", min_width=44)
            die.click(None, None, found["seed"], js=DIE)
    most = server.settings.most_steps
    found["steps"] = gr.Slider(1, most, step=1, label="Steps", elem_id="steps", **own["steps"])
    found["guidance"] = gr.Slider(0, 20, step=0.1, label="Guidance", elem_id="guidance", **own["guidance"])
    found["negative"] = gr.Textbox(
        label="Negative prompt", max_lines=4, placeholder="What to keep out", elem_id="negative", **own["negative"]
    )
    editing = gr.Accordion("Edit a picture", open=False, elem_id="editing", **own["editing"])
    with editing:
        found["edit"] = part("input")
        found["strength"] = gr.Slider(
            0.05, 1, value=0.7, step=0.05, label="Strength", elem_id="strength", **own["strength"]
        )
    with gr.Accordion("Step cache and LoRA", open=False, elem_id="more"):
        found["cache"] = gr.Dropdown([NO_CACHE, *POLICIES], value=NO_CACHE, label="Step cache", elem_id="cache")
        found["lora"] = part("lora", **own["lora"])
    return {**found, "editing": editing}


def _fitted(model: Model) -> dict[str, dict[str, Any]]:
    """What fields have of the model that is chosen: name -> gradio's properties."""
    own = defaults(model)
    return {
        "size": {"choices": sizes(model), "value": own["size"]},
        "steps": {"value": own["steps"]},
        "guidance": {"value": own["guidance"], "visible": takes(model, "guidance")},
        "preset": {"value": own["preset"]},
        "lora": {"value": _loras(model)},
        "negative": {"visible": takes(model, "negative")},
        "editing": {"visible": takes(model, "image")},
        "strength": {"visible": takes(model, "strength")},
    }


def _updates(properties: dict[str, dict[str, Any]]) -> list[Any]:
    """New properties of fields, in their order; a field without any stays as it is."""
    return [gr.update(**properties.get(name, {})) for name in FITTED]


def _loras(model: Model, chosen: Sequence[Any] = ()) -> dict[str, Any]:
    """The value of the LoRAs' part. With the time, since the browser takes no notice of a value that it has already."""
    return {"names": list(model.spec.loras), "chosen": list(chosen), "at": time.monotonic_ns()}
