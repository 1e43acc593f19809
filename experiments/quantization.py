"""How many bits are enough: RA and TA over the bytes on disk, bits × layers kept (claim 4)."""

from collections.abc import Iterator
from pathlib import Path

from experiments import plots, tables
from experiments.tables import FAILS, HOLDS, PARTLY, PATCHED, ROBUST
from utils.signature import Method

CLAIM = "A signature is up to 13 times smaller than a full copy of the weights, with little loss."
RULE = (
    "At most 1 point of RA below the float32 signature at 1/13 of a full copy or less (partly: at "
    "more), of the number of layers nearest to 7."
)


def measure(study) -> Iterator[dict]:
    form = {"scheme": study.method.scheme, "per_channel": study.method.per_channel}
    for run in study.patchings():
        for name in run.args.corruption:
            for row in study.bounds(run, name):
                yield row | {"bytes": study.full_copy(run) if row["model"] == ROBUST else 0}
            for k in study.args.keep_nums:
                signature = run.signature(name, keep_num=k)
                for bits in (32, *study.args.bits):
                    kept = signature if bits == 32 else signature.quantize(2**bits, **form)
                    result = run.with_patch([kept], [1.0], [name])
                    what = {"keep_num": k, "bits": bits, "bytes": study.bytes_of(kept)}
                    yield study.row(run, name, PATCHED, result, **what)


def table(rows: list[dict], study) -> tables.Table:
    full = max(row["bytes"] for row in rows)

    def label(row: dict) -> tuple[str]:
        if "bits" not in row:
            return (row["model"],)
        return (f"keep_num {row['keep_num']}, " + plots.bits_words(row["bits"]),)

    def part(of_line: list[dict]) -> str | None:
        size = tables.mean(of_line, "bytes")
        return f"1/{full / size:,.0f}" if size else None

    extra = {"bytes": lambda of_line: f"{tables.mean(of_line, 'bytes'):,.0f}"}
    extra["of a full copy"] = part
    made = tables.accuracies(rows, ["signature"], label, extra)
    ranges = "output channel" if study.method.per_channel else "tensor"
    made.note = f"Levels: {study.method.scheme}, a range per {ranges}."
    return made


def figure(rows: list[dict], path: Path) -> None:
    plots.storage(rows, path)


def verdict(rows: list[dict]) -> tables.Verdict:
    rows = tables.of_whole_seeds(rows)
    patched = tables.select(rows, model=PATCHED)
    k = min(tables.distinct(patched, "keep_num"), key=lambda k: abs(k - Method.keep_num))
    patched = tables.select(patched, keep_num=k)
    ra = {b: tables.mean(patched, "RA", bits=b) for b in tables.distinct(patched, "bits")}
    fit = [bits for bits in ra if bits < 32 and ra[bits] >= ra[32] - 1]
    if not fit:
        return FAILS, f"every quantized form loses more than 1 point of RA below {ra[32]:.1f}"
    smallest = min(fit)
    ratio = max(row["bytes"] for row in rows) / tables.mean(patched, "bytes", bits=smallest)
    words = (
        f"{k} layers at {smallest} bits a value take 1/{ratio:.0f} of a full copy, "
        f"RA {ra[smallest]:.1f} against {ra[32]:.1f} in float32"
    )
    return (HOLDS if ratio >= 13 else PARTLY), words
