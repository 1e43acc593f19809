"""Checkpoints: read whatever researchers have, write ours whole or not at all.

Read: the RWS authors' files (a dict with `state_dict`, with or without `normalize.*`),
torchvision's ImageNet weights, plain state dicts, those that other trainers wrap (`weights_in`);
half precision becomes float32. Nothing in a file is executed, and the checksums in it are compared
(utils/torch_file.py).

    python -m utils.checkpoint show FILE            what a checkpoint holds
    python -m utils.checkpoint convert FILE OUT     a plain state dict, with torchvision's keys
"""

import hashlib
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from models import head_prefix
from models.layers import infer_arch
from utils.errors import InputError, script_errors, warn
from utils.files import AnyPath, replacing
from utils.torch_file import read

State = Mapping[str, Tensor]  # a state dict
IMAGENET = "torchvision's ImageNet weights"
LAST, BEST_SA, BEST_RA = "checkpoint.pth.tar", "model_SA_best.pth.tar", "model_RA_best.pth.tar"

# What our scripts record of a model; `facts` gives them.
FACTS = ("arch", "dataset", "image_size", "side", "classes", "class_names", "corruption")
FACTS += ("severity", "patched", "pretrained_hash", "epoch")
# Where trainers keep weights in a dict: in this order, those averaged over steps last.
RAW = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module")
AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averaged)(_|$)")
# Wrappers of a model put their names into its keys: torch's own anywhere, those of trainers in
# front of all.
_WRAPPERS = ("module", "_orig_mod")
_PREFIXES = ("model.", "backbone.", "encoder.", "net.", "network.")
_DEPTH = 8  # of dicts in dicts; a file could hold one in itself


def facts(checkpoint: Mapping) -> dict:
    """What a checkpoint of our scripts says of its model, by FACTS; empty for other files."""
    if not {"arch", "dataset", "pretrained_hash", "state_dict"} <= checkpoint.keys():
        return {}
    plain = (str, int, list, type(None))
    known = {k: checkpoint[k] for k in FACTS if isinstance(checkpoint.get(k, ...), plain)}
    if size := known.pop("image_size", None):  # older files have no more
        known.setdefault("side", size)
    return known


def _holds_tensors(value: object, depth: int = _DEPTH) -> bool:
    if isinstance(value, Mapping) and depth:
        return any(_holds_tensors(v, depth - 1) for v in value.values())
    return isinstance(value, (Tensor, nn.Module))


def _weight_names(content: Mapping) -> list[str]:
    """The entries of `content` that hold weights, by their names."""
    held = [k for k, v in content.items() if not isinstance(v, Tensor) and _holds_tensors(v)]
    averaged = [k for k in held if isinstance(k, str) and AVERAGED.search(k)]
    return [k for k in RAW if k in held] + averaged


def weights_in(content: Mapping | nn.Module, path: AnyPath, key: str | None = None) -> State:
    """The state dict in `content`: a module's, a dict's own, or one under a known name in it.

    Keys come without the prefixes of wrappers. key: --checkpoint_key, which names the entry to
    take ("a.b" for one in another); our own checkpoints, which have but one, are read without it.
    Raises InputError where there are no weights or no such entry; warns where it chose.
    """
    if key and not (isinstance(content, Mapping) and facts(content)):
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else "a module"
        for part in [key] if isinstance(content, Mapping) and key in content else key.split("."):
            content = content.get(part) if isinstance(content, Mapping) else None
        if not _holds_tensors(content) or isinstance(content, Tensor):
            raise InputError(f"{path}: no weights under --checkpoint_key {key}; it holds {names}")
    for _ in range(_DEPTH):
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if not (names := _weight_names(content)):
            break
        if len(names) > 1:
            others = " or ".join(names[1:])
            said = f"{path}: took the weights under {names[0]}"
            warn(f"{said}; --checkpoint_key takes {others}")
        content = content[names[0]]
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        held = ", ".join(map(str, content)) or "nothing"
        more = [str(k) for k, v in content.items() if _holds_tensors(v)]
        hint = f"; --checkpoint_key names an entry: {', '.join(more)}" if more else ""
        raise InputError(f"{path}: no tensors in it, so no state dict (it holds {held}){hint}")
    return _unwrapped(state, path)


