"""The data sets: generated shapes with textures, digits and animals, all embedded; CIFAR-100 and CIFAR-10; ImageNet-1k.

Each is a LightningDataModule of `shared.io.image_classes`, where batches and augmentation are described.
"""

from shared.io.image_classes import CIFAR, Animals, Digits, Folders, Shapes

__all__ = ["CIFAR", "Animals", "Digits", "Folders", "Shapes"]
