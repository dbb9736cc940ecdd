"""Putting the tensors of a weight file into a network, and saying what became of each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from torch import Tensor, nn

from upsnet.checkpoints.class_rows import cityscapes_rows
from upsnet.checkpoints.files import Kind, WeightFile
from upsnet.structures.categories import Categories
from upsnet.structures.errors import WeightsError

_COUNTER = ".num_batches_tracked"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a file's tensors.

    loaded: names that were copied. left_out: tensors of the file that were not used. initialised: tensors of the
    network that the file does not give and that stay as they were. `other_shape` maps names that are in both, and
    hence in the two latter lists, to the shapes in file and network. drawn_classes: classes whose rows were drawn at
    random while all others were taken from classes of the file; None where rows were copied as they are.
    """

    loaded: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    drawn_classes: list[str] | None = None

    @property
    def missing(self) -> list[str]:
        """Tensors of the network that the file does not have."""
        return [name for name in self.initialised if name not in self.other_shape]

    @property
    def unknown(self) -> list[str]:
        """Tensors of the file that the network does not have."""
        return [name for name in self.left_out if name not in self.other_shape]

    def differences(self) -> str:
        """The first differences in words, empty if the file gave exactly what the network wants."""
        parts = [
            (self.missing, "missing", _first(self.missing)),
            (self.unknown, "unknown here", _first(self.unknown)),
            (self.other_shape, "of another shape", _first(self._shapes("{}, here {}"))),
        ]
        return "; ".join(f"{len(names)} {what}: {shown}" for names, what, shown in parts if names)

    def lines(self) -> list[str]:
        """The report in a few lines, whatever the number of tensors."""
        lines = [f"loaded: {_grouped(self.loaded)}"]
        if self.drawn_classes is not None:
            lines.append(f"class rows: from COCO's nearest classes, random for {', '.join(self.drawn_classes)}")
        if self.other_shape:
            lines.append(f"of another size, so initialised anew: {_first(self._shapes('{} → {}'), _SHOWN)}")
        if self.missing:
            lines.append(f"missing, so initialised anew: {_grouped(self.missing)}")
        if self.unknown:
            lines.append(f"not used: {_grouped(self.unknown)}")
        return lines

    def _shapes(self, form: str) -> list[str]:
        return [f"{name} ({form.format(_shape(file), _shape(own))})" for name, (file, own) in self.other_shape.items()]


def compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LoadReport:
    """Which tensors of `state` fit into `own` by name and shape; either side may lack `num_batches_tracked`."""
    report = LoadReport()
    for name, tensor in state.items():
        if name in own and tensor.shape == own[name].shape:
            report.loaded.append(name)
        elif not name.endswith(_COUNTER):
            report.left_out.append(name)
            if name in own:
                report.other_shape[name] = tuple(tensor.shape), tuple(own[name].shape)
    loaded = set(report.loaded)
    report.initialised.extend(name for name in own if name not in loaded and not name.endswith(_COUNTER))
    return report


def load_into(network: nn.Module, state: Mapping[str, Tensor], source: str, strict: bool = True) -> LoadReport:
    """Copies tensors into the network's parameters and buffers of the same name and shape.

    Args:
        source: the file's name, for messages.
        strict: the two must agree in all names and shapes.

    Raises:
        WeightsError: strict and they do not agree; then the network is unchanged.
    """
    report = compare(network.state_dict(), state)
    if strict and (difference := report.differences()):
        raise WeightsError(f"{source} belongs to another network ({difference}): use the recipe it was trained with")
    network.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def load_pretrained(network: nn.Module, file: WeightFile, categories: Categories, seed: int) -> LoadReport:
    """Starts a network from a ResNet or from a trained UPSNet.

    The backbone must fit; offsets of deformable layers may be missing and then stay initialised. Of the rest everything
    goes in that fits by name and shape, so layers that depend on the classes stay initialised where the counts differ.
    From COCO's classes to those of Cityscapes, rows are taken over class by class.

    Args:
        categories: the network's classes. seed: of rows for classes that COCO does not have.

    Raises:
        WeightsError: the file is something else, or its backbone another one; then the network is unchanged.
    """
    if file.kind is Kind.UNKNOWN:
        names = _first(list(file.state))
        raise WeightsError(f"{file.path} is neither a ResNet nor an UPSNet ({names}): use another file")
    state, drawn = file.state, None
    if rows := cityscapes_rows(file, categories, seed):
        state, drawn = {**state, **rows.tensors}, rows.drawn_classes
    report = compare(network.state_dict(), state)
    if wrong := backbone_differences(report):
        raise WeightsError(
            f"{file.path} has another backbone than this recipe ({len(wrong)} tensors differ, the first: {wrong[0]}): "
            f"set symbol to the file's depth or network.pretrained to another file"
        )
    report = load_into(network, state, str(file.path), strict=False)
    return replace(report, drawn_classes=drawn)


def backbone_differences(report: LoadReport) -> list[str]:
    """Tensors of the backbone that are on one side only, or of another shape; offsets of deformable layers may be."""
    names = dict.fromkeys([*report.initialised, *report.left_out])
    return [name for name in names if name.startswith("backbone.") and ".offset." not in name]


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _grouped(names: Iterable[str]) -> str:
    """Tensors by the part of the network: `backbone (265), fpn.global_average (2)`."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name.split(".")[:-1])
    return ", ".join(f"{_common(layers)} ({len(layers)})" for layers in groups.values()) or "nothing"


def _common(layers: list[list[str]]) -> str:
    """The longest name that all layers begin with."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*layers, strict=False))
    return ".".join(parts[0] for parts in same)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
