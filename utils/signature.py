"""Robust Weight Signatures: extract, scale, add, put on a model and take off.

Equations of the paper (tensor by tensor, l a state-dict key):

    Δ_std[l] = θ_std[l] − θ_pre[l]          Δ_c[l] = θ_c[l] − θ_pre[l]
    RWS_c[l] = Δ_c[l] − (⟨Δ_c[l], Δ_std[l]⟩ / ⟨Δ_std[l], Δ_std[l]⟩) · Δ_std[l]
    θ_patched[l] = θ_target[l] + Σ_c w_c · RWS_c[l]      l in the keep_num shallowest layers

    signature = RobustWeightSignature.extract(pretrained, standard, robust, keep_num=5)
    with patch(model, signature):       # robust in here, the intact model again behind it
        ...

Files: utils/signature_file.py. Look inside one:  python -m utils.signature_file show fog.rws
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from models.layers import carried_keys, infer_arch, is_carried, layer_keys
from utils import quantize
from utils.arguments import FLAGS
from utils.batchnorm import pooled
from utils.checkpoint import State, backbone_hash, read_state_dict, weights_in
from utils.errors import InputError, warn
from utils.files import AnyPath
from utils.patch import patch  # noqa: F401, the other half of the interface

Source = Mapping | nn.Module | AnyPath  # of weights: `utils.checkpoint.weights_in`


# ---- the method -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How a signature is made. An ablation of the method is a field here and its line in `extract`
    (and its flag in utils/arguments.py). A signature's file holds it whole.
    """

    keep_num: int = 7
    layers: str = "shallowest"  # which keep_num layers are kept: also "deepest" or "random"
    project: bool = True  # False keeps the direction of clean fine-tuning in
    levels: int | None = None  # of quantization (utils/quantize.py); None: float32
    scheme: str = "linear"
    per_channel: bool = False  # a range of levels per output channel
    bn_float: bool = False  # batch norm and downsample branches stay in float32

    @classmethod
    def from_args(cls, args: argparse.Namespace, **known: object) -> Method:
        """The method of a command line, `known` in place of what that says.

        Raises InputError for numbers of layers and levels that don't exist.
        """
        said = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        method = cls(**said | known)
        method.keys(args.arch)
        if method.levels is not None:
            quantize.check_levels(method.levels, method.scheme)
        return method

    def flags(self) -> list[str]:
        """The flags, each with its value, of what differs from the paper's method."""
        flag_of = {options.get("dest", flag): flag for flag, options in FLAGS.items()}
        told = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                told.append(f"--{flag_of[f.name]}")
                told += [] if isinstance(value, bool) else [str(value)]
        return told

    def words(self) -> str:
        """`flags` for captions, e.g. "no projection, layers deepest"; empty for the paper's."""
        return " ".join(self.flags()).replace(" --", ", ").replace("--", "").replace("_", " ")

    def ablation(self) -> str:
        """`words` of what is not the paper's method, but for keep_num and how it is stored."""
        return replace(self.unquantized(), keep_num=Method.keep_num).words()

    def unquantized(self) -> Method:
        """The same in float32."""
        return replace(self, levels=None, scheme="linear", per_channel=False, bn_float=False)

    def keys(self, arch: str, seed: int = 0) -> list[str]:
        """State-dict keys of the layers that are kept; random ones are drawn from `seed`.

        Raises InputError when `arch` has fewer than keep_num.
        """
        try:
            return layer_keys(arch, self.keep_num, self.layers, seed)
        except ValueError as error:
            raise InputError(str(error)) from None


# ---- extracting -----------------------------------------------------------------------------


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


