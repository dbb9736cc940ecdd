"""The commands end to end: what they write, where, and what they say."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.miniature import image_id_of
from tests.tiny import copy_run, upsnet, write_tiny
from upsnet import commands
from upsnet.config import load_recipe
from upsnet.evaluation.coco_files import read_panoptic
from upsnet.structures.categories import Categories

MINUTE = r"\d{4}-\d\d-\d\d-\d\d-\d\d"
LOSSES = ["rpn_cls_loss", "rpn_bbox_loss", "cls_loss", "bbox_loss", "mask_loss", "fcn_loss", "panoptic_loss"]


@pytest.fixture
def recipe(tmp_path):
    return write_tiny(tmp_path)


@pytest.fixture
def done(tiny_run, tmp_path):
    """A copy of the finished run that a test may change."""
    return copy_run(tiny_run, tmp_path)


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(path):
    return torch.load(path, weights_only=True)["weights"]


def step_losses(out):
    return [line["total"] for line in lines_of(out / "tiny/train/metrics.jsonl")]


# -- train -------------------------------------------------------------------------------------------------------------


def test_training_leaves_its_files_where_the_original_does(tiny_run):
    assert tiny_run.trained.code == 0, tiny_run.trained.err
    folder = tiny_run.folder / "out/tiny/train"
    log = only(folder, "*.log")
    assert {path.name for path in folder.iterdir()} == {
        "tiny_1.pth", "tiny_1.state.pth", "tiny_2.pth", "tiny_2.state.pth", "snapshots.json", "metrics.jsonl",
        "first_batch.png", log.name,
    }  # fmt: skip
    assert re.fullmatch(rf"tiny_{MINUTE}\.log", log.name)
    events = only(tiny_run.folder / "out/tensorboard/tiny/train", "*/events*")
    assert re.fullmatch(MINUTE, events.parent.name) and events.stat().st_size > 500


def test_the_log_has_the_lines_of_the_original(tiny_run):
    text = only(tiny_run.folder / "out/tiny/train", "*.log").read_text()
    for line in text.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| \w+\.py \| line \d+: \S", line), line
        assert line in tiny_run.trained.err
    named = "".join(rf"{name}=\d+\.\d+,\t" for name in LOSSES)
    assert re.search(rf": Batch \[1\]\tSpeed: \d+\.\d\d samples/sec\tData: \d+\.\d\d\d sec/sample\tTrain-{named}", text)
    assert re.search(rf": Batch \[2\]\t Epoch\[0\]\tVal-{named}", text)


def test_the_start_is_summed_up(tiny_run):
    err = tiny_run.trained.err
    for said in (
        "running on ", "native operators: ", "6 images (12 entries with mirrored copies)",
        "3 thing and 2 stuff classes", "million are trained", "1 mask_loss, 1 fcn_loss, 0.5 panoptic_loss",
        "total batch 2 = 1 worker × 2 images × 1 micro-batches; 6 steps an epoch, 2 steps in all",
    ):  # fmt: skip
        assert said in err, said
    assert "plain launch" not in err and "train.total_batch" not in err


def test_metrics_hold_a_line_for_each_step_and_validation(tiny_run):
    lines = lines_of(tiny_run.folder / "out/tiny/train/metrics.jsonl")
    steps = [line for line in lines if "lr" in line]
    assert [line["iteration"] for line in steps] == [1, 2]
    assert all({"epoch", "total", "images_per_second", "memory", *LOSSES} <= line.keys() for line in steps)
    (validation,) = [line for line in lines if "lr" not in line]
    assert {"val_total", *(f"val_{name}" for name in LOSSES)} <= validation.keys()


def test_the_first_batch_is_drawn(tiny_run):
    picture = cv2.imread(str(tiny_run.folder / "out/tiny/train/first_batch.png"))
    assert picture.shape[1] >= 2 * 48 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_a_snapshot_holds_weights_classes_and_recipe(tiny_run):
    content = torch.load(tiny_run.weights, weights_only=True)
    assert [c["name"] for c in content["categories"]] == ["grass", "sky", "ball", "box", "kite"]
    assert "model_prefix: tiny_" in content["recipe"] and content["format_version"] == 1


def test_a_resumed_training_ends_with_the_same_weights(tiny_run, done):
    whole = weights_of(tiny_run.weights)
    folder = done.parent / "out/tiny/train"
    for name in ("tiny_2.pth", "tiny_2.state.pth"):
        (folder / name).unlink()
    ran = upsnet("train", "--cfg", done, "train.resume=true", "train.begin_iteration=1")
    assert ran.code == 0 and "resuming after step 1" in ran.err
    resumed = weights_of(folder / "tiny_2.pth")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [line["iteration"] for line in lines_of(folder / "metrics.jsonl")] == [1, 2]


def test_the_same_seed_gives_the_same_weights(tiny_run, recipe):
    """Byte for byte, with loader processes and without."""
    assert upsnet("train", "--cfg", recipe, "dataset.num_workers=1").code == 0
    first, second = weights_of(tiny_run.weights), weights_of(recipe.parent / "out/tiny/train/tiny_2.pth")
    assert all(torch.equal(first[name], second[name]) for name in first)
    upsnet("train", "--cfg", recipe, "seed=7", "train.max_iteration=1")
    third = weights_of(recipe.parent / "out/tiny/train/tiny_1.pth")
    assert not torch.equal(first["box_head.class_logits.weight"], third["box_head.class_logits.weight"])


def test_a_finished_training_is_not_resumed(done):
    ran = upsnet("train", "--cfg", done, "train.resume=true", "train.begin_iteration=2")
    assert ran.code == 2 and "train.max_iteration is 2" in ran.err


def test_a_first_step_without_resume_is_refused(recipe):
    ran = upsnet("train", "--cfg", recipe, "train.begin_iteration=1")
    assert ran.code == 2 and "train.begin_iteration is 1, but train.resume is false" in ran.errors[0]
    assert not (recipe.parent / "out").exists()


def test_snapshots_to_resume_from_are_listed(done):
    ran = upsnet("train", "--cfg", done, "train.resume=true", "train.begin_iteration=5", "train.max_iteration=9")
    assert ran.code == 2 and "tiny_5.pth is missing" in ran.errors[0]
    assert "train.begin_iteration" in ran.errors[0] and "(tiny_1.pth, tiny_2.pth)" in ran.errors[0]


def test_an_earlier_run_is_not_replaced_without_a_word(tiny_run, done):
    folder = done.parent / "out/tiny/train"
    said = f"an earlier run in {folder} is replaced"
    again = upsnet("train", "--cfg", done, "train.max_iteration=1")
    resumed = upsnet("train", "--cfg", done, "train.resume=true", "train.begin_iteration=1")
    assert again.code == resumed.code == 0 and "is replaced" not in resumed.err + tiny_run.trained.err
    assert said in again.err and any(said in log.read_text() for log in folder.glob("*.log"))


@pytest.mark.parametrize(
    "changes, said",
    [
        (["train.lr_schedule=step", "train.decay_iteration=[1]", "train.warmup_iteration=1"], None),
        (["train.decay_iteration=[2]"], None),  # poly has no decay points
        (["train.lr_schedule=step", "train.decay_iteration=[2,3]"], "train.decay_iteration is 2"),
        (["train.warmup_iteration=2"], "train.warmup_iteration is 2"),
    ],
)
def test_a_schedule_for_a_longer_training_is_named(recipe, changes, said):
    ran = upsnet("train", "--cfg", recipe, *changes)
    assert ran.code == 0, ran.err
    warned = [line for line in ran.err.splitlines() if "training ends at step 2" in line]
    assert len(warned) == (said is not None) and all(said in line for line in warned)


def test_missing_pretrained_weights_and_what_to_do(recipe):
    ran = upsnet("train", "--cfg", recipe, "network.pretrained=nowhere.pth")
    (error,) = ran.errors
    assert "network.pretrained: there is no weight file nowhere.pth: put a ResNet-18 there" in error
    keys = re.findall(r"network\.\w+=\w+", error)
    assert len(keys) == 3 and upsnet("train", "--cfg", recipe, *keys, "train.max_iteration=1").code == 0


def test_missing_pretrained_weights_of_the_manifest_name_the_command(recipe, tmp_path):
    ran = upsnet("train", "--cfg", recipe, f"network.pretrained={tmp_path}/pretrained_model/resnet-50-caffe.pth")
    assert ran.code == 2 and f": run ./download_weights.sh imagenet --out {tmp_path}, or train" in ran.errors[0]


def test_pretrained_weights_are_listed(tiny_run, recipe):
    """Of another class table everything but the layers that depend on the classes."""
    ran = upsnet(
        "train", "--cfg", recipe, f"network.pretrained={tiny_run.weights}", "network.mask_feature_dim=24",
        "train.max_iteration=1",
    )  # fmt: skip
    assert ran.code == 0 and "UPSNet, ours, " in ran.err and "loaded: backbone (120), " in ran.err
    assert "of another size, so initialised anew: mask_head.convs.0.conv.weight (16×16×3×3 → 24×16×3×3), " in ran.err


@pytest.mark.parametrize(
    "changes, said, unsaid",
    [
        (["train.use_horovod=true"], ["train.use_horovod is true", "train.total_batch is not set"], ["gpus lists"]),
        (["gpus='0,1,2,3'"], ["gpus lists several devices", "one worker", "train.total_batch"], ["use_horovod"]),
        (["train.use_horovod=true", "train.total_batch=2"], ["one worker"], ["train.total_batch"]),
    ],
)
def test_a_plain_launch_of_a_recipe_for_several_workers_says_so(recipe, changes, said, unsaid):
    # Refused after this has been said, since a step is not what is looked at here.
    ran = upsnet("train", "--cfg", recipe, *changes, "network.pretrained=nowhere.pth")
    assert all(text in ran.err for text in said) and not any(text in ran.err for text in unsaid)


def test_a_recipe_for_one_worker_hears_nothing_about_launches(recipe):
    ran = upsnet("train", "--cfg", recipe, "train.total_batch=2", "train.max_iteration=1")
    assert "total batch 2 = 1 worker × 2 images × 1 micro-batches" in ran.err and "plain launch" not in ran.err


def test_a_total_batch_is_reached_by_accumulation(recipe):
    """1 × 4 and 4 × 1: the same losses and weights, up to rounding; with a norm that does not look at the batch."""
    fixed = ("train", "--cfg", recipe, "network.backbone_with_norm=group_norm")
    whole = upsnet(*fixed, "train.batch_size=4")
    assert whole.code == 0, whole.err
    losses, weights = step_losses(recipe.parent / "out"), weights_of(recipe.parent / "out/tiny/train/tiny_2.pth")
    ran = upsnet(*fixed, "train.batch_size=1", "train.total_batch=4")
    assert "total batch 4 = 1 worker × 1 images × 4 micro-batches; 3 steps an epoch" in ran.err
    assert step_losses(recipe.parent / "out") == pytest.approx(losses, rel=1e-5)
    accumulated = weights_of(recipe.parent / "out/tiny/train/tiny_2.pth")
    for name in weights:
        torch.testing.assert_close(accumulated[name], weights[name], rtol=0, atol=1e-5)


def test_without_shuffling_the_first_images_come_first(recipe):
    ran = upsnet(
        "train", "--cfg", recipe, "train.shuffle=false", "train.max_iteration=1", "train.lr=1.0e-9",
        f"output_path={recipe.parent}/ordered",
    )  # fmt: skip
    assert ran.code == 0
    upsnet("train", "--cfg", recipe, "dataset.limit=2", "train.flip=false", "train.max_iteration=1", "train.lr=1.0e-9")
    assert step_losses(recipe.parent / "ordered") == pytest.approx(step_losses(recipe.parent / "out"), rel=1e-5)


def test_the_limit_counts_images(recipe):
    ran = upsnet("train", "--cfg", recipe, "dataset.limit=2", "train.max_iteration=1", "dataset.num_workers=1")
    assert ran.code == 0 and "data: 2 images (4 entries" in ran.err and "2 steps an epoch" in ran.err


@pytest.mark.parametrize("key, value", [("num_classes", 4), ("num_seg_classes", 5)])
def test_class_counts_of_the_recipe_are_checked(recipe, key, value):
    right, wrong = (
        upsnet("train", "--cfg", recipe, f"dataset.{key}={count}", "network.pretrained=nowhere.pth")
        for count in (value, value + 1)
    )
    assert "nowhere.pth" in right.errors[0]
    assert f"dataset.{key} is {value + 1}" in wrong.errors[0] and "3 thing and 2 stuff classes" in wrong.errors[0]


def test_validation_images_must_have_the_same_classes(recipe):
    path = recipe.parent / "data/annotations/panoptic_val.json"
    path.write_text(path.read_text().replace('"ball"', '"globe"'))
    ran = upsnet("train", "--cfg", recipe, "train.eval_data=true")
    assert ran.code == 2 and "other categories" in ran.errors[0]


# -- test --------------------------------------------------------------------------------------------------------------


def test_testing_stores_results_and_scores(tiny_run):
    assert tiny_run.tested.code == 0, tiny_run.tested.err
    names = {str(path.relative_to(tiny_run.results)) for path in tiny_run.results.rglob("*.*")}
    photos = [f"{image_id_of(i):012d}.png" for i in range(6)]
    assert names == {
        "panoptic.json", "bbox_results.json", "segm_results.json", "index.json", "summary.json",
        *(f"{part}/{name}" for part in ("panoptic", "semantic") for name in photos),
    }  # fmt: skip
    summary = json.loads((tiny_run.results / "summary.json").read_text())
    assert summary.keys() == {"panoptic", "box", "mask", "semantic"}
    assert {"all", "things", "stuff", "per_class"} <= summary["panoptic"].keys()
    assert summary["panoptic"]["all"]["pq"] > 0, "two steps suffice for some stuff"
    for word in ("All", "Things", "Stuff", "AP50", "mIoU"):
        assert word in tiny_run.tested.out
    assert f"testing {tiny_run.weights} on 6 images" in tiny_run.tested.err and "running on " in tiny_run.tested.err


def test_the_log_of_a_test_has_the_scores_of_every_class(tiny_run):
    log = only(tiny_run.results.parent, "*.log")
    assert re.fullmatch(rf"tiny_{MINUTE}\.log", log.name)
    assert all(table in log.read_text() for table in tiny_run.tested.out.strip().split("\n\n"))
    assert re.search(r"^grass +stuff", log.read_text(), re.MULTILINE) and "grass" not in tiny_run.tested.out
    assert "AP50" not in tiny_run.tested.err, "the tables are printed, and not said a second time"


def test_stored_results_are_panoptic_files(tiny_run, tmp_path):
    """Read as the official tool does, and scored against the truth: the same PQ."""
    out = tmp_path / "summary.json"
    truth = tiny_run.folder / "data/annotations/panoptic_val.json"
    ran = upsnet("evaluate", "--pred", tiny_run.results / "panoptic.json", "--gt", truth, "--out", out)
    assert ran.code == 0 and "kite" in ran.out
    stored = json.loads((tiny_run.results / "summary.json").read_text())
    assert json.loads(out.read_text())["panoptic"] == stored["panoptic"]


def test_eval_only_scores_what_is_stored(done):
    results = done.parent / "out/tiny/val/results"
    summary = json.loads((results / "summary.json").read_text())
    (results / "summary.json").unlink()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in results.rglob("*.*")}
    shutil.rmtree(done.parent / "out/tiny/train")
    ran = upsnet("test", "--cfg", done, "--eval_only")
    assert ran.code == 0, ran.err
    assert json.loads((results / "summary.json").read_text()) == summary
    (results / "summary.json").unlink()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in results.rglob("*.*")} == before


def test_the_tested_snapshot_can_be_chosen(done):
    folder = done.parent / "out/tiny/train"
    first = upsnet("test", "--cfg", done, "test.test_iteration=1")
    assert first.code == 0 and f"testing {folder / 'tiny_1.pth'}" in first.err
    named = upsnet("test", "--cfg", done, "--weight_path", folder / "tiny_1.pth")
    assert named.code == 0 and first.out == named.out


def test_pictures_instead_of_scores(done):
    results = done.parent / "out/tiny/val/results"
    shutil.rmtree(results)
    ran = upsnet("test", "--cfg", done, "test.vis_mask=true", "dataset.limit=3")
    assert ran.code == 0 and ran.out == ""
    assert [path.name for path in results.iterdir()] == ["vis"]
    assert sorted(path.name for path in results.rglob("*.png")) == [f"{image_id_of(i):012d}.png" for i in range(3)]
    assert all(cv2.imread(str(path)).size for path in results.rglob("*.png"))


# -- report and predict ------------------------------------------------------------------------------------------------


def test_the_report_is_one_page(done):
    metrics = done.parent / "out/tiny/train/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"iteration": 3, "to')  # killed while writing
    ran = upsnet("report", "--cfg", done, "--out", done.parent / "report")
    page = done.parent / "report/report.html"
    assert ran.code == 0 and str(page) in ran.out, ran.err
    assert "kite" in page.read_text() and len(list((done.parent / "report/gallery").glob("*.png"))) == 6
    assert upsnet("report", "--cfg", done).out.strip().endswith("out/tiny/val/report/report.html")


@pytest.mark.parametrize(
    "change, fragment", [("dataset.limit=2", "not in the data set"), ("name=other", "no complete results")]
)
def test_a_report_needs_results_of_these_images(done, change, fragment):
    ran = upsnet("report", "--cfg", done, change)
    assert ran.code == 2 and len(ran.errors) == 1 and fragment in ran.errors[0]


def test_predicting_photos(tiny_run, tmp_path):
    photos = [tiny_run.folder / f"data/images/val/{image_id_of(i):012d}.jpg" for i in (0, 2)]
    ran = upsnet(
        "predict", "--cfg", tiny_run.recipe, "--weight_path", tiny_run.weights, "--out", tmp_path / "out", *photos
    )
    assert ran.code == 0 and "running on" in ran.err and "2 results in" in ran.out, ran.err
    endings = (".json", ".png", "_drawn.png")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.stem + end for p in photos for end in endings}
    for photo in photos:
        path = tmp_path / "out" / f"{photo.stem}.json"
        content = json.loads(path.read_text())
        (image,) = content["images"]
        assert image["file_name"] == photo.name
        assert (image["height"], image["width"]) == cv2.imread(str(photo)).shape[:2]
        # The tools look for PNGs in a folder named like the json.
        path.with_suffix("").mkdir()
        path.with_suffix(".png").rename(path.with_suffix("") / path.with_suffix(".png").name)
        (record,) = content["annotations"]
        categories = Categories.from_coco(content["categories"], path.name)
        segment_map, segments = read_panoptic(record, path, categories)
        assert set(np.unique(segment_map)) - {0} == {segment.id for segment in segments} != set()
        evaluated = upsnet("evaluate", "--pred", path, "--gt", path)
        assert evaluated.code == 0 and "100.0" in evaluated.out, evaluated.err


@pytest.mark.parametrize(
    "names, out", [(["a.jpg", "b/a.jpg"], "out"), (["a.png"], "."), (["a.jpg", "a_drawn.jpg"], "o")]
)
def test_results_overwrite_nothing(tiny_run, tmp_path, names, out):
    photos = [tmp_path / name for name in names]
    for photo in photos:
        photo.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(photo), np.full((40, 50, 3), 99, np.uint8))
    before = sorted(tmp_path.rglob("*"))
    ran = upsnet(
        "predict", "--cfg", tiny_run.recipe, "--weight_path", tiny_run.weights, "--out", tmp_path / out, *photos
    )
    assert ran.code == 2 and "overwrite" in ran.errors[0] and sorted(tmp_path.rglob("*")) == before


def test_photos_are_looked_for_before_weights(tiny_run, tmp_path):
    photo = tiny_run.folder / f"data/images/val/{image_id_of(0):012d}.jpg"
    missing = tmp_path / "missing.jpg"
    ran = upsnet(
        "predict", "--cfg", tiny_run.recipe, "--weight_path", "none.pth", "--out", tmp_path / "out", photo, missing
    )
    assert ran.code == 2 and f"{missing}: there is no such photo" in ran.errors[0] and not list(tmp_path.iterdir())


def test_the_demo_has_a_folder_of_its_own(tmp_path):
    """Named by what is in it, so that another version or size of the set is never in its place."""
    upsnet("shapes", "--out", tmp_path, "--train", 1, "--val", 1)
    version = json.loads((tmp_path / "annotations/panoptic_val.json").read_text())["info"]["parameters"]["version"]
    expected = f"shapes_v{version}_{commands.DEMO_TRAIN}_{commands.DEMO_VAL}"
    assert Path(load_recipe(commands.DEMO_RECIPE).dataset.dataset_path) == Path("data") / expected


def test_shapes_and_the_demo_recipe_fit_together(tmp_path):
    ran = upsnet("shapes", "--out", tmp_path / "shapes", "--train", 2, "--val", 1, "--seed", 3)
    assert ran.code == 0 and "2 + 1 images" in ran.out
    trained = upsnet(
        "train", "--cfg", "upsnet_resnet18_shapes", f"dataset.dataset_path={tmp_path / 'shapes'}",
        f"output_path={tmp_path}/out", "train.max_iteration=1", "train.batch_size=1", "dataset.num_workers=0",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert (tmp_path / "out/upsnet_resnet18_shapes/train/upsnet_resnet_18_shapes_1.pth").is_file()


# -- nothing lost ------------------------------------------------------------------------------------------------------


def test_training_goes_on_by_itself_from_the_newest_whole_snapshot(done):
    """The last one is damaged: it is named, and written anew."""
    folder = done.parent / "out/tiny/train"
    newest = folder / "tiny_2.pth"
    whole, weights = newest.read_bytes(), weights_of(newest)
    newest.unlink()  # not the file itself, which other tests share
    newest.write_bytes(whole[:-100])
    ran = upsnet("train", "--cfg", done, "train.resume=auto")
    assert ran.code == 0, ran.err
    assert "tiny_2.pth is damaged" in ran.err and "resuming after step 1" in ran.err
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(newest).items())
    again = upsnet("train", "--cfg", done, "train.resume=auto")
    assert again.code == 0 and "finished already" in again.err


def test_auto_begins_at_the_beginning_where_nothing_is(recipe):
    ran = upsnet("train", "--cfg", recipe, "train.resume=auto", "train.max_iteration=1")
    assert ran.code == 0 and "it starts from the beginning" in ran.err
    wrong = upsnet("train", "--cfg", recipe, "train.resume=auto", "train.begin_iteration=1")
    assert wrong.code == 2 and "train.resume is auto" in wrong.errors[0]


def test_tests_while_training_keep_the_best_snapshot(recipe):
    ran = upsnet("train", "--cfg", recipe, "train.test_step=1", "train.keep_snapshots=1", "train.snapshot_step=1")
    assert ran.code == 0, ran.err
    folder = recipe.parent / "out/tiny/train"
    told = {line["iteration"]: line["test_pq"] for line in lines_of(folder / "metrics.jsonl") if "test_pq" in line}
    record = json.loads((folder / "snapshots.json").read_text())
    assert told.keys() == {1, 2} and record["pq"] == max(told.values()) == told[record["best"]]
    assert {path.name for path in folder.glob("*.state.pth")} == {f"tiny_{n}.state.pth" for n in {2, record["best"]}}


def test_bad_images_are_skipped_and_counted(recipe):
    photo = recipe.parent / "data/images/train/000000000003.jpg"
    photo.write_bytes(photo.read_bytes()[:700])
    ran = upsnet("train", "--cfg", recipe, "train.bad_images=skip", "train.max_iteration=6")
    assert ran.code == 0, ran.err
    assert ran.err.count("skipped, another image takes its place: image 3") == 1
    assert re.search(r"1 bad images were skipped, \d times in all", ran.err)


def test_a_batch_without_a_finite_loss_is_stored(recipe):
    ran = upsnet("train", "--cfg", recipe, "train.lr=1.0e+30")
    (error,) = ran.errors
    path = recipe.parent / "out/tiny/train/bad_batch_1.pth"
    assert ran.code == 2 and "stored as the network saw it in" in error and str(path) in error
    content = torch.load(path, weights_only=True)
    assert len(content["image_ids"]) == len(content["instances"]) == 2 and content["semantic"] is not None
    assert cv2.imread(str(path.with_suffix(".png"))) is not None
