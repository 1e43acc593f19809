"""The rules of the experiments on rows made up so that each verdict is due; the report."""

import json
from types import SimpleNamespace

import pytest
import torch

from datasets.corruptions import CORRUPTIONS, FAMILIES
from experiments import EXPERIMENTS, report, similarity, tables
from experiments.alpha import TAKEN_OFF
from experiments.choose import CHOSEN, ORACLE, further
from experiments.compose import COMPOSED, LEARNT
from experiments.layers import CONTROL
from experiments.tables import (
    BATCHNORM_ONLY,
    FAILS,
    HOLDS,
    PARTLY,
    PATCHED,
    ROBUST,
    STANDARD,
    UNION,
    UNTOLD,
)
from experiments.transfer import CARRIED, ORIGINAL, OWN, UPDATED
from utils.errors import InputError
from utils.signature import Method, RobustWeightSignature


def row(model, ra, ta=90.0, **knobs):
    return {"seed": 0, "corruption": "fog", "model": model, "TA": ta, "RA": float(ra)} | knobs


def between(standard, robust, *rows):
    return [row(STANDARD, standard, bytes=0), row(ROBUST, robust, bytes=1000), *rows]


def patched(ra, **knobs):
    return row(PATCHED, ra, **knobs)


def judge(name, rows):
    return EXPERIMENTS[name].verdict(rows)


# ---- rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ra", "ta", "verdict"),
    [(68, 88.0, HOLDS), (68, 80.0, PARTLY), (61, 90.0, PARTLY), (55, 90.0, FAILS)],
)
def test_main(ra, ta, verdict):
    forms = [patched(ra, ta=ta, bits=b, bytes=size) for b, size in ((32, 100), (4, 13))]
    got, words = judge("main", between(50, 70, *forms))
    assert got == verdict and f"{(ra - 50) * 5:.0f} %" in words and "1/10" in words


def test_main_is_of_seeds_that_have_every_corruption():
    rows = []
    for name, seed in (("fog", 0), ("snow", 0), ("fog", 1)):
        ra = 68 if seed == 0 else 0
        one = between(50, 70, patched(ra, bits=32, bytes=100))
        rows += [r | {"corruption": name, "seed": seed} for r in one]
    verdict, words = judge("main", rows)
    assert verdict == HOLDS and "90 %" in words and "(90 to 90 %)" in words


def test_main_tells_what_batch_norm_alone_and_data_augmentation_do():
    more = row(BATCHNORM_ONLY, 65, bytes=0), row(UNION, 60, ta=70.0, bytes=1000)
    verdict, words = judge("main", between(50, 70, patched(68, bits=32, bytes=100), *more))
    assert verdict == HOLDS and "90 %" in words and "75 % of the gain with no signature" in words
    assert "data augmentation: RA 60.0, TA 70.0; patches: RA 68.0, TA 90.0" in words


def layers(name, shallow, deep):
    values = enumerate([shallow] * 2 + [deep] * 4, start=1)
    return [{"seed": 0, "corruption": name, "layer": i, "value": v} for i, v in values]


@pytest.mark.parametrize(("deep", "verdict"), [(0.1, HOLDS), (0.9, FAILS)])
def test_layers(deep, verdict):
    assert judge("layers", layers("fog", 0.5, deep))[0] == verdict


def test_layers_against_another_clean_seed():
    control = layers(CONTROL, 0.3, 0.1)
    verdict, words = judge("layers", [*layers("fog", 0.4, 0.1), *control])
    assert verdict == HOLDS and "only in layer 1, 2;" in words
    assert judge("layers", [*layers("fog", 0.2, 0.1), *control])[0] == FAILS


