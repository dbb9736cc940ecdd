"""Is a COCO tree complete and whole? Every kind of fault once, with its number and the first offenders.

Headers of all photos and labels are read, nothing is decoded; a deep check decodes everything and holds each label
against the json. The jsons are read as for training, so that their indexes are kept where they are large.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from upsnet.dataset.annotated_set import AnnotatedSet
from upsnet.dataset.image_sets import ImageSet, UnlabelledImageSet, coco_image_sets
from upsnet.dataset.index import ImageIndex, index_images
from upsnet.dataset.index_cache import IndexCache
from upsnet.dataset.photo_set import PhotoSet, photo_folder
from upsnet.dataset.shards import Member, open_shards
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import photo_size, png_size, read_photo, read_segment_map

SOURCE = "http://images.cocodataset.org"
OFFICIAL_COUNTS = {"train2017": 118287, "val2017": 5000, "test2017": 40670, "test-dev2017": 20288}

Item = TypeVar("Item")
Result = TypeVar("Result")

_SHOWN = 3
_BATCH = 256
_THREADS = 8
"""More than cores: a thread mostly waits for the disk."""


@dataclass(slots=True)
class SetReport:
    """What was found out about one image set. photos: how many its json lists; None: there is none that can be read."""

    name: str
    photos: int | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_fault(self, offenders: Sequence[str], what: str, advice: str) -> None:
        """One kind of fault, if there are offenders."""
        if offenders:
            self.faults.append(f"{_counted(offenders, what)}: {advice}")

    def add_note(self, offenders: Sequence[str], what: str) -> None:
        """The same for something that does no harm."""
        if offenders:
            self.notes.append(_counted(offenders, what))


def check_coco(root: Path, deep: bool = False) -> list[SetReport]:
    """Checks train2017 and val2017, and the test sets if something of them is there. Shows progress.

    Args:
        deep: also decode every photo and label, and compare the segments of each label with the json.

    Raises:
        DataError: there is no such folder.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: there is no such folder: make it, or a link of that name to COCO's images/ and annotations/; "
            f"./init_coco.sh --help says where to get them"
        )
    reports = [_check_labelled(root, name, deep) for name in ("train2017", "val2017")]
    tests = [_check_unlabelled(root, name, deep) for name in ("test2017", "test-dev2017")]
    there = [report for report in tests if report.photos is not None or report.faults]
    return reports + (there or tests[:1])


def _check_labelled(root: Path, name: str, deep: bool) -> SetReport:
    report = SetReport(name)
    (files,) = coco_image_sets(root, name)
    if not isinstance(files, ImageSet):  # there is an image_info json, which is no label
        annotations = root / "annotations"
        files = ImageSet(annotations / f"panoptic_{name}.json", annotations / f"panoptic_{name}", files.image_dir)
    if files.shards is None:
        _check_presence(root, name, files, report)
    else:
        _check_shards(files.shards, report)
    if files.panoptic_json.is_file():
        cache = IndexCache(files.index_dir)
        try:
            categories, index = cache.panoptic(files.panoptic_json)
        except DataError as error:
            report.faults.append(str(error))
        else:
            _compare_count(report, len(index))
            _check_pictures(_PHOTOS, files.image_dir, index.photo_names, index, report)
            _check_pictures(_LABELS, files.png_dir, index.png_names, index, report)
            try:
                if files.instances_json is not None:
                    cache.instances(files.instances_json, categories, index)
            except DataError as error:
                report.faults.append(str(error))
    if deep and not report.faults:
        _check_deeply(AnnotatedSet(files), report)
    unused = [each for each in ("_stff.json", "_semantic_trainid_stff") if _of_original(root, name, each).exists()]
    report.add_note(
        [_of_original(root, name, each).name for each in unused], "files that the original's preparation made, not used"
    )
    return report


def _check_unlabelled(root: Path, name: str, deep: bool) -> SetReport:
    """COCO's test photos. A tree without them is ready all the same."""
    report = SetReport(name)
    (files,) = coco_image_sets(root, name)
    if not isinstance(files, UnlabelledImageSet):
        report.notes.append(f"has labels of its own ({files.panoptic_json}), which are not checked here")
        return report
    if not files.info_json.is_file():
        report.notes.append(
            f"is not there; for submissions unpack {SOURCE}/annotations/image_info_test2017.zip in {root} and "
            f"{SOURCE}/zips/test2017.zip in {root / 'images'}"
        )
        return report
    if files.shards is not None:
        _check_shards(files.shards, report)
    elif not files.image_dir.is_dir():
        report.faults.append(_missing_photos(root, files.image_dir))
    try:
        index = index_images(files.info_json)
    except DataError as error:
        report.faults.append(str(error))
        return report
    _compare_count(report, len(index))
    _check_pictures(_PHOTOS, files.image_dir, index.photo_names, index, report)
    if deep and not report.faults:
        _check_deeply(PhotoSet(photo_folder(files), index), report)
    return report


# -- what is there -----------------------------------------------------------------------------------------------------


