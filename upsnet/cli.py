"""The command `upsnet`: arguments in, one call down, errors out as one sentence."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upsnet.structures.errors import Stopped, UserError

if TYPE_CHECKING:
    from upsnet.config import Recipe

USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130
"""Exit codes. 2: something that the user can mend (argparse uses the same). 75: a training that a signal has stopped
after a snapshot, to be started again with train.resume=auto (EX_TEMPFAIL of sysexits.h). 130: Ctrl-C elsewhere."""

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
"""How a change to the recipe begins. A photo of such a name can be given as `./a=b.jpg`."""

logger = logging.getLogger("upsnet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code."""
    return run(_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parses and runs; `action` in the parsed arguments is what runs."""
    options = _parse(parser, arguments)
    # Threads that spin while they wait make torch many times slower as soon as anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options.action(options)
    except UserError as error:
        if not error.told:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except Stopped:
        return STOPPED
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Lets overrides and photos stand on both sides of options, where argparse takes only their first group."""
    options, rest = parser.parse_known_args(arguments)
    takes_overrides, takes_photos = hasattr(options, "overrides"), hasattr(options, "photos")
    for word in rest:
        is_override = takes_overrides and OVERRIDE.match(word)
        if word.startswith("-") or not (is_override or takes_photos):
            what = ": a change to the recipe has the form key=value" if takes_overrides else ""
            parser.error(f"unrecognized argument '{word}'{what}")
    if takes_photos:
        words = [*options.photos, *rest]
        options.overrides = [word for word in words if OVERRIDE.match(word)]
        options.photos = [Path(word) for word in words if not OVERRIDE.match(word)]
        if not options.photos:
            parser.error("give at least one PHOTO")
    elif takes_overrides:
        options.overrides += rest
    return options


def training_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of `upsnet_end2end_train.py`."""
    parser = argparse.ArgumentParser(prog=prog, description="Train a recipe.")
    _add_training(parser)
    return parser


def testing_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of `upsnet_end2end_test.py`."""
    parser = argparse.ArgumentParser(prog=prog, description="Test trained weights and score the results.")
    _add_testing(parser)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="upsnet", description="Panoptic segmentation: train, test, predict, score.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, fill: Callable[[argparse.ArgumentParser], None], text: str) -> None:
        fill(commands.add_parser(name, help=text, description=text))

    add("train", _add_training, "train a recipe")
    add("test", _add_testing, "test trained weights and score the results")
    add("predict", _add_predict, "segment photos")
    add("evaluate", _add_evaluate, "score COCO panoptic files; PNG folders lie beside the json files")
    add("submission", _add_submission, "pack the results of a test for the evaluation server of COCO or Cityscapes")
    add("report", _add_report, "write a page with scores, curves and a gallery of a tested recipe")
    add("weights", _add_weights, "say what a weight file is and which recipes it fits, or write it in another form")
    add("shapes", _add_shapes, "write the synthetic data set")
    add("demo", _add_demo, "make shapes, train on it, test, write the report")
    add("prepare", _add_prepare, "check a data set as its owners give it out and make it ready")
    add("download-weights", _add_download_weights, "download weight files; without an argument, list them")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    _add_cfg(parser)
    _add_overrides(parser)


def _add_cfg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", required=True, metavar="YAML", help="a recipe: yaml file, or name of a shipped one")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. train.lr=0.005 test.scales=[480]"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    # The original has one parser for both scripts, so command lines may carry these to a training.
    parser.add_argument("--weight_path", default="", help=argparse.SUPPRESS)
    parser.add_argument("--eval_only", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(action=_train)


def _add_testing(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--weight_path", default="", metavar="FILE", help="weights; default: the recipe's last snapshot"
    )
    parser.add_argument("--eval_only", action="store_true", help="score the results that an earlier test stored")
    parser.set_defaults(action=_test)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_cfg(parser)
    parser.add_argument("--weight_path", required=True, metavar="FILE", help="weights")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="photos; and changes to the recipe, as key=value")
    parser.set_defaults(action=_predict, overrides=[])


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pred", required=True, type=Path, metavar="JSON", help="predictions")
    parser.add_argument("--gt", required=True, type=Path, metavar="JSON", help="ground truth")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where to write the summary")
    parser.add_argument("--boundary", action="store_true", help="boundary panoptic quality as well")
    parser.add_argument(
        "--official",
        action="store_true",
        help="where the ground truth contradicts itself, give the official tool's number instead of refusing",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one for every core")
    parser.set_defaults(action=_evaluate)


def _add_submission(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="of the method, for COCO's file names; default: the recipe's name"
    )
    parser.set_defaults(action=_submission)


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: `report` beside the results")
    parser.set_defaults(action=_report)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="weights of any kind: UPSNet's or a ResNet's")
    parser.add_argument(
        "--to",
        choices=("original", "safetensors"),
        help="write an UPSNet's weights: original: a state_dict under the names of the released files; safetensors: "
        "our names, with class table and recipe",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="where to write; default: beside FILE")
    parser.set_defaults(action=_weights)


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--train", type=int, default=1500, metavar="N", help="training images, default 1500")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation images, default 100")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="default 1")
    parser.set_defaults(action=_shapes)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser)
    parser.set_defaults(action=_demo)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="data sets", required=True, metavar="DATASET")

    def add(name: str, fill: Callable[[argparse.ArgumentParser], None], text: str) -> None:
        fill(kinds.add_parser(name, help=text, description=text))

    add("coco", _add_prepare_coco, "check a COCO tree; nothing is downloaded, no file of it is changed")
    add("cityscapes", _add_prepare_cityscapes, "check a Cityscapes tree and add what training and testing read")


