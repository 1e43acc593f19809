"""What the flags of model_patching.py name: θ_pre, θ_std, every θ_c, signatures, outputs."""

import argparse
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from models.layers import depth_order
from utils import arguments, log
from utils import checkpoint as ckpt
from utils.errors import InputError, warn
from utils.files import check_writable
from utils.signature import Method, RobustWeightSignature


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that don't go together, before anything is read."""
    keep_nums = args.keep_num or [Method.keep_num]
    for keep_num in keep_nums:
        method = Method.from_args(args, keep_num=keep_num)
    if args.base_model is None:
        raise InputError("--base_model is needed: the standard model")
    if args.signature:
        brought = ["keep_num", "corruption", *([] if args.learn_alpha else ["save_signature"])]
        named = [f"--{f}" for f in brought if getattr(args, f)]
        if clash := named + replace(method, keep_num=Method.keep_num).flags():
            raise InputError(f"{clash[0]} is for extracting; --signature brings it along")
    else:
        needed = {f: getattr(args, f) for f in ("corruption", "corruption_model_root")}
        needed["pretrained"] = arguments.pretrained_source(args)
        for flag, value in needed.items():
            if not value:
                raise InputError(f"--{flag} is needed to extract signatures (or name --signature)")
        if args.levels is None and method != method.unquantized():
            kept = method.unquantized().flags()
            flag = next(f for f in method.flags() if f.startswith("--") and f not in kept)
            raise InputError(f"{flag} goes with --quantization; give both")
        if args.reestimate:
            raise InputError("--reestimate goes with --signature; without files it is done anyway")
    fixed = ["alpha"] * (args.alpha != [1.0]) + ["finetune_alpha"] * bool(args.finetune_alpha)
    if args.learn_alpha and fixed:
        raise InputError(f"--{fixed[0]} sets what --learn_alpha learns; leave one out")
    if args.unlabeled and not args.learn_alpha:
        raise InputError("--unlabeled goes with --learn_alpha; give both")
    if args.learn_alpha and args.save_signature and args.levels:
        told = "would hold their learnt sum in float32; save them without --learn_alpha"
        raise InputError(f"--quantization is of each signature, --save_signature {told}")
    if args.choose:
        if not args.signature:
            raise InputError("--choose needs a bank: name its files with --signature")
        more = [f for f in ("learn_alpha", "save_log", "save_model") if getattr(args, f)]
        if clash := [*fixed, *more]:
            raise InputError(f"--{clash[0]} is for one patch, --choose takes one for every image")
    count = len(args.signature or args.corruption)
    if args.finetune_alpha is not None and len(args.finetune_alpha) != count:
        given = len(args.finetune_alpha)
        raise InputError(f"--finetune_alpha has {given} values for {count} signatures")
    if min(args.alpha) < 0:
        said = "a negative strength takes the signature's direction away: no patch of the paper"
        warn(said)
    patches = len(keep_nums) * (1 if args.finetune_alpha is not None else len(args.alpha))
    outputs = [flag for flag in ("save_log", "save_model", "save_signature") if getattr(args, flag)]
    if outputs and patches > 1:
        raise InputError(f"--{outputs[0]} takes one patch, --keep_num and --alpha make {patches}")
    check_outputs(args)
    if args.save_log:
        log.read(Path(args.save_log))
    if args.baseline_log and not Path(args.baseline_log).is_file():
        raise InputError(f"--baseline_log {args.baseline_log}: no such log, --save_log writes one")


def weightings(args: argparse.Namespace, n: int) -> list[list[float]]:
    """The weights w_c of n signatures, for each row: --finetune_alpha, or for each --alpha a/n."""
    if args.finetune_alpha is not None:
        return [args.finetune_alpha]
    return [[a / n] * n for a in args.alpha]


def weights_words(args: argparse.Namespace) -> str:
    """Where the weights of all rows come from, for the header."""
    if args.choose:
        return f"chosen, {args.choose} images at a time"
    if args.learn_alpha:
        return f"learnt per {args.learn_alpha} on validation images{', unlabeled' * args.unlabeled}"
    every = weightings(args, len(args.signature or args.corruption))
    return "; ".join(" ".join(f"{w:g}" for w in weights) for weights in every)


def patch_title(
    args: argparse.Namespace, signatures: list[RobustWeightSignature], weights: list[float]
) -> str:
    """The name of a patched row."""
    kept = " ".join(str(k) for k in dict.fromkeys(s.method.keep_num for s in signatures))
    title = f"patched, keep_num {kept}"
    if args.finetune_alpha is not None:
        title += ", w " + " ".join(f"{w:g}" for w in weights)
    elif args.alpha != [1.0]:
        title += f", alpha {sum(weights):g}"
    elif args.learn_alpha:
        title += f", w learnt per {args.learn_alpha}{', unlabeled' * args.unlabeled}"
    return title


