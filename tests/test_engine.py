"""The training step against a plain loop, its CUDA graph against itself, evaluation, switches."""

from __future__ import annotations

import shutil
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_corruption
from datasets.images import ImageSet
from datasets.loader import BatchLoader
from models import build_model
from utils import engine
from utils.engine import TrainStep, evaluate, train_epoch
from utils.errors import InputError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_set(count: int = 43, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return ImageSet(images, labels, list("abcd"), "synthetic")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=True)


def assert_same_weights(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (key, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(
            left, right, **tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


# ---- the step -------------------------------------------------------------------------------


def test_epochs_are_a_plain_sgd_loop():
    data, epochs = make_set(), 2
    model, plain = small_model(), small_model()
    optimizer = sgd(model)
    loader = BatchLoader(data, 8, "crop_flip", shuffle=True)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    stats = [
        train_epoch(model, loader, optimizer, amp=False, schedule=schedule) for _ in range(epochs)
    ]

    theirs = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.05, total_steps=steps)
    loader = BatchLoader(data, 8, "crop_flip", shuffle=True)
    for epoch in range(epochs):
        losses, correct = 0.0, 0
        for images, labels in loader:
            logits = plain(images)
            loss = F.cross_entropy(logits, labels)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            schedule.step()
            losses += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        assert stats[epoch].loss == pytest.approx(losses / len(data), rel=1e-5)
        assert stats[epoch].accuracy == pytest.approx(100 * correct / len(data))
    assert_same_weights(model, plain, rtol=1e-4, atol=1e-6)


def recording_on_a_cpu(model: nn.Module, optimizer: torch.optim.SGD) -> TrainStep:
    """A TrainStep that takes the CPU for a GPU; its graph is `_run` on the graph's tensors."""
    step = TrainStep(model, optimizer, amp=False)
    step.replays = 0

    def record(images, labels):
        step.images, step.labels = torch.empty_like(images), torch.empty_like(labels)
        step.graph = types.SimpleNamespace(replay=replay)

    def replay():
        step.replays += 1
        step._run(step.images, step.labels)

    step.recordable, step._record, step._warm_up = True, record, step._run
    step.rates = [torch.zeros(()) for _ in optimizer.param_groups]
    return step


@pytest.mark.parametrize("schedule_name", ["by epoch", "lr by step", "lr and momentum by step"])
def test_which_steps_are_replayed(schedule_name):
    """Three warm-up steps, then replays; the ragged batch and changed options are run plainly."""
    runs = []
    for recorded in (False, True):
        model = small_model()
        optimizer = sgd(model)
        loader = BatchLoader(make_set(), 8, shuffle=True)  # 5 batches of 8, one of 3
        total = 2 * len(loader)
        schedule = None
        if schedule_name != "by epoch":
            momentum = schedule_name == "lr and momentum by step"
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.1, total_steps=total, cycle_momentum=momentum
            )
        make = recording_on_a_cpu if recorded else (lambda *a: TrainStep(*a, amp=False))
        step = make(model, optimizer)
        losses = []
        for lr in (0.05, 0.01):
            if schedule is None:
                optimizer.param_groups[0]["lr"] = lr
            options = {"amp": False, "schedule": schedule, "step": step}
            losses.append(train_epoch(model, loader, optimizer, **options).loss)
            assert isinstance(optimizer.param_groups[0]["lr"], float)
        runs.append((losses, model))
    assert step.replays == (0 if schedule_name == "lr and momentum by step" else 2 + 5)
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert_same_weights(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-6)


def test_nothing_is_recorded_on_a_cpu():
    model = small_model()
    assert not TrainStep(model, sgd(model), amp=False).recordable


@pytest.mark.parametrize("amp", [False, True])
def test_amp_is_bf16_in_the_forward_pass_alone(amp):
    model, dtypes = small_model(), set()
    model.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    optimizer = sgd(model)
    train_epoch(model, BatchLoader(make_set(), 8), optimizer, amp=amp)
    evaluate(model, make_set(), amp=amp)
    assert dtypes == {torch.bfloat16 if amp else torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_recorded_steps_are_the_plain_ones(arch, amp, monkeypatch):
    """Same losses and weights over two epochs, a change of lr and a ragged batch."""
    device, runs = torch.device("cuda"), []
    for graph in (False, True):
        torch.manual_seed(0)
        model = engine.to_device(build_model(arch, 4), device)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        optimizer = sgd(model, 0.01)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)
        loader = BatchLoader(make_set(16 * 8 + 5), 16, "crop_flip", device=device, shuffle=True)
        step = TrainStep(model, optimizer, amp=amp, graph=graph)
        losses = []
        for _ in range(2):
            losses.append(train_epoch(model, loader, optimizer, amp=amp, step=step).loss)
            schedule.step()
        assert (step.graph is not None) == graph
        runs.append((losses, model))
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if amp else {"rtol": 1e-4, "atol": 1e-5}
    assert runs[0][0] == pytest.approx(runs[1][0], rel=tolerance["rtol"])
    assert_same_weights(runs[0][1], runs[1][1], **tolerance)


@needs_gpu
@pytest.mark.parametrize("graph", [False, True])
def test_steps_on_a_gpu_never_wait_for_it(graph):
    device = torch.device("cuda")
    model = engine.to_device(small_model(), device)
    step = TrainStep(model, sgd(model), amp=True, graph=graph)
    loader = BatchLoader(make_set(16 * 8), 16, device=device, shuffle=True)
    train_epoch(model, loader, step.optimizer, amp=True, step=step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in loader:
            step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(step.total).all()


# ---- what goes wrong in training ------------------------------------------------------------


def test_infinite_loss_names_step_and_lr():
    model = small_model()
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    with pytest.raises(InputError, match=r"loss is nan at step 2 of epoch 1/9 with --lr 0\.05"):
        train_epoch(
            model,
            BatchLoader(make_set(), 8, shuffle=True),
            sgd(model),
            amp=False,
            print_freq=2,
            title="epoch 1/9",
        )


def test_infinite_weights_after_the_last_update_are_noticed():
    model = small_model()
    with pytest.raises(InputError, match="weights are not finite after the epoch with --lr inf"):
        train_epoch(model, BatchLoader(make_set(8), 8), sgd(model, lr=float("inf")), amp=False)


def test_the_checkpoint_before_a_failure_is_kept(tmp_path, monkeypatch):
    def load_data(*_):
        return dict.fromkeys(("train", "clean train", "val", "test"), make_set())

    monkeypatch.setattr(train_corruption, "load_data", load_data)
    argv = ["--dataset", "synthetic", "--arch", "resnet18", "--device", "cpu", "--resume"]
    argv += ["--batch_size", "16", "--save_dir", str(tmp_path), "--epochs"]
    train_corruption.train(train_corruption.parse_args([*argv, "1"]))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args: cross_entropy(*args) * float("nan"))
    with pytest.raises(InputError, match="loss is nan at step 3 of epoch 2/2"):
        train_corruption.train(train_corruption.parse_args([*argv, "2"]))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


# ---- evaluation -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 10])
def test_evaluate_is_the_share_of_right_answers(batch_size):
    model, data = small_model(), make_set()
    model.train()
    accuracy = evaluate(model, data, amp=False, batch_size=batch_size)
    assert model.training
    with torch.no_grad():
        right = model.eval()(data.images / 255).argmax(1) == data.labels
    assert accuracy == pytest.approx(100 * right.float().mean().item())


def test_larger_images_are_fewer_at_once_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    large = ImageSet(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1).long(), ["a"], "x"
    )
    assert engine.eval_batch(make_set(1), gpu) == 4 * engine.eval_batch(large, gpu)
    assert engine.eval_batch(make_set(1), cpu) == engine.eval_batch(large, cpu)


# ---- switches -------------------------------------------------------------------------------


def test_deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    try:
        engine.be_deterministic()
        engine.to_device(small_model(), torch.device("cpu"))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert engine.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        evaluate(small_model(), make_set(), amp=False)
    finally:
        torch.use_deterministic_algorithms(False)
        engine.os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
        torch.backends.cudnn.benchmark = before[0]
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    engine.to_device(small_model(), torch.device("cpu"))
    assert torch.backends.cudnn.benchmark


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_model_is_the_same_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU())
    keys, accuracy = list(model.state_dict()), evaluate(model, make_set(), amp=False)
    engine.compile_model(model, torch.device("cpu"))
    called = []
    model.register_forward_hook(lambda *_: called.append(torch.compiler.is_compiling()))
    assert evaluate(model, make_set(), amp=False) == accuracy
    assert any(called) and list(model.state_dict()) == keys


def test_missing_compiler_is_named(monkeypatch):
    def fails(function):
        def call(*_):
            raise RuntimeError("no C++ compiler found\nin any of these places")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"--compile.*no C\+\+ compiler found\)"):
        engine.compile_model(small_model(), torch.device("cpu"))
