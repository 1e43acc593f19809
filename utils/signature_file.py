"""The packed form of a signature: one file that `torch.load(weights_only=True)` reads.

`meta` (plain values), `payload` (one uint8 tensor: each tensor's codes at ⌈log2 N⌉ bits, or its
float32 bytes, end to end) and `checksum` (SHA-256 over both). Version 2 adds `SECTIONS`, which may
be empty; version 1 is read too.

    python -m utils.signature_file show fog.rws
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor

from models import ARCHS
from models.layers import LAYERS
from utils import checkpoint, learn, quantize
from utils.arguments import Parser
from utils.errors import InputError, script_errors
from utils.files import AnyPath
from utils.signature import Method, RobustWeightSignature

FORMAT = "robust-weight-signature"
VERSION = 2
SECTIONS = ("statistics", "fingerprint", "weights")  # float32 tensors by name behind the signature
# What a file says of a signature beside its tensors, and the type of each.
FACTS = {"arch": str, "method": dict, "severity": int | None}
FACTS |= dict.fromkeys(("corruptions", "robust"), list)
FACTS |= dict.fromkeys(("dataset", "pretrained", "standard"), str | None)


def save(signature: RobustWeightSignature, path: AnyPath) -> int:
    """Write `signature` to `path` atomically; gives its size in bytes."""
    packed = [_pack(k, t, signature.codes.get(k)) for k, t in signature.tensors.items()]
    meta = {name: getattr(signature, name) for name in FACTS}
    meta |= {"corruptions": list(signature.corruptions), "robust": list(signature.robust)}
    meta |= {"method": asdict(signature.method), "tensors": [entry for entry, _ in packed]}
    for section in SECTIONS:
        more = [_pack(k, t, None) for k, t in getattr(signature, section).items()]
        meta[section] = [entry for entry, _ in more]
        packed += more
    payload = torch.cat([torch.empty(0, dtype=torch.uint8), *(data for _, data in packed)])
    document = {"format": FORMAT, "version": VERSION, "meta": meta, "payload": payload}
    checkpoint.save({**document, "checksum": _checksum(meta, payload)}, path)
    return Path(path).stat().st_size


def load(path: AnyPath) -> RobustWeightSignature:
    """Read a file that `save` wrote.

    Raises InputError naming the file when it is missing, damaged, truncated, of another version,
    or no signature at all.
    """
    document = checkpoint.read(path, "signature")
    try:
        if document.get("format") != FORMAT:
            raise InputError("not a signature file (made by model_patching.py)")
        if document["version"] not in (1, VERSION):
            told = f"this code reads 1 to {VERSION}"
            raise InputError(f"signature format {document['version']}, {told}")
        meta, payload = document["meta"], document["payload"]
        if not checkpoint.is_plain(payload) or payload.dtype != torch.uint8:
            raise InputError("not a signature file, its payload is not bytes")
        if _checksum(meta, payload) != document["checksum"]:
            raise InputError("checksum mismatch, the signature file is damaged")
        return _unpack_all(meta, payload)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # parts that are missing or of other types than `save` writes
        raise InputError(f"{path}: not a valid signature ({error})") from error


def _unpack_all(meta: dict, payload: Tensor) -> RobustWeightSignature:
    if "method" not in meta:  # files of before, which don't say whether it was projected
        form = meta["quantization"] or {}
        form |= {"scheme": form.pop("method")} if form else {}
        layers = meta.get("layers", "shallowest")
        meta["method"] = {"keep_num": meta["keep_num"], "layers": layers, **form}
    method = Method(**meta["method"])
    _check(meta, method)
    told = [(part, entry) for part in ("tensors", *SECTIONS) for entry in meta.get(part, ())]
    content, codes = {part: {} for part in ("tensors", *SECTIONS)}, {}
    parts = payload.split([entry["bytes"] for _, entry in told])
    for (part, entry), data in zip(told, parts, strict=True):
        content[part][entry["key"]], quantized = _unpack(entry, data)
        if part == "tensors" and quantized is not None:
            codes[entry["key"]] = quantized
    facts = {name: meta[name] for name in FACTS} | {"method": method}
    facts |= {"corruptions": tuple(meta["corruptions"]), "robust": tuple(meta["robust"])}
    return RobustWeightSignature(**content, codes=codes, **facts)


def _check(meta: dict, method: Method) -> None:
    """Raise InputError where a fact about a signature is not of its kind."""
    told, kinds = meta | asdict(method), FACTS | get_type_hints(Method)
    wrong = [name for name, kind in kinds.items() if not isinstance(told[name], kind)]
    texts = [*meta["corruptions"], *meta["robust"]]
    texts += [entry["key"] for part in ("tensors", *SECTIONS) for entry in meta.get(part, ())]
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
    entry = {"key": key, "shape": list(tensor.shape), "kind": "float32"}
    if q is None:
        data = _bytes_of(tensor.float())
    else:
        bits = quantize.bits_per_code(q.levels)
        parts = [_bytes_of(q.low), _bytes_of(q.high), quantize.pack_bits(q.codes, bits)]
        if q.zeros is not None:
            parts.append(quantize.pack_bits(q.zeros, 1))
        data = torch.cat(parts)
        entry |= {"kind": q.method, "levels": q.levels}
        entry |= {"groups": q.low.numel(), "zeros": q.zeros is not None}
    return entry | {"bytes": data.numel()}, data


def _unpack(entry: dict, data: Tensor) -> tuple[Tensor, quantize.Quantized | None]:
    """The inverse of `_pack`; `split` and `reshape` raise where there are more bytes or fewer."""
    shape, levels = torch.Size(entry["shape"]), entry.get("levels")
    if entry["kind"] == "float32":
        return data.clone().view(torch.float32).reshape(shape), None
    quantize.check_levels(levels, entry["kind"])
    bits, groups, count = quantize.bits_per_code(levels), entry["groups"], shape.numel()
    if groups not in (1, *shape[:1]):
        raise InputError(f"{entry['key']}: {groups} ranges for a tensor of {tuple(shape)}")
    sizes = [4 * groups, 4 * groups, -(-count * bits // 8), -(-count // 8)]
    low, high, codes, *zeros = data.split(sizes if entry["zeros"] else sizes[:3])
    q = quantize.Quantized(
        quantize.unpack_bits(codes, bits, count),
        low.clone().view(torch.float32),
        high.clone().view(torch.float32),
        shape,
        levels,
        entry["kind"],
        quantize.unpack_bits(zeros[0], 1, count).bool() if zeros else None,
    )
    return quantize.decode(q), q


# ---- show -----------------------------------------------------------------------------------


def describe(path: AnyPath) -> str:
    """What a signature file holds, as text: provenance, method, bytes, norm of each tensor."""
    s = load(path)
    m = s.method
    form = "float32"
    if m.levels is not None:
        form = f"{m.levels} levels, {m.scheme}, {quantize.bits_per_code(m.levels)} bits"
        form += ", range per channel" if m.per_channel else ""
        form += ", batch norm in float32" if m.bn_float else ""
    values = sum(tensor.numel() for tensor in s.tensors.values())
    told = [m.ablation()]
    if "method" not in checkpoint.read(path)["meta"]:
        told.append("projection not recorded")
    made = ", ".join(filter(None, told)) or "as in the paper"
    kept = ", ".join(section for section in SECTIONS if getattr(s, section))
    lines = [
        f"corruption   {s.name}" + (f", severity {s.severity}" if s.severity else ""),
        f"arch         {s.arch}, keep_num {m.keep_num}, {made}",
        f"data set     {s.dataset or 'not recorded'}",
        f"from         θ_pre {s.pretrained}  θ_std {s.standard}  θ_c {', '.join(s.robust)}",
        f"stored as    {form}",
        f"size         {Path(path).stat().st_size:,} bytes for {values:,} values"
        + (f" and {kept}" if kept else ""),
        *learn.words(s),
        "",
        f"{'tensor':<32} {'shape':<20} {'norm':>10}",
    ]
    for key, tensor in s.tensors.items():
        shape = "×".join(str(n) for n in tensor.shape)
        lines.append(f"{key:<32} {shape:<20} {tensor.norm().item():>10.4g}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    with script_errors():
        parser = Parser(__doc__, prog="python -m utils.signature_file")
        parser.add_argument("command", choices=["show"], help="print what a signature file holds")
        parser.add_argument("file", help="a .rws file")
        print(describe(parser.parse_args().file))


if __name__ == "__main__":
    main()
