"""The paper's classifiers: VGG without batch norm, and ResNets, on torchvision's classes.

model = build_model("vgg16", num_classes=10, mean=MEAN, std=STD)
logits = model(images)          # images (N, 3, H, W) in [0, 1]; the model normalizes by itself
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import nn

from models.normalize import Normalize
from models.resnet import RESNETS, ResNet
from models.vgg import VGG, VGGS

ARCHS = (*VGGS, *RESNETS)


def build_model(
    arch: str, num_classes: int, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> nn.Module:
    """A freshly initialized `arch`: images (N, 3, H, W) in [0, 1] → logits (N, num_classes).

    `mean` and `std` (per channel, in [0, 1] units) become the buffers `normalize.mean` and
    `normalize.std`. State-dict keys are torchvision's; VGG's head is one linear `classifier`.
    Raises ValueError for an unknown architecture.
    """
    if arch in VGGS:
        return VGG(arch, num_classes, Normalize(mean, std))
    if arch in RESNETS:
        return ResNet(arch, num_classes, Normalize(mean, std))
    raise ValueError(f"--arch {arch}: unknown architecture; known: {', '.join(ARCHS)}")


def head_prefix(arch: str) -> str:
    """The state-dict prefix of the classification head of `arch`, e.g. "fc."."""
    return "classifier." if arch.startswith("vgg") else "fc."


def split(model: nn.Module, keys: Iterable[str]) -> tuple[nn.Module, nn.Module]:
    """(shallow, deep), in a row the model; the parameters `keys` are all in shallow.

    Both share the model's modules; shallow has its state-dict keys. Of anything but a VGG here
    shallow is the whole.
    """
    if not isinstance(model, VGG):
        return model, nn.Identity()
    depth = max(int(key.split(".")[1]) for key in keys) + 1  # features.N.weight
    shallow = OrderedDict(normalize=model.normalize, features=model.features[:depth])
    deep = (model.features[depth:], model.avgpool, nn.Flatten(), model.classifier)
    return nn.Sequential(shallow), nn.Sequential(*deep)
