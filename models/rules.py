"""Where each tensor of a family comes from in a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """A selection of rows of a fused source, with its first axis viewed as ``[groups, of, size]``.

    Attributes:
        start, stop: the slices selected from each group.
        of: number of equal slices in a group.
        groups: number of consecutive groups; a fused ``[q; k; v]`` is one group of three.
    """

    start: int
    stop: int
    of: int
    groups: int = 1

    def view(self, source: np.ndarray) -> np.ndarray:
        """A view of the rows: ``[groups, stop - start, size, ...]``."""
        groups = source.reshape(self.groups, self.of, -1, *source.shape[1:])
        return groups[:, self.start : self.stop]


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One tensor of our model and its source.

    Attributes:
        dst: our name, one per layer: ``language/layers/0/q_proj/kernel``.
        src: name in the Hugging Face checkpoint.
        shape: shape of our tensor.
        src_shape: shape of the source.
        rows: our rows of the source; ``None``: all.
        transposed: whether the source is a transposed matrix (``x @ W``).
        order: in each run of ``len(order)`` rows, our row ``i`` is row ``order[i]`` of the source.
        otherwise: values if the checkpoint lacks the tensor; ``None``: it is required.
    """

    dst: str
    src: str
    shape: tuple[int, ...]
    src_shape: tuple[int, ...]
    rows: Rows | None = None
    transposed: bool = False
    order: tuple[int, ...] | None = None
    otherwise: tuple[float, ...] | None = None

    def apply(self, source: np.ndarray) -> np.ndarray:
        """Extract our tensor from the source."""
        source = source.T if self.transposed else source
        source = source if self.rows is None else self.rows.view(source)
        source = source.reshape(self.shape)
        if self.order is None:
            return source
        return source.reshape(-1, len(self.order), *self.shape[1:])[:, self.order].reshape(
            self.shape
        )

    def run(self) -> tuple[int, int | None]:
        """Return the first source row of ours and the number of rows, if our rows are a contiguous,
        unchanged run of the source's; else ``(0, None)``."""
        if self.transposed or self.order is not None or not self.shape:
            return 0, None
        if self.rows is None:
            same = self.shape[0] == self.src_shape[0]
            return (0, self.shape[0]) if same else (0, None)
        if self.rows.groups > 1:
            return 0, None
        return self.rows.start * (self.src_shape[0] // self.rows.of), self.shape[0]

    def scatter(self, ours: np.ndarray, source: np.ndarray) -> None:
        """The inverse of :meth:`apply`: write our tensor into its place in ``source``."""
        source = source.T if self.transposed else source
        part = source if self.rows is None else self.rows.view(source)
        if self.order is not None:
            back = np.argsort(self.order)
            ours = ours.reshape(-1, len(back), *self.shape[1:])[:, back]
        part[...] = ours.reshape(part.shape)
