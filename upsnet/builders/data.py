"""From a recipe to its data sets and batches."""

from pathlib import Path

from upsnet.builders.training import accumulation
from upsnet.config import Recipe
from upsnet.dataset.batches import SamePaddedSizeSampler, TrainingSampler
from upsnet.dataset.cityscapes import cityscapes_image_sets
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.loading import BatchLoader
from upsnet.dataset.transforms import Transform
from upsnet.dataset.views import PhotoViews, Views
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import RecipeError


def training_transform(recipe: Recipe) -> Transform:
    """How training photos become network inputs."""
    network, train = recipe.network, recipe.train
    return Transform(train.scales, train.max_size, network.pixel_means, network.use_caffe_model, recipe.seed)


def test_views(recipe: Recipe) -> Views:
    """How photos become network inputs at test time."""
    network, test = recipe.network, recipe.test
    transforms = [
        Transform((scale,), test.max_size, network.pixel_means, network.use_caffe_model) for scale in test.scales
    ]
    return Views(transforms, test.flip)


def build_training_set(recipe: Recipe) -> CocoPanoptic:
    """The training images, with mirrored copies if the recipe says so.

    The original trains on images with things only; without `compat: original` the others take part.
    """
    return _build_set(
        recipe,
        recipe.dataset.image_set,
        training_transform(recipe),
        flip_copies=recipe.train.flip,
        skip_without_things=recipe.train.compat == "original",
        min_area=recipe.train.gt_min_area,
    )


def build_test_set(recipe: Recipe, targets: bool = False) -> CocoPanoptic:
    """The test images. targets: for validation losses."""
    reference = test_views(recipe).transforms[0]
    return _build_set(recipe, recipe.dataset.test_image_set, reference, targets=targets)


def _build_set(
    recipe: Recipe,
    image_set: str,
    transform: Transform,
    *,
    targets: bool = True,
    flip_copies: bool = False,
    skip_without_things: bool = False,
    min_area: float = -1,
) -> CocoPanoptic:
    options = recipe.dataset
    if options.dataset == "ade20k":
        raise RecipeError(
            f"dataset.dataset: '{options.dataset}' cannot be read in its own layout yet: "
            f"convert it to the COCO panoptic format and set dataset.dataset=panoptic"
        )
    find = cityscapes_image_sets if options.dataset == "Cityscapes" else coco_image_sets
    dataset = CocoPanoptic(
        find(Path(options.dataset_path), image_set),
        transform,
        targets=targets,
        flip_copies=flip_copies,
        skip_without_things=skip_without_things,
        limit=options.limit,
        min_area=min_area,
        # The original's Cityscapes jsons hold no groups, and its sampling would take them for things.
        crowds=options.dataset != "Cityscapes" or recipe.train.compat != "original",
        categories=class_table(options.dataset),
    )
    check_class_counts(recipe, dataset.categories, str(options.dataset_path))
    return dataset


def check_class_counts(recipe: Recipe, categories: Categories, source: str) -> None:
    """Refuses a recipe whose class counts contradict the class table."""
    for key, stated, found in (
        ("num_classes", recipe.dataset.num_classes, categories.num_classes),
        ("num_seg_classes", recipe.dataset.num_seg_classes, categories.num_seg_classes),
    ):
        if stated is not None and stated != found:
            raise RecipeError(
                f"dataset.{key} is {stated}, but {source} has {categories.num_things} thing and {categories.num_stuff} "
                f"stuff classes, which makes {found}: correct the recipe or leave the key out"
            )


def build_training_loader(
    recipe: Recipe, dataset: CocoPanoptic, start_step: int, worker: int = 0, num_workers: int = 1
) -> BatchLoader:
    """A worker's micro-batches from step `start_step` to the last one."""
    sampler = TrainingSampler(
        len(dataset),
        recipe.train.batch_size,
        accumulation(recipe, num_workers),
        worker,
        num_workers,
        seed=recipe.seed,
        start_step=start_step,
        steps=recipe.train.max_iteration,
        shuffle=recipe.train.shuffle,
    )
    replacement = sampler.replacement if recipe.train.bad_images == "skip" else None
    return BatchLoader(dataset, sampler, recipe.dataset.num_workers, replacement)


def build_test_loader(recipe: Recipe, dataset: CocoPanoptic, worker: int = 0, num_workers: int = 1) -> BatchLoader:
    """A worker's batches of images of equal padded size, in all views; with targets in the first one alone.

    Every image comes once, on one of the workers.
    """
    photos = _test_photos(recipe, dataset)
    sampler = SamePaddedSizeSampler(photos.padded_sizes(), recipe.test.batch_size, worker, num_workers)
    return BatchLoader(photos, sampler, recipe.dataset.num_workers)


def test_order(recipe: Recipe, dataset: CocoPanoptic, worker: int = 0, num_workers: int = 1) -> list[int]:
    """The image ids in the order of a worker's `build_test_loader`."""
    sizes, ids = _test_photos(recipe, dataset).padded_sizes(), dataset.image_ids.tolist()
    return [
        ids[i] for batch in SamePaddedSizeSampler(sizes, recipe.test.batch_size, worker, num_workers) for i in batch
    ]


def _test_photos(recipe: Recipe, dataset: CocoPanoptic) -> CocoPanoptic | PhotoViews:
    return dataset if dataset.targets else PhotoViews(dataset, test_views(recipe))
