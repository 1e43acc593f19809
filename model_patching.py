"""Extract Robust Weight Signatures, patch a standard model with them, and evaluate.

    θ_patched[l] = θ_target[l] + Σ_c w_c · RWS_c[l]      l in the keep_num shallowest layers

RWS_c is θ_c − θ_pre with the direction of clean fine-tuning projected out (utils/signature.py).

    python model_patching.py --keep_num 5 --dataset cifar10 --arch vgg16 \\
        --corruption gaussian_noise --data data/cifar10 --corruption_model_root runs/vgg16/robust \\
        --base_model runs/vgg16/standard/model_SA_best.pth.tar --pretrained vgg16_pretrained.pth

Several corruptions are composed, w_c = alpha/n each, or as --finetune_alpha or --learn_alpha say.
Several values of --keep_num or --alpha give a row of the table each. Signatures can be kept:

    ... --quantization 16 --save_signature signatures        # signatures/gaussian_noise.rws, packed
    python model_patching.py --dataset cifar10 --arch vgg16 --data data/cifar10 \\
        --base_model standard.pth.tar --signature signatures/gaussian_noise.rws --alpha 0.5 1

Of several every image can choose its own: --signature signatures/*.rws --choose 1
"""

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import datasets
from datasets import bank, flags
from datasets.corrupted import Copies, changed, corrupted_set
from datasets.corruptions import CORRUPTIONS
from datasets.images import ImageSet, fingerprint, spaced
from datasets.loader import BatchLoader, augmentation_for, evaluation_batches, fits
from datasets.normalization import normalization
from models import build_model
from utils import arguments, log, report, sources
from utils import checkpoint as ckpt
from utils.batchnorm import has_batchnorm, interpolate, reestimate, running_statistics
from utils.engine import arithmetic, check_side, choose_device, evaluate, to_device, use_amp
from utils.errors import script_errors
from utils.fingerprint import SignatureBank
from utils.learn import BATCH, STEPS, learn, words
from utils.measurements import Measurements
from utils.signature import Method, RobustWeightSignature, patch

BN_BATCH = 128  # images per batch of the running average (the authors' choice)


