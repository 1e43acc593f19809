"""Banks of signatures (utils/fingerprint.py) on a data set: fitting fingerprints, measuring."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from datasets import synthetic
from datasets.corrupted import Copies, corrupted_set
from datasets.corruptions import CORRUPTIONS, FAMILIES, corrupt
from datasets.flags import union_name
from datasets.images import ImageSet, spaced
from datasets.loader import evaluation_batches
from utils import checkpoint, sources
from utils.batchnorm import has_batchnorm, running_statistics
from utils.errors import InputError
from utils.fingerprint import SEVERITIES, SignatureBank, fit, strengths
from utils.report import markdown_table
from utils.signature import RobustWeightSignature

FITTED = 2000  # validation images at most; the strengths take every tenth of all
_AT_ONCE = 256  # images


def fingerprinted(
    signature: RobustWeightSignature, model: nn.Module, clean: ImageSet, how: Copies
) -> RobustWeightSignature:
    """`signature` with the fingerprint of its corruption, from validation images.

    model: the standard one, whose accuracy says how strong the signature is to be at a severity;
    clean: its validation images; how: their copies are made, always generated, since published
    ones of validation images have one severity.
    """

    def copies(clean: ImageSet) -> list[Tensor]:
        each = [replace(how, severity=s, root=None) for s in range(1, SEVERITIES + 1)]
        return [corrupted_set(clean, signature.name, "val", one).images for one in each]

    few = spaced(clean, -(-len(clean) // 10)).to(next(model.parameters()).device)
    alphas = strengths(model, signature, copies(few), few.labels)
    clean = spaced(clean, FITTED)
    parts = [images.to(few.labels.device) for images in (clean.images, *copies(clean))]
    return replace(signature, fingerprint=fit(parts, alphas))


def calibrated(
    bank: SignatureBank, model: nn.Module, clean: ImageSet, numbers: Sequence[int]
) -> list[tuple[int, float]]:
    """(N, the margin for N images at a time) for each of `numbers`; clean: validation images."""
    clean, device = spaced(clean, FITTED), next(model.parameters()).device
    batches = [evaluation_batches(clean, device, n * max(1, _AT_ONCE // n)) for n in numbers]
    return [(n, bank.calibrate(model, b, n)) for n, b in zip(numbers, batches, strict=True)]


def measure(
    bank: SignatureBank,
    model: nn.Module,
    sets: Mapping[str, ImageSet],
    ways: Sequence[tuple[int, float]],
) -> list[dict]:
    """How `bank` chooses, for each way (N images at a time, margin), by the name of a set:

    {"RA": {set: accuracy}, "named": {set: {corruption: percent of its images}}}.
    """
    found = [{"RA": {}, "named": {}} for _ in ways]
    device, step = next(model.parameters()).device, math.lcm(*(n for n, _ in ways))
    for part, images in sets.items():
        right = named = 0
        for batch, labels in evaluation_batches(images, device, step * max(1, _AT_ONCE // step)):
            choices = []
            for n, margin in ways:
                bank.margin = margin
                choices.append(bank.choose(batch, n))
            choices = torch.stack(choices)
            right += bank.right(model, batch, labels, choices).sum(1)
            named += one_hot(_corruption(choices), len(bank.corruptions)).sum(1)
        for way, r, shares in zip(found, right.tolist(), named.tolist(), strict=True):
            way["RA"][part] = 100 * r / len(images)
            each = (100 * count / len(images) for count in shares)
            way["named"][part] = dict(zip(bank.corruptions, each, strict=True))
    return found


def named(bank: SignatureBank, images: ImageSet, device: torch.device) -> dict[str, float]:
    """The percent of `images`, one at a time, that are given to each corruption."""
    batches = evaluation_batches(images, device, _AT_ONCE)
    choices = torch.cat([bank.choose(batch) for batch, _ in batches])
    counts = _corruption(choices).bincount(minlength=len(bank.corruptions)).tolist()
    return {c: 100 * n / len(images) for c, n in zip(bank.corruptions, counts, strict=True)}


def _corruption(choices: Tensor) -> Tensor:
    """Indices into `SignatureBank.corruptions`."""
    return (choices + SEVERITIES - 1) // SEVERITIES


def of_family(named: Mapping[str, float], name: str) -> float:
    """The percentage in `named` of corruptions of the family of `name`; clean is one of its own."""
    return sum(v for k, v in named.items() if FAMILIES.get(k) == FAMILIES.get(name))


def named_table(named: Mapping[str, Mapping[str, float]]) -> str:
    """What `measure` found, in Markdown: images named right, and by family, in percent."""
    lines = []
    for name, of in named.items():
        corruption = name.partition(" ")[0]  # of "fog 1"
        lines.append([name, of.get(corruption), of_family(of, corruption)])
    return markdown_table(["images", "named right, %", "family right, %"], lines)


@torch.no_grad()
def seconds(
    bank: SignatureBank, model: nn.Module, sets: Mapping[str, ImageSet], together: int
) -> tuple[float, float]:
    """Time per image of a mixture of all sets: as the bank predicts it, and by `model` alone."""
    count = max(1, _AT_ONCE // (together * len(sets)))
    parts = [images.images[: count * together].cpu().split(together) for images in sets.values()]
    mixed = torch.cat([images for of_all in zip(*parts, strict=True) for images in of_all])
    mixed = mixed.to(next(model.parameters()).device).float() / 255
    ways = (lambda: bank.predict(model, mixed, together)), (lambda: model(mixed))
    best = [math.inf, math.inf]
    for k in (0, 1) * 4:  # in turns; the first time is a warm-up
        start = time.perf_counter()
        ways[k]().sum().item()
        best[k] = min(best[k], time.perf_counter() - start)
    return best[0] / len(mixed), best[1] / len(mixed)


def example(signature: RobustWeightSignature, model: nn.Module) -> tuple[SignatureBank, Tensor]:
    """A bank that has `signature` against six corruptions, and 256 images under these or clean.

    For timing: images float32 (256, 3, 32, 32) in [0, 1] where `model` is.
    """
    clean, device = synthetic.load("test").images[:_AT_ONCE], next(model.parameters()).device
    own = running_statistics(model)
    signatures, mixed = [], clean.clone()
    for i, name in enumerate(CORRUPTIONS[:18:3]):
        copies = [clean, *(corrupt(clean, name, s) for s in range(1, SEVERITIES + 1))]
        known = {"fingerprint": fit(copies), "statistics": own}
        signatures.append(replace(signature, corruptions=(name,), **known))
        mixed[i::7] = copies[-1][i::7]
    return SignatureBank(signatures), mixed.to(device).float() / 255


def rows(run, bank: SignatureBank) -> tuple[list[dict], dict]:
    """The rows of a `model_patching.Patching` whose images choose, and of the oracle; printed, too.

    Also that of a model trained on all, where --corruption_model_root is given. The oracle knows
    the corruption of every image, and patches with its signature at α = 1.
    """
    n = run.args.choose
    for file, s in zip(run.args.signature, run.stored, strict=True):
        if has_batchnorm(run.target) and s.standard != run.standard_hash:
            told = "holds statistics of batch norm that are of another standard model"
            raise InputError(f"--choose: {file} {told}; make it again, with this --base_model")
    with run.autocast:
        ways = calibrated(bank, run.target, run.validation, [n])
        (found,) = measure(bank, run.target, run.sets, ways)
        chosen, plain = seconds(bank, run.target, run.sets, n)
    print(f"{named_table(found['named'])}\n")
    print(f"{1e3 * chosen:.2f} ms an image, {chosen / plain:.2f} × a plain forward pass\n")
    ta, ra = found["RA"].pop("clean"), {}
    for s in run.stored:
        ra |= run.with_patch([s], [1.0], run.labels[s.name])["RA"]
    made = [{"model": f"patched, {n} at a time choose", "TA": ta, **found}]
    if root := run.args.corruption_model_root:
        path = sources.find_robust(root, union_name(run.args.corruption))
        sources.check_facts(checkpoint.read(path), path, run.facts)
        measured = [name for name in run.sets if name != "clean"]
        made.append({"model": "trained on all of them", **run.other(path, measured)})
    return made, {"model": "each its own signature", "TA": run.standard(())["TA"], "RA": ra}
