"""Checkpoints: every published form loads, anything else is refused with a reason."""

import numpy as np
import pytest
import torch
import torchvision

from models import build_model
from utils import checkpoint as ckpt
from utils.errors import InputError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return build_model("vgg11", 10, MEAN, STD)


def load_back(path, arch="vgg11", classes=10):
    model = build_model(arch, classes, MEAN, STD)
    ckpt.load_model_weights(model, arch, ckpt.read_state_dict(path), path)
    return model


@pytest.mark.parametrize("form", ["authors", "no normalize", "plain", "module.", "half", "1311"])
def test_published_forms_load(vgg, tmp_path, form):
    state = dict(vgg.state_dict())
    content = {"state_dict": state, "best_sa": np.float64(79.2), "epoch": 3}
    if form == "no normalize":
        content["state_dict"] = {k: v for k, v in state.items() if "normalize" not in k}
    elif form == "plain":
        content = state
    elif form == "module.":
        content["state_dict"] = {f"module.{k}": v for k, v in state.items()}
    elif form == "half":
        content["state_dict"] = {k: v.half() for k, v in state.items()}
    elif form == "1311":
        for key in ("normalize.mean", "normalize.std"):
            content["state_dict"] = {**content["state_dict"], key: state[key].view(1, 3, 1, 1)}
    torch.save(content, tmp_path / "m.pth")
    loaded = load_back(tmp_path / "m.pth").state_dict()
    for key, tensor in state.items():
        expected = tensor.half().float() if form == "half" else tensor
        assert torch.equal(loaded[key], expected), key


def test_torchvision_vgg_loses_its_three_layer_head(vgg, tmp_path):
    theirs = torchvision.models.vgg11().state_dict()
    # The 4096-wide layers would be 470 MB here and are dropped anyway.
    theirs = {k: v if k.startswith("features") else v[:1] for k, v in theirs.items()}
    model = build_model("vgg11", 10, MEAN, STD)
    dropped = ckpt.load_pretrained(model, "vgg11", theirs, "tv")
    assert len(dropped) == 6
    assert torch.equal(model.features[0].weight, theirs["features.0.weight"])
    assert torch.equal(model.normalize.mean, torch.tensor(MEAN))


def test_torchvision_resnet_and_its_head(tmp_path):
    theirs = torchvision.models.resnet18().state_dict()
    model = build_model("resnet18", 10)
    assert ckpt.load_pretrained(model, "resnet18", theirs, "tv") == ["fc.bias", "fc.weight"]
    assert torch.equal(model.layer3[1].conv2.weight, theirs["layer3.1.conv2.weight"])
    # The head of a pretrained ResNet is new even for the same number of classes.
    model = build_model("resnet18", 1000)
    assert ckpt.load_pretrained(model, "resnet18", theirs, "tv")
    assert not torch.equal(model.fc.weight, theirs["fc.weight"])
    assert ckpt.load_pretrained(model, "resnet18", theirs, "tv", keep_head=True) == []
    assert torch.equal(model.fc.weight, theirs["fc.weight"])
    with pytest.raises(InputError, match="no linear head of 10 classes"):
        ckpt.load_pretrained(build_model("resnet18", 10), "resnet18", theirs, "tv", keep_head=True)


def test_pretrained_linear_head_of_the_same_size_is_taken(vgg):
    model = build_model("vgg11", 10)
    assert ckpt.load_pretrained(model, "vgg11", vgg.state_dict(), "x") == []
    assert torch.equal(model.classifier.weight, vgg.classifier.weight)
    assert model.normalize.mean.tolist() == [0, 0, 0]  # the data set's, not the file's


def test_mismatches_are_named(vgg, tmp_path):
    path = tmp_path / "m.pth"
    state = dict(vgg.state_dict())

    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"unexpected extra\.weight"):
        load_back(path)
    torch.save({k: v for k, v in state.items() if k != "features.3.bias"}, path)
    with pytest.raises(InputError, match=r"missing features\.3\.bias"):
        load_back(path)
    torch.save(state, path)
    with pytest.raises(InputError, match="another data set"):
        load_back(path, classes=100)
    with pytest.raises(InputError, match="does not hold a resnet18"):
        load_back(path, arch="resnet18")
    torch.save({**state, "features.0.bias": torch.full((64,), float("nan"))}, path)
    with pytest.raises(InputError, match=r"NaN or Inf in features\.0\.bias"):
        load_back(path)


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "m.pth"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"m\.pth"):
            ckpt.read(path)
    with pytest.raises(InputError, match="no such"):
        ckpt.read(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="folder"):
        ckpt.read(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="dict"):
        ckpt.read(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(InputError, match="no tensors"):
        ckpt.read_state_dict(path)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="not opened"):
        ckpt.read(tmp_path / "m.pth")
    assert not (tmp_path / "ran").exists()


def test_hash_names_the_backbone(vgg):
    state = dict(vgg.state_dict())
    base = ckpt.backbone_hash(state)
    other_head = {k: v + 1 if "classifier" in k else v for k, v in state.items()}
    assert ckpt.backbone_hash(other_head) == base
    moved = {k: v + 1e-3 if k == "features.0.bias" else v for k, v in state.items()}
    assert ckpt.backbone_hash(moved) != base


def test_save_is_atomic(vgg, tmp_path, monkeypatch):
    path = tmp_path / "m.pth"
    ckpt.save({"state_dict": vgg.state_dict()}, path)
    before = path.read_bytes()

    def failing(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(InputError, match="No space left"):
        ckpt.save({}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_imagenet_weights_offline_name_the_flag(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(InputError, match="--pretrained_path"):
        ckpt.pretrained_state_dict(ckpt.IMAGENET, "resnet18")
