"""The detector: its backbone, what each switch builds, where gradients go, odd batches, and detections."""

import dataclasses
import itertools
import math

import pytest
import torch
import torchvision
from conftest import (
    MOSAIC,
    NUM_CLASSES,
    fill,
    make_batch,
    make_model,
    make_sample,
    normalizers_of,
    random_boxes,
    tiny_config,
)
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from clis.config import BackboneConfig
from clis.data.batch import collate
from clis.models import Normalizers, build_model
from clis.models.backbone import IMAGE_MEAN, IMAGE_STD, Backbone, FixedBatchNorm, ResNet, conv_norm, fold
from clis.models.heads import CosineLinear
from clis.models.weights import load_backbone_weights


def combinations():
    """Every consistent setting of the switches, as overrides."""
    switches = itertools.product([True, False], repeat=5)
    for tss, objectness, siamese, class_agnostic, contrastive in switches:
        for s, view in itertools.product((0, 4), ("symmetric", "momentum", "online")):
            if (contrastive and s == 0) or (view != "symmetric" and not contrastive):
                continue  # no pairs to contrast; no view of a pair
            yield (
                f"clis.task_specialized={tss}", f"clis.objectness={objectness}", f"clis.siamese={siamese}",
                f"model.roi.class_agnostic_boxes={class_agnostic}", f"clis.contrastive={contrastive}",
                f"clis.s={s}", f"clis.t={min(s, 2)}", f"clis.pasted_view={view}",
            )  # fmt: skip


def names_of(overrides):
    return " ".join(override.split(".")[-1] for override in overrides)


def losses_of(model, batch, normalizers=None):
    return model(batch, normalizers or normalizers_of(batch)).losses


def gradients(model, loss):
    """Norm of the gradient of every parameter that gets one, by name, from this loss alone."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}


def reached(model, loss, prefix):
    """Whether the loss has a gradient above zero somewhere below `prefix`."""
    return any(norm > 0 for name, norm in gradients(model, loss).items() if name.startswith(prefix))


# --- backbone ---


def test_fixed_batch_norm_by_hand():
    # (10 - 4) / sqrt(9) * 5 + 1 = 11
    norm = FixedBatchNorm(1, eps=0.0)
    norm.load_state_dict({k: torch.tensor([v]) for k, v in zip(norm.state_dict(), (5.0, 1.0, 4.0, 9.0))})
    identity = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(identity.weight)
    folded = fold(nn.Sequential(identity, norm))
    assert conv_norm(torch.full((1, 1, 1, 1), 10.0), identity, norm, folded).item() == pytest.approx(11)


def two_passes(body, shared):
    images = [
        torch.randn(1, 3, 64, 64).to(body.conv1.weight),
        torch.randn(2, 3, 32, 32).to(body.conv1.weight),
    ]
    outputs = [body(x, shared) for x in images]
    return outputs, sum(level.square().mean() for levels in outputs for level in levels)


def test_passes_that_share_folded_weights_equal_passes_that_fold_their_own():
    body = ResNet(BackboneConfig(name="resnet10", width=16)).double()
    found = []
    for shared in ({}, None):
        torch.manual_seed(0)
        body.zero_grad()
        outputs, loss = two_passes(body, shared)
        loss.backward()
        found.append((outputs, [p.grad for p in body.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1])


def test_the_gradient_of_the_last_layer_is_complete_before_the_backward_pass_has_left_the_one_before():
    """DDP sends it then. With all layers folded before the first pass it would be complete at the end."""
    body = ResNet(BackboneConfig(name="resnet10", width=16))
    events = []
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    outputs, loss = two_passes(body, {})
    outputs[0][1].register_hook(lambda _: events.append("C3"))  # its backward comes last
    loss.backward()
    last = [place for place, event in enumerate(events) if event.startswith("layer4")]
    assert len(last) == 9  # three convolutions with weight and bias of their norms
    assert max(last) < events.index("C3")


def test_folded_weights_have_the_type_of_autocast():
    body = ResNet(BackboneConfig(name="resnet10", width=16))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        shared = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = body(torch.randn(1, 3, 64, 64), shared)
        assert {t.dtype for folded in shared.values() for pair in folded.values() for t in pair} == {dtype}
        assert {level.dtype for level in outputs} == {dtype}


def reference_network(name):
    """torchvision's, in evaluation mode, float64, with random statistics and affine."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
    return network


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_backbone_equals_torchvision(name, tmp_path):
    network = reference_network(name)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    config = tiny_config(
        f"model.backbone.name={name}", "model.backbone.width=64", "model.backbone.norm=folded"
    )
    body = ResNet(config.model.backbone)
    load_backbone_weights(body, name, tmp_path / "weights.pth")
    body, network = body.double(), network.double()
    layers = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
    images = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    ours, theirs = body(images), list(IntermediateLayerGetter(network, layers)(images).values())
    for level, expected in zip(ours, theirs):
        torch.testing.assert_close(level, expected)
    # folded, the affine has the gradient that it has unfolded, and so has every convolution
    for outputs in (ours, theirs):
        sum(level.square().mean() for level in outputs).backward()
    references = dict(network.named_parameters())
    for parameter_name, p in body.named_parameters():
        torch.testing.assert_close(p.grad, references[parameter_name].grad, msg=parameter_name)


