"""What all corruptions have in common: names, errors, seeds, shapes, devices."""

from collections import Counter

import pytest
import torch

import datasets.corruptions as corruptions
from datasets.corruptions import CORRUPTIONS, FAMILIES, corrupt, frost_texture
from datasets.corruptions.draws import BLOCK, Draws
from tests.reference import compare
from tests.reference import weather as reference
from tests.reference.compare import differences
from utils.errors import InputError

RANDOM = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
    "speckle_noise",
    "spatter",
)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pictures(n=2, height=32, width=32, device="cpu"):
    return compare.to_batch(compare.pictures(n + 2, height, width)[:n]).to(device)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Of the values that differ from the definition's, by 1 at most, the largest share. Exact results
# are often whole numbers, or below one by less than float32 can tell, and then truncation may part:
# 5 pixels' mean is whole one time in five (defocus_blur at r = 1).
SHARES = {"gaussian_noise": 0.005, "impulse_noise": 0.005, "speckle_noise": 0.005}
SHARES |= dict.fromkeys(("gaussian_blur", "zoom_blur", "glass_blur", "motion_blur"), 0.03)
SHARES |= {"defocus_blur": 0.12, "snow": 0.01, "frost": 0.01, "fog": 0.01, "spatter": 0.01}
SHARES |= {"brightness": 0.05, "contrast": 0.2, "saturate": 0.2, "elastic_transform": 0.05}
CASES = [
    (size, shape, severity)
    for size, shapes in ((32, ((32, 32), (20, 33))), (64, ((64, 64), (64, 51))))
    for shape in shapes
    for severity in ((1, 2, 3, 4, 5) if shape[0] == shape[1] else (2, 5))
]


@pytest.fixture(scope="module")
def stand_ins():
    full = [texture.permute(1, 2, 0).numpy() for texture in frost_texture._synthetic()]
    return {
        size: [reference.downscale(texture, factor) for texture in full]
        for size, factor in ((32, 0.2), (64, 0.3))
    }


@pytest.mark.parametrize(("size", "shape", "severity"), CASES)
@pytest.mark.parametrize("name", SHARES)
def test_matches_the_definition_with_the_same_draws(name, size, shape, severity, stand_ins):
    if name == "elastic_transform" and shape[0] != shape[1]:
        return
    c = corruptions._TABLE[name][1][size][severity - 1]
    extra = [stand_ins[size]] if name == "frost" else []
    found = differences(name, compare.pictures(5, *shape), c, *extra)
    assert found.max() <= 1
    assert found.mean() <= SHARES[name]


def test_names_are_those_of_the_published_sets_in_order():
    names = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur
        zoom_blur snow frost fog brightness contrast elastic_transform pixelate jpeg_compression
        speckle_noise gaussian_blur spatter saturate"""
    assert " ".join(CORRUPTIONS) == " ".join(names.split())
    assert tuple(FAMILIES) == CORRUPTIONS
    families = Counter(FAMILIES.values())
    assert families == {"noise": 4, "blur": 5, "weather": 5, "digital": 5}
    assert FAMILIES["spatter"] == FAMILIES["brightness"] == "weather"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_gives_a_new_uint8_tensor_like_the_input(name, device):
    images = pictures(device=device)
    before = images.clone()
    for severity in (1, 2, 3, 4, 5):
        out = corrupt(images, name, severity, seeded())
        assert (out.dtype, out.shape, out.device) == (torch.uint8, images.shape, images.device)
        assert not torch.equal(out, before)
        assert (out.float() - before.float()).abs().mean() < 120
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (31, 31), (24, 40), (49, 33), (96, 96)])
def test_other_sizes_work(name, height, width):
    images = pictures(2, height, width)
    if name == "elastic_transform" and height != width:
        with pytest.raises(InputError, match=f"{height}×{width}.*square"):
            corrupt(images, name, 5, seeded())
        return
    out = corrupt(images, name, 5, seeded())
    assert out.shape == images.shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_larger_images_have_constants_of_their_own(name):
    """Up to 48 pixels CIFAR-10-C's, above Tiny-ImageNet-C's; zoom_blur's are the same."""
    _, table = corruptions._TABLE[name]
    assert set(table) == {32, 64}
    assert len(table[32]) == len(table[64]) == 5
    assert (tuple(table[32]) == tuple(table[64])) == (name == "zoom_blur")


