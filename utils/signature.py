"""Robust Weight Signatures: extract, scale, add, quantize, keep in a file, put on and take off.

Equations of the paper (tensor by tensor, l a state-dict key):

    Δ_std[l] = θ_std[l] − θ_pre[l]          Δ_c[l] = θ_c[l] − θ_pre[l]
    RWS_c[l] = Δ_c[l] − (⟨Δ_c[l], Δ_std[l]⟩ / ⟨Δ_std[l], Δ_std[l]⟩) · Δ_std[l]
    θ_patched[l] = θ_target[l] + Σ_c w_c · RWS_c[l]      l in the keep_num shallowest layers

    signature = RobustWeightSignature.extract(pretrained, standard, robust, keep_num=5)
    with patch(model, signature):       # robust in here, the intact model again behind it
        ...

Look inside a file:  python -m utils.signature show gaussian_noise.rws
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models import ARCHS
from models.layers import carried_keys, infer_arch, is_carried, layer_keys
from utils import quantize as quantizer
from utils.checkpoint import backbone_hash, is_plain, read, read_state_dict, save
from utils.errors import InputError, script_errors

FORMAT = "robust-weight-signature"
VERSION = 1
StateDict = Mapping[str, Tensor]


def project_out(delta: Tensor, base: Tensor) -> Tensor:
    """`delta` less its component along `base`: Δ_c − (⟨Δ_c, Δ_std⟩ / ⟨Δ_std, Δ_std⟩) · Δ_std.

    Any shape (each tensor is one flattened vector), float; O(n) time and memory, the two dot
    products in float64. Where `base` is all zero nothing is projected out.
    """
    if delta.shape != base.shape:
        raise InputError(f"shapes differ: {tuple(delta.shape)} and {tuple(base.shape)}")
    d, b = delta.flatten().double(), base.flatten().double()
    norm = torch.dot(b, b)
    coefficient = torch.where(norm > 0, torch.dot(d, b) / norm, torch.zeros_like(norm))
    return delta - coefficient.to(delta.dtype) * base


@dataclass(frozen=True)
class Quantization:
    """How a signature is stored: number of levels, method, range per channel, BN kept as floats."""

    levels: int
    method: str = "linear"
    per_channel: bool = False
    bn_float: bool = False


@dataclass
class RobustWeightSignature:
    """What to add to a standard model: float32 tensors by state-dict key, and where they are from.

    For a VGG these are the projected differences of the `keep_num` shallowest layers; for a ResNet
    also θ_c − θ_std of the batch-norm affine parameters and downsample branches of every stage.
    `pretrained`, `standard` and `robust` are hashes of the source backbones
    (`utils.checkpoint.backbone_hash`). Raises InputError for NaN or Inf inside.
    """

    tensors: dict[str, Tensor]
    arch: str
    keep_num: int
    layers: str = "shallowest"
    corruptions: tuple[str, ...] = ()
    severity: int | None = None
    dataset: str | None = None
    pretrained: str | None = None
    standard: str | None = None
    robust: tuple[str, ...] = ()
    quantization: Quantization | None = None
    codes: dict[str, quantizer.Quantized] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"signature of {self.name}: NaN or Inf in {key}")

    @property
    def name(self) -> str:
        """The corruptions that it is against, e.g. "fog+snow"."""
        return "+".join(self.corruptions) or "unnamed"

    @classmethod
    def extract(
        cls,
        pretrained: StateDict | str | os.PathLike,
        standard: StateDict | str | os.PathLike,
        robust: StateDict | str | os.PathLike,
        keep_num: int,
        *,
        arch: str | None = None,
        corruption: str | None = None,
        severity: int | None = None,
        dataset: str | None = None,
        project: bool = True,
        layers: str = "shallowest",
        seed: int = 0,
    ) -> RobustWeightSignature:
        """RWS of θ_robust against θ_standard, both fine-tuned from θ_pretrained.

        The three are state dicts or checkpoint files; `arch` is read off the keys when not given.
        Ablations: `project=False` leaves the projection out (plain task arithmetic); `layers`
        "deepest" or "random" (drawn from `seed`) keeps other layers than the shallowest.
        Raises InputError when a key is missing, a shape differs or a value is not finite.
        """
        states = {}
        for role, source in (
            ("pretrained", pretrained),
            ("standard", standard),
            ("robust", robust),
        ):
            states[role] = source if isinstance(source, Mapping) else read_state_dict(source)
        arch = arch or infer_arch(states["standard"])
        if arch is None:
            raise InputError("the standard model's keys fit none of the known architectures")
        keys = layer_keys(arch, keep_num, layers, seed)
        keys += [key for key in carried_keys(arch) if key not in keys]
        _check_same_shapes(states, keys)
        tensors = {}
        with torch.no_grad():
            for key in keys:
                θ_pre, θ_std, θ_c = (states[r][key].float() for r in states)
                if is_carried(arch, key):
                    tensors[key] = θ_c - θ_std
                else:
                    Δ_std, Δ_c = θ_std - θ_pre, θ_c - θ_pre
                    tensors[key] = project_out(Δ_c, Δ_std) if project else Δ_c
        if not any(bool(t.any()) for t in tensors.values()):
            warnings.warn("the signature is zero: its source models are identical", stacklevel=2)
        return cls(
            tensors=tensors,
            arch=arch,
            keep_num=keep_num,
            layers=layers,
            corruptions=(corruption,) if corruption else (),
            severity=severity,
            dataset=dataset,
            pretrained=backbone_hash(states["pretrained"]),
            standard=backbone_hash(states["standard"]),
            robust=(backbone_hash(states["robust"]),),
        )

    # ---- algebra -------------------------------------------------------------------------

    def scale(self, w: float) -> RobustWeightSignature:
        """w · RWS."""
        return replace(
            self,
            tensors={k: t * w for k, t in self.tensors.items()},
            quantization=None,
            codes={},
        )

    def __add__(self, other: RobustWeightSignature | int) -> RobustWeightSignature:
        """RWS_a + RWS_b, for patching against both; a key that only one holds is taken as it is."""
        if isinstance(other, int) and other == 0:  # the start value of sum()
            return self
        if self.arch != other.arch:
            raise InputError(f"a signature of {self.arch} can't be added to one of {other.arch}")
        tensors = dict(self.tensors)
        for key, tensor in other.tensors.items():
            if key in tensors and tensors[key].shape != tensor.shape:
                raise InputError(
                    f"signatures of {self.name} and {other.name} differ in the shape of {key}: "
                    f"{tuple(tensors[key].shape)} and {tuple(tensor.shape)}"
                )
            tensors[key] = tensors[key] + tensor if key in tensors else tensor
        return RobustWeightSignature(
            tensors=tensors,
            arch=self.arch,
            keep_num=max(self.keep_num, other.keep_num),
            layers=self.layers,
            corruptions=(*self.corruptions, *other.corruptions),
            severity=self.severity if self.severity == other.severity else None,
            dataset=self.dataset if self.dataset == other.dataset else None,
            pretrained=self.pretrained if self.pretrained == other.pretrained else None,
            standard=self.standard if self.standard == other.standard else None,
            robust=(*self.robust, *other.robust),
        )

    __radd__ = __add__

    def to(self, device: torch.device | str) -> RobustWeightSignature:
        """The same signature with its tensors on `device`: patching there then copies nothing."""
        return replace(self, tensors={k: t.to(device) for k, t in self.tensors.items()})

    # ---- storage -------------------------------------------------------------------------

    def quantize(
        self,
        levels: int,
        method: str = "linear",
        *,
        per_channel: bool = False,
        bn_float: bool = False,
    ) -> RobustWeightSignature:
        """Every tensor replaced by its `levels` levels (`utils.quantize`), and saved as codes.

        `bn_float` leaves the batch-norm and downsample tensors of a ResNet in float32.
        """
        quantizer.check_levels(levels, method)
        codes = {
            key: quantizer.encode(tensor.cpu(), levels, method, per_channel)
            for key, tensor in self.tensors.items()
            if not (bn_float and is_carried(self.arch, key))
        }
        return replace(
            self,
            tensors={
                key: quantizer.decode(codes[key]).to(tensor.device) if key in codes else tensor
                for key, tensor in self.tensors.items()
            },
            quantization=Quantization(levels, method, per_channel, bn_float),
            codes=codes,
        )

    def save(self, path: str | os.PathLike) -> int:
        """Write the packed signature to `path` atomically; gives its size in bytes.

        One torch file that `torch.load(weights_only=True)` reads: `meta` (plain values), `payload`
        (one uint8 tensor: each tensor's codes at ⌈log2 N⌉ bits, or its float32 bytes, end to end)
        and `checksum` (SHA-256 over both).
        """
        entries, chunks = [], []
        for key, tensor in self.tensors.items():
            entry, data = _pack(key, tensor, self.codes.get(key))
            entries.append(entry)
            chunks.append(data)
        meta = {
            "arch": self.arch,
            "keep_num": self.keep_num,
            "layers": self.layers,
            "corruptions": list(self.corruptions),
            "severity": self.severity,
            "dataset": self.dataset,
            "pretrained": self.pretrained,
            "standard": self.standard,
            "robust": list(self.robust),
            "quantization": asdict(self.quantization) if self.quantization else None,
            "tensors": entries,
        }
        payload = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "meta": meta,
            "payload": payload,
            "checksum": _checksum(meta, payload),
        }
        save(document, path)
        return Path(path).stat().st_size

    @classmethod
    def load(cls, path: str | os.PathLike) -> RobustWeightSignature:
        """Read a file that `save` wrote.

        Raises InputError naming the file when it is missing, damaged, truncated, of a newer
        version, or no signature at all.
        """
        document = read(path, "signature")
        form, version = document.get("format"), document.get("version")
        if not isinstance(form, str) or form != FORMAT:
            raise InputError(f"{path}: not a signature file (made by model_patching.py)")
        if not isinstance(version, int) or version != VERSION:
            raise InputError(f"{path}: signature format {version}, this code reads {VERSION}")
        try:
            meta, payload = document["meta"], document["payload"]
            if not is_plain(payload) or payload.dtype != torch.uint8:
                raise ValueError("payload")
            intact = _checksum(meta, payload) == document["checksum"]
        except Exception as error:
            raise InputError(f"{path}: damaged signature file") from error
        if not intact:
            raise InputError(f"{path}: checksum mismatch, the signature file is damaged")
        try:
            return cls._from_meta(meta, payload)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # a file made by hand, with a valid checksum and odd contents
            raise InputError(f"{path}: not a valid signature ({error})") from error

    @classmethod
    def _from_meta(cls, meta: dict, payload: Tensor) -> RobustWeightSignature:
        _check_meta(meta)
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
        return cls(
            tensors=tensors,
            arch=meta["arch"],
            keep_num=meta["keep_num"],
            layers=meta.get("layers", "shallowest"),
            corruptions=tuple(meta["corruptions"]),
            severity=meta["severity"],
            dataset=meta["dataset"],
            pretrained=meta["pretrained"],
            standard=meta["standard"],
            robust=tuple(meta["robust"]),
            quantization=Quantization(**meta["quantization"]) if meta["quantization"] else None,
            codes=codes,
        )


def _check_same_shapes(states: Mapping[str, StateDict], keys: Iterable[str]) -> None:
    for key in keys:
        shapes = {}
        for role, state in states.items():
            if key not in state:
                raise InputError(f"the {role} model has no {key}")
            shapes[role] = tuple(state[key].shape)
            if not torch.isfinite(state[key]).all():
                raise InputError(f"the {role} model has NaN or Inf in {key}")
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
            raise InputError(f"{key} differs in shape: {told}")


# ---- the packed form -----------------------------------------------------------------------


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _pack(key: str, tensor: Tensor, q: quantizer.Quantized | None) -> tuple[dict, Tensor]:
    """One tensor as (its entry in the file's table, its bytes)."""
    entry = {"key": key, "shape": list(tensor.shape)}
    if q is None:
        data = _bytes_of(tensor.float())
        entry |= {"kind": "float32"}
    else:
        bits = quantizer.bits_per_code(q.levels)
        parts = [_bytes_of(q.low), _bytes_of(q.high), quantizer.pack_bits(q.codes, bits)]
        if q.zeros is not None:
            parts.append(quantizer.pack_bits(q.zeros.to(torch.int32), 1))
        data = torch.cat(parts)
        entry |= {
            "kind": q.method,
            "levels": q.levels,
            "groups": q.low.numel(),
            "zeros": q.zeros is not None,
        }
    return entry | {"bytes": data.numel()}, data


def _unpack(entry: dict, data: Tensor) -> tuple[Tensor, quantizer.Quantized | None]:
    shape = torch.Size(entry["shape"])
    count = shape.numel()
    if entry["kind"] == "float32":
        if data.numel() != 4 * count:
            raise InputError(f"{entry['key']}: {data.numel()} bytes for {count} float32 values")
        return data.clone().view(torch.float32).reshape(shape), None
    quantizer.check_levels(entry["levels"], entry["kind"])
    bits, groups = quantizer.bits_per_code(entry["levels"]), entry["groups"]
    sizes = [4 * groups, 4 * groups, -(-count * bits // 8)]
    if entry["zeros"]:
        sizes.append(-(-count // 8))
    if sum(sizes) != data.numel() or groups not in (1, *shape[:1]):
        raise InputError(f"{entry['key']}: {data.numel()} bytes, its table entry says {sum(sizes)}")
    low, high, codes, *zeros = data.split(sizes)
    q = quantizer.Quantized(
        codes=quantizer.unpack_bits(codes, bits, count),
        low=low.clone().view(torch.float32),
        high=high.clone().view(torch.float32),
        shape=shape,
        levels=entry["levels"],
        method=entry["kind"],
        zeros=quantizer.unpack_bits(zeros[0], 1, count).bool() if zeros else None,
    )
    return quantizer.decode(q), q


def _check_meta(meta: dict) -> None:
    """Raise InputError where a fact about a signature is not of its kind."""
    texts = {name: meta[name] for name in ("arch", "layers") if name in meta}
    texts |= {name: meta[name] for name in ("dataset", "pretrained", "standard") if meta[name]}
    lists = {name: meta[name] for name in ("corruptions", "robust")}
    wrong = [name for name, value in texts.items() if not isinstance(value, str)]
    wrong += [
        name
        for name, value in lists.items()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value)
    ]
    wrong += ["key" for entry in meta["tensors"] if not isinstance(entry["key"], str)]
    if not isinstance(meta["keep_num"], int) or meta["severity"] not in (None, 1, 2, 3, 4, 5):
        wrong.append("keep_num or severity")
    if meta["quantization"]:
        form = Quantization(**meta["quantization"])
        quantizer.check_levels(form.levels, form.method)
    if wrong or meta["arch"] not in ARCHS:
        raise InputError(f"not a valid signature: {', '.join(wrong) or meta['arch']}")


def _checksum(meta: dict, payload: Tensor) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    digest.update(payload.contiguous().numpy())
    return digest.hexdigest()


# ---- comparing -----------------------------------------------------------------------------


def cosine(a: RobustWeightSignature, b: RobustWeightSignature) -> dict[str, float]:
    """Cosine between two signatures: per state-dict key both hold, and "overall" (all of them).

    A zero tensor has cosine 0 with everything. Raises InputError when they share no key.
    """
    keys = [key for key in a.tensors if key in b.tensors]
    if not keys:
        raise InputError(f"signatures of {a.name} and {b.name} have no tensor in common")
    rows = {}
    total = torch.zeros(3, dtype=torch.float64)
    for key in keys:
        x, y = a.tensors[key].flatten().double().cpu(), b.tensors[key].flatten().double().cpu()
        if x.shape != y.shape:
            raise InputError(f"signatures of {a.name} and {b.name} differ in the shape of {key}")
        products = torch.stack([x @ y, x @ x, y @ y])
        total += products
        rows[key] = _cosine(products)
    return {**rows, "overall": _cosine(total)}


def _cosine(products: Tensor) -> float:
    xy, xx, yy = products.tolist()
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else 0.0


# ---- putting it on, taking it off ----------------------------------------------------------

_PATCHES: weakref.WeakKeyDictionary[nn.Module, _Stack] = weakref.WeakKeyDictionary()
_WARNED: set[tuple[str, str]] = set()


@dataclass
class _Stack:
    """What is on one model: the original bits of every touched parameter, and the live patches."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    patches: list[Patch] = field(default_factory=list)


class Patch:
    """A signature that is on a model; `remove()` takes it off. Also a context manager.

    Patches come off in any order. When the last one goes, parameters and buffers have the bits
    they had before the first; what was changed in them meanwhile (training, batch-norm
    re-estimation) is undone with it.
    """

    def __init__(self, model: nn.Module, signature: RobustWeightSignature, alpha: float) -> None:
        self._model = weakref.ref(model)  # _PATCHES would keep its own key alive otherwise
        self._signature = signature
        self._alpha = alpha
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def remove(self) -> None:
        """Restore the model; a second call does nothing."""
        model = self._model()
        stack = _PATCHES.get(model) if model is not None else None
        if stack is None or self not in stack.patches:
            return
        at = stack.patches.index(self)
        stack.patches.remove(self)
        if at < len(stack.patches):  # the next one's "before" is now ours
            stack.patches[at]._buffers = self._buffers
        else:
            _restore(dict(model.named_buffers()), self._buffers)
        _restore(
            dict(model.named_parameters()), {k: stack.originals[k] for k in self._signature.tensors}
        )
        for patch in stack.patches:
            patch._add(model, only=self._signature.tensors)
        if not stack.patches:
            del _PATCHES[model]

    @torch.no_grad()
    def _add(self, model: nn.Module, only: Mapping[str, Tensor] | None = None) -> None:
        if self._alpha == 0:  # θ + 0 would still turn −0.0 into 0.0
            return
        parameters = dict(model.named_parameters())
        for key, delta in self._signature.tensors.items():
            if only is None or key in only:
                θ = parameters[key]
                θ.add_(delta.to(device=θ.device, dtype=θ.dtype), alpha=self._alpha)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@torch.no_grad()
def _restore(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in saved.items():
        live[name].copy_(tensor)


def patch(model: nn.Module, signature: RobustWeightSignature, alpha: float = 1.0) -> Patch:
    """Add alpha · signature to `model` in place and return the handle that takes it off again.

    Only the touched parameters (and the buffers, for batch norm) are kept aside. The running
    statistics of batch norm are not touched here: see `utils.batchnorm.reestimate`.
    Raises InputError, before anything is changed, when the model lacks a key or a shape differs;
    warns once when the model is known to descend from other pretrained weights.
    """
    parameters = dict(model.named_parameters())
    for key, tensor in signature.tensors.items():
        if key not in parameters:
            raise InputError(
                f"signature of {signature.name} is for {signature.arch}: the model has no {key}"
            )
        if parameters[key].shape != tensor.shape:
            raise InputError(
                f"signature of {signature.name}: {key} is {tuple(tensor.shape)}, "
                f"the model's is {tuple(parameters[key].shape)}"
            )
    lineage = getattr(model, "pretrained_hash", None)
    if lineage and signature.pretrained and lineage != signature.pretrained:
        pair = (signature.pretrained, lineage)
        if pair not in _WARNED:
            _WARNED.add(pair)
            warnings.warn(
                f"the signature of {signature.name} comes from pretrained weights {pair[0]}, "
                f"the model from {pair[1]}",
                stacklevel=2,
            )
    stack = _PATCHES.setdefault(model, _Stack())
    for key in signature.tensors:
        if key not in stack.originals:
            stack.originals[key] = parameters[key].detach().clone()
    handle = Patch(model, signature, alpha)
    stack.patches.append(handle)
    handle._add(model)
    return handle


# ---- python -m utils.signature show FILE ----------------------------------------------------


def describe(path: str | os.PathLike) -> str:
    """What a signature file holds, as text: provenance, bits, bytes, norm of each tensor."""
    s = RobustWeightSignature.load(path)
    q = s.quantization
    values = sum(t.numel() for t in s.tensors.values())
    size = Path(path).stat().st_size
    form = (
        "float32"
        if q is None
        else (
            f"{q.levels} levels, {q.method}, {quantizer.bits_per_code(q.levels)} bits"
            + (", range per channel" if q.per_channel else "")
            + (", batch norm in float32" if q.bn_float else "")
        )
    )
    lines = [
        f"corruption   {s.name}" + (f", severity {s.severity}" if s.severity else ""),
        f"arch         {s.arch}, the {s.keep_num} shallowest layers",
        f"data set     {s.dataset or 'not recorded'}",
        f"from         θ_pre {s.pretrained}  θ_std {s.standard}  θ_c {', '.join(s.robust)}",
        f"stored as    {form}",
        f"size         {size:,} bytes for {values:,} values",
        "",
        f"{'tensor':<32} {'shape':<20} {'norm':>10}",
    ]
    for key, tensor in s.tensors.items():
        shape = "×".join(str(n) for n in tensor.shape)
        lines.append(f"{key:<32} {shape:<20} {tensor.norm().item():>10.4g}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m utils.signature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print what a signature file holds")
    show.add_argument("file", help="a .rws file")
    args = parser.parse_args()
    with script_errors():
        print(describe(args.file))


if __name__ == "__main__":
    main()