def test_similarity_needs_both_families_and_names():
    inside = {"seed": 0, "a": "gaussian_noise", "b": "shot_noise", "value": 0.8}
    across = {"seed": 0, "a": "gaussian_noise", "b": "fog", "value": 0.1}
    right = {"seed": 1, "corruption": "fog", "named": "fog", "value": 0.5}
    wrong = right | {"named": "snow"}
    for rows, verdict in (
        ([inside, across, right], HOLDS),
        ([inside, across, right, wrong], PARTLY),
        ([inside, across], PARTLY),
        ([inside | {"value": 0.0}, across, wrong], FAILS),
        ([across], UNTOLD),
        ([across, right], HOLDS),
    ):
        assert judge("similarity", rows)[0] == verdict


def test_names_are_of_seeds_that_have_every_corruption():
    """Means over more seeds would be nearer, whatever the corruption."""
    pair = ("gaussian_noise", "fog")
    every = [*pair, "snow"]

    def signature(name):
        return RobustWeightSignature({"w": torch.ones(2)}, "vgg11", Method(), (name,))

    runs = [
        SimpleNamespace(args=SimpleNamespace(seed=seed, corruption=names), signature=signature)
        for seed, names in enumerate((every, pair, pair))
    ]
    args = SimpleNamespace(seeds=[0, 1, 2], corruptions=every)
    rows = similarity.measure(SimpleNamespace(patchings=lambda: runs, args=args))
    named = [(row["seed"], row["corruption"]) for row in rows if "named" in row]
    assert named == [(seed, name) for seed in (1, 2) for name in pair]


def test_consistency():
    pairs = [(a, b) for a in ("fog", "snow", "frost") for b in ("fog", "snow")]
    rows = [{"seed": 0, "a": a, "b": b, "value": 0.5 if a == b else 0.1} for a, b in pairs]
    assert judge("consistency", rows)[0] == HOLDS
    rows[-1]["value"] = 0.6
    assert judge("consistency", rows)[0] == PARTLY


def test_keep_num():
    kept = [patched(ra, keep_num=k) for k, ra in ((1, 52), (3, 66), (6, 67), (8, 65))]
    verdict, words = judge("keep_num", between(50, 70, *kept))
    assert verdict == HOLDS and words.startswith("3 of 8 layers recover 80 %")
    assert judge("keep_num", between(50, 40, patched(52, keep_num=1)))[0] == FAILS
    assert judge("keep_num", between(50, 70, patched(40, keep_num=1)))[0] == FAILS
    verdict, words = judge("keep_num", between(50, 70, *kept, row(BATCHNORM_ONLY, 66)))
    assert verdict == HOLDS and words.startswith("3 of 8") and "alone 80 %" in words
    few = [patched(ra, keep_num=k, layers=13) for k, ra in ((5, 66), (7, 67))]
    verdict, words = judge("keep_num", between(50, 70, *few))
    assert verdict == HOLDS and words.startswith("5 of 13")


@pytest.mark.parametrize("name", ["keep_num", "quantization"])
def test_verdicts_are_of_seeds_that_have_every_corruption(name):
    rows = []
    for seed, corruption, ra in ((0, "fog", 70), (0, "snow", 70), (1, "fog", 50)):
        own = between(50, 75, patched(ra, keep_num=7, bits=4, bytes=1), patched(70, bits=32))
        rows += [{"keep_num": 7, **r, "seed": seed, "corruption": corruption} for r in own]
    _, words = judge(name, [r | {"bytes": r.get("bytes", 100)} for r in rows])
    assert "80 %" in words if name == "keep_num" else "RA 70.0 against 70.0" in words


@pytest.mark.parametrize(
    ("ra", "size", "verdict"), [(69.5, 10, HOLDS), (69.5, 100, PARTLY), (60, 10, FAILS)]
)
def test_quantization(ra, size, verdict):
    forms = patched(70, keep_num=7, bits=32, bytes=100), patched(ra, keep_num=7, bits=4, bytes=size)
    other = patched(99, keep_num=1, bits=4, bytes=1)  # the layers nearest to 7 are judged
    assert judge("quantization", between(50, 75, *forms, other))[0] == verdict


