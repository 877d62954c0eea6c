"""`metrics`: the four measures of an image, beside the published way of computing each."""

import argparse
from collections.abc import Callable

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dereflect.tools.benchmarks import common, machine, output
from dereflect.tools.benchmarks.common import Measurement
from dereflect.util.errors import UserError
from dereflect.util.metrics import PEAK, quality_assess

WINDOW, STEP = 20, 10  # of LMSE

COLUMNS = {"ms": "{milliseconds:.1f}", "min..max": "{fastest:.1f}..{slowest:.1f}", "x as fast": "{ratio:.1f}"}


def published(estimate: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The measures of `quality_assess` as published: scikit-image channel by channel, LMSE's windows one by one."""
    x, y = (image.astype(np.float64) for image in (estimate, target))

    def over_channels(measure: Callable) -> float:
        return float(np.mean([measure(y[..., c], x[..., c], data_range=PEAK) for c in range(3)]))

    return {
        "PSNR": over_channels(peak_signal_noise_ratio),
        "SSIM": over_channels(structural_similarity),
        "LMSE": lmse(x, y),
        "NCC": float(np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())),
    }


def lmse(estimate: np.ndarray, target: np.ndarray) -> float:
    """The local error of Grosse et al. (ICCV 2009), by loops."""
    error = energy = 0.0
    for c in range(3):
        for i in range(0, target.shape[0] - WINDOW + 1, STEP):
            for j in range(0, target.shape[1] - WINDOW + 1, STEP):
                x, y = (image[i : i + WINDOW, j : j + WINDOW, c] for image in (estimate, target))
                square = np.sum(x**2)
                scale = np.sum(x * y) / square if square > 1e-5 else 0.0
                error += np.sum((y - scale * x) ** 2)
                energy += np.sum(y**2)
    return float(error / energy)


def run_metrics(options: argparse.Namespace) -> None:
    width, height = options.size
    if min(options.size) < WINDOW:
        raise UserError(f"--size {width} {height}: a side has fewer pixels than LMSE's windows, {WINDOW}")
    rng = np.random.default_rng(0)
    target = rng.uniform(0, PEAK, (height, width, 3)).astype(np.float32)
    estimate = np.clip(target + rng.normal(0, 20, target.shape), 0, PEAK).astype(np.float32)
    found = [(Measurement({"what": name}), call) for name, call in (("published", published), ("ours", quality_assess))]
    calls = [(m, lambda call=call: call(estimate, target)) for m, call in found]
    values = [call() for _, call in calls]
    common.take_turns(calls, [options.repeats] * 2, "cpu")
    measurements = [m for m, _ in found]
    common.add_ratio(measurements, measurements[0])
    for m, given in zip(measurements, values, strict=True):
        m.figures |= given
    title = f"PSNR, SSIM, LMSE and NCC of {width} x {height} pixels"
    output.report(options, machine.setting(options, "cpu"), [output.table(title, measurements, COLUMNS)], measurements)
