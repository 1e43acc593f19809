"""CUDA's branches without a GPU: tensors that pretend to lie on one, a stand-in for its graphs.

A fake tensor has a device, a shape and no memory: operands on two devices and values read back to
the host are errors, and `Ops` counts the copies that the host would wait for.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import train_corruption
from datasets import corruptions
from datasets.corrupted import Copies, mixed_training_set
from datasets.corruptions import blur, digital, filters, frost_texture, noise, weather
from datasets.corruptions.draws import Draws
from datasets.images import ImageSet
from datasets.loader import BatchLoader, evaluation_batches
from models import build_model
from tests.test_engine import make_set, sgd, small_model
from utils import checkpoint as ckpt
from utils import learn, signature
from utils.batchnorm import reestimate
from utils.engine import TrainStep
from utils.signature import RobustWeightSignature, patch

CUDA = torch.device("cuda")
DRAWS = ("normal_", "uniform_", "random_", "rand")
# Whether a copy is wanted on the GPU, free memory there in bytes, where it goes.
COPIES = [(True, 10**9, "cuda"), (True, 5 * 10**7, "cpu"), (False, 10**9, "cpu")]


class Ops(TorchDispatchMode):
    """What is done: copies that the host waits for, bytes that cross between devices, draws."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.crossed, self.drawn, self.drawn_on = [], [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        if name in ("aten::_to_copy", "aten::copy_") and len({t.device for t in tensors}) > 1:
            if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.waits.append(func)
            self.crossed.append(tensors[-1].nbytes)
        if name.removeprefix("aten::").startswith(DRAWS):
            self.drawn.append(tensors[-1].numel())
            self.drawn_on.append(tensors[-1].device.type)
        return out


def pretending_works() -> bool:
    """Older torch, and one without CUDA, asks for a real GPU even where nothing is computed."""
    with FakeTensorMode(), contextlib.suppress(RuntimeError, AssertionError):
        return bool(len(torch.empty(2, device=CUDA)[:1]))
    return False


@pytest.fixture
def gpu(monkeypatch):
    """Tensors without memory on "cuda", and what else a program asks of a GPU."""
    if not pretending_works():
        pytest.skip("this torch asks for a real GPU")
    cpu, real = torch.device("cpu"), torch.Generator
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    memory = SimpleNamespace(free=10**9, reserved=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory.free, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: memory.reserved)
    monkeypatch.setattr(torch.Tensor, "record_stream", MagicMock())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    generator = type("Generator", (), {"__new__": lambda cls, _="cpu": real()})
    monkeypatch.setattr(torch, "Generator", generator)
    monkeypatch.setattr(corruptions, "_base_seed", lambda _: 0)

    def on_gpu(table, *args):  # a cached table, from real numbers
        device = inspect.signature(table).bind(*args).arguments["device"]
        with unset_fake_temporarily():
            made = table.__wrapped__(*(cpu if arg is device else arg for arg in args))
        return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device=device), made)

    for module in (blur, digital, filters, frost_texture, noise, weather):
        for name, table in list(vars(module).items()):
            if hasattr(table, "cache_clear") and "device" in inspect.signature(table).parameters:
                monkeypatch.setattr(module, name, functools.partial(on_gpu, table))
    with FakeTensorMode(allow_non_fake_inputs=True), Ops() as ops:
        ops.memory = memory
        yield ops


def devices(tensors):
    return {t.device.type for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}


