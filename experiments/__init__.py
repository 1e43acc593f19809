"""The experiments, one file each, in the order of the report."""

from __future__ import annotations

from experiments import (
    alpha,
    compose,
    consistency,
    keep_num,
    layers,
    main,
    quantization,
    similarity,
    transfer,
)

EXPERIMENTS = {
    "main": main,
    "layers": layers,
    "similarity": similarity,
    "consistency": consistency,
    "keep_num": keep_num,
    "quantization": quantization,
    "alpha": alpha,
    "compose": compose,
    "transfer": transfer,
}
