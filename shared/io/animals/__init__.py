"""Silhouettes of ten kinds of animals to train and test on with no download; author and licence in `ATTRIBUTION.md`."""

from pathlib import Path

import numpy as np

from shared.io.labelled import LabelledImages

__all__ = ["load_animals"]

NAMES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def load_animals(train: bool) -> LabelledImages:
    """Animal-MNIST (S. Mohammadi, 2025): 8,000 pictures to train on, 2,000 to test on, the same at every call.

    Both sides hold as many of each class, in a fixed random order. No picture of the test side occurs twice in the data
    set, so that none has a copy on the training side.

    Returns:
        (N, 32, 32, 3) uint8: 28x28 gray, bright on black, with a black margin of 2, three equal channels.
    """
    with np.load(Path(__file__).parent / "animals.npz") as arrays:
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(arrays["is_test"] != train))
        gray, labels = arrays["images"][chosen], arrays["labels"][chosen].astype(np.int64)
    gray = np.pad(gray, ((0, 0), (2, 2), (2, 2)))
    return LabelledImages(np.repeat(gray[..., None], 3, axis=3), labels, NAMES)
