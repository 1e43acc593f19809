"""The paper's claims, each with the rule by which results of reproduce.py are judged.

    python reproduce.py report          gathers results/**/results.json into results/README.md

A rule is the same for every study; its verdict is "holds", "holds partly" or
"does not hold", or "cannot be told" from a study too small for it. Where several studies measured a
claim it holds only if it does in all of them that can tell.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.atomic import write_text
from utils.errors import InputError
from utils.report import markdown_table, mean, recovered

HOLDS, PARTLY, FAILS = "holds", "holds partly", "does not hold"
UNTOLD = "cannot be told"
BATCHNORM_ONLY = "batch norm re-estimated only"  # a model of main, compose and transfer
Verdict = tuple[str, str]  # verdict, and in words what was measured
NO_GAIN: Verdict = (FAILS, "no robust model gains RA here, so there is nothing to recover")


def graded(share: float, holds: float, partly: float) -> str:
    """HOLDS from `holds` on, PARTLY from `partly` on."""
    return HOLDS if share >= holds else PARTLY if share >= partly else FAILS


def recovered_of(row: dict) -> float | None:
    """Share of the robust model's gain in RA that the patch of a row recovers, in percent."""
    return recovered(*(row[kind]["RA"] for kind in ("standard", "patched", "robust")))


# ---- rules -------------------------------------------------------------------------------------


def judge_main(result: dict) -> Verdict:
    """Patches recover ≥ 80 % of the gain (partly: ≥ 50 %) and TA falls by 5 points at most.

    Of the seeds that have every corruption.
    """
    patched = "RWS, float32"
    count = Counter(row["seed"] for row in result["rows"] if row["model"] == patched)
    of: dict[str, dict[tuple, dict]] = {}
    for row in result["rows"]:
        if count[row["seed"]] == max(count.values()):
            of.setdefault(row["model"], {})[row["corruption"], row["seed"]] = row
    standard, robust, patch = (of[k] for k in ("standard", "robust models", patched))

    def shares_of(model: dict[tuple, dict]) -> list[float]:
        every = [recovered(*(m[p]["RA"] for m in (standard, model, robust))) for p in model]
        return [share for share in every if share is not None]

    shares = shares_of(patch)
    if not shares:
        return NO_GAIN
    share = mean(shares)
    fall = mean(standard[p]["TA"] - patch[p]["TA"] for p in patch)
    smaller = mean(robust[p]["bytes"] / patch[p]["bytes"] for p in patch)
    verdict = graded(share, 80, 50)
    verdict = PARTLY if verdict == HOLDS and fall > 5 else verdict
    words = (
        f"patches recover {share:.0f} % of the robust models' gain in RA on average "
        f"({min(shares):.0f} to {max(shares):.0f} %), at 1/{smaller:.0f} of their size in float32; "
        f"TA falls by {fall:.1f} points (robust models: "
        f"{mean(standard[p]['TA'] - robust[p]['TA'] for p in patch):.1f})"
    )
    if BATCHNORM_ONLY in of:
        words += (
            "; re-estimating batch norm, which is part of patching, gets "
            f"{mean(shares_of(of[BATCHNORM_ONLY])):.0f} % of the gain with no signature at all"
        )
    union = of.get("data augmentation")
    if union:
        for name, rows in (("data augmentation", union), ("patches", {p: patch[p] for p in union})):
            ta, ra = (mean(row[measure] for row in rows.values()) for measure in ("TA", "RA"))
            words += f"; {name}: RA {ra:.1f}, TA {ta:.1f}"
    return verdict, words


