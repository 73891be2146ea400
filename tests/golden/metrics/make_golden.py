"""Write golden.json: what torchmetrics, scikit-image, pytorch-msssim and plain numpy/scipy say of the same pictures.

Run by hand (python tests/golden/metrics/make_golden.py) when a metric is added; the tests only read the file.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_msssim
import scipy
import scipy.ndimage
import torch
from PIL import Image
from skimage.color import deltaE_cie76, deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

sys.path.insert(0, str(Path(__file__).parents[2]))
from test_metrics import synthetic  # noqa: E402

HERE = Path(__file__).parent
Array = np.ndarray


def whole(x: Array, y: Array) -> dict[str, float]:
    """Two whole pictures, float64 in [0, 1], by the libraries."""
    a, b = (torch.from_numpy(np.ascontiguousarray(z.transpose(2, 0, 1)))[None] for z in (x, y))
    de76, de2000 = deltaE_cie76(rgb2lab(x), rgb2lab(y)), deltaE_ciede2000(rgb2lab(x), rgb2lab(y))
    return {
        "l1": float(mean_absolute_error(a, b)),
        "mse": float(mean_squared_error(a, b)),
        "psnr": float(peak_signal_noise_ratio(a, b, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(a, b, data_range=1.0)),
        "ssim_valid": float(
            structural_similarity(
                x,
                y,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                channel_axis=-1,
                data_range=1.0,
            )
        ),
        "ssim_valid_msssim": float(pytorch_msssim.ssim(a, b, data_range=1.0)),
        "ms_ssim": float(pytorch_msssim.ms_ssim(a, b, data_range=1.0)),
        "delta_e76": float(de76.mean()),
        "delta_e76_p95": float(np.quantile(de76, 0.95)),
        "delta_e2000": float(de2000.mean()),
        "delta_e2000_p95": float(np.quantile(de2000, 0.95)),
    }


def background(x: Array, y: Array, mask: Array) -> dict[str, float]:
    """Inside and outside of a mask (true = edit)."""
    keep = ~mask
    blackened = whole(x * keep[..., None], y * keep[..., None])
    strict = float(((x - y)[keep] ** 2).mean())
    return {
        "pie_mse": blackened["mse"],
        "pie_psnr": blackened["psnr"],
        "pie_ssim": blackened["ssim"],
        "strict_bg_mse": strict,
        "strict_bg_psnr": float(-10 * np.log10(strict)),
        "strict_bg_l1": float(np.abs(x - y)[keep].mean()),
        "leak": float(np.abs(x - y)[keep].sum() / np.abs(x - y).sum()),
        "edit_l1": float(np.abs(x - y)[mask].mean()),
        "colour_shift": [float(v) for v in (rgb2lab(y) - rgb2lab(x))[keep].mean(0)],
    }


def edit(x: Array, y: Array, t: Array, mask: Array) -> dict[str, float]:
    """Source, output, target."""
    differs = (np.abs(np.rint(x * 255) - np.rint(t * 255)) > 1).any(-1)

    def gain(region: Array) -> float:
        grown = scipy.ndimage.binary_dilation(region, np.ones((5, 5)))
        return float(1 - ((y - t)[grown] ** 2).sum() / ((x - t)[grown] ** 2).sum())

    did = deltaE_cie76(rgb2lab(y), rgb2lab(x)) > 10
    wanted = deltaE_cie76(rgb2lab(t), rgb2lab(x)) > 10
    right = deltaE_cie76(rgb2lab(y), rgb2lab(t)) <= 10
    return {
        "edit_gain": gain(differs),
        "edit_gain_mask": gain(mask),
        "edit_psnr_target": float(-10 * np.log10(((y - t)[mask] ** 2).mean())),
        "precision": float((did & wanted).sum() / did.sum()),
        "recall": float((right & did & wanted).sum() / wanted.sum()),
        "iou": float((right & did & wanted).sum() / (wanted | (did & ~wanted)).sum()),
        "mask_precision": float((did & mask).sum() / did.sum()),
        "mask_recall": float((did & mask).sum() / mask.sum()),
        "mask_iou": float((did & mask).sum() / (did | mask).sum()),
    }


def effects(x: Array, y: Array) -> dict[str, float]:
    """Sharpness and structure."""
    grey = [z @ np.array([0.299, 0.587, 0.114]) for z in (x, y)]
    inner = (slice(1, -1), slice(1, -1))
    laplacian = [scipy.ndimage.laplace(g)[inner] for g in grey]
    sobel = [np.hypot(scipy.ndimage.sobel(g, 0), scipy.ndimage.sobel(g, 1))[inner] for g in grey]
    return {
        "sharpness_ratio": float(laplacian[1].var() / laplacian[0].var()),
        "grad_corr": float(np.corrcoef(sobel[0].ravel(), sobel[1].ravel())[0, 1]),
    }


def unit(picture: Array | Image.Image) -> Array:
    return np.asarray(picture, dtype=np.float64) / 255


def main() -> None:
    arrays = synthetic()
    x, y, t = (unit(arrays[name]) for name in ("source", "output", "target"))
    real = [unit(Image.open(HERE / f"{name}.jpg").convert("RGB")) for name in ("source", "output")]
    mask = np.asarray(Image.open(HERE / "mask_white_keeps.png").convert("L")) <= 128
    libraries = ("torch", "torchmetrics", "scikit-image", "pytorch-msssim", "numpy", "scipy")
    golden = {
        "made_with": {name: version(name) for name in libraries},
        "synthetic": whole(x, y)
        | background(x, y, arrays["mask"])
        | edit(x, y, t, arrays["mask"])
        | effects(x, y),
        "pictures": whole(*real) | background(*real, mask) | effects(*real),
    }
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
