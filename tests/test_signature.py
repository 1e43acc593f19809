"""Signatures: the equations, algebra, the file, and putting them on and off."""

import itertools
import warnings

import pytest
import torch

from models import build_model
from models.layers import carried_keys, layer_keys
from utils import signature as sig
from utils.errors import InputError
from utils.signature import RobustWeightSignature, cosine, patch, project_out


def shifted(state, scale, seed):
    """`state` with noise on every float tensor, as fine-tuning would move it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v + scale * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in state.items()
    }


@pytest.fixture(scope="module", params=["vgg11", "resnet18"])
def study(request):
    """arch, θ_pre, θ_std and two robust models, as state dicts."""
    torch.manual_seed(0)
    pre = build_model(request.param, 10).state_dict()
    std = shifted(pre, 0.01, 1)
    return request.param, pre, std, shifted(std, 0.02, 2), shifted(std, 0.02, 3)


def model_of(arch, state):
    model = build_model(arch, 10)
    model.load_state_dict(state)
    return model


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_bits(a, b):
    return all(
        torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


# ---- equations ------------------------------------------------------------------------------


def test_projection_is_the_matrix_projection():
    torch.manual_seed(1)
    delta, base = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    b = base.flatten().double()
    matrix = torch.eye(24, dtype=torch.float64) - torch.outer(b, b) / (b @ b)
    expected = (matrix @ delta.flatten().double()).reshape(4, 3, 2)
    result = project_out(delta, base)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-5)
    assert abs(torch.dot(result.flatten(), base.flatten())) < 1e-4


def test_projection_by_zero_keeps_everything():
    delta = torch.randn(5)
    assert torch.equal(project_out(delta, torch.zeros(5)), delta)
    with pytest.raises(InputError):
        project_out(delta, torch.zeros(4))


def test_extract_projects_convolutions_and_carries_the_rest(study):
    arch, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 3, corruption="fog")
    assert s.arch == arch and s.corruptions == ("fog",)
    assert set(s.tensors) == set(layer_keys(arch, 3)) | set(carried_keys(arch))
    for key, tensor in s.tensors.items():
        if key in carried_keys(arch):
            torch.testing.assert_close(tensor, rob[key] - std[key])
        else:
            torch.testing.assert_close(
                tensor, project_out(rob[key] - pre[key], std[key] - pre[key])
            )
    plain = RobustWeightSignature.extract(pre, std, rob, 3, project=False)
    key = layer_keys(arch, 1)[0]
    torch.testing.assert_close(plain.tensors[key], rob[key] - pre[key])


def test_extract_from_files_is_the_same(study, tmp_path):
    _, pre, std, rob, _ = study
    for name, state in (("pre", pre), ("std", std), ("rob", rob)):
        torch.save({"state_dict": state}, tmp_path / name)
    a = RobustWeightSignature.extract(pre, std, rob, 2)
    b = RobustWeightSignature.extract(tmp_path / "pre", tmp_path / "std", str(tmp_path / "rob"), 2)
    assert same_bits(a.tensors, b.tensors)
    assert (a.pretrained, a.standard, a.robust) == (b.pretrained, b.standard, b.robust)


def test_extract_refuses_what_does_not_fit(study):
    arch, pre, std, rob, _ = study
    key = layer_keys(arch, 1)[0]
    with pytest.raises(InputError, match=key):
        RobustWeightSignature.extract(pre, std, {k: v for k, v in rob.items() if k != key}, 2)
    with pytest.raises(InputError, match=key):
        RobustWeightSignature.extract(pre, std, {**rob, key: rob[key][:-1]}, 2)
    with pytest.raises(InputError, match=key):
        RobustWeightSignature.extract(pre, std, {**rob, key: rob[key] * float("nan")}, 2)
    with pytest.raises(InputError, match="99"):
        RobustWeightSignature.extract(pre, std, rob, 99)


def test_identical_models_warn(study):
    pre = study[1]
    with pytest.warns(UserWarning, match="zero"):
        RobustWeightSignature.extract(pre, pre, pre, 2)


# ---- algebra --------------------------------------------------------------------------------


def test_scale_and_sum(study):
    _, pre, std, rob, other = study
    a = RobustWeightSignature.extract(pre, std, rob, 2, corruption="fog", severity=5)
    b = RobustWeightSignature.extract(pre, std, other, 3, corruption="snow", severity=5)
    total = sum([a.scale(0.5), b.scale(0.25)])
    assert total.keep_num == 3 and total.corruptions == ("fog", "snow") and total.severity == 5
    for key, tensor in total.tensors.items():
        expected = 0.25 * b.tensors[key]
        if key in a.tensors:
            expected = expected + 0.5 * a.tensors[key]
        torch.testing.assert_close(tensor, expected)
    assert total.pretrained == a.pretrained


def test_cosine(study):
    _, pre, std, rob, other = study
    a = RobustWeightSignature.extract(pre, std, rob, 2)
    b = RobustWeightSignature.extract(pre, std, other, 2)
    assert cosine(a, a)["overall"] == pytest.approx(1)
    assert cosine(a, a.scale(-3))["overall"] == pytest.approx(-1)
    key = next(iter(a.tensors))
    x, y = a.tensors[key].flatten(), b.tensors[key].flatten()
    assert cosine(a, b)[key] == pytest.approx(
        torch.nn.functional.cosine_similarity(x, y, dim=0).item(), abs=1e-5
    )
    assert cosine(a, a.scale(0))["overall"] == 0


# ---- on and off -----------------------------------------------------------------------------


def test_patch_adds_and_remove_restores_the_bits(study):
    arch, pre, std, rob, _ = study
    model = model_of(arch, std)
    before = bits(model)
    s = RobustWeightSignature.extract(pre, std, rob, 2)
    handle = patch(model, s, alpha=0.7)
    for key, tensor in model.state_dict().items():
        expected = std[key] + 0.7 * s.tensors[key] if key in s.tensors else std[key]
        torch.testing.assert_close(tensor, expected)
    if arch.startswith("resnet"):
        model.train()(torch.rand(4, 3, 32, 32))  # moves the running statistics
        assert not same_bits(before, bits(model))
    handle.remove()
    assert same_bits(before, bits(model))
    handle.remove()  # nothing more happens
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_come_off_in_any_order(study, order):
    arch, pre, std, rob, other = study
    model = model_of(arch, std)
    before = bits(model)
    signatures = [
        RobustWeightSignature.extract(pre, std, rob, 1),
        RobustWeightSignature.extract(pre, std, other, 3),
        RobustWeightSignature.extract(pre, std, rob, 2).quantize(16),
    ]
    handles = [patch(model, s, 0.1 * (i + 1)) for i, s in enumerate(signatures)]
    left = [0, 1, 2]
    for i in order:
        handles[i].remove()
        left.remove(i)
        fresh = model_of(arch, std)
        for j in left:
            patch(fresh, signatures[j], 0.1 * (j + 1))
        assert same_bits(bits(fresh), bits(model))
    assert same_bits(before, bits(model))


def test_with_form_and_alpha_zero(study):
    arch, pre, std, rob, _ = study
    model = model_of(arch, std)
    first = layer_keys(arch, 1)[0]
    with torch.no_grad():
        model.get_parameter(first).view(-1)[0] = -0.0
    before = bits(model)
    s = RobustWeightSignature.extract(pre, std, rob, 2)
    with patch(model, s, alpha=0):
        assert same_bits(before, bits(model))
    with pytest.raises(RuntimeError, match="inside"), patch(model, s):
        raise RuntimeError("inside")
    assert same_bits(before, bits(model))


def test_removal_outlives_the_model(study):
    arch, pre, std, rob, _ = study
    model = model_of(arch, std)
    handle = patch(model, RobustWeightSignature.extract(pre, std, rob, 1))
    del model
    assert len(sig._PATCHES) == 0  # nothing keeps a dropped model alive
    handle.remove()


def test_patch_refuses_another_architecture_and_changes_nothing(study):
    arch, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 2)
    other = build_model("vgg13" if arch == "vgg11" else "vgg11", 10)
    before = bits(other)
    with pytest.raises(InputError, match=arch):
        patch(other, s)
    assert same_bits(before, bits(other))


def test_nan_inside_is_refused(study):
    _, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 1)
    key = next(iter(s.tensors))
    with pytest.raises(InputError, match=key):
        RobustWeightSignature({key: s.tensors[key] * float("inf")}, s.arch, 1)


def test_other_pretrained_weights_warn_once(study):
    arch, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 1)
    model = model_of(arch, std)
    model.pretrained_hash = f"another-{arch}"
    with pytest.warns(UserWarning, match="pretrained"):
        patch(model, s).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model, s).remove()


# ---- the file -------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 2, 6, 16, 256])
@pytest.mark.parametrize("method", ["linear", "tanh", "log"])
def test_file_gives_back_every_bit(study, tmp_path, levels, method):
    if method == "log" and levels == 2:
        pytest.skip("log needs at least 4 levels")
    _, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 2, corruption="fog", severity=3, dataset="d")
    if levels:
        s = s.quantize(levels, method)
    size = s.save(tmp_path / "fog.rws")
    assert size == (tmp_path / "fog.rws").stat().st_size
    back = RobustWeightSignature.load(tmp_path / "fog.rws")
    assert same_bits(s.tensors, back.tensors)
    assert back.quantization == s.quantization and back.corruptions == ("fog",)
    assert (back.pretrained, back.keep_num, back.severity) == (s.pretrained, 2, 3)
    back.save(tmp_path / "again.rws")
    assert same_bits(s.tensors, RobustWeightSignature.load(tmp_path / "again.rws").tensors)


def test_codes_take_their_bits_on_disk(study, tmp_path):
    _, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 4)
    values = sum(t.numel() for t in s.tensors.values())
    for levels, per_value in ((256, 1), (16, 0.5), (4, 0.25)):
        size = s.quantize(levels).save(tmp_path / "s.rws")
        overhead = 2500 + 130 * len(s.tensors)
        assert values * per_value < size < values * per_value + overhead


def test_bn_float_keeps_what_is_carried(study, tmp_path):
    arch, pre, std, rob, _ = study
    s = RobustWeightSignature.extract(pre, std, rob, 2)
    q = s.quantize(4, bn_float=True)
    q.save(tmp_path / "s.rws")
    back = RobustWeightSignature.load(tmp_path / "s.rws")
    for key in carried_keys(arch):
        assert torch.equal(back.tensors[key], s.tensors[key])
    assert back.tensors[layer_keys(arch, 1)[0]].unique().numel() <= 4


def test_damaged_files_are_refused(study, tmp_path):
    _, pre, std, rob, _ = study
    path = tmp_path / "s.rws"
    RobustWeightSignature.extract(pre, std, rob, 1).quantize(16).save(path)
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:-1], b"junk" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"s\.rws"):
            RobustWeightSignature.load(path)
    path.write_bytes(data)
    content = torch.load(path, weights_only=True)
    content["payload"][len(content["payload"]) // 2] ^= 1
    torch.save(content, path)
    with pytest.raises(InputError, match="checksum"):
        RobustWeightSignature.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="not a signature"):
        RobustWeightSignature.load(path)
    with pytest.raises(InputError, match="no such"):
        RobustWeightSignature.load(tmp_path / "absent.rws")


def test_show_describes_the_file(study, tmp_path):
    arch, pre, std, rob, _ = study
    path = tmp_path / "s.rws"
    s = RobustWeightSignature.extract(pre, std, rob, 2, corruption="fog").quantize(16, "tanh")
    s.save(path)
    text = sig.describe(path)
    for piece in ("fog", arch, "16 levels", "tanh", "4 bits", *s.tensors):
        assert piece in text
