"""Extract Robust Weight Signatures, patch a standard model with them, and evaluate.

    θ_patched[l] = θ_target[l] + Σ_c w_c · RWS_c[l]      l in the keep_num shallowest layers

RWS_c is θ_c − θ_pre with the direction of clean fine-tuning projected out (utils/signature.py).

    python model_patching.py --keep_num 5 --dataset cifar10 --arch vgg16 \\
        --corruption gaussian_noise --data data/cifar10 --corruption_model_root runs/vgg16/robust \\
        --base_model runs/vgg16/standard/model_SA_best.pth.tar --pretrained vgg16_pretrained.pth

Several corruptions are composed, w_c = alpha/n each, or --finetune_alpha for each its own.
Several values of --keep_num or --alpha give a row of the table each. Signatures can be kept:

    ... --quantization 16 --save_signature signatures        # signatures/gaussian_noise.rws, packed
    python model_patching.py --dataset cifar10 --arch vgg16 --data data/cifar10 \\
        --base_model standard.pth.tar --signature signatures/gaussian_noise.rws --alpha 0.5 1
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
from datasets.corrupted import corrupted_set
from datasets.corruptions import CORRUPTIONS
from datasets.images import ImageSet, fingerprint
from datasets.loader import BatchLoader, augmentation_for, fits
from datasets.normalization import normalization
from models import ARCHS, build_model
from models.layers import LAYERS, depth_order, layer_keys
from utils import arguments, report
from utils import checkpoint as ckpt
from utils.atomic import check_writable
from utils.batchnorm import has_batchnorm, reestimate
from utils.engine import choose_device, evaluate, to_device, use_amp
from utils.errors import InputError, script_errors
from utils.lock import hold
from utils.quantize import METHODS, check_levels
from utils.signature import RobustWeightSignature, patch

BN_BATCH = 128  # images per batch of the running average (the authors' choice)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    data = parser.add_argument_group("data")
    arguments.add_dataset(data)
    arguments.add_subset(data)
    data.add_argument("--data", metavar="DIR", help="the clean set")
    data.add_argument(
        "--corruption_data",
        metavar="DIR",
        help="the corrupted set in a published layout; what is not there is generated from --data",
    )
    data.add_argument(
        "--corruption", nargs="+", default=[], metavar="NAME", help="compose these signatures"
    )
    arguments.add_corruption(data)
    data.add_argument(
        "--test_all_corruptions", action="store_true", help="measure RA on all 19, not only these"
    )
    data.add_argument("--seed", type=int, default=0, help="of generated corruptions")

    model = parser.add_argument_group("models")
    model.add_argument("--arch", default="vgg16", choices=ARCHS, help="architecture")
    arguments.add_pretrained(model)
    model.add_argument("--base_model", metavar="FILE", help="θ_std: the standard model")
    model.add_argument(
        "--patched_model", metavar="FILE", help="θ_target, the model to patch, if not --base_model"
    )
    model.add_argument(
        "--corruption_model_root",
        metavar="DIR",
        help=f"θ_c: one folder per corruption with its {ckpt.BEST_RA}",
    )

    signature = parser.add_argument_group("signature")
    signature.add_argument(
        "--keep_num",
        type=int,
        nargs="+",
        metavar="K",
        help="shallowest layers kept (default: 7)",
    )
    signature.add_argument(
        "--alpha",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="A",
        help="strength; each of n signatures gets A/n",
    )
    signature.add_argument(
        "--finetune_alpha",
        type=float,
        nargs="+",
        metavar="A",
        help="a strength for each of --corruption, in its order; wins over --alpha",
    )
    add_ablations(signature)
    signature.add_argument(
        "--quantization", type=int, metavar="N", help="quantize each tensor to N levels"
    )
    signature.add_argument(
        "--quantization_type", default="linear", choices=METHODS, help="spacing of the levels"
    )

    signature.add_argument(
        "--per_channel", action="store_true", help="a range of levels per output channel"
    )
    signature.add_argument(
        "--bn_float", action="store_true", help="keep the batch-norm tensors of a ResNet in float32"
    )
    signature.add_argument(
        "--signature",
        nargs="+",
        default=[],
        metavar="FILE",
        help="patch from these .rws files; no --pretrained and no robust models are needed",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--save_signature", metavar="DIR", help="write each signature to DIR/CORRUPTION.rws"
    )
    output.add_argument(
        "--save_log",
        metavar="FILE",
        help="accumulate TA and RA over runs in FILE; this run's go to FILE.json",
    )
    output.add_argument("--save_model", metavar="FILE", help="write the patched model's checkpoint")
    arguments.add_device(parser)
    args = parser.parse_args(argv)
    check(args)
    return args


def add_ablations(group: argparse._ActionsContainer) -> None:
    """--no-projection, --layers."""
    group.add_argument(
        "--no-projection",
        dest="projection",
        action="store_false",
        help="ablation: keep the direction of clean fine-tuning in (plain task arithmetic)",
    )
    group.add_argument(
        "--layers",
        default="shallowest",
        choices=LAYERS,
        help="ablation: which --keep_num layers are kept",
    )


def check(args: argparse.Namespace) -> None:
    """Raise InputError for every value that can be judged before anything is read."""
    datasets.base_name(args.dataset)
    arguments.check_corruptions(args.corruption)
    arguments.check_severity(args.severity)
    arguments.check_seed(args.seed)
    arguments.check_frost(args.frost_dir)
    for keep_num in args.keep_num or ():
        layer_keys(args.arch, keep_num)
    if args.base_model is None:
        raise InputError("--base_model is needed: the standard model")
    if args.signature:
        clash = {
            "--corruption": args.corruption,
            "--quantization": args.quantization,
            "--bn_float": args.bn_float,
            "--per_channel": args.per_channel,
            "--save_signature": args.save_signature,
            "--keep_num": args.keep_num,
            "--no-projection": not args.projection,
            "--layers": args.layers != "shallowest",
        }
        for flag, value in clash.items():
            if value:
                raise InputError(f"{flag} is for extracting; --signature brings it along")
    else:
        needed = {
            "--corruption": args.corruption,
            "--corruption_model_root": args.corruption_model_root,
            "--pretrained": arguments.pretrained_source(args),
        }
        for flag, value in needed.items():
            if not value:
                raise InputError(f"{flag} is needed to extract signatures (or name --signature)")
        args.keep_num = args.keep_num or [min(7, len(depth_order(args.arch)))]
        for flag in ("bn_float", "per_channel"):
            if getattr(args, flag) and args.quantization is None:
                raise InputError(f"--{flag} goes with --quantization; give both")
    if args.quantization is not None:
        check_levels(args.quantization, args.quantization_type)
    count = len(args.signature or args.corruption)
    if args.finetune_alpha is not None and len(args.finetune_alpha) != count:
        raise InputError(
            f"--finetune_alpha has {len(args.finetune_alpha)} values for {count} signatures; "
            "give one for each"
        )
    strengths = args.finetune_alpha or args.alpha
    if not all(0 <= a < float("inf") for a in strengths):
        raise InputError("--alpha and --finetune_alpha: finite numbers from 0 on")
    rows = (1 if args.signature else len(args.keep_num)) * len(weightings(args, count))
    for flag in ("save_log", "save_model", "save_signature"):
        if getattr(args, flag) and rows > 1:
            raise InputError(f"--{flag} takes one patch, but --keep_num and --alpha make {rows}")
    check_outputs(args)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError where an output can't be written, or would replace an input or another."""
    inputs = [args.base_model, args.patched_model, arguments.pretrained_source(args)]
    taken = {Path(file).resolve() for file in (*inputs, *args.signature) if file}
    for flag in ("save_model", "save_log"):
        file = getattr(args, flag)
        if not file:
            continue
        path = Path(file)
        if path.is_dir():
            raise InputError(f"--{flag} {file}: that is a folder, name a file")
        for written in (path, path.with_name(f"{path.name}.json")):
            if written.resolve() in taken:
                raise InputError(f"--{flag} {file}: {written} is read or written as well; rename")
            taken.add(written.resolve())
        check_writable(path.parent)
    if args.save_log:
        read_log(Path(args.save_log))
    if args.save_signature:
        check_writable(args.save_signature)