def test_images_are_normalized_and_padded():
    backbone = Backbone(tiny_config().model.backbone)
    images = [torch.full((3, 40, 64), 128, dtype=torch.uint8), torch.zeros(3, 33, 10, dtype=torch.uint8)]
    batch = backbone.batch(images)
    assert batch.shape == (2, 3, 64, 64)
    for channel, (mean, std) in enumerate(zip(IMAGE_MEAN, IMAGE_STD)):
        torch.testing.assert_close(batch[0, channel, :40], torch.full((40, 64), (128 - mean) / std))
        torch.testing.assert_close(batch[1, channel, :33, :10], torch.full((33, 10), -mean / std))
    # what is left is the mean color
    assert not batch[0, :, 40:].any()
    assert not batch[1, :, 33:].any()
    assert not batch[1, :, :, 10:].any()


def test_p6_is_subsampled_p5():
    features = make_model().backbone([torch.zeros(3, 64, 96, dtype=torch.uint8)])
    assert [tuple(x.shape[2:]) for x in features] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert torch.equal(features[4], features[3][:, :, ::2, ::2])


def test_missing_weights_say_where_to_get_them(tmp_path):
    overrides = ["model.backbone.norm=folded", "model.backbone.name=resnet50", "model.backbone.weights=r.pth"]
    config = tiny_config(*overrides, f"data.root={tmp_path}")
    with pytest.raises(FileNotFoundError) as error:
        build_model(config, range(3))
    assert str(tmp_path / "r.pth") in str(error.value)
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in str(error.value)
    assert "model.backbone.download=true" in str(error.value)
    build_model(config, range(3), pretrained=False)


def test_weights_of_another_network_name_its_tensors(tmp_path):
    config = tiny_config("model.backbone.norm=folded").model.backbone
    path = tmp_path / "weights.pth"
    state = ResNet(config).state_dict()
    moved = {k.replace("layer4.0.conv1", "layer4.7.conv1"): v for k, v in state.items()}
    moved["conv1.weight"] = torch.zeros(99, 3, 7, 7)
    torch.save(moved, path)
    with pytest.raises(ValueError, match="weights of another model") as error:
        load_backbone_weights(ResNet(config), config.name, path)
    for part in (
        str(path), "missing layer4.0.conv1.weight", "unknown layer4.7.conv1.weight",
        "conv1.weight is [99, 3, 7, 7], the model's is [16, 3, 7, 7]",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"not a checkpoint", None])
def test_weights_that_are_no_state_dict(content, tmp_path):
    config, path = tiny_config("model.backbone.norm=folded").model.backbone, tmp_path / "weights.pth"
    if content is None:
        torch.save(torch.zeros(3), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth: .*not a state dict"):
        load_backbone_weights(ResNet(config), config.name, path)


# --- gradients ---


def narrow_resnet50(norm):
    return make_model(
        "model.backbone.name=resnet50", f"model.backbone.norm={norm}", "model.backbone.trainable_layers=3"
    )


@pytest.mark.parametrize("norm", ["folded", "frozen"])
def test_frozen_layers_have_no_gradient(norm):
    model, batch = narrow_resnet50(norm), make_batch(1)
    sum(losses_of(model, batch).values()).backward()
    frozen_layers = ("conv1.", "bn1.", "layer1.")
    affines = set()
    for path, module in model.backbone.body.named_modules():
        if isinstance(module, FixedBatchNorm):
            affines |= {f"{path}.weight", f"{path}.bias"}
    assert len(affines) == 2 * 53
    for name, p in model.backbone.body.named_parameters():
        frozen = name.startswith(frozen_layers) or (norm == "frozen" and name in affines)
        assert p.requires_grad != frozen, name
        assert (p.grad is None) == frozen, name
        assert frozen or p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("trainable_layers", "frozen"), [(0, 5), (1, 4), (4, 1), (5, 0)])