class Patching:
    """The models of one run, ready to be patched and measured; nothing is measured twice.

    args: the settings, as `parse_args` gives them; method: how signatures are made; kept: the
    accuracies measured before, if they are kept in a file.
    Raises InputError for models and data that don't fit each other.
    """

    def __init__(self, args: Namespace, method: Method, kept: Measurements | None = None) -> None:
        self.args, self.method = args, method
        self.device = choose_device(args.device)
        self.amp = use_amp(self.device, args.amp)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, self.amp)
        self.stored = sources.load_signatures(args)
        base = ckpt.read(args.base_model)
        clean = flags.load_images(args, args.data, "test")
        check_side(args.arch, clean.images)
        path = args.patched_model or args.base_model
        checkpoint = ckpt.read(path) if args.patched_model else base
        self.facts = flags.data_facts(args, clean)
        sources.check_facts(checkpoint, path, self.facts)
        self.states, self.severities = sources.load_states(args, base, self.facts)
        stored = {c: s.severity or max(args.severity) for s in self.stored for c in s.corruptions}
        self.severities |= stored
        self.trained_on = base.get("dataset", datasets.base_name(args.dataset))  # of θ_std
        self.classes = ckpt.facts(base).get("class_names", self.facts.get("class_names"))  # its own
        state = ckpt.state_dict_of(checkpoint, path, args.checkpoint_key)
        constants = ([0.0] * 3, [1.0] * 3)  # kept by a checkpoint that has its own
        if "normalize.mean" not in state:
            constants = normalization(clean.name, self._clean_train)
        model = build_model(args.arch, len(clean.classes), *constants)
        ckpt.load_model_weights(model, args.arch, state, path)
        model.pretrained_hash = checkpoint.get("pretrained_hash")
        self.target = to_device(model, self.device, self.amp).eval()
        self.standard_hash = ckpt.backbone_hash(state)  # if it is θ_std

        measured = CORRUPTIONS if args.test_all_corruptions else args.corruption
        several = len(args.severity) > 1
        self.labels = {c: [c + f" {s}" * several for s in args.severity] for c in measured}
        sets = {"clean": clean}
        for c, labels in self.labels.items():
            for label, s in zip(labels, args.severity, strict=True):
                sets[label] = self.corrupted(clean, c, "test", s)
        self.sources = {name: images.source for name, images in sets.items()}
        self.sets = {  # on the device, where a sweep reads them again and again, if there is room
            name: images.to(self.device) if fits(images.images, self.device) else images
            for name, images in sets.items()
        }
        self.kept = kept or Measurements()
        self.prints = {name: fingerprint(images) for name, images in sets.items()}
        self._target_hash = ckpt.tensors_hash(self.target.state_dict())
        self._signatures: dict[tuple[str, Method], RobustWeightSignature] = {}
        self._training_set: dict[str, ImageSet] = {}  # the last one that was corrupted
        self._copies = f" {changed(args.corruption_data)}" if args.corruption_data else ""

    @functools.cached_property
    def _clean_train(self) -> ImageSet:
        return flags.load_images(self.args, self.args.data, "train")

    @functools.cached_property
    def validation(self) -> ImageSet:
        return flags.load_images(self.args, self.args.data, "val")

    # ---- signatures and patches ----------------------------------------------------------

    def signature(self, name: str, **knobs: object) -> RobustWeightSignature:
        """RWS of corruption `name`, made by the method with `knobs` (fields of Method) changed."""
        method = replace(self.method, **knobs)
        if (name, method) not in self._signatures:
            states = (self.states[role] for role in ("pretrained", "standard", name))
            facts = {"arch": self.args.arch, "corruption": name, "dataset": self.trained_on}
            facts |= {"severity": self.severities[name], "seed": self.args.seed}
            made = RobustWeightSignature.extract(*states, method=method, **facts)
            self._signatures[name, method] = made
        return self._signatures[name, method]

    def fingerprinted(self, signature: RobustWeightSignature) -> RobustWeightSignature:
        """`signature` with all that a bank needs: fingerprint, and statistics of batch norm."""
        signature = self.with_statistics(signature)
        how = Copies(5, self.args.seed, None, self.args.frost_dir, self.device, resident=True)
        with self.autocast:
            return bank.fingerprinted(signature, self.target, self.validation, how)

    def with_statistics(self, signature: RobustWeightSignature) -> RobustWeightSignature:
        """`signature`, if it has none, with the running statistics of θ_std under it."""
        if signature.statistics or self.args.patched_model or not has_batchnorm(self.target):
            return signature
        with self.patched([signature], [1.0]) as model:
            return replace(signature, statistics=running_statistics(model))

    def learnt(
        self, signatures: Sequence[RobustWeightSignature], by: str, unlabeled: bool, steps: int
    ) -> RobustWeightSignature:
        """Σ_c w_c · RWS_c as one, w learnt on validation images for each "signature" or "layer"."""
        n, names = len(signatures), dict.fromkeys(c for s in signatures for c in s.corruptions)
        clean = spaced(self.validation, steps * BATCH // (1 + len(names)))  # all that is drawn
        copies = [self.corrupted(clean, c, "val", self.severities[c]) for c in names]
        parts = [images.images for images in (clean, *copies)]
        with self.patched(signatures, [1 / n] * n) as model:
            how = {"statistics": running_statistics(model), "amp": self.amp}
        how |= {"per_layer": by == "layer", "seed": self.args.seed, "steps": steps}
        return learn(self.target, signatures, parts, None if unlabeled else clean.labels, **how)

    def total(
        self, signatures: Sequence[RobustWeightSignature], weights: Sequence[float]
    ) -> RobustWeightSignature:
        """Σ_c w_c · RWS_c, with the signatures' statistics pooled if they are of this target."""
        total = sum(s.scale(w) for s, w in zip(signatures, weights, strict=True))
        pooled = sum(replace(s, tensors={}) for s in signatures).statistics
        return replace(total, statistics=pooled if total.standard == self.standard_hash else {})

    @contextlib.contextmanager
    def patched(
        self, signatures: Sequence[RobustWeightSignature], weights: Sequence[float]
    ) -> Iterator[nn.Module]:
        """The target with Σ_c w_c · RWS_c on it; the intact target again afterwards.

        For a model with batch norm the running statistics are the signatures', or without them
        re-estimated on the training images under the signatures' corruptions.
        """
        total, strength = self.total(signatures, weights), min(1.0, max(0.0, sum(weights)))
        with patch(self.target, total):
            interpolate(self.target, total.statistics, strength)
            if has_batchnorm(self.target) and strength > 0 and not total.statistics:
                names = dict.fromkeys(total.corruptions)
                loaders = map(self._training_batches, names)  # made when they are needed
                reestimate(self.target, loaders, strength, amp=self.amp)
            yield self.target

    @contextlib.contextmanager
    def holding(self, state: dict[str, Tensor], path: str | Path) -> Iterator[nn.Module]:
        """The target with the weights `state`, read from `path`; its own again afterwards."""
        original = {key: tensor.clone() for key, tensor in self.target.state_dict().items()}
        ckpt.load_model_weights(self.target, self.args.arch, state, path)
        try:
            yield self.target
        finally:
            self.target.load_state_dict(original)

    def corrupted(
        self, clean: ImageSet, name: str, split: str, severity: int, published: bool = True
    ) -> ImageSet:
        """The `name` copy of a clean split: `published` under --corruption_data, or generated."""
        root = self.args.corruption_data if published else None
        how = Copies(
            severity, self.args.seed, root, self.args.frost_dir, self.device, resident=True
        )
        return corrupted_set(clean, name, split, how)

    def _training_batches(self, name: str) -> BatchLoader:
        if name not in self._training_set:
            self._training_set.clear()  # a sweep needs the last one again and again
            images = self.corrupted(self._clean_train, name, "train", self.severities[name])
            self._training_set[name] = images
        images = self._training_set[name]
        how = {"augment": augmentation_for(images.name), "shuffle": True, "seed": self.args.seed}
        return BatchLoader(images, BN_BATCH, device=self.device, **how)

    # ---- measuring: {"TA": accuracy on clean test images, "RA": {corruption: on corrupted}} -----

    def measure(
        self,
        key: str,
        names: Sequence[str],
        title: str,
        context: contextlib.AbstractContextManager | None = None,
    ) -> dict:
        """TA and RA under `names`, in percent, of the target as it is within `context`.

        key: of these weights; what was measured under it before is looked up.
        """
        arithmetic = f"{self.device.type} {'bf16' if self.amp else 'float32'}"
        keys = {part: f"{key} | {self.prints[part]} {arithmetic}" for part in ("clean", *names)}
        unknown = keys.values() - self.kept.known.keys()

        def accuracy(part: str) -> float:
            batches = evaluation_batches(self.sets[part], self.device)
            return evaluate(self.target, batches, amp=self.amp, title=f"{title}: {part}")

        with context if context and unknown else contextlib.nullcontext():
            found = {p: self.kept.get(k, functools.partial(accuracy, p)) for p, k in keys.items()}
        return {"TA": found.pop("clean"), "RA": found}

    def standard(self, names: Sequence[str]) -> dict:
        """`measure` of the intact target."""
        return self.measure(self._target_hash, names, "standard")

    def with_patch(
        self, signatures: Sequence[RobustWeightSignature], w: Sequence[float], names: Sequence[str]
    ) -> dict:
        """`measure` of the target with Σ_c w_c · RWS_c on it."""
        total = self.total(signatures, w)
        key = f"{self._target_hash} + {ckpt.tensors_hash(total.tensors | total.statistics)}"
        if has_batchnorm(self.target):  # its statistics come from corrupted training images
            severities = [self.severities[c] for c in total.corruptions]
            key += f" {total.corruptions} {severities} {self.args.seed} {sum(w)}"
            key += f" {self.args.frost_dir}" * ("frost" in total.corruptions) + self._copies
        return self.measure(key, names, f"against {total.name}", self.patched(signatures, w))

    def batchnorm_only(self, names: Sequence[str]) -> dict | None:
        """`measure` with statistics re-estimated under `names` and a patch of zeros.

        None for a model without batch norm.
        """
        if not has_batchnorm(self.target):
            return None
        zeros = [self.signature(name).scale(0.0) for name in names]
        return self.with_patch(zeros, [1 / len(names)] * len(names), names)

    def other(self, path: Path, names: Sequence[str], state: dict | None = None) -> dict:
        """`measure` of another model of these classes, of the weights `state` where given."""
        state = ckpt.read_state_dict(path) if state is None else state
        key = ckpt.tensors_hash(state)
        return self.measure(key, names, path.parent.name, self.holding(state, path))

    def robust(self, name: str) -> dict:
        """`measure` of the robust model of `name`, on its own corruption."""
        path = sources.find_robust(self.args.corruption_model_root, name)
        return self.other(path, self.labels[name], self.states[name])


# ---- command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("data")
    names = "dataset image_size classes train_images test_images data corruption_data corruption"
    arguments.add(group, f"{names} frost_dir", flags.FLAGS)
    arguments.add(group, "severity", flags.FLAGS, nargs="+", action=arguments.Distinct, default=[5])
    arguments.add(group, "seed test_all_corruptions baseline_log")
    names = "arch pretrained pretrained_path base_model patched_model corruption_model_root"
    arguments.add(parser.add_argument_group("models"), f"{names} checkpoint_key")
    group = parser.add_argument_group("signature")
    arguments.add(group, "keep_num", nargs="+", default=None)
    arguments.add(group, arguments.METHOD.removeprefix("keep_num "))
    arguments.add(group, "alpha finetune_alpha learn_alpha unlabeled signature reestimate choose")
    arguments.add(parser.add_argument_group("output"), "save_signature save_log save_model")
    arguments.add(parser, "device amp")
    args = parser.parse_args(argv)
    sources.check(args)
    args.keep_num = args.keep_num or [Method.keep_num]
    return args


def run(args: Namespace) -> dict:
    """Patch and evaluate as `args` (from `parse_args`) says; gives the table and its source."""
    run = Patching(args, Method.from_args(args, keep_num=args.keep_num[0]))
    every = [name for name in run.sets if name != "clean"]
    own = [label for name in args.corruption for label in run.labels[name]]
    chooser = SignatureBank(run.stored, args.signature) if args.choose else None
    print_header(run)
    severity_of = {x: s for c in run.labels.values() for x, s in zip(c, args.severity, strict=True)}
    baseline = log.checked(args, severity_of)
    if args.baseline_log:
        report.mean_corruption_error(baseline, baseline, run.labels)  # says what it lacks
    rows = [{"model": "standard", **run.standard(every)}]
    more, robust = bank.rows(run, chooser) if chooser else ([], upper_bound(run))
    rows += more
    for keep_num in () if chooser else args.keep_num:
        signatures = run.stored or [run.signature(c, keep_num=keep_num) for c in args.corruption]
        if args.learn_alpha:
            signatures = [run.learnt(signatures, args.learn_alpha, args.unlabeled, STEPS)]
        if args.save_signature:  # what is measured is what the files hold
            signatures = [run.with_statistics(s) for s in signatures]
        for weights in sources.weightings(args, len(signatures)):
            title = sources.patch_title(args, signatures, weights)
            if args.learn_alpha:
                print(title, *words(signatures[0]), "", sep="\n")
            with run.patched(signatures, weights) as model:
                weights_hash = ckpt.tensors_hash(model.state_dict())
                rows.append({"model": title, **run.measure(weights_hash, every, title)})
                if args.learn_alpha:
                    rows[-1]["weights"] = {c: w.tolist() for c, w in signatures[0].weights.items()}
                if args.save_model:
                    facts = {"pretrained_hash": model.pretrained_hash, **run.facts}
                    facts |= {"arch": args.arch, "patched": list(args.corruption)}
                    ckpt.save_model(model, args.save_model, facts)
    rows += [robust] if robust else []
    report.add_means(rows, own, bound=robust, mixed=chooser is not None)
    for row in rows if args.baseline_log else ():
        row["mCE"] = report.mean_corruption_error(row["RA"], baseline, run.labels)
    print(report.patching_table(rows, own, run.sources))
    report.warn_below_chance(rows, len(run.sets["clean"].classes))
    places = [Path(f"{file}.json") for file in (args.save_log, args.save_model) if file]
    if args.save_signature:
        places.append(Path(args.save_signature) / "results.json")
        for signature in signatures:
            name = "composed" if args.learn_alpha else signature.name
            path = places[-1].with_name(f"{name}.rws")
            if not (args.learn_alpha or args.patched_model):
                signature = run.fingerprinted(signature)
            print(f"{path}: {signature.save(path):,} bytes")
    result = {"rows": rows, "sources": run.sources, "arguments": vars(args)}
    result |= {"data": run.prints["clean"], **report.provenance(run.device)}
    for place in places:
        report.write_json(place, result)
    if args.save_log:
        log.update(Path(args.save_log), *rows[:2], severity_of)
    return result


def upper_bound(run: Patching) -> dict | None:
    """The row of the robust models, each on its own corruption; None: none, or of other classes."""
    names, own = run.args.corruption, run.target.state_dict()
    states = [run.states.get(name) for name in names]
    if run.classes != run.facts.get("class_names"):
        return None
    if not all(s and all(s.get(k, v).shape == v.shape for k, v in own.items()) for s in states):
        return None
    found = [run.robust(name) for name in names]
    ra = {name: accuracy for each in found for name, accuracy in each["RA"].items()}
    return {"model": "robust", "TA": fmean(each["TA"] for each in found), "RA": ra}


def print_header(run: Patching) -> None:
    """Say what is about to be patched and measured."""
    args, clean = run.args, run.sets["clean"]
    origins = sorted({source for name, source in run.sources.items() if name != "clean"})
    facts = {
        "model": f"{args.arch}: {args.patched_model or args.base_model}",
        "signatures": " ".join(args.signature)
        or f"{' + '.join(args.corruption)}, keep_num {' '.join(map(str, args.keep_num))}",
        "weights": sources.weights_words(args),
        "test images": f"{len(clean):,} of {clean.name}, clean and corrupted at severity "
        f"{' '.join(map(str, args.severity))} ({'; '.join(origins)})",
        **flags.frost_note(run.sets, args.frost_dir),
        "device": f"{report.device_name(run.device)}, {arithmetic(run.device, run.amp, args.amp)}",
    }
    if has_batchnorm(run.target):
        kept = run.stored and run.total(run.stored, args.alpha[:1] * len(run.stored)).statistics
        facts["batch norm"] = "from the files" if kept else "re-estimated on training images"
        if args.save_signature and not (kept or args.patched_model or args.learn_alpha):
            facts["batch norm"] += ", for each signature by itself, as its file has it"
    if ablation := replace(run.method, keep_num=Method.keep_num).words():
        facts["method"] = ablation
    report.header("model_patching.py", facts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
