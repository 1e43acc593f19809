"""Train and evaluate: the loops, without a host synchronization inside them.

(But for SyncBatchNorm, of several processes on GPUs, which reads counts back in every layer.)
Batches come as floats on the model's device (datasets.loader); metrics are summed there and read
once per print interval. Where the hardware gains from it (`use_amp`) the forward pass runs in bf16
autocast; weights and the update stay float32. Activations take the memory format of the weights
(`to_device`). On CUDA the whole training step is one CUDA graph (`TrainStep`).
"""

import functools
import gc
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from tqdm import tqdm

from models.convolution import use_own_gradient
from models.vgg import MIN_SIDE, VGGS
from utils import distributed
from utils.errors import InputError, warn

# Steps before one is recorded: cuDNN tries its algorithms in them, the optimizer makes its state.
_WARM_UP = 3


def choose_device(name: str = "auto", probe: bool = True) -> torch.device:
    """`auto` is CUDA where that works, else the CPU; anything else is taken at its word.

    A certain GPU becomes the current one, so that nothing is opened on another. `auto` warns where
    the CPU is taken though a GPU seems to be there. probe: run a kernel; without it no GPU is
    opened, for a process that leaves it to others.
    Raises InputError for a device this machine, or this torch, does not have or can't use.
    """
    try:
        device = torch.device("cuda" if name == "auto" else name)
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= gpus:
            if probe:
                torch.cuda.init()  # which tells why
            raise RuntimeError(f"GPUs that torch finds: {gpus}")
        if probe:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)
            torch.Generator(device)
            torch.ones(1, device=device).add_(1).item()  # a kernel, which old GPUs may lack
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if name != "auto" or (gpus and distributed.ranks() > 1):
            said = f"--device {name}: not usable here ({reason}); try auto or cpu"
            raise InputError(said) from error
        if gpus or Path("/dev/nvidiactl").exists():
            warn(f"the CPU is used, CUDA is not usable here: {reason}")
        return torch.device("cpu")
    return device


def free_memory() -> None:
    """Give back GPU memory that nothing uses: an optimizer with a schedule is freed by gc alone."""
    gc.collect()
    torch.cuda.empty_cache()


@functools.cache
def bf16_gain(kind: str) -> tuple[bool, str]:
    """Whether bf16 is faster than float32 on this machine's "cuda" or "cpu", and why.

    By vendor and instruction set, not by a trial, so that a machine always computes the same bits.
    Intel's AVX-512 multiplies as many bf16 values a cycle as float32 ones, AMD's twice as many.
    """
    if kind == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
        return gains, "tensor cores" if gains else "no bf16 in hardware"
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    told = cpuinfo.read_text() if cpuinfo.exists() else ""
    if "amx_bf16" in told:
        return True, "AMX"
    if "avx512_bf16" not in told:
        return False, "no bf16 in hardware"
    amd = "AuthenticAMD" in told
    return amd, "AVX-512 of AMD" if amd else "bf16 is no faster on AVX-512 of Intel"


def use_amp(device: torch.device, wanted: bool | None) -> bool:
    """Whether to run in bf16: as `wanted`; None: where the hardware gains from it."""
    return bf16_gain(device.type)[0] if wanted is None else wanted


def _only_avx2(device: torch.device, amp: bool) -> bool:
    """Whether `device` computes float32 on a CPU with AVX2 but not AVX-512."""
    return device.type == "cpu" and not amp and torch.backends.cpu.get_cpu_capability() == "AVX2"


def memory_format(device: torch.device, amp: bool) -> torch.memory_format:
    """channels_last; in float32 on a CPU with more than AVX2 contiguous, which is faster there."""
    fast = amp or device.type != "cpu" or _only_avx2(device, amp)
    return torch.channels_last if fast else torch.contiguous_format


def layout_words(layout: torch.memory_format) -> str:
    """ "contiguous" or "channels_last"."""
    return str(layout).removeprefix("torch.").removesuffix("_format")


def arithmetic(device: torch.device, amp: bool, wanted: bool | None) -> str:
    """The arithmetic in words, for headers: what it is and why."""
    why = bf16_gain(device.type)[1] if wanted is None else f"--{'' if amp else 'no_'}amp"
    layout = layout_words(memory_format(device, amp))
    if device.type == "cpu" and not amp:
        layout += f" with {torch.backends.cpu.get_cpu_capability()}"
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32 and bf16_gain("cuda")[0]
    kind = "bf16" if amp else "float32, convolutions in TF32" if tf32 else "float32"
    return f"{kind}, {layout} ({why})"