def test_trainable_layers_count_from_the_top(trainable_layers, frozen):
    body = make_model(f"model.backbone.trainable_layers={trainable_layers}").backbone.body
    groups = [("conv1.", "bn1."), "layer1.", "layer2.", "layer3.", "layer4."]
    for place, prefix in enumerate(groups):
        trained = {p.requires_grad for name, p in body.named_parameters() if name.startswith(prefix)}
        assert trained == {place >= frozen}


@pytest.mark.parametrize("siamese", [True, False])
def test_tasks_share_the_classification_sub_network_when_siamese(siamese):
    model = make_model(f"clis.siamese={siamese}")
    losses = losses_of(model, make_batch())
    for part in ("classification.sub_network.", "classification.fc_cls."):
        assert reached(model, losses["instance_cls"], part)
        assert reached(model, losses["image_cls"], part) == siamese
    assert not reached(model, losses["instance_cls"], "image_classification.")
    if not siamese:  # (a shared module is named once, by its first owner)
        assert reached(model, losses["image_cls"], "image_classification.sub_network.")
        assert reached(model, losses["image_cls"], "image_classification.fc_cls.")
    # task-specialized: no classification loss trains the localization sub-network, and the other way round
    for loss in ("instance_cls", "image_cls"):
        assert not reached(model, losses[loss], "localization.")
    for loss in ("box", "objectness"):
        assert reached(model, losses[loss], "localization.sub_network.")
        assert not reached(model, losses[loss], "classification.")


@pytest.mark.parametrize("std", [0.01, 0.2])
def test_the_last_classification_fcs_start_as_wide_as_asked(std):
    model = make_model("clis.siamese=false", "model.roi.fc_dim=1024", f"model.roi.fc_cls_std={std}")
    for head in (model.classification, model.image_classification):  # >= 5120 weights: 1 % is one sigma
        assert head.fc_cls.weight.std().item() == pytest.approx(std, rel=0.05)
        assert head.fc_cls.bias.abs().max() == 0
    assert model.localization.fc_objectness.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_a_cosine_classifier_equals_its_formula():
    """scale * x.w / (|x| |w|) + bias, row by row; a feature of zeros gives the bias, and finite gradients."""
    layer = CosineLinear(8, 3, scale=20.0).double()
    features = torch.randn(4, 8, dtype=torch.float64).relu()
    features[3] = 0
    features.requires_grad_()
    logits = layer(features)
    for row, x in enumerate(features[:3]):
        for column, w in enumerate(layer.weight):
            cosine = (x @ w) / ((x @ x) * (w @ w)).sqrt()
            torch.testing.assert_close(
                logits[row, column], 20 * cosine + layer.bias[column], rtol=1e-5, atol=0
            )
    assert torch.equal(logits[3], layer.bias)
    for gradient in torch.autograd.grad(logits.sum(), [features, layer.weight, layer.bias]):
        assert gradient.isfinite().all()
    assert (layer.double()(1000 * features) - logits).abs().max() < 1e-4


def test_a_cosine_classifier_computes_in_float32_under_autocast():
    """In bfloat16, logits of up to 20 would have 8 bits: 512 rows gave 4 different best logits."""
    torch.manual_seed(0)
    layer, features = CosineLinear(64, 100, scale=20.0), torch.rand(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(features)
    assert torch.equal(logits, layer(features))


def test_cosine_classifiers_of_both_tasks_start_like_linear_ones():
    model = make_model("clis.siamese=false", "model.roi.fc_dim=1024", "model.roi.cosine=20")
    for head in (model.classification, model.image_classification):
        assert isinstance(head.fc_cls, CosineLinear)
        assert head.fc_cls.scale == 20
        assert head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert head.fc_cls.bias.abs().max() == 0
    assert not isinstance(model.localization.fc_box, CosineLinear)
    assert not isinstance(make_model().classification.fc_cls, CosineLinear)


def test_refinement_is_three_rounds_of_the_same_heads():
    """features <- features * spatial(deltas) + channel(logits); L_incls by .2, .2, .6; L_loc of the last."""
    model, batch = make_model("model.roi.refinement_rounds=3", "clis=off"), make_batch()
    pooled, features, boxes, labels = [], [], [], []
    sub_network = model.classification.sub_network
    sub_network.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    model.localization.fc_box.register_forward_pre_hook(lambda _, inputs: boxes.append(inputs[0]))
    sub_network.register_forward_hook(lambda _, inputs, output: features.append(output))
    model.classification_loss.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[1]))
    losses = losses_of(model, batch)
    assert len(pooled) == 3
    rois = len(pooled[1])
    expected = 0.0
    for place, weight in enumerate((0.2, 0.2, 0.6)):
        logits = model.classification.fc_cls(features[place][:rois])
        expected += weight * nn.functional.cross_entropy(logits, labels[place])
        if place < 2:
            deltas = model.localization.fc_box(features[place][:rois])
            spatial = model.refinement.spatial(deltas).reshape(rois, 1, 7, 7)
            channel = model.refinement.channel(logits).reshape(rois, 16, 1, 1)
            torch.testing.assert_close(pooled[place + 1], pooled[place][:rois] * spatial + channel)
    torch.testing.assert_close(losses["instance_cls"], expected)
    positives = labels[2] < NUM_CLASSES
    torch.testing.assert_close(boxes[2], features[2][positives])  # what L_loc is computed from

    detected = model.eval().predict(batch.images)
    torch.testing.assert_close(
        torch.cat([scores for _, scores, _ in detected]),
        model.classification.fc_cls(features[-1]).softmax(dim=1)[:, :-1],
    )


