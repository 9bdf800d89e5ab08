"""Regions that the detector chooses in training: which proposal, which score, and where gradients go."""

import pytest
import torch
from conftest import MOSAIC, make_batch, make_model, normalizers_of
from switches import steps
from torchvision.ops import box_area

from clis.config import ONLINE_RULES
from clis.models import online_regions
from clis.models.online_regions import by_score, by_size, choose_regions, scores_for

ONLINE = ("clis.t=0", "clis.contrastive=false")
SIZE, SCORE = ("regions.rule=max-size", *ONLINE), ("regions.rule=max-score", *ONLINE)

# A mosaic of 20 x 20 pixels with images on its left and right half, and one with an image on all of it
IMAGES = torch.tensor([[0.0, 0, 10, 20], [10, 0, 20, 20], [0, 0, 20, 20]])
MOSAICS = torch.tensor([0, 0, 1])


def unscored():
    raise AssertionError("this rule needs no scores")


def choose(*proposals, scores=None):
    """Choose by the scores [R,P], or else by size, from each mosaic's proposals."""
    boxes = [torch.tensor(each, dtype=torch.float32).reshape(-1, 4) for each in proposals]
    if scores is None:
        return choose_regions(boxes, IMAGES, MOSAICS, by_size, unscored).tolist()
    return choose_regions(boxes, IMAGES, MOSAICS, by_score, lambda: torch.tensor(scores)).tolist()


def test_the_largest_proposal_of_each_image_is_chosen():
    left = [[1, 1, 3, 3], [2, 2, 8, 9], [0, 0, 4, 4]]
    right = [[12, 0, 15, 5], [11, 2, 14, 6]]
    assert choose(left + right, [[3, 3, 4, 4], [5, 5, 9, 9]]) == [[2, 2, 8, 9], [12, 0, 15, 5], [5, 5, 9, 9]]


def test_a_proposal_belongs_to_the_image_that_holds_half_of_it_and_is_clipped_to_it():
    # Of [4, 0, 13, 10] two thirds lie on the left, and 6 x 10 there are more than 5 x 5. On the right its
    # 3 x 10 would be more than 2 x 2, but are a third of it. [0, 0, 20, 20] has half of itself on each side.
    assert choose([[4, 0, 13, 10], [0, 0, 5, 5], [14, 14, 16, 16]], [[0, 0, 1, 1]]) == [
        [4, 0, 10, 10],
        [14, 14, 16, 16],
        [0, 0, 1, 1],
    ]
    assert choose([[0, 0, 20, 20]], [[0, 0, 1, 1]])[:2] == IMAGES[:2].tolist()


def test_an_image_without_a_proposal_keeps_all_of_itself():
    # the zeros are what a mosaic with fewer proposals than another is padded with: no proposal at [0, 0]
    assert choose([[1, 1, 2, 2], [1, 1, 3, 3]], []) == [[1, 1, 3, 3], [10, 0, 20, 20], [0, 0, 20, 20]]
    assert choose([], []) == IMAGES.tolist()


def test_the_best_score_is_chosen_among_the_images_own():
    # the third proposal scores most for the left image's label, but lies on the right
    scores = [[0.1, 0.2, 0.9], [0.8, 0.7, 0.3], [0.0, 0.0, 0.0]]
    found = choose([[1, 1, 9, 9], [2, 2, 3, 3], [12, 0, 15, 5]], [[0, 0, 1, 1]], scores=scores)
    assert found == [[2, 2, 3, 3], [12, 0, 15, 5], [0, 0, 1, 1]]


def test_only_the_best_proposals_by_objectness_are_considered(monkeypatch):
    """The last of each image is its largest. Proposals on the neighbor do not count."""
    monkeypatch.setattr(online_regions, "MOST_PROPOSALS", 2)
    left, right = [[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 9, 9]], [[12, 0, 13, 1], [12, 0, 14, 2], [12, 0, 20, 9]]
    assert choose(left + right, [[0, 0, 3, 3]])[:2] == [left[1], right[1]]
    assert choose(right + left, [[0, 0, 3, 3]])[:2] == [left[1], right[1]]


