"""Train and evaluate: the loops, without a host synchronization inside them.

Images stay uint8 on the device until the batch is made (datasets.loader); metrics are summed on
the device and read once per print interval. On CUDA, and on CPUs with native bf16, the forward
pass runs in bf16 autocast with channels_last memory; weights and the update stay float32. On CUDA
the whole training step is one CUDA graph (`TrainStep`).
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from datasets.images import ImageSet
from datasets.loader import BatchLoader
from utils import distributed
from utils.errors import InputError

# Images of 32×32 evaluated at once: on a CPU what its caches hold; on a GPU, where larger images
# are fewer at once (`eval_batch`), a VGG's largest activations then take 0.7 GB.
EVAL_BATCH = {"cpu": 250, "cuda": 5000}
# Steps before one is recorded: cuDNN tries its algorithms in them, the optimizer makes its state.
_WARM_UP = 3


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; anything else is taken at its word.

    Raises InputError for a device this machine, or this torch, does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.Generator(device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable here ({reason}); try auto or cpu") from error
    return device


@functools.cache
def has_native_bf16(device_type: str) -> bool:
    """Whether bf16 products run in hardware: CUDA from Ampere on, CPUs with the instructions."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def use_amp(device: torch.device, wanted: bool | None) -> bool:
    """Whether to run in bf16: as `wanted`, or by itself (None) wherever the hardware has it."""
    return has_native_bf16(device.type) if wanted is None else wanted


def be_deterministic() -> None:
    """From here on the same seed gives the same bits on CUDA too; to be called before CUDA starts.

    Slower; an operation that has no such form raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads uninitialized memory, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`, its convolutions in channels_last, cuDNN choosing its algorithms."""
    # By their speed, which differs from run to run.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return model.to(device, memory_format=torch.channels_last)


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


@dataclass(frozen=True)
class TrainStats:
    """Means over one epoch of training: cross-entropy in nats, accuracy in percent."""

    loss: float
    accuracy: float


class TrainStep:
    """One step of training on a batch: forward, cross-entropy, backward, update, sums in `total`.

    On CUDA, with fused SGD and batches of one shape, the step is recorded as a CUDA graph after a
    few calls and from then on replayed: at batch 128 a large GPU would wait for the launches of its
    kernels. What is recorded is `_run`, which is also called directly for a batch of another shape
    (the last of an epoch), while options of the optimizer other than the learning rate change, on
    other devices, and with several processes (distributed). `graph` False: always, for debugging;
    a forward pass that reads a value back to the host can't be recorded.
    The graph writes to the tensors it has seen: make a new TrainStep after loading optimizer state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool,
        graph: bool = True,
    ) -> None:
        self.model = distributed.data_parallel(model)
        self.optimizer = optimizer
        self.amp = amp
        self.device = next(model.parameters()).device
        self.total = torch.zeros(2, device=self.device)  # Σ loss · n, Σ correct
        groups = optimizer.param_groups
        on_gpu = self.device.type == "cuda" and isinstance(optimizer, torch.optim.SGD)
        # Fused SGD reads a learning rate that is a tensor on the device there, so that a recorded
        # step follows a schedule.
        self.rates = []
        if on_gpu and all(group["fused"] for group in groups):
            self.rates = [torch.zeros((), device=self.device) for _ in groups]
        self.recordable = graph and bool(self.rates) and distributed.ranks() == 1
        self.stream = torch.cuda.Stream(self.device) if self.recordable else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.kind: tuple | None = None  # of the steps in the graph, or seen `alike` times so far
        self.alike = 0

    def __call__(self, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """Train on images float32 (n, 3, H, W) in [0, 1] with labels int64 (n,).

        share: what the mean over these images weighs in the gradient, where several processes
        average theirs.
        """
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=False):
            rate.fill_(group["lr"])
        if not self.recordable:
            self._run(images, labels, share)
            return
        kind = self._kind(images)
        if self.graph is None:
            self.alike = self.alike + 1 if kind == self.kind else 0
            self.kind = kind
            if self.alike < _WARM_UP:
                self._warm_up(images, labels)
                return
            self._record(images, labels)
        if kind == self.kind:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()
        else:
            self._run(images, labels)

    def _run(self, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        # Each weight is cast to bf16 once a step; a cache of the casts must not be in a graph.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.amp, cache_enabled=False
        ):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * share).backward()
        self._update()
        with torch.no_grad():
            self.total += torch.stack(
                [loss.detach().float() * len(labels), (logits.argmax(1) == labels).sum()]
            )

    def _update(self) -> None:
        """The optimizer's step, with its learning rates as tensors where it takes them."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates or rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _kind(self, images: Tensor) -> tuple:
        """What must not change for a recorded step to be the step wanted."""
        fixed = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        return images.shape, fixed

    def _warm_up(self, images: Tensor, labels: Tensor) -> None:
        """A step on the stream of the recording, as CUDA graphs ask for."""
        user = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(user)
        with torch.cuda.stream(self.stream):
            self._run(images, labels)
        user.wait_stream(self.stream)

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Make the graph of a step on `self.images` and `self.labels`; nothing is computed."""
        self.images = torch.empty_like(images, memory_format=torch.channels_last)
        self.labels = torch.empty_like(labels)
        self.optimizer.zero_grad(set_to_none=True)  # gradients are to lie in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._run(self.images, self.labels)


def train_epoch(
    model: nn.Module,
    loader: BatchLoader,
    optimizer: torch.optim.Optimizer,
    *,
    amp: bool,
    print_freq: int = 100,
    title: str = "the epoch",
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    step: TrainStep | None = None,
) -> TrainStats:
    """One pass of `loader` through `model` with cross-entropy, updating by `optimizer`.

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
                stats = _read(distributed.total(step.total.clone()), seen)
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


def _not_finite(what: str, optimizer: torch.optim.Optimizer) -> InputError:
    lr = optimizer.param_groups[0]["lr"]
    return InputError(f"{what} with --lr {lr:g}; a smaller learning rate may help")


def _read(total: Tensor, seen: int) -> TrainStats:
    loss, correct = total.tolist()
    return TrainStats(loss / seen, 100 * correct / seen)


def eval_batch(images: ImageSet, device: torch.device) -> int:
    """How many of `images` are evaluated at once on `device`."""
    if device.type != "cuda":
        return EVAL_BATCH["cpu"]
    height, width = images.images.shape[-2:]
    return max(1, EVAL_BATCH["cuda"] * 32 * 32 // (height * width))


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: ImageSet, *, amp: bool, batch_size: int | None = None, title: str = ""
) -> float:
    """Top-1 accuracy of `model` on `images`, in percent. The model's mode is left as it was.

    Images that lie on the model's device (`ImageSet.to`) are not copied there again. Of several
    processes each takes its part, and all get the accuracy on the whole.
    """
    device = next(model.parameters()).device
    ranks = distributed.ranks()
    loader = BatchLoader(
        images,
        (batch_size or eval_batch(images, device)) * ranks,
        device=device,
        rank=distributed.rank(),
        ranks=ranks,
    )
    correct = torch.zeros((), dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    for batch, labels in tqdm(loader, desc=title, disable=None, leave=False):
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            correct += (model(batch).argmax(1) == labels).sum()
    model.train(training)
    return 100 * distributed.total(correct).item() / len(images)
