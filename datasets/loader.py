"""Batches from an image set that lies whole, as uint8, on the device.

Augmentation is batched tensor functions there; nothing waits for the host. The order and the
parameters of augmentation are drawn once per epoch, on the CPU, so they are the same everywhere.
A set too large for the device stays in host memory, and what comes next is copied over meanwhile.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import InitVar, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.corruptions.filters import pick
from datasets.images import ImageSet, stable_seed
from utils import distributed
from utils.errors import InputError

AUGMENTATIONS = ("crop_flip", "rotate_flip")
CROP_PADDING = 4  # pixels, at 32×32
MAX_ANGLE = 20.0  # degrees
# Batches augmented together on an accelerator, where a batch alone is bound by kernel launches, and
# their bytes at most: from host memory the next are copied meanwhile.
_BATCHES_AT_ONCE, _BYTES_AT_ONCE = 16, 2**24
# Images evaluated at once: on a CPU, and on a GPU at 32×32 (of larger ones as many pixels).
_EVALUATED_AT_ONCE = {"cpu": 250, "cuda": 5000}
# Of the GPU memory that this process can have, what all images together may take.
_SHARE_FOR_IMAGES = 0.5


def augmentation_for(dataset: str) -> str:
    """The training augmentation of a clean set's name."""
    return "rotate_flip" if dataset == "tinyimagenet" else "crop_flip"


# ---------------------------------------------------------------------------------------------
# Augmentations: images (n, 3, H, W) of any dtype, parameters (n,), all on one device


def crop(images: Tensor, dy: Tensor, dx: Tensor, padding: int = CROP_PADDING) -> Tensor:
    """Crop each image, zero-padded by `padding`, at its offset (dy, dx) in 0..2·padding (int64)."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, 3, 2p+1, 2p+1, H, W), a view
    return windows[torch.arange(len(images), device=images.device), :, dy, dx]


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left to right the images where `flipped` (bool)."""
    # Choosing whole images copies memory in blocks: four times as fast as torch.where on a CPU.
    both = torch.stack([images, images.flip(3)], 1).flatten(0, 1)
    first = torch.arange(0, 2 * len(images), 2, device=images.device)
    return both.index_select(0, first + flipped)


def rotate(images: Tensor, angles: Tensor, flipped: Tensor | None = None) -> Tensor:
    """Turn each image counter-clockwise by its angle (degrees) about its centre.

    Nearest pixel, zero outside, size kept: torchvision.transforms.functional.rotate for a batch.
    Those `flipped` (bool) are mirrored left to right afterwards, which costs nothing here.
    """
    height, width = images.shape[-2:]
    turn = torch.deg2rad(angles.float())[:, None, None]
    cos, sin = turn.cos(), turn.sin()
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    if flipped is not None:
        x = torch.where(flipped[:, None, None], -x, x)
    # The source of each output pixel, y down, in an image with a border of one zero pixel, to which
    # everything outside is clamped.
    source_x = (cos * x + ((width + 1) / 2 - sin * y)).round_().clamp_(0, width + 1)
    source_y = (sin * x + ((height + 1) / 2 + cos * y)).round_().clamp_(0, height + 1)
    index = source_y.mul_(width + 2).add_(source_x).to(torch.int32).flatten(1)[:, None]
    bordered = F.pad(images, (1, 1, 1, 1)).flatten(2)
    return pick(bordered, index.expand(-1, images.shape[1], -1)).view(images.shape)


# ---------------------------------------------------------------------------------------------
# Loader