# ---- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_corruptions_stay_on_the_gpu(name, gpu):
    for count, severity in ((300, 1), (300, 3), (300, 5), (0, 5)):
        images = torch.empty(count, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        out = corruptions.corrupt(images, name, severity)
        assert (out.device, out.shape) == (images.device, images.shape) and not gpu.waits


@pytest.mark.parametrize("fill", ["normal", "uniform", "integers"])
def test_draws_come_in_pieces_that_every_gpu_draws_alike(fill, gpu):
    def drawn(device):
        gpu.drawn.clear()
        limits = (0, 9) if fill == "integers" else ()
        getattr(Draws(300, device, seed=0), fill)(*limits, 3, 32, 32)
        return gpu.drawn

    assert max(drawn(CUDA)) == 2**14 and sum(gpu.drawn) == 300 * 3072
    assert drawn("cpu") == [256 * 3072, 44 * 3072]


@pytest.mark.parametrize("names", [["fog"], ["fog", "snow", "contrast"]])
@pytest.mark.parametrize("resident, free, place", COPIES)
def test_copies_are_made_a_chunk_at_a_time_where_they_are_wanted(resident, free, place, names, gpu):
    gpu.memory.free, images = free, torch.empty(12_000, 3, 32, 32, dtype=torch.uint8)
    clean = ImageSet(images, torch.arange(12_000) % 2, ["a", "b"], "synthetic")
    made = mixed_training_set(clean, names, Copies(device=CUDA, resident=resident))
    assert made.images.device.type == place
    assert max(gpu.crossed) <= 2**24  # never the whole set
    if place == "cuda":  # nor does anything of it cross once the clean one is there, too
        again = clean.to(CUDA)
        gpu.crossed.clear()
        mixed_training_set(again, names, Copies(device=CUDA, resident=True))
        assert sum(gpu.crossed) < 10**6  # some indices


def test_all_sets_together_take_half_of_the_memory(gpu):
    gpu.memory.free, placed = 1_000_000, 0
    for _ in range(20):
        batches = BatchLoader(make_set(20), 8, device=CUDA)
        if batches.resident:
            placed += batches.images.nbytes
            gpu.memory.free -= batches.images.nbytes
            gpu.memory.reserved += batches.images.nbytes
    assert 400_000 < placed <= 500_000


@pytest.mark.parametrize("augment", [None, "crop_flip", "rotate_flip"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_wait_for_nothing(augment, resident, ranks, gpu):
    how = {"shuffle": True, "resident": resident, "ranks": ranks}
    batches = BatchLoader(make_set(600), 16, augment, CUDA, **how)
    gpu.waits.clear()  # the set's own copy
    assert devices(list(batches)) == {"cuda"}
    assert not gpu.waits


def test_order_and_augmentation_are_those_of_the_cpu(gpu):
    """Drawn there, from the same numbers."""
    drawn = []
    for device in ("cpu", CUDA):
        batches = BatchLoader(make_set(), 8, "crop_flip", device, shuffle=True)
        gpu.drawn_on.clear()
        list(batches)
        drawn.append(set(gpu.drawn_on))
    assert drawn == [{"cpu"}, {"cpu"}]


def test_evaluation_from_host_memory_has_a_chunk_in_use_and_the_next_on_its_way(gpu):
    images = torch.empty(12_000, 3, 32, 32, dtype=torch.uint8)
    gpu.memory.free = 10**6
    batches = evaluation_batches(ImageSet(images, torch.arange(12_000) % 2, ["a", "b"], "x"), CUDA)
    gpu.crossed.clear()
    sent = [sum(size > 10**6 for size in gpu.crossed) for _ in batches]
    assert not batches.resident and sent == [2, 3, 3]


# ---- models -----------------------------------------------------------------------------------


def test_a_step_reads_no_value_back():
    """On the CPU, whose backward pass runs without a GPU; step and loader are those of CUDA."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = TrainStep(model := small_model(), sgd(model, 0.01), amp=True)
        for images, labels in BatchLoader(make_set(), 8, "crop_flip", shuffle=True):
            step(images, labels)


@pytest.fixture
def no_values(monkeypatch):
    """What looks at the values of a signature sees good ones."""
    monkeypatch.setattr(RobustWeightSignature, "__post_init__", lambda self: None)
    monkeypatch.setattr(torch.Tensor, "any", lambda _: True)
    monkeypatch.setattr(signature, "backbone_hash", lambda _: "0")


def test_a_signature_on_the_cpu_patches_a_model_on_the_gpu(gpu, no_values, monkeypatch):
    monkeypatch.setattr("copy.deepcopy", lambda model: model)  # fake tensors can't be copied so
    with CUDA:
        model = build_model("resnet18", 4)
    states = [{k: torch.empty_like(t, device="cpu") for k, t in model.state_dict().items()}] * 3
    rws = RobustWeightSignature.extract(*states, keep_num=2)
    gpu.waits.clear()
    with patch(model, rws, 0.5), patch(model, rws):
        assert devices(model.state_dict()) == {"cuda"} and devices(rws.tensors) == {"cpu"}
        for resident in (True, False):
            batches = BatchLoader(make_set(), 8, device=CUDA, resident=resident)
            gpu.waits.clear()
            reestimate(model, [batches], strength=0.5)
            with torch.inference_mode():
                assert devices([model(images) for images, _ in batches]) == {"cuda"}
            assert not gpu.waits
    assert devices(model.state_dict()) == {"cuda"}


def test_weights_are_learnt_from_images_on_both_devices(gpu):
    images = torch.empty(20, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(20, dtype=torch.int64)
    parts = [images, images.to(CUDA)]
    for of in (labels, None):
        batches = learn._batches(parts, of, 2, torch.Generator(), CUDA)
        assert devices(list(batches)) == {"cuda"}


@pytest.mark.parametrize("places", [("cpu", "cuda", "cpu"), ("cuda", "cpu", "cuda")])
def test_a_signature_of_models_on_two_devices_is_on_one(places, gpu, no_values):
    states = []
    for place in places:
        with torch.device(place):
            states.append(build_model("vgg11", 4).state_dict())
    rws = RobustWeightSignature.extract(*states, keep_num=3)
    assert devices(rws.tensors) == {places[1]}
    other = RobustWeightSignature.extract(*[states[0]] * 3, keep_num=4)
    assert devices((rws + other).tensors) == {places[1]}
    assert devices((other + rws).tensors) == {places[0]}


def test_a_resumed_run_has_its_state_on_the_gpu(gpu, tmp_path, monkeypatch):
    argv = ["--arch", "vgg11", "--save_dir", str(tmp_path), "--device", "cpu", "--resume"]
    args = train_corruption.parse_args(argv)

    def parts(device):
        with torch.device(device):
            model = build_model("vgg11", 4)
        optimizer = sgd(model, 0.01)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        loader = BatchLoader(make_set(), 8, device=device, shuffle=True)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
        made = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
        return made | {"loader": loader}

    progress = {"epoch": 0, "best_sa": -1.0, "best_ra": -1.0, "history": []}
    saved = {name: part.state_dict() for name, part in parts("cpu").items()}  # as read from a file
    saved |= progress | {"epoch": 3, "rng": torch.get_rng_state(), "amp": True}
    monkeypatch.setattr(ckpt, "read", lambda _: saved)
    monkeypatch.setattr(ckpt, "state_dict_of", lambda checkpoint, _: checkpoint["state_dict"])
    monkeypatch.setattr(torch, "set_rng_state", lambda _: None)
    (tmp_path / ckpt.LAST).touch()
    resumed = parts(CUDA)
    assert train_corruption.resume(args, {}, resumed, progress) is True
    assert progress["epoch"] == 3
    assert devices([resumed["state_dict"].state_dict(), resumed["optimizer"].state]) == {"cuda"}
