"""How restored frames are scored: the benchmark's metrics, averages and temporal consistency.

A window gives sharp frames at the times 0, 1/8, ..., 1 (k = 0 .. 8). Deblurring is scored by the frame at 0 of every
window and the one at 1 of a video's last, so that each input counts once; multi-frame interpolation (MFI) by those in
between. Averages are taken within a video, then over videos (protocol of DeMFI; Oh and Kim, ECCV 2022).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shared.errors import InputError
from shared.metrics import high_frequency_error, psnr, ssim
from shared.optical_flow import farneback_flow


def frame_scores(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Score every frame as the saved picture: clamped, rounded to 8 bit, RGB.

    Args:
        prediction: (B, K, 3, H, W), values in and around [0, 1].
        target: (B, K, 3, H, W) in [0, 1].

    Returns:
        Each (B, K) float64: `psnr`, 20 log10(255 / RMSE) dB; `ssim`, MATLAB's, valid region, the mean over colours;
        `high_frequency_error`, of what is neither clamped nor rounded, see `shared.metrics.high_frequency_error`.

    Raises:
        InputError: NaN or infinity in the prediction.
        ValueError: shapes that differ, or fewer than 11 pixels a side.
    """
    if prediction.shape != target.shape or prediction.ndim != 5:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"frame_scores needs two batches (B, K, 3, H, W) of one shape, got {shapes}")
    if not prediction.isfinite().all():
        raise InputError("the network gives NaN or infinity; check the checkpoint, or train with a smaller lr")
    sr, gt = prediction.flatten(0, 1), target.flatten(0, 1)
    found = {
        "psnr": psnr(sr, gt, crop_border=0, channel="rgb"),
        "ssim": ssim(sr, gt, crop_border=0, channel="rgb"),
        "high_frequency_error": high_frequency_error(sr, gt),
    }
    return {name: values.unflatten(0, prediction.shape[:2]) for name, values in found.items()}


def tof(prediction: Tensor, target: Tensor) -> Tensor:
    """Temporal inconsistency: how far the optical flow from frame to frame is from that of the true frames (tOF;
    Chu et al., "Learning temporal coherence via self-supervision", SIGGRAPH 2020), by Farneback's method.

    Args:
        prediction: (B, K, 3, H, W) consecutive frames, K at least 2, values in and around [0, 1].
        target: (B, K, 3, H, W) in [0, 1].

    Returns:
        (B, K - 1) float64: length of the difference of the flows, mean over the pixels, px.

    Raises:
        ValueError: shapes that differ, or a single frame.
    """
    if prediction.shape != target.shape or prediction.ndim != 5 or prediction.shape[1] < 2:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"tof needs two batches (B, K, 3, H, W) of one shape, K at least 2, got {shapes}")
    flows, true_flows = (
        torch.stack([torch.stack([farneback_flow(*frames[i : i + 2]) for i in range(len(frames) - 1)]) for frames in x])
        for x in (prediction, target)
    )
    return (flows - true_flows).double().square().sum(2).sqrt().mean((-2, -1))


class SceneMean:
    """Means of a score of frames, within videos and then over videos.

    On several processes each adds its own windows; then `merge` the `sums` of all of them, which are plain lists, as
    `torch.distributed.all_gather_object` gives them.

    Attributes:
        sums: of each video the number of windows, the sum of the score at each k over them, the number of last windows
            and the sum of their score at time 1: K + 3 floats.
    """

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, values: Tensor, scenes: Sequence[str], is_last: Tensor) -> None:
        """Add windows.

        Args:
            values: (B, K) score of the frames at the times 0, ..., 1; K is always the same, 2 or more.
            scenes: name of the video of each window.
            is_last: (B,) bool, whether a window is its video's last.

        Raises:
            ValueError: lengths that do not fit.
        """
        if values.ndim != 2 or values.shape[1] < 2 or not len(values) == len(scenes) == len(is_last):
            raise ValueError(f"SceneMean needs values (B, K) of {len(scenes)} windows, got {tuple(values.shape)}")
        rows = values.double().tolist()
        for row, scene, last in zip(rows, scenes, is_last.tolist(), strict=True):
            self.merge([{scene: [1.0, *row, float(last), row[-1] if last else 0.0]}])

    def merge(self, sums: Iterable[Mapping[str, Sequence[float]]]) -> None:
        """Add sums of other processes."""
        for scene, numbers in ((scene, numbers) for part in sums for scene, numbers in part.items()):
            held = self.sums.setdefault(scene, [0.0] * len(numbers))
            if len(held) != len(numbers):
                raise ValueError(f"{scene} has scores of {len(held) - 3} and of {len(numbers) - 3} frames a window")
            self.sums[scene] = [a + b for a, b in zip(held, numbers, strict=True)]

    def profile(self) -> list[float]:
        """Mean at each k, 0 .. K - 1; how flat it is shows how well the network minds the time.

        Raises:
            ValueError: nothing was added.
        """
        return torch.stack([values[1:-2] / values[0] for values in self._sums()]).mean(0).tolist()

    def summary(self) -> dict[str, float]:
        """Means over all videos.

        Returns:
            `deblur`; where K is above 2 also `mfi`, `average` = ((K - 2) mfi + deblur) / (K - 1), which is
            (7 mfi + deblur) / 8 for K = 9, and `profile_range`, the largest less the smallest of `profile`.

        Raises:
            ValueError: nothing was added.
        """
        deblur = [(values[1] + values[-1]) / (values[0] + values[-2]) for values in self._sums()]
        found = {"deblur": torch.stack(deblur).mean().item()}
        profile = self.profile()
        if len(profile) > 2:
            between = profile[1:-1]
            found["mfi"] = sum(between) / len(between)
            found["average"] = (len(between) * found["mfi"] + found["deblur"]) / (len(between) + 1)
            found["profile_range"] = max(profile) - min(profile)
        return found

    def _sums(self) -> list[Tensor]:
        if not self.sums:
            raise ValueError("no window has been scored")
        # by name, so that the order in which windows came changes no digit
        return [torch.tensor(self.sums[scene], dtype=torch.float64) for scene in sorted(self.sums)]
