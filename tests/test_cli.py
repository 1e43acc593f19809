"""The scripts as a user runs them, on a handful of images."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import datasets
import model_patching
import train_corruption
from models import build_model
from tests.folders import write_folders
from tests.narrow import narrow  # noqa: F401
from utils import checkpoint as ckpt
from utils import signature_file
from utils.errors import InputError
from utils.fingerprint import SignatureBank
from utils.signature import RobustWeightSignature
from utils.signature_file import SECTIONS
from utils.sources import find_robust

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--epochs", "1", "--batch_size", "16", "--device", "cpu", "--no-amp"]


def run(script, *argv):
    """A script in a process of its own, as from the README."""
    return subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR-10 kept as folders: ten classes told apart by brightness."""
    root = tmp_path_factory.mktemp("cifar")
    write_folders(root, {"train": 10, "test": 4}, levels=60, step=20, classes="abcdefghij")
    return root


@pytest.fixture(scope="module", params=["vgg11", "resnet18"])
def models(request, cifar, tmp_path_factory):
    """arch, and a folder with pre.pth, standard/ and robust/{gaussian_noise,fog}/."""
    arch, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    torch.save(build_model(arch, 5).state_dict(), folder / "pre.pth")
    common = ["--arch", arch, "--std_data", cifar, "--lr", 0.005, "--pretrained"]
    common += ["--pretrained_path", folder / "pre.pth", *QUICK]
    train("--dataset", "cifar10", "--save_dir", folder / "standard", *common)
    for name in ("gaussian_noise", "fog"):
        train(
            *("--dataset", "cifar10-c", "--corruption", name),
            *("--save_dir", folder / "robust" / name, *common),
        )
    return arch, folder


def train(*argv):
    return train_corruption.train(train_corruption.parse_args([str(a) for a in argv]))


def patch(*argv):
    return model_patching.run(model_patching.parse_args([str(a) for a in argv]))


def base_arguments(models, cifar):
    arch, folder = models
    return (
        *("--arch", arch, "--dataset", "cifar10", "--data", cifar, "--device", "cpu", "--no-amp"),
        *("--base_model", folder / "standard" / "model_SA_best.pth.tar"),
    )


def patch_arguments(models, cifar, *more):
    folder = models[1]
    return (
        *base_arguments(models, cifar),
        *("--corruption_model_root", folder / "robust", "--pretrained", folder / "pre.pth"),
        *("--corruption", *more),
    )


# ---- training -------------------------------------------------------------------------------


def test_training_writes_what_it_says(models):
    arch, folder = models
    standard = {p.name for p in (folder / "standard").iterdir()}
    assert standard == {"checkpoint.pth.tar", "model_SA_best.pth.tar", "results.json"}
    robust = folder / "robust" / "fog"
    assert {p.name for p in robust.iterdir()} == standard | {"model_RA_best.pth.tar"}
    checkpoint = torch.load(robust / "model_RA_best.pth.tar", weights_only=True)
    assert {"state_dict", "epoch", "best_ra", "optimizer", "scheduler"} <= checkpoint.keys()
    assert checkpoint["arch"] == arch and checkpoint["corruption"] == ["fog"]
    assert "normalize.mean" in checkpoint["state_dict"]
    result = json.loads((robust / "results.json").read_text())
    assert set(result["RA"]) == {"fog"} and 0 <= result["TA"] <= 100
    made = "generated, seed 0, constants of CIFAR-10-C (32×32)"
    assert result["sources"]["train"] == result["sources"]["fog"] == made
    assert result["sources"]["clean"].endswith("test")
    assert result["torch"] == torch.__version__ and len(result["history"]) == 1