def test_alpha():
    swept = [patched(ra, alpha=a) for a, ra in ((0, 50), (0.5, 60), (1, 70), (1.5, 10))]
    back = {"seed": 0, "corruption": "fog", "model": TAKEN_OFF, "value": 1}
    assert judge("alpha", [*swept, back])[0] == HOLDS
    assert judge("alpha", [*swept, back | {"value": 0}])[0] == FAILS
    assert judge("alpha", [swept[3], back])[0] == UNTOLD
    swept[1]["RA"] = 80.0
    assert judge("alpha", [*swept, back])[0] == FAILS


@pytest.mark.parametrize(("composed", "verdict"), [(68, HOLDS), (60, PARTLY), (52, FAILS)])
def test_compose(composed, verdict):
    models = [row(STANDARD, 50), row(COMPOSED, composed, w=0.5), row(COMPOSED, 20, w=1.0)]
    rows = [r | {"group": "fog+snow"} for r in (*models, row(UNION, 70))]
    got, words = judge("compose", rows)
    assert got == verdict and "w = 1/n" in words and "learnt" not in words
    learnt = row(LEARNT, 69, 80.0, by="one for each layer") | {"group": "fog+snow"}
    got, words = judge("compose", [*rows, learnt])  # told, not judged
    assert got == verdict and "(learnt weights: one for each layer RA 69.0, TA 80.0)" in words


@pytest.mark.parametrize(("moved", "verdict"), [(65, HOLDS), (55, PARTLY), (50, FAILS)])
def test_transfer(moved, verdict):
    far = between(50, 72, patched(moved, signature=CARRIED), patched(70, signature=OWN))
    near = [row(STANDARD, 50, case=UPDATED), patched(70, signature=CARRIED, case=UPDATED)]
    near += [r | {"case": ORIGINAL} for r in between(50, 72, patched(70, signature=OWN))]
    assert judge("transfer", [*(r | {"case": "a → b"} for r in far), *near])[0] == verdict
    got, words = judge("transfer", near)
    assert got == PARTLY and "another data set: not measured" in words


@pytest.mark.parametrize(
    ("ra", "ta", "verdict"),
    [
        (69, 89.0, HOLDS),
        (69, 88.0, PARTLY),
        (67, 90.0, PARTLY),
        (65, 90.0, FAILS),
        (69, 86.0, FAILS),
    ],
)
def test_choose(ra, ta, verdict):
    chosen = [
        row(CHOSEN, ra, ta=ta, together=1, right=80.0, family=90.0),
        row(CHOSEN, 99, together=4, right=99.0, family=99.0),
    ]
    curve = [{"seed": 0, "model": CHOSEN, "severity": s, "value": 60.0} for s in (1, 5)]
    curve += [r | {"model": STANDARD, "value": v} for r, v in zip(curve, (61.0, 50.0), strict=True)]
    rows = [row(STANDARD, 50), *chosen, row(ORACLE, 70), *curve]
    got, words = judge("choose", rows)
    assert got == verdict and f"{(ra - 50) * 5} % of the oracle" in words
    assert "named right one at a time 80 %" in words and "at 1 of 2 severities" in words
    assert judge("choose", [*rows[:3], row(ORACLE, 40), *curve])[0] == FAILS


def test_what_choose_says_beyond_its_table():
    left_out = [
        {"model": model, "left_out": name, "value": value}
        for name, values in (("fog", (51.0, 40.0)), ("snow", (38.0, 39.0)))
        for model, value in zip((CHOSEN, STANDARD), values, strict=True)
    ]
    shares = {"fog": {"fog": 0.9, "snow": 0.1}, "shot_noise": {"gaussian_noise": 0.5, "fog": 0.5}}
    named = [
        {"set": "other", "a": a, "b": b, "value": share}
        for a, of in shares.items()
        for b, share in of.items()
    ]
    assert list(further([{"a": "fog", "b": "fog", "value": 1.0}, *left_out, *named])) == [
        "RA under what the bank lacks (standard model): fog 51.0 (40.0), snow 38.0 (39.0)",
        "on other, by the same fingerprints, named right 45 %, family right 75 %",
    ]


