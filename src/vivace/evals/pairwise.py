"""How far an output is from its reference, sample by sample: relative error, PSNR and SSIM.

Everything is computed in float64, so that the instrument adds no noise of its own.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vivace.errors import InputError

WINDOW = 11  # pixels; the Gaussian window of Wang et al. 2004
SIGMA = 1.5  # pixels
CEILING = 100.0  # dB: 400 times finer than one step of an 8-bit picture


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||output - reference|| / ||reference|| of every sample, for latents or any other output.

    Both are [B, ...] of one shape; returns [B] float64. Equal samples give 0, also where both are zero.
    Raises InputError for shapes that differ.
    """
    if output.shape != reference.shape or output.ndim < 2:
        raise InputError(
            f"relative error compares two [B, ...] tensors of one shape, got {list(output.shape)} "
            f"and {list(reference.shape)}; run both with the same size and batch"
        )
    exact = reference.to(torch.float64).flatten(1)
    difference = torch.linalg.vector_norm(output.to(exact).flatten(1) - exact, dim=1)
    return torch.where(difference == 0, 0.0, difference / torch.linalg.vector_norm(exact, dim=1))


def psnr(pictures: torch.Tensor, reference: torch.Tensor, *, ceiling: float = CEILING) -> torch.Tensor:
    """Peak signal-to-noise ratio of every picture, in dB: -10 log10(mean squared error), the peak being 1.

    Both are [B, 3, H, W] in [0, 1]; returns [B] float64. Identical pictures would be infinitely good and one of them
    would make every mean infinite, so values end at `ceiling`; pass `math.inf` to have them unbounded.
    Raises InputError for what is not two equally shaped sets of pictures.
    """
    pictures, reference = _pair(pictures, reference)
    error = (pictures - reference).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).clamp(max=ceiling)


def ssim(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every picture, 1 for identical ones (Wang et al., IEEE TIP 13(4), 2004).

    With means mu, variances s² and covariance s_xy under an 11 x 11 Gaussian window of sigma 1.5,

        SSIM = (2 mu_x mu_y + C1) (2 s_xy + C2) / ((mu_x² + mu_y² + C1) (s_x² + s_y² + C2)),  C1 = 0.01², C2 = 0.03²

    averaged over the places where the window lies wholly inside, and over the channels.
    Both are [B, 3, H, W] in [0, 1]; returns [B] float64.
    Raises InputError for pictures smaller than the window, or not two equally shaped sets of pictures.
    """
    x, y = _pair(pictures, reference)
    if min(x.shape[-2:]) < WINDOW:
        raise InputError(
            f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, got {x.shape[-1]} x {x.shape[-2]}"
        )
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x.square()
    variance_y = _smooth(y * y) - mean_y.square()
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """The Gaussian-weighted mean of every window: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    planes = x.flatten(0, 1).unsqueeze(1)  # [B * C, 1, H, W]
    rows = functional.conv2d(planes, weights.view(1, 1, 1, -1))
    return functional.conv2d(rows, weights.view(1, 1, -1, 1)).squeeze(1).unflatten(0, x.shape[:2])


def _pair(pictures: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if pictures.shape != reference.shape or pictures.ndim != 4:
        raise InputError(
            f"pictures are compared as two [B, 3, H, W] tensors of one shape, got {list(pictures.shape)} "
            f"and {list(reference.shape)}; flatten the frames of a video into the batch first"
        )
    for name, x in (("pictures", pictures), ("reference", reference)):
        # Written so that NaN fails too.
        if not (x.is_floating_point() and x.numel() and x.min() >= 0 and x.max() <= 1):
            raise InputError(
                f"{name} must be floating point in [0, 1], got {x.dtype} "
                f"from {x.min().item() if x.numel() else 'nothing'} to {x.max().item() if x.numel() else 'nothing'}; "
                "divide 8-bit pictures by 255, or take the pipeline's output_type='pt'"
            )
    return pictures.to(torch.float64), reference.to(pictures.device, torch.float64)
