"""The batch loader: augmentations against torchvision per image, reproducible epochs, no losses."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import loader
from datasets.images import ImageSet
from datasets.loader import BatchLoader, evaluation_batches
from utils.errors import InputError


def make_set(count: int = 50, side: int = 8, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count), [str(i) for i in range(count)], "synthetic")


# ---------------------------------------------------------------------------------------------
# Augmentations


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(3, 10), st.integers(3, 10), st.integers(1, 4), st.data())
def test_crop_is_torchvisions_pad_and_crop(count, height, width, padding, data):
    images = torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8)
    offsets = st.lists(st.integers(0, 2 * padding), min_size=count, max_size=count)
    dy, dx = data.draw(offsets), data.draw(offsets)
    cropped = loader.crop(images, torch.tensor(dy), torch.tensor(dx), padding)
    for image, top, left, result in zip(images, dy, dx, cropped, strict=True):
        expected = TF.crop(TF.pad(image, [padding] * 4), top, left, height, width)
        assert torch.equal(result, expected)


def test_flip_is_torchvisions_hflip():
    images = make_set(6).images
    flipped = torch.tensor([True, False, True, True, False, False])
    for image, mirrored, result in zip(images, flipped, loader.flip(images, flipped), strict=True):
        assert torch.equal(result, TF.hflip(image) if mirrored else image)


@pytest.mark.parametrize("side", [31, 32, 64])
def test_rotate_is_torchvisions_rotate(side):
    images = make_set(60, side).images
    angles = torch.linspace(-20, 20, 60)
    angles[:3] = torch.tensor([0.0, 90.0, -180.0])
    expected = torch.stack([TF.rotate(i, float(a)) for i, a in zip(images, angles, strict=True)])
    rotated = loader.rotate(images, angles)
    assert torch.equal(rotated[0], images[0])
    # Sources halfway between two pixels may round either way.
    assert (rotated != expected).any(1).float().mean() < 1e-4


def test_augmentations_keep_the_dtype():
    offsets = torch.tensor([0, 8, 3, 4])
    for dtype in (torch.uint8, torch.float32):
        images = make_set(4).images.to(dtype)
        assert loader.crop(images, offsets, offsets).dtype == dtype
        assert loader.flip(images, offsets > 3).dtype == dtype
        assert loader.rotate(images, offsets.float()).dtype == dtype


def test_a_last_batch_of_one_image_is_left_out_of_training():
    assert [len(labels) for _, labels in BatchLoader(make_set(33), 16, shuffle=True)] == [16, 16]
    assert [len(labels) for _, labels in BatchLoader(make_set(33), 16)] == [16, 16, 1]
    assert len(BatchLoader(make_set(1), 16, shuffle=True)) == 1


def test_draws_cover_their_range_evenly():
    def draw(augment):
        batches = BatchLoader(make_set(1, 32), 1, augment)
        return batches._draw(10_000, torch.Generator().manual_seed(0))

    *offsets, flips = draw("crop_flip")
    for offset in offsets:
        counts = torch.bincount(offset, minlength=9)
        assert len(counts) == 9 and (counts - 1111).abs().max() < 150
    angles, _ = draw("rotate_flip")
    assert -20 <= angles.min() < -19.9 and 19.9 < angles.max() <= 20 and abs(angles.mean()) < 0.5
    assert abs(flips.float().mean() - 0.5) < 0.02


def test_augmentation_for():
    expected = {"tinyimagenet": "rotate_flip", "cifar10": "crop_flip", "cifar100": "crop_flip"}
    expected |= {"synthetic": "crop_flip", "folder": "crop_flip"}
    assert {name: loader.augmentation_for(name) for name in expected} == expected


# ---------------------------------------------------------------------------------------------
# Loader


def epoch(batches: BatchLoader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_plain_batches_are_the_set_in_order():
    data = make_set(50)
    batches = BatchLoader(data, 16)
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [16, 16, 16, 2] and len(batches) == 4
    images, labels = epoch(batches)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images, torch.stack([TF.convert_image_dtype(i) for i in data.images]))
    assert torch.equal(labels, data.labels)
    assert torch.equal(data.images, make_set(50).images)  # the set itself is left alone


@pytest.mark.parametrize("augment", [None, "crop_flip", "rotate_flip"])
def test_every_image_once_per_epoch_in_a_new_order(augment):
    batches = BatchLoader(make_set(50), 16, augment, shuffle=True)
    first, second = epoch(batches)[1], epoch(batches)[1]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(50))


def test_labels_go_with_their_images():
    data = make_set(50)
    images, labels = epoch(BatchLoader(data, 16, shuffle=True))
    assert torch.equal((images * 255).round().to(torch.uint8), data.images[labels])


@pytest.mark.parametrize("augment", ["crop_flip", "rotate_flip"])
def test_epoch_is_the_augmentations_of_its_draws(augment, monkeypatch):
    """Whatever the grouping into batches, image i is changed by draw i alone, as by torchvision."""
    monkeypatch.setattr(loader, "CROP_PADDING", 8)  # 2 at 8 pixels
    data = make_set(20)
    batches = BatchLoader(data, 6, augment, shuffle=True, seed=3)
    drawn = []
    draw = batches._draw
    batches._draw = lambda *args: drawn.append(draw(*args)) or drawn[0]
    images, labels = epoch(batches)
    *place, flips = drawn[0]
    for i, label in enumerate(labels):
        expected = data.images[label]
        if augment == "crop_flip":
            dy, dx = (int(draws[i]) for draws in place)
            expected = TF.crop(TF.pad(expected, [2] * 4), dy, dx, 8, 8)
        else:
            expected = TF.rotate(expected, float(place[0][i]))
        expected = TF.hflip(expected) if flips[i] else expected
        assert torch.equal((images[i] * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("augment", ["crop_flip", "rotate_flip"])
def test_grouping_batches_changes_nothing(augment, monkeypatch):
    data = make_set(50)
    one = epoch(BatchLoader(data, 7, augment, shuffle=True))
    # An accelerator augments several batches together; force that path.
    grouped = BatchLoader(data, 7, augment, shuffle=True)
    monkeypatch.setattr(BatchLoader, "_together", lambda self: 3 * self.batch_size)
    several = epoch(grouped)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_same_seed_same_epochs_and_other_seed_others():
    runs = [BatchLoader(make_set(), 16, "crop_flip", shuffle=True, seed=s) for s in (1, 1, 2)]
    first, again, other = ([epoch(run)[0] for _ in range(2)] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_resumes_at_the_next_epoch():
    run = BatchLoader(make_set(), 16, "rotate_flip", shuffle=True, seed=5)
    epochs, states = [], []
    for _ in range(3):
        states.append(run.state_dict())
        epochs.append(epoch(run)[0])
    for number in (2, 1):
        resumed = BatchLoader(make_set(), 16, "rotate_flip", shuffle=True, seed=0)
        resumed.load_state_dict(states[number])
        assert torch.equal(epoch(resumed)[0], epochs[number])


def test_epochs_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(BatchLoader(make_set(), 16, "crop_flip", shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("side, padding", [(8, 1), (32, 4), (48, 6), (64, 8)])
def test_crop_padding_is_four_at_32_pixels(side, padding):
    batches = BatchLoader(make_set(200, side), 200, "crop_flip")
    dy, dx, _ = batches._draw(200, torch.Generator().manual_seed(0))
    assert int(dy.max()) == int(dx.max()) == 2 * padding


# ---------------------------------------------------------------------------------------------
# Sets that stay in host memory, parts for several processes


@pytest.mark.parametrize("augment", [None, "crop_flip", "rotate_flip"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_host_memory_gives_the_same_batches(augment, shuffle, ranks, monkeypatch):
    monkeypatch.setattr(BatchLoader, "_together", lambda self: 2 * self.batch_size // self.ranks)
    options = {"shuffle": shuffle, "rank": ranks - 1, "ranks": ranks}
    places = [
        BatchLoader(make_set(50), 8, augment, **options, resident=resident)
        for resident in (True, False)
    ]
    for _ in range(2):  # epochs
        # Kept until the end: no later copy may write over a batch that was given out.
        resident, host = (list(place) for place in places)
        for (images, labels), (same_images, same_labels) in zip(resident, host, strict=True):
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert "host memory, copied to the device ahead of their batches" in places[1].residence
    assert "host memory" not in places[0].residence


def test_host_memory_is_read_a_chunk_ahead(monkeypatch):
    gathered, select = [], torch.index_select

    def spy(images, dim, rows, out):
        gathered.append(rows)
        return select(images, dim, rows, out=out)

    monkeypatch.setattr(torch, "index_select", spy)
    batches = BatchLoader(make_set(24), 8, resident=False)
    assert [len(gathered) for _ in batches] == [2, 3, 3]


def test_where_a_set_lies_depends_on_the_free_memory(monkeypatch):
    gpu, images = torch.device("cuda"), torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    for name, free in (("mem_get_info", (50_000, 0)), ("memory_reserved", 4_000)):
        monkeypatch.setattr(torch.cuda, name, lambda _, free=free: free)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1_000)
    assert loader.fits(images, gpu)  # 19,200 bytes, under half of 53,000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (35_000, 0))
    assert not loader.fits(images, gpu)
    assert loader.fits(images, torch.device("cpu"))


@pytest.mark.parametrize("augment", [None, "crop_flip", "rotate_flip"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count, ranks", [(50, 2), (47, 3), (51, 3)])
def test_processes_share_every_batch_out(augment, shuffle, count, ranks):
    """The parts of a batch, one after the other, are the batch of a single process."""
    whole = BatchLoader(make_set(count), 12, augment, shuffle=shuffle)
    parts = [
        BatchLoader(make_set(count), 12, augment, shuffle=shuffle, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for number, (batch, *shares) in enumerate(zip(whole, *parts, strict=True)):
        sizes = [len(labels) for _, labels in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == whole.whole_batch(number) == len(batch[1])
        for one, several in zip(batch, zip(*shares, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))


def test_every_process_has_an_image_in_every_training_batch():
    def sizes(count: int, shuffle: bool, rank: int) -> list[int]:
        part = BatchLoader(make_set(count), 8, shuffle=shuffle, rank=rank, ranks=4)
        return [len(labels) for _, labels in part]

    assert sizes(20, True, 0) == sizes(20, True, 3) == [2, 2, 1]
    assert sizes(19, True, 0) == sizes(19, True, 3) == [2, 2]
    assert sizes(19, False, 0) == [2, 2, 1] and sizes(3, False, 3) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", [None, "crop_flip", "rotate_flip"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_prefetching_to_a_gpu_gives_the_same_batches(augment, shuffle):
    """While the GPU is busy with earlier batches."""
    work = torch.rand(2048, 2048, device="cuda")
    resident, host = (
        BatchLoader(make_set(500, 32), 4, augment, "cuda", shuffle, resident=resident)
        for resident in (True, False)
    )
    for _ in range(2):
        batches = []
        for images, labels in host:
            work = (work @ work).clamp_(0, 1)
            batches.append((images, labels))
        for one, same in zip(resident, batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_batches_are_the_set_in_order_shared_out(ranks, monkeypatch):
    data, parts = make_set(800), []
    for rank in range(ranks):
        monkeypatch.setattr(loader.distributed, "ranks", lambda: ranks)
        monkeypatch.setattr(loader.distributed, "rank", lambda rank=rank: rank)
        parts.append(list(evaluation_batches(data, "cpu", 100)))
        assert [len(labels) for _, labels in parts[-1][:-1]] == [100] * (len(parts[-1]) - 1)
        assert len(next(iter(evaluation_batches(data, "cpu")))[1]) == 250
    batches = [batch for shares in zip(*parts, strict=True) for batch in shares]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(labels, data.labels)
    assert torch.equal(images, data.images.float() / 255)


def test_evaluation_batches_of_a_gpu_have_as_many_pixels_whatever_the_size(monkeypatch):
    monkeypatch.setattr(loader, "BatchLoader", lambda images, size, **_: size)
    sizes = [evaluation_batches(make_set(1, side), "cuda") for side in (16, 32, 64, 4000)]
    assert sizes == [20_000, 5_000, 1_250, 1]


def test_errors():
    for options, said in (
        ({"batch_size": 0}, "--batch_size 0"),
        ({"ranks": 3}, "--batch_size 16: must be a multiple of the 3 processes"),
        ({"augment": "mixup"}, "crop_flip"),
        ({"image_set": make_set().subset([])}, "no images"),
    ):
        with pytest.raises(InputError, match=said):
            BatchLoader(**{"image_set": make_set(), "batch_size": 16, **options})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", [None, "crop_flip", "rotate_flip"])
def test_cuda_loop_never_waits_for_the_host(augment):
    batches = BatchLoader(make_set(300), 16, augment, device="cuda", shuffle=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = torch.cat([labels for _, labels in batches])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert labels.sort().values.tolist() == list(range(300))