def _add_prepare_coco(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, default=Path("data/coco"), metavar="PATH", help="default data/coco"
    )
    parser.add_argument(
        "--deep", action="store_true", help="also decode every photo and label, and hold labels against the json"
    )
    parser.add_argument(
        "--shards",
        type=Path,
        metavar="DIR",
        help="write it to DIR as a few large tar files (webdataset's layout), from which recipes read as well",
    )
    parser.set_defaults(action=_prepare_coco)


def _add_prepare_cityscapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, default=Path("data/cityscapes"), metavar="PATH", help="default data/cityscapes"
    )
    parser.set_defaults(action=_prepare_cityscapes)


def _add_download_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="imagenet, torchvision, coco or cityscapes; or the name of one file"
    )
    parser.add_argument("--out", type=Path, default=Path("model"), metavar="DIR", help="default: model")
    parser.add_argument("--if-online", action="store_true", help="without a network, say so and leave it at that")
    parser.epilog = "UPSNET_WEIGHTS_URL: a folder on the web that has the files under their names, asked first."
    parser.set_defaults(action=_download_weights)


# The commands are imported when one runs, so that neither `--help` nor a misspelt recipe waits for torch.


def _recipe(options: argparse.Namespace) -> "Recipe":
    from upsnet.config import load_recipe

    return load_recipe(options.cfg, options.overrides)


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from upsnet import commands

    if options.weight_path:
        logger.warning(
            "--weight_path %s is for testing and is not used: training starts from network.pretrained (%s)",
            options.weight_path,
            recipe.network.pretrained or "null: from scratch",
        )
    commands.launch_on_several_gpus(recipe, for_training=True)
    commands.train(recipe)


def _test(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from upsnet import commands

    if not options.eval_only:
        commands.launch_on_several_gpus(recipe, for_training=False)
    commands.test(recipe, Path(options.weight_path) if options.weight_path else None, options.eval_only)


def _predict(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from upsnet import commands

    commands.predict(recipe, Path(options.weight_path), options.photos, options.out)


def _evaluate(options: argparse.Namespace) -> None:
    from upsnet import commands

    commands.evaluate(options.pred, options.gt, options.out, options.official, options.boundary, options.workers)


def _submission(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from upsnet import commands

    commands.submission(recipe, options.name)


def _report(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from upsnet import commands

    commands.report(recipe, options.out)


def _weights(options: argparse.Namespace) -> None:
    from upsnet import commands

    commands.weights(options.file, options.to, options.out)


def _shapes(options: argparse.Namespace) -> None:
    from upsnet import commands

    commands.shapes(options.out, options.train, options.val, options.seed)


def _demo(options: argparse.Namespace) -> None:
    from upsnet import commands

    commands.demo(options.overrides)


def _prepare_coco(options: argparse.Namespace) -> None:
    from upsnet import commands

    if options.shards:
        commands.shard_coco(options.path, options.shards)
    else:
        commands.prepare_coco(options.path, options.deep)


def _prepare_cityscapes(options: argparse.Namespace) -> None:
    from upsnet import commands

    commands.prepare_cityscapes(options.path)


def _download_weights(options: argparse.Namespace) -> None:
    from upsnet.checkpoints.download_weights import download_weights

    download_weights(options.what, options.out, options.if_online)
