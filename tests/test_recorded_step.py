"""TrainStep's recording against plain steps, by a stand-in for CUDA graphs that runs on a CPU."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.loader import BatchLoader
from experiments import pretrain
from models import build_model
from tests.test_engine import make_set, sgd, small_model
from utils import engine
from utils.engine import TrainStep

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph: keeps the operations of a capture; a replay runs them all again."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in READS, "operation not permitted when stream is capturing"
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.ops:
                values = tree_leaves(func(*args, **kwargs))
                for place, value in zip(tree_leaves(out), values, strict=True):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


@contextlib.contextmanager
def capture(step):
    """torch.cuda.graph: what is run in it is recorded, and leaves the state as it was."""
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    state = [*step.model.state_dict().values(), *momenta, step.total]
    before = [tensor.clone() for tensor in state]
    step.labels.zero_()  # uninitialized; on a GPU nothing is computed from it
    step.graph.ops, step.graph.replays = [], 0
    with step.graph:
        yield
    with torch.no_grad():
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)


@pytest.fixture
def cuda(monkeypatch):
    """What TrainStep asks of torch.cuda; the memory, in bytes, can be set."""
    memory = {"mem_get_info": (100, 0), "memory_allocated": 10, "max_memory_allocated": 60}
    for name in memory:
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: memory[name])
    for name in ("current_stream", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(engine.gc, "collect", collect := MagicMock())
    memory["collect"] = collect
    return memory


def trained(make, monkeypatch, recorded):
    """A step after two epochs with a change of the learning rate and ragged batches, its model."""
    torch.manual_seed(0)
    model = make()
    step = TrainStep(model, sgd(model, 0.02), amp=False)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: capture(step))
    if recorded:
        step.rate, step.stream = torch.zeros(()), MagicMock()
    for epoch in range(2):
        step.optimizer.param_groups[0]["lr"] = 0.02 / (1 + epoch)
        for images, labels in BatchLoader(make_set(), 8, shuffle=True, seed=epoch):
            step(images, labels)
    return step, model


@pytest.mark.parametrize(
    ("make", "free", "replays"),
    [
        (small_model, 100, 2 + 5),
        (lambda: build_model("resnet18", 4), 100, 2 + 5),
        (small_model, 99, 0),
    ],
)
def test_a_recorded_step_is_the_plain_one(make, free, replays, cuda, monkeypatch):
    """Bit for bit; where the activations, 50 bytes, don't fit twice, nothing is recorded."""
    cuda["mem_get_info"] = (free, 0)
    (step, model), (plain, other) = (trained(make, monkeypatch, r) for r in (True, False))
    assert (step.graph.replays if step.graph else 0) == replays
    assert cuda["collect"].called  # before the capture
    assert step.rate.item() == pytest.approx(0.01)  # recorded or not, the rate is a float32
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert torch.equal(step.total, plain.total)


def test_models_share_one_stream_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock(side_effect=lambda _: object()))
    engine._recording_stream.cache_clear()
    first, second, other = (engine._recording_stream(torch.device("cuda", i)) for i in (0, 0, 1))
    engine._recording_stream.cache_clear()
    assert first is second and first is not other


def test_every_whole_step_of_pretraining_can_be_the_recorded_one(tmp_path, monkeypatch):
    """Its schedule changes the learning rate alone."""
    keys = []

    class Noting(TrainStep):
        def __call__(self, images, labels, share=1.0):
            keys.append(self._key(images))
            self.optimizer.step()

    monkeypatch.setattr(pretrain, "TrainStep", Noting)
    args = Namespace(arch="vgg11", pretrain_epochs=3, device="cpu", amp=False)
    pretrain.pretrain(args, make_set(64 + 9), tmp_path / "pre.pth.tar", lambda _: "")
    assert len(keys) == 6 and all(key == keys[0] for key in keys[::2])
    assert keys[0][1]["momentum"] == 0.9