@pytest.mark.parametrize("siamese", [True, False])
def test_without_tss_all_tasks_train_one_sub_network(siamese):
    model = make_model("clis.task_specialized=false", f"clis.siamese={siamese}")
    assert model.localization.sub_network is model.classification.sub_network
    assert model.image_classification.sub_network is model.classification.sub_network
    assert (model.image_classification.fc_cls is model.classification.fc_cls) == siamese
    losses = losses_of(model, make_batch())
    for loss in ("box", "objectness", "instance_cls", "image_cls"):
        assert reached(model, losses[loss], "localization.sub_network.")


def test_contrastive_loss_trains_both_tasks():
    model = make_model("clis.siamese=false")
    fill(model.contrastive.queue)
    reaches = gradients(model, losses_of(model, make_batch())["contrastive"])
    for part in (
        "classification.sub_network.fc1.weight", "image_classification.sub_network.fc1.weight",
        "contrastive.instance_mlp.weight", "contrastive.image_mlp.weight", "backbone.body.conv1.weight",
    ):  # fmt: skip
        assert reaches[part] > 0
    assert not any("momentum" in name or "fc_cls" in name or "localization" in name for name in reaches)


# --- every setting of the switches ---


SEESAW = ("loss.classification=seesaw", "clis.objectness=false", "model.roi.cosine=20")
ROUNDS = ("loss.classification=cross_entropy(pcb=0.4)", "model.roi.refinement_rounds=3")


@pytest.mark.parametrize(
    "overrides",
    [*combinations(), SEESAW, ROUNDS, (*ROUNDS, "model.roi.class_agnostic_boxes=true")],
    ids=names_of,
)
def test_every_switch_trains_and_round_trips(overrides):
    model, batch = make_model(*overrides), make_batch(1)
    output = model(batch, normalizers_of(batch))
    sum(output.losses.values()).backward()
    for name, p in model.named_parameters():
        momentum_copy = "momentum" in name
        assert p.requires_grad != momentum_copy, name
        assert (p.grad is None) == momentum_copy, name
    with torch.no_grad():  # one step, so that neither weights nor queue are those of a fresh model
        for p in model.parameters():
            p.sub_(0 if p.grad is None else 0.1 * p.grad)
    assert ("keys" in output.pending.rows) == (model.contrastive is not None)
    model.after_step(output.pending, 0.1)
    if model.contrastive is not None:
        assert model.contrastive.queue.pushed == 4

    other = make_model(*overrides, seed=1)
    other.load_state_dict(model.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for ours, theirs in zip(model.eval().detect(batch.images), other.eval().detect(batch.images)):
        assert len(ours.boxes) > 0
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.labels, theirs.labels)


def test_all_off_is_a_plain_faster_rcnn():
    model, batch = make_model("clis=off"), make_batch()
    output = model(batch, normalizers_of(batch))
    assert set(output.losses) == {"rpn_objectness", "rpn_box", "box", "instance_cls"}
    assert output.pending.rows == {}
    names = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    layers = [f"rpn.{layer}" for layer in ("conv", "objectness", "deltas")]
    layers += [f"localization.sub_network.{layer}" for layer in ("fc1", "fc2")]  # the one 2fc of both tasks
    layers += ["localization.fc_box", "classification.fc_cls"]
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    for trace in ("image_classification", "contrastive", "momentum", "queue", "mlp", "fc_objectness"):
        assert not any(trace in key for key in model.state_dict())
    # the image-level part of a batch changes nothing
    none = {name: getattr(batch, name)[:0] for name in ("mosaics", "regions", "region_labels", "pair_boxes")}
    bare = dataclasses.replace(batch, **none, pair_images=torch.zeros(0, dtype=torch.int64))
    for name, loss in losses_of(model, bare).items():
        assert torch.equal(loss, output.losses[name]), name


