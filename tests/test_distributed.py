"""Two processes on the CPU train the model that one trains; what a user can get wrong with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_corruption
from tests.folders import write_folders
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
    argv += ["--decreasing_lr", "2"]

    def train(folder: str, epochs: int) -> dict:
        more = ["--resume", "--save_dir", str(tmp_path / folder), "--epochs", str(epochs)]
        return train_corruption.train(train_corruption.parse_args([*argv, *more]))

    train("one", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    expected = train("one", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "train_corruption.py", *argv, "--epochs", "3", "--resume"]
    run = subprocess.run(
        [*command, "--save_dir", tmp_path / "two"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch 3/3") == 1 and "2 processes" in run.stdout
    one, two = (
        torch.load(tmp_path / folder / "checkpoint.pth.tar", weights_only=True)
        for folder in ("one", "two")
    )
    assert len(two["history"]) == 3
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["train"] == pytest.approx(theirs["train"])
        assert mine["val_clean"] == pytest.approx(theirs["val_clean"])
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=1e-3, atol=1e-4)
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
def test_batch_norm_needs_two_images_in_each_process(batch_size, ranks, fits, monkeypatch):
    pixels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    data = train_corruption.ImageSet(pixels, torch.zeros(20).long(), ["a"], "synthetic")
    argv = ["--arch", "resnet18", "--batch_size", str(batch_size), "--save_dir", "x"]
    args = train_corruption.parse_args(argv)
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    train_corruption.check_images(args, data, torch.device("cuda"))
    if fits:
        train_corruption.check_images(args, data, torch.device("cpu"))
    else:
        with pytest.raises(InputError, match=f"at least 2 images per step in each of {ranks}"):
            train_corruption.check_images(args, data, torch.device("cpu"))