def judge_layers(result: dict) -> Verdict:
    """For ≥ 80 % of corruptions the shallow third differs more than the deep one (partly: 50 %).

    Where another clean seed was trained, by a larger factor than it does.
    """
    depth = max(row["layer"] for row in result["rows"])
    third = max(1, depth // 3)
    control = "another seed, clean"
    names = {row["corruption"] for row in result["rows"]} - {control}

    def part(name: str, lowest: int, highest: int) -> float:
        return mean(
            row["difference"]
            for row in result["rows"]
            if row["corruption"] == name and lowest <= row["layer"] <= highest
        )

    ratios = {c: part(c, 1, third) / part(c, depth - third + 1, depth) for c in names}
    own = 1.0
    words = (
        f"the shallowest {third} of {depth} layers differ {statistics.median(ratios.values()):.1f} "
        f"times as much, relatively, as the deepest {third} (median over {len(names)} corruptions)"
    )
    if any(row["corruption"] == control for row in result["rows"]):
        own = part(control, 1, third) / part(control, depth - third + 1, depth)
        over = [
            str(i)
            for i in range(1, depth + 1)
            if all(part(c, i, i) > part(control, i, i) for c in names)
        ]
        words += f", two clean seeds {own:.1f} times; "
        words += (
            f"every corruption differs more than two clean seeds do only in layer {', '.join(over)}"
            if over
            else "no layer differs more for every corruption"
        )
    else:
        words += "; no second clean seed to compare with"
    above = sum(ratio > own for ratio in ratios.values())
    words += f"; the factor is above {own:.1f} for {above} of {len(names)}"
    return graded(100 * above / len(names), 80, 50), words


def judge_similarity(result: dict) -> Verdict:
    """Cosines are higher within a family, and the nearest mean signature names ≥ 90 % right."""
    inside, across = [], []
    for row in result["rows"]:
        a, b = row["families"].split(", ")
        (inside if a == b else across).append(row["cosine"])
    named = result.get("named") or []
    right = sum(row["corruption"] == row["named"] for row in named)
    words = f"mean cosine {mean(across):.2f} between families" if across else ""
    if inside and across:
        words = f"mean cosine {mean(inside):.2f} within families, {mean(across):.2f} between them"
    if named:
        which = ", ".join(dict.fromkeys(row["corruption"] for row in named))
        words += (
            f"; the nearest mean signature of other seeds names {right} of {len(named)} ({which})"
        )
    closer = bool(inside and across) and mean(inside) > mean(across)
    if not named and not (inside and across):
        return UNTOLD, f"{words}; no two corruptions of one family, and one seed"
    if not named:
        return PARTLY if closer else FAILS, f"{words}; one seed, so nothing to name"
    if closer or not inside:
        return graded(100 * right / len(named), 90, 50), words
    return PARTLY if right == len(named) else FAILS, words


def judge_consistency(result: dict) -> Verdict:
    """Of all signatures of the other data set, that of the same corruption is the nearest."""
    nearest, same, other = [], [], []
    for b in dict.fromkeys(row["b"] for row in result["rows"]):
        of = {row["a"]: row["cosine"] for row in result["rows"] if row["b"] == b}
        if b in of:
            nearest.append(max(of, key=of.get) == b)
            same.append(of.pop(b))
            other += of.values()
    words = (
        f"mean cosine {mean(same):.2f} for the same corruption, {mean(other):.2f} for others; the "
        f"same one is the nearest for {sum(nearest)} of {len(nearest)}"
    )
    share = 100 * sum(nearest) / len(nearest)
    return graded(share, 100, 50) if mean(same) > mean(other) else FAILS, words


def judge_keep_num(result: dict) -> Verdict:
    """Half of the layers or fewer recover ≥ 50 %, within 5 points of the best number of layers."""
    of_k: dict[int, list[float]] = {}
    for row in result["rows"]:
        if (share := recovered_of(row)) is not None:
            of_k.setdefault(row["keep_num"], []).append(share)
    shares = {k: mean(values) for k, values in sorted(of_k.items())}
    if not shares:
        return NO_GAIN
    none = shares.pop(0, None)  # batch norm re-estimated, no layer
    best = max(shares.values())
    enough = min(k for k, share in shares.items() if share >= best - 5)
    words = (
        f"{enough} of {max(shares)} layers recover {shares[enough]:.0f} % of the gain in RA, the "
        f"best number of layers {best:.0f} %"
    )
    words += "" if none is None else f", re-estimating batch norm alone {none:.0f} %"
    if best < 50:
        return FAILS, words
    return (HOLDS if enough <= max(shares) / 2 else PARTLY), words


def judge_quantization(result: dict) -> Verdict:
    """At most 1 point of RA below the float32 signature at 1/13 of a full copy or less."""
    forms: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        if row["keep_num"] == result["keep_num"]:
            forms.setdefault(row["bits"], []).append(row)
    ra = {bits: mean(row["patched"]["RA"] for row in rows) for bits, rows in forms.items()}
    fit = [bits for bits in ra if bits < 32 and ra[bits] >= ra[32] - 1]
    if not fit:
        return FAILS, f"every quantized form loses more than 1 point of RA below {ra[32]:.1f}"
    smallest = min(fit)
    ratio = result["full_copy"] / mean(row["bytes"] for row in forms[smallest])
    words = (
        f"{result['keep_num']} layers at {smallest} bits a value take 1/{ratio:.0f} of a full "
        f"copy, RA {ra[smallest]:.1f} against {ra[32]:.1f} in float32"
    )
    return (HOLDS if ratio >= 13 else PARTLY), words


def judge_alpha(result: dict) -> Verdict:
    """Taking off restores every bit, and RA rises with α from 0 to 1 (a point of slack)."""
    rising, total = 0, 0
    for name in dict.fromkeys(row["corruption"] for row in result["rows"]):
        of_name = [row for row in result["rows"] if row["corruption"] == name]
        points = sorted({row["alpha"] for row in of_name if row["alpha"] <= 1})
        if len(points) < 2:
            return UNTOLD, "no two α from 0 to 1 were measured"
        ras = [mean(r["patched"]["RA"] for r in of_name if r["alpha"] == a) for a in points]
        rising += all(b >= a - 1 for a, b in itertools.pairwise(ras)) and ras[-1] > ras[0]
        total += 1
    back = "restores every bit" if result["restored"] else "does NOT restore the model"
    span = f"from {points[0]:g} to {points[-1]:g}"
    words = f"taking a patch off {back}; RA rises with α {span} for {rising} of {total}"
    verdict = graded(100 * rising / total, 80, 50) if result["restored"] else FAILS
    return verdict, words


def judge_compose(result: dict) -> Verdict:
    """Composed patches get ≥ 80 % (partly: ≥ 40 %) of the gain of a model trained on all."""
    shares, words = [], []
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        of = {row["model"]: row for row in result["rows"] if row["group"] == group}
        standard, trained = (of[k]["RA mean"] for k in ("standard", "trained on all of them"))
        best = max((k for k in of if k.startswith("composed")), key=lambda k: of[k]["RA mean"])
        share = recovered(standard, of[best]["RA mean"], trained)
        shares += [] if share is None else [share]
        words.append(
            f"{of[best]['n']} signatures: RA {standard:.1f} → {of[best]['RA mean']:.1f} ({best}; "
            f"TA {of['standard']['TA']:.1f} → {of[best]['TA']:.1f}), a model trained on all of "
            f"them {trained:.1f}"
        )
    return graded(min(shares), 80, 40) if shares else FAILS, "; ".join(words)


def judge_transfer(result: dict) -> Verdict:
    """A carried signature gets ≥ 50 % (partly: ≥ 20 %) of the gain on its new backbones.

    Partly where no second data set was measured.
    """
    of: dict[str, dict[str, list[float]]] = {}
    for row in result["rows"]:
        of.setdefault(row["case"], {}).setdefault(row["model"], []).append(row["RA"])
    ra = {case: {m: mean(v) for m, v in models.items()} for case, models in of.items()}
    shares, words = [], []
    for case, models in ra.items():
        if "patched, other's signature" in models:
            moved = models["patched, other's signature"]
            shares.append(recovered(models["standard"], moved, models["robust"]) or 0)
            words.append(
                f"{case}: RA {models['standard']:.1f} → {moved:.1f} (its own signature "
                f"{models['patched, own signature']:.1f}, robust {models['robust']:.1f})"
            )
    later, original = ra["updated backbone"], ra["original backbone"]
    moved = later["patched, old signature"]
    shares.append(recovered(later["standard"], moved, original["robust"]) or 0)
    words.append(
        f"updated backbone: RA {later['standard']:.1f} → {moved:.1f} (original: "
        f"{original['standard']:.1f} → {original['patched']:.1f})"
    )
    if BATCHNORM_ONLY in later:
        words.append(f"re-estimating its batch norm alone: {later[BATCHNORM_ONLY]:.1f}")
    verdict = graded(min(shares), 50, 20)
    if len(ra) == 2:
        words.append("another data set: not measured")
        verdict = PARTLY if verdict == HOLDS else verdict
    return verdict, "; ".join(words)


@dataclass(frozen=True)
class Claim:
    """One claim: what the paper says, which experiment measures it, and the rule."""

    says: str
    experiment: str
    judge: Callable[[dict], Verdict]


CLAIMS = {
    "Main result": Claim(
        "Patching a standard model with a signature makes it nearly as robust as the robust model, "
        "for a fraction of the storage, and keeps clean accuracy.",
        "main",
        judge_main,
    ),
    "1. Shallow layers": Claim(
        "Robust and standard weights differ mostly in the shallow layers.", "layers", judge_layers
    ),
    "2. Signatures tell corruptions apart": Claim(
        "Signatures of similar corruptions are similar, of different ones different.",
        "similarity",
        judge_similarity,
    ),
    "3. Agreement across data sets": Claim(
        "For one corruption, signatures of different data sets agree.",
        "consistency",
        judge_consistency,
    ),
    "4a. Light: few layers": Claim(
        "The shallow layers of a signature are enough.", "keep-num", judge_keep_num
    ),
    "4b. Light: few bits": Claim(
        "A signature is up to 13 times smaller than a full copy of the weights, with little loss.",
        "quantization",
        judge_quantization,
    ),
    "5. Adjustable in place": Claim(
        "A patch can be put on, scaled by α, and taken off, back to the intact model.",
        "alpha",
        judge_alpha,
    ),
    "6. Composable": Claim("Several signatures work at once.", "compose", judge_compose),
    "7. Transferable": Claim(
        "A signature works on a standard model of another data set and on an updated backbone.",
        "transfer",
        judge_transfer,
    ),
}


# ---- report ------------------------------------------------------------------------------------


def read_results(root: Path) -> dict[str, list[tuple[Path, dict]]]:
    """Every results.json of reproduce.py under `root`, by experiment: (its folder, its content)."""
    found: dict[str, list[tuple[Path, dict]]] = {}
    for path in sorted(root.rglob("results.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}; delete it, or measure again") from error
        if isinstance(content, dict) and "experiment" in content and "rows" in content:
            found.setdefault(content["experiment"], []).append((path.parent, content))
    return found


def is_ablation(result: dict) -> bool:
    """Whether it is of something else than the method as it is, which the claims are about."""
    settings = result.get("arguments", {})
    return not settings.get("projection", True) or settings.get("layers") != "shallowest"


def measured(root: Path, folder: Path, result: dict, title: str, words: str) -> list[str]:
    """What one experiment measured, as the report tells it."""
    place = folder.relative_to(root).as_posix()
    lines = [f"- {title}\n", f"  {words[0].upper()}{words[1:]}. [Table]({place}/table.md).\n"]
    picture = next(iter(sorted(folder.glob("*.png"))), None)
    if picture:
        lines.append(f"  ![{result['experiment']}: {place}]({place}/{picture.name})\n")
    lines.append(f"      python {result['command']}\n")
    return [*lines, f"  {result['device']}, torch {result['torch']}.\n"]


def report(root: Path) -> None:
    """Write `root`/README.md: claim by claim, what was measured there and the verdict.

    Raises InputError when nothing was measured, or a file can't be read.
    """
    found = read_results(root)
    if not any(claim.experiment in found for claim in CLAIMS.values()):
        raise InputError(f"--out {root}: no results of reproduce.py there yet")
    summary, sections, ablations = [], [], []
    for title, claim in CLAIMS.items():
        verdicts, lines = [], []
        for folder, result in found.get(claim.experiment, []):
            verdict, words = claim.judge(result)
            if is_ablation(result):
                ablations += measured(root, folder, result, f"{title}: {result['caption']}", words)
                continue
            verdicts += [] if verdict == UNTOLD else [verdict]
            lines += measured(root, folder, result, f"**{verdict}** on {result['caption']}", words)
        overall = UNTOLD if lines else "not measured"
        if verdicts:
            overall = verdicts[0] if len(set(verdicts)) == 1 else PARTLY
        summary.append([title, f"`reproduce.py {claim.experiment}`", overall])
        rule = claim.judge.__doc__.splitlines()[0]
        sections += [f"## {title}: {overall}\n", f"The paper: {claim.says}\n"]
        sections += [f"Rule: {rule}\n", *lines]
    if ablations:
        sections += ["## Ablations\n", *ablations]
    text = [
        "# Results, claim by claim\n",
        "Written by `python reproduce.py report` from the results.json files below this folder. "
        "TA: accuracy on clean test images, RA: on corrupted ones, both in %. Models are chosen on "
        "validation images; ± is the standard deviation over seeds.\n",
        markdown_table(["claim", "command", "verdict"], summary) + "\n",
        *sections,
    ]
    write_text(root / "README.md", "\n".join(text))
    print(f"\n{text[2]}\n{root / 'README.md'}")
