"""The benchmark: every subcommand gives its rows, and the classic ways compute the same."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

import benchmark
from datasets import synthetic
from datasets.corruptions import CORRUPTIONS
from datasets.images import ImageSet
from datasets.loader import BatchLoader
from models import build_model
from tests.folders import write_folders
from tests.reference import RandomDraws, weather
from utils.engine import evaluate, train_epoch
from utils.errors import InputError
from utils.signature import project_out

EACH = {"train": 6, "test": 6}  # images of a class

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--threads", "1", "--windows", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def check_table(rows, folder):
    """One line for each row under the two of the head, as many cells everywhere."""
    lines = (folder / "table.md").read_text().split("\n\n")[0].splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    stored = json.loads((folder / "results.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(rows))
    assert stored["device"] and stored["torch"] == torch.__version__


@pytest.mark.parametrize("size", [32, 64])
def test_corruptions(size, tmp_path, capsys):
    flags = ["--seconds", "0", "--images", "4", "--size", str(size), "--out", str(tmp_path)]
    rows = benchmark.main(["corruptions", *TINY, *flags])
    assert [row["corruption"] for row in rows] == [*CORRUPTIONS, "harmonic mean"]
    for row in rows:
        assert row[benchmark.BATCHED] > 0 and row[benchmark.SINGLE] > 0
        ratio = row[benchmark.BATCHED] / row[benchmark.SINGLE]
        assert row["ratio"] == pytest.approx(ratio)
    slowest = min(row[benchmark.BATCHED] for row in rows[:-1])
    assert slowest <= rows[-1][benchmark.BATCHED] <= 19 * slowest
    check_table(rows, tmp_path)
    assert (tmp_path / "table.md").read_text().split("\n\n")[0] in capsys.readouterr().out


def test_one_by_one_in_two_processes(monkeypatch):
    # New interpreters would each import torch first, for seconds; these processes don't use it.
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: forking)
    images = benchmark.pictures(4, 32)
    with benchmark.one_by_one(images, 1, processes=2) as rate:
        assert rate("contrast", 0) > 0
        assert rate("elastic_transform", 0.01) > 0


@pytest.mark.parametrize("side", [32, 64, 40])
def test_array_versions_are_the_definitions(side):
    rng = np.random.default_rng(side)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    image[:2] = 77  # greys
    ours, theirs = (
        fog(image, (0.75, 2.5), RandomDraws(np.random.default_rng(1)))
        for fog in (benchmark.fog_by_arrays, weather.fog)
    )
    assert np.array_equal(ours, theirs) and not np.array_equal(ours, image)
    ours, theirs = (
        brighten(image, 0.3) for brighten in (benchmark.brightness_by_arrays, weather.brightness)
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_pictures_are_uint8_neither_flat_nor_saturated():
    images = benchmark.pictures(300, 32)
    assert images.shape == (300, 3, 32, 32) and images.dtype == torch.uint8
    assert ((images == 0) | (images == 255)).float().mean() < 0.1
    assert images.float().std((1, 2, 3)).min() > 20


@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_signature(arch, tmp_path):
    flags = ["--arch", arch, "--seconds", "0", "--keep_num", "1", "--quantization", "16"]
    rows = benchmark.main(["signature", *TINY, *flags, "--out", str(tmp_path)])
    by_step = {row["step"]: row for row in rows}
    assert len(by_step) == len(rows)
    for row in rows:
        assert row["RWS"] > 0
        assert (row["classic"] is None) == (row["ratio"] is None)
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["classic"] / row["RWS"]) and row["ratio"] > 0
    key, n = {"vgg11": ("features.0.weight", 1728), "resnet18": ("conv1.weight", 9408)}[arch]
    assert f"project {key}, {n:,} values" in by_step
    memory = by_step[f"project {key}, peak memory"]
    assert memory["classic"] == pytest.approx(4e-6 * n * n, rel=0.02)
    assert memory["RWS"] < 1e-4 * n
    assert by_step["file, 16 levels"]["RWS"] < by_step["file, float32"]["RWS"] / 2
    check_table(rows, tmp_path)


def test_only_full_makes_large_matrices(monkeypatch):
    monkeypatch.setattr(benchmark, "LARGEST_MATRIX", 4 * 1728**2 - 1)
    monkeypatch.setattr(benchmark, "LARGEST_MATRIX_IN_FULL", 4 * 1728**2)
    states = benchmark.random_models("vgg11")
    flags = ["signature", *TINY, "--seconds", "0", "--arch", "vgg11", "--keep_num", "1"]
    args = benchmark.parse_args(flags)
    assert benchmark._projection_rows(args, CPU, *states) == []
    args = benchmark.parse_args([*flags, "--full"])
    assert len(benchmark._projection_rows(args, CPU, *states)) == 2


def test_the_matrix_projects_as_project_out():
    delta, base = torch.randn(2, 5, 3, 3, 3)
    assert torch.allclose(
        benchmark.project_by_matrix(delta, base), project_out(delta, base), atol=1e-5
    )


def test_peak_bytes_counts_what_is_held_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(1000)

    assert benchmark.peak_bytes(one_after_the_other, CPU) == 4000
    assert benchmark.peak_bytes(lambda: (torch.zeros(1000), torch.zeros(500)), CPU) == 6000


def test_windows_take_turns():
    order = []
    functions = [lambda: order.append("a"), lambda: order.append("b")]
    times = benchmark.take_turns(functions, CPU, windows=3, seconds=0)
    assert "".join(order) == "ab" * 4  # a warm-up first
    assert [len(windows) for windows in times] == [3, 3]


def test_resample(tmp_path):
    write_folders(tmp_path / "data", EACH)
    flags = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--image_size", "32"]
    flags += ["--arch", "vgg11", "--batch_size", "4", "--images", "8", "--no-amp"]
    flags += ["--corruption", "fog", "glass_blur", "--out", str(tmp_path / "out")]
    rows = benchmark.main(["resample", *TINY, *flags])
    assert [row["corruption"] for row in rows] == ["fog", "glass_blur"]
    for row in rows:
        fixed, anew = row["fixed, images/s"], row["anew each epoch, images/s"]
        assert fixed > 0 and row["ratio"] == pytest.approx(anew / fixed)
    check_table(rows, tmp_path / "out")


# ---- train, evaluate, loader ----------------------------------------------------------------

FEW = ["--seconds", "0", "--batch_size", "4"]


def check_rates(row):
    """The columns of a row follow from its windows; one window, so medians are the rates."""
    rates = {side: windows[0] for side, windows in row["windows"].items()}
    assert all(len(windows) == 1 for windows in row["windows"].values())
    assert min(rates.values()) > 0 and set(row["spread"].values()) == {0}
    classic = {side: rate for side, rate in rates.items() if side.startswith("classic")}
    assert row["ours, images/s"] == rates["ours"]
    assert row["classic, images/s"] == max(classic.values())
    assert classic[f"classic, {row['workers']} workers"] == max(classic.values())
    assert row["ours / classic"] == pytest.approx(rates["ours"] / max(classic.values()))
    if "ceiling, images/s" in row:
        assert row["ceiling, images/s"] == rates["ceiling"]
        assert row["ours / ceiling"] == pytest.approx(rates["ours"] / rates["ceiling"])
        share = rates["ours"] * row["FLOPs per image"] / rates["products, FLOP/s"]
        assert row["share of peak"] == pytest.approx(share)
    return len(classic)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_models_beside_the_classic_way(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRODUCTS", {"cpu": (32, 64), "cuda": (64,)})
    monkeypatch.setattr(benchmark, "CLASSIC_STEPS", 2)
    flags = [*FEW, "--images", "10", "--arch", "vgg11", "resnet18", "--workers", "0"]
    rows = benchmark.main([stage, *TINY, *flags, "--no-amp", "--out", str(tmp_path)])
    assert [row["model"] for row in rows] == ["vgg11, float32", "resnet18, float32"]
    assert [check_rates(row) for row in rows] == [1, 1]
    check_table(rows, tmp_path)
    caption = (tmp_path / "table.md").read_text().split("\n\n")[1]
    assert "batch 4" in caption and "{" not in caption and caption in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["cifar100", "tinyimagenet"])
def test_loader_beside_the_classic_way(dataset, tmp_path):
    flags = [*FEW, "--images", "22", "--dataset", dataset, "--workers", "1", "0", "1"]
    rows = benchmark.main(["loader", *TINY, *flags, "--out", str(tmp_path)])
    (row,) = rows
    assert check_rates(row) == 2
    augment, side = {"cifar100": ("crop_flip", 32), "tinyimagenet": ("rotate_flip", 64)}[dataset]
    assert row["augmentation"] == augment
    assert row["data"] == f"{dataset} {side}×{side}, made up"
    check_table(rows, tmp_path)


def test_the_fastest_number_of_workers_counts():
    rates = {
        "ours": [30.0, 40.0, 80.0],
        "classic, 0 workers": [1.0, 4.0, 50.0],
        "classic, 2 workers": [8.0, 10.0, 11.0],
        "classic, 16 workers": [1.0, 2.0, 90.0],
    }
    row = benchmark._against_classic(rates)
    assert row["workers"] == 2 and row["classic, images/s"] == 10 and row["ours / classic"] == 4
    assert benchmark._spread(rates)["ours"] == pytest.approx((80 - 30) / 40)


def test_default_workers_are_no_more_than_the_cores(monkeypatch):
    for cores, workers in ((1, [0]), (2, [0, 2]), (12, [0, 2, 4, 8]), (64, [0, 2, 4, 8, 16])):
        monkeypatch.setattr(
            benchmark.os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False
        )
        assert benchmark.default_workers() == workers


def first_batches(clean, augment, count, flags=()):
    """`count` batches of the classic way in the main process."""
    argv = ["loader", *TINY, "--dataset", clean.name, "--workers", "0", *flags]
    args = benchmark.parse_args([*argv, "--batch_size", "16"])
    with benchmark.classic_loaders(args, CPU, clean, augment) as loaders:
        batches = iter(loaders[0])
        images, labels = zip(*(next(batches) for _ in range(count)), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_classic_batches_of_an_array_are_the_images():
    images = benchmark.pictures(12, 32)
    clean = ImageSet(images, torch.arange(12) % 10, list("abcdefghij"), "cifar10")
    batch, labels = first_batches(clean, None, count=4)
    assert batch.shape == (64, 3, 32, 32) and batch.dtype == torch.float32
    assert labels.dtype == torch.int64 and batch.is_contiguous()
    rows = [(images / 255 == image).flatten(1).all(1).nonzero().item() for image in batch]
    assert len(set(rows)) > 6 and torch.equal(clean.labels[rows], labels)


def test_classic_batches_of_files_are_the_images(tmp_path):
    write_folders(tmp_path, EACH)
    flags = ["--data", str(tmp_path), "--image_size", "16"]
    args = benchmark.parse_args(["loader", *TINY, "--dataset", "folder", *flags, "--images", "50"])
    clean = benchmark.clean_images(args, benchmark.LOADED, CPU)
    assert len(clean) == 12
    batch, labels = first_batches(clean, None, 4, flags)
    assert batch.shape == (64, 3, 16, 16)
    rows = [(clean.images / 255 == image).flatten(1).all(1).nonzero().item() for image in batch]
    assert len(set(rows)) > 6 and torch.equal(clean.labels[rows], labels)


def test_made_up_files_are_near_their_images():
    images = benchmark.pictures(1, 64)
    clean = ImageSet(images, torch.tensor([0]), ["a"], "tinyimagenet")
    batch, _ = first_batches(clean, None, 1)
    assert 0 < (batch - images / 255).abs().mean() < 0.05


@pytest.mark.parametrize(("dataset", "side"), [("cifar10", 32), ("tinyimagenet", 64)])
def test_classic_augmentation_is_ours_in_distribution(dataset, side):
    torch.manual_seed(0)  # the classic draws
    white = torch.full((512, 3, side, side), 255, dtype=torch.uint8)
    white[..., side // 2 :] = 0  # the right half black, which flipping brings to the left
    clean = ImageSet(white, torch.zeros(512, dtype=torch.int64), ["a"], dataset)
    augment = benchmark.augmentation_for(dataset)
    ours = next(iter(BatchLoader(clean, 512, augment)))[0].mean((0, 1))
    classic = first_batches(clean, augment, count=32)[0]
    assert classic.min() >= 0 and classic.max() <= 1
    # Four standard deviations of the difference of two such means, JPEG's ringing on top.
    assert (classic.mean((0, 1)) - ours).abs().max() < 4 * 0.5 * (2 / 512) ** 0.5 + 0.02


class CountedDataset(torch.utils.data.Dataset):
    """Counts in shared memory what is taken from it, by the workers too."""

    def __init__(self):
        self.taken = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __getitem__(self, index):
        self.taken += 1  # by at most one process at a time here
        return torch.zeros(1), index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_classic_window_counts_the_steps_of_its_time(workers, monkeypatch):
    dataset = CountedDataset()
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=benchmark.EndlessBatches(100, batch_size=4),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    now = [0.0]
    steps = []

    def step(images, labels):
        steps.append(labels)
        now[0] += 0.5

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    for seconds, clocked in ((0, benchmark.CLASSIC_STEPS), (10, 20)):
        steps.clear()
        dataset.taken.zero_()
        assert benchmark.classic_window(loader, step, seconds, CPU) == 4 / 0.5
        assert len(steps) == 1 + workers + clocked
        # The workers have emptied their queues: nothing goes on in the turns of others.
        assert dataset.taken == 4 * (len(steps) + 2 * workers)
    assert torch.cat(steps).unique().numel() > 20


def test_classic_steps_compute_what_ours_do(monkeypatch):
    monkeypatch.setattr(benchmark, "LEARNING_RATE", 0.01)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    torch.manual_seed(0)
    ours, classic = build_model("vgg11", 10), build_model("vgg11", 10)
    classic.load_state_dict(ours.state_dict())
    step = benchmark.classic_training(classic, CPU)
    for _ in range(2):
        step(images, labels)
    train_epoch(ours, [(images, labels)] * 2, benchmark._optimizer(ours), amp=False)
    for old, new, other in zip(
        build_model("vgg11", 10).parameters(), ours.parameters(), classic.parameters(), strict=True
    ):
        assert torch.allclose(new, other, atol=1e-5) and not torch.equal(old, new)
    before = [p.clone() for p in classic.parameters()]
    benchmark.classic_evaluation(classic, CPU)(images, labels)
    assert all(map(torch.equal, before, classic.parameters())) and not classic.training


def test_evaluating_a_resident_batch_is_evaluating():
    images = benchmark.pictures(20, 32)
    model = build_model("resnet18", 10).eval()
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    expected = evaluate(model, ImageSet(images, labels, list("abcdefghij"), "cifar10"), amp=False)
    assert expected == 75
    found = benchmark.evaluate_resident(model, images / 255, labels, 3, amp=False)
    assert found == pytest.approx(expected)


def test_flops_are_those_of_the_layers():
    model = build_model("vgg11", 10)
    layers = []

    def count(layer, inputs, output):
        layers.append(2 * output[0].numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    forward = benchmark.flops_per_image(model, 32, training=False)
    assert forward == sum(layers)
    # Backward: as much for the weights, and again for the inputs, which the first layer spares.
    training = benchmark.flops_per_image(model, 32, training=True)
    assert training == 3 * forward - layers[0]


def test_products_are_products_in_their_dtype():
    a, b = torch.randn(2, 16, 16)
    assert torch.equal(benchmark._product(a, b), a @ b)
    assert torch.get_float32_matmul_precision() == "highest"


def test_too_small_images_are_an_error(tmp_path):
    write_folders(tmp_path, EACH, size=(16, 16))
    flags = ["--dataset", "folder", "--data", str(tmp_path), "--arch", "vgg11"]
    with pytest.raises(InputError, match="--image_size"):
        benchmark.main(["evaluate", *TINY, *FEW, *flags])


def test_accuracy_of_both_ways_from_the_same_weights(tmp_path, monkeypatch):
    for split, size in (("all", 400), ("test", 100)):
        monkeypatch.setitem(synthetic.SIZES, split, size)
    flags = ["--epochs", "2", "--seeds", "0", "1", "--images", "97", "--batch_size", "32"]
    flags += ["--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--lr", "0", "--no-amp"]
    rows = benchmark.main(["accuracy", *flags])
    assert [row["epoch"] for row in rows] == [1, 2] and "±" in (tmp_path / "table.md").read_text()
    for row in rows:  # at lr 0 only the batch-norm statistics move, a little differently
        for (loss, _), (classic_loss, _) in zip(*row["windows"].values(), strict=True):
            assert loss == pytest.approx(classic_loss, rel=0.1)


# ---- command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["corruptions", "--corruption", "snwo"], "snow"),
        (["corruptions", "--severity", "6"], "--severity"),
        (["corruptions", "--threads", "0"], "--threads"),
        (["corruptions", "--size", "48"], "--size"),
        (["signature", "--keep_num", "14"], "13"),
        (["signature", "--quantization", "5"], "--quantization"),
        (["signature", "--seconds", "-1"], "--seconds"),
        (["resample", "--images", "0"], "--images"),
        (["train", "--workers", "0", "-1"], "--workers -1"),
        (["train", "--arch", "vgg11", "vgg12"], "vgg12"),
        (["train", "--batch_size", "1"], "--batch_size 1"),
        (["train", "--images", "1"], "--images"),
        (["train", "--image_size", "16"], "--image_size"),
        (["evaluate", "--windows", "0"], "--windows"),
        (["evaluate", "--dataset", "cifar"], "cifar10"),
        (["loader", "--dataset", "folder"], "--data"),
        (["loader", "--image_size", "0"], "--image_size"),
        (["loader", "--arch", "vgg11"], "--arch"),
        (["accuracy", "--epochs", "0"], "--epochs"),
        (["nothing"], "nothing"),
        ([], "COMMAND"),
    ],
)
def test_wrong_flags_are_named(flags, told):
    with pytest.raises(InputError, match=told):
        benchmark.parse_args(flags)
