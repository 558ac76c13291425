"""One-file checkpoints in a model's original layout, loaded without a network: the file has the weights, the families
have the facts."""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vivace import checkpoint
from vivace.errors import InputError, first_line
from vivace.family import Family, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from transformers import CLIPTokenizer

INDEX = "model_index.json"
# How original layouts begin the names of a component's tensors; the denoiser's are what is left.
STARTS = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.t5xxl."),
}


def identify(path: Path, *, variant: str | None = None) -> tuple[Family, Variant]:
    """The family and published model of an original-layout checkpoint, told by its tensors' names and shapes.

    `variant` names the family's variant where files look alike (SDXL base and turbo). Raises InputError for a file
    that is none of the families which diffusers reads from one file.
    """
    from diffusers.loaders import single_file_utils as layouts

    from vivace.families import FAMILIES

    tensors: dict[str, Any] = dict(checkpoint.header(path))
    kind = layouts.infer_diffusers_model_type(tensors)
    hub_id = layouts.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    known = kind != "v1" or layouts.CHECKPOINT_KEY_NAMES["v1"] in tensors  # v1 is also its word for "no idea"
    families = [family for family in FAMILIES.values() if family.single_file] if known else []
    for family in families:
        for found in family.variants.values():
            if found.hub_id == hub_id:
                return family, _named(family, variant) if variant else found
    titles = ", ".join(family.title for family in FAMILIES.values() if family.single_file)
    raise InputError(f"{path} is no whole model in its original layout that can be recognised; such files: {titles}")


def _named(family: Family, variant: str) -> Variant:
    try:
        return family.variant(variant)
    except ValueError as error:
        raise InputError(f"--variant: {error}") from error


def load(
    path: Path,
    *,
    family: Family,
    variant: Variant,
    pipeline: type[Any],
    dtype: torch.dtype,
    **components: Any,
) -> DiffusionPipeline:
    """The checkpoint as a `pipeline`.

    What the file lacks comes from the diffusers folder it lies in, or from the hub's local cache of the same model;
    without either, configurations come from the family and CLIP's tokenizer from this package. Raises InputError for
    weights that are in none of these.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    names = checkpoint.header(path)
    held = {slot for slot, starts in STARTS.items() if any(name.startswith(starts) for name in names)}
    published = _published(path, variant)
    given = (
        _rest(published, held | set(family.denoisers), dtype) if published else _tokenizers(family, variant, pipeline)
    )
    given |= components
    for slot in ("vae", *family.text_encoders):
        if slot not in held | given.keys():
            raise InputError(f"{path} lacks weights of its {slot}; {_advice(variant)}")
    with nullcontext(published) if published else _facts(family, variant, pipeline) as folder:
        try:
            pipe = pipeline.from_single_file(
                str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **given
            )
        except SingleFileComponentError as error:
            raise InputError(f"{path} lacks weights ({first_line(error)}); {_advice(variant)}") from error
    for slot, module in pipe.components.items():
        if hasattr(module, "parameters") and any(parameter.is_meta for parameter in module.parameters()):
            raise InputError(f"{path} lacks weights of its {slot}; {_advice(variant)}")
    return pipe


def _advice(variant: Variant) -> str:
    return f"put it into a diffusers folder of {variant.hub_id}, whose other parts are then used"


def _published(path: Path, variant: Variant) -> Path | None:
    """The diffusers folder with the rest of the model: around the file, or in the hub's cache; nothing is fetched."""
    if (path.parent / INDEX).is_file():
        return path.parent
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(variant.hub_id, INDEX) if variant.hub_id else None
    return Path(found).parent if isinstance(found, str) else None


@contextmanager
def _facts(family: Family, variant: Variant, pipeline: type[Any]) -> Iterator[Path]:
    """A diffusers folder without weights, written from the family's facts; it goes when the block ends."""
    scheduler, noise = family.scheduler
    parts: dict[str, tuple[str, str, dict[str, Any]]] = {
        "scheduler": ("diffusers", scheduler, {**noise, **variant.scheduler}),
        "vae": ("diffusers", family.vae_class, {**family.vae, **variant.vae}),
        family.denoisers[0]: ("diffusers", family.denoiser_class, dict(variant.denoiser)),
    }
    for slot, (name, config) in {**family.text_encoders, **variant.text_encoders}.items():
        parts[slot] = ("transformers", name, dict(config))
    tokenizers = {slot.replace("text_encoder", "tokenizer"): name for slot, (_, name, _) in parts.items()}
    index: dict[str, Any] = {"_class_name": pipeline.__name__}
    for slot in inspect.signature(pipeline.__init__).parameters:
        if slot in parts:
            index[slot] = parts[slot][:2]
        elif slot in tokenizers:
            index[slot] = ("transformers", "CLIPTokenizer")
    with TemporaryDirectory(prefix="vivace-") as room:
        folder = Path(room)
        (folder / INDEX).write_text(json.dumps(index), "utf-8")
        for slot, (library, name, config) in parts.items():
            (folder / slot).mkdir()
            _write_config(folder / slot, library, name, config)
        yield folder


def _write_config(folder: Path, library: str, name: str, config: dict[str, Any]) -> None:
    if library == "transformers":
        import transformers

        getattr(transformers, name).config_class(**config).save_pretrained(folder)
    else:
        stem = "scheduler_config" if folder.name == "scheduler" else "config"
        (folder / f"{stem}.json").write_text(json.dumps({"_class_name": name, **config}), "utf-8")


def _tokenizers(family: Family, variant: Variant, pipeline: type[Any]) -> dict[str, CLIPTokenizer]:
    """The tokenizers of a family whose text encoders are all CLIP's. Raises InputError for others."""
    found = {}
    for slot, (name, config) in {**family.text_encoders, **variant.text_encoders}.items():
        if slot not in inspect.signature(pipeline.__init__).parameters:
            continue
        if not name.startswith("CLIP"):
            raise InputError(f"a single file has no tokenizer for its {name}; {_advice(variant)}")
        # OpenCLIP's encoders were trained on prompts padded with id 0, OpenAI's (quick_gelu) with their end token.
        pad = "<|endoftext|>" if config.get("hidden_act") == "quick_gelu" else "!"
        found[slot.replace("text_encoder", "tokenizer")] = clip_tokenizer(pad=pad)
    return found


def clip_tokenizer(*, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's published tokenizer, from the merges that ship with this package."""
    from transformers import CLIPTokenizer

    packed = resources.files("vivace.families").joinpath("clip_merges.txt.gz").read_bytes()
    merges: Any = [tuple(line.split()) for line in gzip.decompress(packed).decode().splitlines()]
    # Byte-level BPE: printable Latin-1 bytes stand for themselves, the rest for the letters from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + number) for number in range(256 - len(printable))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def _rest(folder: Path, held: set[str], dtype: torch.dtype) -> dict[str, Any]:
    """The models of a diffusers folder, less those that the file holds."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    found = {}
    for slot, value in json.loads((folder / INDEX).read_text("utf-8")).items():
        if slot in held or not isinstance(value, list) or not any((folder / slot).glob("*.safetensors")):
            continue
        library, name = value
        part = getattr(libraries.get(library), name, None)
        if part is not None:
            found[slot] = part.from_pretrained(folder / slot, dtype=dtype, use_safetensors=True, local_files_only=True)
    return found
