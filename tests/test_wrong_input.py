"""What a user can get wrong: exit 2, one line that names flag or file, nothing written."""

import functools
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import make_corruptions
import model_patching
import reproduce
import train_corruption
from models import build_model
from tests.folders import write_folders
from utils import checkpoint as ckpt
from utils.errors import InputError, script_errors
from utils.signature import Method, RobustWeightSignature

# ---- commands that work, and what is wrong with them -----------------------------------------

COMMON = "--dataset folder --data {w}/data --device cpu"
GOOD = {
    train_corruption: f"{COMMON} --arch resnet18 --no-amp --epochs 1 --batch_size 4 --save_dir out",
    model_patching: f"{COMMON} --arch resnet18 --no-amp --corruption fog --keep_num 1 --base_model "
    "{w}/std.pth --pretrained {w}/std.pth --corruption_model_root {w}/robust",
    make_corruptions: f"{COMMON} --corruption contrast --split test --out out",
    reproduce: f"keep-num {COMMON} --arch resnet18 --pretrained {{w}}/std.pth --preset smoke "
    "--corruptions fog contrast --runs runs --out out --keep_nums 1",
    benchmark: "corruptions --corruption contrast --images 2 --windows 1 --seconds 0 --device cpu "
    "--out out",
}
# Below: "without A B | C" takes the flags A and B out of the good command and puts C behind it.