def _unwrapped(state: State, path: AnyPath) -> State:
    """`state` with the keys of the model inside the wrappers, their counters left out."""
    parts = {key: [p for p in key.split(".") if p not in _WRAPPERS] for key in state}
    names = {key: ".".join(kept) for key, kept in parts.items() if kept[-1:] != ["n_averaged"]}
    if not names:
        raise InputError(f"{path}: no tensors in it but a wrapper's counter, so no state dict")
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in names.values())), 0):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    if len({*names.values()}) < len(names):
        raise InputError(f"{path}: two models in one, with and without a wrapper's prefix")
    return {name: state[key] for key, name in names.items()}


def state_dict_of(checkpoint: Mapping, path: AnyPath, key: str | None = None) -> State:
    """The float32 state dict in a `read` checkpoint, by `weights_in`; `path` is for messages."""
    tensors = weights_in(checkpoint, path, key)
    if "normalization" in checkpoint and facts(checkpoint):  # of --save_model
        constants = checkpoint["normalization"].items()
        tensors |= {f"normalize.{name}": torch.tensor(values) for name, values in constants}
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise InputError(f"{path}: {name} is no plain tensor")
        if tensor.is_floating_point():
            tensors[name] = tensor = tensor.float()
            if not torch.isfinite(tensor).all():
                raise InputError(f"{path}: NaN or Inf in {name}")
    return tensors


def is_plain(tensor: Tensor) -> bool:
    """Dense, in memory, and no larger than its storage, as repeated strides can make it."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_state_dict(path: AnyPath, key: str | None = None) -> State:
    """`read` and `state_dict_of` in one: state-dict key → float32 tensor on the CPU."""
    return state_dict_of(read(path), path, key)


def tensors_hash(tensors: State) -> str:
    """16 hex digits of the SHA-256 over all names and bits, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def backbone_hash(state: State) -> str:
    """`tensors_hash` of the weights outside head and normalization: which model this is.

    The same for every file format and precision of storage that gives the same float32 values.
    """
    heads = ("fc.", "classifier.")
    kept = {k: v.float() for k, v in state.items() if not (k.startswith(heads) or _is_optional(k))}
    return tensors_hash(kept)


def load_model_weights(model: nn.Module, arch: str, state: State, path: AnyPath) -> None:
    """Load a fine-tuned model of the same classes into `model`.

    Absent `normalize.*` and counters of batch norm keep the model's.
    Raises InputError that lists missing and unexpected keys, or names the tensor whose shape
    differs (a head of another data set among them).
    """
    own = model.state_dict()
    state = {k: v for k, v in own.items() if _is_optional(k)} | dict(state)
    wrong = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys()}
    told = [f"{what} {_some_of(keys)}" for what, keys in wrong.items() if keys]
    if told:
        raise InputError(f"{path} does not hold a {arch}: {'; '.join(told)}")
    for key, tensor in own.items():
        if key.startswith("normalize.") and state[key].numel() == tensor.numel():
            state[key] = state[key].reshape(tensor.shape)  # some files keep (1, 3, 1, 1)
        if state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)}, {arch} here has {tuple(tensor.shape)}"
            head = key.startswith(head_prefix(arch))
            hint = "; its head is for another data set" if head else ""
            raise InputError(f"{path}: {key} is {shapes}{hint}")
    model.load_state_dict(state)


def _some_of(keys: Collection[str]) -> str:
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    return ", ".join(sorted(keys)[:6]) + more


def load_pretrained(
    model: nn.Module, arch: str, state: State, path: AnyPath, keep_head: bool = False
) -> list[str]:
    """Start `model` from pretrained weights of other classes; gives the keys of the head left out.

    The head of a ResNet is new, a VGG's is taken only when it is one linear layer of the same size;
    normalization stays the data set's. With `keep_head` the weights are of the same classes and
    their head is taken. Raises InputError for missing, unexpected or differently shaped keys beyond
    the head, and for a head to keep that doesn't fit.
    """
    own = {k: v for k, v in model.state_dict().items() if k.startswith(head_prefix(arch))}
    head = {k: v for k, v in state.items() if k.startswith(head_prefix(arch))}
    fits = {k: v.shape for k, v in head.items()} == {k: v.shape for k, v in own.items()}
    if keep_head and not fits:
        classes = len(own[f"{head_prefix(arch)}bias"])
        raise InputError(f"--keep_head: {path} holds no linear head of {classes} classes")
    taken = head if keep_head or (fits and arch.startswith("vgg")) else own
    rest = {k: v for k, v in state.items() if k not in head and not _is_optional(k)}
    load_model_weights(model, arch, rest | taken, path)
    return sorted(head) if taken is own else []


