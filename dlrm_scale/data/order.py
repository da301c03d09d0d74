"""The order of samples: a pure function of (data, seed, epoch), cut into lanes.

    blocks (row groups)   permuted           [3][0][4][1][2]
    windows of k blocks   rows mixed within  [ 3 0 ][ 4 1 ][ 2 ]
    lanes                 equal cuts         |--0--|--1--|--2--|

At each step every lane gives its next rows. A rank owns some of the lanes, so the global batch at a step holds the same
samples at any number of ranks that divides the number of lanes.
"""

from dataclasses import dataclass

import numpy as np

from dlrm_scale.data.hashing import permutation, stream
from dlrm_scale.data.source import Source
from dlrm_scale.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """A run of blocks whose rows are mixed; it fills positions start .. start + num_rows - 1 of its epoch's order."""

    blocks: tuple[int, ...]
    start: int
    num_rows: int
    key: np.uint64 | None

    def permutation(self) -> np.ndarray | None:
        """Which of the window's rows, its blocks one behind the other, stands at each position; None: as they are."""
        return None if self.key is None else permutation(self.key, self.num_rows)


class Order:
    """Who reads what when, and the data position: samples consumed by all ranks over all epochs, one integer.

    Args:
        max_rows: only the first so many rows of the source; None: all.
    """

    def __init__(
        self,
        source: Source,
        *,
        lanes: int,
        global_batch_size: int,
        shuffle_window_blocks: int,
        seed: int,
        max_rows: int | None = None,
    ) -> None:
        assert global_batch_size % lanes == 0, (global_batch_size, lanes)
        starts = source.block_starts
        all_rows = int(starts[-1])
        self.num_rows = all_rows if max_rows is None else min(all_rows, max_rows)
        num_blocks = int(np.searchsorted(starts, self.num_rows))  # the last one may be cut
        self.block_rows = np.minimum(starts[1 : num_blocks + 1], self.num_rows) - starts[:num_blocks]
        self.lanes = lanes
        self.lane_batch_size = global_batch_size // lanes
        self.global_batch_size = global_batch_size
        self.shuffle_window_blocks = shuffle_window_blocks
        self.identity = f"{source.fingerprint}/{seed}"
        longest_lane = -(-self.num_rows // lanes)
        self.steps_per_epoch = -(-longest_lane // self.lane_batch_size)

    def lane_range(self, lane: int) -> range:
        """Positions of the epoch's order that a lane reads."""
        return range(lane * self.num_rows // self.lanes, (lane + 1) * self.num_rows // self.lanes)

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's order, window by window."""
        per_window = self.shuffle_window_blocks or 1
        blocks = np.arange(len(self.block_rows))
        if self.shuffle_window_blocks:
            blocks = permutation(stream(self.identity, epoch, "blocks"), len(blocks))
        windows, start = [], 0
        for first in range(0, len(blocks), per_window):
            members = tuple(int(b) for b in blocks[first : first + per_window])
            num_rows = int(self.block_rows[list(members)].sum())
            key = stream(self.identity, epoch, "rows", first) if self.shuffle_window_blocks else None
            windows.append(Window(members, start, num_rows, key))
            start += num_rows
        return windows

    def consumed_after(self, epoch: int, step: int) -> int:
        """Samples consumed once step `step` (0-based) of epoch `epoch` is done."""
        if step == self.steps_per_epoch - 1:
            return (epoch + 1) * self.num_rows
        return epoch * self.num_rows + (step + 1) * self.global_batch_size

    def locate(self, samples_consumed: int) -> tuple[int, int]:
        """(epoch, step) that comes next after so many samples.

        Raises:
            ConfigError: the position lies inside a step, as it does after a change of the batch size or the data.
        """
        epoch, within = divmod(samples_consumed, self.num_rows)
        if within % self.global_batch_size:
            raise ConfigError(
                f"{samples_consumed} samples consumed is {within} into an epoch of {self.num_rows}, which is not the end of a step of "
                f"train.global_batch_size ({self.global_batch_size}); go on with the batch size that it was trained with"
            )
        return epoch, within // self.global_batch_size
