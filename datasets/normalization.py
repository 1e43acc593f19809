"""Channel mean and standard deviation by which a model of a data set normalizes its input."""

import torch

from datasets.images import ImageSet
from utils.errors import InputError

# mean, std of [0, 1] values per channel, as the paper's authors use them
PUBLISHED = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]),
    "tinyimagenet": ([0.4802, 0.4481, 0.3975], [0.2302, 0.2265, 0.2262]),
}


def normalization(dataset: str, train: ImageSet) -> tuple[list[float], list[float]]:
    """(mean, std) per channel for `dataset`: the published constants, else measured on `train`."""
    if dataset in PUBLISHED:
        return PUBLISHED[dataset]
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in train.images.split(1000):  # a whole set as floats might not fit
        x = part.double() / 255
        sums += torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))])
    mean, square = sums / (len(train) * train.images[0, 0].numel())
    variance = square - mean**2
    if not bool((variance > 1e-8).all()):
        raise InputError(f"{dataset}: the training images are of one constant colour")
    return mean.tolist(), variance.sqrt().tolist()
