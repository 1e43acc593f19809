"""The benchmark: every stage gives its rows, and the classic way computes the same as ours."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
import time
from unittest import mock

import pytest
import torch

import benchmark
import datasets
import device_checks
from datasets import synthetic
from datasets.corruptions import CORRUPTIONS
from datasets.images import ImageSet
from datasets.loader import BatchLoader, augmentation_for
from models import build_model
from tests.folders import write_folders
from utils.engine import sgd, train_epoch
from utils.errors import InputError
from utils.signature import project_out

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--threads", "1", "--windows", "1", "--seconds", "0"]
MADE = ["--dataset", "synthetic", "--batch_size", "4"]


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    for split, size in (("all", 400), ("test", 100)):
        monkeypatch.setitem(synthetic.SIZES, split, size)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_second(monkeypatch):
    """Every way is called once and takes 1 s, so that images/s are the images of a call."""

    def measure(ways, seconds, windows):
        for way in ways.values():
            way()
        return {way: [1.0] * windows for way in ways}

    monkeypatch.setattr(benchmark, "measure", measure)


def run(folder, stage, *flags):
    """The rows of a stage, which are in table.md, a line each under the two of the head, too."""
    rows = benchmark.main([stage, *TINY, *flags, "--out", str(folder)])
    lines = (folder / "table.md").read_text().split("\n\n")[0].splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    stored = json.loads((folder / "results.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(rows))
    assert stored["device"] and stored["torch"] == torch.__version__
    return rows


# ---- measuring ------------------------------------------------------------------------------


def test_ways_take_turns_for_the_seconds_of_a_window():
    order = []
    ways = {name: lambda name=name: order.append(name) or time.sleep(0.001) for name in "ab"}
    times = benchmark.measure(ways, seconds=0.01, windows=3)
    assert [len(windows) for windows in times.values()] == [3, 3]
    assert "".join(name for name, _ in itertools.groupby(order)) == "ababab"
    assert min(map(min, times.values())) > 0.001


def test_speeds_are_medians_beside_the_best_of_each_group(monkeypatch):
    times = {"ours, bf16": [1.0, 2.0, 9.0], "ceiling": [1.0, 1.0, 1.0]}
    times |= {"classic, 0 workers": [8.0, 8.0, 0.1], "classic, 2 workers": [5.0, 4.0, 6.0]}
    monkeypatch.setattr(benchmark, "measure", lambda *_: times)
    args = benchmark.Namespace(seconds=0, windows=3)
    rows = list(benchmark.compare(args, {"model": "x"}, times, dict.fromkeys(times, 20)))
    assert [row["way"] for row in rows] == list(times) and rows[0]["model"] == "x"
    assert [row["images/s"] for row in rows] == [10, 20, 2.5, 4]
    assert [row["× classic"] for row in rows] == [2.5, 5, 0.625, 1]
    assert [row["× ceiling"] for row in rows] == [0.5, 1, 0.125, 0.2]
    assert rows[0]["spread, %"] == 400 and rows[0]["each"] == times["ours, bf16"]
    (row,) = benchmark.compare(args, {}, {"ours, bf16": times})
    assert row["ms"] == 2000 and "× classic" not in row


# ---- stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
def test_corruptions(size, tmp_path, capsys):
    rows = run(tmp_path, "corruptions", "--images", "4", "--size", str(size))
    assert [row["corruption"] for row in rows[::2]] == list(CORRUPTIONS)
    for batched, single in zip(rows[::2], rows[1::2], strict=True):
        assert batched["images/s"] == pytest.approx(4 / batched["each"][0])
        assert single["images/s"] == pytest.approx(1 / single["each"][0])
        ratio = batched["images/s"] / single["images/s"]
        assert batched["× one by one"] == pytest.approx(ratio) and single["× one by one"] == 1
    assert (tmp_path / "table.md").read_text().split("\n\n")[0] in capsys.readouterr().out


@pytest.mark.parametrize(("arch", "values"), [("vgg11", 1728), ("resnet18", 9408)])
def test_signature(arch, values, tmp_path):
    rows = run(tmp_path, "signature", "--arch", arch, "--keep_num", "1", "--quantization", "16")
    steps = [row["step"] for row in rows]
    assert steps[0] == steps[1] == "patch, take off" and f"{values:,} values" in steps[2]
    assert all(row["ms"] > 0 for row in rows) and rows[2]["× classic"] > 1
    assert all(step.endswith(" bytes") for step in steps[-2:])


def test_the_matrix_projects_as_project_out_which_needs_none():
    pair = torch.randn(2, 5, 3, 3, 3)
    assert torch.allclose(benchmark.project_by_matrix(*pair), project_out(*pair), atol=1e-5)
    delta, base = torch.randn(2, 1 << 20)  # the matrix would take 4 TB
    assert abs(torch.dot(project_out(delta, base), base)) < 1


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_models_beside_the_classic_way(stage, tmp_path, one_second, monkeypatch):
    monkeypatch.setattr(benchmark.engine, "bf16_gain", lambda _: (False, "told so"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    flags = [stage, *MADE, "--arch", "resnet18"]
    rows = run(tmp_path, *flags, "--images", "10", "--workers", "0", "1")
    bf16 = ["ours, bf16 contiguous", "ours, bf16 channels_last"]
    ours = ["ours, float32 contiguous, default", "ours, float32 channels_last", *bf16]
    ways = [*ours, "ceiling", "classic, 0 workers", "classic, 1 workers"]
    assert [row["way"] for row in rows] == ways
    # Training: batches of four, four and two, the ceiling's all of four. Evaluation: one of ten.
    ceiling = 12 if stage == "train" else 10
    assert [row["images/s"] for row in rows] == [10] * 4 + [ceiling, 10, 10]
    rows = run(tmp_path, *flags, "--images", "9", "--workers", "0", "--amp")
    chosen = f"{bf16[1]}, default"
    assert [row["way"] for row in rows] == [bf16[0], chosen, "ceiling", "classic, 0 workers"]
    # Batch norm can't train on a last batch of one.
    assert rows[0]["images/s"] == {"train": 8, "evaluate": 9}[stage]


def test_loader(tmp_path, one_second):
    write_folders(tmp_path / "data", {"train": 6, "test": 6})
    where = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--image_size", "16"]
    rows = run(tmp_path / "out", "loader", *where, "--workers", "1", "0", "1")
    assert [row["way"] for row in rows] == ["ours", "classic, 1 workers", "classic, 0 workers"]
    assert rows[0]["data"] == "folder" and rows[0]["images/s"] == 10  # 2 for validation


def test_resample(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "corrupted_set", mock.Mock(wraps=benchmark.corrupted_set))
    flags = ["--arch", "vgg11", "--images", "8", "--no_amp", "--corruption", "fog", "snow"]
    rows = run(tmp_path, "resample", *MADE, *flags)
    assert [row["way"] for row in rows] == ["fixed", "fog anew", "snow anew"]
    assert [row["× fixed"] == 1 for row in rows] == [True, False, False]
    drawn = [(call.args[1], call.args[3].seed) for call in benchmark.corrupted_set.mock_calls]
    assert drawn == [("fog", 0), ("fog", 1), ("snow", 0), ("snow", 1)]  # warm-up, window


def test_accuracy_of_both_ways_from_the_same_weights(tmp_path):
    flags = ["--epochs", "2", "--seeds", "0", "1", "--images", "97", "--batch_size", "32"]
    rows = run(tmp_path, "accuracy", *flags, "--lr", "0", "--no_amp")
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2]
    for ours, classic in zip(rows[::2], rows[1::2], strict=True):
        # At lr 0 only the batch-norm statistics move, a little differently.
        for (loss, _), (classic_loss, _) in zip(ours["each"], classic["each"], strict=True):
            assert loss == pytest.approx(classic_loss, rel=0.1)
        assert "±" in ours["loss"]


@pytest.fixture
def little_to_check(monkeypatch):
    monkeypatch.setattr(device_checks, "IMAGES", 96)
    monkeypatch.setattr(device_checks, "CORRUPTIONS", ("fog", "contrast"))
    monkeypatch.setattr(device_checks, "measure", lambda ways, *_: {way: [0.5] for way in ways})


def test_check(tmp_path, little_to_check):
    rows = run(tmp_path, "check")
    assert [row["check"].split(":")[0] for row in rows[:2]] == ["fog", "contrast"]
    assert rows[-1]["check"] == "training at 192 images/s: time, as a share of steps alone"
    assert {row["result"] for row in rows} == {"pass"} and len(rows) == 2 + 4 + 4 + 3 + 2 + 1


@pytest.mark.parametrize("fault", ["fog is denser", "an error", None])
def test_a_failed_check_is_told_and_ends_with_1(fault, capsys, little_to_check, monkeypatch):
    def corrupt(images, name, severity, generator, device):
        if fault == "an error":
            raise RuntimeError("no kernel\nmore")
        severity -= bool(fault) and generator.initial_seed() > 0
        return datasets.corruptions.corrupt(images, name, severity, generator, device=device)

    monkeypatch.setattr(device_checks, "corrupt", corrupt)
    for slow in ("logits", "signatures", "training", "speed"):  # test_check has them
        monkeypatch.setattr(device_checks, slow, lambda *_: ())
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "check", *TINY])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(benchmark.__file__, run_name="__main__")
    assert end.value.code == bool(fault)
    failed = [line for line in capsys.readouterr().out.splitlines() if "fail" in line]
    told = {"fog is denser": ["| fog: ", "| contrast: "], "an error": ["| corruptions: no kernel "]}
    assert len(failed) == len(told.get(fault, []))
    assert all(map(str.startswith, failed, told.get(fault, [])))


def test_checks_of_cuda_alone(monkeypatch):
    """That they run, and that a step which isn't recorded is a failure."""
    waits = mock.Mock()
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, waits)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7e8)
    monkeypatch.setattr(device_checks, "IMAGES", 24)
    images = synthetic.load("train", 32).subset(range(24))
    for resident in ("device", "host"):
        assert (f"waits in an epoch, images on the {resident}", 0, 0) in list(
            device_checks.waiting(None, CPU, images)
        )
    assert mock.call("error") in waits.mock_calls and waits.mock_calls[-1] == mock.call("default")
    ((_, figure, most),) = device_checks.memory(None, CPU, images.subset(range(2)))
    assert figure == 700 > most
    with pytest.raises(RuntimeError, match="no step was recorded"):
        list(device_checks.recording(None, CPU, images))