@dataclass
class RobustWeightSignature:
    """What to add to a standard model: float32 tensors by state-dict key, and where they are from.

    For a VGG these are the projected differences of the `keep_num` shallowest layers; for a ResNet
    also θ_c − θ_std of the batch-norm affine parameters and downsample branches of every stage.
    `pretrained`, `standard` and `robust` are hashes of the source backbones
    (`utils.checkpoint.backbone_hash`); `codes` are those of a quantized signature's tensors.
    Also float32 tensors by name, empty where not known: `statistics`, the batch-norm running
    statistics of θ_std with the signature on at α = 1 (`utils.batchnorm`); `fingerprint` of its
    corruption; `weights`, those of the signatures that it is the sum of, where learnt
    (`utils.learn`). Raises InputError for NaN or Inf inside.
    """

    tensors: dict[str, Tensor]
    arch: str
    method: Method
    corruptions: tuple[str, ...] = ()
    severity: int | None = None
    dataset: str | None = None
    pretrained: str | None = None
    standard: str | None = None
    robust: tuple[str, ...] = ()
    codes: dict[str, quantize.Quantized] = field(default_factory=dict, repr=False)
    statistics: dict[str, Tensor] = field(default_factory=dict, repr=False)
    fingerprint: dict[str, Tensor] = field(default_factory=dict, repr=False)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        parts = (self.tensors, self.statistics, self.fingerprint, self.weights)
        for key, tensor in (item for part in parts for item in part.items()):
            if not torch.isfinite(tensor).all():
                raise InputError(f"signature of {self.name}: NaN or Inf in {key}")

    @property
    def name(self) -> str:
        """The corruptions that it is against, e.g. "fog+snow"."""
        return "+".join(self.corruptions) or "unnamed"

    @classmethod
    def extract(
        cls,
        pretrained: Source,
        standard: Source,
        robust: Source,
        keep_num: int | None = None,
        *,
        method: Method | None = None,
        arch: str | None = None,
        corruption: str | None = None,
        severity: int | None = None,
        dataset: str | None = None,
        seed: int = 0,
    ) -> RobustWeightSignature:
        """RWS of θ_robust against θ_standard, both fine-tuned from θ_pretrained.

        The three are modules, state dicts, dicts with one in, or checkpoint files. `arch` is read
        off the keys when not given; `method` (default: the paper's) with `keep_num` layers where
        that is given; `seed` draws random layers. Raises InputError when a key is missing, a shape
        differs or a value is not finite.
        """
        roles = {"pretrained": pretrained, "standard": standard, "robust": robust}
        states = {
            role: read_state_dict(source)
            if isinstance(source, (str, os.PathLike))
            else weights_in(source, f"the {role} model")
            for role, source in roles.items()
        }
        arch = arch or infer_arch(states["standard"])
        if arch is None:
            raise InputError("the standard model's keys fit none of the known architectures")
        method = method or Method()
        method = method if keep_num is None else replace(method, keep_num=keep_num)
        keys = method.keys(arch, seed)
        keys += [key for key in carried_keys(arch) if key not in keys]
        _check_same_shapes(states, keys)
        tensors = {}
        with torch.no_grad():
            for key in keys:
                device = states["standard"][key].device
                θ_pre, θ_std, θ_c = (states[role][key].to(device).float() for role in roles)
                if is_carried(key):
                    tensors[key] = θ_c - θ_std
                else:
                    Δ_std, Δ_c = θ_std - θ_pre, θ_c - θ_pre
                    tensors[key] = project_out(Δ_c, Δ_std) if method.project else Δ_c
        if not any(bool(t.any()) for t in tensors.values()):
            warn("the signature is zero: its source models are identical")
        signature = cls(
            tensors,
            arch,
            method.unquantized(),
            corruptions=(corruption,) if corruption else (),
            severity=severity,
            dataset=dataset,
            pretrained=backbone_hash(states["pretrained"]),
            standard=backbone_hash(states["standard"]),
            robust=(backbone_hash(states["robust"]),),
        )
        if method.levels is None:
            return signature
        return signature.quantize(method.levels, method.scheme, method.per_channel, method.bn_float)

    # ---- algebra -------------------------------------------------------------------------

    def scale(self, w: float) -> RobustWeightSignature:
        """w · RWS, without what is of α = 1: codes, statistics, fingerprint, learnt weights."""
        tensors = {key: tensor * w for key, tensor in self.tensors.items()}
        none = {"codes": {}, "statistics": {}, "fingerprint": {}, "weights": {}}
        return replace(self, tensors=tensors, method=self.method.unquantized(), **none)

    def __add__(self, other: RobustWeightSignature | int) -> RobustWeightSignature:
        """RWS_a + RWS_b, for patching against both; a key that only one holds is taken as it is.

        Statistics of batch norm become those of a mixture, every corruption counted alike.
        """
        if other == 0:  # the start value of sum()
            return self
        if self.arch != other.arch:
            raise InputError(f"a signature of {self.arch} can't be added to one of {other.arch}")
        ours, theirs = (s.method.ablation() for s in (self, other))
        if ours != theirs:  # the sum would be of neither method
            told = f"{self.name} ({ours or 'the paper'}), {other.name} ({theirs or 'the paper'})"
            raise InputError(f"signatures of different methods: {told}; extract them alike")
        total = self.scale(1.0)
        tensors = total.tensors
        device = next((tensor.device for tensor in tensors.values()), None)
        for key, tensor in other.tensors.items():
            if tensors.get(key, tensor).shape != tensor.shape:
                names = f"{self.name} and {other.name}"
                raise InputError(f"signatures of {names} differ in the shape of {key}")
            tensor = tensor.to(device=device)
            tensors[key] = tensors[key] + tensor if key in tensors else tensor
        keep_num = max(self.method.keep_num, other.method.keep_num)
        share = len(other.corruptions) / max(1, len(self.corruptions) + len(other.corruptions))
        same = ("severity", "dataset", "pretrained", "standard")  # kept where both agree
        return replace(
            total,
            method=replace(total.method, keep_num=keep_num),
            corruptions=(*self.corruptions, *other.corruptions),
            robust=(*self.robust, *other.robust),
            statistics=pooled(self.statistics, other.statistics, share),
            **{f: None for f in same if getattr(self, f) != getattr(other, f)},
        )

    __radd__ = __add__

    def __neg__(self) -> RobustWeightSignature:
        return self.scale(-1)

    def __sub__(self, other: RobustWeightSignature) -> RobustWeightSignature:
        return self + -other

    def __mul__(self, w: float) -> RobustWeightSignature:
        return self.scale(w)

    __rmul__ = __mul__

    def __truediv__(self, w: float) -> RobustWeightSignature:
        return self.scale(1 / w)

    # ---- storage -------------------------------------------------------------------------

    def quantize(
        self, levels: int, scheme: str = "linear", per_channel: bool = False, bn_float: bool = False
    ) -> RobustWeightSignature:
        """Every tensor replaced by its `levels` levels (`utils.quantize`), and saved as codes.

        `bn_float` leaves the batch-norm and downsample tensors of a ResNet in float32.
        """
        codes = {
            key: quantize.encode(tensor.cpu(), levels, scheme, per_channel)
            for key, tensor in self.tensors.items()
            if not (bn_float and is_carried(key))
        }
        decoded = {k: quantize.decode(q).to(self.tensors[k].device) for k, q in codes.items()}
        form = {"levels": levels, "scheme": scheme, "per_channel": per_channel}
        method = replace(self.method, **form, bn_float=bn_float)
        return replace(self, tensors=self.tensors | decoded, method=method, codes=codes)

    def save(self, path: AnyPath) -> int:
        """Write the packed signature to `path` atomically; gives its size in bytes."""
        from utils import signature_file

        return signature_file.save(self, path)

    @classmethod
    def load(cls, path: AnyPath) -> RobustWeightSignature:
        """Read a file that `save` wrote; InputError naming it for anything else."""
        from utils import signature_file

        return signature_file.load(path)


def _check_same_shapes(states: Mapping[str, State], keys: Iterable[str]) -> None:
    for key in keys:
        for role, state in states.items():
            if key not in state:
                raise InputError(f"the {role} model has no {key}")
        shapes = {role: tuple(state[key].shape) for role, state in states.items()}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
            raise InputError(f"{key} differs in shape: {told}")
