"""ResNets with torchvision's blocks and ImageNet stem, normalizing their input themselves.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from torch import Tensor, nn
from torchvision.models import resnet

RESNETS = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
}


class ResNet(resnet.ResNet):
    """torchvision's ResNet, keys unchanged, with `normalize.mean` and `normalize.std` in front."""

    def __init__(self, arch: str, num_classes: int, normalize: nn.Module) -> None:
        block, depths = RESNETS[arch]
        super().__init__(block, depths, num_classes=num_classes)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.normalize(x))