def find_robust(root: str | Path, corruption: str) -> Path:
    """The checkpoint of `corruption` under `root`: in the folder of that name, or with that word.

    "fog+snow" is the model trained on both, in any order.

    Raises InputError when there is no such folder, several, or no checkpoint in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--corruption_model_root {root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    exact = [f for f in folders if sorted(f.name.split("+")) == sorted(corruption.split("+"))]
    # `fog` is a word of vgg_fog_sev5, not of foggy, no_fog_at_all or fog+snow.
    name = re.escape(corruption)
    word = rf"(?<![a-z0-9+])(?<!no[-_])(?<!not[-_])(?<!without[-_]){name}(?![a-z0-9+])"
    found = exact or [f for f in folders if re.search(word, f.name, re.I)]
    if len(found) != 1:
        names = ", ".join(f.name for f in (found or folders)) or "nothing"
        what = "several folders fit" if found else "no folder for"
        raise InputError(f"--corruption_model_root {root}: {what} {corruption} (there: {names})")
    path = found[0] / ckpt.BEST_RA
    if not path.is_file():
        raise InputError(f"{path}: no such file; train_corruption.py --save_dir writes it")
    return path


def check_facts(checkpoint: Mapping, path: str | Path, wanted: Mapping) -> None:
    """Raise InputError where one of our checkpoints records something else than `wanted`.

    wanted: by names of `ckpt.FACTS`; what older files lack is passed over. Warns of a model that
    has patches on.
    """
    known = ckpt.facts(checkpoint)
    if known.get("patched"):
        warn(f"{path} is patched already, against {known['patched']}")
    for name, ours in wanted.items():
        theirs = known.get(name, ours)
        if theirs == ours:
            continue
        if name == "class_names":
            pairs = itertools.zip_longest(theirs, ours, fillvalue="none")
            theirs, ours = next((a, b) for a, b in pairs if a != b)
        raise InputError(f"{path}: trained with {name} {theirs}, but here it must be {ours}")


def check_severity(args: argparse.Namespace, path: str | Path, severity: int | None) -> None:
    """Warn where the severity of the images that made the model or signature is not asked for."""
    if severity not in (None, *args.severity):
        said = f"{path} was trained at severity {severity}, --severity is"
        warn(f"{said} {' '.join(map(str, args.severity))}")


def load_states(
    args: argparse.Namespace, base: Mapping, facts: Mapping
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """θ_pre, θ_std and every θ_c as float32 state dicts; with --signature only the θ_c given.

    base: what --base_model holds; facts: of the clean data. Also the severity that each θ_c says
    it was trained at (the highest --severity where it says nothing). Raises InputError for a
    robust --base_model, and for θ_c of other data than θ_std.
    """
    states, severities = {}, {}
    known, key = ckpt.facts(base) if args.patched_model else facts, args.checkpoint_key
    like = {name: known[name] for name in facts if name in known}
    check_facts(base, args.base_model, {"corruption": []})
    if not args.signature:
        source = arguments.pretrained_source(args)
        states["pretrained"] = ckpt.pretrained_state_dict(source, args.arch, key)
        states["standard"] = ckpt.state_dict_of(base, args.base_model, key)
        for path, state in zip((source, args.base_model), states.values(), strict=True):
            for name in itertools.chain(*depth_order(args.arch)):
                if name not in state:
                    raise InputError(f"{path} does not hold a {args.arch}: it has no {name}")
        pretrained_hash = ckpt.backbone_hash(states["pretrained"])
    for name in args.corruption if args.corruption_model_root and not args.choose else ():
        path = find_robust(args.corruption_model_root, name)
        checkpoint = ckpt.read(path)
        check_facts(checkpoint, path, {"corruption": [name], **like})
        states[name] = ckpt.state_dict_of(checkpoint, path, key)
        severity = checkpoint.get("severity")
        severities[name] = severity if severity in range(1, 6) else max(args.severity)
        check_severity(args, path, severities[name])
        lineage = checkpoint.get("pretrained_hash")
        if lineage and not args.signature and lineage != pretrained_hash:
            warn(f"{path} was not fine-tuned from {source}")
    return states, severities


def load_signatures(args: argparse.Namespace) -> list[RobustWeightSignature]:
    """The files of --signature; their corruptions become --corruption."""
    signatures = [RobustWeightSignature.load(path) for path in args.signature]
    if args.signature and args.reestimate:
        signatures = [replace(s, statistics={}) for s in signatures]
    for path, signature in zip(args.signature, signatures, strict=True):
        if signature.arch != args.arch:
            raise InputError(f"{path}: a signature of {signature.arch}, but --arch is {args.arch}")
        check_severity(args, path, signature.severity)
        if not signature.corruptions:
            raise InputError(f"--signature {path}: against which corruption it is, it doesn't say")
    if signatures:
        args.corruption = list(dict.fromkeys(c for s in signatures for c in s.corruptions))
    return signatures


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError where an output can't be written, or would replace an input or another."""
    inputs = (args.base_model, args.patched_model, arguments.pretrained_source(args))
    taken = {Path(file).resolve() for file in (*inputs, *args.signature) if file}
    for flag in ("save_model", "save_log"):
        if not (file := getattr(args, flag)):
            continue
        path = Path(file)
        if path.is_dir():
            raise InputError(f"--{flag} {file}: that is a folder, name a file")
        for written in (path, path.with_name(f"{path.name}.json")):
            if written.resolve() in taken:
                raise InputError(f"--{flag} {file}: {written} is read or written as well; rename")
            taken.add(written.resolve())
        check_writable(path.parent)
    if args.save_signature:
        if args.patched_model:
            told = "the signatures are saved with neither fingerprint nor statistics of batch norm"
            warn(f"--patched_model: {told}, which are of --base_model")
        for file in args.signature:
            if Path(file).resolve().parent == Path(args.save_signature).resolve():
                raise InputError(f"--save_signature: {file} is in there; name another folder")
        check_writable(args.save_signature)
