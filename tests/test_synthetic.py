"""The data set `synthetic`: reproducible, balanced, its splits apart, its pictures as described."""

import numpy as np
import pytest
import torch

from datasets import synthetic
from utils.errors import InputError

SMALL = {"all": 600, "test": 400, "pretrain": 400}


def load(split="train", image_size=None, **sizes):
    """A split of a smaller set."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(synthetic, "SIZES", {**SMALL, **sizes})
        return synthetic.load(split, image_size)


@pytest.fixture(scope="module")
def splits():
    return {split: load(split) for split in synthetic.SPLITS}


@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_sizes_types_and_balance(splits, split):
    made, classes = splits[split], 20 if split == "pretrain" else 10
    count = {"train": 540, "val": 60, **SMALL}[split]
    assert made.images.shape == (count, 3, 32, 32)
    assert len(made.classes) == len(set(made.classes)) == classes
    assert torch.bincount(made.labels).tolist() == [count // classes] * classes


def test_default_sizes():
    assert len(synthetic.load("val")) == 1_000
    assert len(synthetic.load("test")) == 2_000


def test_train_then_val_is_all(splits):
    for part in (splits["train"], splits["val"]):
        assert torch.equal(part.images, splits["all"].images[part.rows])
        assert torch.equal(part.labels, splits["all"].labels[part.rows])
        assert part.total == len(splits["all"]) == 600
    assert splits["train"].rows.tolist() == list(range(540))
    assert splits["val"].rows.tolist() == list(range(540, 600))


@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_same_bits_again_whatever_the_threads_and_the_global_seed(splits, split):
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = load(split)
        assert torch.get_num_threads() == 3 - min(threads, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again.images, splits[split].images)
    assert torch.equal(again.labels, splits[split].labels)


@pytest.mark.parametrize("count", [1, 199, 201, 350])
def test_a_smaller_set_begins_a_larger_one(splits, count):
    few = load("all", all=count)
    assert torch.equal(few.images, splits["all"].images[:count])
    assert torch.equal(few.labels, splits["all"].labels[:count])


def test_no_image_is_shared_between_or_within_splits(splits):
    rows = [splits[split].images.flatten(1) for split in ("all", "test", "pretrain")]
    assert len(torch.unique(torch.cat(rows), dim=0)) == sum(len(part) for part in rows)
    # Nor nearly: twins differing only in the camera's noise would be about 1 apart.
    a, b = (splits[split].images.flatten(1).float() for split in ("all", "test"))
    nearest = torch.cdist(b, a, p=1).amin() / a.shape[1]
    assert nearest > 5


def test_classes_of_pretraining_are_others():
    for position in (0, 1):  # outlines, textures
        one = {kind[position] for kind in synthetic.CLASSES.values()}
        other = {kind[position] for kind in synthetic.PRETRAIN_CLASSES.values()}
        assert not one & other
    assert len(set(synthetic.CLASSES.values())) == len({o for o, _ in synthetic.CLASSES.values()})


@pytest.mark.parametrize("side", [16, 33, 64])
def test_other_image_sizes_show_the_same_scenes(splits, side):
    made = load("test", side, test=200)
    assert made.images.shape == (200, 3, side, side)
    assert torch.equal(made.labels, splits["test"].labels[:200])
    few, many = (
        torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1).T
        for images in (splits["test"].images[:200], made.images)
    )
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(few, many, strict=True)]
    assert min(alike) > 0.5


def test_statistics_are_near_those_of_photographs(splits):
    images = splits["all"].images.double() / 255
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    assert ((mean > 0.4) & (mean < 0.6)).all()  # CIFAR-10: 0.45 to 0.49
    assert ((std > 0.15) & (std < 0.3)).all()  # CIFAR-10: 0.24 to 0.26
    grey = (images.mean(1) - images.mean((1, 2, 3))[:, None, None]).numpy()
    power = np.abs(np.fft.fft2(grey)) ** 2
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)) * 32
    bands = [
        np.log2(power[:, (frequency >= low) & (frequency < 2 * low)].mean()) for low in (1, 2, 4, 8)
    ]
    slope = np.polyfit([0, 1, 2, 3], bands, 1)[0]
    assert -3.5 < slope < -1  # power per octave; about -2 for photographs
    correlation = np.corrcoef(images.mean((2, 3)).T.numpy())
    assert correlation[0, 1] > 0.5  # colours are mostly luminance


def test_texture_tells_the_class_only_at_fine_scale():
    """Bars inside a disk all but vanish from means of 4x4 pixels."""
    made = load("test")
    bars = made.images[made.labels == list(synthetic.CLASSES).index("bars disk")].float()
    centre = bars[:, :, 12:20, 12:20].mean(1)
    coarse = torch.nn.functional.avg_pool2d(centre[:, None], 4)[:, 0]
    assert centre.std((1, 2)).mean() > 3 * coarse.std((1, 2)).mean()


def test_same_bits_under_autocast(splits):
    with torch.autocast("cpu", torch.bfloat16):
        again = load("val")
    assert torch.equal(again.images, splits["val"].images)


def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match="did you mean 'test'"):
        synthetic.load("tset")
    with pytest.raises(InputError, match="16 to 256"):
        synthetic.load(image_size=8)
