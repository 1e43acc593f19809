"""Models: torchvision's keys and outputs, normalization inside, depth order."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision

from models import ARCHS, build_model, head_prefix
from models.convolution import Conv3x3, use_own_gradient
from models.layers import carried_keys, depth_order, infer_arch, layer_keys
from models.vgg import add_batchnorm, fold_batchnorm

LAYERS = {"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}
LAYERS |= {"resnet18": 9, "resnet34": 17, "resnet50": 17, "resnet101": 34}


@pytest.mark.parametrize(("arch", "layers"), LAYERS.items())
def test_number_of_layers(arch, layers):
    assert len(depth_order(arch)) == layers
    assert len(layer_keys(arch, layers)) == sum(map(len, depth_order(arch)))
    for bad in (0, -1, layers + 1):
        with pytest.raises(ValueError, match=f"--keep_num {bad}: {arch} has {layers} layers"):
            layer_keys(arch, bad)


@pytest.mark.parametrize("arch", ARCHS)
def test_backbone_keys_are_torchvisions(arch):
    with torch.device("meta"):
        ours = build_model(arch, 10).state_dict()
        theirs = torchvision.models.get_model(arch).state_dict()
    own = {k for k in ours if not k.startswith((head_prefix(arch), "normalize."))}
    assert own == {k for k in theirs if not k.startswith(head_prefix(arch))}
    assert all(ours[k].shape == theirs[k].shape for k in own)
    assert infer_arch(ours) == arch


def test_vgg_layers_are_convolutions_in_order():
    keys = layer_keys("vgg16", 3)
    assert keys == [f"features.{i}.{part}" for i in (0, 2, 5) for part in ("weight", "bias")]
    assert carried_keys("vgg16") == []


def test_resnet50_layers_are_stem_and_blocks():
    assert layer_keys("resnet50", 1) == ["conv1.weight", "bn1.weight", "bn1.bias"]
    second = depth_order("resnet50")[1]
    assert {k.split(".")[1] for k in second} == {"0"}
    assert "layer1.0.downsample.0.weight" in second and "layer1.0.conv3.weight" in second
    assert depth_order("resnet50")[4][0] == "layer2.0.conv1.weight"
    # 53 batch norms with weight and bias each, and 4 downsample convolutions
    assert len(carried_keys("resnet50")) == 2 * 53 + 4


STAGES = {  # output channels of the convolutions of each stage: Simonyan & Zisserman, table 1
    "vgg11": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "vgg13": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "vgg16": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "vgg19": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


@torch.no_grad()
def vgg_by_hand(arch, state, x, batch_stats=None):
    """The paper's VGG, written out: no max-pool behind the fifth stage.

    With `batch_stats` (True: those of the batch, False: the running ones) a batch norm stands
    behind every convolution.
    """
    mean, std = (state[f"normalize.{name}"].view(1, 3, 1, 1) for name in ("mean", "std"))
    x = (x - mean) / std
    index = 0
    for number, stage in enumerate(STAGES[arch], start=1):
        for channels in stage:
            w, b = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
            assert len(w) == channels
            x = F.conv2d(x, w, b, padding=1)
            if batch_stats is not None:
                index += 1
                parts = ("running_mean", "running_var", "weight", "bias")
                now, var, γ, β = (state[f"features.{index}.{part}"] for part in parts)
                if batch_stats:
                    now, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
                now, var, γ, β = (t.view(1, -1, 1, 1) for t in (now, var, γ, β))
                x = (x - now) / (var + 1e-5).sqrt() * γ + β
            x = x.clamp(min=0)
            index += 2
        if number < 5:
            x = F.max_pool2d(x, 2, 2)
            index += 1
    return F.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def randomize(model):
    """Biases and batch norms of their own: what a fresh model leaves at 0 and 1 counts, too."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith((".bias", "running_mean")):
                tensor.normal_(std=0.1)
            elif key.endswith("running_var") or (tensor.dim() == 1 and key.endswith(".weight")):
                tensor.uniform_(0.5, 1.5)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("arch", STAGES)