TRAIN = [
    # flags
    ("--nonsense 1", r"--nonsense"),
    ("without --save_dir", r"--save_dir"),
    ("--dataset foldr", r"--dataset 'foldr' \(did you mean 'folder'"),
    ("--dataset cifar10-c", r"--dataset cifar10-c is a corrupted set: name a --corruption"),
    ("--arch vgg99", r"--arch: .*vgg99.*resnet18"),
    ("--corruption fogg", r"--corruption fogg: .*'fog'"),
    ("--corruption fog fog", r"--corruption names fog twice"),
    ("--keep_head", r"--keep_head .*--pretrained"),
    ("--resample_corruption", r"--resample_corruption .*--corruption"),
    ("--severity 0", r"--severity 0: must be 1 to 5"),
    ("--severity 6", r"--severity 6: must be"),
    ("--lr fast", r"--lr fast: must be a number"),
    ("--lr -1", r"--lr -1: must be at least 0"),
    ("--lr nan", r"--lr nan"),
    ("--lr inf", r"--lr inf"),
    ("--momentum -0.5", r"--momentum -0.5"),
    ("--weight_decay nan", r"--weight_decay nan"),
    ("--batch_size 0", r"--batch_size 0: must be at least 1"),
    ("--batch_size 1", r"--batch_size 1: .*at least 2"),
    ("--epochs 0", r"--epochs 0: must be at least 1"),
    ("--epochs 2.5", r"--epochs 2\.5: must be a whole number"),
    ("--decreasing_lr 20;40", r"--decreasing_lr 20;40: .*e\.g\. 20,40"),
    ("--decreasing_lr -3", r"--decreasing_lr -3: .*e\.g\. 20,40"),
    ("--print_freq 0", r"--print_freq 0"),
    ("--workers 0", r"--workers 0"),
    ("--seed -1", r"--seed -1: must be 0 to"),
    ("--seed 99999999999999999999", r"--seed 9+: must be"),
    ("--device cuda", r"--device cuda: .*try auto or cpu"),
    ("--device quantum", r"--device quantum: .*try auto or cpu"),
    ("--frost_dir {w}/nowhere --corruption frost", r"--frost_dir .*nowhere: no such folder"),
    ("--frost_dir {w}/data --corruption frost", r"--frost_dir .*frost1\.png is missing"),
    ("--image_size 0", r"--image_size 0"),
    ("--image_size 1000000", r"--image_size 1000000"),
    ("--train_images 0", r"--train_images 0: must be at least 1"),
    ("--save_dir {w}/file/below", r"cannot write to .*file/below: Not a directory"),
    ("--save_dir {w}/file", r"cannot write to .*file: Not a directory"),
    # data
    ("without --data", r"--dataset folder needs its folder: give --data"),
    ("--data {w}/nowhere", r"--data .*nowhere: no train/<class>/"),
    ("--data {w}/file", r"--data .*file: a file; name the folder"),
    (f"--data {'x' * 300}", r"xxx/train: File name too long"),
    ("--data {w}/empty", r"--data .*empty: no train/<class>/"),
    ("--std_data {w}/nowhere --corruption fog", r"--std_data .*nowhere: no train/"),
    ("--std_data {w}/data --data {w}/nowhere", r"--std_data .* it asks for a --corruption"),
    ("--data {w}/zero-byte-image", r"zero-byte-image/train/a/0\.png: .*empty file"),
    ("--data {w}/truncated-image", r"truncated-image/train/a/0\.png: not a readable image"),
    ("--data {w}/no-image", r"no-image/train/a/0\.png: not a readable image"),
    ("--data {w}/two-sizes", r"two-sizes/train/a/1\.png is 48×48, .*give --image_size"),
    ("--data {w}/oblong", r"oblong/train/a/0\.png is 32×16, not square: give --image_size"),
    ("--data {w}/empty-class", r"empty-class/train/c holds no images"),
    ("--data {w}/other-classes", r"other-classes/test/bb is not one of .* mean 'b'"),
    ("--data {w}/no-test", r"--data .*no-test: no test/<class>/"),
    ("--dataset cifar10", r"data/train holds 2 class folders, cifar10 has 10: .*--dataset folder"),
    ("--dataset cifar100", r"2 class folders, cifar100 has 100"),
    ("--dataset cifar10 --data {w}/cifar-c", r"cifar-c: .*\.npy files are a corrupted copy"),
    ("--dataset tinyimagenet", r"data has no val/ folder"),
    ("--dataset tinyimagenet --data {w}/empty", r"empty: no Tiny-ImageNet there"),
    (
        "--arch vgg11 --image_size 12",
        r"vgg11: images of 12 pixels are too small, use --image_size 16",
    ),
    # published corrupted sets
    *(
        (f"--std_data {{w}}/data --corruption fog --data {{w}}/{name}", said)
        for name, said in (
            (
                "labels-out-of-range",
                r"test/labels\.npy: labels from 0 to 7, folder has classes 0 to 1",
            ),
            ("labels-missing", r"test/fog\.npy has no labels\.npy beside it"),
            ("labels-float", r"test/labels\.npy holds float64"),
            ("array-truncated", r"test/fog\.npy is not a readable \.npy array"),
            ("array-zero-byte", r"test/fog\.npy is not a readable \.npy array"),
            (
                "array-size",
                r"test/fog\.npy holds uint8 \(8, 9, 9, 3\).* must be uint8 \(8, 32, 32, 3\)",
            ),
            ("array-count", r"test/fog\.npy holds uint8 \(7, 32, 32, 3\)"),
            ("array-float", r"test/fog\.npy holds float32"),
            ("nowhere", r"nowhere: no such folder of .* without it they are generated"),
            ("file", r"file: no such folder of .* without it they are generated"),
            ("array-severity", r"test/fog\.npy holds severity \[3\], --severity is 5"),
            ("folders-few", r"fog/5 .*lacks 4 of 8 images"),
        )
    ),
    # checkpoints
    ("--pretrained {w}/nowhere.pth", r"nowhere\.pth: no such checkpoint file"),
    ("--pretrained {w}", r": a folder, not a checkpoint file"),
    ("--pretrained {w}/empty.pth", r"empty\.pth: damaged, or not a checkpoint file"),
    ("--pretrained {w}/truncated.pth", r"truncated\.pth: damaged, or not a checkpoint file"),
    ("--pretrained {w}/text.pth", r"text\.pth: not a checkpoint file but a pointer of Git LFS"),
    ("--pretrained {w}/list.pth", r"list\.pth: a checkpoint holds a dict, this is a list"),
    ("--pretrained {w}/no-weights.pth", r"no-weights\.pth: no tensors in it"),
    ("--pretrained {w}/nan.pth", r"nan\.pth: NaN or Inf in conv1\.weight"),
    ("--pretrained {w}/inf.pth", r"inf\.pth: NaN or Inf in conv1\.weight"),
    ("--pretrained {w}/shapes.pth", r"shapes\.pth: .* is \(1,\), resnet18 here has"),
    ("--pretrained {w}/std.pth --arch resnet34", r"std\.pth does not hold a resnet34: missing"),
    ("--pretrained {w}/a.pth --pretrained_path {w}/b.pth", r"--pretrained .* name two files"),
    ("--resume {w}/nowhere.tar", r"nowhere\.tar: no such checkpoint file"),
    ("--resume {w}/empty.pth", r"empty\.pth: damaged"),
    ("--resume {w}/std.pth", r"--resume .*std\.pth: not written by this script"),
]
PATCH = [
    ("without --base_model", r"--base_model is needed"),
    ("without --corruption", r"--corruption is needed"),
    ("without --pretrained", r"--pretrained is needed"),
    ("without --corruption_model_root", r"--corruption_model_root is needed"),
    ("--corruption snoww", r"--corruption snoww: .*'snow'"),
    ("--keep_num 0", r"--keep_num 0: must be at least 1"),
    ("--arch vgg11 --image_size 12", r"vgg11: images of 12 pixels are too small, use"),
    ("--keep_num 99", r"--keep_num 99: resnet18 has"),
    ("--alpha=-inf", r"--alpha -inf: must be finite"),
    ("--alpha -inf", r"--alpha -inf: must be finite"),
    ("--alpha -1e-1 --choose 1", r"--choose needs a bank"),
    ("--alpha nan", r"--alpha .*finite"),
    ("--finetune_alpha 1 2", r"--finetune_alpha has 2 values for 1 signatures"),
    ("--corruption fog snow --finetune_alpha 1", r"--finetune_alpha has 1 values for 2"),
    ("--quantization 1", r"--quantization 1: .*2 to 65536"),
    ("--quantization 100000", r"--quantization 100000: .*2 to 65536"),
    ("--quantization 5 --quantization_type log", r"--quantization 5: log .*even"),
    ("--quantization 4 --quantization_type cubic", r"--quantization_type: .*cubic"),
    ("--bn_float", r"--bn_float goes with --quantization"),
    ("--quantization_type log", r"error: --quantization_type goes with --quantization"),
    ("--severity 9", r"--severity 9: must be"),
    ("--device cuda", r"--device cuda: .*try auto or cpu"),
    ("--unlabeled", r"--unlabeled goes with --learn_alpha"),
    ("--learn_alpha layer --quantization 16 --save_signature o", r"--save_signature would hold"),
    ("--reestimate", r"--reestimate goes with --signature"),
    ("--learn_alpha all", r"--learn_alpha: .*all"),
    ("--learn_alpha layer --alpha 2", r"--alpha sets what --learn_alpha learns"),
    ("--learn_alpha layer --finetune_alpha 2", r"--finetune_alpha sets what --learn_alpha learns"),
    ("--choose 1", r"--choose needs a bank: name its files with --signature"),
    ("--keep_num 1 2 --save_signature out", r"--save_signature takes one patch"),
    ("--corruption fog snow", r"--corruption_model_root .*: no folder for snow \(there: fog"),
    ("--corruption_model_root {w}/nowhere", r"--corruption_model_root .*nowhere: no such folder"),
    ("--corruption_model_root {w}/ambiguous", r"several folders fit fog \(there: fog-2, my_fog\)"),
    ("--corruption_model_root {w}/hollow", r"hollow/fog/model_RA_best.* train_corruption\.py"),
    ("--corruption_model_root {w}/shapes", r"conv1\.weight differs in shape: .*robust \(1,\)"),
    ("--base_model {w}/nowhere.pth", r"nowhere\.pth: no such checkpoint file"),
    ("--base_model {w}/empty.pth", r"empty\.pth: damaged"),
    ("--base_model {w}/truncated.pth", r"truncated\.pth: damaged"),
    ("--base_model {w}/nan.pth", r"nan\.pth: NaN or Inf"),
    ("--base_model {w}/shapes.pth", r"conv1\.weight|shapes\.pth"),
    ("--arch vgg11", r"std\.pth does not hold a vgg11: it has no features\.0\.weight"),
    ("--patched_model {w}/nowhere.pth", r"nowhere\.pth: no such checkpoint file"),
    ("--data {w}/three-classes", r"std\.pth: fc\.weight is \(2, 512\).* for another data set"),
    ("--data {w}/nowhere", r"--data .*nowhere"),
    ("--corruption_data {w}/labels-out-of-range", r"labels\.npy: labels from 0 to 7"),
    ("--corruption_data {w}/nowhere", r"nowhere: no such folder of corrupted images"),
    ("--corruption_data {w}/file", r"file: no such folder of corrupted images"),
    ("--save_log .", r"--save_log \.: that is a folder"),
    ("--save_log {w}/std.pth", r"--save_log .*std\.pth: .* is read or written as well"),
    ("--save_log {w}/shapes.pth", r"--save_log .*shapes\.pth: holds something else than a log"),
    ("--save_log {w}/empty.pth", r"empty\.pth: damaged, or not a log file"),
    ("--save_log {w}/file/log", r"cannot write to .*file"),
    ("--save_model {w}/std.pth", r"--save_model .*std\.pth: .* is read or written as well"),
    ("--save_model {w}", r"--save_model .*: that is a folder"),
    ("--save_signature {w}/file", r"cannot write to .*file: Not a directory"),
    *(
        (f"without --corruption --pretrained --corruption_model_root --keep_num | {more}", said)
        for more, said in (
            ("--signature {w}/nowhere.rws", r"nowhere\.rws: no such signature file"),
            ("--signature {w}/empty.pth", r"empty\.pth: damaged, or not a signature file"),
            ("--signature {w}/truncated.rws", r"truncated\.rws: damaged, or not a signature file"),
            ("--signature {w}/std.pth", r"std\.pth: not a signature file"),
            ("--signature {w}/vgg11.rws", r"vgg11\.rws: a signature of vgg11, but --arch is res"),
            (
                "--signature {w}/unnamed.rws",
                r"--signature .*unnamed\.rws: against which corruption",
            ),
            ("--signature {w}/shapes.rws", r"conv1\.weight is \(2,\), the model's is \(64, 3"),
            ("--signature {w}/fog.rws --keep_num 1", r"--keep_num is for extracting"),
            ("--signature {w}/fog.rws --choose 0", r"--choose 0: must be 1 to 256"),
            ("--signature {w}/fog.rws --choose 1", r"fog\.rws: has no fingerprint; make it again"),
            ("--signature {w}/fog.rws --choose 1 --alpha 2", r"--alpha is for one patch"),
            ("--signature {w}/fog.rws --choose 1 --save_model m", r"--save_model is for one patch"),
            ("--signature {w}/fog.rws --choose 1 --learn_alpha layer", r"--learn_alpha is for one"),
            (
                "--signature {w}/fog.rws --learn_alpha layer --save_signature {w}",
                r"--save_signature: .*fog\.rws is in there; name another folder",
            ),
            ("--signature {w}/fog.rws --save_signature out", r"--save_signature is for extracting"),
            ("--signature {w}/fog.rws --finetune_alpha 1 2", r"--finetune_alpha has 2 values"),
        )
    ),
]
MAKE = [
    ("without --out", r"--out is missing"),
    ("without --data", r"give --data"),
    ("--data {w}/nowhere", r"--data .*nowhere"),
    ("--corruption fogg", r"--corruption fogg: .*'fog'"),
    ("--severity 0", r"--severity 0: must be"),
    ("--severity 1 2", r"--layout rws holds one severity"),
    ("--layout cifar", r"--layout: .*'cifar'"),
    ("--layout cifar-c --split train", r"--layout cifar-c has the test set only"),
    ("--layout cifar-c --severity 3", r"--layout cifar-c keeps severities 1 to 5"),
    ("--split everything", r"--split: .*'everything'"),
    ("--seed -1", r"--seed -1"),
    ("--out {w}/file", r"cannot write to .*file: Not a directory"),
    ("--out {w}/file/below", r"cannot write to .*below"),
    ("--out {w}/labels-float", r"labels\.npy is there already .*--overwrite"),
    ("--corruption fog --out {w}/published", r"fog\.npy is there already, not made .*--overwrite"),
    ("--preview sheet.txt", r"--preview sheet\.txt: name an image file"),
    ("--preview {w}/picture.png", r"--preview .*picture\.png: there already; --overwrite"),
    ("--preview {w}/file/sheet.png", r"cannot write .*sheet\.png"),
    ("--corruption frost --frost_dir {w}/nowhere", r"--frost_dir .*nowhere: no such folder"),
    ("--image_size 4", r"images are 4×4; corruptions need 8×8 pixels or more"),
    ("--device cuda", r"--device cuda: .*try auto or cpu"),
]
REPRODUCE = [
    ("--corruptions fogg", r"--corruptions? fogg: .*'fog'"),
    ("--keep_nums 99", r"99: resnet18 has"),
    ("--seeds 0 0", r"--seeds names 0 twice"),
    ("--seeds -1", r"--seeds? -1"),
    ("--bits 40", r"--bits 40: must be 1 to 16"),
    ("--alphas -1", r"--alphas -1: must be at least 0"),
    ("--groups fog", r"--groups fog: two or more"),
    ("--epochs 0", r"--epochs 0"),
    ("--severity 7", r"--severity 7: must be"),
    ("--preset huge", r"--preset: .*'huge'"),
    ("--repeat_corruptions snow", r"--repeat_corruptions snow: is not among --corruptions"),
    ("--pretrained {w}/nowhere.pth", r"nowhere\.pth: no such checkpoint file"),
    ("--pretrained {w}/empty.pth", r"empty\.pth: damaged"),
    ("--data {w}/nowhere", r"--data .*nowhere"),
    ("--out {w}/file", r"cannot write to .*file: Not a directory"),
    ("--runs {w}/file", r"cannot write to .*file"),
    ("--device cuda", r"--device cuda: .*try auto or cpu"),
    ("--devices cpu cuda:7", r"--device cuda:7: .*try auto or cpu"),
]
BENCHMARK = [
    ("--corruption fogg", r"--corruption fogg: .*'fog'"),
    ("--severity 0", r"--severity 0: must be"),
    ("--threads 0", r"--threads 0: must be at least 1"),
    ("--images 0", r"--images 0: must be at least"),
    ("--size 33", r"--size: .*33"),
    ("--device cuda", r"--device cuda: .*try auto or cpu"),
    ("--out {w}/file", r"cannot write .*file"),
]
TABLE = {
    train_corruption: TRAIN,
    model_patching: PATCH,
    make_corruptions: MAKE,
    reproduce: REPRODUCE,
    benchmark: BENCHMARK,
}
OTHERS = [
    (train_corruption, "", r"--save_dir"),
    (model_patching, "", r"--base_model is needed"),
    (make_corruptions, "", r"--out is missing"),
    (reproduce, "", r"EXPERIMENT"),
    (reproduce, "keep-nums", r"EXPERIMENT: .*'keep_nums'.*keep_num"),
    (reproduce, "consistency --dataset folder --data x", r"name --target_dataset"),
    (benchmark, "", r"COMMAND"),
    (benchmark, "signature --keep_num 99", r"--keep_num 99: vgg16 has 13 layers"),
    (benchmark, "train --dataset folder", r"--dataset folder needs its folder: give --data"),
]
CASES = [(script, GOOD[script], wrong, said) for script in TABLE for wrong, said in TABLE[script]]
CASES += [(script, "", wrong, said) for script, wrong, said in OTHERS]


