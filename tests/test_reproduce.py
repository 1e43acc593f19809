"""reproduce.py on a handful of images: results, figures, and reuse of what is there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import model_patching
import reproduce
import train_corruption
from datasets import synthetic
from models import build_model
from utils.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of two classes, and pretrained weights of a VGG-11 beside it."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
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


def test_keep_num_and_quantization_share_models(folder, tmp_path, monkeypatch):
    reproduce.main(arguments(folder, tmp_path, "keep-num", "--keep_nums", "1", "3"))
    out = tmp_path / "keep-num"
    table = (out / "table.md").read_text()
    assert "patched, keep_num 3" in table and "contrast: RA, %" in table
    result = json.loads((out / "results.json").read_text())
    assert len(result["rows"]) == 4 and result["torch"] == torch.__version__
    assert (out / "keep_num.png").read_bytes().startswith(b"\x89PNG")

    trained = []
    monkeypatch.setattr(train_corruption, "train", lambda args: trained.append(args))
    few = ("--keep_nums", "2", "--bits", "4", "2")
    reproduce.main(arguments(folder, tmp_path, "quantization", *few))
    assert not trained
    rows = json.loads((tmp_path / "quantization" / "results.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [32, 4, 2, 32, 4, 2]
    assert rows[0]["bytes"] > rows[1]["bytes"] > rows[2]["bytes"]
    assert (tmp_path / "quantization" / "storage.png").exists()

    # A second run measures nothing again, and another setting is not mixed in.
    measured = []
    monkeypatch.setattr(model_patching.Study, "measure", lambda *a: measured.append(a))
    reproduce.main(arguments(folder, tmp_path, "quantization", *few))
    assert not measured
    with pytest.raises(SystemExit):
        reproduce.main(arguments(folder, tmp_path, "keep-num", "--severity", "1"))


def test_other_settings_are_refused_with_the_difference(folder, tmp_path):
    reproduce.main(arguments(folder, tmp_path, "keep-num", "--keep_nums", "1"))
    args = reproduce.parse_args(arguments(folder, tmp_path, "keep-num", "--severity", "1"))
    with pytest.raises(InputError, match=r"severity 5, wanted is 1.*--force"):
        reproduce.keep_num(args)


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


def test_rows_of_other_forms_in_the_same_file_are_not_mistaken():
    plain = {"corruption": "fog", "keep_num": 2, "seed": 0, "models": "a b"}
    coarse = plain | {"bits": 2, "levels": "linear"}
    assert (
        len({reproduce.identity(r) for r in (plain, coarse, coarse | {"per_channel": True})}) == 3
    )
    assert reproduce.identity(plain | {"bytes": 5, "patched": {}}) == reproduce.identity(plain)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--keep_nums", "3"], "--keep_nums"),
        (["quantization", "--bits", "40"], "--bits 40"),
        (["keep-num", "--keep_nums", "99"], "13 layers"),
        (["keep-num", "--seeds", "0", "0"], "twice"),
        (["keep-num", "--corruptions", "fogg"], "'fog'"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_flags_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(argv)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