def test_the_rules_of_the_config_are_those_of_the_model():
    assert tuple(online_regions.PREFERENCES) == ONLINE_RULES


def test_scores_are_looked_up_for_each_images_label():
    of_mosaics = [torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.5, 0.6]])]
    found = scores_for(of_mosaics, torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.4], [0.1, 0.3], [0.6, 0.0]]))


def quarters(batch):
    """Replace the regions of a batch of `make_batch` by whole images: the four tiles of each mosaic."""
    half = MOSAIC // 2
    corners = [(x, y) for y in (0, half) for x in (0, half)]
    tiles = torch.tensor([[x, y, x + half, y + half] for x, y in corners], dtype=batch.regions.dtype)
    batch.regions.copy_(tiles.repeat(len(batch.mosaics), 1))
    return batch


def chosen(model, batch):
    summed = model.backbone.top_down(batch.mosaics.unbind())
    return model.choose_regions(summed, batch, model.region_preference)


@pytest.mark.parametrize("overrides", [SIZE, SCORE])
@pytest.mark.parametrize("objectness", [True, False])
def test_the_choice_is_that_of_a_plain_loop(overrides, objectness):
    """Over the RoIs and scores of `predict`; the objectness counts where there is one."""
    model = make_model(*overrides, f"clis.objectness={str(objectness).lower()}")
    batch = quarters(make_batch(2, pairs=0))
    expected = []
    predicted = model.predict(batch.mosaics.unbind())
    for image, label, mosaic in zip(batch.regions, batch.region_labels, batch.region_mosaics):
        boxes, scores, _ = predicted[mosaic]
        inside = torch.cat([boxes[:, :2].maximum(image[:2]), boxes[:, 2:].minimum(image[2:])], dim=1)
        share = box_area(inside) / box_area(boxes)
        share[(inside[:, 2:] < inside[:, :2]).any(dim=1)] = 0  # beside the image
        mine = [place for place in range(len(boxes)) if share[place] >= 0.5]
        values = box_area(inside) if overrides is SIZE else scores[:, label]
        expected.append(inside[max(mine, key=values.__getitem__)])
    found = chosen(model, batch)
    assert (found != batch.regions).any(dim=1).sum() >= 4  # not only whole images
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("overrides", [SIZE, SCORE])
def test_the_image_classification_loss_is_that_of_the_chosen_boxes(overrides):
    """Given as pre-defined regions, these have the same loss. It has no gradient in the RPN or in boxes."""
    model, batch = make_model(*overrides), quarters(make_batch(2, pairs=0))
    boxes = chosen(model, batch)
    loss = model(batch, normalizers_of(batch)).losses["image_cls"]
    loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("classification.") for name in with_gradient)
    assert any(name.startswith("backbone.fpn.") for name in with_gradient)
    assert not any(name.startswith(("rpn.", "localization.")) for name in with_gradient)

    model.region_preference = None
    batch.regions.copy_(boxes)
    torch.testing.assert_close(model(batch, normalizers_of(batch)).losses["image_cls"], loss)


def test_weights_that_the_choice_uses_first_still_train_in_bfloat16():
    """Autocast keeps the weights that it has cast; cast without a gradient, they would no longer train."""
    model, batch = make_model(*SCORE).float(), quarters(make_batch(2, pairs=0))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch, normalizers_of(batch)).losses
    losses["image_cls"].backward()
    assert all(p.grad.any() for p in model.classification.parameters())


def test_calibration_at_test_has_no_part_in_training():
    """NorCal prefers other regions for a rare class; FRACAL is not even measured before an evaluation."""
    batch, found = quarters(make_batch(2, pairs=0)), []
    for calibration in ("null", "norcal(gamma=5)", "fracal"):
        model = make_model(*SCORE, f"test.calibration={calibration}")
        torch.nn.init.normal_(model.classification.fc_cls.weight)
        found.append(chosen(model, batch))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_batch_without_regions():
    model = make_model(*SCORE)
    record = steps(model, [make_batch(1, regions=0, pairs=0)], *SCORE)
    assert record[0]["image_cls"] == 0
