"""Training throughput of two workers against one: `python benchmarks/throughput.py [--out table.md] [--rounds 1]`.

Every worker is pinned, with its loader process, to one core of its own. What runs is the training command itself on
the shapes recipe, each worker with the recipe's batch; times of steps come from its metrics.jsonl. Two workers are
started by torchrun (DDP over Gloo) and, where Horovod is installed, by horovodrun. Two more runs tell what the machine
allows: two single workers side by side, which exchange nothing and wait for nobody, and an all-reduce of the gradients'
bytes between the same two cores. `benchmarks/scaling.py` predicts from the steps, which --out also writes as json.
"""

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.operators import parser_of, positive, processor, show
from upsnet import builders
from upsnet.config import Recipe, load_recipe
from upsnet.dataset.shapes import write_shapes

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "upsnet_resnet18_shapes"
WARM_UP, IMAGES = 5, 160
FLOOR = 1.7
PLAIN, SIDE_BY_SIDE = "plain", "side by side"
LAUNCHERS = {
    PLAIN: [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "horovodrun": [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", "2", sys.executable],
}
PINNED, ALL_REDUCE = "pinned", "all-reduce"
"""First words of the command line of a worker."""


@dataclass(frozen=True)
class Measured:
    """Seconds of each step, by launcher; of `SIDE_BY_SIDE` those of both workers. all_reduce: seconds of one."""

    steps: dict[str, list[float]]
    all_reduce: float
    gradient_bytes: int
    batch: int

    def seconds(self, way: str) -> float:
        return statistics.median(self.steps[way])

    def gain(self, way: str) -> float:
        """Images a second of two workers over those of one."""
        return 2 * self.seconds(PLAIN) / self.seconds(way)


def pin() -> None:
    """Keeps this process, and what it will start, to one core: the one with the worker's number on this machine."""
    local_rank = int(os.environ.get("HOROVOD_LOCAL_RANK", os.environ.get("LOCAL_RANK", "0")))
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[local_rank]})


def all_reduce(number_of_bytes: int, rounds: int) -> None:
    """A worker's part of the timing; worker 0 prints the seconds of each round after the first."""
    dist.init_process_group("gloo")
    gradients = torch.zeros(number_of_bytes // 4)
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps(seconds[1:]))
    dist.destroy_process_group()


def start(launcher: str, *words: object, core: int = 0) -> "subprocess.Popen[str]":
    """This file as a launcher's workers; a plain one on the given core."""
    # Sleeping threads, one a worker: the core belongs to its loader, too.
    environment = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "LOCAL_RANK": str(core),
    }
    return subprocess.Popen(
        [*LAUNCHERS[launcher], __file__, *map(str, words)], cwd=ROOT, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def printed(process: "subprocess.Popen[str]") -> str:
    """What it prints until it ends well."""
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args}: exit code {process.returncode}\n{err}")
    return out


def start_training(launcher: str, recipe: Recipe, folder: Path, steps: int, core: int = 0) -> "subprocess.Popen[str]":
    return start(
        launcher, PINNED, ROOT / "upsnet/upsnet_end2end_train.py", "--cfg", RECIPE, f"output_path={folder}",
        f"dataset.dataset_path={recipe.dataset.dataset_path}", f"train.max_iteration={WARM_UP + steps}",
        f"train.snapshot_step={WARM_UP + steps}", "train.display_iter=1",
        f"train.total_batch={workers_of(launcher) * recipe.train.batch_size}",
        f"train.use_horovod={str(launcher == 'horovodrun').lower()}", core=core,
    )  # fmt: skip


def workers_of(way: str) -> int:
    return 1 if way == PLAIN else 2


def step_seconds(images: int, folder: Path) -> list[float]:
    """Seconds of each step of so many images after the warm-up, by the command's own metrics.jsonl."""
    (metrics,) = folder.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][WARM_UP:]
    shutil.rmtree(folder)
    return [images / line["images_per_second"] for line in lines]


def run_all(recipe: Recipe, folder: Path, steps: int) -> dict[str, list[float]]:
    """The seconds of one round, by launcher and side by side."""
    found, batch = {}, recipe.train.batch_size
    for launcher in launchers_here():
        printed(start_training(launcher, recipe, folder, steps))
        found[launcher] = step_seconds(workers_of(launcher) * batch, folder)
    folders = [folder / str(core) for core in range(2)]
    for process in [start_training(PLAIN, recipe, own, steps, core) for core, own in enumerate(folders)]:
        printed(process)
    found[SIDE_BY_SIDE] = [seconds for own in folders for seconds in step_seconds(batch, own)]
    return found


def launchers_here() -> list[str]:
    return [name for name in LAUNCHERS if name != "horovodrun" or find_spec("horovod")]


def measure(steps: int = 20, rounds: int = 1) -> Measured:
    """Launchers take turns, so that a load on the machine meets all of them."""
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two workers want two cores: this process may use one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shapes(folder / "shapes", IMAGES, 8, 1)
        recipe = load_recipe(RECIPE, [f"dataset.dataset_path={folder / 'shapes'}"])
        network = builders.build_network(recipe, builders.build_training_set(recipe).categories)
        gradient_bytes = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
        found: dict[str, list[float]] = {}
        for _ in tqdm(range(rounds), desc="rounds"):
            for way, seconds in run_all(recipe, folder / "out", steps).items():
                found[way] = found.get(way, []) + seconds
        alone = json.loads(printed(start("torchrun", ALL_REDUCE, gradient_bytes, 2 * steps)))
    return Measured(found, statistics.median(alone), gradient_bytes, recipe.train.batch_size)


def table(measured: Measured, steps: int, rounds: int) -> str:
    megabytes = measured.gradient_bytes / 1e6
    lines = [
        "# Throughput of two workers against one",
        "",
        f"{datetime.date.today()}, {processor()}, load of the machine {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        f"Recipe {RECIPE}, {measured.batch} images a worker and step, float32; every worker pinned with its",
        f"loader process to one core; medians of {rounds * steps} steps after {WARM_UP}. Gradients: {megabytes:.1f} MB",
        f"a step; an all-reduce of them between the two cores, alone: {1e3 * measured.all_reduce:.0f} ms.",
        "Side by side: two single workers that exchange nothing. That is the most that the machine's memory allows;",
        "that a step waits for the slower worker is not in it.",
        "",
        "| workers | started by | step, ms | images/s | against one |",
        "|---|---|---|---|---|",
    ]
    for way in measured.steps:
        workers, seconds = workers_of(way), measured.seconds(way)
        floor = f" (floor {FLOOR})" if way in LAUNCHERS else ""
        gain = "" if workers == 1 else f"{measured.gain(way):.2f} ×{floor}"
        lines.append(f"| {workers} | {way} | {1e3 * seconds:.0f} | {workers * measured.batch / seconds:.2f} | {gain} |")
    if "horovodrun" not in measured.steps:
        lines += ["", "Horovod is not installed here: not run."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__ or "", rounds=1, devices=())
    parser.add_argument("--steps", type=positive, default=20, help="measured in each round, default 20")
    options = parser.parse_args()
    measured = measure(options.steps, options.rounds)
    show(table(measured, options.steps, options.rounds), options.out)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(asdict(measured)) + "\n")


def work(what: str, words: Sequence[str]) -> None:
    """A worker."""
    pin()
    if what == PINNED:
        os.execv(sys.executable, [sys.executable, *words])
    all_reduce(*map(int, words))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in (PINNED, ALL_REDUCE):
        work(sys.argv[1], sys.argv[2:])
    else:
        main()
