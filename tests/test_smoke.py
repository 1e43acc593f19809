"""What the smoke preset leaves behind; the README's experiment, in a copy of the tree."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import model_patching
import reproduce
import train_corruption
from datasets import synthetic
from experiments import EXPERIMENTS, pretrain
from experiments.tables import PATCHED, ROBUST, STANDARD, UNION, select
from models import build_model
from tests.narrow import CHANNELS, narrow  # noqa: F401
from tests.test_reproduce import CPU, FEW, ROOT, results


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What `reproduce.py all --preset smoke --dataset synthetic` leaves behind, of few images."""
    root = tmp_path_factory.mktemp("smoke")
    argv = ["all", "--preset", "smoke", "--dataset", "synthetic", "--arch", "vgg11", *CPU]
    argv += ["--train_images", "128", "--test_images", "40"]
    argv += ["--runs", str(root / "runs"), "--out", str(root / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SIZES", FEW)
        reproduce.main(argv)
        yield argv, root / "out"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_smoke_writes_every_result(smoke, experiment):
    out = smoke[1] / experiment
    result = results(out)
    assert result["experiment"] == experiment and result["rows"] and result["seconds"] >= 0
    assert result["torch"] == torch.__version__ and "seeds 0" in result["study"]
    assert len(result["data"][0]) == 16 and "device" in result and not result["ablation"]
    assert result["sources"]["fog"] == "generated, seed 0, constants of CIFAR-10-C (32×32)"
    assert all("seed" in row and ("RA" in row or "value" in row) for row in result["rows"])
    assert (out / "table.md").read_text().startswith("| ")
    with open(out / "table.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 1 + len(result["rows"])
    assert min(Image.open(out / f"{experiment}.png").size) > 200


def test_smoke_ends_in_a_report_of_every_claim(smoke):
    text = (smoke[1] / "README.md").read_text()
    assert "\n- synthetic, vgg11, severity 5: 3 (seed 0) of 19 corruptions\n" in text
    assert "not measured" not in text.replace("another data set: not measured", "")
    for name, module in EXPERIMENTS.items():
        assert f"## {name}: " in text and f"]({name}/table.md)" in text
        assert module.CLAIM in text and module.RULE in text


def test_a_second_run_trains_and_measures_nothing_again(smoke, monkeypatch):
    argv, out = smoke
    before = results(out / "keep_num")["rows"]

    def refuse(*args, **more):
        raise AssertionError("done before")

    monkeypatch.setattr(train_corruption, "train", refuse)
    monkeypatch.setattr(model_patching, "evaluate", refuse)
    monkeypatch.setattr(pretrain, "pretrain", refuse)
    for name in ("main", "keep_num", "transfer"):
        reproduce.main([name, *argv[1:-1], str(out / name)])
    assert results(out / "keep_num")["rows"] == before


def test_an_experiment_of_the_readme_runs_and_is_reported(smoke, tmp_path):
    """README, "Add an ablation": the file as it stands there, registered as it says."""
    argv = smoke[0]
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "results", "runs", "data", "tests", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Add an ablation")[1]
    name = re.search(r"`experiments/(\w+)\.py`", section)[1]
    (tree / "experiments" / f"{name}.py").write_text(
        re.search(r"```python\n(.+?)```", section, flags=re.DOTALL)[1], encoding="utf-8"
    )
    made = tree / "datasets" / "synthetic.py"
    made.write_text(re.sub(r"^SIZES = .+", f"SIZES = {FEW}", made.read_text(), flags=re.MULTILINE))
    made = tree / "models" / "vgg.py"
    made.write_text(made.read_text().replace("VGGS =", f'cfgs["A"] = {CHANNELS}\nVGGS ='))
    register = tree / "experiments" / "__init__.py"
    text = register.read_text().replace("    consistency,\n", f"    consistency,\n    {name},\n")
    register.write_text(text.replace("EXPERIMENTS = {", f'EXPERIMENTS = {{\n    "{name}": {name},'))
    (command,) = re.findall(rf"`python (reproduce\.py {name} .+?)`", section)
    results_of = tmp_path / "out" / name
    argv = [*shlex.split(command), *argv[5:-1], str(results_of)]
    report = ["reproduce.py", "report", "--out", str(results_of.parent)]
    for one in (argv, report):
        done = subprocess.run(
            [sys.executable, *one],
            capture_output=True,
            text=True,
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert "[1/" not in done.stdout and (results_of / f"{name}.png").exists()
    assert "random direction" in (results_of / "table.md").read_text()
    assert f"## {name}: " in (results_of.parent / "README.md").read_text()


def test_patch_of_alpha_0_is_the_standard_model_and_comes_off(smoke):
    rows = results(smoke[1] / "alpha")["rows"]
    off = [row for row in rows if "value" in row]
    assert len(off) == 3 and all(row["value"] == 1 for row in off)
    for row in select(rows, model=PATCHED, alpha=0):
        (standard,) = select(rows, model=STANDARD, corruption=row["corruption"])
        assert (row["TA"], row["RA"]) == (standard["TA"], standard["RA"])


def test_storage_counts_bytes_on_disk(smoke):
    rows = select(results(smoke[1] / "quantization")["rows"], model=PATCHED)
    size = {(row["keep_num"], row["bits"]): row["bytes"] for row in rows}
    assert size[7, 32] > 6 * size[7, 4] and size[8, 32] > size[7, 32] > size[1, 32]
    rows = results(smoke[1] / "main")["rows"]
    of = {(row["model"], row.get("bits")): row["bytes"] for row in rows}
    full = 4 * sum(p.numel() for p in build_model("vgg11", 10).state_dict().values())
    assert of[ROBUST, None] == of[UNION, None] == full and of[STANDARD, None] == 0
    assert of[PATCHED, 32] == size[7, 32] > 6 * of[PATCHED, 4]
