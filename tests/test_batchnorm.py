"""Re-estimation of running statistics against a plain average over batches."""

import pytest
import torch
from torch import nn

from datasets.images import ImageSet
from datasets.loader import BatchLoader
from models import build_model
from utils.batchnorm import has_batchnorm, pooled, reestimate, running_statistics
from utils.errors import InputError


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.zeros(count, dtype=torch.int64), ["a"], "test")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("resnet18", 4)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model.eval()


def first_layer_statistics(model, loaders):
    """Mean and unbiased variance of the stem's output per batch, averaged over images."""
    means, variances, counts = [], [], []
    for loader in loaders:
        for x, _ in loader:
            out = model.conv1(model.normalize(x)).transpose(0, 1).flatten(1)
            means.append(out.mean(1) * len(x))
            variances.append(out.var(1) * len(x))
            counts.append(len(x))
    return sum(means) / sum(counts), sum(variances) / sum(counts)


def loaders():
    # Uneven last batches and several sets: every image counts the same.
    return [BatchLoader(images(23, 1), 8), BatchLoader(images(10, 2), 8)]


def test_modes_stay_as_they_were(model):
    model.train().layer1.eval()
    modes = [m.training for m in model.modules()]
    reestimate(model, loaders())
    assert [m.training for m in model.modules()] == modes
    assert model.bn1.num_batches_tracked == 5  # of the pass


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_cumulative_average_and_interpolation(model, strength):
    old = model.bn1.running_mean.clone(), model.bn1.running_var.clone()
    mean, var = first_layer_statistics(model, loaders())
    parameters = {k: v.clone() for k, v in model.named_parameters()}
    reestimate(model, loaders(), strength)
    expected = strength * mean + (1 - strength) * old[0], strength * var + (1 - strength) * old[1]
    found = model.bn1.running_mean, model.bn1.running_var
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not model.training and not any(m.training for m in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(v, parameters[k]) for k, v in model.named_parameters())


@torch.no_grad()
def test_pooled_statistics_are_those_of_the_joined_images(model):
    def stem(x):
        return model.conv1(model.normalize(x)).transpose(0, 1).flatten(1)

    parts = [next(iter(BatchLoader(images(n, seed), n))) for n, seed in ((8, 1), (8, 2), (8, 3))]
    for k, (x, _) in enumerate(parts):
        x *= (k + 1) / 3  # of different brightness
    found = []
    for part in parts:
        reestimate(model, [[part]])
        found.append(running_statistics(model))
    assert len(found[0]) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    total = pooled(pooled(found[0], found[1], 1 / 2), found[2], 1 / 3)
    joined = stem(torch.cat([x for x, _ in parts]))
    torch.testing.assert_close(total["bn1.running_mean"], joined.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(total["bn1.running_var"], joined.var(1), atol=1e-5, rtol=1e-3)
    assert pooled(found[0], {}, 1 / 2) == {}  # not known of both


def test_strength_zero_reads_and_changes_nothing(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate(model, None, 0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_models_without_batchnorm_are_left_alone():
    assert not has_batchnorm(build_model("vgg11", 4))
    reestimate(build_model("vgg11", 4), loaders())


def test_forms_of_batches(model):
    """One loader, bare images and uint8 give what a list of loaders of float images gives."""
    set_of = images(16, 1).images
    mean, var = first_layer_statistics(model, [[(part / 255, None)] for part in set_of.split(8)])
    pairs = [(part / 255, None) for part in set_of.split(8)]
    whole = set_of.long().split(8)
    for form in (
        pairs,
        [pairs],
        set_of.split(8),
        whole,
        [[part / 255 for part in set_of.split(8)]],
    ):
        reestimate(model, form)
        torch.testing.assert_close(model.bn1.running_mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.bn1.running_var, var, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("nothing", [[], [[]], [[], []], iter(()), [torch.empty(0, 3, 32, 32)]])
def test_no_batches_are_refused_and_change_nothing(model, nothing):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="no images"):
        reestimate(model, nothing)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    for strength in (-0.5, 1.5, float("nan")):
        with pytest.raises(InputError, match="strength"):
            reestimate(model, loaders(), strength)
