"""Snapshots: two files a step, whole or not there, from which training goes on bit for bit.

`<prefix>N.pth`: weights (averaged ones where an average is kept), class table, recipe, step, format version: what
testing and others want.
`<prefix>N.state.pth`: what only a resume wants, as tensors and plain values, and the digest of the weight file. It is
renamed last: where it stands, the pair is complete. Both are zip files with a checksum of each entry.
"""

import glob
import hashlib
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upsnet.checkpoints.files import FORMAT_VERSION, check_version, load_safely
from upsnet.engine.run_record import FILE_NAME, RunRecord, read_run_record
from upsnet.structures.categories import Categories
from upsnet.structures.errors import WeightsError
from upsnet.structures.places import remove, sync_folder, write_temporary, writing

logger = logging.getLogger("upsnet")


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Where training goes on: steps done, the seed of the run, state of the fp16 loss scaler (empty otherwise).

    raw_weights: the trained weights where those beside this state are averages; see `WeightAverage.applied`.
    """

    iteration: int
    seed: int
    scaler: dict[str, Any] = field(default_factory=dict)
    raw_weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of one run.

    folder, prefix: `folder/<prefix>N.pth`. categories, recipe: the class table and the recipe's yaml, stored alongside.
    keep: so many of the run's last snapshots stay, and the best one; None: all.
    """

    folder: Path
    prefix: str
    categories: Categories
    recipe: str
    keep: int | None = None

    def path(self, iteration: int) -> Path:
        """The weight file after this many steps."""
        return self.folder / f"{self.prefix}{iteration}.pth"

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, state: ResumeState) -> Path:
        """Writes the pair of files and returns the path of the weights.

        Raises:
            PlaceError: the folder cannot be written or the disk is full; an earlier pair is still there, half a pair
                is not.
        """
        weights_path = self.path(state.iteration)
        weights = {
            "weights": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
            "categories": self.categories.to_coco(),
            "recipe": self.recipe,
            "iteration": state.iteration,
            "format_version": FORMAT_VERSION,
        }
        rest = {
            "optimizer": optimizer.state_dict(),
            "optimizer_class": type(optimizer).__name__,
            "iteration": state.iteration,
            "seed": state.seed,
            "scaler": state.scaler,
            "raw_weights": dict(state.raw_weights),
            "format_version": FORMAT_VERSION,
        }
        with writing(weights_path):
            self.folder.mkdir(parents=True, exist_ok=True)
            content = _serialised(weights)
            rest["weights_sha256"] = hashlib.sha256(content).hexdigest()
            _replace_pair(weights_path, content, _serialised(rest))
        self._list(state.iteration)
        return weights_path

    def begin(self, start: int | None, launch: Sequence[str] = ()) -> None:
        """Says which snapshots of the folder belong to the run that begins now, and removes what a killed one left.

        Args:
            start: the snapshot that it goes on from; later ones are replaced. None: it begins anew.
            launch: its names, see `RunRecord`.

        Raises:
            PlaceError: the folder cannot be written.
        """
        for name in (self.prefix, FILE_NAME):
            for left in self.folder.glob(f".{glob.escape(name)}*.tmp"):
                if left.is_file():
                    remove(left)
        record = RunRecord()
        if start is not None:
            before = self._record()
            listed = sorted({*(iteration for iteration in before.iterations if iteration < start), start})
            record = replace(before, iterations=listed)
            if before.best not in listed:
                record = replace(record, best=None, pq=None)
        replace(record, launch=launch).write(self.folder)

    def is_of_launch(self, names: Iterable[str]) -> bool:
        """Whether the run in the folder was begun or taken up by a launch with one of these names."""
        record = read_run_record(self.folder)
        return record is not None and not set(names).isdisjoint(record.launch)

    def newest_whole(self) -> Path | None:
        """The weights of the run's newest snapshot that is whole; damaged ones are named in a warning."""
        for iteration in reversed(self._record().iterations):
            path = self.path(iteration)
            try:
                check_whole(path)
            except WeightsError as error:
                logger.warning("%s; the snapshot before it is used instead", error)
            else:
                return path
        return None

    def holds(self, iteration: int) -> bool:
        """Whether the run has a snapshot of this iteration already."""
        record = read_run_record(self.folder)
        return record is not None and iteration in record.iterations and state_path(self.path(iteration)).is_file()

    def is_best(self, pq: float) -> bool:
        """Whether no snapshot of the run has had this panoptic quality."""
        best = self._record().pq
        return best is None or pq > best

    def set_best(self, iteration: int, pq: float) -> None:
        """Keeps the snapshot of this iteration as the best one."""
        replace(self._record(), best=iteration, pq=pq).write(self.folder)
        self._list(iteration)

    def _record(self) -> RunRecord:
        """Without one in the folder, all complete snapshots are the run's."""
        record = read_run_record(self.folder)
        if record is not None:
            return record
        names = (name.removeprefix(self.prefix).removesuffix(".pth") for name in complete_snapshots(self.folder))
        return RunRecord(iterations=sorted(int(name) for name in names if name.isdecimal()))

    def _list(self, iteration: int) -> None:
        """Takes a snapshot into the record and removes those that are no longer kept."""
        record = self._record()
        # Where we were killed while removing, the record still has what may be gone.
        listed = {known for known in record.iterations if self.path(known).is_file()}
        record = replace(record, iterations=sorted({*listed, iteration}))
        record.write(self.folder)
        for old in self._not_kept(record):
            remove(state_path(self.path(old)))
            remove(self.path(old))

    def _not_kept(self, record: RunRecord) -> Iterable[int]:
        if self.keep is None:
            return ()
        return (old for old in record.iterations[: -self.keep] if old != record.best)


