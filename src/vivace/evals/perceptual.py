"""Instruments that need trained networks, through torchmetrics: LPIPS, CLIP score, and Inception's FID and KID.

Their weights come from a local path or from the hub. What is missing is said; nothing is put in its place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from vivace.errors import InputError, first_line

CLIP = "openai/clip-vit-base-patch16"

BROKEN = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError)
"""What is raised for a file of weights that is missing, or none, or another network's."""


def lpips(
    *, network: str = "alex", weights: Path | None = None, device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS (arXiv 1801.03924): pictures and reference [B, 3, H, W] in [0, 1] -> [B], 0 for equal ones.

    `weights` is torchvision's state dict of the backbone (alexnet, squeezenet1_1 or vgg16), as .safetensors or .pth;
    None has torchvision fetch it. Raises InputError for what is missing.
    """
    _needs("torchmetrics", "LPIPS")
    _needs("torchvision", "LPIPS")
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        net = _LPIPS(pretrained=True, net=network, pnet_rand=weights is not None)  # pyright: ignore[reportArgumentType]
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"LPIPS has no weights of {network}: {first_line(error)}; give a file of them with --lpips-weights"
        ) from error
    if weights is not None:
        _load_backbone(net.net, weights)
    net = net.to(device).eval().requires_grad_(False)

    def measure(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        # From -1 to 1, as it was trained.
        return net(pictures.to(device) * 2 - 1, reference.to(device) * 2 - 1).flatten().cpu()

    return measure


def clip_score(
    model: str | Path = CLIP, *, device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """CLIP score (arXiv 2104.08718): pictures [B, 3, H, W] in [0, 1] and their captions -> [B], 100 times the cosine.

    `model` is a folder with a CLIP model and its processor, or a hub id. Raises InputError for what is missing.
    """
    _needs("torchmetrics", "the CLIP score")
    from torchmetrics.functional.multimodal import clip_score as score
    from transformers import CLIPModel, CLIPProcessor

    try:
        local = Path(model).is_dir()
        loaded: Any = CLIPModel.from_pretrained(model, local_files_only=local, output_loading_info=True)
        network, told = loaded
        processor = CLIPProcessor.from_pretrained(model, local_files_only=local)
    except BROKEN as error:
        raise InputError(
            f"the CLIP score has no model {str(model)!r}: {first_line(error)}; give a folder with --clip"
        ) from error
    # They were drawn at random, and so would be the score.
    if missing := sorted(told["missing_keys"]):
        raise InputError(
            f"the CLIP model {str(model)!r} has no {missing[0]} and lacks {len(missing)} weights in all; give a whole "
            "one with --clip"
        )
    network = network.to(device).eval()
    bare: Any = _Features(network)

    def measure(pictures: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
        pairs = zip(pixels, captions, strict=True)
        with torch.no_grad():
            found = [score(picture.to(device), text, lambda: (bare, processor)) for picture, text in pairs]
        return torch.stack([value.detach().cpu() for value in found])

    return measure


def inception(weights: Path | None = None, *, device: torch.device | str = "cpu") -> Callable[..., torch.Tensor]:
    """Inception's 2048 features, as FID and KID are quoted in the literature: for `evals.features.extract`.

    `weights` is torch-fidelity's checkpoint; None has it fetched. Raises InputError for what is missing.
    """
    _needs("torchmetrics", "FID")
    _needs("torch_fidelity", "FID in Inception's features")
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        path = str(weights) if weights is not None else None
        net: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).to(device)
    except BROKEN as error:
        raise InputError(f"FID has no weights of Inception: {first_line(error)}; give a file of them") from error

    def features(pictures: torch.Tensor) -> torch.Tensor:
        return net((pictures.clamp(0, 1) * 255).round().to(device, torch.uint8)).float()

    return features


class _Features:
    """A CLIP model as torchmetrics calls it: transformers 5 wraps the features, which it takes bare."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> _Features:
        self.model.to(device)
        return self

    def get_image_features(self, *given: torch.Tensor) -> torch.Tensor:
        return _bare(self.model.get_image_features(*given))

    def get_text_features(self, *given: torch.Tensor) -> torch.Tensor:
        return _bare(self.model.get_text_features(*given))


def _bare(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _needs(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{what} needs the package {package}, which is not installed; pip install {package.replace('_', '-')}"
        )


def _load_backbone(net: torch.nn.Module, path: Path) -> None:
    """Torchvision's weights into LPIPS's cut of the network, whose layers keep their numbers."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            given = load_file(path)
        else:
            given = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {name: given[f"features.{name.partition('.')[2]}"] for name in net.state_dict()}
        net.load_state_dict(wanted)
    except BROKEN as error:
        raise InputError(f"{path} does not hold the backbone's weights: {first_line(error)}") from error
