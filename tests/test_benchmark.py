"""The benchmark: every subcommand gives its rows, and the classic ways compute the same."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
from datasets.corruptions import CORRUPTIONS
from tests.reference import RandomDraws, weather
from utils.errors import InputError
from utils.signature import project_out

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
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    flags = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--image_size", "32"]
    flags += ["--arch", "vgg11", "--batch_size", "4", "--images", "8", "--no-amp"]
    flags += ["--corruption", "fog", "glass_blur", "--out", str(tmp_path / "out")]
    rows = benchmark.main(["resample", *TINY, *flags])
    assert [row["corruption"] for row in rows] == ["fog", "glass_blur"]
    for row in rows:
        fixed, anew = row["fixed, images/s"], row["anew each epoch, images/s"]
        assert fixed > 0 and row["ratio"] == pytest.approx(anew / fixed)
    check_table(rows, tmp_path / "out")


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
        (["nothing"], "nothing"),
        ([], "COMMAND"),
    ],
)
def test_wrong_flags_are_named(flags, told):
    with pytest.raises(InputError, match=told):
        benchmark.parse_args(flags)