# ---- the classic way ------------------------------------------------------------------------


def classic_batches(images, augment):
    """An epoch of the classic way in this process: images, labels."""
    args = benchmark.parse_args(["loader", *TINY, "--workers", "0", "--batch_size", "16"])
    (way,) = benchmark.classic_ways(args, CPU, images, augment, lambda *batch: batch).values()
    return map(torch.cat, zip(*way(), strict=True))


@pytest.mark.parametrize("dataset", ["cifar10", "tinyimagenet"])
def test_classic_batches_are_our_images_augmented_alike(dataset):
    torch.manual_seed(0)  # the classic draws
    side = {"cifar10": 32, "tinyimagenet": 64}[dataset]
    images = synthetic.load("test", side)
    batch, labels = classic_batches(images, None)
    assert torch.equal(batch, images.images / 255) and torch.equal(labels, images.labels)
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    white = torch.full((512, 3, side, side), 255, dtype=torch.uint8)
    white[..., side // 2 :] = 0  # the right half black, which flipping brings to the left
    clean = ImageSet(white, torch.zeros(512, dtype=torch.int64), ["a"], dataset)
    augment = augmentation_for(dataset)
    ours = next(iter(BatchLoader(clean, 512, augment)))[0].mean((0, 1))
    classic, _ = classic_batches(clean, augment)
    assert classic.min() >= 0 and classic.max() <= 1
    # Four standard deviations of the difference of two such means.
    assert (classic.mean((0, 1)) - ours).abs().max() < 4 * 0.5 * (2 / 512) ** 0.5


def test_classic_training_computes_what_ours_does():
    batches = [(torch.rand(8, 3, 32, 32), torch.arange(8))] * 2
    torch.manual_seed(0)
    start, ours, classic = (build_model("vgg11", 10) for _ in range(3))
    for model in (ours, classic):
        model.load_state_dict(start.state_dict())
    losses = benchmark.classic_epoch(batches, benchmark.classic_training(classic, 0.01), CPU)
    loss = train_epoch(ours, batches, sgd(ours, 0.01), amp=False).loss
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-4)
    for old, new, other in zip(*(m.parameters() for m in (start, ours, classic)), strict=True):
        assert torch.allclose(new, other, atol=1e-5) and not torch.equal(old, new)


