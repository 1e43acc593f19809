"""The rules of the report, on results made up so that each verdict is due."""

import json

import pytest

from utils import claims
from utils.claims import FAILS, HOLDS, PARTLY, UNTOLD
from utils.errors import InputError


def row(standard, patched, robust, **more):
    of = {"standard": standard, "patched": patched, "robust": robust}
    return {k: {"TA": 90.0, "RA": v} for k, v in of.items()} | {"corruption": "fog"} | more


@pytest.mark.parametrize(
    ("patched", "ta", "verdict"),
    [(68.0, 88.0, HOLDS), (68.0, 80.0, PARTLY), (61.0, 90.0, PARTLY), (55.0, 90.0, FAILS)],
)
def test_main(patched, ta, verdict):
    values = {
        "standard": (90.0, 50.0, 0),
        "robust models": (85.0, 70.0, 1000),
        "RWS, float32": (ta, patched, 100),
        "RWS, 4 bits": (ta, patched, 13),
    }
    rows = [
        {"model": m, "corruption": "fog", "seed": 0, "TA": a, "RA": b, "bytes": c}
        for m, (a, b, c) in values.items()
    ]
    got, words = claims.judge_main({"rows": rows})
    assert got == verdict and f"{(patched - 50) * 5:.0f} %" in words and "1/10" in words


def test_main_is_of_seeds_that_have_every_corruption():
    values = {"standard": 50.0, "robust models": 70.0, "RWS, float32": 68.0}
    rows = [
        {"model": m, "corruption": c, "seed": seed, "TA": 90.0, "RA": ra, "bytes": 100}
        for m, ra in values.items()
        for c, seed in (("fog", 0), ("snow", 0), ("fog", 1))
    ]
    rows[-1]["RA"] = 0.0  # the patch of seed 1
    verdict, words = claims.judge_main({"rows": rows})
    assert verdict == HOLDS and "90 %" in words and "(90 to 90 %)" in words


def test_main_tells_what_batch_norm_alone_does():
    values = {"standard": 50.0, "robust models": 70.0, "RWS, float32": 68.0}
    values |= {"batch norm re-estimated only": 65.0}
    common = {"corruption": "fog", "seed": 0, "TA": 90.0, "bytes": 100}
    rows = [common | {"model": model, "RA": ra} for model, ra in values.items()]
    verdict, words = claims.judge_main({"rows": rows})
    assert verdict == HOLDS and "90 %" in words and "75 % of the gain with no signature" in words


@pytest.mark.parametrize(("deep", "verdict"), [(0.1, HOLDS), (0.9, FAILS)])
def test_layers(deep, verdict):
    rows = [
        {"layer": i, "corruption": "fog", "seed": 0, "difference": 0.5 if i < 3 else deep}
        for i in range(1, 7)
    ]
    assert claims.judge_layers({"rows": rows})[0] == verdict


def test_layers_against_another_clean_seed():
    def rows(name, shallow, deep):
        common = {"corruption": name, "seed": 0}
        return [
            common | {"layer": i, "difference": shallow if i < 3 else deep} for i in range(1, 7)
        ]

    control = rows("another seed, clean", 0.3, 0.1)
    verdict, words = claims.judge_layers({"rows": [*rows("fog", 0.4, 0.1), *control]})
    assert verdict == HOLDS and "only in layer 1, 2;" in words
    assert claims.judge_layers({"rows": [*rows("fog", 0.2, 0.1), *control]})[0] == FAILS


def test_similarity_needs_both_families_and_names():
    rows = [{"families": "noise, noise", "cosine": 0.8}, {"families": "noise, blur", "cosine": 0.1}]
    right = {"corruption": "fog", "named": "fog"}
    wrong = {"corruption": "fog", "named": "snow"}
    assert claims.judge_similarity({"rows": rows, "named": [right]})[0] == HOLDS
    assert claims.judge_similarity({"rows": rows, "named": [right, wrong]})[0] == PARTLY
    assert claims.judge_similarity({"rows": rows})[0] == PARTLY
    rows[0]["cosine"] = 0.0
    assert claims.judge_similarity({"rows": rows, "named": [wrong]})[0] == FAILS
    assert claims.judge_similarity({"rows": rows[1:]})[0] == UNTOLD
    assert claims.judge_similarity({"rows": rows[1:], "named": [right]})[0] == HOLDS


def test_consistency():
    rows = [
        {"a": a, "b": b, "cosine": 0.5 if a == b else 0.1}
        for a in ("fog", "snow", "frost")
        for b in ("fog", "snow")
    ]
    assert claims.judge_consistency({"rows": rows})[0] == HOLDS
    rows[-1]["cosine"] = 0.6
    assert claims.judge_consistency({"rows": rows})[0] == PARTLY


