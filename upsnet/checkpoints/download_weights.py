"""`upsnet download-weights`: the weight files of a group, each from the first source that gives it.

This command lies here and not in `commands/`, since importing those takes longer than it may without a network.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from upsnet.checkpoints.downloads import MIRROR, accept, fault_of, provide, sources_of
from upsnet.checkpoints.manifest import KnownFile, groups, known_files
from upsnet.checkpoints.transfer import Patience, any_answers
from upsnet.structures.errors import WeightsError

MODEL = Path("model")
"""Where the recipes look for weights."""

PROBE = 3.0
"""Seconds to wait for the first answer of any source, where going on without weights is fine."""


def download_weights(what: Sequence[str], folder: Path, if_online: bool) -> None:
    """Downloads groups of the manifest, or single files by name, to `folder`; nothing named: prints what there is.

    Args:
        if_online: where no source answers, one line says so, and that is all.

    Raises:
        WeightsError: no such group or file; or not all of them could be downloaded.
        PlaceError: the folder cannot be written or the disk is full.
    """
    if not what:
        print(_table(folder))
        return
    absent = [file for file in _chosen(what) if not _is_there(file, folder)]
    sources = {file: sources_of(file) for file in absent}
    if if_online and absent and not any_answers({s.url for of_file in sources.values() for s in of_file}, PROBE):
        print(f"weights: no source answers; {_command(absent)} fetches them once there is a network")
        return
    for group in dict.fromkeys(file.group for file in absent):
        print(f"{group}: {groups()[group]}")
    failures = {}
    for file in absent:
        if reasons := provide(file, sources[file], folder, Patience()):
            failures[file] = reasons
        else:
            print(f"{folder / file.path} is downloaded")
    if failures:
        raise WeightsError(_sentence(failures, folder))


def command_for(path: Path) -> str | None:
    """The command line that downloads a file to exactly this place; None: the manifest has no such file."""
    for file in known_files():
        parts = PurePosixPath(file.path).parts
        if path.parts[-len(parts) :] == parts:
            folder = path.parents[len(parts) - 1]
            return _command([file]) + (f" --out {folder}" if folder != MODEL else "")
    return None


def _chosen(what: Sequence[str]) -> list[KnownFile]:
    files = known_files()
    for word in what:
        if word not in groups() and word not in {file.name for file in files}:
            raise WeightsError(
                f"'{word}' is no group of weights and no file of one: choose from {', '.join(groups())}, or a file "
                f"from the list that the command prints when nothing is named"
            )
    return [file for file in files if file.group in what or file.name in what]


def _is_there(file: KnownFile, folder: Path) -> bool:
    fault = fault_of(file, folder)
    if fault is None:
        accept(file, folder)
        print(f"{folder / file.path} is there")
    elif fault != "missing":
        print(f"{folder / file.path} is {fault}")
    return fault is None


def _table(folder: Path) -> str:
    lines = []
    for group, what in groups().items():
        lines.append(f"{group}: {what}")
        for file in known_files():
            if file.group == group:
                fault = fault_of(file, folder)
                lines.append(f"  {folder / file.path}: {fault or 'there'}")
    return "\n".join(lines)


def _sentence(failures: dict[KnownFile, list[str]], folder: Path) -> str:
    told = ", ".join(f"{folder / file.path} ({'; '.join(reasons)})" for file, reasons in failures.items())
    return (
        f"not downloaded: {told}: try again later, put the files at these places yourself, or set {MIRROR} to the "
        f"address of a folder that has them"
    )


def _command(files: Sequence[KnownFile]) -> str:
    return f"./download_weights.sh {' '.join(dict.fromkeys(file.group for file in files))}"
