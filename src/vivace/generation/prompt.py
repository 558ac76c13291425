"""Prompts: read from a file, and checked for what the text encoders have no room for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_SHOWN = 160  # characters of what was cut


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are skipped. Raises InputError where there is none."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f": {error.strerror}" if isinstance(error, OSError) else ""
        raise InputError(f"{path} cannot be read as text{reason}; give a UTF-8 file with one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"{path} holds no prompt; write one a line")
    return prompts


def cuts(pipe: DiffusionPipeline, prompt: str, *, longest: int | None = None) -> dict[str, tuple[int, str]]:
    """Tokenizer slot -> (tokens it has room for, the end of `prompt` that it drops); empty where all of it fits.

    `longest` is the pipeline's max_sequence_length, for encoders whose tokenizer allows more than the pipeline reads.
    """
    found = {}
    for slot, tokenizer in pipe.components.items():
        if not slot.startswith("tokenizer") or tokenizer is None:
            continue
        room = min(tokenizer.model_max_length, longest or tokenizer.model_max_length)
        ids: list[int] = tokenizer(prompt, truncation=False, verbose=False).input_ids
        # Encoders that end a prompt with a token keep it when they cut.
        ending = len(ids) - len(tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False).input_ids)
        ending = min(ending, 1)
        if len(ids) > room:
            rest: Any = tokenizer.decode(ids[room - ending : len(ids) - ending], skip_special_tokens=True)
            found[slot] = (room, rest.strip())
    return found


def cut_lines(found: Mapping[str, tuple[int, str]]) -> list[str]:
    """What `cuts` found, one line for each place of cutting."""
    slots: dict[tuple[int, str], list[str]] = {}
    for slot, where in found.items():
        slots.setdefault(where, []).append(slot)
    lines = []
    for (room, rest), names in slots.items():
        shown = rest if len(rest) <= MOST_SHOWN else f"{rest[: MOST_SHOWN // 2]} ... {rest[-MOST_SHOWN // 2 :]}"
        lines.append(f"the prompt is longer than the {room} tokens of {' and '.join(names)}; cut off: {shown!r}")
    return lines
