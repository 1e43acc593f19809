"""The training step against a plain loop, its CUDA graph against itself, evaluation, switches."""

from __future__ import annotations

import shutil
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reproduce
from datasets.images import ImageSet
from datasets.loader import BatchLoader
from models import build_model
from models.convolution import Conv3x3
from utils import engine
from utils.engine import TrainStep, evaluate, sgd, train_epoch
from utils.errors import InputError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_set(count: int = 43) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return ImageSet(images, labels, list("abcd"), "synthetic")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )


def assert_same_run(runs: list, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Two pairs of losses and a model."""
    (losses, model), (others, other) = runs
    assert losses == pytest.approx(others, rel=rtol)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=rtol, atol=atol)


# ---- the step -------------------------------------------------------------------------------


def test_epochs_are_a_plain_sgd_loop():
    data, runs = make_set(), []
    for ours in (True, False):
        model, figures = small_model(), []
        plain = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        optimizer = sgd(model, 0.05) if ours else plain
        loader = BatchLoader(data, 8, "crop_flip", shuffle=True)
        total = 2 * len(loader)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total)
        for _ in range(2):
            if ours:
                figures += train_epoch(model, loader, optimizer, amp=False, schedule=schedule)
                continue
            losses, correct = 0.0, 0
            for images, labels in loader:
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses += loss.item() * len(labels)
                correct += int((logits.argmax(1) == labels).sum())
            figures += [losses / len(data), 100 * correct / len(data)]
        runs.append((figures, model))
    assert_same_run(runs)


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

    step.rate, step._record, step._warm_up = torch.zeros(()), record, step._run
    step._fits_twice = lambda: True
    return step


@pytest.mark.parametrize(
    ("cycled", "replays"), [(None, 2 + 5), ("lr", 2 + 5), ("lr and momentum", 0)]
)
def test_which_steps_are_replayed(cycled, replays):
    """Three warm-up steps, then replays; the ragged batch and changed options are run plainly."""
    runs = []
    for make in (lambda *a: TrainStep(*a, amp=False), recording_on_a_cpu):
        model, losses, schedule = small_model(), [], None
        optimizer = sgd(model, 0.05)
        loader = BatchLoader(make_set(), 8, shuffle=True)  # 5 batches of 8, one of 3
        if cycled:
            options = {"total_steps": 2 * len(loader), "cycle_momentum": "momentum" in cycled}
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, **options)
        step = make(model, optimizer)
        assert step.rate is None or make is recording_on_a_cpu  # else not recorded
        for lr in (0.05, 0.01):
            if not cycled:
                optimizer.param_groups[0]["lr"] = lr
            options = {"amp": False, "schedule": schedule, "step": step}
            losses.append(train_epoch(model, loader, optimizer, **options).loss)
            assert isinstance(optimizer.param_groups[0]["lr"], float)
        runs.append((losses, model))
    assert step.replays == replays
    assert_same_run(runs)


@pytest.mark.parametrize("amp", [False, True])
def test_amp_is_bf16_in_the_forward_pass_alone(amp):
    model, dtypes = small_model(), set()
    model.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    optimizer = sgd(model, 0.05)
    train_epoch(model, BatchLoader(make_set(), 8), optimizer, amp=amp)
    evaluate(model, BatchLoader(make_set(), 8), amp=amp)
    assert dtypes == {torch.bfloat16 if amp else torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_run_goes_on_in_another_memory_format():
    """Momentum is loaded with the strides it was saved with, which fused SGD takes for its own."""
    data, saved, ends = make_set(), small_model(), []
    train_epoch(saved, BatchLoader(data, 8), before := sgd(saved, 0.05), amp=False)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = small_model()
        model.load_state_dict(saved.state_dict())
        model.to(memory_format=layout)
        optimizer = sgd(model, 0.05)
        optimizer.load_state_dict(before.state_dict())
        train_epoch(model, BatchLoader(data, 8), optimizer, amp=False)
        ends.append(model.state_dict())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_recorded_steps_are_the_plain_ones(arch, amp, monkeypatch):
    """Same losses and weights over two epochs, a change of lr and a ragged batch."""
    device, runs = torch.device("cuda"), []
    for graph in (False, True):
        torch.manual_seed(0)
        model = engine.to_device(build_model(arch, 4), device, False)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        optimizer = sgd(model, 0.01)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)
        loader = BatchLoader(make_set(16 * 8 + 5), 16, "crop_flip", device=device, shuffle=True)
        step = TrainStep(model, optimizer, amp=amp)
        step.rate = step.rate if graph else None
        losses = []
        for _ in range(2):
            losses.append(train_epoch(model, loader, optimizer, amp=amp, step=step).loss)
            schedule.step()
        assert (step.graph is not None) == graph
        runs.append((losses, model))
    assert_same_run(runs, *((1e-3, 1e-4) if amp else (1e-4, 1e-5)))


@needs_gpu
@pytest.mark.parametrize("graph", [False, True])
def test_steps_on_a_gpu_never_wait_for_it(graph):
    device = torch.device("cuda")
    model = engine.to_device(small_model(), device, False)
    step = TrainStep(model, sgd(model, 0.05), amp=True)
    step.rate = step.rate if graph else None
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
    loader, how = BatchLoader(make_set(), 8, shuffle=True), {"print_freq": 2, "title": "epoch 1/9"}
    with pytest.raises(InputError, match=r"loss is nan at step 2 of epoch 1/9 with --lr 0\.05"):
        train_epoch(model, loader, sgd(model, 0.05), amp=False, **how)


def test_infinite_weights_after_the_last_update_are_noticed():
    model = small_model()
    with pytest.raises(InputError, match="weights are not finite after the epoch with --lr inf"):
        train_epoch(model, BatchLoader(make_set(8), 8), sgd(model, float("inf")), amp=False)


# ---- evaluation -----------------------------------------------------------------------------


def test_evaluate_is_the_share_of_right_answers():
    model, data = small_model(), make_set()
    model.train()
    accuracy = evaluate(model, BatchLoader(data, 10), amp=False)
    assert model.training
    with torch.no_grad():
        right = model.eval()(data.images / 255).argmax(1) == data.labels
    assert accuracy == pytest.approx(100 * right.float().mean().item())


def test_evaluate_leaves_every_mode_as_it_was():
    model, data = small_model(), make_set()
    model.train()
    next(model.children()).eval()  # frozen
    modes = [module.training for module in model.modules()]
    evaluate(model, BatchLoader(data, 10), amp=False)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 1, 1, 1), torch.zeros(1))], amp=False)
    assert [module.training for module in model.modules()] == modes


# ---- switches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "gains"),
    [
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 avx2", "AVX512", False),
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16", "AVX512", True),
        ("vendor_id : AuthenticAMD\nflags : avx512_bf16 avx2", "AVX512", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", "AVX2", False),
    ],
)
def test_arithmetic_is_what_the_cpu_gains_from_or_as_wanted(
    cpuinfo, capability, gains, monkeypatch
):
    monkeypatch.setattr(engine.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(engine.Path, "exists", lambda _: True)
    monkeypatch.setattr(engine.Path, "read_text", lambda _: cpuinfo)
    engine.bf16_gain.cache_clear()
    cpu = torch.device("cpu")
    for wanted in (None, True, False):
        amp = engine.use_amp(cpu, wanted)
        assert amp == (gains if wanted is None else wanted)
        model = engine.to_device(torch.nn.Conv2d(3, 8, 3, padding=1), cpu, amp)
        assert (type(model) is Conv3x3) == (capability == "AVX2" and not amp)
        channels_last = amp or capability == "AVX2"
        assert model.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        told = engine.arithmetic(cpu, amp, wanted)
        layout = "channels_last" if channels_last else "contiguous"
        words = "bf16, channels_last (" if amp else f"float32, {layout} with {capability} ("
        assert told.startswith(words)
        assert wanted is None or told.endswith("amp)")
    engine.bf16_gain.cache_clear()


def test_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        engine.be_deterministic()
        engine.to_device(small_model(), torch.device("cpu"), False)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
        assert engine.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        evaluate(small_model(), BatchLoader(make_set(8), 8), amp=False)
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    engine.to_device(small_model(), torch.device("cpu"), False)
    assert torch.backends.cudnn.benchmark


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_model_is_the_same_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU())
    data = BatchLoader(make_set(), 43)
    keys, accuracy = list(model.state_dict()), evaluate(model, data, amp=False)
    engine.compile_model(model, torch.device("cpu"))
    called = []
    model.register_forward_hook(lambda *_: called.append(torch.compiler.is_compiling()))
    assert evaluate(model, data, amp=False) == accuracy
    assert any(called) and list(model.state_dict()) == keys


def test_missing_compiler_is_named(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no C++ compiler found\nin any of these places")

    monkeypatch.setattr(torch, "compile", lambda _: refuse)
    with pytest.raises(InputError, match=r"--compile.*no C\+\+ compiler found\)"):
        engine.compile_model(small_model(), torch.device("cpu"))


# ---- devices --------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of which nothing can be asked but what is listed in `called`."""
    called = []

    def note(name, result=None):
        monkeypatch.setattr(torch.cuda, name, lambda *args: called.append((name, *args)) or result)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "Generator", lambda device: called.append(("Generator", device)))
    note("set_device")
    note("init")
    monkeypatch.setattr(torch, "ones", lambda *_, device: called.append(("ones", device)) or kernel)
    kernel = mock.MagicMock()
    called.append(kernel)
    return called


