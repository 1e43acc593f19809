"""The experiments, one file each, in the order of the report.

A module has CLAIM (what is to be checked), RULE (by which it is judged; those of layers, keep_num,
quantization and transfer were revised after first measurements), and
    measure(study) → rows           {"seed", "corruption", "model", "TA", "RA" or "value", **knobs}
    table(rows, study) → tables.Table
    figure(rows, path)              a PNG
    verdict(rows) → (tables.HOLDS, PARTLY, FAILS or UNTOLD, a sentence)
    jobs(study) → list of Job       extra models that it needs; left out where there are none
"""

from experiments import (
    alpha,
    choose,
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
    "choose": choose,
}