# --- values of the losses ---


def silence(model):
    """Last layers that say nothing: all logits and deltas zero."""
    for layer in (model.classification.fc_cls, model.localization.fc_box, model.localization.fc_objectness):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def test_losses_of_a_silent_network():
    model, batch = make_model(), make_batch(2)
    silence(model)
    # 16 RoIs an image; uniform over 5 classes and background: log 6; objectness 1/2: log 2
    losses = losses_of(model, batch)
    assert losses["instance_cls"].item() == pytest.approx(math.log(6))
    assert losses["image_cls"].item() == pytest.approx(math.log(6))
    assert losses["objectness"].item() == pytest.approx(math.log(2))
    # the four ground truths of an image are RoIs of delta 0, up to 4 of 16 are positive
    assert 0 <= losses["box"].item() < 4 / 16 * 40
    assert losses["contrastive"].item() == 0  # the queue is empty
    # three times the global batch: a third of the loss
    larger = losses_of(model, batch, Normalizers(6, 24, 12))
    for name in ("instance_cls", "objectness", "rpn_objectness", "image_cls"):
        assert larger[name].item() == pytest.approx(losses[name].item() / 3)


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_box_loss_is_of_the_own_class(class_agnostic):
    # ground truth alone is proposed: the targets are zero, and the loss is the deltas' own size
    model = make_model(f"model.roi.class_agnostic_boxes={class_agnostic}", "clis.s=0", "clis.t=0",
                       "clis.contrastive=false", "model.roi.positive_fraction=1")  # fmt: skip
    silence(model)
    num_boxes = 1 if class_agnostic else NUM_CLASSES
    with torch.no_grad():  # class c predicts c + 1 in all four coordinates
        model.localization.fc_box.bias.copy_(torch.arange(1.0, num_boxes + 1).repeat_interleave(4))
    model.rpn.propose = lambda *levels: [torch.zeros(0, 4)]
    sample = make_sample(3, truths=4, pairs=0)
    expected = sum(4 * (1 if class_agnostic else label + 1) for label in sample.labels.tolist()) / 16
    assert losses_of(model, collate([sample]))["box"].item() == pytest.approx(expected)


def test_pairs_are_pooled_exactly_on_their_boxes():
    model, batch = make_model(), make_batch(2, pairs=2)
    keys, labels = model(batch, normalizers_of(batch)).pending.rows.values()
    assert batch.pair_regions.tolist() == [0, 1, 4, 5]
    assert batch.pair_images.tolist() == [0, 0, 1, 1]
    pasted = model.roi_align(model.backbone(batch.images), batch.pair_boxes, batch.pair_images)
    regions = model.roi_align(model.backbone(batch.mosaics), batch.regions, batch.region_mosaics)
    expected = model.contrastive.make_keys(pasted, regions[batch.pair_regions])
    torch.testing.assert_close(keys, expected)
    assert labels[0::2].tolist() == batch.region_labels[batch.pair_regions].tolist()
    assert labels[1::2].tolist() == labels[0::2].tolist()


def test_memory_format_changes_nothing():
    model, batch = make_model(), make_batch(2)
    assert model.backbone.top_down(batch.images)[0].is_contiguous(memory_format=torch.channels_last)
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        losses = losses_of(model, batch)
        results.append([losses, gradients(model, sum(losses.values()))])
    torch.testing.assert_close(*results)


# --- odd batches ---


@pytest.mark.parametrize(
    "samples",
    [
        [make_sample(0, truths=0, pairs=0)],
        [make_sample(0, truths=0, pairs=0), make_sample(1)],
        [make_sample(0), make_sample(1, pairs=0)],
        [make_sample(0, regions=3, pairs=1), make_sample(1, regions=1, pairs=0)],
        [make_sample(0, truths=0, regions=0, pairs=0)],
        [make_sample(0, size=(33, 70)), make_sample(1, size=(80, 41))],
    ],
    ids=["no boxes", "no boxes in one", "no pairs in one", "dropped regions", "nothing", "sizes"],
)
@pytest.mark.parametrize("full", [False, True])
def test_odd_batches_train_every_parameter(samples, full):
    model, batch = make_model(), collate(samples)
    if full:
        fill(model.contrastive.queue)
    output = model(batch, normalizers_of(batch))
    sum(output.losses.values()).backward()
    assert len(output.losses) == 7
    for name, loss in output.losses.items():
        assert loss.isfinite(), name
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.isfinite().all(), name  # zero where there is nothing to learn, but there
    rows = output.pending.rows
    assert len(rows["keys"]) == len(rows["key_labels"]) == 2 * len(batch.pair_boxes)
    model.after_step(output.pending, 0.1)


