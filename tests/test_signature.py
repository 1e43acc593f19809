"""Signatures: the method, the equations, algebra, putting them on and off, the file."""

import hashlib
import json
import warnings
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.similarity import cosine
from models import build_model
from models.layers import LAYERS, carried_keys, depth_order, layer_keys
from utils import arguments, quantize, signature_file
from utils import patch as patching
from utils.errors import InputError
from utils.signature import Method, RobustWeightSignature, patch, project_out


def shifted(state, scale, seed):
    """`state` with noise on every float tensor, as fine-tuning would move it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v + scale * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in state.items()
    }


@pytest.fixture(scope="module", params=["vgg11", "resnet18"])
def study(request):
    """arch, θ_pre, θ_std and two robust models as state dicts; `extract`, `model`, `first` key."""
    torch.manual_seed(0)
    arch, pre = request.param, build_model(request.param, 10).state_dict()
    std = shifted(pre, 0.01, 1)
    rob, other = shifted(std, 0.02, 2), shifted(std, 0.02, 3)

    def extract(keep_num=2, robust=rob, **options):
        return RobustWeightSignature.extract(pre, std, robust, keep_num, **options)

    def model():
        made = build_model(arch, 10)
        made.load_state_dict(std)
        return made

    first = layer_keys(arch, 1)[0]
    return SimpleNamespace(
        arch=arch, pre=pre, std=std, rob=rob, other=other, extract=extract, model=model, first=first
    )


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


# ---- the method -----------------------------------------------------------------------------


def from_flags(*argv, **known):
    parser = arguments.Parser()
    arguments.add(parser, f"arch {arguments.METHOD}")
    return Method.from_args(parser.parse_args(argv), **known)


methods = st.builds(
    Method,
    keep_num=st.integers(1, 13),
    layers=st.sampled_from(LAYERS),
    project=st.booleans(),
    levels=st.none() | st.integers(2, 2**15).map(lambda half: 2 * half),
    scheme=st.sampled_from(quantize.METHODS),
    per_channel=st.booleans(),
    bn_float=st.booleans(),
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(methods)
def test_a_method_is_its_flags(method):
    assert from_flags(*method.flags()) == method
    assert from_flags(*(flag.replace("_", "-") for flag in method.flags())) == method
    changed = sum(getattr(method, f.name) != f.default for f in fields(Method))
    assert len(method.words().split(", ")) == max(changed, 1) and "_" not in method.words()


def test_a_method_in_words():
    assert Method().flags() == [] and Method().words() == ""
    method = Method(5, "deepest", project=False, levels=16, bn_float=True)
    assert method.words() == "keep num 5, layers deepest, no projection, quantization 16, bn float"
    assert from_flags("--keep_num", "3", keep_num=2, project=False) == Method(2, project=False)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--keep_num 14", "14.*vgg16 has 13"),
        ("--arch resnet18 --keep_num 10", "10.*resnet18 has 9"),
        ("--quantization 1", "quantization 1"),
        ("--quantization 5 --quantization_type log", "even"),
    ],
)
def test_impossible_methods_are_refused(argv, said):
    with pytest.raises(InputError, match=said):
        from_flags(*argv.split())


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


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        Method(keep_num=3, project=False),
        Method(keep_num=2, layers="deepest"),
        Method(keep_num=4, layers="random", project=False),
        Method(keep_num=2, levels=16),
        Method(keep_num=2, levels=8, scheme="log", per_channel=True, bn_float=True),
    ],
    ids=Method.words,
)
def test_extract_is_the_definition(study, method):
    s = study.extract(None, method=method, corruption="fog", seed=3)
    assert (s.arch, s.method, s.corruptions) == (study.arch, method, ("fog",))
    carried = set(carried_keys(study.arch))
    depth = [i for i, keys in enumerate(depth_order(study.arch)) if set(keys) & set(s.tensors)]
    if method.layers == "random":
        kept = layer_keys(study.arch, method.keep_num, "random", seed=3)
        assert set(s.tensors) == set(kept) | carried
        assert kept != layer_keys(study.arch, method.keep_num, "random", seed=4)
    elif not carried:
        last = len(depth_order(study.arch))
        first = 0 if method.layers == "shallowest" else last - method.keep_num
        assert depth == list(range(first, first + method.keep_num))
    for key, tensor in s.tensors.items():
        pre, std, rob = (m[key].double() for m in (study.pre, study.std, study.rob))
        expected = rob - (std if key in carried else pre)
        if method.project and key not in carried:
            clean = std - pre
            expected = expected - (expected * clean).sum() / (clean * clean).sum() * clean
        if method.levels is None or (method.bn_float and key in carried):
            torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-4)
    if method.levels:
        plain = study.extract(method.keep_num).quantize(
            method.levels, method.scheme, method.per_channel, method.bn_float
        )
        assert same_bits(s.tensors, plain.tensors) and plain.method == method


def test_extract_from_files_is_the_same(study, tmp_path):
    for name in ("pre", "std", "rob"):
        torch.save({"state_dict": getattr(study, name)}, tmp_path / name)
    a = study.extract()
    b = RobustWeightSignature.extract(tmp_path / "pre", tmp_path / "std", str(tmp_path / "rob"), 2)
    assert same_bits(a.tensors, b.tensors) and replace(a, tensors={}) == replace(b, tensors={})


def test_extract_refuses_what_does_not_fit(study):
    key, rob = study.first, study.rob
    without = {k: v for k, v in rob.items() if k != key}
    for wrong in (without, {**rob, key: rob[key][:-1]}, {**rob, key: rob[key] * float("nan")}):
        with pytest.raises(InputError, match=key):
            study.extract(robust=wrong)
    with pytest.raises(InputError, match="99"):
        study.extract(99)
    with pytest.raises(InputError, match="none of the known architectures"):
        RobustWeightSignature.extract(study.pre, without, rob, 2)


def test_identical_models_warn(study):
    with pytest.warns(UserWarning, match="zero"):
        RobustWeightSignature.extract(study.pre, study.pre, study.pre, 2)


# ---- algebra --------------------------------------------------------------------------------


def test_scale_and_sum(study):
    a = study.extract(2, corruption="fog", severity=5, dataset="one").quantize(16, "tanh")
    b = study.extract(3, study.other, corruption="snow", severity=5, dataset="two")
    total = sum([a.scale(0.5), b.scale(0.25)])
    assert total.method == (a + b).method == Method(keep_num=3) and not (a + b).codes
    assert (total.corruptions, total.severity, total.dataset) == (("fog", "snow"), 5, None)
    assert (total.pretrained, total.robust) == (a.pretrained, (*a.robust, *b.robust))
    assert set(total.tensors) == set(a.tensors) | set(b.tensors)
    for key, tensor in total.tensors.items():
        expected = 0.25 * b.tensors[key]
        if key in a.tensors:
            expected = expected + 0.5 * a.tensors[key]
        torch.testing.assert_close(tensor, expected)
    for w in (a.scale(0.5), replace(a, statistics={"x": torch.ones(1)}).scale(0.5)):
        assert not w.statistics  # what is kept is of α = 1
    with pytest.raises(InputError, match="vgg13"):
        a + replace(a, arch="vgg13")
    plain = study.extract(method=Method(project=False), keep_num=2, corruption="snow")
    for one, two in ((a, plain), (plain, a)):
        with pytest.raises(InputError, match=r"no projection.*extract them alike"):
            one + two
    with pytest.raises(InputError, match=study.first):
        a + replace(a, tensors={study.first: torch.zeros(1)})


def test_operators_of_task_arithmetic(study):
    a, b = study.extract(corruption="fog"), study.extract(robust=study.other, corruption="snow")
    for key in a.tensors:
        x, y = a.tensors[key], b.tensors[key]
        for found, expected in (
            (-a, -x),
            (a - b, x - y),
            (0.5 * a, 0.5 * x),
            (a * 2, 2 * x),
            (a / 2, x / 2),
        ):
            torch.testing.assert_close(found.tensors[key], expected)
    assert (a - b).corruptions == ("fog", "snow")


def test_cosine(study):
    a, b = study.extract(), study.extract(robust=study.other)
    assert cosine(a, a) == pytest.approx(1) and cosine(a, a.scale(-3)) == pytest.approx(-1)
    x, y = (torch.cat([t.flatten() for t in s.tensors.values()]) for s in (a, b))
    expected = torch.nn.functional.cosine_similarity(x, y, dim=0).item()
    assert cosine(a, b) == pytest.approx(expected, abs=1e-5)
    assert cosine(a, a.scale(0)) == 0


# ---- on and off -----------------------------------------------------------------------------


def test_patch_adds_and_remove_restores_the_bits(study):
    model, s = study.model(), study.extract()
    before = bits(model)
    handle = patch(model, s, alpha=0.7)
    for key, tensor in model.state_dict().items():
        added = 0.7 * s.tensors[key] if key in s.tensors else 0
        torch.testing.assert_close(tensor, study.std[key] + added)
    if study.arch.startswith("resnet"):
        model.train()(torch.rand(4, 3, 32, 32))  # moves the running statistics
        assert not same_bits(before, bits(model))
    for _ in range(2):  # the second time nothing more happens
        handle.remove()
        assert same_bits(before, bits(model))


def test_all_that_changes_under_a_patch_comes_back(study):
    model, s = study.model(), study.extract()
    last = list(model.parameters())[-1]  # of the head, which no patch touches
    before = bits(model)
    with patch(model, s):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.train()(torch.rand(4, 3, 32, 32)).logsumexp(1).sum().backward()
        optimizer.step()
        assert not same_bits(before, bits(model)) and last.grad.any()
    assert same_bits(before, bits(model))
    for assign in (False, True):
        with patch(model, s):
            model.load_state_dict(study.other, assign=assign)
        assert same_bits(before, bits(model))
    handle = patch(model, s)
    model.double()
    with pytest.raises(InputError, match=r"can't be removed: .* another shape or type"):
        handle.remove()
    model.float()
    handle.remove()
    assert same_bits(before, bits(model))


def test_an_outer_patch_keeps_its_statistics(study):
    model, s = study.model(), study.extract()
    with patch(model, s):
        model.train()(torch.rand(4, 3, 32, 32))
        outer = bits(model)
        with patch(model, s, 0.5):
            model(torch.rand(4, 3, 32, 32))
        assert same_bits(outer, bits(model))


def in_ddp(model):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return torch.nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        in_ddp,
        torch.optim.swa_utils.AveragedModel,
        torch.compile,
        lambda m: torch.nn.DataParallel(torch.compile(m)),
    ],
)
def test_the_model_in_a_wrapper_is_patched(study, wrap):
    s, wrapped = study.extract(), wrap(study.model())
    before = bits(wrapped)
    inside = next(name for name in before if name.endswith(study.first))
    with patch(wrapped, s):
        added = bits(wrapped)[inside] - before[inside]
        torch.testing.assert_close(added, s.tensors[study.first], atol=1e-6, rtol=1e-3)
    assert same_bits(before, bits(wrapped))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_is_finite(study, alpha):
    model = study.model()
    before = bits(model)
    with pytest.raises(InputError, match=f"alpha is {alpha}"):
        patch(model, study.extract(), alpha)
    assert same_bits(before, bits(model))


def test_extract_takes_modules_and_wrapped_dicts(study):
    forms = (
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: module(study, state),
        lambda state: torch.nn.DataParallel(module(study, state)),
    )
    expected = study.extract()
    for form in forms:
        made = RobustWeightSignature.extract(*map(form, (study.pre, study.std, study.rob)), 2)
        assert made.pretrained == expected.pretrained and made.arch == study.arch
        assert all(torch.equal(made.tensors[k], v) for k, v in expected.tensors.items())


def module(study, state):
    made = build_model(study.arch, 10)
    made.load_state_dict(state)
    return made


def test_with_form_and_alpha_zero(study):
    model, s = study.model(), study.extract()
    with torch.no_grad():
        model.get_parameter(study.first).view(-1)[0] = -0.0
    before = bits(model)
    with patch(model, s, alpha=0):
        assert same_bits(before, bits(model))
    with pytest.raises(RuntimeError, match="inside"), patch(model, s):
        raise RuntimeError("inside")
    assert same_bits(before, bits(model))


def test_removal_outlives_the_model(study):
    model = study.model()
    handle = patch(model, study.extract())
    del model
    assert len(patching._PATCHES) == 0  # nothing keeps a dropped model alive
    handle.remove()


def test_patch_refuses_what_does_not_fit_and_changes_nothing(study):
    other = build_model("vgg13" if study.arch == "vgg11" else "vgg11", 10)
    before = bits(other)
    with pytest.raises(InputError, match=study.arch):
        patch(other, study.extract())
    key = "features.0.weight"
    tensors = {"features.0.bias": torch.ones(64), key: torch.ones(64, 3, 3, 2)}
    with pytest.raises(InputError, match=rf"{key} is \(64, 3, 3, 2\), the model's is \(64, 3"):
        patch(other, RobustWeightSignature(tensors, "vgg11", Method()))
    assert same_bits(before, bits(other))


def test_a_patch_that_fails_half_way_is_off(study, monkeypatch):
    model, signature = study.model(), study.extract(keep_num=3)
    add = torch.Tensor.add_

    def fails(self, *more, **named):
        if self is model.get_parameter(list(signature.tensors)[-1]):
            raise KeyboardInterrupt
        return add(self, *more, **named)

    with monkeypatch.context() as patches:
        patches.setattr(torch.Tensor, "add_", fails)
        with pytest.raises(KeyboardInterrupt):
            patch(model, signature)
    assert all(torch.equal(value, study.std[key]) for key, value in model.state_dict().items())
    with patch(model, signature):
        assert not torch.equal(model.state_dict()[study.first], study.std[study.first])
    assert all(torch.equal(value, study.std[key]) for key, value in model.state_dict().items())


def test_nan_inside_is_refused(study):
    tensors = {study.first: torch.tensor([0.0, float("inf")])}
    with pytest.raises(InputError, match=study.first):
        RobustWeightSignature(tensors, study.arch, Method())


def test_other_pretrained_weights_warn_once(study):
    s, model = study.extract(), study.model()
    model.pretrained_hash = f"another-{study.arch}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        patch(model, s).remove()
        patch(model, s).remove()
    assert len(told) == 1 and model.pretrained_hash in str(told[0].message)


# ---- the file -------------------------------------------------------------------------------


def kept(signature, path):
    """`signature` after it was written to `path` and read again."""
    assert signature.save(path) == path.stat().st_size
    return RobustWeightSignature.load(path)


@pytest.mark.parametrize("levels", [None, 2, 6, 16, 256])
@pytest.mark.parametrize("scheme", quantize.METHODS)
def test_file_gives_back_every_bit(study, tmp_path, levels, scheme):
    if scheme == "log" and levels == 2:
        pytest.skip("log needs at least 4 levels")
    method = Method(2, project=False)
    s = study.extract(None, method=method, corruption="fog", severity=3, dataset="d")
    if levels:
        for per_channel in (False, True):
            quantized = s.quantize(levels, scheme, per_channel)
            for key, tensor in s.tensors.items():
                fake = quantize.fake_quantize(tensor, levels, scheme, per_channel)
                assert torch.equal(quantized.tensors[key], fake)
        s = quantized
    back = kept(s, tmp_path / "fog.rws")
    again = kept(back, tmp_path / "again.rws")
    assert same_bits(s.tensors, back.tensors) and same_bits(s.tensors, again.tensors)
    empty = {"tensors": {}, "codes": {}}
    assert replace(s, **empty) == replace(back, **empty) == replace(again, **empty)
    assert back.codes.keys() == s.codes.keys()


def test_codes_take_their_bits_on_disk(study, tmp_path):
    s = study.extract(4)
    values = sum(t.numel() for t in s.tensors.values())
    for levels, per_value in ((256, 1), (16, 0.5), (4, 0.25)):
        size = s.quantize(levels).save(tmp_path / "s.rws")
        overhead = 2500 + 130 * len(s.tensors)
        assert values * per_value < size < values * per_value + overhead


def test_bn_float_keeps_what_is_carried(study, tmp_path):
    s = study.extract()
    back = kept(s.quantize(4, bn_float=True), tmp_path / "s.rws")
    for key in carried_keys(study.arch):
        assert torch.equal(back.tensors[key], s.tensors[key])
    assert back.tensors[study.first].unique().numel() <= 4


@pytest.mark.parametrize("with_layers", [True, False])  # the first files had no such entry
@pytest.mark.parametrize("levels", [None, 6])
def test_files_from_before_the_method_was_kept_are_read(study, tmp_path, levels, with_layers):
    path = tmp_path / "old.rws"
    s = study.extract(2, corruption="fog", severity=5)
    s = s.quantize(levels, "log", per_channel=True) if levels else s
    s.save(path)
    document = torch.load(path, weights_only=True)
    meta = document["meta"]
    del meta["method"]
    form = {"levels": levels, "method": "log", "per_channel": True, "bn_float": False}
    meta |= {"keep_num": 2, "quantization": form if levels else None}
    meta |= {"layers": "shallowest"} if with_layers else {}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    digest.update(document["payload"].numpy().tobytes())
    torch.save({**document, "checksum": digest.hexdigest()}, path)
    back = RobustWeightSignature.load(path)
    assert back.method == s.method and same_bits(back.tensors, s.tensors)
    assert "keep_num 2, projection not recorded" in signature_file.describe(path)


def test_what_is_no_signature_file_is_refused(study, tmp_path):
    path = tmp_path / "s.rws"
    study.extract(1).quantize(16).save(path)
    content = torch.load(path, weights_only=True)
    content["payload"][len(content["payload"]) // 2] ^= 1
    for wrong, said in (
        (content, "checksum"),
        ({"state_dict": {}}, "not a signature"),
        ({**content, "version": 99}, "signature format 99"),
        ({**content, "meta": 5}, "checksum"),
        ({k: v for k, v in content.items() if k != "meta"}, "not a valid signature"),
        ({**content, "payload": content["payload"].float()}, "not a signature"),
    ):
        torch.save(wrong, path)
        with pytest.raises(InputError, match=rf"s\.rws: {said}"):
            RobustWeightSignature.load(path)


@pytest.mark.parametrize(
    ("method", "pieces"),
    [
        (Method(2), ["keep_num 2, as in the paper", "float32"]),
        (Method(3, "deepest", project=False), ["keep_num 3, layers deepest, no projection"]),
        (
            Method(3, "random", levels=16, scheme="tanh"),
            ["keep_num 3, layers random", "16 levels, tanh, 4 bits"],
        ),
        (Method(1, levels=4, per_channel=True, bn_float=True), ["per channel, batch norm in fl"]),
    ],
)
def test_show_says_how_it_was_made(study, tmp_path, method, pieces):
    s = study.extract(None, method=method, corruption="fog", severity=2)
    s.save(tmp_path / "s.rws")
    text = signature_file.describe(tmp_path / "s.rws")
    for piece in ("fog, severity 2", study.arch, s.pretrained, *s.robust, *pieces, *s.tensors):
        assert piece in text
