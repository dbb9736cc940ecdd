import pytest
import torch
from torch.nn import functional as F

from tests.reference import heads as twin
from tests.syncs import count_syncs
from upsnet.models.semantic_head import SemanticHead, _crop_labels, roi_loss, semantic_loss
from upsnet.operators import library
from upsnet.structures.sample import VOID

close = torch.testing.assert_close


def head_of(num_layers=3, norm="none", width=32, channels=32, num_classes=7):
    torch.manual_seed(0)
    head = SemanticHead(channels, num_classes, width, num_layers, norm)
    for layer in head.layers:
        # Offsets start at 0, where a deformable convolution is a plain one.
        torch.nn.init.normal_(layer.conv.offset.weight, std=0.02)
        torch.nn.init.normal_(layer.conv.bias, std=0.1)
    torch.nn.init.normal_(head.score.weight, std=0.2)
    torch.nn.init.normal_(head.score.bias, std=0.5)
    return head


def levels_of(height=64, width=96, images=2, channels=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, height // 2**i, width // 2**i) for i in range(2, 6)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["none", "group_norm", "batch_norm"])
def test_scoring_before_enlarging_equals_scoring_the_concatenated_map(num_layers, norm):
    head, levels = head_of(num_layers, norm), levels_of()
    # batch norm with statistics of its own for each level: the same in both ways only in evaluation mode
    head.eval()
    scores = head(levels)
    assert scores.shape == (2, 7, 16, 24) and len(head.layers) == num_layers
    close(scores, head.score(twin.concatenated_features(head, levels)), rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.1


def test_layers_narrow_towards_the_end():
    head = SemanticHead(64, 5, 16, 3)
    assert [tuple(layer.conv.weight.shape[:2]) for layer in head.layers] == [(64, 64), (16, 64), (16, 16)]
    assert head.score.weight.shape == (5, 64, 1, 1)
    assert all(layer.conv.offset.weight.abs().sum() == 0 for layer in head.layers)


def random_target(height, width, images=2, num_classes=7, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOID, num_classes, (images, height, width), generator=generator).to(torch.int16)


def test_semantic_loss():
    scores, target = levels_of(channels=7)[0], random_target(64, 96)
    target[1, :, 30:] = VOID  # images weigh the same however many labelled pixels they have
    close(semantic_loss(scores, target), torch.tensor(twin.semantic_loss(scores, target)), rtol=1e-5, atol=1e-5)
    target[0] = VOID
    close(semantic_loss(scores, target), torch.tensor(twin.semantic_loss(scores, target)), rtol=1e-5, atol=1e-5)
    scores.requires_grad_()
    loss = semantic_loss(scores, torch.full_like(target, VOID))
    loss.backward()
    assert loss == 0 and scores.grad.abs().sum() == 0


@pytest.mark.parametrize(("height", "band"), [(4, 8), (32, 8), (36, 8), (68, 8), (36, 1), (36, 64)])
def test_bands_of_the_semantic_loss(height, band, monkeypatch):
    """Loss and gradient are those of the whole map enlarged at once, wherever the bands end."""
    monkeypatch.setattr("upsnet.models.semantic_head.BAND", band)
    scores = torch.randn(2, 7, height // 4, 9, generator=torch.Generator().manual_seed(3)).requires_grad_()
    target = random_target(height, 36)
    enlarged = F.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False)
    expected = torch.stack(
        [F.cross_entropy(e[None], t[None].long(), ignore_index=VOID) for e, t in zip(enlarged, target, strict=True)]
    ).mean()
    (wanted,) = torch.autograd.grad(expected, scores)
    loss = semantic_loss(scores, target)
    (gradient,) = torch.autograd.grad(2 * loss, scores)
    close(loss, expected, rtol=1e-6, atol=1e-6)
    close(gradient, 2 * wanted, rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        assert torch.equal(semantic_loss(scores, target), loss)


@pytest.mark.parametrize("labels", ["random", "one pixel", "none"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (9, 2)])
def test_gradient_of_the_semantic_loss(height, width, labels):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64).requires_grad_()
    target = random_target(4 * height, 4 * width, num_classes=3)
    if labels != "random":
        target.fill_(VOID)
        target[1, -1, -1] = 2 if labels == "one pixel" else VOID
    assert torch.autograd.gradcheck(lambda s: semantic_loss(s, target), scores)


def test_the_semantic_loss_is_not_differentiated_twice():
    scores = torch.randn(1, 3, 2, 2).requires_grad_()
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        torch.autograd.grad(semantic_loss(scores, random_target(8, 8, 1, 3)), scores, create_graph=True)


BOXES = {
    "several": [[3.0, 4, 60, 50], [70.5, 1.5, 90.2, 61.9], [0, 0, 95, 63]],
    "one pixel": [[10.0, 20, 10, 20]],
    "thin": [[10.4, 3, 10.6, 60], [5.0, 30.5, 80, 30.5]],
    "last pixel": [[95.0, 63, 95, 63], [94.4, 62.4, 95, 63]],
    "none": [],
}


@pytest.mark.parametrize("second", BOXES)
@pytest.mark.parametrize("first", BOXES)
def test_roi_loss(first, second):
    head, levels, target = head_of(2), levels_of(), random_target(64, 96)
    target[0, :20] = VOID
    boxes = [torch.tensor(BOXES[name]).reshape(-1, 4) for name in (first, second)]
    with torch.no_grad():
        ours = roi_loss(head(levels), head.score.bias, target, boxes)
        theirs = twin.roi_loss(head, levels, target, boxes)
    close(ours, torch.as_tensor(theirs), rtol=1e-5, atol=1e-5)
    assert (ours > 0) == (first != "none" or second != "none")


@pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
def test_roi_loss_asks_nothing_of_a_device():
    head, scores, target = head_of(2), levels_of(channels=7)[0].requires_grad_(), random_target(64, 96)
    boxes = [torch.tensor(BOXES[name]).reshape(-1, 4) for name in ("several", "thin")]
    with count_syncs() as syncs:
        roi_loss(scores, head.score.bias, target, boxes).backward()
    assert not len(syncs), syncs


def test_crops_are_those_of_opencv():
    target = torch.arange(1500, dtype=torch.int16).repeat(3, 1)
    for width in range(1, 1400):
        box = torch.tensor([7.0, 0, 7 + width, 3])
        assert torch.equal(_crop_labels(target, box[None])[0], twin.crop_labels(target, box)), width