def test_keep_num():
    rows = [row(50, r, 70, keep_num=k) for k, r in ((1, 52), (3, 66), (6, 67), (8, 65))]
    verdict, words = claims.judge_keep_num({"rows": rows})
    assert verdict == HOLDS and words.startswith("3 of 8 layers recover 80 %")
    assert claims.judge_keep_num({"rows": [row(50, 52, 40, keep_num=1)]})[0] == FAILS
    assert claims.judge_keep_num({"rows": [row(50, 40, 70, keep_num=1)]})[0] == FAILS
    rows.append(row(50, 66, 70, keep_num=0))  # batch norm alone is no layer
    verdict, words = claims.judge_keep_num({"rows": rows})
    assert verdict == HOLDS and words.startswith("3 of 8") and "alone 80 %" in words


@pytest.mark.parametrize(
    ("ra", "size", "verdict"), [(69.5, 10, HOLDS), (69.5, 100, PARTLY), (60, 10, FAILS)]
)
def test_quantization(ra, size, verdict):
    rows = [row(50, 70, 75, keep_num=7, bits=32, bytes=100)]
    rows.append(row(50, ra, 75, keep_num=7, bits=4, bytes=size))
    result = {"rows": rows, "full_copy": 1000, "keep_num": 7}
    assert claims.judge_quantization(result)[0] == verdict


def test_alpha():
    rows = [row(50, r, 75, alpha=a) for a, r in ((0, 50), (0.5, 60), (1, 70), (1.5, 10))]
    assert claims.judge_alpha({"rows": rows, "restored": True})[0] == HOLDS
    assert claims.judge_alpha({"rows": rows, "restored": False})[0] == FAILS
    assert claims.judge_alpha({"rows": rows[3:], "restored": True})[0] == UNTOLD
    rows[1]["patched"]["RA"] = 80.0
    assert claims.judge_alpha({"rows": rows, "restored": True})[0] == FAILS


@pytest.mark.parametrize(("composed", "verdict"), [(68, HOLDS), (60, PARTLY), (52, FAILS)])
def test_compose(composed, verdict):
    models = {"standard": 50, "composed, w = 1/n": composed, "composed, w = 1": 20}
    models["trained on all of them"] = 70
    rows = [
        {"group": "a+b", "n": 2, "model": m, "TA": 90.0, "RA mean": v} for m, v in models.items()
    ]
    verdict_, words = claims.judge_compose({"rows": rows})
    assert verdict_ == verdict and "w = 1/n" in words


@pytest.mark.parametrize(("moved", "verdict"), [(65, HOLDS), (55, PARTLY), (50, FAILS)])
def test_transfer(moved, verdict):
    cases = {
        "a → b": {
            "standard": 50,
            "patched, other's signature": moved,
            "patched, own signature": 70,
            "robust": 72,
        },
        "updated backbone": {"standard": 50, "patched, old signature": 70},
        "original backbone": {"standard": 50, "patched": 70, "robust": 72},
    }
    rows = [
        {"case": case, "model": m, "RA": v, "corruption": "fog"}
        for case, models in cases.items()
        for m, v in models.items()
    ]
    assert claims.judge_transfer({"rows": rows})[0] == verdict
    verdict, words = claims.judge_transfer({"rows": rows[4:]})
    assert verdict == PARTLY and "another data set: not measured" in words


def write(folder, **more):
    content = {"experiment": "alpha", "rows": [row(50, 70, 75, alpha=a) for a in (0, 1)]}
    content["rows"][0]["patched"]["RA"] = 50.0
    content |= {"restored": True, "caption": "made up.", "command": "reproduce.py alpha"}
    content |= {"device": "none", "torch": "0", "arguments": {"layers": "shallowest"}} | more
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def test_report_gathers_and_combines(tmp_path):
    write(tmp_path / "a" / "alpha")
    claims.report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "5. Adjustable in place: holds\n" in text and "Main result: not measured" in text
    write(tmp_path / "b" / "alpha", restored=False)
    write(tmp_path / "c" / "alpha", restored=False, arguments={"layers": "deepest"})
    claims.report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "5. Adjustable in place: holds partly\n" in text and text.count("c/alpha") == 1
    assert text.index("## Ablations") < text.index("c/alpha")
    claims.report(tmp_path / "c")  # an ablation alone
    assert "5. Adjustable in place: not measured" in (tmp_path / "c" / "README.md").read_text()
    (tmp_path / "b" / "alpha" / "results.json").write_text("{")
    with pytest.raises(InputError, match="b/alpha"):
        claims.report(tmp_path)