def test_region_losses_equal_torchvisions_up_to_the_recipe():
    """What differs: L1 against smooth L1 with beta 1/9, and whether too few RoIs change the normalizer."""
    model = make_model("clis=off", "model.roi.samples=1000", "model.roi.positive_fraction=1")
    batch = make_batch(2)
    generator = torch.Generator().manual_seed(0)
    proposals = [
        torch.cat(
            [random_boxes(40, 64, 64, generator), boxes + 2 * torch.randn(len(boxes), 4, generator=generator)]
        )
        for boxes in batch.boxes
    ]
    proposals = [proposal.double() for proposal in proposals]
    model.rpn.propose = lambda *levels_and_sizes: proposals
    losses = losses_of(model, batch)

    theirs = RoIHeads(None, None, None, 0.5, 0.5, 1000, 1.0, None, 0.05, 0.5, 100)  # every RoI is sampled
    targets = [{"boxes": b.double(), "labels": x + 1} for b, x in zip(batch.boxes, batch.labels)]
    rois, _, labels, deltas = theirs.select_training_samples(list(proposals), targets)
    rows = torch.tensor([row for row, boxes in enumerate(rois) for _ in boxes])
    pooled = model.roi_align(model.backbone(batch.images), torch.cat(rois), rows)
    features = model.classification.sub_network(pooled)
    logits = model.classification.fc_cls(features).roll(1, dims=1)  # background first
    boxes = torch.cat([torch.zeros(len(rows), 4), model.localization.fc_box(features)], dim=1)
    cls_loss, box_loss = fastrcnn_loss(logits, boxes, labels, deltas)
    # theirs is the mean over the RoIs that there are, ours over the number that is asked for
    assert len(rows) < 2000
    share = len(rows) / 2000
    torch.testing.assert_close(losses["instance_cls"], share * cls_loss)
    # |d| - 1/18 where |d| is over 1/9, and 9/2 d^2 below
    labels, deltas = torch.cat(labels), torch.cat(deltas)
    positive = torch.nonzero(labels > 0).squeeze(1)
    assert 8 < len(positive) < len(rows) - 8
    errors = (boxes.unflatten(1, (-1, 4))[positive, labels[positive]] - deltas[positive]).abs()
    gaps = torch.where(errors > 1 / 9, 1 / 18, errors - 4.5 * errors.square())
    torch.testing.assert_close(losses["box"], share * box_loss + gaps.sum() / 2000)


# --- determinism, precision ---


def test_losses_are_a_function_of_batch_and_seeds():
    model = make_model()
    first, second = losses_of(model, make_batch()), losses_of(model, make_batch())
    other = losses_of(model, dataclasses.replace(make_batch(), seeds=[0, 9]))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert first["rpn_objectness"] != other["rpn_objectness"]


def test_the_loss_is_told_which_share_of_its_rows_can_be_positive():
    """Of RoIs what they were sampled with, which EFL divides by; of regions, its second call, all."""
    model = make_model("loss.classification=efl", "model.roi.positive_fraction=0.5")
    forward, shares = model.classification_loss.forward, []

    def remember(logits, labels, normalizer, rows):
        shares.append(rows.positive_fraction)
        return forward(logits, labels, normalizer, rows)

    model.classification_loss.forward = remember
    batch = make_batch()
    model(batch, normalizers_of(batch))
    assert shares == [0.5, 1.0]


def test_losses_of_a_batch_are_the_sum_over_its_items():
    # images of one size, whose padding is alike: neither order nor neighbors nor micro-batches matter
    model, samples = make_model(), [make_sample(seed) for seed in range(3)]
    fill(model.contrastive.queue)
    normalizers = Normalizers(3, 12, 6)
    together = losses_of(model, collate(samples), normalizers)
    reversed_order = losses_of(model, collate(samples[::-1]), normalizers)
    alone = [losses_of(model, collate([sample]), normalizers) for sample in samples]
    for name, loss in together.items():
        torch.testing.assert_close(reversed_order[name], loss, msg=name)
        torch.testing.assert_close(sum(losses[name] for losses in alone), loss, msg=name)


def test_autocast_on_the_cpu():
    model, batch = make_model().float(), make_batch()
    fill(model.contrastive.queue)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, normalizers_of(batch))
    sum(output.losses.values()).backward()
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # the RPN's maps, made without a graph, left no weights without one in autocast's cache
    assert all(p.grad.any() for p in model.rpn.parameters())
    assert output.pending.rows["keys"].dtype == torch.float32


