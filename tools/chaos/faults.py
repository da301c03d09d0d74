"""What can befall a job: strikes inside a rank, and damage to files between two launches."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Strike = Literal["kill", "kill_launcher", "freeze", "preempt", "preempt_usr1", "slow", "nan", "disk_full", "slow_disk"]
Harm = Literal["cut short", "flip a byte", "remove"]


@dataclass(frozen=True)
class Fault:
    """One strike in one attempt of a launch.

    Attributes:
        at: "batch", "evaluation", or a phase of a save or load (`checkpoint.phases`); "" for the whole attempt.
        nth: at which time (1: the first) that the rank comes there in this attempt.
    """

    strike: Strike
    rank: int
    at: str = ""
    nth: int = 1

    def __str__(self) -> str:
        where = f" at {self.at}{f' {self.nth}' if self.nth > 1 else ''}" if self.at else ""
        return f"{self.strike.replace('_', ' ')} rank {self.rank}{where}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Damage:
    """Harm to one file of the newest checkpoint; `file` is the end of its name."""

    harm: Harm
    file: str

    def __str__(self) -> str:
        return f"{self.harm}: {self.file}"

    def do(self, step_folder: Path, rng: np.random.Generator) -> Path:
        """Returns the file that was harmed. Raises FileNotFoundError if there is none of that name."""
        files = sorted(p for p in step_folder.iterdir() if p.name.endswith(self.file) and p.stat().st_size)
        if not files:
            raise FileNotFoundError(f"{step_folder} has no file *{self.file}")
        path = files[int(rng.integers(len(files)))]
        data = bytearray(path.read_bytes())
        if self.harm == "remove":
            path.unlink()
        elif self.harm == "cut short":
            path.write_bytes(data[: int(rng.integers(len(data)))])
        else:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
        return path
