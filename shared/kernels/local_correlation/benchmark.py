"""Time of the local correlation beside unfold, grid_sample and normalisation, in one run.

    python -m shared.kernels.local_correlation.benchmark --threads 2

First the kernel is compared with the float64 reference, forward and every gradient; if it fails no speed is printed.
Then both take turns; medians of the turns count, and of the ratios within a turn. Writes
results/benchmark_<device>_<date>.json, from which `make report` takes the table of README.md.
"""

from pathlib import Path

from shared.kernels.backward_warp.benchmark import run
from shared.kernels.local_correlation import local_correlation
from shared.kernels.local_correlation.grid_sample_peer import unfold_warp_correlation

FOLDER = Path(__file__).parent
# (B, C, H, W): the three levels of a 128 x 128 frame, and a batch of a training at small scale
SHAPES = ((1, 24, 128, 128), (1, 48, 64, 64), (1, 96, 32, 32), (8, 8, 64, 64))


if __name__ == "__main__":
    run("local_correlation", local_correlation, unfold_warp_correlation, 2, SHAPES, FOLDER / "results")