def be_deterministic() -> None:
    """From here on the same seed gives the same bits on CUDA too; to be called before CUDA starts.

    Slower; an operation that has no such form raises RuntimeError. Float32 is not TF32 then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    # Nothing here reads uninitialized memory, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False


def to_device(model: nn.Module, device: torch.device, amp: bool) -> nn.Module:
    """`model` on `device`, in the `memory_format` that suits, cuDNN choosing its algorithms.

    On a CPU without AVX-512 its convolutions compute their gradients in a way that is fast there.
    """
    if _only_avx2(device, amp):
        use_own_gradient(model)
    # By their speed, which differs from run to run.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return model.to(device, memory_format=memory_format(device, amp))


def check_side(arch: str, images: Tensor) -> None:
    """Raise InputError where `images` (n, 3, H, W) are too small for `arch`."""
    side = min(images.shape[-2:])
    if arch in VGGS and side < MIN_SIDE:
        told = f"images of {side} pixels are too small, use --image_size {MIN_SIDE}"
        raise InputError(f"{arch}: {told}")


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Have torch.compile make the kernels of `model`, in place: its state-dict keys stay.

    Raises InputError where torch finds no compiler for `device`.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # each missing part has an exception of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--compile: torch.compile does not work here ({reason}); it needs a C++ compiler, "
            "and on CUDA triton; or leave --compile out"
        ) from error
    model.compile()


def sgd(model: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4) -> SGD:
    """SGD over all parameters of `model`, which is on its device: fused where torch has that."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=fused)


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models: the allocator keeps memory for each stream apart."""
    return torch.cuda.Stream(device)


class TrainStats(NamedTuple):
    """Means over one epoch of training: cross-entropy in nats, accuracy in percent."""

    loss: float
    accuracy: float


class TrainStep:
    """One step of training on a batch: forward, cross-entropy, backward, update, sums in `total`.

    On CUDA, with fused SGD, the step is recorded as a CUDA graph after a few calls with batches of
    one shape and from then on replayed: at batch 128 a large GPU would wait for the launches of its
    kernels. What is recorded is `_run`, which is also called directly for a batch of another shape
    (the last of an epoch), while options of the optimizer other than the learning rate change, on
    other devices, with several processes (distributed), and where activations don't fit twice: the
    graph has memory of its own. A forward pass that reads a value back to the host can't be
    recorded.
    The optimizer has one group of parameters, as `sgd` makes it.
    The graph writes to the tensors it has seen: make a new TrainStep after loading optimizer state.
    """

    def __init__(self, model: nn.Module, optimizer: SGD, *, amp: bool) -> None:
        self.model = distributed.data_parallel(model)
        self.optimizer, self.amp = optimizer, amp
        self.device = next(model.parameters()).device
        self.total = torch.zeros(2, device=self.device)  # Σ loss · n, Σ correct
        # Fused SGD reads a learning rate that is a tensor on the device there, so that a recorded
        # step follows a schedule; a plain step reads the same, whose bits are those of a float32.
        # Where there is no such tensor, no step is recorded.
        self.rate: Tensor | None = None
        fused = optimizer.param_groups[0]["fused"]
        if self.device.type == "cuda" and fused and distributed.ranks() == 1:
            self.rate = torch.zeros((), device=self.device)
            self.stream = _recording_stream(self.device)
        for parameter, state in optimizer.state.items():  # loaded: laid out as where it was saved
            if (momentum := state.get("momentum_buffer")) is not None:
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.fits = True
        # The key of the graph, or without one that of the last step and how many had it before.
        self.key, self.alike = None, 0

    def __call__(self, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """Train on images float32 (n, 3, H, W) in [0, 1] with labels int64 (n,).

        share: what the mean over these images weighs in the gradient, where several processes
        average theirs.
        """
        if self.rate is None:
            return self._run(images, labels, share)
        self.rate.fill_(self.optimizer.param_groups[0]["lr"])
        key = self._key(images)
        if self.graph is None and self.fits:
            self.alike = self.alike + 1 if key == self.key else 0
            self.key = key
            if self.alike < _WARM_UP:
                return self._warm_up(images, labels)
            self.fits = self._fits_twice()
            if self.fits:
                self._record(images, labels)
        if self.graph is None or key != self.key:
            return self._run(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()

    def _run(self, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
        # Each weight is cast to bf16 once a step; a cache of the casts must not be in a graph.
        with torch.autocast(self.device.type, torch.bfloat16, self.amp, cache_enabled=False):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * share).backward()
        (group,) = self.optimizer.param_groups
        lr = group["lr"]
        group["lr"] = lr if self.rate is None else self.rate
        self.optimizer.step()
        group["lr"] = lr
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self.total += torch.stack([loss.float() * len(labels), correct])

    def _key(self, images: Tensor) -> tuple:
        """Key of the CUDA graph: batch shape and optimizer options."""
        (group,) = self.optimizer.param_groups
        return images.shape, {k: v for k, v in group.items() if k not in ("params", "lr")}

    def _warm_up(self, images: Tensor, labels: Tensor) -> None:
        """A step on the stream of the recording, as CUDA graphs ask for."""
        if self.alike == 1:  # from here on the optimizer's state is there
            torch.cuda.reset_peak_memory_stats(self.device)
        user = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(user)
        with torch.cuda.stream(self.stream):
            self._run(images, labels)
        user.wait_stream(self.stream)

    def _fits_twice(self) -> bool:
        """Whether what warm-up steps took at most is free twice over."""
        free_memory()
        used = torch.cuda.memory_allocated(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return 2 * (torch.cuda.max_memory_allocated(self.device) - used) <= free

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Make the graph of a step on `self.images` and `self.labels`; nothing is computed."""
        self.images = torch.empty_like(images)
        self.labels = torch.empty_like(labels)
        self.optimizer.zero_grad(set_to_none=True)  # gradients are to lie in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._run(self.images, self.labels)