def _is_optional(key: str) -> bool:
    """Whether files may lack `key`: normalization, and the counter of a batch norm."""
    return key.startswith("normalize.") or key.endswith("num_batches_tracked")


def pretrained_state_dict(source: AnyPath, arch: str, key: str | None = None) -> State:
    """θ_pre from a checkpoint file, or torchvision's ImageNet weights of `arch` (IMAGENET).

    key: --checkpoint_key, as `weights_in` takes it.
    The latter are downloaded once by torch.hub; without a network and a cached copy that is an
    InputError that names --pretrained_path.
    """
    if source != IMAGENET:
        return read_state_dict(source, key)
    try:
        # V1 is the classic recipe, what "ImageNet pretrained" meant in papers up to 2022.
        return dict(get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=False))
    except Exception as error:
        raise InputError(
            f"--pretrained: {IMAGENET} of {arch} could not be fetched ({type(error).__name__}); "
            "name a checkpoint with --pretrained_path FILE"
        ) from error


def save(checkpoint: Mapping, *paths: AnyPath) -> None:
    """Write a checkpoint dict of tensors and plain values to each of `paths`, atomically."""
    # torch's own writer meets a full disk with errors of several kinds, or aborts.
    buffer = io.BytesIO()
    for path in paths:
        with replacing(path) as temporary:
            if not buffer.tell():  # 0.5 s for a VGG-16: once
                torch.save(dict(checkpoint), buffer)
            temporary.write_bytes(buffer.getbuffer())


# ---- show, convert ------------------------------------------------------------------------------


def describe(path: AnyPath, key: str | None = None) -> str:
    """What a checkpoint holds, as text: weights, normalization, what is recorded, other entries."""
    content = read(path)
    state = state_dict_of(content, path, key)
    arch = infer_arch(state)
    values = sum(tensor.numel() for tensor in state.values())
    lines = {
        "weights": f"{len(state)} tensors, {values:,} values, hash {backbone_hash(state)}",
        "arch": arch or "none of those known here",
    }
    if arch and (bias := state.get(f"{head_prefix(arch)}bias")) is not None:
        lines["head"] = f"{len(bias)} classes"
    constants = {k: v.flatten().tolist() for k, v in state.items() if k.startswith("normalize.")}
    told = [f"{k[10:]} {' '.join(f'{v:.4f}' for v in of)}" for k, of in constants.items()]
    lines["normalize"] = ", ".join(told) or "not in it"
    lines |= {name: fact for name, fact in facts(content).items() if name not in lines}
    rest = [str(k) for k in content if k not in lines and not isinstance(content[k], Tensor)]
    lines["entries"] = ", ".join(rest)
    return "\n".join(f"{name:<16} {said}" for name, said in lines.items() if said not in (None, ""))


def torchvision_state(state: State) -> State:
    """`state` without normalization: what torchvision's model loads with `load_state_dict`.

    A VGG of ours is torchvision's with features[:-1], AdaptiveAvgPool2d(1) and a Linear(512, n).
    """
    return {k: v.detach().cpu() for k, v in state.items() if not k.startswith("normalize.")}


def save_model(model: nn.Module, path: AnyPath, facts: Mapping) -> None:
    """Write `model` in the form of `torchvision_state`, its normalization and `facts` beside it."""
    constants = {k: getattr(model.normalize, k).flatten().tolist() for k in ("mean", "std")}
    state = torchvision_state(model.state_dict())
    save({"state_dict": state, "normalization": constants, **facts}, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    from utils import arguments  # which needs the names above

    with script_errors():
        parser = arguments.Parser(__doc__, prog="python -m utils.checkpoint")
        parser.add_argument("command", choices=["show", "convert"])
        parser.add_argument("file", help="a checkpoint")
        parser.add_argument("out", nargs="?", help="of convert: the file to write")
        arguments.add(parser, "checkpoint_key overwrite")
        args = parser.parse_args(argv)
        if (args.out is None) != (args.command == "show"):
            raise InputError("show takes FILE, convert FILE and OUT")
        if args.out and os.path.exists(args.out) and not args.overwrite:
            raise InputError(f"{args.out}: is there already; --overwrite replaces it")
        print(describe(args.file, args.checkpoint_key))
        if args.out:
            state = read_state_dict(args.file, args.checkpoint_key)
            save(torchvision_state(state), args.out)
            print(f"{args.out}: a state dict; normalize images by yourself, by the constants above")


if __name__ == "__main__":
    main()
