"""Two processes on the CPU train the model that one trains; what a user can get wrong with them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_corruption
from datasets.images import ImageSet
from datasets.loader import BatchLoader
from tests.folders import write_folders
from utils import checkpoint as ckpt
from utils import distributed
from utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def images(tmp_path):
    """51 training images once validation's are taken, in three classes told apart by brightness."""
    counts = {"train": (20, 19, 18), "test": 3}
    write_folders(tmp_path / "images", counts, levels=60, step=80, classes="abc")
    return tmp_path / "images"


def test_two_processes_train_the_model_of_one(images, tmp_path):
    """From the same checkpoint: same losses, accuracies and weights, up to float32's rounding."""
    argv = ["--dataset", "folder", "--data", str(images), "--image_size", "32", "--arch", "vgg11"]
    argv += ["--device", "cpu", "--no-amp", "--batch_size", "16", "--lr", "0.02"]
    argv += ["--decreasing_lr", "2", "--resume", "--save_dir"]

    def train(folder: str, epochs: int) -> dict:
        more = [str(tmp_path / folder), "--epochs", str(epochs)]
        return train_corruption.train(train_corruption.parse_args([*argv, *more]))

    train("one", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    expected = train("one", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "train_corruption.py", *argv, tmp_path / "two", "--epochs", "3"]
    how = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 300}
    run = subprocess.run(command, capture_output=True, text=True, **how)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch 3/3") == 1 and "2 processes" in run.stdout
    one, two = (ckpt.read(tmp_path / folder / ckpt.LAST) for folder in ("one", "two"))
    assert len(two["history"]) == 3
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for accuracy in ("train", "val_clean"):
            assert mine[accuracy] == pytest.approx(theirs[accuracy])
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-3, atol=1e-4)
    assert f"{expected['TA']:.1f} |" in run.stdout


def test_alone_nothing_communicates():
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    with distributed.session("auto"), distributed.rank_0_first():
        assert not torch.distributed.is_initialized()
    model, tensor = torch.nn.Linear(1, 1), torch.ones(2)
    assert distributed.data_parallel(distributed.synchronized(model)) is model
    assert torch.equal(distributed.total(tensor), torch.ones(2))


@pytest.mark.parametrize(
    ("device", "gpus", "said"),
    [("cuda:1", 4, "--device cuda:1: torchrun"), ("auto", 1, "--nproc_per_node=2.* has 1 GPUs")],
)
def test_each_process_needs_a_gpu_of_its_own(device, gpus, said, monkeypatch):
    launched = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (launched | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=said), distributed.session(device):
        pass


@pytest.mark.parametrize(
    ("batch_size", "ranks", "fits"), [(8, 2, True), (6, 3, True), (8, 4, False), (2, 2, False)]
)
def test_batch_norm_needs_two_images_in_each_process(batch_size, ranks, fits):
    pixels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(20).long(), ["a"], "synthetic")
    argv = ["--arch", "resnet18", "--batch_size", str(batch_size), "--save_dir", "x"]
    args = train_corruption.parse_args(argv)
    loader = BatchLoader(images, batch_size, shuffle=True, ranks=ranks)
    said = f"at least 2 images per step in each of {ranks}"
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match=said):
        train_corruption.check_images(args, loader)
    loader.device = torch.device("cuda")
    train_corruption.check_images(args, loader)
    few = BatchLoader(images.subset(range(ranks - 1)), batch_size, shuffle=True, ranks=ranks)
    with pytest.raises(InputError, match=f"fewer than the {ranks} processes"):
        train_corruption.check_images(args, few)
