"""The sizes of one deformable convolution, as the compiled kernels need them."""

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """What a call is besides its tensors; pairs are (vertical, horizontal)."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    guided: bool = False
    max_residual: float = 0.0

    @property
    def taps(self) -> int:
        """Number of taps, K."""
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return out_size(*self[:5])

    def numbers(self, batch: int) -> tuple[int, ...]:
        """Return what the kernels read: H, W, G, K, kw, P, W_out, stride, padding, dilation, guided, B."""
        height, width = self.out_size
        sizes = (*self.size, self.groups, self.taps, self.kernel[1], height * width, width)
        return (*sizes, *self.stride, *self.padding, *self.dilation, int(self.guided), batch)


def out_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return height and width of a convolution's result."""
    steps = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps)
