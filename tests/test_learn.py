"""Learnt weights: their gradient, how many there are, and what is done with them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import build_model
from utils import learn as learning
from utils.batchnorm import running_statistics
from utils.errors import InputError
from utils.learn import learn, words
from utils.signature import RobustWeightSignature, patch


def world(arch="vgg11", keep_num=2):
    """θ_std, two signatures, uint8 parts and labels."""
    torch.manual_seed(0)
    models = [build_model(arch, 4) for _ in range(4)]
    states = [model.state_dict() for model in models]
    signatures = [
        RobustWeightSignature.extract(*states[:2], state, keep_num, corruption=name)
        for name, state in zip(("fog", "snow"), states[2:], strict=True)
    ]
    parts = [torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8) for _ in range(3)]
    return models[1].eval(), signatures, parts, torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_the_gradient_is_that_of_finite_differences(monkeypatch, arch, labeled):
    model, signatures, parts, labels = world(arch)
    found = []

    class Spy(torch.optim.SGD):
        def step(self):
            (w,) = self.param_groups[0]["params"]
            found.append(w.grad.clone())

    monkeypatch.setattr(learning.torch.optim, "Adam", Spy)
    how = {"per_layer": False, "steps": 1, "statistics": running_statistics(model)}
    learn(model, signatures, parts, labels if labeled else None, **how)

    model.double()  # ReLUs bend within steps that float32 could tell apart
    fog, snow = (
        replace(s, tensors={k: t.double() for k, t in s.tensors.items()}) for s in signatures
    )

    @torch.no_grad()
    def loss(a, b):
        with patch(model, fog, a), patch(model, snow, b):
            logits = model(torch.cat(parts).double() / 255)
        if labeled:
            return F.cross_entropy(logits, labels.repeat(3)).item()
        return torch.distributions.Categorical(logits=logits).entropy().mean().item()

    step = 1e-5
    expected = [
        (loss(0.5 + step, 0.5) - loss(0.5 - step, 0.5)) / (2 * step),
        (loss(0.5, 0.5 + step) - loss(0.5, 0.5 - step)) / (2 * step),
    ]
    torch.testing.assert_close(found[0].flatten(), torch.tensor(expected), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "per_layer", "count"),
    [("vgg11", False, 1), ("vgg11", True, 2), ("resnet18", False, 1), ("resnet18", True, 9)],
)
def test_one_weight_per_signature_or_per_layer(arch, per_layer, count):
    model, signatures, parts, labels = world(arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    how = {"per_layer": per_layer, "steps": 2, "statistics": running_statistics(model)}
    composed = learn(model, signatures, parts, labels, **how)
    assert {name: len(w) for name, w in composed.weights.items()} == {"fog": count, "snow": count}
    assert composed.name == "fog+snow" and not composed.statistics
    assert all((w - 0.5).abs().max() > 0.01 for w in composed.weights.values())  # they moved
    first = next(iter(signatures[0].tensors))
    fog, snow = (w[0] for w in composed.weights.values())
    expected = fog * signatures[0].tensors[first] + snow * signatures[1].tensors[first]
    torch.testing.assert_close(composed.tensors[first], expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert words(composed)[0].split()[:2] == ["w", "fog"]
    with pytest.raises(InputError, match="two signatures of one name in fog, fog"):
        learn(model, signatures[:1] * 2, parts, labels, **how)


def test_batches_hold_every_part_alike_and_no_image_twice(monkeypatch):
    monkeypatch.setattr(learning, "BATCH", 7)  # two of each of three parts
    _, _, parts, labels = world()
    seen, how = [[], [], []], (parts, labels, 3, torch.Generator(), torch.device("cpu"))
    for images, wanted in learning._batches(*how):
        assert len(images) == len(wanted) == 6
        for k, (x, y) in enumerate(zip(images, wanted, strict=True)):
            (i,) = [i for i in range(6) if torch.equal(parts[k // 2][i], x)]
            assert labels[i] == y
            seen[k // 2].append(i)
    assert [sorted(each) for each in seen] == [list(range(6))] * 3