def test_same_seed_same_bits_and_resume(cifar, tmp_path):
    base = ["--dataset", "cifar10", "--arch", "resnet18", "--data", cifar, "--corruption", "snow"]
    base += ["--decreasing_lr", "1", "--batch_size", 16, "--device", "cpu", "--seed", 3]
    train(*base, "--epochs", 2, "--save_dir", tmp_path / "a")
    train(*base, "--epochs", 1, "--save_dir", tmp_path / "b", "--resume")
    train(*base, "--epochs", 2, "--save_dir", tmp_path / "b", "--resume")
    a, b = (
        torch.load(tmp_path / x / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for x in "ab"
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resampled_corruption_differs_between_epochs(cifar, tmp_path):
    args = train_corruption.parse_args(
        [
            *("--dataset", "cifar10", "--data", str(cifar), "--save_dir", str(tmp_path)),
            *("--corruption", "gaussian_noise", "fog", "--resample_corruption"),
        ]
    )
    device = torch.device("cpu")
    _, clean, *_ = train_corruption.load_data(args, device)
    images = train_corruption.redraw(args, clean, device)
    assert not torch.equal(images(0), images(1)) and torch.equal(images(1), images(1))


def test_several_corruptions_are_validated_separately(cifar, tmp_path):
    result = train(
        *("--dataset", "cifar10", "--arch", "vgg11", "--data", cifar, "--save_dir", tmp_path),
        *("--corruption", "fog", "contrast", *QUICK),
    )
    assert set(result["RA"]) == {"fog", "contrast"}
    assert set(result["history"][0]["val_corrupted"]) == {"fog", "contrast"}


def test_standard_and_robust_share_their_normalization(cifar, tmp_path):
    common = ("--dataset", "folder", "--arch", "resnet18", "--data", cifar, *QUICK)
    means = []
    for name, corruption in (("standard", ()), ("robust", ("--corruption", "contrast"))):
        train(*common, "--save_dir", tmp_path / name, *corruption)
        checkpoint = torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True)
        means.append(checkpoint["state_dict"]["normalize.std"])
    assert torch.equal(*means)
    # A standard run over a robust one leaves no robust checkpoint behind.
    train(*common, "--save_dir", tmp_path / "robust", "--overwrite")
    assert not (tmp_path / "robust" / "model_RA_best.pth.tar").exists()


def test_a_finished_run_is_kept(models, cifar, tmp_path):
    arch, _ = models
    base = ("--dataset", "cifar10", "--arch", arch, "--data", cifar, *QUICK)
    if arch != "resnet18":
        pytest.skip("one architecture is enough")
    train(*base, "--save_dir", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"a finished run .*--resume .*--overwrite"):
        train(*base, "--save_dir", tmp_path, "--seed", 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train(*base, "--save_dir", tmp_path, "--seed", 1, "--overwrite", "--epochs", 2)
    assert ckpt.read(tmp_path / ckpt.LAST)["seed"] == 1
    with pytest.warns(UserWarning, match=r"--epochs 1: 2 are done already .*nothing is trained"):
        train(*base, "--save_dir", tmp_path, "--seed", 1, "--resume")
    # Nor does what goes on from elsewhere take its place.
    train(*base, "--save_dir", tmp_path / "other")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="a finished run"):
        train(*base, "--save_dir", tmp_path, "--resume", tmp_path / "other" / ckpt.LAST)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    with pytest.raises(InputError, match="--resume names no file"):
        train(*base, "--save_dir", tmp_path / "new", "--resume=")


def test_a_run_that_goes_on_with_other_corrupted_images_says_so(cifar, tmp_path):
    base = ("--dataset", "cifar10", "--arch", "vgg11", "--std_data", cifar, *QUICK)
    base += ("--corruption", "fog", "--save_dir", tmp_path / "run")
    for part, count in (("train", 100), ("test", 40)):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "fog.npy", np.zeros((count, 32, 32, 3), np.uint8))
        np.save(tmp_path / part / "labels.npy", np.repeat(np.arange(10), count // 10))
    with pytest.warns(UserWarning, match="no record of the severity"):
        train(*base, "--data", tmp_path)
    with pytest.warns(UserWarning, match="began on other corrupted training images"):
        train(*base, "--epochs", 2, "--resume")


def test_resume_refuses_another_recipe_or_start(models, cifar, tmp_path):
    arch, folder = models
    if arch != "resnet18":
        pytest.skip("one architecture is enough")
    base = ("--dataset", "cifar10", "--arch", arch, "--data", cifar, *QUICK)
    train(*base, "--save_dir", tmp_path / "a")
    for change, said in (
        (("--lr", 0.5), "lr"),
        (("--corruption", "fog"), "corruption"),
        (("--pretrained", folder / "pre.pth"), "pretrained_hash"),
    ):
        with pytest.raises(InputError, match=f"that run has {said}"):
            train(*base, "--save_dir", tmp_path / "a", "--resume", *change)
    # A finished run resumed into another folder takes its best checkpoints along.
    last = tmp_path / "a" / "checkpoint.pth.tar"
    train(*base, "--save_dir", tmp_path / "b", "--resume", last)
    assert (tmp_path / "b" / "model_SA_best.pth.tar").exists()
    # Without them the best of the epochs to come is taken.
    (tmp_path / "a" / "model_SA_best.pth.tar").unlink()
    with pytest.warns(UserWarning, match="a has no model_SA_best"):
        result = train(*base, "--epochs", 2, "--save_dir", tmp_path / "c", "--resume", last)
    assert result["epoch"] == 2


# ---- patching -------------------------------------------------------------------------------


def test_what_is_read_and_what_is_generated_is_told(cifar, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    np.save(tmp_path / "test" / "fog.npy", np.zeros((40, 32, 32, 3), np.uint8))
    np.save(tmp_path / "test" / "labels.npy", np.repeat(np.arange(10), 4))
    command = ("--dataset", "cifar10", "--arch", "vgg11", "--std_data", cifar, "--data", tmp_path)
    with pytest.warns(UserWarning, match="fog is generated: .* none of train/fog.npy"):
        train(*command, "--corruption", "fog", "snow", "--save_dir", tmp_path / "out", *QUICK)
    printed, read = capsys.readouterr().out, tmp_path / "test" / "fog.npy"
    assert "| RA fog (from files) | RA snow (generated) |" in printed
    assert (
        f"; training generated, seed 0, constants of CIFAR-10-C (32×32); test {read}; gen"
        in printed
    )
    sources = json.loads((tmp_path / "out" / "results.json").read_text())["sources"]
    assert sources["fog"] == str(read) and sources["snow"].startswith("generated")


def test_patching_table_and_log(models, cifar, tmp_path, capsys):
    log = tmp_path / "log.pt"
    for name in ("gaussian_noise", "fog"):
        result = patch(*patch_arguments(models, cifar, name, "--keep_num", 3, "--save_log", log))
        assert [r["model"] for r in result["rows"]] == ["standard", "patched, keep_num 3", "robust"]
        assert all(set(r["RA"]) == {name} for r in result["rows"])
    printed = capsys.readouterr().out
    assert "averages over 2 runs" in printed and "| standard" in printed
    content = torch.load(log, weights_only=True)
    assert set(content) == {"std", "patched"}
    assert len(content["std"]["clean"]) == 2
    assert set(content["patched"]["robust"]) == {"gaussian_noise", "fog"}
    assert json.loads(Path(f"{log}.json").read_text())["rows"]


def test_alpha_zero_is_the_standard_model(models, cifar, tmp_path):
    saved = tmp_path / "patched.pth"
    patch(
        *patch_arguments(models, cifar, "fog", "--alpha", 0, "--keep_num", 2, "--save_model", saved)
    )
    _, folder = models
    patched = torch.load(saved, weights_only=True)["state_dict"]
    standard = torch.load(folder / "standard" / "model_SA_best.pth.tar", weights_only=True)
    assert all(torch.equal(v, standard["state_dict"][k]) for k, v in patched.items())


def test_sweeps_make_a_row_each(models, cifar):
    rows = patch(*patch_arguments(models, cifar, "fog", "--keep_num", 1, 2, "--alpha", 0, 1))[
        "rows"
    ]
    assert len(rows) == 6
    assert rows[1]["TA"] == rows[0]["TA"] and rows[1]["RA"] == rows[0]["RA"]  # alpha 0


def test_composition_quantization_and_all_corruptions(models, cifar):
    both = patch_arguments(models, cifar, "fog", "gaussian_noise", "--keep_num", 3)
    a = patch(*both, "--finetune_alpha", 0.5, 0.5, "--quantization", 256)
    b = patch(*both, "--alpha", 1, "--quantization", 256)
    assert a["rows"][1]["RA"] == b["rows"][1]["RA"]  # w_c = alpha / n
    assert set(a["rows"][2]["RA"]) == {"fog", "gaussian_noise"}
    every = patch(*patch_arguments(models, cifar, "fog", "--keep_num", 1, "--test_all_corruptions"))
    assert len(every["rows"][0]["RA"]) == 19


def test_patching_from_stored_signatures_alone(models, cifar, tmp_path, monkeypatch):
    names = ("fog", "gaussian_noise")
    quantized = ("--keep_num", 2, "--quantization", 16, "--bn_float")
    a = patch(
        *patch_arguments(
            models, cifar, *names, *quantized, "--save_signature", tmp_path, "--seed", 1
        )
    )
    files = [tmp_path / f"{name}.rws" for name in names]
    arch, common = models[0], (*base_arguments(models, cifar), "--seed", 1)
    b = patch(*common, "--signature", *files)
    assert a["rows"][1]["RA"] == b["rows"][1]["RA"] and a["rows"][1]["TA"] == b["rows"][1]["TA"]
    assert [row["model"] for row in b["rows"]] == ["standard", "patched, keep_num 2"]
    splits = []
    load = model_patching.flags.load_images
    monkeypatch.setattr(
        model_patching.flags, "load_images", lambda *a: (splits.append(a[2]), load(*a))[1]
    )
    b = patch(*common, "--signature", *files, "--alpha", 1, 0.5)["rows"]
    assert set(splits) == {"test"}  # no training image is read
    assert b[1]["RA"] == a["rows"][1]["RA"]
    if arch == "resnet18":
        again = patch(*common, "--signature", *files, "--reestimate")
        assert "train" in splits
        first = [tmp_path / f"version1-{file.name}" for file in files]
        for file, path in zip(files, first, strict=True):
            document = torch.load(file, weights_only=True)
            meta = document["meta"]
            drop = sum(entry["bytes"] for section in SECTIONS for entry in meta.pop(section))
            document |= {"version": 1, "payload": document["payload"][:-drop].clone()}
            document["checksum"] = signature_file._checksum(meta, document["payload"])
            torch.save(document, path)
        assert patch(*common, "--signature", *first)["rows"] == again["rows"]
    weighted = patch(*common, "--signature", *files, "--finetune_alpha", 0, 1)
    alone = patch(*common, "--signature", files[1])
    if arch == "vgg11":  # a ResNet's running statistics are re-estimated on both corruptions
        ra = weighted["rows"][1]["RA"]["gaussian_noise"]
        assert ra == alone["rows"][1]["RA"]["gaussian_noise"]
    other = "vgg13" if arch == "vgg11" else "resnet34"
    with pytest.raises(InputError, match=arch):
        patch(*(other if x == arch else x for x in common), "--signature", files[0])


def test_stored_signatures_choose(models, cifar, tmp_path, capsys):
    names, arch, folder = ("fog", "gaussian_noise"), *models
    patch(*patch_arguments(models, cifar, *names, "--keep_num", 2, "--save_signature", tmp_path))
    files = [tmp_path / f"{name}.rws" for name in names]
    known = SignatureBank.load(files).signatures
    assert all(len(s.fingerprint["strength"]) == 5 for s in known)
    assert all(bool(s.statistics) == (arch == "resnet18") for s in known)
    common = (*base_arguments(models, cifar), "--signature")
    capsys.readouterr()
    standard, chosen, oracle = patch(*common, *files, "--choose", 2)["rows"]
    printed = capsys.readouterr().out
    assert "× a plain forward pass" in printed and "| clean and these mixed, % |" in printed
    assert chosen["model"] == "patched, 2 at a time choose"
    assert chosen["mixture"] == pytest.approx((chosen["TA"] + sum(chosen["RA"].values())) / 3)
    assert set(chosen["named"]["clean"]) == {"clean", *names}
    alone = patch(*common, files[1])["rows"][1]
    assert oracle["RA"]["gaussian_noise"] == alone["RA"]["gaussian_noise"]
    assert oracle["TA"] == standard["TA"]
    union = tmp_path / "union"
    shutil.copytree(folder / "robust" / "fog", union / "gaussian_noise+fog")
    found = patch(*common, *files, "--choose", 2, "--corruption_model_root", union)["rows"]
    assert [row["model"] for row in found[2:]] == ["trained on all of them", oracle["model"]]
    assert set(found[2]["RA"]) == {*names}
    with pytest.raises(InputError, match=r"no folder for fog\+gaussian_noise \(there: fog"):
        patch(*common, *files, "--choose", 2, "--corruption_model_root", folder / "robust")
    later = torch.load(folder / "standard" / "model_SA_best.pth.tar")
    key = next(key for key in later["state_dict"] if key.endswith("weight"))
    later["state_dict"][key] += 0.01
    torch.save(later, tmp_path / "later.pth.tar")
    argv = [*common, *files, "--choose", 2]
    argv[argv.index("--base_model") + 1] = tmp_path / "later.pth.tar"
    if arch != "resnet18":
        patch(*argv)
        return
    with pytest.raises(InputError, match=r"fog\.rws holds statistics of batch norm .* of another"):
        patch(*argv)


def test_learnt_weights_come_from_validation_images_and_are_kept(
    models, cifar, tmp_path, monkeypatch
):
    monkeypatch.setattr(model_patching, "STEPS", 3)
    seen, splits, learn, load = [], [], model_patching.learn, model_patching.corrupted_set

    def spy(model, signatures, parts, labels, **how):
        seen.append((parts, labels))
        return learn(model, signatures, parts, labels, **how)

    monkeypatch.setattr(model_patching, "learn", spy)
    monkeypatch.setattr(
        model_patching, "corrupted_set", lambda *a: (splits.append(a[2]), load(*a))[1]
    )
    argv = patch_arguments(models, cifar, "fog", "gaussian_noise", "--keep_num", 2)
    a = patch(*argv, "--learn_alpha", "layer", "--save_signature", tmp_path)
    (parts, labels), val = seen[0], datasets.load("cifar10", cifar, "val")
    assert torch.equal(parts[0], val.images) and torch.equal(labels, val.labels)
    assert len(parts) == 3 and splits[2:4] == ["val", "val"]  # behind the test sets
    weights = a["rows"][1]["weights"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["weights"] == weights
    kept = RobustWeightSignature.load(tmp_path / "composed.rws").weights
    assert {name: w.tolist() for name, w in kept.items()} == weights
    assert "w fog" in signature_file.describe(tmp_path / "composed.rws")
    b = patch(*base_arguments(models, cifar), "--signature", tmp_path / "composed.rws")
    assert b["rows"][1]["RA"] == a["rows"][1]["RA"] and b["rows"][1]["TA"] == a["rows"][1]["TA"]
    patch(*argv, "--learn_alpha", "signature", "--unlabeled")
    assert seen[1][1] is None


def test_transfer_to_another_data_set_and_a_later_backbone(models, cifar, tmp_path):
    arch, folder = models
    few = tmp_path / "few"
    for split in ("train", "test"):
        for name in "abcd":
            target = few / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(cifar / split / name)
    train(
        *("--dataset", "folder", "--arch", arch, "--data", few, "--lr", 0.005, *QUICK),
        *("--pretrained", folder / "pre.pth", "--save_dir", tmp_path / "b"),
    )
    later = ("--patched_model", tmp_path / "b" / "model_SA_best.pth.tar", "--keep_num", 2)
    later += ("--save_signature", tmp_path / "rws")
    arguments = [str(a) for a in patch_arguments(models, cifar, "fog", *later)]
    arguments[arguments.index("cifar10")] = "folder"
    arguments[arguments.index(str(cifar))] = str(few)
    rows = patch(*arguments)["rows"]
    # the robust model has ten classes, the target four: no upper bound to show
    assert [row["model"] for row in rows] == ["standard", "patched, keep_num 2"]
    assert RobustWeightSignature.load(tmp_path / "rws" / "fog.rws").dataset == "cifar10"


def test_published_corrupted_set_is_read(models, cifar, tmp_path, capsys):
    for part, count in (("train", 10), ("test", 4)):
        (tmp_path / part).mkdir()
        black = np.zeros((10 * count, 32, 32, 3), np.uint8)
        np.save(tmp_path / part / "fog.npy", black)
        np.save(tmp_path / part / "labels.npy", np.repeat(np.arange(10), count))
    result = patch(
        *patch_arguments(models, cifar, "fog", "--keep_num", 1, "--corruption_data", tmp_path)
    )
    assert {r["RA"]["fog"] for r in result["rows"]} == {10.0}  # black images: one class for all
    assert "| RA fog (from files), % | RA mean" in capsys.readouterr().out
    more = ("--keep_num", 1, "--corruption_data", tmp_path, "--test_all_corruptions")
    with pytest.warns(UserWarning, match="snow is generated"):
        result = patch(*patch_arguments(models, cifar, "gaussian_noise", "fog", *more))
    printed = capsys.readouterr().out
    assert "| RA gaussian_noise (generated), % | RA fog (from files), % |" in printed
    assert "| RA all 19 (18 generated), % |" in printed
    assert result["sources"]["fog"] == str(tmp_path / "test" / "fog.npy")
    assert result["sources"]["snow"] == "generated, seed 0, constants of CIFAR-10-C (32×32)"


def test_all_severities_in_one_run(models, cifar, tmp_path, capsys):
    """As one run for each, and mCE by its definition (Hendrycks & Dietterich, 2019)."""
    both = patch_arguments(models, cifar, "fog", "gaussian_noise", "--keep_num", 1)
    log, standard = tmp_path / "log.pt", models[1] / "standard" / "model_SA_best.pth.tar"
    rows = patch(*both, "--severity", 5, 3, "--save_log", log)["rows"]
    for s in (3, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            of_one = patch(*both, "--severity", s)["rows"]
        for row, single in zip(rows, of_one, strict=True):
            assert {c: row["RA"][f"{c} {s}"] for c in single["RA"]} == single["RA"]
            assert row["TA"] == single["TA"]
    for row in rows:
        assert len(row["RA"]) == 4 and row["RA_mean"] == pytest.approx(sum(row["RA"].values()) / 4)
    capsys.readouterr()
    with_mce = patch(*both, "--severity", 5, 3, "--baseline_log", log)["rows"]
    assert "| mCE, % |" in capsys.readouterr().out and with_mce[0]["mCE"] == pytest.approx(100)
    for row in with_mce:
        errors = {
            c: sum(100 - row["RA"][f"{c} {s}"] for s in (3, 5))
            / sum(100 - rows[0]["RA"][f"{c} {s}"] for s in (3, 5))
            for c in ("fog", "gaussian_noise")
        }
        assert row["mCE"] == pytest.approx(50 * sum(errors.values()))
    with mock.patch.object(model_patching, "evaluate") as measuring:
        for file, said in ((log, ": no RA of fog, gaussian_noise; measure"), (standard, ".*a log")):
            with pytest.raises(InputError, match=f"--baseline_log{said}"):
                patch(*both, "--baseline_log", file)
        for severity, file in ((5, "5"), (3, "3")):  # of one, whose labels don't tell it
            single = ("--severity", severity, "--save_log", tmp_path / file)
            measuring.return_value = 50.0
            patch(*both, *single)
        measuring.reset_mock()
        for flag in ("--baseline_log", "--save_log"):
            said = rf"{flag} \S+: holds fog at severity 3, here it is 5"
            with pytest.raises(InputError, match=said):
                patch(*both, "--severity", 5, flag, tmp_path / "3")
    assert not measuring.called


def test_the_bound_is_none_of_other_classes(models, cifar, tmp_path):
    """Of as many: the heads fit, but the robust models know others."""
    arch, folder = models
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for place in (STANDARD, FOG):
        changed(tmp_path, place, class_names=[*"klmnopqrst"])
    other = patch_arguments((arch, tmp_path), cifar, "fog", "--keep_num", 1)
    rows = patch(*other, "--patched_model", folder / STANDARD)["rows"]
    assert [row["model"] for row in rows] == ["standard", "patched, keep_num 1"]


def test_signature_keeps_the_severity_it_was_trained_at(models, cifar, tmp_path):
    keep = ("--keep_num", 1, "--severity", 1, "--save_signature", tmp_path)
    patch(*patch_arguments(models, cifar, "fog", *keep))
    assert RobustWeightSignature.load(tmp_path / "fog.rws").severity == 5


def changed(folder, place, **facts):
    """A copy of the models in which the checkpoint at `place` records other facts."""
    path = folder / place
    content = ckpt.read(path) | facts
    ckpt.save({k: v for k, v in content.items() if v is not ...}, path)


STANDARD, FOG = "standard/model_SA_best.pth.tar", "robust/fog/model_RA_best.pth.tar"


@pytest.mark.parametrize(
    ("place", "facts", "said"),
    [
        (FOG, {"corruption": ["snow"]}, r"with corruption \['snow'\], .* \['fog'\]"),
        (FOG, {"corruption": ["fog", "snow"]}, r"with corruption \['fog', 'snow'\], .* \['fog'\]"),
        (FOG, {"dataset": "cifar100"}, "with dataset cifar100, but here it must be cifar10"),
        (FOG, {"side": 48}, "with side 48, but here it must be 32"),
        (STANDARD, {"corruption": ["fog"]}, r"with corruption \['fog'\], .* be \[\]"),
        (STANDARD, {"classes": "even"}, "with classes even, but here it must be None"),
        (STANDARD, {"class_names": [*"abxdefghij"]}, "with class_names x, but here it must be c"),
        (STANDARD, {"side": ..., "image_size": 48}, "with side 48, but here it must be 32"),
    ],
)
def test_recorded_facts_are_compared_with_the_request(models, cifar, tmp_path, place, facts, said):
    arch, folder = models
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if place == STANDARD and facts.keys() & {"classes", "class_names", "side"}:
        changed(tmp_path, FOG, **facts)  # the same set, but not the one asked for
    changed(tmp_path, place, **facts)
    with pytest.raises(InputError, match=rf"{Path(place).name}: trained {said}$"):
        patch(*patch_arguments((arch, tmp_path), cifar, "fog", "--keep_num", 1))


def test_recorded_facts_are_compared_where_only_one_model_has_them(models, cifar, tmp_path):
    arch, folder = models
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(ckpt.read_state_dict(folder / STANDARD), tmp_path / STANDARD)  # of anybody
    command = patch_arguments((arch, tmp_path), cifar, "fog", "--keep_num", 1)
    patch(*command, "--save_signature", tmp_path / "rws")
    changed(tmp_path, FOG, side=48)
    with pytest.raises(InputError, match=r"RA_best.*: trained with side 48, .* must be 32$"):
        patch(*command)
    known = command[: command.index("--corruption_model_root")]
    known += ("--signature", tmp_path / "rws" / "fog.rws", "--base_model")
    with pytest.warns(UserWarning, match=r"fog\.rws was trained at severity 5, --severity is 1 2"):
        patch(*known, tmp_path / STANDARD, "--severity", 1, 2)
    with pytest.raises(InputError, match=r"RA_best.* with corruption \['fog'\], .* must be \[\]$"):
        patch(*known, folder / FOG)


def test_older_files_and_what_is_only_told(models, cifar, tmp_path):
    arch, folder = models
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for place in (STANDARD, FOG):
        assert ckpt.read(tmp_path / place)["class_names"] == [*"abcdefghij"]
        assert ckpt.read(tmp_path / place)["side"] == 32
        changed(tmp_path, place, class_names=..., side=...)
    command = patch_arguments((arch, tmp_path), cifar, "fog", "--keep_num", 1)
    expected = patch(*patch_arguments(models, cifar, "fog", "--keep_num", 1))["rows"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert patch(*command)["rows"] == expected
    changed(tmp_path, FOG, severity=3)
    with pytest.warns(UserWarning, match="trained at severity 3, --severity is 5"):
        patch(*command)
    saved = tmp_path / "patched.pth"
    patch(*command, "--save_model", saved)
    with pytest.warns(UserWarning, match=r"patched\.pth is patched already, against \['fog'\]"):
        patch(*command, "--patched_model", saved)


def test_the_key_of_the_weights_is_named_once_for_all(models, cifar, tmp_path):
    arch, folder = models
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state, zeros = torch.load(folder / "pre.pth"), {"fc.weight": torch.zeros(1)}
    torch.save({"model": zeros, "model_ema": {"module": state}}, tmp_path / "pre.pth")
    key = ("--checkpoint_key", "model_ema", "--keep_num", 1)
    rows = patch(*patch_arguments((arch, tmp_path), cifar, "fog", *key))["rows"]
    assert rows == patch(*patch_arguments(models, cifar, "fog", "--keep_num", 1))["rows"]
    common = ("--dataset", "cifar10", "--arch", arch, "--std_data", cifar, "--lr", 0.005, *QUICK)
    common += ("--pretrained", tmp_path / "pre.pth", *key[:2])
    train(*common, "--save_dir", tmp_path / "again")
    a, b = (f / "model_SA_best.pth.tar" for f in (tmp_path / "again", folder / "standard"))
    a, b = ckpt.read_state_dict(a), ckpt.read_state_dict(b)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_patched_model_loads_in_torchvision(models, cifar, tmp_path):
    arch, folder = models
    saved = tmp_path / "patched.pth"
    patch(*patch_arguments(models, cifar, "fog", "--keep_num", 1, "--save_model", saved))
    content = torch.load(saved, weights_only=True)
    theirs = torchvision.models.get_model(arch, num_classes=10)
    if arch == "vgg11":
        theirs.features, theirs.avgpool = theirs.features[:-1], nn.AdaptiveAvgPool2d(1)
        theirs.classifier = nn.Linear(512, 10)
    theirs.load_state_dict(content["state_dict"])
    ours = build_model(arch, 10)
    ckpt.load_model_weights(ours, arch, ckpt.read_state_dict(saved), saved)
    assert content["class_names"] == [*"abcdefghij"] and content["patched"] == ["fog"]
    mean, std = (torch.tensor(content["normalization"][k]).view(3, 1, 1) for k in ("mean", "std"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = theirs.eval()((images - mean) / std), ours.eval()(images)
    torch.testing.assert_close(found, expected)
    # and a standard checkpoint, written plain
    standard, plain = folder / STANDARD, tmp_path / "plain.pth"
    ckpt.main(["convert", str(standard), str(plain)])
    theirs.load_state_dict(torch.load(plain, weights_only=True))
    with pytest.raises(SystemExit):
        ckpt.main(["convert", str(standard), str(plain)])


def test_show_says_what_a_checkpoint_holds(models, capsys):
    arch, folder = models
    ckpt.main(["show", str(folder / FOG)])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["arch"] == arch and lines["head"] == "10 classes" and lines["side"] == "32"
    assert lines["corruption"] == "['fog']" and lines["severity"] == "5"
    assert lines["normalize"].startswith("mean 0.") and "std 0." in lines["normalize"]
    assert lines["weights"].endswith(ckpt.backbone_hash(ckpt.read_state_dict(folder / FOG)))
    assert "optimizer" in lines["entries"]


def test_negation_takes_the_direction_away(models, cifar, tmp_path):
    arch, folder = models
    states = []
    for alpha in (-1, 1):
        saved = tmp_path / f"{alpha}.pth"
        command = patch_arguments(models, cifar, "fog", "--keep_num", 1, "--alpha", alpha)
        with contextlib.ExitStack() as stack:
            if alpha < 0:
                stack.enter_context(pytest.warns(UserWarning, match="no patch of the paper"))
            rows = patch(*command, "--save_model", saved)["rows"]
        assert rows[1]["model"] == "patched, keep_num 1" + ", alpha -1" * (alpha < 0)
        states.append(ckpt.read_state_dict(saved))
    base = ckpt.read_state_dict(folder / STANDARD)
    first = "conv1.weight" if arch == "resnet18" else "features.0.weight"
    less, more = (state[first] - base[first] for state in states)
    torch.testing.assert_close(less, -more, atol=1e-6, rtol=1e-3)
    assert more.any()


def test_wrong_pretrained_file_is_named_before_any_work(models, cifar, tmp_path):
    arch, folder = models
    other = "resnet18" if arch == "vgg11" else "vgg11"
    torch.save(build_model(other, 5).state_dict(), tmp_path / "other.pth")
    arguments = [str(a) for a in patch_arguments(models, cifar, "fog")]
    arguments[arguments.index(str(folder / "pre.pth"))] = str(tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth does not hold"):
        patch(*arguments)


def test_robust_folder_is_found_by_exact_name_first(models, tmp_path):
    for name in ("gaussian_noise_and_blur", "gaussian_noise", "vgg_fog_sev5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_RA_best.pth.tar").write_bytes(b"x")
    found = find_robust(tmp_path, "gaussian_noise")
    (tmp_path / "fog+snow+frost").mkdir()
    with pytest.raises(InputError, match=r"no folder for fog\+snow"):
        find_robust(tmp_path, "fog+snow")
    assert found.parent.name == "gaussian_noise"
    assert find_robust(tmp_path, "fog").parent.name == "vgg_fog_sev5"
    for name in ("no_snow_at_all", "not-snow", "snowfall", "bigsnow", "no_frost", "a-frost.2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_RA_best.pth.tar").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no folder for snow \(there: .*bigsnow"):
        find_robust(tmp_path, "snow")
    assert find_robust(tmp_path, "frost").parent.name == "a-frost.2"


# ---- what a user can get wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "argv", "said"),
    [
        (train_corruption, ["--dataset", "cifar11", "--save_dir", "x"], "cifar10"),
        (train_corruption, ["--corruption", "fogg", "--save_dir", "x"], "'fog'"),
        (train_corruption, ["--dataset", "cifar10-c", "--save_dir", "x"], "--corruption"),
        (train_corruption, ["--data", "nowhere", "--save_dir", "x"], "nowhere"),
        (train_corruption, ["--save_dir", "x", "--severity", "6"], "--severity 6"),
        (train_corruption, ["--save_dir", "x", "--lr", "fast"], "--lr"),
        (train_corruption, ["--save_dir", "x", "--decreasing_lr", "a,b"], "20,40"),
        (train_corruption, [], "--save_dir"),
        (model_patching, ["--corruption", "fog"], "--base_model"),
        (model_patching, ["--keep_num", "14"], "13 layers"),
        (model_patching, ["--quantization", "1"], "1"),
        (model_patching, ["--bn_float"], "--quantization"),
        (model_patching, ["--save_log", "."], "folder"),
        (model_patching, ["--finetune_alpha", "1", "2"], "1 signatures"),
        (train_corruption, ["--save_dir", "x", "--device", "meta"], "--device meta"),
        (train_corruption, ["--save_dir", "x", "--seed", "9" * 30], "--seed"),
        (train_corruption, ["--save_dir", "x", "--frost_dir", "nowhere"], "--frost_dir"),
    ],
)
def test_errors_are_one_line_and_exit_2(script, argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if script is model_patching and "--corruption" not in argv:
        argv = [*argv, "--corruption", "fog", "--base_model", "b", "--pretrained", "p"]
        argv += ["--corruption_model_root", "r"]
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: .+\n", stderr) and said in stderr
    assert not list(tmp_path.iterdir())


def test_scripts_run_as_processes():
    result = run("train_corruption", "--help")
    assert result.returncode == 0 and "(default: 0.01)" in result.stdout
    result = run("model_patching", "--corruption", "fogg")
    assert result.returncode == 2
    assert re.fullmatch(r"error: .+'fog'.+\n", result.stderr), result.stderr