# ---- what is read ---------------------------------------------------------------------------


@dataclass
class Study:
    """Everything a run works on: models, data and how to evaluate."""

    args: argparse.Namespace
    device: torch.device
    amp: bool
    target: nn.Module
    states: dict[str, dict[str, Tensor]]  # pretrained, standard, each corruption's robust model
    signatures: list[RobustWeightSignature]  # read from files; else extracted from the states
    clean: ImageSet
    corrupted: dict[str, ImageSet]
    severities: dict[str, int]  # that each corruption's robust model was trained at
    source: str  # the data set of the standard model that signatures are extracted against
    clean_train: ImageSet | None = None

    def training_images(self, name: str) -> ImageSet:
        """The training images under corruption `name`, for the statistics of batch norm."""
        if self.clean_train is None:
            self.clean_train = arguments.load_images(self.args, self.args.data, "train")
        return corrupted_part(self.args, self.clean_train, name, "train", self.severities[name])

    def measure(self, title: str, names: Sequence[str] | None = None) -> dict:
        """TA of the target as it is now, and RA on the corruptions `names` (default: all here)."""
        names = list(self.corrupted) if names is None else names
        return {
            "TA": evaluate(self.target, self.clean, amp=self.amp, title=f"{title}, clean"),
            "RA": {
                c: evaluate(self.target, self.corrupted[c], amp=self.amp, title=f"{title}, {c}")
                for c in names
            },
        }