# ---- the files they name --------------------------------------------------------------------


def images(root, classes="ab", size=(32, 32), parts=("train", "test")):
    write_folders(root, dict.fromkeys(parts, 4), size=size, classes=classes)
    return root


def published(root, test=None, labels="right", truncate=None):
    """A copy of `images` under fog, right but for its test part."""
    array, right = np.zeros((8, 32, 32, 3), np.uint8), np.repeat([0, 1], 4)
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        np.save(root / part / "fog.npy", array if test is None or part == "train" else test)
        given = right if isinstance(labels, str) or part == "train" else labels
        if given is not None:
            np.save(root / part / "labels.npy", given)
    if truncate is not None:
        place = root / "test" / "fog.npy"
        place.write_bytes(place.read_bytes()[:truncate])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good and bad data sets, published copies, checkpoints and signatures."""
    w = tmp_path_factory.mktemp("world")
    (w / "empty").mkdir()
    for name in ("file", "empty.pth"):
        (w / name).touch()
    Image.new("RGB", (8, 8)).save(w / "picture.png")
    for name in ("data", "zero-byte-image", "truncated-image", "no-image", "two-sizes"):
        images(w / name)
    first = {name: w / name / "train" / "a" / "0.png" for name in os.listdir(w)}
    first["zero-byte-image"].write_bytes(b"")
    first["truncated-image"].write_bytes(first["data"].read_bytes()[:500])
    first["no-image"].write_text("not a picture")
    Image.new("RGB", (48, 48)).save(w / "two-sizes" / "train" / "a" / "1.png")
    images(w / "oblong", size=(32, 16))
    (images(w / "empty-class") / "train" / "c").mkdir()
    (images(w / "other-classes") / "test" / "b").rename(w / "other-classes" / "test" / "bb")
    images(w / "no-test", parts=("train",))
    images(w / "three-classes", classes="abc")

    uint8 = functools.partial(np.zeros, dtype=np.uint8)
    published(w / "published")
    (w / "cifar-c").mkdir()
    np.save(w / "cifar-c" / "fog.npy", uint8((40, 32, 32, 3)))
    published(w / "labels-out-of-range", labels=np.arange(8))
    published(w / "labels-missing", labels=None)
    published(w / "labels-float", labels=np.zeros(8))
    published(w / "array-truncated", truncate=5000)
    published(w / "array-zero-byte", truncate=0)
    published(w / "array-size", test=uint8((8, 9, 9, 3)))
    published(w / "array-count", test=uint8((7, 32, 32, 3)))
    published(w / "array-float", test=np.zeros((8, 32, 32, 3), np.float32))
    published(w / "array-severity")
    made = {"test/fog.npy": {"severity": [3]}}
    (w / "array-severity" / ".made.json").write_text(json.dumps(made))
    for part, count in (("train", 4), ("val", 2)):
        for name in "ab":
            folder = w / "folders-few" / part / "fog" / "5" / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32)).save(folder / f"{i}.png")

    torch.manual_seed(0)
    state = {key: value.half() for key, value in build_model("resnet18", 2).state_dict().items()}
    small = {key: torch.zeros(1) for key in state}
    contents = {
        "std.pth": state,
        "nan.pth": small | {"conv1.weight": torch.tensor(float("nan"))},
        "inf.pth": small | {"conv1.weight": torch.tensor(float("inf"))},
        "shapes.pth": small,
        "list.pth": [1, 2],
        "no-weights.pth": {"epoch": 3},
    }
    for name, content in contents.items():
        torch.save(content, w / name)
    (w / "truncated.pth").write_bytes((w / "std.pth").read_bytes()[:100_000])
    (w / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    robust = {"robust/fog": "std.pth", "ambiguous/my_fog": "std.pth", "ambiguous/fog-2": "std.pth"}
    for place, source in (robust | {"shapes/fog": "shapes.pth"}).items():
        (w / place).mkdir(parents=True)
        (w / place / ckpt.BEST_RA).symlink_to(w / source)
    (w / "hollow" / "fog").mkdir(parents=True)
    weight = state["conv1.weight"].float()
    for name, arch, tensor, corruptions in (
        ("fog", "resnet18", weight, ("fog",)),
        ("unnamed", "resnet18", weight, ()),
        ("shapes", "resnet18", torch.zeros(2), ("fog",)),
        ("vgg11", "vgg11", weight, ("fog",)),
    ):
        made = RobustWeightSignature({"conv1.weight": tensor}, arch, Method(1), corruptions)
        made.save(w / f"{name}.rws")
    (w / "truncated.rws").write_bytes((w / "fog.rws").read_bytes()[:-200])
    return w


def argv_of(good, wrong, world):
    """The good command with `wrong` behind it, or without some of its flags."""
    words, more = good.split(), wrong
    if wrong.startswith("without "):
        dropped, _, more = wrong.removeprefix("without ").partition("|")
        kept, inside = [], False
        for word in words:
            inside = word in dropped.split() or (inside and not word.startswith("--"))
            kept += [] if inside else [word]
        words = kept
    return [word.replace("{w}", str(world)) for word in (*words, *more.split())]


def tree(*roots):
    """Every path below, with size and time of change; decoded images that are kept don't count."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) if not path.is_dir() else None
        for root in roots
        for path in sorted(root.rglob("*"))
        if ".rws_cache" not in path.parts
    }


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def main_of(script):
    """The script as `python SCRIPT.py` runs it."""

    def main(argv):
        with script_errors():
            script.main(argv)

    return main


