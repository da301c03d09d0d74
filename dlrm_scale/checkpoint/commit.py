"""The commit protocol: a checkpoint is a folder `step_<N>`, and it is there whole or not at all.

.tmp_step_<N>_<token>   being written; nobody reads it, the next run removes it
step_<N>                complete: every file and its manifest were on disk before this name was
.old_step_<N>_<token>   given up: renamed before anything in it is deleted
"""

import re
from dataclasses import dataclass, field
from uuid import uuid4

from dlrm_scale.checkpoint import manifest as manifests
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.errors import CheckpointError

STEP = re.compile(r"step_(\d+)")
LEFT_OVER = re.compile(r"\.(tmp|old)_step_\d+_\w+")


@dataclass
class CheckpointFolder:
    """The folder that holds a run's step folders. One process writes to it: rank 0, under the run folder's lock.

    Attributes:
        keep_last, keep_every_steps: as in `CheckpointConfig`.
        bad_steps: found invalid by this run; they do not count as kept, and go at the next `prune`.
    """

    path: str
    files: Files
    keep_last: int = 2
    keep_every_steps: int = 0
    bad_steps: set[int] = field(default_factory=set)

    def steps(self) -> list[int]:
        """Of the committed checkpoints, newest first."""
        found = (STEP.fullmatch(name) for name in self.files.names_in(self.path))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path_of(self, step: int) -> str:
        return f"{self.path}/step_{step}"

    def clean(self) -> list[str]:
        """Removes what interrupted saves and deletions left; returns its names."""
        names = [name for name in self.files.names_in(self.path) if LEFT_OVER.fullmatch(name)]
        for name in names:
            self.files.remove_folder(f"{self.path}/{name}")
        return names

    def begin(self, step: int) -> str:
        """A new temporary folder for the files of a checkpoint."""
        folder = f"{self.path}/.tmp_step_{step}_{uuid4().hex[:8]}"
        self.files.make_folder(folder)
        return folder

    def add_manifest(self, folder: str, manifest: Manifest) -> None:
        self.files.write(f"{folder}/{manifests.NAME}", manifests.dump(manifest))
        self.files.sync_folder(folder)

    def commit(self, folder: str, step: int) -> None:
        """Gives the folder its final name. One that has it already was found invalid, or this step would not be run again."""
        if self.files.exists(self.path_of(step)):
            self._discard(step)
        self.files.rename(folder, self.path_of(step))
        self.files.sync_folder(self.path)
        self.bad_steps.discard(step)

    def prune(self, newest: int) -> list[int]:
        """Deletes what need not be kept now that `newest` is committed; returns the steps.

        Later ones than `newest` were invalid when this run began, as it would have gone on from them.
        """
        valid = [step for step in self.steps() if step <= newest and step not in self.bad_steps]
        keep = set(valid[: self.keep_last])
        keep |= {step for step in valid if self.keep_every_steps and step % self.keep_every_steps == 0}
        gone = [step for step in self.steps() if step not in keep and (step <= newest or step in self.bad_steps)]
        for step in gone:
            self._discard(step)
            self.bad_steps.discard(step)
        return gone

    def _discard(self, step: int) -> None:
        aside = f"{self.path}/.old_step_{step}_{uuid4().hex[:8]}"
        self.files.rename(self.path_of(step), aside)
        self.files.sync_folder(self.path)
        self.files.remove_folder(aside)

    def manifest(self, step: int) -> Manifest:
        """Raises CheckpointError: there is none, or none that can be trusted."""
        path = f"{self.path_of(step)}/{manifests.NAME}"
        try:
            manifest = manifests.parse(self.files.read(path), path)
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from None
        if manifest.step != step:
            raise CheckpointError(f"{path} is of step {manifest.step}")
        return manifest

    def fault(self, step: int, manifest: Manifest, names: list[str]) -> str | None:
        """What is wrong with the first bad one of these files: reads them whole."""
        for name in names:
            wanted, path = manifest.files[name], f"{self.path_of(step)}/{name}"
            try:
                if (size := self.files.size_of(path)) != wanted.size:
                    return f"{path} has {size} bytes, but {wanted.size} were written"
                if self.files.sum_of(path) != wanted:
                    return f"{path} does not have its checksum: its content changed after it was written"
            except OSError as e:
                return f"{path} cannot be read: {e.strerror or e}"
        return None

    def strangers(self, step: int, manifest: Manifest) -> list[str]:
        """Files that the manifest does not know; they do no harm, as nothing reads them."""
        return sorted(set(self.files.names_in(self.path_of(step))) - set(manifest.files) - {manifests.NAME})
