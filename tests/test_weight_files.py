"""Weights as people have them: below keys and prefixes, beside objects of any class, or no weights at all."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import pytest
import torch
from conftest import tiny_config

from clis.engine.checkpoint import load_checkpoint
from clis.engine.start import check_frozen_layers
from clis.models import weights as weights_module
from clis.models.backbone import ResNet
from clis.models.weight_files import read_weights
from clis.models.weights import FROM_SCRATCH, load_backbone_weights

BACKBONE = tiny_config("model.backbone.norm=folded").model.backbone


def resnet(seed: int = 1) -> dict[str, torch.Tensor]:
    """The state dict of a small ResNet, with the classifier that torchvision's have."""
    torch.manual_seed(seed)
    return ResNet(BACKBONE).state_dict() | {
        "fc.weight": torch.zeros(3, 3),
        "bn1.num_batches_tracked": torch.zeros(()),
    }


def below(prefix: str, seed: int = 1) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in resnet(seed).items()}


def loaded(path) -> dict[str, torch.Tensor]:
    body = ResNet(BACKBONE)
    load_backbone_weights(body, BACKBONE.name, path)
    return body.state_dict()


@pytest.mark.parametrize(
    "content",
    [
        resnet(),
        below("module."),
        {"model": resnet()},
        {"model_state_dict": below("module."), "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
        {"state_dict": {"model": below("backbone.")}},
        {
            "arch": "resnet10",
            "state_dict": below("module.encoder_q.")
            | below("module.encoder_k.", 2)
            | {"module.queue": torch.ones(2)},
        },
        {"state_dict": below("module.online_encoder.0.") | below("module.target_encoder.0.", 2)},
        {"network": below("model."), "ema_decay": 0.9},
        {"state_dict": below("backbone.") | {"head.fc.weight": torch.ones(2), "neck.bias": torch.ones(1)}},
        {"format": 1, "model": below("backbone.body.") | {"rpn.conv.bias": torch.ones(1)}},
    ],
    ids=[
        "plain", "DDP", "model", "model_state_dict", "two", "MoCo", "BYOL", "another key", "heads", "ours",
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_a_backbone_is_found_below_keys_and_prefixes(content, zipped, tmp_path):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found, expected = loaded(tmp_path / "w.pth"), resnet()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_of_two_networks_none_is_guessed(tmp_path):
    torch.save(below("left.") | below("right."), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: several ResNets, below left\., right\.:"):
        loaded(tmp_path / "w.pth")


def test_names_that_are_not_known_are_shown(tmp_path):
    """detectron2's names: nothing of them is a ResNet of torchvision's; the norm is not to blame."""
    torch.save(
        {"model": {"stem.conv1.weight": torch.ones(2), "res2.0.conv1.weight": torch.ones(2)}},
        tmp_path / "w.pth",
    )
    with pytest.raises(ValueError, match=r"the file has stem\.conv1\.weight, res2\.0\.conv1\.weight$"):
        loaded(tmp_path / "w.pth")


def test_the_norm_is_named_where_it_is_the_other(tmp_path):
    group = tiny_config("model.backbone.norm=group").model.backbone
    torch.save(ResNet(group).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="norm=group is for weights with group norm"):
        loaded(tmp_path / "w.pth")


class Foreign:
    """A class of a training script, which nobody who reads its checkpoint has."""

    def __init__(self) -> None:
        self.value, self.made = 5, True

    def __setstate__(self, state) -> None:
        raise AssertionError("code of the file was run")


def test_objects_beside_the_weights_are_passed_over(tmp_path):
    beside = {
        "args": argparse.Namespace(lr=0.02, out=pathlib.Path("x")),
        "best": np.float64(0.5),
        "history": [np.arange(3), np.float32(1), Foreign()],
    }
    torch.save({"model": {"a": torch.arange(3)}} | beside, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>quota exceeded</html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b'\x10\0\0\0\0\0\0\0{"a": {}}      ', "a safetensors file"),
        (b'{"images": []}', "a text"),
        (b"PK\x03\x04 cut off", "damaged, or not a state dict"),
    ],
)
def test_files_that_are_no_weights(content, message, tmp_path):
    for name in ("w.pth", "w.pkl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: {message}") as error:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(error.value)
        assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Foreign(), r"a whole object \(test_weight_files\.Foreign\), not a state dict"),
        ({"epoch": 3, "lr": 0.1}, "no tensor in epoch, lr"),
        ({"teacher": below(""), "student": below("")}, "tensors below each of teacher, student"),
        ([1, 2], "a list, not a state dict"),
    ],
)
def test_content_that_is_no_state_dict(content, message, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: .*{message}"):
        read_weights(tmp_path / "w.pth")


def test_a_checkpoint_of_others_says_what_it_holds(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace()}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"not a checkpoint of clis, .* it holds model, args; .*clis convert"
    ):
        load_checkpoint(tmp_path / "w.pt")


def test_a_failed_download_names_url_and_file(tmp_path, monkeypatch):
    monkeypatch.setitem(weights_module.WEIGHTS_URL, BACKBONE.name, (tmp_path / "none-00.pth").as_uri())
    with pytest.raises(OSError, match=r"w\.pth: file://.*none-00\.pth could not be downloaded"):
        load_backbone_weights(ResNet(BACKBONE), BACKBONE.name, tmp_path / "w.pth", download=True)
    assert not (tmp_path / "w.pth").exists()


def test_layers_are_not_frozen_at_random_weights(tmp_path):
    frozen = ["model.backbone={norm: folded, trainable_layers: 3, weights: null}", f"output={tmp_path}"]
    with pytest.raises(ValueError, match=r"weights=null: trainable_layers=3 would freeze 2 of 5") as error:
        check_frozen_layers(tiny_config(*frozen))
    assert FROM_SCRATCH in str(error.value)
    check_frozen_layers(tiny_config(*frozen, FROM_SCRATCH))
    check_frozen_layers(tiny_config(*frozen, "model.backbone.weights=w.pth"))
