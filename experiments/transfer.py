"""Signatures on a standard model of another data set, and on an updated backbone (claim 7)."""

from collections.abc import Iterator
from pathlib import Path

from experiments import plots, tables
from experiments.tables import BATCHNORM_ONLY, HOLDS, PARTLY, PATCHED, ROBUST, STANDARD, graded
from utils.report import recovered

CLAIM = "A signature works on a standard model of another data set and on an updated backbone."
RULE = (
    "A carried signature gets ≥ 50 % (partly: ≥ 20 %) of the gain on its new backbones; partly "
    "where no second data set was measured."
)
ORIGINAL, UPDATED = "original backbone", "updated backbone"  # "case"; else "A → B"
OWN, CARRIED = "own", "carried"  # "signature" of a patch


def jobs(study) -> list:
    other = study.target
    return [study.update_job(), *(other.base_jobs() if other else [])]


def measure(study) -> Iterator[dict]:
    here = study.patching()
    cases = [(ORIGINAL, here, here.args.corruption)]
    cases.append((UPDATED, study.patching(target=study.update_job().best), here.args.corruption))
    if study.target:
        there = study.target.patching()
        both = [name for name in there.args.corruption if name in here.args.corruption]
        cases.append((f"{study.data_name} → {study.target.data_name}", there, both))
    for case, run, names in cases:
        for name in names:
            own, carried = run.signature(name), here.signature(name)
            for row in study.bounds(run, name):
                if row["model"] != ROBUST or case != UPDATED:
                    yield row | {"case": case}
            kinds = {UPDATED: {CARRIED: carried}, ORIGINAL: {OWN: own}}
            for kind, signature in kinds.get(case, {CARRIED: carried, OWN: own}).items():
                result = run.with_patch([signature], [1.0], [name])
                yield study.row(run, name, PATCHED, result, case=case, signature=kind)


def _label(row: dict) -> tuple[str, str]:
    kind = f", {row['signature']} signature" if "signature" in row else ""
    return row["case"], row["model"] + kind


def table(rows: list[dict], study) -> tables.Table:
    made = tables.accuracies(rows, ["case", "model"], _label, recovers=False)
    made.note = (
        f"keep_num {study.method.keep_num}, α 1. Means are over the corruptions in the line."
    )
    if study.target:
        made.note += f" {study.target.data_name}: {study.target.recipe}."
    return made


def figure(rows: list[dict], path: Path) -> None:
    plots.bars(rows, _label, "RA, mean over corruptions, %", path)


def verdict(rows: list[dict]) -> tables.Verdict:
    def ra(case: str, model: str, **knobs: str) -> float:
        return tables.mean(rows, "RA", case=case, model=model, **knobs)

    shares, words = [], []
    for case in tables.distinct(rows, "case"):
        if case in (ORIGINAL, UPDATED):
            continue
        standard, robust = ra(case, STANDARD), ra(case, ROBUST)
        moved, own = (ra(case, PATCHED, signature=kind) for kind in (CARRIED, OWN))
        shares.append(recovered(standard, moved, robust) or 0)
        words.append(
            f"{case}: RA {standard:.1f} → {moved:.1f} (its own signature {own:.1f}, "
            f"robust {robust:.1f})"
        )
    far = bool(words)
    standard, moved = ra(UPDATED, STANDARD), ra(UPDATED, PATCHED)
    shares.append(recovered(standard, moved, ra(ORIGINAL, ROBUST)) or 0)
    words.append(
        f"{UPDATED}: RA {standard:.1f} → {moved:.1f} (original: {ra(ORIGINAL, STANDARD):.1f} → "
        f"{ra(ORIGINAL, PATCHED):.1f})"
    )
    if tables.select(rows, case=UPDATED, model=BATCHNORM_ONLY):
        words.append(f"re-estimating its batch norm alone: {ra(UPDATED, BATCHNORM_ONLY):.1f}")
    grade = graded(min(shares), 50, 20)
    if not far:
        words.append("another data set: not measured")
        grade = PARTLY if grade == HOLDS else grade
    return grade, "; ".join(words)
