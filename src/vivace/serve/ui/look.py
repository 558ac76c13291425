"""How the page looks: a theme of system fonts and our own colours, and the scripts and styles in `assets`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

ASSETS = Path(__file__).parent / "assets"
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# Both of gradio's variants of a colour are one variable of page.css, which knows light and dark.
COLOURS = {
    "body_background_fill": "--paper",
    "body_text_color": "--ink",
    "body_text_color_subdued": "--faded",
    "background_fill_primary": "--card",
    "background_fill_secondary": "--paper",
    "block_background_fill": "--card",
    "block_border_color": "--line",
    "block_label_text_color": "--faded",
    "block_label_background_fill": "--card",
    "block_title_text_color": "--faded",
    "block_info_text_color": "--faded",
    "border_color_primary": "--line",
    "border_color_accent": "--accent",
    "color_accent": "--accent",
    "input_background_fill": "--field",
    "input_background_fill_focus": "--field",
    "input_border_color": "--line",
    "input_border_color_focus": "--accent",
    "input_placeholder_color": "--faint",
    "slider_color": "--accent",
    "button_primary_background_fill": "--ink",
    "button_primary_background_fill_hover": "--ink-strong",
    "button_primary_text_color": "--paper",
    "button_primary_border_color": "--ink",
    "button_primary_border_color_hover": "--ink",
    "button_secondary_background_fill": "--card",
    "button_secondary_background_fill_hover": "--field",
    "button_secondary_text_color": "--ink",
    "button_secondary_border_color": "--line",
    "button_secondary_border_color_hover": "--faint",
    "panel_background_fill": "--paper",
    "panel_border_color": "--line",
    "error_background_fill": "--card",
    "error_border_color": "--accent",
    "error_text_color": "--ink",
}
SIZES = {
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_padding": "0px",
    "block_radius": "0px",
    "block_label_radius": "0px",
    "container_radius": "0px",
    "input_radius": "8px",
    "input_border_width": "1px",
    "input_padding": "9px 11px",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "button_large_radius": "8px",
    "button_small_radius": "8px",
    "button_medium_radius": "8px",
    "layout_gap": "14px",
    "form_gap_width": "0px",
}


def theme() -> gr.themes.Base:
    """The theme. Plain font names: gradio would fetch any other kind."""
    base = gr.themes.Base(font=SANS, font_mono=MONO, text_size="md", spacing_size="md", radius_size="md")
    accepted = {name for name in vars(base) if not name.startswith("_")}
    colours = {name: f"var({value})" for name, value in COLOURS.items()}
    dark = {f"{name}_dark": value for name, value in colours.items() if f"{name}_dark" in accepted}
    return base.set(**colours, **dark, **SIZES)


@cache
def asset(*names: str) -> str:
    """These files of `assets`, one after the other."""
    return "\n".join((ASSETS / name).read_text("utf-8") for name in names)


def part(name: str, *, value: Any = None) -> gr.HTML:
    """A part of the page that `assets/<name>.js` draws, from its value and with the events it names."""
    return gr.HTML(
        value=value,
        html_template="<div></div>",
        js_on_load=asset("dom.js", f"{name}.js"),
        apply_default_css=False,
        elem_id=name,
        container=False,
    )
