"""VGG without batch norm as the paper uses it: convolutions, average pool to 1×1, one linear head.

Simonyan & Zisserman, "Very Deep Convolutional Networks", ICLR 2015; configurations A, B, D, E.
The max-pool after the fifth stage is left out, as in the network of the RWS authors: the average
pool takes the mean of 2×2 values for images of 32×32, of 4×4 for 64×64. No parameter shows it.
"""

import itertools

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

VGGS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
MIN_SIDE = 16  # pixels: four max-pools halve the image


def _convolutions(arch: str, batch_norm: bool) -> nn.Sequential:
    """torchvision's `features` of `arch` less the last max-pool, so with its keys."""
    return make_layers(cfgs[VGGS[arch]][:-1], batch_norm)


class VGG(nn.Module):
    """torchvision's convolutions (`features.N.*`) under a 512 → `num_classes` `classifier`."""

    def __init__(self, arch: str, num_classes: int, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.features = _convolutions(arch, batch_norm=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.normalize(x))
        return self.classifier(torch.flatten(self.avgpool(x), 1))


def add_batchnorm(model: VGG, arch: str) -> None:
    """Put a fresh batch norm behind every convolution of `model`, in place (keys change with it).

    Without it a VGG hardly trains from random weights; `fold_batchnorm` takes it out again.
    """
    model.features = _convolutions(arch, batch_norm=True)


@torch.no_grad()
def fold_batchnorm(model: VGG, arch: str) -> None:
    """Fold every batch norm into its convolution, in place: same outputs in eval mode, own keys.

    w' = w · γ/√(var + ε),  b' = β + (b − mean) · γ/√(var + ε).
    """
    plain = _convolutions(arch, batch_norm=False).to(next(model.parameters()).device)
    targets = (m for m in plain if isinstance(m, nn.Conv2d))
    for conv, bn in itertools.pairwise(model.features):
        if isinstance(bn, nn.BatchNorm2d):
            target, gain = next(targets), bn.weight / (bn.running_var + bn.eps).sqrt()
            target.weight.copy_(conv.weight * gain[:, None, None, None])
            target.bias.copy_(bn.bias + (conv.bias - bn.running_mean) * gain)
    model.features = plain
