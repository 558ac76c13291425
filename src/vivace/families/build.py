"""Any component of a family at true size with random weights, made straight on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError

if TYPE_CHECKING:
    import torch

    from vivace.family import Family, Variant


def full_component(
    family: Family,
    variant: Variant,
    component: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> torch.nn.Module:
    """`component` ("denoiser", "vae", or a slot of `family.text_encoders`) with the published shape.

    Weights are drawn on `device` so that activations keep their scale; position tables and other buffers are what the
    constructor computes. On the "meta" device nothing is allocated: enough to count. `dtype` None means bfloat16.
    Raises InputError for a component the family has not.
    """
    import torch

    device = torch.device(device)
    model = _skeleton(*_blueprint(family, variant, component), counted=device.type == "meta")
    _materialise(model, device=device, dtype=dtype or torch.bfloat16)
    return model.eval()


def _blueprint(family: Family, variant: Variant, component: str) -> tuple[type, Mapping[str, Any]]:
    """The class of a component and the configuration to build it from."""
    import diffusers
    import transformers

    if component == "denoiser" or component in family.denoisers:
        return getattr(diffusers, family.denoiser_class), variant.denoiser
    if component == "vae":
        return getattr(diffusers, family.vae_class), {**family.vae, **variant.vae}
    encoders = {**family.text_encoders, **variant.text_encoders}
    if component not in encoders:
        raise InputError(f"{family.name} has no component {component!r}; it has denoiser, vae, {', '.join(encoders)}")
    name, config = encoders[component]
    return getattr(transformers, name), config


def _skeleton(model_class: type, config: Mapping[str, Any], *, counted: bool) -> torch.nn.Module:
    """The model with parameters on "meta" and everything else, such as rotary tables, computed as usual.

    Where the model is only `counted`, tables are not computed either: some take seconds.
    """
    import torch
    from accelerate import init_empty_weights

    with torch.device("meta") if counted else init_empty_weights(include_buffers=False):
        config_class = getattr(model_class, "config_class", None)
        model = model_class(config_class(**config)) if config_class else model_class(**config)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def _materialise(model: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter of `model` storage on `device`, and a random value; moves the buffers there."""
    import torch

    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    in_fp32 = _in_fp32(model, dtype=dtype)
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied weights stay tied
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                kept = not in_fp32.isdisjoint((*path.split("."), name))
                data = torch.empty_like(parameter, device=device, dtype=torch.float32 if kept else dtype)
                if generator is not None:
                    _draw(data, name=name, norm="norm" in type(module).__name__.lower(), generator=generator)
                made[parameter] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _in_fp32(model: torch.nn.Module, *, dtype: torch.dtype) -> set[str]:
    """Names of what its library leaves in 32 bit; that of text encoders narrows most of it to bfloat16 all the same."""
    import torch
    import transformers

    narrowed = isinstance(model, transformers.PreTrainedModel) and dtype == torch.bfloat16
    kept = getattr(model, "_keep_in_fp32_modules_strict" if narrowed else "_keep_in_fp32_modules", None)
    return set(kept or ())


def _draw(data: torch.Tensor, *, name: str, norm: bool, generator: torch.Generator) -> None:
    """Fills a parameter: norms pass through, matrices keep the variance of what they multiply, the rest is small."""
    if norm and data.numel() == max(data.shape, default=1):
        data.fill_(0.0 if name == "bias" else 1.0)
    else:
        fan_in = data[0].numel() if data.ndim > 1 else 2500
        data.normal_(0.0, fan_in**-0.5, generator=generator)
