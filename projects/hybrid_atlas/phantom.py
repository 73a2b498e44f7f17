"""A cohort whose atlas is known: the ICBM152 average deformed, turned and sampled as scanners would.

    python -m projects.hybrid_atlas.phantom <folder>    scans with labels, to try `predict` on

Each subject is the template under a random deformation and a small random affine, on a grid of its own orientation and
spacing, in numbers of its own scale. All is a function of (seed, subject).
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from shared.errors import InputError
from shared.io.files import write_json
from shared.io.volumes import reorient, write_volume

from .cohort import Synthetic
from .itk import axes, embed, frame, places_in_atlas
from .scan import Grid
from .tissue import template

AMPLITUDE = 2.0  # of the velocities, root mean square, voxels of 2 mm
NOISE = 0.01
TURN, STRETCH, SHEAR, SHIFT = 6.0, 0.06, 0.03, 8.0  # largest: degrees, of 1, of 1, mm
SPACINGS = (1.6, 1.8, 2.0, 2.2, 2.5)  # mm, drawn by axis
ORIENTATIONS = {2: ("RAS", "LAS", "LPS", "RPS"), 3: ("RAS", "LPS", "ASR", "PIL", "LSA", "RPI")}
BRIGHTEST = (400.0, 1600.0)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is drawn of one subject.

    Attributes:
        image: (S) float32, brightest about 1.
        labels: (S) uint8.
        grid: where they are.
        matrix: (4, 4), place of the template to place of the subject, mm.
    """

    image: np.ndarray
    labels: np.ndarray
    grid: Grid
    matrix: np.ndarray


class Phantom:
    """A template and subjects made of it.

    Args:
        num_subjects: N.
        dims: 2, an axial slice, or 3, a head; both at 2 mm.
        seed: of all that is drawn.
    """

    def __init__(self, num_subjects: int = 8, dims: int = 2, seed: int = 0):
        if dims not in (2, 3):
            raise InputError(f"dims is 2 or 3, not {dims}")
        self.template, self.seed = template(f"mni{dims}d", "regions"), seed
        self.grid = Grid(self.template.image.shape, self.template.affine)
        self.cohort = Synthetic(
            self.template.image, self.template.labels, self.template.names, num_subjects, seed, AMPLITUDE,
            noise_std=0.0, keep=False,
        )  # fmt: skip

    def subject(self, index: int) -> Subject:
        """Draw one subject on a grid that grows to the right, front and top."""
        random, num_dims = np.random.default_rng((self.seed, index)), len(self.grid.shape)
        matrix = self._affine(random)
        spacing = random.choice(SPACINGS, num_dims)
        extent = np.array(self.grid.shape) * self.grid.spacing
        shape = tuple(int(side) for side in np.ceil(extent / spacing))
        rows = axes(self.grid.affine, num_dims)
        affine = np.eye(4)
        affine[:3, :3] = 0
        affine[rows, range(num_dims)] = spacing
        if num_dims == 2:
            affine[:3, 2] = self.grid.affine[:3, 2]
        center = self.grid.affine @ [*((np.array(self.grid.shape) - 1) / 2), *[0] * (3 - num_dims), 1]
        half = affine[:3, :num_dims] @ ((np.array(shape) - 1) / 2)
        affine[:3, 3] = (matrix @ center)[:3] - half
        displacement = self.cohort.displacement([index])[0].numpy()
        places = places_in_atlas(displacement, self.grid, matrix, shape, affine)
        image = ndimage.map_coordinates(self.template.image, places, order=1, mode="grid-constant")
        noise = NOISE * random.standard_normal(shape)
        labels = ndimage.map_coordinates(self.template.labels, places, order=0, mode="grid-constant")
        return Subject(np.where(image > 0, image + noise, 0).clip(0), labels, Grid(shape, affine), matrix)

    def _affine(self, random: np.random.Generator) -> np.ndarray:
        """Draw a turn, a stretch, a shear and a shift about the middle of the template, (4, 4)."""
        num_dims = len(self.grid.shape)
        linear = np.eye(num_dims)
        for first in range(num_dims):
            for second in range(first + 1, num_dims):
                angle = np.radians(random.uniform(-TURN, TURN))
                turn = np.eye(num_dims)
                turn[[first, second], [first, second]] = np.cos(angle)
                turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
                linear = turn @ linear
        linear = linear @ np.diag(1 + random.uniform(-STRETCH, STRETCH, num_dims))
        linear += np.triu(random.uniform(-SHEAR, SHEAR, (num_dims, num_dims)), 1)
        matrix = np.eye(num_dims + 1)
        matrix[:-1, :-1] = linear
        middle = (frame(self.grid.affine, num_dims) @ [*((np.array(self.grid.shape) - 1) / 2), 1])[:-1]
        matrix[:-1, -1] = middle - linear @ middle + random.uniform(-SHIFT, SHIFT, num_dims)
        return embed(matrix, self.grid.affine)


def write_demonstration(folder: str | os.PathLike, num_subjects: int = 8, dims: int = 2, seed: int = 0) -> list[Path]:
    """Write a cohort that `predict` can be tried on.

    The folder gets subject_0000.nii.gz and, beside it, its labels subject_0000_seg.nii.gz; truth/ gets template.nii.gz,
    template_labels.nii.gz and subjects.json, which holds the matrices from the template to each subject.

    Args:
        folder: made where it is missing.
        num_subjects: see `Phantom`.
        dims: likewise.
        seed: likewise.

    Returns:
        The files.

    Raises:
        InputError: a value out of range, or a file that cannot be written.
    """
    folder, phantom = Path(folder), Phantom(num_subjects, dims, seed)
    files, matrices = [], {}
    for index, name in enumerate(phantom.cohort.names):
        subject, random = phantom.subject(index), np.random.default_rng((seed, index, 1))
        orientation, brightest = random.choice(ORIENTATIONS[dims]), random.uniform(*BRIGHTEST)
        matrices[name] = subject.matrix.tolist()
        for ending, values, dtype in (("", brightest * subject.image, np.int16), ("_seg", subject.labels, np.uint8)):
            volume = reorient(subject.grid.volume(values), str(orientation))
            files.append(folder / f"{name}{ending}.nii.gz")
            write_volume(files[-1], volume.data, volume, dtype)
    truth = folder / "truth"
    files += [truth / "template.nii.gz", truth / "template_labels.nii.gz", truth / "subjects.json"]
    phantom.grid.write(files[-3], phantom.template.image)
    phantom.grid.write(files[-2], phantom.template.labels.astype(np.float32), np.uint8)
    write_json(files[-1], {"matrices": matrices, "labels": phantom.template.names})
    return files


def main(argv: list[str] | None = None) -> int:
    """Write a cohort to try `predict` on; give the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.hybrid_atlas.phantom",
        description="Write scans of generated heads, with labels, whose atlas is known, to try predict on.",
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--subjects", type=int, default=8, help="how many, 8 by default")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2, help="slices (2, by default) or volumes (3)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other heads")
    args = parser.parse_args(argv)
    try:
        if args.seed < 0 or args.subjects < 1:
            raise InputError("--seed must be 0 or more, --subjects 1 or more")
        files = write_demonstration(args.folder, args.subjects, args.dims, args.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.subjects} scans with labels to {args.folder}, their truth to {files[-1].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