@pytest.mark.parametrize(("script", "good", "wrong", "said"), CASES)
def test_a_wrong_input_is_one_line(script, good, wrong, said, world, tmp_path, capsys):
    if "cuda" in wrong and torch.cuda.device_count() > (7 if "cuda:7" in wrong else 0):
        pytest.skip("there is such a CUDA device")
    before = tree(world, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main_of(script)(argv_of(good, wrong, world))
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), shown.err
    assert re.search(said, lines[0]), lines[0]
    assert "Traceback" not in shown.out + shown.err
    assert tree(world, tmp_path) == before


def test_the_table_is_long_and_starts_from_commands_that_work(world, capsys):
    assert len(CASES) >= 60 and {script for script, *_ in CASES} == set(GOOD)
    for script in (train_corruption, model_patching, make_corruptions, benchmark):
        main_of(script)(argv_of(GOOD[script], "", world))
    assert (Path("out") / ckpt.BEST_SA).exists()


@pytest.mark.parametrize("wrong", ["--save_dir locked", "--data locked", "--pretrained secret"])
def test_what_may_not_be_read_or_written_is_one_line(wrong, world, tmp_path, capsys):
    Path("locked").mkdir(mode=0o000)
    Path("secret").touch(mode=0o000)
    if os.access("secret", os.R_OK):
        pytest.skip("this user may read and write everything")
    try:
        with pytest.raises(SystemExit) as stopped:
            train_corruption.main(argv_of(GOOD[train_corruption], wrong, world))
    finally:
        Path("locked").chmod(0o700)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"error: .*(locked|secret).*\n", shown)


