"""reproduce.py: the smoke preset, reuse, jobs for a cluster, the README's experiment, refusals."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import make_corruptions
import reproduce
import train_corruption
from datasets import synthetic
from experiments import compose, pretrain, settings
from experiments.study import Study
from experiments.tables import BATCHNORM_ONLY, PATCHED, ROBUST, STANDARD, UNION, select
from models import build_model, vgg
from tests.folders import write_folders
from tests.narrow import WIDE, narrow  # noqa: F401
from utils.errors import InputError
from utils.measurements import Measurements

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--device", "cpu", "--no_amp"]
FEW = {"all": 400, "test": 200, "pretrain": 400}  # images of the synthetic set


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
        *(experiment, "--dataset", "folder", "--data", str(folder), "--arch", "vgg11", *CPU),
        *("--pretrained", str(folder / "pre.pth"), "--preset", "smoke"),
        *("--corruptions", "fog", "contrast", "--runs", str(tmp_path / "runs")),
        *("--out", str(tmp_path / experiment), *more),
    ]


def test_two_folder_sets_are_two_data_sets():
    """By the name of the folder that --data names."""
    argv = ["transfer", "--dataset", "folder", "--data", "a/birds", "--target_dataset", "folder"]
    study = Study(reproduce.parse_args([*argv, "--target_data", "b/cars"]))
    assert study.name == "folder-birds_vgg16_paper"
    assert study.target.name == "folder-cars_vgg16_paper"


def results(out):
    return json.loads((out / "results.json").read_text())


def test_seeds_after_the_first_with_few_corruptions(folder, tmp_path):
    more = ("--seeds", "0", "1", "--repeat_corruptions", "fog")
    reproduce.main(arguments(folder, tmp_path, "similarity", *more))
    named = [row for row in results(tmp_path / "similarity")["rows"] if "named" in row]
    # for the first seed there is no other corruption to take it for
    assert [(row["corruption"], row["seed"]) for row in named] == [("fog", 1)]
    reproduce.main(arguments(folder, tmp_path, "layers", *more))
    rows = results(tmp_path / "layers")["rows"]
    assert {(row["corruption"], row["seed"]) for row in rows} == {
        *(("fog", 0), ("contrast", 0), ("fog", 1), ("another seed, clean", 1))
    }
    groups = ("--groups", "fog+contrast", "fog+snow")
    argv = arguments(folder, tmp_path, "compose", *more, "snow", *groups)
    argv[argv.index("contrast")] = "contrast snow"
    study = Study(reproduce.parse_args(" ".join(argv).split()))
    made = [(job.settings["seed"], job.settings["corruption"]) for job in compose.jobs(study)]
    assert made == [(0, ["fog", "contrast"]), (0, ["fog", "snow"]), (1, ["fog", "snow"])]
    few = ("--keep_nums", "2", "--bits", "4")
    reproduce.main(arguments(folder, tmp_path, "quantization", *few, *more))
    reproduce.main(["report", "--out", str(tmp_path)])
    assert "2 layers at 4 bits" in (tmp_path / "README.md").read_text()
    reproduce.main(arguments(folder, tmp_path, "keep-num", "--keep_nums", "2", *more))
    assert "±" in (tmp_path / "keep-num" / "table.md").read_text()


def test_a_published_corrupted_set_is_what_is_measured(folder, tmp_path):
    published = tmp_path / "published"
    data = ["--dataset", "folder", "--data", str(folder), "--out", str(published)]
    make_corruptions.main([*data, "--corruption", "fog", "contrast", "--seed", "7"])
    here = arguments(folder, tmp_path, "alpha", "--corruption_data", str(published))
    reproduce.main(here)
    sources = results(tmp_path / "alpha")["sources"]
    assert "severity 5 of published" in results(tmp_path / "alpha")["study"]
    assert {name: Path(sources[name]).name for name in ("fog", "contrast")} == {
        "fog": "fog.npy",
        "contrast": "contrast.npy",
    }
    with pytest.raises(SystemExit):
        reproduce.main([*here, "--corruption_data", str(tmp_path / "none")])
    (published / "test" / "labels.npy").unlink()
    with pytest.raises(SystemExit):
        reproduce.main([*here, "--runs", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()  # nothing was trained
    assert not Study(reproduce.parse_args([*here, "--corruptions", "fog"])).union_seeds


def test_ablations_measure_other_signatures_of_the_same_models(folder, tmp_path, monkeypatch):
    reproduce.main(arguments(folder, tmp_path, "main", "--keep_num", "2"))
    monkeypatch.setattr(train_corruption, "train", lambda args: pytest.fail("trained again"))
    kept = tmp_path / "runs" / "accuracies.json"
    known = json.loads(kept.read_text())
    for flags, words in (
        (["--no-projection"], "no projection"),
        (["--layers", "deepest"], "layers deepest"),
        (["--layers", "random", "--no_projection"], "layers random, no projection"),
    ):
        reproduce.main(arguments(folder, tmp_path, "main", "--keep_num", "2", *flags))
        assert results(tmp_path / "main")["ablation"] == words
        more = json.loads(kept.read_text())
        assert len(more) > len(known)  # of another patch
        known = more


def out_of(*argv):
    """Where the results go by default."""
    quick = ["quantization", "--preset", "quick", "--dataset", "synthetic"]
    args = reproduce.parse_args([*quick, *argv])
    return reproduce.default_out(reproduce.Study(args), args.experiment)


def test_the_default_place_of_results_follows_from_all_that_determines_them():
    base = out_of()
    assert base.parts[:2] == ("runs", "results")  # which git ignores
    assert out_of("--device", "cpu", "--force", "--title", "x") == base
    for more in (
        "--severity 3",
        "--corruptions fog",
        "--seeds 1",
        "--per_channel",
        "--keep_num 2",
        "--layers random",
        "--no_projection",
        "--lr 0.1",
        "--frost_dir .",
    ):
        assert out_of(*more.split()) != base, more


def name_of(*argv):
    return reproduce.Study(reproduce.parse_args(["main", "--dataset", "cifar10", *argv])).name


def test_models_lie_where_their_recipe_says():
    quick, paper = name_of("--preset", "quick"), name_of("--preset", "paper")
    assert quick == "cifar10_vgg16_quick" and paper == "cifar10_vgg16_paper"
    assert (
        name_of("--epochs", "3") == quick
        and name_of("--preset", "quick", "--epochs", "50") == paper
    )
    assert name_of("--epochs", "12") == "cifar10_vgg16_12ep"
    assert name_of("--epochs", "12", "--lr", "0.001") == "cifar10_vgg16_12ep_lr0.001"
    assert name_of("--epochs", "3", "--batch_size", "64") != quick
    args = reproduce.parse_args(["main", "--dataset", "cifar10", "--epochs", "12"])
    assert args.decreasing_lr == "5,10"


def test_another_severity_has_models_of_its_own(folder, tmp_path):
    reproduce.main(arguments(folder, tmp_path, "layers"))
    reproduce.main(arguments(folder, tmp_path, "layers", "--severity", "2"))
    seed = tmp_path / "runs" / f"folder-{folder.name}_vgg11_smoke" / "seed0"
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


def test_force_trains_again_and_keeps_other_studies_accuracies(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path, "keep_num", "--keep_nums", "2")
    reproduce.main(argv)
    kept = json.loads((tmp_path / "runs" / "accuracies.json").read_text())
    capsys.readouterr()
    reproduce.main([*argv, "--force"])
    assert "[3/3]" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "accuracies.json").read_text()).items() >= kept.items()


def test_half_of_the_classes_pretrains_the_other_half(tmp_path, monkeypatch):
    for split, size in (("all", 300), ("test", 100)):
        monkeypatch.setitem(synthetic.SIZES, split, size)
    common = ["--dataset", "synthetic", "--preset", "smoke", "--arch", "resnet18", *CPU]
    common += ["--corruptions", "fog", "--runs", str(tmp_path / "runs")]
    common += ["--pretrain-classes", "even", "--out", str(tmp_path / "out")]
    reproduce.main(["pretrain", *common])
    (made,) = (tmp_path / "runs" / "pretrained").iterdir()
    assert torch.load(made, weights_only=True)["state_dict"]["fc.bias"].shape == (5,)
    reproduce.main(["main", *common, "--keep_num", "3"])
    result = results(tmp_path / "out")
    assert result["arguments"]["classes"] == "odd" and "odd classes" in result["study"]
    of = {row["model"]: row for row in result["rows"]}
    assert {STANDARD, ROBUST, PATCHED} <= of.keys()
    only = of[BATCHNORM_ONLY]  # what a patch of zeros does
    accuracies = [(of[model]["TA"], of[model]["RA"]) for model in (BATCHNORM_ONLY, STANDARD)]
    assert only["bytes"] == 0 and accuracies[0] != accuracies[1]
    reproduce.main(["keep-num", *common, "--keep_nums", "3"])
    (again,) = select(results(tmp_path / "out")["rows"], model=BATCHNORM_ONLY)
    assert (again["TA"], again["RA"]) == (only["TA"], only["RA"])


def test_pretraining_goes_on_after_its_last_epoch(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.SIZES, "pretrain", 400)
    images = synthetic.load("pretrain")
    argv = ["pretrain", "--dataset", "synthetic", "--arch", "resnet18", *CPU]
    args = reproduce.parse_args([*argv, "--pretrain_epochs", "2"])
    whole, parts = tmp_path / "whole.pth", tmp_path / "parts.pth"
    pretrain.pretrain(args, images, whole, str)
    epochs, real = [], pretrain.train_epoch

    def stop(*args, **more):
        epochs.append(more["title"])
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(pretrain, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(args, images, parts, str)
    pretrain.pretrain(args, images, parts, str)
    assert epochs == [f"pretraining {i}/2" for i in (1, 2, 2)]
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
    capsys.readouterr()
    reproduce.main(argv)
    assert not [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    reproduce.main(argv[:-1])  # patches and measures, trains nothing
    assert "[1/" not in capsys.readouterr().out


def test_list_names_the_pretraining_first(tmp_path, capsys):
    argv = ["main", "--dataset", "synthetic", "--preset", "smoke", "--runs", str(tmp_path)]
    reproduce.main([*argv, "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[0])[1:3] == ["reproduce.py", "pretrain"] and lines[1][0] == "#"
    assert reproduce.parse_args(shlex.split(lines[0])[2:]).pretrained in lines[2]


def test_several_devices_train_in_processes_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(vgg.cfgs, "A", WIDE)  # as it is in those
    torch.save(build_model("vgg11", 3).state_dict(), tmp_path / "pre.pth")
    argv = arguments(folder, tmp_path, "layers", "--devices", "cpu", "cpu")
    argv[argv.index("--pretrained") + 1] = str(tmp_path / "pre.pth")
    reproduce.main(argv)
    seed = tmp_path / "runs" / f"folder-{folder.name}_vgg11_smoke" / "seed0"
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
    monkeypatch.setattr(synthetic, "SIZES", FEW)
    few = ["--epochs", "1", "--pretrain_epochs", "1", "--corruptions", "fog", "gaussian_noise"]
    few += ["--train_images", "128", "--test_images", "40"]
    demo = ["demo", *few, *CPU, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    reproduce.main(demo)
    names = {"table.md", "table.csv", "results.json", "main.png", "samples.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    rows = results(tmp_path / "out")["rows"]
    assert {row["corruption"] for row in rows} == {"fog", "gaussian_noise"}
    assert len(select(rows, model="patched, each image chooses")) == 2
    assert not select(rows, model=UNION) and settings.DEMO[0] == "main"
    capsys.readouterr()
    reproduce.main(demo)  # everything is there
    assert "pretraining" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--nonsense", "3"], "--nonsense"),
        (["quantization", "--bits", "40"], "--bits 40"),
        (["keep-num", "--keep_nums", "99"], "13 layers"),
        (["main", "--keep_num", "0"], "--keep_num 0"),
        (["keep-num", "--seeds", "0", "0"], "twice"),
        (["keep_num", "--corruptions", "fogg"], "'fog'"),
        (["keep_num", "--corruptions", "fog", "--repeat_corruptions", "snow"], "snow"),
        (["main", "--corruptions", "fog", "--repeat_corruptions", "fog"], "several --seeds"),
        (["main", "--dataset", "cifar10", "--target_data", "b"], "name --target_dataset"),
        (["alpha", "--alphas", "-1"], "--alphas"),
        (["main", "--classes", "odd", "--corruption_data", "."], "holds all classes"),
        (["main", "--per_channel"], "of the quantization experiment"),
        (["compose", "--groups", "fog"], "--groups fog"),
        (["compose", "--corruptions", "fog"], "two --corruptions"),
        (["consistency", "--dataset", "cifar10"], "--target_dataset"),
        (["transfer", "--dataset", "cifar10", "--target_dataset", "cifar10"], "itself"),
        (["transfer", "--dataset", "synthetic", "--seeds", "0", "1"], "measures one seed"),
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


def test_the_second_data_set_is_looked_at_before_any_training(folder, tmp_path, capsys):
    target = ("--target_dataset", "folder", "--target_data", str(tmp_path))
    with pytest.raises(SystemExit):
        reproduce.main(arguments(folder, tmp_path / "out", "transfer", *target))
    assert "the second data set: " in (error := capsys.readouterr()).err and not error.out


def test_all_leaves_out_what_one_corruption_cannot_tell(tmp_path, capsys):
    few = ("--dataset", "synthetic", "--corruptions", "fog", "--runs", str(tmp_path))
    reproduce.main(["all", "--preset", "smoke", *few, "--list"])
    assert "compose: left out" in (told := capsys.readouterr().out) and "union" not in told


def test_accuracies_of_another_file_are_refused(tmp_path):
    path = tmp_path / "accuracies.json"
    path.write_text('{"a": "b"}')
    with pytest.raises(InputError, match="delete it"):
        Measurements(path)
    path.write_text('{"a": 50.0}')
    kept = Measurements(path)
    assert kept.get("a", lambda: pytest.fail("known")) == 50.0
    assert kept.get("b", lambda: 1.0) == 1.0 and Measurements(path).known == {"a": 50.0, "b": 1.0}