def state_path(weights_path: Path) -> Path:
    """`x.state.pth` of `x.pth`."""
    return weights_path.with_name(weights_path.name.removesuffix(".pth") + ".state.pth")


def check_whole(weights_path: Path) -> dict[str, Any]:
    """Reads both files of a snapshot and returns its training state.

    Raises:
        WeightsError: one of them is missing or damaged, or they do not belong together.
    """
    path = state_path(weights_path)
    for file in (weights_path, path):
        if not file.is_file():
            raise WeightsError(f"{file} is missing, so {weights_path.name} is no complete snapshot: {_advice(file)}")
    rest = load_safely(path)
    if not isinstance(rest, dict) or not {"optimizer", "optimizer_class", "iteration", "seed", "scaler"} <= rest.keys():
        raise WeightsError(f"{path} is not the training state of a snapshot: resume from another one")
    digest = rest.get("weights_sha256")  # snapshots of earlier versions have none
    if digest is None:
        load_safely(weights_path)
    elif digest != _digest(weights_path):
        raise WeightsError(
            f"{weights_path} is damaged, or {path.name} beside it belongs to other weights: "
            f"resume from another snapshot"
        )
    return rest


def resume(weights_path: Path, optimizer: torch.optim.Optimizer) -> ResumeState:
    """Puts the optimiser back to where a snapshot was taken, and says where that was; its weights are read like others.

    Raises:
        WeightsError: see `check_whole`; or the training state does not fit the optimiser.
    """
    path, rest = state_path(weights_path), check_whole(weights_path)
    check_version(rest, path)
    if rest["optimizer_class"] != type(optimizer).__name__:
        raise WeightsError(
            f"{path} was written by {rest['optimizer_class']}, the recipe asks for {type(optimizer).__name__}: "
            f"resume with the same train.optimizer"
        )
    # Decay, momentum and whether a step is one kernel are the recipe's to say; older snapshots know no fused AdamW.
    for stored, own in zip(rest["optimizer"]["param_groups"], optimizer.param_groups, strict=False):
        stored.update({name: value for name, value in own.items() if name != "params"})
    try:
        optimizer.load_state_dict(rest["optimizer"])
    except ValueError as error:
        raise WeightsError(
            f"{path} does not fit the trainable parameters of this network ({error}): resume with the same recipe"
        ) from error
    return ResumeState(rest["iteration"], rest["seed"], rest["scaler"], rest.get("raw_weights", {}))


def complete_snapshots(folder: Path) -> list[str]:
    """Names of the weight files in a folder beside which the training state lies, too, in the order of steps."""
    paths = [path for path in folder.glob("*.pth") if state_path(path).is_file()]
    return [path.name for path in sorted(paths, key=lambda path: (len(path.name), path.name))]


def _advice(missing: Path) -> str:
    complete = complete_snapshots(missing.parent)
    if not complete:
        return f"there is none in {missing.parent}, train from the start without train.resume"
    return f"set train.begin_iteration to that of a complete one ({', '.join(complete)})"


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}): check the path") from error


def _serialised(content: dict[str, Any]) -> memoryview:
    # In memory first: a full disk then shows as an OSError of Python's own write, and equal content gives equal bytes.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def _replace_pair(weights_path: Path, weights: memoryview, rest: memoryview) -> None:
    temporaries = [write_temporary(weights_path, weights)]
    try:
        temporaries.append(write_temporary(state_path(weights_path), rest))
        # An old state must not seem to belong to the new weights, should we be stopped between the two renames.
        state_path(weights_path).unlink(missing_ok=True)
        os.replace(temporaries[0], weights_path)
        os.replace(temporaries[1], state_path(weights_path))
    except OSError:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(weights_path.parent)