def test_classic_evaluation_counts_what_ours_does(monkeypatch):
    monkeypatch.setattr(benchmark, "compare_epochs", lambda *parts: parts)
    args = benchmark.parse_args(["evaluate", *TINY, *MADE, "--images", "30", "--workers", "0"])
    _, _, batches, ours, ways = benchmark.evaluation(args, CPU)
    correct = sum(ways["classic, 0 workers"]())
    assert correct > 0 and ours(batches, False, torch.channels_last)() == pytest.approx(
        100 * correct / 30
    )


# ---- command line ---------------------------------------------------------------------------

WRONG = """
corruptions --corruption snwo | snow
corruptions --severity 6 | --severity
corruptions --threads 0 | --threads
corruptions --size 48 | --size
signature --keep_num 14 | 13
signature --quantization_type log --quantization 5 | --quantization
signature --seconds -1 | --seconds
resample --images 0 | --images
train --workers 0 -1 | --workers -1
train --arch vgg12 | vgg12
train --batch_size 1 | --batch_size 1
train --images 1 | --images
train | --data
train --dataset folder --data {small} --arch vgg11 | --image_size
evaluate --windows 0 | --windows
evaluate --dataset cifar | cifar10
evaluate --dataset folder --data {small} --arch vgg11 | --image_size
loader --dataset folder | --data
loader --image_size 0 | --image_size
loader --arch vgg11 | --arch
accuracy --epochs 0 | --epochs
nothing | nothing
| COMMAND
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_wrong_flags_and_data_are_named(line, tmp_path):
    write_folders(tmp_path, {"train": 2, "test": 2}, size=(8, 8))
    argv, told = line.split("|")
    with pytest.raises(InputError, match=told.strip()):
        benchmark.main(argv.format(small=tmp_path).split())


def test_default_workers_are_no_more_than_the_cores():
    assert 0 in benchmark.WORKERS and max(benchmark.WORKERS) <= (os.cpu_count() or 1)