def train_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: SGD,
    *,
    amp: bool,
    print_freq: int = 100,
    title: str = "the epoch",
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    step: TrainStep | None = None,
) -> TrainStats:
    """One pass of `loader` through `model` with cross-entropy, updating by `optimizer`.

    `loader`: batches as `TrainStep` takes them, and their number by len(); of several processes,
    also `whole_batch` (`BatchLoader`).
    `schedule`: a learning-rate schedule to advance with every step, if there is one.
    `step`: the TrainStep of this model and optimizer, to use its CUDA graph in every epoch.
    Of several processes each passes over its part, and all get the means over the whole.
    Raises InputError, naming step and learning rate, when the loss is no longer finite at a print
    interval or at the end, or the weights at the end.
    """
    step = step or TrainStep(model, optimizer, amp=amp)
    ranks = distributed.ranks()
    model.train()
    step.total.zero_()
    seen = 0
    with tqdm(total=len(loader), desc=title, disable=None, leave=False) as bar:
        for number, (images, labels) in enumerate(loader, start=1):
            whole = len(labels) if ranks == 1 else loader.whole_batch(number - 1)
            step(images, labels, share=ranks * len(labels) / whole)
            if schedule is not None:
                schedule.step()
            seen += whole
            if number % print_freq == 0 or number == len(loader):
                loss, correct = distributed.total(step.total.clone()).tolist()
                stats = TrainStats(loss / seen, 100 * correct / seen)
                if not math.isfinite(stats.loss):
                    where = f"at step {number} of {title}"
                    raise _not_finite(f"the training loss is {stats.loss} {where}", optimizer)
                bar.set_postfix(loss=f"{stats.loss:.3f}", acc=f"{stats.accuracy:.1f}")
                bar.update(number - bar.n)
    distributed.share_buffers(model)
    # The last update comes after the last loss; a checkpoint of it would be of no use.
    if not torch.stack([t.isfinite().all() for t in model.state_dict().values()]).all():
        raise _not_finite(f"the weights are not finite after {title}", optimizer)
    return stats


def _not_finite(what: str, optimizer: SGD) -> InputError:
    lr = optimizer.param_groups[0]["lr"]
    return InputError(f"{what} with --lr {lr:g}; a smaller learning rate may help")


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, amp: bool, title: str = ""
) -> float:
    """Top-1 accuracy of `model`, in percent. The model's mode is left as it was.

    `batches`: images float32 (n, 3, H, W) in [0, 1] and labels int64 (n,), on the model's device.
    Of several processes each has its part of them, and all get the accuracy on the whole.
    """
    device = next(model.parameters()).device
    correct = seen = 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in tqdm(batches, desc=title, disable=None, leave=False):
            with torch.autocast(device.type, torch.bfloat16, amp):
                correct += (model(images).argmax(1) == labels).sum()
            seen += len(labels)
    finally:
        for module, training in modes.items():
            module.training = training
    correct, seen = distributed.total(torch.tensor([correct, seen], device=device)).tolist()
    return 100 * correct / seen
