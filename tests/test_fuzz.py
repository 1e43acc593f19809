"""What nobody thought of: random files, folders, flags, images and patches (Hypothesis)."""

import copy
import io
import os
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import benchmark
import datasets
import make_corruptions
import model_patching
import reproduce
import train_corruption
from datasets import cifar
from datasets import flags as data_flags
from datasets.corrupted import load_published
from datasets.corruptions import CORRUPTIONS, corrupt
from datasets.images import ImageSet
from experiments import settings as study_settings
from utils import arguments, signature_file
from utils import checkpoint as ckpt
from utils import patch as patching
from utils.errors import InputError
from utils.signature import Method, RobustWeightSignature, patch

pytestmark = pytest.mark.filterwarnings("ignore")


def fuzz(examples):
    """The same examples every time, and nothing kept between runs."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def or_refused(said, function, *arguments):
    """What the function gives, or None where it raises an InputError that has `said` in it."""
    try:
        return function(*arguments)
    except InputError as error:
        assert str(error) and str(said) in str(error)
        return None


# ---- files that torch wrote -----------------------------------------------------------------


@st.composite
def damage(draw):
    """A function that damages bytes: flips, cuts, insertions, or other bytes altogether."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "other"]))
    places = draw(st.lists(st.floats(0, 0.9999), min_size=1, max_size=4))
    junk = draw(st.binary(min_size=1, max_size=40))

    def apply(data):
        data = bytearray(data)
        if kind == "other":
            return junk
        if kind == "cut":
            return bytes(data[: int(places[0] * len(data))])
        for place in places:
            at = int(place * len(data))
            if kind == "flip":
                data[at] ^= 1 << (junk[0] % 8)
            elif kind == "insert":
                data[at:at] = junk
            else:
                data[at : at + len(junk)] = junk
        return bytes(data)

    return apply


