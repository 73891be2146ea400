"""What an edit changed, kept and got right, in numbers that need no weights.

Shapes: pictures ``(3, H, W)`` or ``(B, 3, H, W)`` float in [0, 1], or PIL images; masks ``(H, W)``, ``(1, H, W)`` or
``(B, 1, H, W)``, or PIL images, over 0.5 where the picture may change. Results have the leading shape: ``()`` or ``(B,)``.
All is computed on the CPU in float64. What is undefined (the background of a mask that covers everything) is NaN, equal
pictures have a PSNR of infinity. Pictures of different sizes raise ``UserError``: nothing is ever resized here.

The ``pie_*`` values follow PIE-Bench (arXiv 2310.01506): both pictures are multiplied by the background and averaged over
*all* pixels, so that they depend on the mask's size. The ``strict_bg_*`` ones average over the background alone.
"""

from .colour import ciede2000, delta_e76, delta_e2000, lab
from .edits import (
    Overlap,
    changed,
    dilate,
    edit_gain,
    edit_l1,
    edit_overlap,
    edit_psnr_target,
    leak,
    mean_where,
    pie_mse,
    pie_psnr,
    pie_ssim,
    strict_bg_l1,
    strict_bg_mse,
    strict_bg_psnr,
)
from .effects import colour_shift, grad_corr, pixel_shift, sharpness_ratio
from .pictures import Picture, l1, ms_ssim, mse, psnr, ssim, ssim_valid
from .sliders import linearity, spearman, switches, symmetry
from .summary import interval, report

__all__ = [
    "Overlap",
    "Picture",
    "changed",
    "ciede2000",
    "colour_shift",
    "delta_e2000",
    "delta_e76",
    "dilate",
    "edit_gain",
    "edit_l1",
    "edit_overlap",
    "edit_psnr_target",
    "grad_corr",
    "interval",
    "l1",
    "lab",
    "leak",
    "linearity",
    "mean_where",
    "ms_ssim",
    "mse",
    "pie_mse",
    "pie_psnr",
    "pie_ssim",
    "pixel_shift",
    "psnr",
    "report",
    "sharpness_ratio",
    "spearman",
    "ssim",
    "ssim_valid",
    "strict_bg_l1",
    "strict_bg_mse",
    "strict_bg_psnr",
    "switches",
    "symmetry",
]
