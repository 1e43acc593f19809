"""What other trainers keep beside their weights, and how they wrap them: read as data, or named."""

import argparse
import collections
import gzip
import json
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from utils import checkpoint as ckpt
from utils.errors import InputError

STATE = {"features.0.weight": torch.arange(6.0).view(2, 3), "features.0.bias": torch.ones(2)}
AVERAGED = {key: value + 1 for key, value in STATE.items()}
LONG = "a" * 200


def prefixed(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


def written(tmp_path, content):
    path = tmp_path / "m.pth"
    torch.save(content, path)
    return path


# ---- values beside the weights ----------------------------------------------------------------

VALUES = [
    *(np.dtype(kind).type(3) for kind in ("f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "u8")),
    *(np.bool_(True), np.complex64(2j), np.str_("fog"), np.dtype(">f8").type(1.5)),
    np.arange(6, dtype="f2").reshape(2, 3),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([True, False]),
    np.array(["fog", "snow"]),
    np.array(1.5),
    np.zeros((0, 3)),
]


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_numpy_values_of_both_generations(tmp_path, value, core, archive):
    path = tmp_path / "m.pth"
    torch.save({"state_dict": STATE, "best": value}, path, _use_new_zipfile_serialization=archive)
    if archive:
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                data = data.replace(b"numpy._core.multiarray", core) if "pkl" in name else data
                file.writestr(name, data.replace(b"numpy.core.multiarray", core))
    else:
        data = path.read_bytes().replace(b"numpy._core.multiarray", core)
        path.write_bytes(data.replace(b"numpy.core.multiarray", core))
    found = ckpt.read(path)["best"]
    assert isinstance(found, type(value))
    assert np.array_equal(found, value) and found.shape == value.shape
    assert found.dtype == value.dtype.newbyteorder("=") or found.dtype == value.dtype


def test_random_states_and_settings(tmp_path):
    numbers = np.random.RandomState(3)
    settings = argparse.Namespace(lr=0.1, out=pathlib.Path("runs/a"))
    counts = collections.defaultdict(list, loss=[0.5])
    content = {"numpy": numbers.get_state(), "args": settings, "counts": counts}
    content |= {"path": pathlib.PureWindowsPath("a/b"), "torch": torch.get_rng_state()}
    content |= {"legacy": np.random.RandomState(3).get_state(legacy=False)}
    found = ckpt.read(written(tmp_path, {"state_dict": STATE, **content}))
    other = np.random.RandomState(0)
    other.set_state(found["numpy"])
    assert other.rand() == numbers.rand()
    assert np.array_equal(found["legacy"]["state"]["key"], content["legacy"]["state"]["key"])
    assert (found["args"].lr, str(found["args"].out)) == (0.1, str(pathlib.PurePath("runs/a")))
    assert found["counts"] == {"loss": [0.5]} and str(found["path"]) == "a\\b"


class Raw:
    """Pickles to what it is told: an attack through what the reader lets in."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "hostile",
    [
        np.array([open], dtype=object),
        np.zeros(2, dtype=[("a", "f4")]),
        Raw(np.dtype, ("O", False, True)),
        Raw(np.dtype, ("V8",)),
        Raw(np.ndarray, ((10**12,), "f8")),
        Raw(eval, ("1",)),
        Raw(pathlib.Path.touch, (pathlib.Path("x"),)),
        Raw(pathlib.Path, ("x",), None, iter([1])),
    ],
)
def test_nothing_else_is_let_in(tmp_path, hostile, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pth"
    path.write_bytes(pickle.dumps({"state_dict": {}, "best": hostile}, protocol=2))
    with pytest.raises(InputError, match=r"m\.pth: (was not opened|damaged)"):
        ckpt.read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


# ---- wrappers ---------------------------------------------------------------------------------

SGD = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
WRAPPED = {
    **{name: {name: STATE, "optimizer": SGD, "epoch": 3} for name in ckpt.RAW},
    **{name: {name: STATE} for name in ("state_dict_ema", "model_ema", "ema", "swa_state")},
    **{prefix: prefixed(prefix) for prefix in ("module.", "_orig_mod.", "model.", "encoder.")},
    "nested": {"model": {"state_dict": prefixed("module.model._orig_mod.backbone.")}},
    "features.module.": {k.replace("features.", "features.module."): v for k, v in STATE.items()},
    "averaged": {"n_averaged": torch.tensor(4), **prefixed("module.")},
    "settings": {"net": STATE, "args": argparse.Namespace(arch="vgg11"), "acc": np.float32(93.1)},
}


@pytest.mark.parametrize("content", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_weights(tmp_path, content):
    found = ckpt.read_state_dict(written(tmp_path, content))
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], value) for key, value in STATE.items())


def test_averaged_beside_raw_weights(tmp_path):
    path = written(tmp_path, {"model": prefixed("module."), "model_ema": {"module": AVERAGED}})
    with pytest.warns(UserWarning, match=r"m\.pth: took .* model; --checkpoint_key .* model_ema"):
        found = ckpt.read_state_dict(path)
    assert torch.equal(found["features.0.bias"], STATE["features.0.bias"])
    for key in ("model_ema", "model_ema.module"):
        found = ckpt.read_state_dict(path, key)
        assert torch.equal(found["features.0.bias"], AVERAGED["features.0.bias"])
    with pytest.raises(InputError, match=r"--checkpoint_key ema; it holds model, model_ema"):
        ckpt.read_state_dict(path, "ema")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"teacher": STATE, "epoch": 3}, r"no tensors in it.*--checkpoint_key .*: teacher$"),
        (STATE | prefixed("module."), "two models in one, with and without"),
        ({"net": {}, "epoch": 3}, r"no tensors in it.*\(it holds net, epoch\)"),
        ({"n_averaged": torch.tensor(3)}, r"no tensors in it but a wrapper's counter"),
        ([STATE], r"holds a dict, this is a list; is it the model's state_dict"),
    ],
)
def test_no_weights_say_what_there_is(tmp_path, content, said):
    with pytest.raises(InputError, match=said):
        ckpt.read_state_dict(written(tmp_path, content))


# ---- other files ------------------------------------------------------------------------------


def safetensors():
    form = {LONG: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    head = json.dumps(form).encode()
    return struct.pack("<Q", len(head)) + head + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (safetensors(), r"safetensors; convert it: .*load_file.*m\.pth'\)$"),
        (gzip.compress(b"x" * 99, mtime=0), "packed with gzip: unpack it first$"),
        (b"\n<!DOCTYPE html><title>Quota exceeded", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (pickle.dumps({"w": 1.0}, protocol=4), "a pickle, .*torch.save what is in it$"),
        (b"Not Found", "damaged, or not a checkpoint file"),
        (b"", "damaged, or not a checkpoint file"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, data, said):
    path = tmp_path / "m.bin"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said):
        ckpt.read(path)


def test_an_unzipped_checkpoint(tmp_path):
    path = written(tmp_path, STATE)
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    for named in (folder, tmp_path):
        with pytest.raises(InputError, match=rf"unzipping.*: zip -0 -r {folder.name}\.pth"):
            ckpt.read(named)


def test_code_is_refused_with_the_two_lines_that_save_the_weights(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    state = model.state_dict()
    for content in (model, {"model": model, "epoch": 3}, {"net": state, "loss": nn.L1Loss()}):
        path = written(tmp_path, content)
        with pytest.raises(InputError, match="holds code") as refused:
            ckpt.read(path)
        said = str(refused.value)
        assert "\n" not in said and "torch.nn.modules" in said
        exec(said.partition("save the weights anew: ")[2])  # what a person would type
        found = ckpt.read_state_dict(f"{path}.weights.pth")
        assert torch.equal(found["0.weight"], model[0].weight)