@pytest.mark.parametrize("side", [48, 49])
def test_the_columns_part_at_48_pixels(side):
    images = torch.full((40, 3, side, side), 128, dtype=torch.uint8)
    spread = corrupt(images, "gaussian_noise", 5, seeded()).float().std() / 255
    assert spread == pytest.approx(0.10 if side == 48 else 0.18, rel=0.02)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_follow_the_seed(name):
    images = pictures(3)
    first = corrupt(images, name, 5, seeded(0))
    assert torch.equal(first, corrupt(images, name, 5, seeded(0)))
    assert not torch.equal(first, corrupt(images, name, 5, seeded(1)))
    generator = seeded(0)
    corrupt(images, name, 5, generator)
    assert not torch.equal(first, corrupt(images, name, 5, generator))
    torch.manual_seed(5)
    implicit = corrupt(images, name, 5)
    torch.manual_seed(5)
    assert torch.equal(implicit, corrupt(images, name, 5))


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(RANDOM)))
def test_the_eight_others_draw_nothing(name):
    images = pictures(3)
    assert torch.equal(corrupt(images, name, 5, seeded(0)), corrupt(images, name, 5, seeded(1)))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_chunks_and_threads_do_not_matter(name, monkeypatch):
    images = pictures(2).repeat(BLOCK + 20, 1, 1, 1)[: 2 * BLOCK + 33]
    out = []
    threads = torch.get_num_threads()
    for blocks, used in ((1, 1), (2, 1), (8, 1), (1, 2)):
        monkeypatch.setattr(corruptions, "_blocks_per_chunk", lambda *_, n=blocks: n)
        torch.set_num_threads(used)
        try:
            out.append(corrupt(images, name, 5, seeded()).int())
            assert torch.get_num_threads() == used
        finally:
            torch.set_num_threads(threads)
    for other in out[1:]:
        # Float sums may be taken in another order, and a value next to a whole number truncated
        # to the other side; draws and everything else must be the same.
        assert ((other - out[0]).abs() > 1).float().mean() < 1e-5
        assert (other != out[0]).float().mean() < 1e-4


def test_same_pictures_get_different_draws():
    images = pictures(1).repeat(BLOCK + 1, 1, 1, 1)
    for name in RANDOM:
        out = corrupt(images, name, 5, seeded())
        assert not torch.equal(out[0], out[1]), name
        assert not torch.equal(out[0], out[BLOCK]), name


def test_draws_of_a_block_do_not_depend_on_the_others():
    whole = Draws(2 * BLOCK + 5, "cpu", seed=3)
    tail = Draws(BLOCK + 5, "cpu", seed=4)
    for method, shape in (("normal", (2, 3)), ("uniform", (4,)), ("uniform", ())):
        a, b = getattr(whole, method)(*shape), getattr(tail, method)(*shape)
        assert a.shape == (2 * BLOCK + 5, *shape) and a.dtype == torch.float32
        assert torch.equal(a[BLOCK:], b)
    a, b = whole.integers(-2, 3, 7), tail.integers(-2, 3, 7)
    assert a.dtype == torch.int64 and set(a.unique().tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(a[BLOCK:], b)
    u = whole.uniform(1000, low=-3.0, high=2.0)
    assert u.min() >= -3 and u.max() < 2 and abs(u.mean() + 0.5) < 0.02


def test_batches_that_are_empty_or_strided():
    assert corrupt(pictures(4)[:0], "fog", 3).shape == (0, 3, 32, 32)
    images = pictures(4)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for name in CORRUPTIONS:
        out = corrupt(images, name, 3, seeded())
        assert torch.equal(out, corrupt(channels_last, name, 3, seeded())), name


def test_training_modes_do_not_matter():
    images = pictures(4)
    plain = {name: corrupt(images, name, 3, seeded()) for name in CORRUPTIONS}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for name, expected in plain.items():
                assert torch.equal(corrupt(images, name, 3, seeded()), expected), name
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((pictures(), "gausian_noise", 5), "did you mean 'gaussian_noise'"),
        ((pictures(), "fog", 0), "--severity 0: must be a whole number from 1 to 5"),
        ((pictures(), "fog", 6), "--severity 6"),
        ((pictures(), "fog", 2.5), "--severity 2.5"),
        ((pictures(), "fog", True), "--severity True"),
        ((pictures().float(), "fog", 5), r"uint8 \(N, 3, H, W\), not torch.float32"),
        ((pictures().numpy(), "fog", 5), "uint8 tensor, not ndarray"),
        ((pictures()[0], "fog", 5), r"\(N, 3, H, W\), not torch.uint8 \(3, 32, 32\)"),
        ((pictures()[:, :1], "fog", 5), r"not torch.uint8 \(2, 1, 32, 32\)"),
        ((pictures(2, 7, 32), "fog", 5), "7×32.*8×8"),
    ],
)
def test_what_cannot_be_corrupted_is_an_error(arguments, message):
    with pytest.raises(InputError, match=message):
        corrupt(*arguments)