# ---- tables ---------------------------------------------------------------------------------


def test_table_means_over_whole_seeds_and_spreads():
    rows = []
    for seed, name, ra in ((0, "fog", 60), (0, "snow", 70), (1, "fog", 64)):
        rows += [r | {"seed": seed, "corruption": name} for r in between(50, 70, patched(ra))]
    made = tables.accuracies(rows)
    assert made.columns == ["model", "TA, %", "RA, %", "recovered, %", "RA fog, %", "RA snow, %"]
    assert made.lines == [
        ["standard", "90.0", "50.0", None, "50.0 ± 0.0", "50.0"],
        ["patched", "90.0", "65.0", "75.0", "62.0 ± 2.8", "70.0"],
        ["robust", "90.0", "70.0", None, "70.0 ± 0.0", "70.0"],
    ]


def test_many_corruptions_are_told_by_family_and_one_by_one_where_they_have_a_spread(tmp_path):
    rows = []
    for seed, names in ((0, CORRUPTIONS), (1, ("fog", "contrast"))):
        for ra, name in enumerate(names, start=60):
            some = between(50, 80, patched(ra, bits=32, bytes=100))
            rows += [r | {"seed": seed, "corruption": name} for r in some]
    made = tables.accuracies(rows)
    families = [f"RA {part}, %" for part in ("noise", "blur", "weather", "digital")]
    assert made.columns[4:] == [*families, "RA fog, %", "RA contrast, %"]
    (line,) = [line for line in made.lines if line[0] == PATCHED]
    of_noise = [60 + CORRUPTIONS.index(c) for c in CORRUPTIONS if FAMILIES[c] == "noise"]
    assert line[4] == f"{sum(of_noise) / len(of_noise):.1f}" and "±" in line[-1]
    EXPERIMENTS["main"].figure(rows, tmp_path / "main.png")
    assert {p.name for p in tmp_path.iterdir()} == {"main.png", "main_corruptions.png"}


# ---- report ---------------------------------------------------------------------------------


def write(folder, back=1, **more):
    rows = between(50, 75, patched(50, alpha=0), patched(70, alpha=1))
    rows.append({"seed": 0, "corruption": "fog", "model": TAKEN_OFF, "value": back})
    content = {"experiment": "alpha", "rows": rows, "study": "made up; briefly", "note": "Note."}
    content |= {"ablation": "", "command": "reproduce.py alpha", "device": "none", "torch": "0"}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content | more))


def test_report_gathers_and_combines(tmp_path):
    write(tmp_path / "a" / "alpha")
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## alpha: holds\n" in text and "## main: not measured" in text
    write(tmp_path / "b" / "alpha", back=0, caveat="Of another network.")
    write(tmp_path / "c" / "alpha", back=0, ablation="layers deepest")
    of_layers = [*layers("fog", 0.2, 0.1), *layers(CONTROL, 0.1, 0.1)]
    write(tmp_path / "d" / "layers", experiment="layers", rows=of_layers)
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## alpha: holds partly\n" in text and text.count("c/alpha") == 1
    assert "- made up: 1 (seed 0) of 19 corruptions\n" in text
    assert text.count("on made up, fog alone: taking a patch off") == 2
    assert text.index("## Ablations") < text.index("c/alpha")
    assert "| holds partly (see its caveat) |" in text
    assert text.count(" **Of another network.** [Table](b/alpha/table.md)") == 1
    assert text.count("made up; briefly") == 1 and text.count("python reproduce.py alpha") == 1
    report.write(tmp_path / "c")  # an ablation alone
    assert "## alpha: not measured" in (tmp_path / "c" / "README.md").read_text()
    (tmp_path / "b" / "alpha" / "results.json").write_text("{")
    with pytest.raises(InputError, match="b/alpha"):
        report.write(tmp_path)
