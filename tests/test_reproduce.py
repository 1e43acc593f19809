"""reproduce.py: the smoke preset as the README gives it, reuse, jobs for a cluster, refusals."""

import csv
import json
import shlex

import pytest
import torch
from PIL import Image

import reproduce
import train_corruption
from datasets import synthetic
from models import build_model
from tests.folders import write_folders
from utils.errors import InputError

STUDY = ("main", "layers", "similarity", "consistency", "keep-num", "quantization", "alpha")
STUDY += ("compose", "transfer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of two classes, and pretrained weights of a VGG-11 beside it."""
    root = tmp_path_factory.mktemp("folder")
    write_folders(root, {"train": 12, "test": 6}, levels=120, step=100)
    torch.manual_seed(0)
    torch.save(build_model("vgg11", 3).state_dict(), root / "pre.pth")
    return root


def arguments(folder, tmp_path, experiment, *more):
    return [
        *(experiment, "--dataset", "folder", "--data", str(folder), "--arch", "vgg11"),
        *("--pretrained", str(folder / "pre.pth"), "--preset", "smoke", "--device", "cpu"),
        *("--corruptions", "fog", "contrast", "--runs", str(tmp_path / "runs")),
        *("--out", str(tmp_path / experiment), *more),
    ]


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What `reproduce.py all --preset smoke --dataset synthetic` leaves behind."""
    root = tmp_path_factory.mktemp("smoke")
    places = ["--runs", str(root / "runs"), "--out", str(root / "out"), "--device", "cpu"]
    argv = ["all", "--preset", "smoke", "--dataset", "synthetic", *places]
    reproduce.main(argv)
    return argv, root / "out"


@pytest.mark.parametrize("experiment", STUDY)
def test_smoke_writes_every_result(smoke, experiment):
    out = smoke[1] / experiment
    result = results(out)
    assert result["experiment"] == experiment and result["rows"] and result["seconds"] >= 0
    assert result["torch"] == torch.__version__ and "seeds 0" in result["caption"]
    assert result["seeds"] == [0] and len(result["data"]["0"]) == 16 and "device" in result
    assert (out / "table.md").read_text().startswith("| ")
    with open(out / "table.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 1 + len(result["rows"])
    pictures = list(out.glob("*.png"))
    assert len(pictures) == 1 and min(Image.open(pictures[0]).size) > 200


def test_smoke_ends_in_a_report_of_every_claim(smoke):
    text = (smoke[1] / "README.md").read_text()
    assert "not measured" not in text and text.count("\n## ") == 9
    for experiment in STUDY:
        assert f"]({experiment}/table.md)" in text


def test_a_second_run_trains_and_measures_nothing_again(smoke, monkeypatch):
    argv, out = smoke
    before = results(out / "keep-num")["rows"]

    def refuse(*args, **more):
        raise AssertionError("done before")

    monkeypatch.setattr(train_corruption, "train", refuse)
    monkeypatch.setattr(reproduce, "evaluate", refuse)
    monkeypatch.setattr(reproduce, "pretrain", refuse)
    reproduce.main(argv)
    assert results(out / "keep-num")["rows"] == before


def test_patch_of_alpha_0_is_the_standard_model_and_comes_off(smoke):
    result = results(smoke[1] / "alpha")
    assert result["restored"] is True
    for row in result["rows"]:
        if row["alpha"] == 0:
            assert row["patched"] == row["standard"]


def test_storage_counts_bytes_on_disk(smoke):
    rows = results(smoke[1] / "quantization")["rows"]
    size = {(row["keep_num"], row["bits"]): row["bytes"] for row in rows}
    assert size[7, 32] > 6 * size[7, 4] and size[13, 32] > 4 * size[7, 32]
    of = {row["model"]: row["bytes"] for row in results(smoke[1] / "main")["rows"]}
    full = 4 * sum(p.numel() for p in build_model("vgg16", 10).state_dict().values())
    assert of["robust models"] == of["data augmentation"] == full and of["standard"] == 0
    assert of["RWS, float32"] == size[7, 32] > 6 * of["RWS, 4 bits"]


def test_seeds_after_the_first_with_few_corruptions(folder, tmp_path):
    more = ("--seeds", "0", "1", "--repeat_corruptions", "fog")
    reproduce.main(arguments(folder, tmp_path, "similarity", *more))
    result = results(tmp_path / "similarity")
    assert {(row["corruption"], row["seed"], row["of"]) for row in result["named"]} == {
        ("fog", 1, 2),  # for the first seed there is no other corruption to take it for
    }
    reproduce.main(arguments(folder, tmp_path, "layers", *more))
    rows = results(tmp_path / "layers")["rows"]
    assert {(row["corruption"], row["seed"]) for row in rows} == {
        *(("fog", 0), ("contrast", 0), ("fog", 1), ("another seed, clean", 1))
    }
    few = ("--keep_nums", "2", "--bits", "4")  # the report judges the layers nearest --keep_num
    reproduce.main(arguments(folder, tmp_path, "quantization", *few, *more))
    reproduce.main(["report", "--out", str(tmp_path)])
    assert "2 layers at 4 bits" in (tmp_path / "README.md").read_text()
    reproduce.main(arguments(folder, tmp_path, "keep-num", "--keep_nums", "2", *more))
    table = (tmp_path / "keep-num" / "table.md").read_text()
    assert "±" in table


def test_ablations_measure_other_signatures_of_the_same_models(folder, tmp_path, monkeypatch):
    reproduce.main(arguments(folder, tmp_path, "main", "--keep_num", "2"))
    monkeypatch.setattr(train_corruption, "train", lambda args: pytest.fail("trained again"))
    for flags in (["--no-projection"], ["--layers", "deepest"], ["--layers", "random"]):
        reproduce.main(arguments(folder, tmp_path, "main", "--keep_num", "2", *flags))
        caption = results(tmp_path / "main")["caption"]
        assert ("No projection" in caption) == (flags == ["--no-projection"])
        assert flags[-1] in caption or flags == ["--no-projection"]
    deepest = ["main", "--dataset", "synthetic", "--layers", "deepest", "--no-projection"]
    out = reproduce.parse_args(deepest).out
    assert out.endswith("main_no-projection_deepest")


def test_another_severity_has_models_of_its_own(folder, tmp_path):
    reproduce.main(arguments(folder, tmp_path, "layers"))
    reproduce.main(arguments(folder, tmp_path, "layers", "--severity", "2"))
    seed = tmp_path / "runs" / "folder_vgg11_smoke" / "seed0"
    assert {p.name for p in seed.iterdir()} == {"standard", "robust", "robust-severity2"}


def test_other_settings_are_refused_with_the_difference(folder, tmp_path, capsys):
    reproduce.main(arguments(folder, tmp_path, "layers"))
    other = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save(build_model("vgg11", 3).state_dict(), other)
    argv = arguments(folder, tmp_path, "layers")
    argv[argv.index("--pretrained") + 1] = str(other)
    with pytest.raises(SystemExit):
        reproduce.main(argv)
    assert "pretrained_hash" in (said := capsys.readouterr().err) and "--force" in said


def test_half_of_the_classes_pretrains_the_other_half(tmp_path, monkeypatch):
    for split, size in (("all", 300), ("test", 100)):
        monkeypatch.setitem(synthetic.SIZES, split, size)
    common = ["--dataset", "synthetic", "--preset", "smoke", "--arch", "resnet18"]
    common += ["--corruptions", "fog", "--device", "cpu", "--runs", str(tmp_path / "runs")]
    common += ["--pretrain-classes", "even", "--out", str(tmp_path / "out")]
    reproduce.main(["pretrain", *common])
    (made,) = (tmp_path / "runs" / "pretrained").iterdir()
    assert torch.load(made, weights_only=True)["state_dict"]["fc.bias"].shape == (5,)
    reproduce.main(["main", *common, "--keep_num", "3"])
    result = results(tmp_path / "out")
    assert result["arguments"]["classes"] == "odd" and "odd classes" in result["caption"]
    of = {row["model"]: row for row in result["rows"]}
    assert {"standard", "robust models", "RWS, float32", "RWS, 4 bits"} <= of.keys()
    only = of["batch norm re-estimated only"]  # what a patch of zeros does
    assert only["bytes"] == 0 and only["TA"] != of["standard"]["TA"]
    reproduce.main(["keep-num", *common, "--keep_nums", "3"])
    nothing, some = results(tmp_path / "out")["rows"]
    assert (nothing["keep_num"], some["keep_num"]) == (0, 3)
    assert nothing["patched"] == {"TA": only["TA"], "RA": only["RA"]}


def test_pretraining_goes_on_after_its_last_epoch(tmp_path):
    images = synthetic.load("pretrain", sizes={"pretrain": 400})
    device = torch.device("cpu")
    whole, parts = tmp_path / "whole.pth", tmp_path / "parts.pth"
    reproduce.pretrain("resnet18", images, 2, device, False, whole)
    epochs = []

    def stop(*args, **more):
        epochs.append(more["title"])
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    real, reproduce.train_epoch = reproduce.train_epoch, stop
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce.pretrain("resnet18", images, 2, device, False, parts)
        reproduce.pretrain("resnet18", images, 2, device, False, parts)
    finally:
        reproduce.train_epoch = real
    assert epochs == ["pretraining 1", "pretraining 2", "pretraining 2"]
    first, second = (torch.load(p, weights_only=True)["state_dict"] for p in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {p.name for p in tmp_path.iterdir()} == {"whole.pth", "parts.pth"}


def test_listed_commands_train_what_is_missing_and_only_that(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path, "transfer", "--list")
    reproduce.main(argv)
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert len(commands) == 4 and lines[3].startswith("# when these are done")
    assert not (tmp_path / "runs").exists()
    for command in commands:
        assert command[:2] == ["python", "train_corruption.py"]
        train_corruption.main(command[2:])
    reproduce.main(argv)
    assert capsys.readouterr().out.splitlines()[-1:] != lines[-1:]
    reproduce.main(argv[:-1])  # patches and measures, trains nothing
    assert "[1/" not in capsys.readouterr().out


def test_list_names_the_pretraining_first(tmp_path, capsys):
    argv = ["main", "--dataset", "synthetic", "--preset", "smoke", "--runs", str(tmp_path)]
    reproduce.main([*argv, "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[0])[1:3] == ["reproduce.py", "pretrain"] and lines[1][0] == "#"
    assert reproduce.parse_args(shlex.split(lines[0])[2:]).pretrained in lines[2]


def test_several_devices_train_in_processes_of_their_own(folder, tmp_path):
    reproduce.main(arguments(folder, tmp_path, "layers", "--devices", "cpu", "cpu"))
    seed = tmp_path / "runs" / "folder_vgg11_smoke" / "seed0"
    for name in ("standard", "robust/fog", "robust/contrast"):
        assert "val clean" in (seed / name / "train.log").read_text()
    assert len(results(tmp_path / "layers")["rows"]) == 2 * 8


def test_a_model_that_fails_is_named_with_its_log(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path, "layers", "--devices", "cpu", "cpu")
    argv[argv.index("--data") + 1] = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        reproduce.main(argv)
    said = capsys.readouterr().err
    assert said.startswith("error: 3 of 3 models failed") and "nowhere" in said


def test_demo_on_few_images(tmp_path, monkeypatch, capsys):
    for split, size in (("all", 400), ("test", 200), ("pretrain", 400)):
        monkeypatch.setitem(synthetic.SIZES, split, size)
    monkeypatch.setattr(reproduce, "DEMO_PRETRAIN_EPOCHS", 1)
    monkeypatch.setattr(reproduce, "DEMO_EPOCHS", 1)
    monkeypatch.setattr(reproduce, "DEMO_CORRUPTIONS", ("fog", "gaussian_noise"))
    common = ["--device", "cpu", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    reproduce.main(["demo", *common])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "table.md",
        "results.json",
        "demo.png",
    }
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["corruption"] for row in rows] == ["fog", "gaussian_noise"]
    capsys.readouterr()
    reproduce.main(["demo", *common])  # everything is there
    assert "pretraining" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--keep_nums", "3"], "--keep_nums"),
        (["quantization", "--bits", "40"], "--bits 40"),
        (["keep-num", "--keep_nums", "99"], "13 layers"),
        (["main", "--keep_num", "0"], "13 layers"),
        (["keep-num", "--seeds", "0", "0"], "twice"),
        (["keep-num", "--corruptions", "fogg"], "'fog'"),
        (["keep-num", "--corruptions", "fog", "--repeat_corruptions", "snow"], "snow"),
        (["alpha", "--alphas", "-1"], "--alphas"),
        (["compose", "--groups", "fog"], "--groups fog"),
        (["compose", "--corruptions", "fog"], "two --corruptions"),
        (["consistency", "--dataset", "cifar10"], "--target_dataset"),
        (["transfer", "--dataset", "cifar10", "--target_dataset", "cifar10"], "itself"),
        (["main", "--pretrain-classes", "even", "--pretrained", "a.pth"], "choose"),
        (["main", "--pretrain-classes", "even", "--classes", "even"], "--classes even"),
        (["main", "--epochs", "0"], "--epochs 0"),
        (["pretrain", "--dataset", "cifar10", "--pretrained", "a.pth"], "nothing to pretrain"),
        (["main", "--devices", "cuda:77"], "cuda:77"),
        (["report", "--out", "nowhere"], "no results"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_flags_are_one_line(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_accuracies_of_another_file_are_refused(tmp_path):
    from utils.measurements import Measurements

    path = tmp_path / "accuracies.json"
    path.write_text('{"a": "b"}')
    with pytest.raises(InputError, match="delete it"):
        Measurements(path)
    path.write_text('{"a": 50.0}')
    kept = Measurements(path)
    assert kept.get("a", lambda: pytest.fail("known")) == 50.0
    assert kept.get("b", lambda: 1.0) == 1.0 and Measurements(path).known == {"a": 50.0, "b": 1.0}
