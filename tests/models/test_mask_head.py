import pytest
import torch
from torch.nn import functional as F

from tests.models.test_semantic_head import levels_of
from tests.reference import heads as twin
from upsnet.models.mask_head import MaskHead, mask_loss

close = torch.testing.assert_close


def head_of(norm="none", num_classes=6):
    torch.manual_seed(0)
    head = MaskHead(32, num_classes, width=32, mask_size=28, norm=norm)
    torch.nn.init.normal_(head.score.bias)
    return head


ROIS = torch.tensor([[0.0, 3, 3, 60, 50], [1, 3, 3, 60, 50], [0, 5, 5, 5, 5], [1, 80, 50, 95, 63], [0, 0, 0, 500, 400]])
CLASSES = torch.tensor([1, 5, 2, 5, 3])


@pytest.mark.parametrize("norm", ["none", "group_norm", "batch_norm"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_one_row_of_the_score_layer_equals_the_whole_layer(count, norm):
    head, levels = head_of(norm).eval(), levels_of()
    logits = head(levels, ROIS[:count], CLASSES[:count])
    assert logits.shape == (count, 28, 28) and logits.dtype == torch.float32
    close(logits, twin.mask_logits(head, levels, ROIS[:count], CLASSES[:count]), rtol=1e-4, atol=1e-5)


def test_only_the_asked_rows_learn():
    head = head_of()
    head(levels_of(), ROIS, CLASSES).sum().backward()
    touched = [c for c in range(6) if head.score.weight.grad[c].abs().sum() > 0]
    assert touched == sorted(set(CLASSES.tolist()))
    assert [c for c in range(6) if head.score.bias.grad[c] != 0] == touched


@pytest.mark.parametrize("norm", ["none", "group_norm", "batch_norm"])
def test_training_without_rois_leaves_the_head_sound(norm):
    head = head_of(norm).train()
    loss = mask_loss(head(levels_of(), ROIS[:0], CLASSES[:0]), torch.zeros(0, 28, 28), [0, 0])
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert all(value.isfinite().all() for value in head.state_dict().values())


def test_mask_loss_is_a_mean_over_images():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 28, 28, generator=generator)
    targets = (torch.rand(5, 28, 28, generator=generator) > 0.5).float()
    first = F.binary_cross_entropy_with_logits(logits[:2], targets[:2])
    second = F.binary_cross_entropy_with_logits(logits[2:], targets[2:])
    close(mask_loss(logits, targets, [2, 3]), (first + second) / 2)
    close(mask_loss(logits, targets, [2, 0, 3]), (first + second) / 3)
    assert mask_loss(logits[:0], targets[:0], [0]) == 0