def _check_presence(root: Path, name: str, files: ImageSet, report: SetReport) -> None:
    annotations, panoptic = root / "annotations", f"{SOURCE}/annotations/panoptic_annotations_trainval2017.zip"
    if not files.image_dir.is_dir():
        report.faults.append(_missing_photos(root, files.image_dir))
    if not files.panoptic_json.is_file():
        report.faults.append(f"{files.panoptic_json}: is not there: unpack {panoptic} in {root}")
    if not files.png_dir.is_dir():
        packed = files.png_dir.with_suffix(".zip")
        first = "" if packed.is_file() else f"unpack {panoptic} in {root}, then "
        report.faults.append(f"{files.png_dir}: is not there: {first}unpack {packed} in {annotations}")
    if files.instances_json is None:
        report.faults.append(
            f"{annotations / f'instances_{name}.json'}: is not there: "
            f"unpack {SOURCE}/annotations/annotations_trainval2017.zip in {root}"
        )


def _check_shards(index: Path, report: SetReport) -> None:
    """Reads all of them, since nothing less shows a changed byte."""
    try:
        shards = open_shards(index)
    except DataError as error:
        report.faults.append(str(error))
        return

    def is_damaged(member: Member) -> bool:
        try:
            member.read_bytes()
        except DataError:
            return True
        return False

    members = [*shards.photos.members(), *(shards.labels.members() if shards.labels else [])]
    marks = zip(members, _in_threads(is_damaged, members, f"{report.name} shards"), strict=True)
    report.add_fault(
        [str(member) for member, bad in marks if bad], "files in shards that are damaged", "copy these tars"
    )


def _missing_photos(root: Path, folder: Path) -> str:
    other = root / folder.name
    if other.is_dir():
        return f"{folder}: is not there, but {other} is: move it, or make a link to it, in {folder.parent}"
    return f"{folder}: is not there: unpack {SOURCE}/zips/{folder.name}.zip in {folder.parent}"


def _of_original(root: Path, name: str, ending: str) -> Path:
    """What the original UPSNet's preparation writes."""
    return root / "annotations" / f"panoptic_{name}{ending}"


def _compare_count(report: SetReport, photos: int) -> None:
    report.photos = photos
    official = OFFICIAL_COUNTS[report.name]
    if photos < official:
        report.notes.append(f"a subset: the official set has {official} photos")
    elif photos > official:
        report.notes.append(f"more than the official set, which has {official} photos")


# -- files and json ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of picture: the size in its header, and its reader, which refuses another size than that given."""

    name: str
    size_of: Callable[[Path], tuple[int, int]]
    read: Callable[[Path, tuple[int, int]], object]


_PHOTOS = _Kind("photos", photo_size, read_photo)
_LABELS = _Kind("label PNGs", png_size, read_segment_map)


def _check_pictures(kind: _Kind, folder: Path, names: Sequence[str], index: ImageIndex, report: SetReport) -> None:
    """Compares what the json names with what lies in the folder, both ways, and the sizes."""
    if not folder.is_dir():
        return
    named, there = list(names), set(_files_below(folder))
    advice = f"copy or unpack them again in {folder}"
    report.add_fault([name for name in named if name not in there], f"{kind.name} that are not there", advice)
    sizes = zip(index.heights.tolist(), index.widths.tolist(), strict=True)
    present = [(folder / name, size) for name, size in zip(named, sizes, strict=True) if name in there]
    damaged: list[str] = []
    of_other_size: list[str] = []

    def stored_size(picture: tuple[Path, tuple[int, int]]) -> tuple[int, int] | None:
        try:
            return kind.size_of(picture[0])
        except DataError:
            return None

    title = f"{report.name} {kind.name}"
    for (path, size), stored in zip(present, _in_threads(stored_size, present, title), strict=True):
        if stored is None:
            damaged.append(str(path.relative_to(folder)))
        elif stored != size and not _can_be_read(kind, path, size):
            of_other_size.append(f"{path.relative_to(folder)} ({stored[0]}×{stored[1]}, json {size[0]}×{size[1]})")
    report.add_fault(damaged, f"{kind.name} that are damaged or cut off", advice)
    report.add_fault(of_other_size, f"{kind.name} of another size than the json says", advice)
    if report.name != "test-dev2017":  # its photos are a part of test2017's
        report.add_note(sorted(there.difference(named)), f"files in {folder} that no json names, not used")


def _can_be_read(kind: _Kind, path: Path, size: tuple[int, int]) -> bool:
    """A photo of another size is turned to the right one if its EXIF record says so."""
    try:
        kind.read(path, size)
    except DataError:
        return False
    return True


def _check_deeply(photos: PhotoSet, report: SetReport) -> None:
    def fault(row: int) -> str | None:
        try:
            if isinstance(photos, AnnotatedSet):
                photos.labels(row)
            photos.photo(row)
        except DataError as error:
            return str(error)
        return None

    rows = range(len(photos.index))
    found = [sentence for sentence in _in_threads(fault, rows, f"{report.name} deep") if sentence]
    report.add_fault(found, "images damaged inside, or with labels that contradict the json", "copy them again")


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """The results in order, with a progress bar."""
    batches = [items[first : first + _BATCH] for first in range(0, len(items), _BATCH)]
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(items), desc=title, unit="file", leave=False) as bar:
        for results in pool.map(lambda batch: [work(item) for item in batch], batches):
            bar.update(len(results))
            yield from results


def _files_below(folder: Path) -> Iterable[str]:
    """Paths below a folder, as jsons name them."""

    def stop(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=stop):
        inner = Path(place).relative_to(folder).as_posix()
        yield from names if inner == "." else (f"{inner}/{name}" for name in names)


def _counted(offenders: Sequence[str], what: str) -> str:
    first = "first " if len(offenders) > _SHOWN else ""
    return f"{what}: {len(offenders)} ({first}{', '.join(offenders[:_SHOWN])})"