def stored(levels):
    """Bytes of a signature and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "features.0.bias": torch.randn(64, generator=generator),
        "features.0.weight": torch.randn(64, 3, 3, 3, generator=generator),
    }
    signature = RobustWeightSignature(tensors, "vgg11", Method(1), ("fog",), severity=5)
    if levels:
        signature = signature.quantize(levels, per_channel=True)
    with tempfile.TemporaryDirectory() as folder:
        signature.save(Path(folder) / "s.rws")
        return (Path(folder) / "s.rws").read_bytes(), signature.tensors


FILES = {levels: stored(levels) for levels in (None, 5)}


@fuzz(150)
@given(damage(), st.sampled_from(list(FILES)))
def test_a_damaged_signature_is_refused_or_whole(apply, levels):
    data, tensors = FILES[levels]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.rws"
        path.write_bytes(apply(data))
        try:
            loaded = RobustWeightSignature.load(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in tensors.items())


@fuzz(100)
@given(damage())
def test_a_damaged_checkpoint_is_refused_or_whole(apply):
    state = {"a.weight": torch.arange(500.0), "a.bias": torch.zeros(3)}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, buffer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.pth"
        path.write_bytes(apply(buffer.getvalue()))
        loaded = or_refused(path, ckpt.read_state_dict, path)
    if loaded is not None:
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["vgg11", "linear", "log", "float32", "fog", "", "\n"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["levels", "method", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@fuzz(150)
@given(st.data())
def test_a_signature_made_by_hand_is_refused_or_valid(data):
    """Its checksum is right, so whatever else stands in it gets as far as being unpacked."""
    content = torch.load(io.BytesIO(FILES[5][0]), weights_only=True)
    meta = content["meta"]
    if data.draw(st.booleans()):  # as files were before they held the method
        method = meta.pop("method")
        meta |= {"keep_num": method["keep_num"], "layers": method["layers"]}
        form = {name: method[name] for name in ("levels", "per_channel", "bn_float")}
        meta["quantization"] = {**form, "method": method["scheme"]}
    places = [meta, *meta["tensors"], meta.get("method") or meta["quantization"]]
    where = data.draw(st.sampled_from(places))
    where[data.draw(st.sampled_from(list(where)))] = data.draw(values)
    if data.draw(st.booleans()):
        del where[data.draw(st.sampled_from(list(where)))]
    payload = content["payload"]
    payload = payload[: data.draw(st.sampled_from([len(payload), len(payload), 100, 0]))].clone()
    content |= {"payload": payload, "checksum": signature_file._checksum(meta, payload)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.rws"
        torch.save(content, path)
        loaded = or_refused(path, RobustWeightSignature.load, path)
        if loaded is not None:
            assert all(torch.isfinite(t).all() for t in loaded.tensors.values())
            assert loaded.name and signature_file.describe(path)
            loaded.save(path)


# ---- folders of data ------------------------------------------------------------------------


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def as_png(side):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (side, 9, 200)).save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = [np.zeros((n, side, side, 3), np.uint8) for n, side in ((4, 8), (20, 8), (4, 9), (0, 8))]
LABELS = [np.array([0, 0, 1, 1]), np.tile([0, 0, 1, 1], 5), np.array([0, 1, 2, 5]), np.zeros(4)]
CONTENTS = [b"", b"junk", *map(as_npy, PIXELS), *map(as_npy, LABELS), as_png(8), as_png(9)]
CONTENTS += [as_npy(PIXELS[0])[:-50], as_npy(LABELS[0])[:90], as_png(8)[:40]]
CONTENTS += [b"0.png\tn01\n1.png\tn02\n", b"0.png\n"]
PARTS = ["train", "test", "val", "fog", "1", "5", "a", "b", "n01", "images", "CIFAR-10-C", "."]
NAMES = ["fog.npy", "labels.npy", "0.png", "1.JPEG", "x.jpg", "val_annotations.txt", "data_batch_1"]
trees = st.lists(
    st.tuples(
        st.lists(st.sampled_from(PARTS), max_size=4),
        st.sampled_from(NAMES),
        st.sampled_from(CONTENTS),
    ),
    max_size=8,
)


def plant(root, tree):
    for folders, name, content in tree:
        place = root.joinpath(*folders)
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


@fuzz(120)
@given(trees, st.sampled_from(["train", "test", "val", "all"]), st.sampled_from([1, 5]))
@example([(["test"], "fog.npy", CONTENTS[2]), (["test"], "labels.npy", CONTENTS[6])], "test", 5)
@example([([], "fog.npy", CONTENTS[3]), ([], "labels.npy", CONTENTS[7])], "test", 5)
@example([(["fog", "5", "a"], f"{i}.png", CONTENTS[10]) for i in range(4)], "test", 5)
def test_any_folder_is_a_published_set_or_none_or_refused(tree, split, severity):
    clean = ImageSet(
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ["a", "b"], "folder"
    )
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), tree)
        found = or_refused(folder, load_published, clean, folder, "fog", severity, split)
    if found is not None:
        assert found.images.shape == clean.images.shape
        assert 0 <= found.labels.min() <= found.labels.max() < 2


@fuzz(120)
@given(trees, st.sampled_from(["folder", "tinyimagenet", "cifar10"]), st.sampled_from([None, 8]))
def test_any_folder_is_a_data_set_or_refused(tree, name, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        patches.setattr(cifar.socket, "create_connection", Mock(side_effect=OSError("no network")))
        plant(Path(folder), tree)
        for split in ("train", "test"):
            found = or_refused(folder, datasets.load, name, folder, split, size)
            if found is not None:
                assert len(found) > 0
                assert set(found.labels.tolist()) <= set(range(len(found.classes)))


# ---- flags ----------------------------------------------------------------------------------


@fuzz(200)
@given(st.text(st.sampled_from("0123456789,- ae.+"), max_size=12) | st.text(max_size=8))
def test_any_decreasing_lr_is_epochs_or_refused(text):
    argv = ["--save_dir=x", f"--decreasing_lr={text}"]
    args = or_refused("--decreasing_lr", train_corruption.parse_args, argv)
    if args is not None:  # as the trainer reads them
        assert all(int(epoch) >= 0 for epoch in args.decreasing_lr.split(",") if epoch.strip())


@fuzz(200)
@given(st.sampled_from(CORRUPTIONS), st.integers(0, 30), st.sampled_from("abz_ "), st.booleans())
def test_a_misspelt_corruption_suggests_the_right_one(name, at, letter, drop):
    at %= len(name)
    typed = name[:at] + ("" if drop else letter) + name[at + drop :]
    if typed in CORRUPTIONS:
        return
    with pytest.raises(InputError) as refused:
        train_corruption.parse_args(["--save_dir", "x", "--corruption", typed])
    assert f"did you mean {name!r}" in str(refused.value)


numbers = st.floats(0) | st.sampled_from([-1, -0.5, "inf", "nan", "one"])


@fuzz(100)
@given(st.lists(numbers, min_size=1, max_size=3), st.integers(1, 3))
def test_any_finetune_alpha_is_taken_or_refused(alphas, count):
    argv = ["--base_model", "b", "--pretrained", "p", "--corruption_model_root", "r"]
    argv += ["--corruption", *CORRUPTIONS[:count], "--finetune_alpha", *map(str, alphas)]
    args = or_refused("alpha", model_patching.parse_args, argv)
    if args is not None:
        assert len(args.finetune_alpha) == count
        assert all(0 <= alpha < float("inf") for alpha in args.finetune_alpha)


FIRST = {
    train_corruption: [[]],
    model_patching: [[]],
    make_corruptions: [[]],
    reproduce: [["main"], ["demo"], ["quantization"], ["consistency"], []],
    benchmark: [["corruptions"], ["train"], ["signature"], ["accuracy"], []],
}
TABLES = (arguments, data_flags, make_corruptions, study_settings, benchmark)
FLAGS = sorted({f"--{flag}" for table in TABLES for flag in table.FLAGS})
FLAGS += ["--serverity", "--no-projection", "--no-amp", "--target_dataset", "--target_classes"]
WORDS = """
cifar10 cifar10-c synthetic folder tinyimagenet vgg16 resnet18 fog snow fogg all 0 1 2 5 7 16
-1 1e9 nan inf 0.5 1,2 20,40 a,b rws cifar-c folders linear log tanh train test even odd
shallowest deepest paper smoke fog+snow nowhere x.png cpu cuda:99 quantum auto
"""


@fuzz(400)
@given(
    st.sampled_from(list(FIRST)),
    st.integers(0, 4),
    st.lists(
        st.tuples(st.sampled_from(FLAGS), st.lists(st.sampled_from(WORDS.split()), max_size=2))
    ),
    st.lists(st.text(st.characters(exclude_characters="\0"), max_size=5), max_size=1),
)
def test_any_command_line_is_settings_or_refused(script, which, flags, odd):
    first = FIRST[script][which % len(FIRST[script])]
    argv = [*first, *(word for flag, words in flags for word in (flag, *words)), *odd]
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            or_refused("", script.parse_args, argv)
        except SystemExit as stopped:
            assert stopped.code == 0  # --help
        finally:
            os.chdir(before)
        assert not os.listdir(folder)


# ---- images ---------------------------------------------------------------------------------


@fuzz(120)
@given(
    st.sampled_from(CORRUPTIONS),
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(1, 90),
    st.integers(1, 90),
    st.booleans(),
    st.integers(0, 2**40),
)
@example("elastic_transform", 5, 300, 16, 16, True, 0)  # more than a block of draws
@example("gaussian_noise", 5, 257, 9, 9, True, 0)
def test_corrupt_takes_any_shape_or_refuses(name, severity, count, height, width, square, seed):
    width = height if square else width
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, height, width), generator=draws, dtype=torch.uint8)
    before = images.clone()

    def make(images):
        return corrupt(images, name, severity, torch.Generator().manual_seed(seed))

    try:
        made = make(images)
    except InputError as error:
        assert min(height, width) < 8 or (name == "elastic_transform" and height != width)
        assert str(height) in str(error)
        return
    assert made.shape == images.shape and made.dtype == torch.uint8
    assert torch.equal(images, before)  # what goes in stays as it was
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(made, make(strided))  # and neither memory layout nor a second call matters
    for wrong in (images.float(), images[:, :1], images[0] if count else images.flatten()):
        with pytest.raises(InputError):
            make(wrong)


# ---- patches --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)


def random_signature(seed, keys):
    generator = torch.Generator().manual_seed(seed)
    own = dict(Net().named_parameters())
    tensors = {key: torch.randn(own[key].shape, generator=generator) for key in keys}
    return RobustWeightSignature(tensors, "vgg11", Method(1), (f"number {seed}",))


KEYS = ["a.weight", "a.bias", "norm.weight", "b.weight"]
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("patch"),
            st.lists(st.sampled_from(KEYS), unique=True, min_size=1),
            st.sampled_from([0.0, 1.0, -0.3, 1e4, 0.1]),
        ),
        st.tuples(st.just("remove"), st.integers(0, 9)),
        st.tuples(st.just("run"), st.integers(0, 9)),  # changes the running statistics
    ),
    max_size=12,
)


def bits(tensors):
    return {key: tensor.detach().numpy().tobytes() for key, tensor in tensors.items()}


@fuzz(150)
@given(steps)
def test_patches_come_off_in_any_order_bit_for_bit(steps):
    model = Net()
    with torch.no_grad():
        model.a.bias[0] = -0.0
    originals = copy.deepcopy(dict(model.named_parameters()))
    before = bits(model.state_dict())
    handles, live = [], []
    for kind, *what in steps:
        if kind == "patch":
            keys, alpha = what
            signature = random_signature(len(handles), keys)
            handles.append((patch(model, signature, alpha), signature, alpha))
            live.append(handles[-1])
        elif kind == "run" and live:
            model.norm.running_mean += what[0] + 1
        elif kind == "remove" and handles:
            chosen = handles[what[0] % len(handles)]
            chosen[0].remove()  # a second time does nothing
            live = [entry for entry in live if entry is not chosen]
        expected = {key: tensor.detach().clone() for key, tensor in originals.items()}
        for _, signature, alpha in live:
            for key, delta in signature.tensors.items():
                if alpha:
                    expected[key].add_(delta, alpha=alpha)
        assert bits(dict(model.named_parameters())) == bits(expected)
    for handle, *_ in handles:
        handle.remove()
    assert bits(model.state_dict()) == before
    assert model not in patching._PATCHES
