"""Small data sets kept as folders of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_folders(
    root: Path,
    counts: Mapping[str, int | Sequence[int]],
    size: tuple[int, int] = (32, 32),
    levels: int = 256,
    step: int = 0,
    classes: str = "ab",
) -> None:
    """Write PNG files of noise to root/part/class/0.png …, the same on every call.

    counts: images of each class in each part, one number or one for each class; size: width and
    height. A value is drawn from `levels` of them, and each class is brighter than the last by
    `step`.
    """
    rng = np.random.default_rng(0)
    for part, count in counts.items():
        each = [count] * len(classes) if isinstance(count, int) else count
        for label, (name, n) in enumerate(zip(classes, each, strict=True)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, levels, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels + np.uint8(step * label)).save(folder / f"{i}.png")
