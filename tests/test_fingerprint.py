"""Fingerprints and banks: the statistics, naming, prediction under the choice, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets import bank as on_data
from datasets import synthetic
from datasets.corrupted import Copies, corrupted_set
from datasets.corruptions import corrupt
from models import build_model, split
from utils import fingerprint
from utils.errors import InputError
from utils.fingerprint import SignatureBank, image_statistics
from utils.signature import Method, RobustWeightSignature, patch

NAMES = ("gaussian_noise", "defocus_blur", "contrast")


# ---- statistics -----------------------------------------------------------------------------


def slow_statistics(image):
    """By loops over the pixels of one image, uint8 (3, H, W)."""
    x = image.astype(float)
    _, height, width = x.shape
    across = [
        [x[c, i, j + 1] - x[c, i, j] for j in range(width - 1)]
        for c in range(3)
        for i in range(height)
    ]
    dx = np.array(across).reshape(3, height, width - 1)
    dy = np.array([x[c, i + 1] - x[c, i] for c in range(3) for i in range(height - 1)])
    dy = dy.reshape(3, height - 1, width)
    xx, yy, xy = dx[..., 1:] - dx[..., :-1], dy[:, 1:] - dy[:, :-1], dx[:, 1:] - dx[:, :-1]
    xxx = xx[..., 1:] - xx[..., :-1]
    inner = [
        xx[c, i, j - 1] + yy[c, i - 1, j]
        for c in range(3)
        for i in range(1, height - 1)
        for j in range(1, width - 1)
    ]
    skew = np.mean(np.power(inner, 3))
    chroma = np.stack([x[0] - x[1], (x[0] + x[1]) / 2 - x[2]])
    colour = np.concatenate([np.diff(chroma, axis=2).ravel(), np.diff(chroma, axis=1).ravel()])
    blocks = x.reshape(3, height // 2, 2, width // 2, 2).mean((2, 4))
    same = [np.mean(dx[:, :, j] == 0) for j in range(width - 1)]
    same_y = [np.mean(dy[:, i] == 0) for i in range(height - 1)]
    at_8 = np.mean(same[7::8]) + np.mean(same_y[7::8])
    vivid = [max(x[:, i, j]) - min(x[:, i, j]) for i in range(height) for j in range(width)]

    def size(t):
        return np.mean(np.abs(t))

    def tail(t):
        return np.log(np.mean(np.square(t)) + 0.01) - 2 * np.log(size(t) + 0.1)

    return [
        np.mean(x) / 64,
        np.log(np.min(x) + 4),
        np.log(255 - np.max(x) + 4),
        *(np.log(size(t) + 0.1) for t in (dy, xx, yy, xxx, xy, colour)),
        tail(xy),
        tail(colour),
        np.log(np.mean(same) + 0.01),
        np.log(at_8 + 0.02) - np.log(np.mean(same) + np.mean(same_y) + 0.02),
        np.log(np.mean(vivid) + 0.5),
        np.sign(skew) * np.abs(skew) ** (1 / 3) / np.sqrt(np.mean(np.square(inner)) + 1),
        np.log(size(np.diff(blocks, axis=2)) + size(np.diff(blocks, axis=1)) + 0.1),
    ]


@pytest.mark.parametrize("name", [None, "jpeg_compression", "contrast", "impulse_noise"])
def test_statistics(name):
    images = synthetic.load("val").images[:4]
    images = corrupt(images, name, 5) if name else images
    images[0] = 0  # nothing to see
    slow = torch.tensor([slow_statistics(image.numpy()) for image in images])
    found = image_statistics(images.float() / 255)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), slow, atol=2e-4)


def test_a_fit_is_mean_and_covariance_of_each_part():
    images = synthetic.load("val").images[:700]
    found = fingerprint.fit([images] + [corrupt(images, "fog", s) for s in range(1, 6)])
    x = image_statistics(images.float() / 255).double().numpy()
    lower = np.cov(x.T)[np.tril_indices(16)]
    assert np.allclose(found["mean"][0], x.mean(0), atol=1e-4)
    assert np.allclose(found["covariance"][0], lower, atol=1e-4)
    assert found["size"].tolist() == [32, 32] and len(found["mean"]) == 6
    assert sum(t.nbytes for t in found.values()) < 4000


# ---- banks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build_model("vgg11", 10).eval()
    with torch.no_grad():  # or it would predict one class for all
        made.classifier.bias -= made(synthetic.load("val").images[:50].float() / 255).mean(0)
    return made


@pytest.fixture(scope="module")
def signatures(model):
    images = synthetic.load("val").images[:300]
    found = []
    for k, name in enumerate(NAMES):
        torch.manual_seed(k + 1)
        keys = Method(keep_num=3).keys("vgg11")
        tensors = {key: 0.05 * torch.randn_like(model.get_parameter(key)) for key in keys}
        copies = [corrupt(images, name, s, torch.Generator().manual_seed(s)) for s in range(1, 6)]
        found.append(
            RobustWeightSignature(
                tensors,
                "vgg11",
                Method(keep_num=3),
                corruptions=(name,),
                pretrained="0" * 16,
                fingerprint=fingerprint.fit([images, *copies], (0.0, 0.5, 0.5, 1.0, 1.0)),
            )
        )
    return found


def stream(count=30):
    """Images float32 of the test set, clean and under each of NAMES at severity 5, in parts."""
    images = synthetic.load("test").images[:count]
    parts = [images, *(corrupt(images, n, 5, torch.Generator().manual_seed(9)) for n in NAMES)]
    return [part.float() / 255 for part in parts]


def test_naming(signatures):
    bank = SignatureBank(signatures)
    for together, least in ((1, 0.85), (6, 0.99)):
        for k, images in enumerate(stream()):
            c = (bank.choose(images, together) + 4) // 5
            right = (c == k).float().mean()
            # clean ones are mostly taken for the weakest severity of something
            assert right >= least or k == 0, (NAMES[k - 1], together)
    severity = (bank.choose(stream()[3], 5) - 1) % 5 + 1
    assert (severity >= 4).all()
    bank.margin = 1e6
    assert not bank.choose(stream()[1]).any()


def test_likelihoods_are_of_gaussians_and_add_up_in_groups(signatures):
    bank, images = SignatureBank(signatures), stream()[1][:7]
    each = bank.log_likelihood(images)
    assert each.shape == (7, 16)
    f = signatures[1].fingerprint
    covariance = torch.zeros(16, 16)
    covariance[tuple(torch.tril_indices(16, 16))] = f["covariance"][2]
    covariance = covariance + covariance.tril(-1).mT + 1e-4 * torch.eye(16)
    gaussian = torch.distributions.MultivariateNormal(f["mean"][2].double(), covariance.double())
    slow = gaussian.log_prob(image_statistics(images).double()) + 8 * np.log(2 * np.pi)
    assert torch.allclose(each[:, 1 + 5 + 1].double(), slow, rtol=1e-3, atol=0.05)
    sums = [each[:3].sum(0), each[3:6].sum(0), each[6]]
    assert torch.allclose(bank.log_likelihood(images, 3), torch.stack(sums), rtol=1e-4)


@pytest.mark.parametrize("together", [1, 4])
def test_each_image_is_predicted_under_its_own_patch(model, signatures, together):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bank = SignatureBank(signatures)
    images = torch.cat(stream(6))[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    choice = bank.choose(images, together)
    assert len(choice.unique()) > 2
    assert (choice.split(together)[0] == choice[0]).all()
    found, slow = bank.predict(model, images, together), []
    strengths = (0.0, 0.5, 0.5, 1.0, 1.0)
    with torch.no_grad():
        for image, chosen in zip(images, choice.tolist(), strict=True):
            if chosen == 0:
                slow.append(model(image[None]))
                continue
            c, s = divmod(chosen - 1, 5)
            with patch(model, signatures[c], strengths[s]):
                slow.append(model(image[None]))
    assert torch.allclose(found, torch.cat(slow), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_split_is_the_model(model):
    images, keys = stream(2)[0], Method(keep_num=2).keys("vgg11")
    shallow, deep = split(model, keys)
    with torch.no_grad():
        assert torch.equal(deep(shallow(images)), model(images))
    named = dict(shallow.named_parameters())
    assert all(named[key] is model.get_parameter(key) for key in keys) and len(named) == 4


def test_batch_norm_comes_from_the_signature(signatures):
    torch.manual_seed(0)
    model = build_model("resnet18", 10).eval()
    bn = {"bn1.running_mean": torch.randn(64), "bn1.running_var": torch.rand(64) + 0.5}
    tensors = {"conv1.weight": 0.1 * torch.randn_like(model.conv1.weight)}
    own = [replace(s, arch="resnet18", tensors=tensors) for s in signatures]
    images = stream(4)[0]
    choice = torch.tensor([0, 3, 3, 5])  # severity 3 has strength 0.5
    with pytest.raises(InputError, match="batch norm"):
        SignatureBank(own).apply(model, images, choice)
    bank = SignatureBank([replace(s, statistics=bn) for s in own])
    found = bank.apply(model, images, choice)
    with torch.no_grad():
        assert torch.allclose(found[:1], model(images[:1]), atol=1e-5)
        with patch(model, own[0], 0.5):
            for key, tensor in bn.items():
                model.get_buffer(key).lerp_(tensor, 0.5)
            assert torch.allclose(found[1:3], model(images[1:3]), atol=1e-4)
    with pytest.raises(InputError, match="eval"):
        bank.apply(model.train(), images, choice)


def test_strengths_are_the_smallest_that_lose_little(model, signatures, monkeypatch):
    monkeypatch.setattr(fingerprint, "SLACK", 4.0)
    images = synthetic.load("val").images[:50]
    parts = [corrupt(images, "contrast", s) for s in range(1, 6)]
    with torch.no_grad(), patch(model, signatures[2], 0.5):  # right at α = 0.5, all of them
        labels = [model(part.float() / 255).argmax(1) for part in parts]
    found = [
        fingerprint.strengths(model, signatures[2], [part], theirs)[0]
        for part, theirs in zip(parts, labels, strict=True)
    ]
    slow = []
    for part, theirs in zip(parts, labels, strict=True):
        right = {}
        for alpha in fingerprint.STRENGTHS:
            with torch.no_grad(), patch(model, signatures[2], alpha):
                right[alpha] = (model(part.float() / 255).argmax(1) == theirs).sum().item()
        assert max(right, key=right.get) == 0.5
        slow.append(0.25 if right[0.25] >= 48 else 0.5)
        assert right[0.0] < 48  # or it would be 0
    assert found == slow


def test_right_under_several_choices(model, signatures):
    bank, images = SignatureBank(signatures), torch.cat(stream(5))
    torch.manual_seed(0)
    choices, labels = torch.randint(16, (4, 20)), torch.randint(10, (20,))
    slow = [bank.apply(model, images, c).argmax(1) == labels for c in choices]
    seen, real = [], bank.apply
    bank.apply = lambda model, images, choice: (
        seen.append(len(images)) or real(model, images, choice)
    )
    assert torch.equal(bank.right(model, images, labels, choices), torch.stack(slow))
    forms = bank._form_of[choices]
    assert seen == [sum(len(forms[:, i].unique()) for i in range(20))]


def test_measured_on_sets_and_fingerprinted(model, signatures):
    clean = synthetic.load("test").subset(range(50))
    sets = {"clean": clean}
    sets |= {name: replace(clean, images=corrupt(clean.images, name, 5)) for name in NAMES}
    bank = SignatureBank(signatures)
    ways = on_data.calibrated(bank, model, synthetic.load("val").subset(range(60)), (1, 4))
    found = on_data.measure(bank, model, sets, [*ways, (1, math.inf)])
    for (n, margin), one in zip([*ways, (1, math.inf)], found, strict=True):
        bank.margin = margin
        for name, images in sets.items():
            pixels = images.images.float() / 255
            right = bank.predict(model, pixels, n).argmax(1) == images.labels
            assert one["RA"][name] == pytest.approx(100 * right.float().mean().item())
            named = (bank.choose(pixels, n) + 4) // 5
            for c, other in enumerate(bank.corruptions):
                share = 100 * (named == c).float().mean().item()
                assert one["named"][name][other] == pytest.approx(share)
    assert found[2]["named"][NAMES[0]]["clean"] == 100
    bank.margin = ways[0][1]
    alone = on_data.named(bank, sets[NAMES[0]], torch.device("cpu"))
    assert alone == pytest.approx(found[0]["named"][NAMES[0]])
    assert min(on_data.seconds(bank, model, sets, 4)) > 0
    val = synthetic.load("val").subset(range(40))
    made = on_data.fingerprinted(signatures[0], model, val, Copies(root="nowhere", seed=3))
    copies = [corrupted_set(val, NAMES[0], "val", Copies(s, 3)).images for s in range(1, 6)]
    expected = fingerprint.fit([val.images, *copies])
    assert torch.equal(made.fingerprint["mean"], expected["mean"])
    assert torch.equal(made.fingerprint["covariance"], expected["covariance"])
    few = fingerprint.fit([val.images[:1, :, :8, :8]] * 6)  # one image, eight pixels wide
    assert all(t.isfinite().all() for t in few.values())


def test_the_margin_is_the_smallest_that_keeps_clean_accuracy(model, signatures):
    strong = [replace(s.scale(20.0), fingerprint=s.fingerprint) for s in signatures]
    bank = SignatureBank([change(s, strength=torch.ones(5)) for s in strong])
    images = synthetic.load("test").images[:200].float() / 255
    with torch.no_grad():
        labels = model(images).argmax(1)  # so that the standard model is right everywhere
    margin = bank.calibrate(model, zip(images.split(64), labels.split(64), strict=True), 4)
    assert margin > 0 and bank.margin == margin

    def lost(margin):
        bank.margin = margin
        return (bank.predict(model, images, 4).argmax(1) != labels).sum().item()

    assert lost(margin) <= 1 < lost(margin * 0.999 - 1e-3)  # half a point of 200
    weak = [change(s, strength=torch.zeros(5)) for s in strong]
    assert SignatureBank(weak).calibrate(model, [(images, labels)]) == 0


def change(signature, **changes):
    return replace(signature, fingerprint=signature.fingerprint | changes)


REFUSED = {
    "no fingerprint": lambda s: replace(s, fingerprint={}),
    "arch": lambda s: replace(s, arch="vgg13"),
    "θ_pre": lambda s: replace(s, pretrained="1" * 16),
    "two sizes": lambda s: change(s, size=torch.tensor([64.0, 64.0])),
    "another form": lambda s: change(s, mean=torch.zeros(6, 3)),
    "covariance": lambda s: change(s, covariance=-s.fingerprint["covariance"]),
    "against one": lambda s: replace(s, corruptions=NAMES[:1]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_make_no_bank_are_named(signatures, tmp_path, what):
    signatures[0].save(tmp_path / "a.rws")
    REFUSED[what](signatures[1]).save(tmp_path / "b.rws")
    with pytest.raises(InputError, match=what) as told:
        SignatureBank.load([tmp_path / "a.rws", tmp_path / "b.rws"])
    assert "b.rws" in str(told.value)


def test_other_refusals(model, signatures):
    with pytest.raises(InputError, match="at least one"):
        SignatureBank([])
    with pytest.raises(InputError, match="64×64, 32×32"):
        SignatureBank(signatures).predict(model, torch.rand(1, 3, 64, 64))
    with pytest.raises(InputError, match="no features"):
        SignatureBank(signatures).predict(build_model("resnet18", 10).eval(), stream(1)[0])


def test_a_saved_bank_chooses_alike(signatures, tmp_path):
    for s in signatures:
        s.quantize(16).save(tmp_path / f"{s.name}.rws")
    bank = SignatureBank.load(sorted(tmp_path.glob("*.rws"), reverse=True)[:3])
    assert set(bank.corruptions) == {"clean", *NAMES}
    with pytest.raises(InputError, match="has no fingerprint"):
        SignatureBank([signatures[0] + signatures[1]])