def find_robust(root: str | Path, corruption: str) -> Path:
    """The checkpoint of `corruption` under `root`: in the folder of that name, or with it in.

    Raises InputError when there is no such folder, several, or no checkpoint in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--corruption_model_root {root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    found = [f for f in folders if f.name == corruption] or [
        f for f in folders if corruption in f.name
    ]
    if len(found) != 1:
        names = ", ".join(f.name for f in (found or folders)) or "nothing"
        what = "several folders fit" if found else "no folder for"
        raise InputError(f"--corruption_model_root {root}: {what} {corruption} (there: {names})")
    path = found[0] / ckpt.BEST_RA
    if not path.is_file():
        raise InputError(f"{path}: no such file; train_corruption.py --save_dir writes it")
    return path


def load_states(args: argparse.Namespace) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """θ_pre, θ_std and every θ_c as float32 state dicts; with --signature only the θ_c given.

    Also the severity that each θ_c says it was trained at (--severity where it says nothing).
    """
    states, severities = {}, {}
    wanted = [key for layer in depth_order(args.arch) for key in layer]
    if not args.signature:
        source = arguments.pretrained_source(args)
        states["pretrained"] = ckpt.pretrained_state_dict(source, args.arch)
        states["standard"] = ckpt.read_state_dict(args.base_model)
        for path, state in ((source, states["pretrained"]), (args.base_model, states["standard"])):
            missing = [key for key in wanted if key not in state]
            if missing:
                raise InputError(f"{path} does not hold a {args.arch}: it has no {missing[0]}")
        pretrained_hash = ckpt.backbone_hash(states["pretrained"])
    if args.corruption_model_root:
        for name in args.corruption:
            path = find_robust(args.corruption_model_root, name)
            checkpoint = ckpt.read(path)
            states[name] = ckpt.state_dict_of(checkpoint, path)
            severity = checkpoint.get("severity")
            severities[name] = severity if severity in range(1, 6) else args.severity
            lineage = checkpoint.get("pretrained_hash")
            if lineage and not args.signature and lineage != pretrained_hash:
                warnings.warn(f"{path} was not fine-tuned from {source}", stacklevel=2)
    return states, severities


def load_signatures(args: argparse.Namespace) -> list[RobustWeightSignature]:
    """The files of --signature; their corruptions become --corruption."""
    signatures = [RobustWeightSignature.load(path) for path in args.signature]
    for path, signature in zip(args.signature, signatures, strict=True):
        if signature.arch != args.arch:
            raise InputError(f"{path}: a signature of {signature.arch}, but --arch is {args.arch}")
    if signatures:
        names = [name for signature in signatures for name in signature.corruptions]
        args.corruption = list(dict.fromkeys(names))
        arguments.check_corruptions(args.corruption)
        if not args.corruption:
            raise InputError("--signature: the files do not say against which corruption they are")
    return signatures


def corrupted_part(
    args: argparse.Namespace, clean: ImageSet, name: str, split: str, severity: int
) -> ImageSet:
    """The `name` copy of a clean split: published under --corruption_data, or generated."""
    return corrupted_set(
        clean,
        name,
        severity,
        split,
        args.seed,
        root=args.corruption_data,
        frost_dir=args.frost_dir,
        device=choose_device(args.device),
    )


def load_study(args: argparse.Namespace) -> Study:
    """Read models and test images, and check that they fit each other."""
    device = choose_device(args.device)
    dataset = datasets.base_name(args.dataset)
    signatures = load_signatures(args)
    states, severities = load_states(args)
    for signature in signatures:
        for name in signature.corruptions:
            severities[name] = signature.severity or args.severity
    clean = arguments.load_images(args, args.data, "test")
    base = ckpt.read(args.base_model)
    path = args.patched_model or args.base_model
    checkpoint = ckpt.read(path) if args.patched_model else base
    target_state = ckpt.state_dict_of(checkpoint, path)
    constants = ([0.0] * 3, [1.0] * 3)
    if "normalize.mean" not in target_state:
        constants = normalization(dataset, arguments.load_images(args, args.data, "train"))
    target = build_model(args.arch, len(clean.classes), *constants)
    ckpt.load_model_weights(target, args.arch, target_state, path)
    target.pretrained_hash = checkpoint.get("pretrained_hash")
    measured = CORRUPTIONS if args.test_all_corruptions else args.corruption

    def resident(images: ImageSet) -> ImageSet:
        """On the device, where a sweep reads it again and again, if there is room."""
        return images.to(device) if fits(images.images, device) else images

    corrupted = {c: corrupted_part(args, clean, c, "test", args.severity) for c in measured}
    return Study(
        args=args,
        device=device,
        amp=use_amp(device, args.amp),
        target=to_device(target, device).eval(),
        states=states,
        signatures=signatures,
        severities=severities,
        source=base.get("dataset", dataset),
        clean=resident(clean),
        corrupted={name: resident(images) for name, images in corrupted.items()},
    )


# ---- signatures and patches -----------------------------------------------------------------


def weightings(args: argparse.Namespace, n: int) -> list[list[float]]:
    """The weights w_c of n signatures, for each row: --finetune_alpha, or for each --alpha a/n."""
    if args.finetune_alpha is not None:
        return [args.finetune_alpha]
    return [[a / n] * n for a in args.alpha]


def extract(
    study: Study, keep_num: int, names: Sequence[str] | None = None
) -> list[RobustWeightSignature]:
    """RWS_c of each corruption of the study (or of `names` among them), quantized if asked for."""
    args = study.args
    signatures = []
    for name in names or args.corruption:
        signature = RobustWeightSignature.extract(
            study.states["pretrained"],
            study.states["standard"],
            study.states[name],
            keep_num,
            arch=args.arch,
            corruption=name,
            severity=study.severities[name],
            dataset=study.source,
            project=args.projection,
            layers=args.layers,
            seed=args.seed,
        )
        if args.quantization is not None:
            signature = signature.quantize(
                args.quantization,
                args.quantization_type,
                per_channel=args.per_channel,
                bn_float=args.bn_float,
            )
        signatures.append(signature)
    return signatures


@contextlib.contextmanager
def patched(
    study: Study, signatures: Sequence[RobustWeightSignature], weights: Sequence[float]
) -> Iterator[nn.Module]:
    """The target with Σ_c w_c · RWS_c on it; the intact target again afterwards.

    For a model with batch norm the running statistics are re-estimated on the training images
    under the signatures' corruptions.
    """
    total = sum(s.scale(w) for s, w in zip(signatures, weights, strict=True))
    with patch(study.target, total):
        if has_batchnorm(study.target) and sum(weights) > 0:
            loaders = (  # one at a time: a whole training set each
                BatchLoader(
                    study.training_images(name),
                    BN_BATCH,
                    augment=augmentation_for(study.clean.name),
                    device=study.device,
                    shuffle=True,
                    seed=study.args.seed,
                )
                for name in dict.fromkeys(total.corruptions)
            )
            reestimate(study.target, loaders, min(1.0, sum(weights)), amp=study.amp)
        yield study.target


@contextlib.contextmanager
def holding(study: Study, state: dict[str, Tensor], path: str | Path) -> Iterator[nn.Module]:
    """The target with the weights `state`, read from `path`; its own again afterwards."""
    model = study.target
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ckpt.load_model_weights(model, study.args.arch, state, path)
    try:
        yield model
    finally:
        model.load_state_dict(original)


# ---- results --------------------------------------------------------------------------------


def table(rows: Sequence[dict], own: Sequence[str]) -> str:
    """The Markdown table of a run: TA, RA per corruption, mean RA, share recovered."""
    names = list(rows[0]["RA"])
    extra = [n for n in names if n not in own]
    columns = ["model", "TA, %", *(f"RA {c}, %" for c in own), "RA mean, %"]
    if extra:
        columns.append(f"RA all {len(names)}, %")
    columns.append("recovered, %")
    lines = []
    for row in rows:
        line = [row["model"], row["TA"], *(row["RA"].get(c) for c in own), row["RA_mean"]]
        if extra:
            line.append(report.mean(row["RA"].values()) if len(row["RA"]) == len(names) else None)
        lines.append([*line, row.get("recovered")])
    return report.markdown_table(columns, lines)


def read_log(path: Path) -> dict:
    """The authors' log at `path`, empty where there is none.

    {"std"|"patched": {"clean": [TA of each run], "robust": {corruption: latest RA}}}
    Raises InputError for anything else in the file.
    """
    if not path.exists():
        return {kind: {"clean": [], "robust": {}} for kind in ("std", "patched")}
    log = ckpt.read(path, "log")
    if not all(_is_log_entry(log.get(kind)) for kind in ("std", "patched")):
        raise InputError(f"--save_log {path}: holds something else than a log of this script")
    return log


def _is_log_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"clean", "robust"}:
        return False
    clean, robust = entry["clean"], entry["robust"]
    if not isinstance(clean, list) or not isinstance(robust, dict):
        return False
    return all(isinstance(accuracy, Real) for accuracy in (*clean, *robust.values()))


def update_log(path: Path, standard: dict, patched: dict) -> None:
    """Add a run to the log at `path` and print its averages over the runs.

    Processes that add to one log at the same time take turns.
    """
    with hold(path.with_name(f".{path.name}.lock")):
        log = read_log(path)
        for kind, row in (("std", standard), ("patched", patched)):
            log[kind]["clean"].append(row["TA"])
            log[kind]["robust"].update(row["RA"])
        ckpt.save(log, path)
    print(f"\n{path}: averages over {len(log['std']['clean'])} runs")
    for kind in ("std", "patched"):
        clean, robust = log[kind]["clean"], log[kind]["robust"]
        print(
            f"  {kind:<8} TA {report.mean(clean):.2f}"
            f"  RA {report.mean(robust.values()):.2f} over {len(robust)} corruptions"
        )


def upper_bound(study: Study, names: Sequence[str]) -> dict | None:
    """The row of the robust models `names`, each on clean images and on its own corruption.

    None where they are not given, or their classes are not the target's (transfer).
    """
    own = study.target.state_dict()
    for name in names:
        theirs = study.states.get(name)
        if theirs is None or any(theirs.get(k, v).shape != v.shape for k, v in own.items()):
            return None
    accuracies, ras = [], {}
    for name in names:
        path = find_robust(study.args.corruption_model_root, name)
        with holding(study, study.states[name], path):
            result = study.measure(f"robust to {name}", [name])
        accuracies.append(result["TA"])
        ras |= result["RA"]
    return {"model": "robust", "TA": report.mean(accuracies), "RA": ras}


def run(args: argparse.Namespace) -> dict:
    """Patch and evaluate as `args` (from `parse_args`) says; gives the table and its source."""
    study = load_study(args)
    print_header(study)
    own = args.corruption
    standard = {"model": "standard", **study.measure("standard")}

    robust = upper_bound(study, own)

    rows = [standard]
    if study.signatures:
        choices = [study.signatures]
    else:
        choices = (extract(study, keep_num) for keep_num in args.keep_num)
    for signatures in choices:
        for weights in weightings(args, len(signatures)):
            kept = " ".join(str(k) for k in dict.fromkeys(s.keep_num for s in signatures))
            title = f"patched, keep_num {kept}" + describe_weights(args, weights)
            with patched(study, signatures, weights) as model:
                rows.append({"model": title, **study.measure(title)})
                if args.save_model:
                    save_model(study, model)
    rows += [robust] if robust else []
    for row in rows:
        row["RA_mean"] = report.mean(row["RA"][c] for c in own)
    if robust:
        for row in rows[1:-1]:
            ras = (of["RA_mean"] for of in (standard, row, robust))
            row["recovered"] = report.recovered(*ras)
    print(table(rows, own))
    warn_below_chance(rows, len(study.clean.classes))
    if args.save_signature:
        print()
        for name, signature in zip(own, signatures, strict=True):
            path = Path(args.save_signature) / f"{name}.rws"
            print(f"{path}: {signature.save(path):,} bytes")
    result = {
        "rows": rows,
        "arguments": vars(args),
        "data": fingerprint(study.clean),
        **report.provenance(study.device),
    }
    places = [f"{file}.json" for file in (args.save_log, args.save_model) if file]
    places += [Path(args.save_signature) / "results.json"] if args.save_signature else []
    for place in places:
        report.write_json(place, result)
    if args.save_log:
        update_log(Path(args.save_log), standard, rows[1])
    return result


def warn_below_chance(rows: Sequence[dict], classes: int) -> None:
    """Warn of each patched row with an accuracy below that of guessing."""
    for row in rows:
        lowest = min(row["TA"], *row["RA"].values())
        if row["model"].startswith("patched") and lowest < 100 / classes:
            warnings.warn(
                f"{row['model']}: an accuracy of {lowest:.1f} % is below chance, "
                f"{100 / classes:.1f} %; do model, signatures and data set belong together?",
                stacklevel=2,
            )


def describe_weights(args: argparse.Namespace, weights: Sequence[float]) -> str:
    """The strength of a row in words, empty for the usual alpha 1."""
    if args.finetune_alpha is not None:
        return ", w " + " ".join(f"{w:g}" for w in weights)
    alpha = sum(weights)
    return "" if args.alpha == [1.0] else f", alpha {alpha:g}"


def save_model(study: Study, model: nn.Module) -> None:
    """Write the patched model to --save_model, in the form train_corruption.py reads."""
    args = study.args
    content = {
        "state_dict": model.state_dict(),
        "arch": args.arch,
        "dataset": datasets.base_name(args.dataset),
        "patched": list(args.corruption),
        "pretrained_hash": study.target.pretrained_hash,
    }
    ckpt.save(content, args.save_model)


def print_header(study: Study) -> None:
    """Say what is about to be patched and measured."""
    args, clean = study.args, study.clean
    weights = weightings(args, len(args.signature or args.corruption))
    facts = {
        "model": f"{args.arch}: {args.patched_model or args.base_model}",
        "signatures": " ".join(args.signature)
        or f"{' + '.join(args.corruption)}, keep_num {' '.join(map(str, args.keep_num))}",
        "weights": "; ".join(" ".join(f"{w:g}" for w in ws) for ws in weights),
        "test images": f"{len(clean):,} of {clean.name}, clean and corrupted at severity "
        f"{args.severity} ({', '.join(sorted({s.source for s in study.corrupted.values()}))})",
        **arguments.frost_note(study.corrupted, args.frost_dir),
        "device": f"{report.device_name(study.device)}, {'bf16' if study.amp else 'float32'}",
    }
    if args.quantization is not None:
        facts["quantization"] = f"{args.quantization} levels, {args.quantization_type}"
    report.header("model_patching.py", facts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
