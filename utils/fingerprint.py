"""Which corruption are these images under? A bank of signatures that chooses for itself.

A fingerprint holds, for clean images and for each severity of a corruption, the mean and covariance
of 16 statistics of an image. An unknown image goes to the Gaussian under which it is most likely.

    bank = SignatureBank.load(["bank/fog.rws", "bank/snow.rws"])
    logits = bank.predict(model, images)        # every image under the signature it calls for
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models import split
from utils.batchnorm import has_batchnorm
from utils.errors import InputError
from utils.files import AnyPath
from utils.patch import check_fits
from utils.signature import RobustWeightSignature

SEVERITIES, STATISTICS = 5, 16
LOWER = tuple(torch.tril_indices(STATISTICS, STATISTICS))  # of a covariance, as it is kept
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # α for a severity is one of these
SLACK = 0.5  # points of accuracy, within which the smaller strength and margin are taken
_RIDGE = 1e-4  # of the covariances: a deviation of 0.01, where most are of 0.1 to 1
_AT_ONCE = 500  # images


def image_statistics(images: Tensor) -> Tensor:
    """Float32 (n, 16), of images (n, 3, H, W) in [0, 1].

    What backward elimination kept of 35, by the share of CIFAR-10's validation images named right
    among 19 corruptions at 5 severities.
    """
    x = (images.float() * 255).round()
    dx, dy = x.diff(dim=3), x.diff(dim=2)
    xx, yy, xy = dx.diff(dim=3), dy.diff(dim=2), dx.diff(dim=2)
    laplacian = xx[:, :, 1:-1] + yy[..., 1:-1]
    colour = torch.stack([x[:, 0] - x[:, 1], (x[:, 0] + x[:, 1]) / 2 - x[:, 2]], 1)
    colour = torch.cat([colour.diff(dim=3).flatten(1), colour.diff(dim=2).flatten(1)], 1)
    pooled = nn.functional.avg_pool2d(x, 2)
    equal = (dx == 0).float().mean((1, 2)), (dy == 0).float().mean((1, 3))
    at_8 = sum(e[:, 7::8].sum(1) / max(1, e.shape[1] // 8) for e in equal)  # edges of JPEG's blocks
    skew = laplacian.pow(3).flatten(1).mean(1)

    def size(t: Tensor) -> Tensor:
        return t.abs().flatten(1).mean(1)

    def tail(t: Tensor) -> Tensor:
        """Log of mean square over squared mean size: large where few values are far out."""
        return (t.square().flatten(1).mean(1) + 0.01).log() - 2 * (size(t) + 0.1).log()

    found = [
        size(x) / 64,
        (x.flatten(1).amin(1) + 4).log(),
        (259 - x.flatten(1).amax(1)).log(),
        *((size(t) + 0.1).log() for t in (dy, xx, yy, xx.diff(dim=3), xy, colour)),
        tail(xy),
        tail(colour),
        (equal[0].mean(1) + 0.01).log(),
        (at_8 + 0.02).log() - (sum(e.mean(1) for e in equal) + 0.02).log(),
        (size(x.amax(1) - x.amin(1)) + 0.5).log(),
        skew.sign() * skew.abs().pow(1 / 3) / (laplacian.square().flatten(1).mean(1) + 1).sqrt(),
        (size(pooled.diff(dim=3)) + size(pooled.diff(dim=2)) + 0.1).log(),
    ]
    return torch.stack(found, 1)


def fit(parts: Sequence[Tensor], strengths: Sequence[float] = (1.0,) * 5) -> dict[str, Tensor]:
    """The fingerprint of a corruption, float32: 3.7 kB.

    parts: images uint8 (n, 3, H, W), clean ones and their copies at severity 1 to 5.
    strengths: α of a signature at severity 1 to 5.
    """
    means, triangles = [], []
    for images in parts:
        found = [image_statistics(some.float() / 255).double() for some in images.split(_AT_ONCE)]
        found = torch.cat(found)
        means.append(found.mean(0))
        triangles.append(torch.cov(found.T, correction=min(1, len(found) - 1))[LOWER])
    named = {"mean": torch.stack(means), "covariance": torch.stack(triangles)}
    named |= {"strength": torch.tensor(strengths), "size": torch.tensor(parts[0].shape[2:])}
    return {name: tensor.float().cpu() for name, tensor in named.items()}


@torch.no_grad()
def strengths(
    model: nn.Module, signature: RobustWeightSignature, parts: Iterable[Tensor], labels: Tensor
) -> list[float]:
    """α at severity 1 to 5: the smallest of STRENGTHS that loses ≤ SLACK of the best accuracy.

    At a higher severity it is no smaller. parts: images uint8 (n, 3, H, W) at severity 1 to 5,
    with their labels (n,). From 1 downwards, until accuracy falls.
    """
    found = []
    for images in parts:
        best, strength = 0.0, STRENGTHS[-1]
        images = images.to(labels.device)
        for alpha in reversed([a for a in STRENGTHS if a >= max(found, default=0)]):
            named = _patched(model, signature if alpha else None, alpha)
            batches = zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
            right = sum(
                (functional_call(model, named, some.float() / 255).argmax(1) == theirs).sum().item()
                for some, theirs in batches
            )
            if right < best - SLACK / 100 * len(labels):
                break
            best, strength = max(best, right), alpha
        found.append(strength)
    return found


class SignatureBank:
    """Signatures against a corruption each; every image gets the one it calls for, or none.

    A choice is 0 for none, else 1 + 5 c + severity − 1 for the signature c. `corruptions` names
    them, "clean" first. margin: by how many nats a corruption must be likelier than clean
    (`calibrate`). files: what to call the signatures in errors.
    Raises InputError for signatures that lack a fingerprint or don't go together.
    """

    def __init__(
        self, signatures: Sequence[RobustWeightSignature], files: Sequence[object] = ()
    ) -> None:
        files = files or [f"signature of {s.name}" for s in signatures]
        if not signatures:
            raise InputError("a bank needs at least one signature")
        for file, s in zip(files, signatures, strict=True):
            _check_goes_with(signatures[0], files[0], s, file)
        self.signatures, self.margin = list(signatures), 0.0
        self.corruptions = ("clean", *(s.name for s in signatures))
        if len(set(self.corruptions)) < len(self.corruptions):
            raise InputError(f"two signatures against one corruption: {', '.join(map(str, files))}")
        prints = [s.fingerprint for s in signatures]
        self.size = tuple(int(n) for n in prints[0]["size"])
        mean, triangle = (  # clean images, then each corruption's severities
            torch.cat([prints[0][name][:1], *(p[name][1:] for p in prints)]).double()
            for name in ("mean", "covariance")
        )
        lower = torch.zeros(len(mean), STATISTICS, STATISTICS, dtype=torch.float64)
        lower[:, LOWER[0], LOWER[1]] = triangle
        covariance = lower + lower.tril(-1).mT + _RIDGE * torch.eye(STATISTICS)
        root, failed = torch.linalg.cholesky_ex(covariance)
        if failed.any():
            file = files[max(0, int(failed.bool().int().argmax()) - 1) // SEVERITIES]
            raise InputError(f"{file}: its fingerprint holds a covariance that is none")
        constant = root.diagonal(dim1=1, dim2=2).log().sum(1)
        whiten = torch.linalg.inv(root)
        self._gaussians = [t.float() for t in (mean, whiten, constant)]
        # Severities of one strength are one form of the signature; strength 0 is none.
        told = [(c, a) for c, p in enumerate(prints) for a in p["strength"].tolist()]
        known = {key: i for i, key in enumerate(dict.fromkeys(k for k in told if k[1] > 0), 1)}
        self._form_of = torch.tensor([0, *(known.get(key, 0) for key in told)])
        # Which signature, from 1 on, and α.
        self.forms: list[tuple[int, float]] = [(0, 0.0), *((c + 1, a) for c, a in known)]
        self._device = torch.device("cpu")

    @classmethod
    def load(cls, paths: Iterable[AnyPath]) -> SignatureBank:
        """The bank of these .rws files."""
        paths = list(paths)
        return cls([RobustWeightSignature.load(path) for path in paths], paths)

    def _move(self, device: torch.device) -> None:
        """Keep what is computed with on `device`, where images and model are."""
        if device != self._device:
            self._device = device
            self._gaussians = [t.to(device) for t in self._gaussians]
            self._form_of = self._form_of.to(device)
            for i, s in enumerate(self.signatures):
                parts = {"tensors": s.tensors, "statistics": s.statistics}
                moved = {n: {k: t.to(device) for k, t in of.items()} for n, of in parts.items()}
                self.signatures[i] = replace(s, **moved)

    def log_likelihood(self, images: Tensor, together: int = 1) -> Tensor:
        """Float32 (groups, choices), of images (n, 3, H, W) in [0, 1], `together` in a row a group.

        Up to a constant, and without `margin`. Raises InputError for images of another size.
        """
        if (size := tuple(images.shape[2:])) != self.size:
            told = ", ".join("×".join(map(str, s)) for s in (size, self.size))
            raise InputError(f"images and fingerprints differ in size ({told}): resize the images")
        self._move(images.device)
        mean, whiten, constant = self._gaussians
        with torch.autocast(images.device.type, enabled=False):
            off = image_statistics(images)[:, None] - mean
            off = torch.einsum("kij,nkj->nki", whiten, off)
            each = -off.square().sum(2) / 2 - constant
        each = F.pad(each, (0, 0, 0, -len(each) % together))
        return each.view(-1, together, len(mean)).sum(1)

    def choose(self, images: Tensor, together: int = 1) -> Tensor:
        """The choice for each image, int64 (n,); `together` in a row share one."""
        likelihood = self.log_likelihood(images, together)
        likelihood[:, 0] += self.margin
        return likelihood.argmax(1).repeat_interleave(together)[: len(images)]

    def predict(self, model: nn.Module, images: Tensor, together: int = 1) -> Tensor:
        """Logits (n, classes) of images (n, 3, H, W) in [0, 1], each under its own choice.

        together: so many images in a row are known to share a corruption, or none. The model, a
        standard one in eval mode, stays as it is.
        """
        return self.apply(model, images, self.choose(images, together))

    @torch.no_grad()
    def apply(self, model: nn.Module, images: Tensor, choice: Tensor) -> Tensor:
        """`predict` under the `choice` given for each image.

        Images of one choice go through the patched layers together, and all of them through the
        deep layers, which no signature touches.
        """
        if model.training and has_batchnorm(model):
            raise InputError("a model with batch norm is to be in eval mode: call model.eval()")
        for s in self.signatures:
            check_fits(model, s)
        shallow, deep = split(model, {key for s in self.signatures for key in s.tensors})
        self._move(images.device)
        form = self._form_of[choice]
        order = form.argsort()
        parts = images[order].split(form.bincount(minlength=len(self.forms)).tolist())
        signatures = [None, *self.signatures]
        cudnn = torch.backends.cudnn
        benchmark, cudnn.benchmark = cudnn.benchmark, False  # else tried for every number of images
        try:
            features = [
                functional_call(shallow, _patched(model, signatures[i], alpha), part)
                for (i, alpha), part in zip(self.forms, parts, strict=True)
                if len(part)
            ]
            return deep(torch.cat(features))[order.argsort()]
        finally:
            cudnn.benchmark = benchmark

    def right(self, model: nn.Module, images: Tensor, labels: Tensor, choices: Tensor) -> Tensor:
        """Whether n images are predicted right under each of k choices (k, n): bool (k, n).

        No image is predicted twice in one form.
        """
        first = (self._form_of[:, None] == self._form_of).int().argmax(1).to(choices.device)
        told = first[choices] * len(images) + torch.arange(len(images), device=choices.device)
        told, back = told.unique(return_inverse=True)
        choice, i = told // len(images), told % len(images)
        return (self.apply(model, images[i], choice).argmax(1) == labels[i])[back]

    @torch.no_grad()
    def calibrate(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], together: int = 1
    ) -> float:
        """Set `margin` to the smallest at which the accuracy on clean images falls by ≤ SLACK.

        batches: of clean validation images, float32 (n, 3, H, W) in [0, 1], with their labels;
        n a multiple of `together` but for the last. Gives the margin, at least 0.
        """
        gaps, losses = [], []
        for images, labels in batches:
            likelihood = self.log_likelihood(images, together)
            best = likelihood[:, 1:].max(1)
            gap = (best.values - likelihood[:, 0]).repeat_interleave(together)[: len(images)]
            choice = (best.indices + 1).repeat_interleave(together)[: len(images)]
            right = self.right(model, images, labels, torch.stack([choice * 0, choice])).int()
            gaps.append(gap)
            losses.append(right[0] - right[1])
        gaps, order = torch.cat(gaps).sort(descending=True)
        lost = torch.cat(losses)[order].cumsum(0)  # where those with the largest gaps are patched
        over = lost > SLACK / 100 * len(lost)
        self.margin = max(0.0, gaps[over.int().argmax()].item()) if over.any() else 0.0
        return self.margin


def _check_goes_with(
    first: RobustWeightSignature, its_file: object, s: RobustWeightSignature, file: object
) -> None:
    """Raise InputError where the signature of `file` has no place in a bank with the first."""
    again = "make it again with model_patching.py --save_signature"
    if not s.fingerprint:
        raise InputError(f"{file}: has no fingerprint; {again}")
    shapes = {name: tuple(tensor.shape) for name, tensor in s.fingerprint.items()}
    rows, triangle = SEVERITIES + 1, STATISTICS * (STATISTICS + 1) // 2
    wanted = {"mean": (rows, STATISTICS), "covariance": (rows, triangle)}
    if shapes != wanted | {"strength": (SEVERITIES,), "size": (2,)}:
        raise InputError(f"{file}: its fingerprint is of another form; {again}")
    facts = {"architecture": "arch", "θ_pre": "pretrained"}
    for what, name in facts.items():
        theirs, ours = getattr(s, name), getattr(first, name)
        if theirs != ours:
            told = f"{file} is from {theirs}, {its_file} from {ours}"
            raise InputError(f"a bank takes signatures of one {what}: {told}; leave one out")
    if not torch.equal(s.fingerprint["size"], first.fingerprint["size"]):
        raise InputError(f"{file} and {its_file}: fingerprints of images of two sizes; leave one")


def _patched(
    model: nn.Module, signature: RobustWeightSignature | None, alpha: float
) -> dict[str, Tensor]:
    """θ + α · RWS of the parameters that a signature touches; nothing for none.

    For a model with batch norm also its running statistics, between its own and the signature's.
    """
    if signature is None:
        return {}
    θ = [model.get_parameter(key) for key in signature.tensors]
    deltas = [d.to(t) for t, d in zip(θ, signature.tensors.values(), strict=True)]
    found = torch._foreach_add(θ, deltas, alpha=alpha)
    named = dict(zip(signature.tensors, found, strict=True))
    if has_batchnorm(model):
        if not signature.statistics:
            told = "statistics of batch norm, which a bank can't re-estimate image by image"
            raise InputError(f"signature of {signature.name}: holds no {told}")
        for key, tensor in signature.statistics.items():
            named[key] = (own := model.get_buffer(key)).lerp(tensor.to(own), min(1.0, alpha))
    return named
