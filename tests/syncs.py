"""Counts what would make the host wait for a device, on a machine that has none.

    with count_syncs() as syncs:
        network(batch)
    assert syncs.counts["nonzero"] <= 2, syncs

Counted by name: operators whose result's shape or value the host must know (`nonzero`, `unique`, indexing with a mask,
…), what is read from tensors (`item`, `tolist`, `bool`, `cpu`, …; `numpy` takes tensors of the host alone), and
constants that are built for a given device (`tensor`, `new_tensor`: their copy waits as well).

What it cannot see: which tensors would lie on the device, since all lie on the CPU here. What is read from tensors that
always live on the host is counted too; `places` tells where in the package each call stands, to tell them apart.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"}
CONSTANTS = {"tensor", "as_tensor", "new_tensor"}
DATA_DEPENDENT = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nms",  # torchvision's
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
PACKAGE = str(Path(__file__).resolve().parent.parent / "upsnet")


class Syncs:
    """counts: calls by name. places: calls by name and by the line of the package that they come from."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()
        self.silent = False

    def __len__(self) -> int:
        return self.counts.total()

    def __repr__(self) -> str:
        return "\n".join(f"{count:4d} {name:20s} {place}" for (name, place), count in sorted(self.places.items()))

    def add(self, name: str) -> None:
        if not self.silent:
            self.counts[name] += 1
            self.places[name, _place()] += 1

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Counts a call as one, whatever is inside it."""
        self.add(name)
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before


def _place() -> str:
    """The innermost line of the package that is being run; else of whoever called."""
    frame = sys._getframe(2)
    first = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).relative_to(PACKAGE)}:{frame.f_lineno}"
        if first is None and name not in (__file__, contextlib.__file__) and "torch" not in Path(name).parts:
            first = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return first or "?"


class _Calls(TorchFunctionMode):
    """What Python calls: reading a CPU tensor and copying it to the CPU passes no operator."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        copies = name == "to" and "cpu" in (*args[1:], kwargs.get("device"))
        counted = name in READS or copies or (name in CONSTANTS and (name == "new_tensor" or "device" in kwargs))
        with self.syncs.one(name.strip("_")) if counted else nullcontext():
            return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """What the operators do."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in DATA_DEPENDENT or _by_mask(name, args) or _unknown_length(func, kwargs):
            self.syncs.add(name.strip("_"))
            return func(*args, **kwargs)
        with self:  # in inference mode composite operators arrive whole
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _by_mask(name, args) -> bool:
    """Whether an indexing takes a mask. A mask that a single number is written through becomes `masked_fill`."""
    if name not in INDEXING:
        return False
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    fills = "put" in name and args[2].numel() == 1 and args[2].dim() == 0
    return bool(masks) and not fills


def _unknown_length(func, kwargs) -> bool:
    return func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


@contextmanager
def count_syncs() -> Iterator[Syncs]:
    """Counts within the block and this thread; the results are those of a plain run."""
    syncs = Syncs()
    with _Operators(syncs), _Calls(syncs):
        yield syncs