# ---- what is no error, but has to be said ----------------------------------------------------


def said_by(script, wrong, world, capsys):
    main_of(script)(argv_of(GOOD[script], wrong, world))
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_validation_images_among_the_test_images_are_told(world, tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / "both" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "both" / part).symlink_to(world / "data" / "train")
    (line,) = said_by(train_corruption, f"--data {tmp_path / 'both'}", world, capsys)
    assert "validation and test overlap: 2 of 2 different validation images" in line
    assert not said_by(train_corruption, "--overwrite", world, capsys)


def test_labels_that_differ_from_the_clean_ones_are_told(world, tmp_path, capsys):
    published(tmp_path / "swapped", labels=np.repeat([1, 0], 4))
    made = {f"{part}/fog.npy": {"severity": [5]} for part in ("train", "test")}
    (tmp_path / "swapped" / ".made.json").write_text(json.dumps(made))
    wrong = f"--std_data {{w}}/data --data {tmp_path / 'swapped'} --corruption fog"
    (line,) = said_by(train_corruption, wrong, world, capsys)
    assert "test/fog.npy: 8 of 8 labels differ from the clean set's" in line


def test_a_signature_of_identical_models_and_accuracy_below_chance_are_told(
    world, capsys, monkeypatch
):
    accuracies = iter([60.0, 60.0, 60.0, 60.0, 49.0, 50.0])  # standard, robust, patched
    monkeypatch.setattr(model_patching, "evaluate", lambda *_, **__: next(accuracies))
    zero, chance = said_by(model_patching, "", world, capsys)
    assert "the signature is zero: its source models are identical" in zero
    assert "patched, keep_num 1: an accuracy of 49.0 % is below chance, 50.0 %" in chance
    accuracies = iter([60.0] * 4 + [50.0] * 2)
    assert len(said_by(model_patching, "", world, capsys)) == 1


