"""The packed form of a signature: one file that `torch.load(weights_only=True)` reads.

`meta` (plain values), `payload` (one uint8 tensor: each tensor's codes at ⌈log2 N⌉ bits, or its
float32 bytes, end to end) and `checksum` (SHA-256 over both).

    python -m utils.signature_file show fog.rws
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from models import ARCHS
from models.layers import LAYERS
from utils import checkpoint, quantize
from utils.errors import InputError, script_errors
from utils.signature import Method, RobustWeightSignature

FORMAT = "robust-weight-signature"
VERSION = 1
# What a file says of a signature beside its tensors, and the type of each.
FACTS = {
    **{"arch": str, "method": dict, "corruptions": list, "severity": int, "dataset": str},
    **{"pretrained": str, "standard": str, "robust": list},
}
OPTIONAL = ("severity", "dataset", "pretrained", "standard")


def save(signature: RobustWeightSignature, path: str | os.PathLike) -> int:
    """Write `signature` to `path` atomically; gives its size in bytes."""
    packed = [_pack(k, t, signature.codes.get(k)) for k, t in signature.tensors.items()]
    facts = {name: getattr(signature, name) for name in FACTS}
    facts = {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()}
    meta = {**facts, "method": asdict(signature.method), "tensors": [entry for entry, _ in packed]}
    payload = torch.cat([torch.empty(0, dtype=torch.uint8), *(data for _, data in packed)])
    document = {"format": FORMAT, "version": VERSION, "meta": meta, "payload": payload}
    checkpoint.save({**document, "checksum": _checksum(meta, payload)}, path)
    return Path(path).stat().st_size


def load(path: str | os.PathLike) -> RobustWeightSignature:
    """Read a file that `save` wrote.

    Raises InputError naming the file when it is missing, damaged, truncated, of another version,
    or no signature at all.
    """
    document = checkpoint.read(path, "signature")
    form, version = document.get("format"), document.get("version")
    if not isinstance(form, str) or form != FORMAT:
        raise InputError(f"{path}: not a signature file (made by model_patching.py)")
    if not isinstance(version, int) or version != VERSION:
        raise InputError(f"{path}: signature format {version}, this code reads {VERSION}")
    try:
        meta, payload = document["meta"], document["payload"]
        if not checkpoint.is_plain(payload) or payload.dtype != torch.uint8:
            raise ValueError("payload")
        intact = _checksum(meta, payload) == document["checksum"]
    except Exception as error:
        raise InputError(f"{path}: damaged signature file") from error
    if not intact:
        raise InputError(f"{path}: checksum mismatch, the signature file is damaged")
    try:
        return _unpack_all(meta, payload)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a file made by hand, with a valid checksum and odd contents
        raise InputError(f"{path}: not a valid signature ({error})") from error


def _unpack_all(meta: dict, payload: Tensor) -> RobustWeightSignature:
    if "method" not in meta:  # files of before, which don't say whether it was projected
        form = meta["quantization"] or {}
        form |= {"scheme": form.pop("method")} if form else {}
        layers = meta.get("layers", "shallowest")
        meta["method"] = {"keep_num": meta["keep_num"], "layers": layers, **form}
    _check(meta)
    tensors, codes, start = {}, {}, 0
    for entry in meta["tensors"]:
        data = payload[start : start + entry["bytes"]]
        if data.numel() != entry["bytes"]:
            raise InputError(f"{entry['key']}: the payload is too short")
        start += entry["bytes"]
        tensors[entry["key"]], quantized = _unpack(entry, data)
        if quantized is not None:
            codes[entry["key"]] = quantized
    if start != payload.numel():
        raise InputError("the payload is longer than its tensors")
    facts = {name: meta[name] for name in FACTS} | {"method": Method(**meta["method"])}
    facts = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
    return RobustWeightSignature(tensors=tensors, codes=codes, **facts)


def _check(meta: dict) -> None:
    """Raise InputError where a fact about a signature is not of its kind."""
    method = Method(**meta["method"])
    told, optional = meta | asdict(method), (*OPTIONAL, "levels")
    kinds = FACTS | {f.name: type(f.default) for f in fields(Method)} | {"levels": int}
    wrong = [
        name
        for name, kind in kinds.items()
        if not isinstance(told[name], kind) and not (told[name] is None and name in optional)
    ]
    texts = [*meta["corruptions"], *meta["robust"], *(entry["key"] for entry in meta["tensors"])]
    if not all(isinstance(text, str) for text in texts):
        wrong.append("a name")
    known = {"arch": ARCHS, "layers": LAYERS, "severity": (None, 1, 2, 3, 4, 5)}
    wrong += [name for name, values in known.items() if told[name] not in values]
    if wrong:
        raise InputError(f"not a valid signature: {', '.join(wrong)}")
    if method.levels is not None:
        quantize.check_levels(method.levels, method.scheme)


def _checksum(meta: dict, payload: Tensor) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    digest.update(payload.contiguous().numpy())
    return digest.hexdigest()


# ---- one tensor -----------------------------------------------------------------------------


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _pack(key: str, tensor: Tensor, q: quantize.Quantized | None) -> tuple[dict, Tensor]:
    """One tensor as (its entry in the file's table, its bytes)."""
    entry = {"key": key, "shape": list(tensor.shape)}
    if q is None:
        data = _bytes_of(tensor.float())
        entry |= {"kind": "float32"}
    else:
        bits = quantize.bits_per_code(q.levels)
        parts = [_bytes_of(q.low), _bytes_of(q.high), quantize.pack_bits(q.codes, bits)]
        if q.zeros is not None:
            parts.append(quantize.pack_bits(q.zeros.to(torch.int32), 1))
        data = torch.cat(parts)
        entry |= {"kind": q.method, "levels": q.levels}
        entry |= {"groups": q.low.numel(), "zeros": q.zeros is not None}
    return entry | {"bytes": data.numel()}, data


def _unpack(entry: dict, data: Tensor) -> tuple[Tensor, quantize.Quantized | None]:
    shape = torch.Size(entry["shape"])
    count = shape.numel()
    if entry["kind"] == "float32":
        if data.numel() != 4 * count:
            raise InputError(f"{entry['key']}: {data.numel()} bytes for {count} float32 values")
        return data.clone().view(torch.float32).reshape(shape), None
    quantize.check_levels(entry["levels"], entry["kind"])
    bits, groups = quantize.bits_per_code(entry["levels"]), entry["groups"]
    sizes = [4 * groups, 4 * groups, -(-count * bits // 8)]
    if entry["zeros"]:
        sizes.append(-(-count // 8))
    if sum(sizes) != data.numel() or groups not in (1, *shape[:1]):
        raise InputError(f"{entry['key']}: {data.numel()} bytes, its table entry says {sum(sizes)}")
    low, high, codes, *zeros = data.split(sizes)
    q = quantize.Quantized(
        codes=quantize.unpack_bits(codes, bits, count),
        low=low.clone().view(torch.float32),
        high=high.clone().view(torch.float32),
        shape=shape,
        levels=entry["levels"],
        method=entry["kind"],
        zeros=quantize.unpack_bits(zeros[0], 1, count).bool() if zeros else None,
    )
    return quantize.decode(q), q


# ---- show -----------------------------------------------------------------------------------


def describe(path: str | os.PathLike) -> str:
    """What a signature file holds, as text: provenance, method, bytes, norm of each tensor."""
    s = load(path)
    m = s.method
    form = "float32"
    if m.levels is not None:
        form = f"{m.levels} levels, {m.scheme}, {quantize.bits_per_code(m.levels)} bits"
        form += ", range per channel" if m.per_channel else ""
        form += ", batch norm in float32" if m.bn_float else ""
    values = sum(tensor.numel() for tensor in s.tensors.values())
    projected = "clean fine-tuning projected out" if m.project else "NOT projected"
    if "method" not in checkpoint.read(path)["meta"]:
        projected = "projection not recorded"
    lines = [
        f"corruption   {s.name}" + (f", severity {s.severity}" if s.severity else ""),
        f"arch         {s.arch}, the {m.keep_num} {m.layers} layers, {projected}",
        f"data set     {s.dataset or 'not recorded'}",
        f"from         θ_pre {s.pretrained}  θ_std {s.standard}  θ_c {', '.join(s.robust)}",
        f"stored as    {form}",
        f"size         {Path(path).stat().st_size:,} bytes for {values:,} values",
        "",
        f"{'tensor':<32} {'shape':<20} {'norm':>10}",
    ]
    for key, tensor in s.tensors.items():
        shape = "×".join(str(n) for n in tensor.shape)
        lines.append(f"{key:<32} {shape:<20} {tensor.norm().item():>10.4g}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.signature_file", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print what a signature file holds")
    show.add_argument("file", help="a .rws file")
    args = parser.parse_args()
    with script_errors():
        print(describe(args.file))


if __name__ == "__main__":
    main()