def test_vgg_is_the_papers(arch, side):
    torch.manual_seed(0)
    model = build_model(arch, 5, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    randomize(model)
    x = torch.rand(3, 3, side, side)
    expected = vgg_by_hand(arch, model.state_dict(), x)
    assert expected.std() > 1e-2
    for train in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(train)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("train", [True, False])
def test_vgg_with_batchnorm_is_the_papers(side, train):
    torch.manual_seed(0)
    model = build_model("vgg11", 5)
    add_batchnorm(model, "vgg11")
    randomize(model)
    x = torch.rand(8, 3, side, side)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        outputs = model.train(train)(x)
    expected = vgg_by_hand("vgg11", state, x, batch_stats=train)
    torch.testing.assert_close(outputs, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_model_normalizes_its_input(arch):
    torch.manual_seed(0)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    model = build_model(arch, 7, mean, std).eval()
    plain = build_model(arch, 7).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("normalize.")}
    plain.load_state_dict(state, strict=False)
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(by_hand))
        assert model(x).shape == (2, 7)
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_resnet_is_torchvisions():
    torch.manual_seed(0)
    ours = build_model("resnet18", 5).eval()
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("normalize.")}
    theirs.load_state_dict(state)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_unknown_architecture_names_the_known():
    assert set(LAYERS) == set(ARCHS)
    with pytest.raises(ValueError, match=r"--arch resnet8: .*known: vgg11.*resnet18"):
        build_model("resnet8", 10)


def test_folding_batchnorm_changes_no_output():
    torch.manual_seed(0)
    model = build_model("vgg11", 4)
    keys = list(model.state_dict())
    add_batchnorm(model, "vgg11")
    model.train()(torch.rand(8, 3, 32, 32))  # gives the running statistics values of their own
    randomize(model)
    model.eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        fold_batchnorm(model, "vgg11")
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (5, 8), (8, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_own_gradient_is_that_of_the_convolution(sides, bias):
    plain = torch.nn.Conv2d(4, 6, 3, padding=1, bias=bias).double()
    own = copy.deepcopy(plain)
    use_own_gradient(own)
    assert type(own) is Conv3x3 and own.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(5, 4, *sides, dtype=torch.double)
    for needed in (True, False):  # of the input: not that of the first layer
        values = []
        for conv in (plain, own):
            x = images.clone().requires_grad_(needed)
            y = conv(x)
            conv.zero_grad()
            y.pow(3).sum().backward()
            values.append([y, *(p.grad for p in conv.parameters()), *([x.grad] * needed)])
        assert all(torch.allclose(a, b) for a, b in zip(*values, strict=True))
        assert [v.shape for v in values[0]] == [v.shape for v in values[1]]
    # The gradient to weights that are computed, and to the input of frozen ones.
    scale = torch.ones((), dtype=torch.double, requires_grad=True)
    for conv in (plain, own):
        weights = {k: v.detach() * scale for k, v in conv.named_parameters()}
        torch.func.functional_call(conv, weights, images).pow(3).sum().backward()
        values.append(scale.grad.clone())
        scale.grad = None
        conv.requires_grad_(False)
        x = images.clone().requires_grad_()
        conv(x).pow(3).sum().backward()
        values.append(x.grad)
    assert torch.allclose(values[2], values[4]) and torch.allclose(values[3], values[5])


def test_own_gradient_only_of_its_kind():
    kinds = [{"stride": 2, "padding": 1}, {"padding": 0}, {"padding": 1, "groups": 2}]
    kinds += [{"padding": 1, "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}]
    model = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, **kind) for kind in kinds))
    model.append(torch.nn.Conv2d(4, 4, 1))
    use_own_gradient(model)
    assert not any(isinstance(module, Conv3x3) for module in model)
