"""Train and evaluate: the loops, without a host synchronization inside them.

Images stay uint8 on the device until the batch is made (datasets.loader); metrics are summed on
the device and read once per print interval. On CUDA, and on CPUs with native bf16, the forward
pass runs in bf16 autocast with channels_last memory; weights and the update stay float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from datasets.images import ImageSet
from datasets.loader import BatchLoader
from utils.errors import InputError

EVAL_BATCH = {"cpu": 250, "cuda": 2000}


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


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`, its convolutions in channels_last, cuDNN choosing its algorithms."""
    torch.backends.cudnn.benchmark = True
    return model.to(device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class TrainStats:
    """Means over one epoch of training: cross-entropy in nats, accuracy in percent."""

    loss: float
    accuracy: float


def train_epoch(
    model: nn.Module,
    loader: BatchLoader,
    optimizer: torch.optim.Optimizer,
    *,
    amp: bool,
    print_freq: int = 100,
    title: str = "the epoch",
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> TrainStats:
    """One pass of `loader` through `model` with cross-entropy, updating by `optimizer`.

    `schedule`: a learning-rate schedule to advance with every step, if there is one.
    Raises InputError, naming step and learning rate, when the loss is no longer finite at a print
    interval or at the end.
    """
    model.train()
    device = next(model.parameters()).device
    total = torch.zeros(2, device=device)  # Σ loss · n, Σ correct
    seen = 0
    with tqdm(total=len(loader), desc=title, disable=None, leave=False) as bar:
        for step, (images, labels) in enumerate(loader, start=1):
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            with torch.no_grad():
                total += torch.stack(
                    [loss.detach().float() * len(labels), (logits.argmax(1) == labels).sum()]
                )
            seen += len(labels)
            if step % print_freq == 0 or step == len(loader):
                stats = _read(total, seen)
                if not math.isfinite(stats.loss):
                    lr = optimizer.param_groups[0]["lr"]
                    raise InputError(
                        f"the training loss is {stats.loss} at step {step} of {title} "
                        f"with --lr {lr:g}; a smaller learning rate may help"
                    )
                bar.set_postfix(loss=f"{stats.loss:.3f}", acc=f"{stats.accuracy:.1f}")
                bar.update(step - bar.n)
    return stats


def _read(total: Tensor, seen: int) -> TrainStats:
    loss, correct = total.tolist()
    return TrainStats(loss / seen, 100 * correct / seen)


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: ImageSet, *, amp: bool, batch_size: int | None = None, title: str = ""
) -> float:
    """Top-1 accuracy of `model` on `images`, in percent. The model's mode is left as it was."""
    device = next(model.parameters()).device
    batch_size = batch_size or EVAL_BATCH.get(device.type, 500)
    loader = BatchLoader(images, batch_size, device=device, shuffle=False)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    for batch, labels in tqdm(loader, desc=title, disable=None, leave=False):
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            correct += (model(batch).argmax(1) == labels).sum()
    model.train(training)
    return 100 * correct.item() / len(images)
