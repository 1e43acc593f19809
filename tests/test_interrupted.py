"""Whatever ends a run, whoever else writes there: files are whole or absent, nothing is lost."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import datasets
import make_corruptions
import train_corruption
from datasets import cache
from models.normalize import Normalize
from tests.folders import write_folders
from tests.forkserver import Server
from utils import checkpoint as ckpt
from utils import log, report, signature_file
from utils.errors import InputError, script_errors, thread_pool
from utils.files import replacing
from utils.signature import Method, RobustWeightSignature

# ---- what runs in processes of its own ------------------------------------------------------


class Small(nn.Module):
    """Everything that a checkpoint has to bring back: batch norm, and dropout's random state."""

    def __init__(self, arch, classes, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        return self.fc(self.features(self.normalize(images)).amax((2, 3)))


def train(argv, pause=0.0):
    """train_corruption.py with a small model; `pause` seconds in every write of a checkpoint."""
    write = Path.write_bytes

    def slowly(path, data):
        write(path, data[: len(data) // 2])
        time.sleep(pause)
        return write(path, data)

    Path.write_bytes = slowly
    torch.set_num_threads(1)
    train_corruption.build_model = Small
    train_corruption.main(argv)


def train_and_stop_in_the_second_write(argv, marker):
    """Wait for ever in the middle of writing the checkpoint of the second epoch."""
    write = Path.write_bytes

    def stopping(path, data):
        if path.name == f".{ckpt.LAST}.tmp.tar" and (path.parent / ckpt.LAST).exists():
            write(path, data[: len(data) // 2])
            marker.touch()
            time.sleep(600)
        return write(path, data)

    Path.write_bytes = stopping
    train(argv)


def load(root, marker=None):
    """Decode a data set in several threads, with `marker` slowly."""
    read = cache.read_image

    def slowly(*arguments):
        if marker and threading.current_thread() is not threading.main_thread():
            marker.touch()
            time.sleep(0.5)
        return read(*arguments)

    cache.read_image, cache._PIECE = slowly, 2
    with script_errors():
        datasets.load("folder", root, "all")


def add_to_log(path, times, value=1.0):
    for _ in range(times):
        row = {"TA": value, "RA": {"fog": value}}
        log.update(path, row, row, {"fog": 5})


def corrupt(argv):
    os.sync = lambda: None  # all disks of the machine, which may be busy with other things
    torch.set_num_threads(1)
    make_corruptions.main(argv)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server("tests.test_interrupted", tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes hard to tell apart, so that every few epochs are the best, 32 training images."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root, {"train": 16, "test": 4}, size=(16, 16), levels=120, step=15)
    return root


def flags(data, save_dir, epochs, *more):
    argv = ["--dataset", "folder", "--data", data, "--arch", "resnet18", "--epochs", epochs]
    argv += ["--batch_size", 8, "--decreasing_lr", f"{epochs // 2}", "--device", "cpu", "--no-amp"]
    return [str(a) for a in (*argv, "--save_dir", save_dir, *more)]


def hidden(folder):
    return [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]


def check_whole(folder):
    """Every file that a killed run left, but for temporary ones, reads back."""
    for path in Path(folder).iterdir() if Path(folder).exists() else ():
        if path.name == "results.json":
            json.loads(path.read_text())
        elif not path.name.startswith("."):
            assert ckpt.read(path)["epoch"] >= 1
            ckpt.read_state_dict(path)


def bits(value):
    """A checkpoint as nested tuples of plain values and bytes, without the times in it."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "images_per_second"}
        return tuple((k, bits(v)) for k, v in kept.items())
    return tuple(map(bits, value)) if isinstance(value, (list, tuple)) else value


def outcome(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {ckpt.LAST, ckpt.BEST_SA, ckpt.BEST_RA, "results.json"}
    result = json.loads((folder / "results.json").read_text())
    files = {name: bits(ckpt.read(folder / name)) for name in names if name.endswith(".tar")}
    return files, result["TA"], result["RA"], result["epoch"]


# ---- one run, interrupted -------------------------------------------------------------------


def stopped(server, argv, tmp_path):
    """A run that has written its first epoch, and half the checkpoint of its second."""
    job = server.start("train_and_stop_in_the_second_write", argv, tmp_path / "marker")
    job.wait_for(tmp_path / "marker")
    return job


def test_killed_at_twenty_moments_a_run_ends_in_the_same_bits(server, data, tmp_path):
    more = ("--corruption", "gaussian_noise", "fog", "--resample_corruption", "--resume")

    def start(name):
        return server.start("train", flags(data, tmp_path / name, 8, *more), 0.004)

    assert start("first").wait() == 0
    began = time.monotonic()
    assert start("whole").wait() == 0
    length = time.monotonic() - began
    expected = outcome(tmp_path / "whole")

    moments, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        job = start(f"killed{runs}")
        time.sleep(moments.uniform(0.1, 0.6) * length)
        job.kill()
        killed = job.wait() == -signal.SIGKILL
        check_whole(tmp_path / f"killed{runs}")
        kills += killed
        if not killed:
            assert job.status() == 0, job.printed
            assert outcome(tmp_path / f"killed{runs}") == expected
            runs += 1
    job = start(f"killed{runs}")
    assert job.wait() == 0, job.printed
    assert outcome(tmp_path / f"killed{runs}") == expected


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_in_mid_write_removes_the_temporary_file(
    server, data, tmp_path, number, status, said
):
    folder = tmp_path / "run"
    job = stopped(server, flags(data, folder, 3), tmp_path)
    assert hidden(folder)
    os.kill(job.pid, number)
    assert job.wait() == status
    assert job.printed.endswith(f"{said}\n") and "Traceback" not in job.printed
    assert not hidden(folder)
    assert ckpt.read(folder / ckpt.LAST)["epoch"] == 1
    check_whole(folder)


def test_sigterm_ends_a_run_whose_threads_are_at_work(server, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / "0.png")
    for i in range(1, 500):
        os.link(tmp_path / "train" / "a" / "0.png", tmp_path / "train" / "a" / f"{i}.png")
    job = server.start("load", str(tmp_path), tmp_path / "marker")
    job.wait_for(tmp_path / "marker")
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 143
    assert job.printed == "terminated\n" and not list(tmp_path.glob(".rws_cache/*"))


def test_work_that_waits_for_a_thread_is_dropped_when_a_signal_ends_the_rest():
    done = []
    with pytest.raises(KeyboardInterrupt), thread_pool(1) as pool:
        pool.map(lambda i: (time.sleep(0.05), done.append(i)), range(100))
        raise KeyboardInterrupt
    assert len(done) < 100


def test_a_run_begun_anew_never_mixes_with_the_one_before(server, data, tmp_path):
    folder = tmp_path / "run"
    assert server.start("train", flags(data, folder, 2, "--corruption", "fog")).wait() == 0
    job = stopped(server, flags(data, folder, 3, "--seed", 1, "--overwrite"), tmp_path)
    job.kill()
    job.wait()
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {ckpt.LAST, ckpt.BEST_SA} == left  # nor results.json, which would say "finished"
    assert {ckpt.read(folder / name)["seed"] for name in left} == {1}


def test_a_loss_that_is_no_number_ends_the_run_and_changes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_corruption, "build_model", Small)

    def run(epochs):
        argv = flags(data, tmp_path, epochs, "--resume", "--decreasing_lr", "9")
        train_corruption.train(train_corruption.parse_args(argv))

    run(1)  # the folder is free again, also for this process
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args: cross_entropy(*args) * float("nan"))
    with pytest.raises(InputError, match=r"loss is nan at step 4 of epoch 2/3 with --lr 0\.01"):
        run(3)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


# ---- two processes --------------------------------------------------------------------------


def test_a_second_trainer_is_refused_while_the_first_lives(server, data, tmp_path):
    folder = tmp_path / "run"
    first = stopped(server, flags(data, folder, 3), tmp_path)
    before = sorted(os.listdir(folder))
    second = server.start("train", flags(data, folder, 3, "--resume"))
    assert second.wait() == 2
    (line,) = [line for line in second.printed.splitlines() if "error: " in line]
    assert line.startswith(f"error: --save_dir {folder}") and f"process {first.pid}" in line
    assert sorted(os.listdir(folder)) == before
    first.kill()
    assert first.wait() == -signal.SIGKILL
    third = server.start("train", flags(data, folder, 3, "--resume"))
    assert third.wait() == 0, third.printed
    assert not hidden(folder)


def test_writers_of_one_log_lose_nothing(server, tmp_path):
    jobs = [server.start("add_to_log", tmp_path / "log.pt", 8) for _ in range(3)]
    assert [job.wait() for job in jobs] == [0] * 3
    assert len(log.read(tmp_path / "log.pt")["std"]["clean"]) == 24
    assert os.listdir(tmp_path) == ["log.pt"]


def test_two_processes_make_one_cache(server, data, tmp_path):
    os.symlink(data / "train", tmp_path / "train")
    jobs = [server.start("load", str(tmp_path)) for _ in range(3)]
    assert [job.wait() for job in jobs] == [0] * 3, jobs[0].printed
    (made,) = (tmp_path / ".rws_cache").iterdir()
    found = cache._from_cache(made, 32, torch.arange(32))
    assert torch.equal(found, datasets.load("folder", data, "all").images)


@pytest.mark.parametrize("layout", ["rws", "folders"])
def test_two_processes_corrupt_into_one_folder(server, data, tmp_path, layout):
    def argv(out, seed):
        names = ["--corruption", "gaussian_noise", "contrast", "fog", "--layout", layout]
        more = ["--severity", 3, "--overwrite", "--seed", seed, "--out", tmp_path / out]
        return [str(a) for a in ("--dataset", "folder", "--data", data, *names, *more)]

    for seed in (0, 1):
        assert server.start("corrupt", argv(f"alone{seed}", seed)).wait() == 0
    jobs = [server.start("corrupt", argv("both", seed)) for seed in (0, 1, 0, 1)]
    assert [job.wait() for job in jobs] == [0] * 4, [job.printed for job in jobs]
    both = tmp_path / "both"
    assert not [path for path in both.rglob("*") if path.suffix in (".lock", ".tmp")]
    made = json.loads((both / ".made.json").read_text())
    assert len(made) == 6
    for place, settings in made.items():
        for path in (both / place, *(both / place).rglob("*.JPEG")):
            same = tmp_path / f"alone{settings['seed']}" / path.relative_to(both)
            assert path.is_dir() or path.read_bytes() == same.read_bytes()


# ---- a full disk ----------------------------------------------------------------------------


def save_signature(path, value):
    tensor = torch.full((1000,), float(value))
    signature = RobustWeightSignature({"features.0.bias": tensor}, "vgg11", Method())
    signature_file.save(signature, path)


def save_array(path, value):
    with replacing(path) as temporary:
        np.save(temporary, np.full(1000, value))


WRITERS = {
    "a.tar": lambda path, value: ckpt.save({"a": torch.full((1000,), float(value))}, path),
    "a.json": lambda path, value: report.write_json(path, {"value": [value] * 1000}),
}
WRITERS |= {
    "a.rws": save_signature,
    "log": lambda path, value: add_to_log(path, 1, value),
    "a.npy": save_array,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace")])
def test_when_the_disk_fills_up_the_old_file_stays(tmp_path, monkeypatch, name, owner, call):
    path = tmp_path / name
    WRITERS[name](path, 1)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, call, full)
    with pytest.raises(InputError, match=rf"cannot write .*{name}: No space left"):
        WRITERS[name](path, 2)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]


@pytest.fixture
def small_disk(tmp_path):
    """A folder of 1 MB: a tmpfs of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave=0):
    """Take all room but `leave` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - leave
    (folder / "filler").write_bytes(bytes(free))


def test_on_a_full_disk_every_writer_keeps_what_is_there(small_disk, tmp_path):
    for name, write in WRITERS.items():
        write(small_disk / name, 1)
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    fill(small_disk)
    for name, write in WRITERS.items():
        with pytest.raises(
            InputError, match=rf"cannot write .*{name}: (No space left|.* requested)"
        ):
            write(small_disk / name, 2)
    assert {n: (small_disk / n).read_bytes() for n in before} == before
    assert set(os.listdir(small_disk)) == {*before, "filler"}
    os.unlink(small_disk / "filler")
    for name, write in WRITERS.items():
        write(small_disk / name, 2)
    assert all((small_disk / n).read_bytes() != b for n, b in before.items())


def test_training_on_a_full_disk_ends_in_one_line_and_goes_on_later(
    server, data, small_disk, tmp_path
):
    argv = flags(data, small_disk / "run", 3, "--resume", "--corruption", "fog")
    whole = flags(data, tmp_path / "whole", 3, "--corruption", "fog")
    assert server.start("train", whole).wait() == 0
    size = (tmp_path / "whole" / ckpt.LAST).stat().st_size
    fill(small_disk, 3 * size)  # two files, and the third under its temporary name no more
    job = server.start("train", argv)
    assert job.wait() == 2
    line = job.printed.splitlines()[-1]
    assert line.startswith("error: cannot write") and line.endswith("No space left on device")
    assert "Traceback" not in job.printed and not hidden(small_disk / "run")
    check_whole(small_disk / "run")
    os.unlink(small_disk / "filler")
    assert server.start("train", argv).wait() == 0
    assert outcome(small_disk / "run") == outcome(tmp_path / "whole")


def test_corrupting_on_a_full_disk_leaves_nothing_half(data, small_disk, monkeypatch):
    argv = ["--dataset", "folder", "--data", str(data), "--corruption", "contrast"]
    argv += ["--out", str(small_disk / "out")]
    fill(small_disk, 5000)
    before = sorted(os.listdir(small_disk))
    with pytest.raises(InputError, match=r"MB to write, .* free"):
        make_corruptions.make(make_corruptions.parse_args(argv))
    assert sorted(os.listdir(small_disk)) == before
    # Something else may fill the disk after that.
    monkeypatch.setattr(make_corruptions, "check_space", lambda *_: "")
    for layout in ("rws", "folders"):
        with pytest.raises(InputError, match=r"cannot write .*No space left"):
            make_corruptions.make(make_corruptions.parse_args([*argv, "--layout", layout]))
        images = {".npy", ".JPEG", ".tmp"}
        made = [path for path in (small_disk / "out").rglob("*") if path.suffix in images]
        assert {path.name for path in made} <= {"labels.npy"}


def test_a_checkpoint_that_can_not_be_written_is_seen_before_training(data, tmp_path):
    (tmp_path / "file").touch()
    argv = flags(data, tmp_path / "file" / "run", 1)
    with pytest.raises(InputError, match="cannot write"):
        train_corruption.train(train_corruption.parse_args(argv))