# --- predictions and detections ---


@pytest.mark.parametrize("objectness", [True, False])
def test_score_is_class_probability_times_objectness(objectness):
    model = make_model(f"clis.objectness={objectness}").eval()
    odds = torch.tensor([1.0, 2, 3, 4, 5, 25])  # of 40, background last
    layers = [(model.classification.fc_cls, odds.log())]
    layers += [(model.localization.fc_objectness, torch.tensor([math.log(3)]))] if objectness else []
    for layer, bias in layers:
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(bias)
    images = make_batch(2, size=(64, 96)).images
    for rois, scores, deltas in model.predict(images):
        expected = (odds[:5] / 40).double() * (3 / 4 if objectness else 1)
        torch.testing.assert_close(scores, expected.expand(len(rois), 5))
        assert deltas.shape == (len(rois), NUM_CLASSES, 4)
        assert 0 < len(rois) <= 30


def test_objectness_and_class_of_a_score_are_of_the_same_roi():
    model = make_model().eval()
    image = make_sample(4).image
    rois, scores, _ = model.predict([image])[0]
    rows = torch.zeros(len(rois), dtype=torch.int64)
    pooled = model.roi_align(model.backbone([image]), rois, rows)
    classes = model.classification.fc_cls(model.classification.sub_network(pooled)).softmax(dim=1)
    objectness = model.localization.fc_objectness(model.localization.sub_network(pooled)).sigmoid()
    torch.testing.assert_close(scores, classes[:, :5] * objectness)


def predicting(model, rois, scores, deltas=None):
    """The model, made to predict this for every image; remembers the images."""
    seen = []

    def predict(images, max_size):
        seen.extend(images)
        moved = torch.zeros(len(rois), NUM_CLASSES, 4) if deltas is None else deltas
        return [(torch.tensor(rois, dtype=torch.float32).reshape(-1, 4), scores, moved)] * len(images)

    model.predict = predict
    return seen


def test_boxes_are_in_pixels_of_the_given_image():
    model = make_model().float().eval()
    scores = torch.tensor([[0.9, 0, 0, 0, 0], [0, 0, 0.8, 0, 0]])
    # 48 x 100 at short side 64 would be 133 wide; the limit of 96 makes it 46 x 96
    seen = predicting(model, [[0.0, 0, 96, 46], [48, 23, 72, 46]], scores)
    found = model.detect([torch.zeros(3, 48, 100, dtype=torch.uint8)])[0]
    assert seen[0].shape == (3, 46, 96)
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 100, 48], [50, 24, 75, 48]]))
    assert found.labels.tolist() == [0, 2]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8]))


def test_detections_of_images_of_many_sizes():
    model = make_model().float().eval()
    seen = predicting(model, [[0.0, 0, 1000, 1000]], torch.tensor([[0.9, 0, 0, 0, 0]]))
    sizes = [(30, 20), (20, 30), (64, 64), (200, 100)]
    found = model.detect([torch.zeros(3, *size, dtype=torch.uint8) for size in sizes])
    # the first and the last are both padded to 96 x 64
    assert [tuple(image.shape[1:]) for image in seen] == [(96, 64), (96, 48), (64, 96), (64, 64)]
    for (height, width), detections in zip(sizes, found):
        # clipped to the image and back on it
        torch.testing.assert_close(detections.boxes, torch.tensor([[0.0, 0, width, height]]))


def test_resize_keeps_the_picture():
    # an image of the size that is asked for is not touched; a larger one keeps where things are
    model, image = make_model(), make_sample(0).image
    assert torch.equal(model.resize(image, (64, 64)), image)
    large = torch.zeros(3, 128, 128, dtype=torch.uint8)
    large[:, :, 64:] = 200
    small = model.resize(large, model.resized_size((128, 128), 64, 96))
    assert small.shape == (3, 64, 64)
    assert small.dtype == torch.uint8
    assert not small[:, :, :31].any()
    assert (small[:, :, 33:] == 200).all()