def fits(images: Tensor, device: str | torch.device) -> bool:
    """Whether a copy of `images` can lie on `device` and leave room for weights and activations."""
    device = torch.device(device)
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()  # what stays reserved is in use, or a CUDA graph's
    free, _ = torch.cuda.mem_get_info(device)
    kept = (1 - _SHARE_FOR_IMAGES) * (free + torch.cuda.memory_reserved(device))
    return images.nbytes <= free - kept


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which all loaders copy images to a GPU; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@dataclass(eq=False, repr=False)
class BatchLoader:
    """Iterate over (images float32 (n, 3, H, W) in [0, 1], labels int64 (n,)) on `device`.

    augment: None, "crop_flip" or "rotate_flip" (`augmentation_for`). shuffle: a new order every
    epoch, and a last batch of a single image is left out (batch norm can't train on one).
    resample: called with the number of each epoch, gives the images to use in it instead
    of the set's, for corruptions drawn anew. Order and augmentation of epoch e depend on (seed, e)
    and the torch version only; iterating once is one epoch. `state_dict` resumes at the epoch that
    comes next.
    rank, ranks: of so many processes that train together, the one this is. All draw alike; each
    gets its own part of every batch, batch_size / ranks images. With shuffle, a last batch of fewer
    than one image for each is left out too.
    resident: whether the images lie on the device or stay in host memory, which changes no batch;
    by itself (None) the device where they fit (`fits`). `residence` says which.
    Raises InputError for an empty set, a batch size below 1 or not a multiple of `ranks`, and an
    unknown augmentation.
    """

    image_set: InitVar[ImageSet]
    batch_size: int
    augment: str | None = None
    device: str | torch.device = "cpu"
    shuffle: bool = False
    seed: int = 0
    resample: Callable[[int], Tensor] | None = None
    rank: int = 0
    ranks: int = 1
    resident: bool | None = None
    epoch: int = field(default=0, init=False)  # the next one's number

    def __post_init__(self, image_set: ImageSet) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")
        if self.batch_size % self.ranks:
            raise InputError(
                f"--batch_size {self.batch_size}: must be a multiple of the {self.ranks} processes"
            )
        if self.augment not in (None, *AUGMENTATIONS):
            raise InputError(f"unknown augmentation {self.augment!r}: {', '.join(AUGMENTATIONS)}")
        if not len(image_set):
            raise InputError(f"{image_set.name}: no images to make batches of")
        self.device = torch.device(self.device)
        if self.resident is None:
            self.resident = image_set.images.is_cuda or fits(image_set.images, self.device)
        self.images = image_set.images.to(self.device if self.resident else "cpu")
        self.labels = image_set.labels.to(self.device)

    @property
    def residence(self) -> str:
        """Where the images lie, in words."""
        size = f"{self.images.nbytes / 1e6:,.0f} MB"
        if not self.resident:
            return f"{size} in host memory, copied to the device ahead of their batches"
        return f"{size} " + ("in memory" if self.device.type == "cpu" else "on the device")

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.images)
        if self.shuffle and 0 < count % self.batch_size < min(count, max(2, self.ranks)):
            return count // self.batch_size
        return math.ceil(count / self.batch_size)

    def whole_batch(self, number: int) -> int:
        """Images in batch `number` (from 0) of an epoch, those of all processes together."""
        return min(self.batch_size, len(self.images) - number * self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs: the seed and the number of the next epoch."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(stable_seed("loader", self.seed, self.epoch))
        if self.resample is not None:
            place = self.images.device
            del self.images  # room for the new ones
            self.images = self.resample(self.epoch).to(place)
        self.epoch += 1
        count = min(len(self.images), len(self) * self.batch_size)
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(len(self.images), generator=generator)[:count]
        draws = self._draw(count, generator)
        if self.ranks > 1:
            part = self._part(count)
            order, draws = order[part], [draw[part] for draw in draws]
            count = len(part)
        size, together = self.batch_size // self.ranks, self._together()
        chunks = [slice(start, start + together) for start in range(0, count, together)]
        rows, (order, *draws) = order, map(self._to_device, (order, *draws))
        places = order if self.resident else rows
        for chosen, images in zip(chunks, self._fetch(places[c] for c in chunks), strict=True):
            images = self._apply(images, [draw[chosen] for draw in draws])
            labels = self.labels[order[chosen]]
            for batch, its_labels in zip(images.split(size), labels.split(size), strict=True):
                yield batch.float().div_(255), its_labels

    def _part(self, count: int) -> Tensor:
        """Which of an epoch's `count` images are this process's, int64, in order.

        Of a last, smaller batch the processes' parts differ in size by one image at most.
        """
        places = torch.arange(count)
        full = count - count % self.batch_size
        batches = places[:full].view(-1, self.ranks, self.batch_size // self.ranks)
        last = places[full:].tensor_split(self.ranks)[self.rank]
        return torch.cat([batches[:, self.rank].flatten(), last])

    def _fetch(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images at each chunk of rows (int64, where the images lie), on the device.

        From host memory a chunk ahead: while one is in use, the next is gathered into pinned memory
        and copied to a GPU on a stream of its own.
        """
        if self.resident:
            yield from (self.images.index_select(0, rows) for rows in chunks)
            return
        stream = _copy_stream(self.device)

        def send(rows: Tensor) -> Tensor:
            shape = (len(rows), *self.images.shape[1:])
            buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=stream is not None)
            torch.index_select(self.images, 0, rows, out=buffer)
            with torch.cuda.stream(stream):  # without a GPU it is None, and this does nothing
                # PyTorch reuses the pinned memory when the copy is done, not before.
                return buffer.to(self.device, non_blocking=True)

        sent = map(send, chunks)
        ahead = next(sent, None)
        while ahead is not None:
            images = ahead
            if stream is not None:
                user = torch.cuda.current_stream(self.device)
                user.wait_stream(stream)
                images.record_stream(user)  # its memory is that stream's until the user is done
            ahead = next(sent, None)
            yield images

    def _to_device(self, drawn: Tensor) -> Tensor:
        """`drawn` on the device, without waiting for it."""
        if self.device.type != "cuda":
            return drawn.to(self.device)
        return drawn.pin_memory().to(self.device, non_blocking=True)

    def _together(self) -> int:
        """Images augmented at once: on a CPU one batch, which stays in the caches."""
        size = self.batch_size // self.ranks
        if self.device.type == "cpu":
            return size
        most = _BYTES_AT_ONCE // (size * math.prod(self.images.shape[1:]))
        return size * min(max(1, most), _BATCHES_AT_ONCE)

    def _draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Augmentation parameters, each (count,), of the whole epoch in a few kernels."""
        if self.augment is None:
            return []
        flips = torch.rand(count, generator=generator) < 0.5
        if self.augment == "crop_flip":
            span = 2 * self._padding() + 1
            return [*torch.randint(span, (2, count), generator=generator), flips]
        return [(torch.rand(count, generator=generator) * 2 - 1) * MAX_ANGLE, flips]

    def _apply(self, images: Tensor, draws: list[Tensor]) -> Tensor:
        if self.augment == "crop_flip":
            dy, dx, flips = draws
            return flip(crop(images, dy, dx, self._padding()), flips)
        if self.augment == "rotate_flip":
            angles, flips = draws
            return rotate(images, angles, flips)
        return images

    def _padding(self) -> int:
        """CROP_PADDING at 32 pixels, in proportion at other sizes."""
        return max(1, round(CROP_PADDING * self.images.shape[-1] / 32))


def evaluation_batches(
    images: ImageSet, device: str | torch.device, batch_size: int | None = None
) -> BatchLoader:
    """`images` as they are and in order, in batches of a size that suits `device`.

    Of several processes that train together each gets its part of every batch.
    """
    device = torch.device(device)
    if batch_size is None and device.type == "cuda":
        height, width = images.images.shape[-2:]
        batch_size = max(1, _EVALUATED_AT_ONCE["cuda"] * 32 * 32 // (height * width))
    rank, ranks = distributed.rank(), distributed.ranks()
    whole = (batch_size or _EVALUATED_AT_ONCE["cpu"]) * ranks
    return BatchLoader(images, whole, device=device, rank=rank, ranks=ranks)
