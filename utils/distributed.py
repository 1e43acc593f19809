"""Data-parallel training: the processes that torchrun starts train one model together.

    torchrun --nproc_per_node=4 train_corruption.py --dataset cifar10 …

Each process has a GPU of its own (or, without one, shares the CPU) and takes its part of every
batch (datasets.loader). Gradients are averaged and metrics summed, so all processes hold the same
weights and numbers; process 0 alone prints and writes. A process that torchrun did not start is
alone: rank 0 of 1, for which nothing here communicates.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import InputError

# Process 0 may have a large set to decode while the others wait for it.
_TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def session(device: str) -> Iterator[None]:
    """Belong to the processes that torchrun started, if it did; all but process 0 are quiet.

    device: the --device of the command. CUDA gives each process the GPU of its local rank, as the
    current device, and NCCL; the CPU gives Gloo.
    Raises InputError for one certain GPU, and for more processes than GPUs.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if not cuda and device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: torchrun gives each process its own; say cuda or cpu")
    gpu = None
    if cuda:
        wanted, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > gpus:
            raise InputError(
                f"--nproc_per_node={wanted}: this machine has {gpus} GPUs, each process needs one"
            )
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT, device_id=gpu)
    with contextlib.ExitStack() as stack, open(os.devnull, "w") as nowhere:
        if rank() > 0:
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(redirect(nowhere))
        yield
        wait_for_all()  # nobody leaves while another still communicates
    dist.destroy_process_group()  # not after an error: NCCL would wait for the others


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Process 0 does what is inside before the others, which then find its downloads and caches."""
    if rank() > 0:
        wait_for_all()
    try:
        yield
    finally:
        if rank() == 0:
            wait_for_all()


def wait_for_all() -> None:
    """Return when every process has come this far."""
    if ranks() > 1:
        dist.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, on each of them; `tensor` may be overwritten."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def synchronized(model: nn.Module) -> nn.Module:
    """`model` with batch norm over the images of all processes; to be trained on CUDA.

    The layers are replaced, their parameters and state-dict keys stay. torch has no such layer for
    the CPU: there each process normalizes by its own part of a batch, and `share_buffers` keeps
    the running statistics of process 0. In a training step each layer waits for the GPU once, to
    read how many images the others have.
    """
    if ranks() > 1 and next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    """`model`, or a wrapper whose backward pass averages the gradients over the processes."""
    # Buffers need no broadcast in every step: see `synchronized` and `share_buffers`.
    return model if ranks() == 1 else DistributedDataParallel(model, broadcast_buffers=False)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers (running statistics) of process 0."""
    if ranks() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