def test_a_certain_gpu_is_the_current_one_before_anything_is_asked_of_it(gpus):
    kernel = gpus.pop()
    gpu = torch.device("cuda", 1)
    assert engine.choose_device("cuda:1") == gpu
    assert gpus == [("set_device", gpu), ("Generator", gpu), ("ones", gpu)]
    assert kernel.add_.called
    gpus.clear()
    assert engine.choose_device("auto") == torch.device("cuda")
    assert [name for name, _ in gpus] == ["Generator", "ones"]


def test_devices_of_other_processes_are_not_opened(gpus):
    gpus.clear()
    assert engine.choose_device("cuda:1", probe=False) == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"--device cuda:2: .*GPUs that torch finds: 2.*try auto"):
        engine.choose_device("cuda:2", probe=False)
    argv = ["main", "--dataset", "synthetic", "--devices", "0", "1"]
    assert reproduce.parse_args(argv).devices == ["cuda:0", "cuda:1"]
    assert not gpus


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_without_kernels_is_named_and_auto_takes_the_cpu(name, gpus):
    gpus.pop().add_.side_effect = RuntimeError("CUDA error: no kernel image is available\nmore")
    if name == "auto":
        with pytest.warns(UserWarning, match=r"the CPU is used, .*no kernel image is available$"):
            assert engine.choose_device(name) == torch.device("cpu")
        return
    with pytest.raises(InputError, match=rf"--device {name}: .*no kernel image is available\)"):
        engine.choose_device(name)


def test_without_a_gpu_auto_is_silent(monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(engine.Path, "exists", lambda _: False)
    assert engine.choose_device() == torch.device("cpu") and not recwarn
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError("driver too old")))
    monkeypatch.setattr(engine.Path, "exists", lambda _: True)  # /dev/nvidiactl
    with pytest.warns(UserWarning, match="the CPU is used, .*driver too old"):
        assert engine.choose_device() == torch.device("cpu")


def test_float32_says_where_it_is_tf32(monkeypatch):
    monkeypatch.setattr(engine, "bf16_gain", lambda _: (True, "tensor cores"))
    cuda, cpu, tf32 = torch.device("cuda"), torch.device("cpu"), torch.backends.cudnn.allow_tf32
    said = "float32, convolutions in TF32, channels_last (--no_amp)"
    assert engine.arithmetic(cuda, False, False) == said
    assert "TF32" not in engine.arithmetic(cuda, True, None) + engine.arithmetic(cpu, False, False)
    try:
        torch.backends.cudnn.allow_tf32 = False
        assert "TF32" not in engine.arithmetic(cuda, False, False)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
