"""The README's Python example and commands are what the code takes."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import make_corruptions
import model_patching
import reproduce
import train_corruption
from datasets import synthetic
from datasets.corruptions import corrupt
from models import build_model
from utils.fingerprint import fit
from utils.signature import Method, RobustWeightSignature

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = build_model("vgg11", 10).state_dict()
    for name in ("pretrained", "standard", "robust_fog", "robust_snow"):
        state = {k: v + 0.01 * torch.randn_like(v) for k, v in state.items()}
        torch.save(state, f"{name}.pth")
    model = build_model("vgg11", 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    section = README.split("## Signatures from Python")[1]
    example = re.search(r"```python\n(.+?)```", section, flags=re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    snow = "snow = RobustWeightSignature.extract(" + ", ".join(
        ['"pretrained.pth"', '"standard.pth"', '"robust_snow.pth"', "keep_num=5)"]
    )
    seen = []
    names = {"model": model, "evaluate": lambda m: seen.append(m.features[0].weight.clone())}
    exec(example.replace("\nboth =", f"\n{snow}\nboth ="), names)
    assert not torch.equal(seen[0], before["features.0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bank_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bank").mkdir()
    model, images = build_model("vgg16", 10), synthetic.load("val").images[:40]
    torch.save(model.state_dict(), "standard.pth")
    for name in ("fog", "snow"):
        copies = [corrupt(images, name, s) for s in range(1, 6)]
        tensors = {"features.0.weight": torch.ones(64, 3, 3, 3)}
        known = {"corruptions": (name,), "fingerprint": fit([images, *copies])}
        RobustWeightSignature(tensors, "vgg16", Method(), **known).save(f"bank/{name}.rws")
    names = {"images": copies[4].float() / 255}
    exec(re.findall(r"```python\n(from models.+?)```", README, flags=re.DOTALL)[0], names)
    assert names["logits"].shape == (40, 10)
    assert not torch.allclose(names["logits"], model(names["images"]), atol=1e-3)


def commands():
    blocks = re.findall(r"```bash\n(.+?)```", README, flags=re.DOTALL)
    blocks += re.findall(r"(?:^    python .+\n(?:        .+\n)*)+", README, flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python ")]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    _, script, *argv = shlex.split(command)
    modules = (train_corruption, model_patching, make_corruptions, reproduce)
    scripts = {m.__name__: m for m in modules}
    scripts[Path(script).stem].parse_args(argv)


def test_there_are_commands():
    assert len(commands()) == 8