def test_messages_of_several_lines_become_one(capsys):
    with pytest.raises(SystemExit), script_errors():
        warnings.warn("one\ntwo", stacklevel=1)
        raise InputError("three\nfour")
    assert capsys.readouterr().err == "warning: one two\nerror: three four\n"


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 5 TiB"), torch.OutOfMemoryError("CUDA out of memory.\nMore")],
)
def test_too_little_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit), script_errors():
        raise error
    said = capsys.readouterr().err
    assert said.startswith(f"error: out of memory: {str(error)[:18]}") and said.count("\n") == 1
    with pytest.raises(SystemExit), script_errors():
        torch.empty(1 << 50)
    assert "error: out of memory: " in capsys.readouterr().err
    with pytest.raises(RuntimeError), script_errors():
        raise RuntimeError("a bug")


def test_paths_that_are_no_text_are_refused():
    with pytest.raises(InputError, match=r"'/data/caf\\udce9' is not UTF-8"):
        train_corruption.parse_args(["--save_dir", "out", "--data", "/data/caf\udce9"])
    assert train_corruption.parse_args(["--save_dir", "é"]).save_dir == "é"


def test_a_warning_is_printed_once(capsys):
    with script_errors():
        for said in ("first", "second", "first"):
            with warnings.catch_warnings():  # as libraries do, which makes Python forget
                pass
            warnings.warn(said, stacklevel=1)
    assert capsys.readouterr().err == "warning: first\nwarning: second\n"
