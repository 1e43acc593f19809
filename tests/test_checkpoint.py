"""Checkpoints: every published form loads, anything else is refused with a reason."""

import hashlib
from unittest import mock

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


FORMS = {  # the state dict of a model, as files have it
    "authors": lambda s: {"state_dict": s, "best_sa": np.float64(79.2), "epoch": 3},
    "no normalize": lambda s: {"state_dict": {k: v for k, v in s.items() if "normalize" not in k}},
    "plain": lambda s: s,
    "module.": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "half": lambda s: {"state_dict": {k: v.half() for k, v in s.items()}},
    "1311": lambda s: {k: v.view(1, 3, 1, 1) if "normalize" in k else v for k, v in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_load(vgg, tmp_path, form):
    state = dict(vgg.state_dict())
    torch.save(FORMS[form](state), tmp_path / "m.pth")
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


BIAS = "features.0.bias"


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"extra.weight": torch.zeros(1)}, {}, r"not hold a vgg11: unexpected extra\.weight$"),
        ({"features.3.bias": None}, {}, r"not hold a vgg11: missing features\.3\.bias$"),
        ({"features.3.bias": None, "x": torch.zeros(1)}, {}, r"missing feat.*; unexpected x$"),
        ({}, {"classes": 100}, "another data set"),
        ({}, {"arch": "resnet18"}, r"does not hold a resnet18: missing .* and \d+ more"),
        ({BIAS: torch.zeros(3)}, {}, r"features\.0\.bias is \(3,\), vgg11 .*\(64,\)"),
        ({BIAS: torch.full((64,), torch.nan)}, {}, r"NaN or Inf in features\.0\.bias"),
        ({7: torch.zeros(1)}, {}, "unexpected 7"),
    ],
)
def test_mismatches_are_named(vgg, tmp_path, change, options, said):
    path = tmp_path / "m.pth"
    state = {**vgg.state_dict(), **change}
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises(InputError, match=rf"m\.pth.*{said}"):
        load_back(path, **options)
    if not options:  # and as pretrained weights
        with pytest.raises(InputError, match=rf"m\.pth.*{said}"):
            ckpt.load_pretrained(build_model("vgg11", 5), "vgg11", ckpt.read_state_dict(path), path)


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "m.pth"
    with pytest.raises(InputError, match=r"m\.pth: no such"):
        ckpt.read(path)
    with pytest.raises(InputError, match="folder"):
        ckpt.read(tmp_path)
    for content, said in (
        ([1, 2], "holds a dict, this is a list"),
        ({"epoch": 1}, "no tensors"),
        ({"state_dict": 5}, "no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=said):
            ckpt.read_state_dict(path)


def test_hash_names_the_backbone():
    """As in the files and folders of before: SHA-256 over names and float32 bits, in order."""
    torch.manual_seed(0)
    state = dict(build_model("resnet18", 10, MEAN, STD).state_dict())
    for version in (state, {k: v.half() for k, v in state.items()}):
        digest = hashlib.sha256()
        for key in sorted(version):
            if key.split(".")[0] not in ("fc", "normalize") and "tracked" not in key:
                digest.update(key.encode() + version[key].float().numpy().tobytes())
        assert ckpt.backbone_hash(version) == digest.hexdigest()[:16]
        shuffled = dict(reversed(version.items()))
        other = {k: v + 1 if k.startswith("fc.") else v for k, v in shuffled.items()}
        assert ckpt.backbone_hash(other) == digest.hexdigest()[:16]
        moved = {**version, "bn1.bias": version["bn1.bias"] + 1e-3}
        assert ckpt.backbone_hash(moved) != digest.hexdigest()[:16]
    assert ckpt.tensors_hash({"b": torch.ones(2), "a": torch.tensor(1)}) == "429720003bb4ba4f"


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


def test_several_files_of_one_checkpoint_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", save := mock.Mock(wraps=torch.save))
    paths = [tmp_path / name for name in "abc"]
    ckpt.save({"state_dict": {"w": torch.ones(3)}}, *paths)
    assert save.call_count == 1 and len({path.read_bytes() for path in paths}) == 1
    assert torch.equal(ckpt.read(paths[2])["state_dict"]["w"], torch.ones(3))


def test_imagenet_weights_offline_name_the_flag(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(InputError, match="--pretrained_path"):
        ckpt.pretrained_state_dict(ckpt.IMAGENET, "resnet18")