@pytest.mark.parametrize("size", [(48, 100), (64, 64), (37, 41), (301, 90)])
def test_torchvisions_resize(size):
    model = make_model("test.resize=torchvision").eval()
    image = make_sample(1, size=size).image
    theirs = GeneralizedRCNNTransform(64, 96, [0.0] * 3, [1.0] * 3).eval()
    expected = theirs.resize(image.double())[0]
    torch.testing.assert_close(model.resize(image, model.resized_size(size, 64, 96)), expected)


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_rank_first_finds_a_class_behind_many_detections(class_agnostic):
    model = make_model("test.detections=300").float().eval()
    # 300 RoIs apart from each other are surely class 0; RoI 300 is the best of class 3, below every threshold
    rois = [[4.0 * (i % 20), 4.0 * (i // 20), 4.0 * (i % 20) + 3, 4.0 * (i // 20) + 3] for i in range(300)]
    rois += [[20.0, 10, 40, 30], [0, 0, 60, 60]]
    scores = torch.full((302, NUM_CLASSES), 1e-9)
    scores[:300, 0] = 0.9
    scores[300, 3] = 2e-6
    scores[301, 3] = 1e-6
    deltas = torch.zeros(302, 1 if class_agnostic else NUM_CLASSES, 4)
    deltas[300, -1 if class_agnostic else 3, 0] = 5.0  # half a width to the right, at std 0.1
    predicting(model, rois, scores, deltas)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    assert 3 not in model.detect([image])[0].labels
    ((box, score),) = model.rank_first([image], torch.tensor([3]))
    torch.testing.assert_close(box, torch.tensor([30.0, 10, 50, 30]))
    assert score.item() == pytest.approx(2e-6)


def test_rank_first_takes_each_image_s_own_label():
    model = make_model().float().eval()
    predicting(
        model, [[0.0, 0, 8, 8], [8, 8, 24, 24]], torch.tensor([[0.9, 0.1, 0, 0, 0], [0.2, 0.7, 0, 0, 0]])
    )
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2
    (first, first_score), (second, second_score) = model.rank_first(images, torch.tensor([1, 0]))
    assert first.tolist() == [8, 8, 24, 24]
    assert second.tolist() == [0, 0, 8, 8]
    assert (first_score.item(), second_score.item()) == (pytest.approx(0.7), pytest.approx(0.9))


def test_an_image_without_rois():
    model = make_model().float().eval()
    predicting(model, [], torch.zeros(0, NUM_CLASSES), torch.zeros(0, NUM_CLASSES, 4))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    assert len(model.detect([image])[0].boxes) == 0
    ((box, score),) = model.rank_first([image], torch.tensor([1]))
    assert box.isnan().all()
    assert score == 0


def test_on_the_square_canvas_group_norm_sees_the_same_padding_in_any_batch():
    """Images of three shapes: features, and detections, alone as beside the others."""
    images = [make_sample(seed, size=size).image for seed, size in enumerate([(64, 64), (50, 96), (90, 33)])]

    def largest_difference(canvas: str) -> float:
        model = make_model(f"model.backbone.canvas={canvas}", "data.max_size=96").eval()
        small = [model.resize(x, model.resized_size(tuple(x.shape[1:]), 64, 96)) for x in images]
        together = model.backbone(small, 96)[0]
        alone = [model.backbone([image], 96)[0][0] for image in small]
        shared = [
            (a[:, : b.shape[1], : b.shape[2]] - b[:, : a.shape[1], : a.shape[2]])
            for a, b in zip(together, alone)
        ]
        return max(difference.abs().max().item() for difference in shared)

    assert largest_difference("square") < 1e-10
    assert largest_difference("batch") > 1e-3
    model = make_model("model.backbone.canvas=square", "data.max_size=96").eval()
    for image, found in zip(images, model.detect(images)):
        (single,) = model.detect([image])
        torch.testing.assert_close(single.boxes, found.boxes)
        torch.testing.assert_close(single.scores, found.scores)
        assert torch.equal(single.labels, found.labels)


def test_training_and_test_images_lie_on_the_same_canvas():
    model, batch = (
        make_model("model.backbone.canvas=square", "data.max_size=90"),
        make_batch(1, size=(40, 64)),
    )
    seen = []
    model.backbone.body.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    model(batch, normalizers_of(batch))
    model.eval().detect(batch.images)
    # instance-level images in training and at test; mosaics, all of one size, keep theirs
    assert seen == [(96, 96), (MOSAIC, MOSAIC), (96, 96)]


def test_detections_do_not_depend_on_the_rest_of_the_batch():
    """Nor on its largest image: the small one, in the middle, is padded as it would be alone."""
    model, images = make_model().eval(), make_batch(3).images
    images = [images[0], images[1][:, :40], images[2]]
    together = model.detect(images)
    for image, found in zip(images, together):
        (alone,) = model.detect([image])
        assert 0 < len(alone.boxes) <= 20
        torch.testing.assert_close(alone.boxes, found.boxes)
        torch.testing.assert_close(alone.scores, found.scores)
        assert torch.equal(alone.labels, found.labels)
