"""results/README.md: what was measured of each claim, and the verdict by the experiment's rule.

    python reproduce.py report --out results

A rule is the same for every study. Where several studies measured a claim it holds only if it does
in all of them that can tell.
"""

import json
from collections import defaultdict
from pathlib import Path

from datasets.corruptions import CORRUPTIONS
from experiments import EXPERIMENTS
from experiments.tables import PARTLY, UNTOLD
from utils.errors import InputError
from utils.files import write_text
from utils.report import markdown_table

INTRODUCTION = (
    "Written by `python reproduce.py report` from the results.json files below this folder. TA: "
    "accuracy on clean test images, RA: on corrupted ones, both in %. Models are chosen on "
    "validation images; ± is the standard deviation over seeds. The rules were fixed "
    "before results were seen, but those of layers, keep_num, quantization and transfer were "
    "revised after first measurements."
)


def read_results(root: Path) -> dict[str, list[tuple[Path, dict]]]:
    """Every results.json of an experiment under `root`: experiment → its folders and contents."""
    found = defaultdict(list)
    for path in sorted(root.rglob("results.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}; delete it, or measure again") from error
        if isinstance(content, dict) and isinstance(content.get("experiment"), str):
            if lacking := {"rows", "study", "note", "command", "device"} - content.keys():
                raise InputError(f"{path}: has no {min(lacking)}; delete it, or measure again")
            found[content["experiment"]].append((path.parent, content))
    return found


def write(root: Path) -> None:
    """Write `root`/README.md. Raises InputError when nothing was measured, or can't be read."""
    found = read_results(root)
    if not found.keys() & EXPERIMENTS.keys():
        raise InputError(f"--out {root}: no results of reproduce.py there yet")
    summary, sections, ablations = [], [], []
    studies, basis = defaultdict(dict), defaultdict(lambda: defaultdict(set))
    for name, module in EXPERIMENTS.items():
        verdicts, lines, doubted = [], [], False
        for folder, result in found.get(name, []):
            verdict, words = module.verdict(result["rows"])
            place = folder.relative_to(root).as_posix()
            title = result["study"].partition(";")[0]
            if not result["ablation"]:
                for row in result["rows"]:
                    basis[title][row["seed"]] |= {row.get("corruption")} & {*CORRUPTIONS}
            title += f", {result['ablation']}" if result["ablation"] else ""
            names = [row.get("corruption") for row in result["rows"]]
            if {*names} <= {*CORRUPTIONS} and len({*names}) < 3:
                title += f", {' and '.join(dict.fromkeys(names))} alone"
            told = f"**{verdict}**" if not result["ablation"] else f"`{name}`"
            words += f". **{result['caveat']}**" if "caveat" in result else "."
            text = [f"- {told} on {title}: {words} [Table]({place}/table.md).\n"]
            text += [f"  *{result['note']}*\n"] if result["note"] else []
            figures = sorted(path.name for path in folder.glob("*.png"))
            text += [f"  ![{name}: {place}]({place}/{figure})\n" for figure in figures]
            (ablations if result["ablation"] else lines).extend(text)
            doubted |= "caveat" in result and not result["ablation"]
            verdicts += [verdict] if verdict != UNTOLD and not result["ablation"] else []
            studies[result["study"], result["device"], result["torch"]][result["command"]] = None
        overall = UNTOLD if lines else "not measured"
        if verdicts:
            overall = verdicts[0] if len(set(verdicts)) == 1 else PARTLY
        summary.append([f"`{name}`", module.CLAIM, overall + " (see its caveat)" * doubted])
        sections += [f"## {name}: {overall}\n", f"Claim: {module.CLAIM}\n"]
        sections += [f"Rule: {module.RULE}\n", *lines]
    if ablations:
        sections += ["## Ablations\n", *ablations]
    sections.append("## How it was made\n")
    for (study, device, torch), commands in studies.items():
        sections.append(f"- {study}; {device}, torch {torch}.\n")
        sections += ["\n".join(f"      python {command}" for command in commands) + "\n"]
    table = markdown_table(["experiment", "claim", "verdict"], summary)
    rests_on = []
    for title, seeds in basis.items():
        each = [f"{len(names)} (seed {seed})" for seed, names in sorted(seeds.items())]
        rests_on.append(f"- {title}: {', '.join(each)} of 19 corruptions")
    top = ["# Results, claim by claim\n", f"{INTRODUCTION} The numbers rest on\n"]
    top += ["\n".join(rests_on) + "\n"]
    write_text(root / "README.md", "\n".join([*top, f"{table}\n", *sections]))
    print(f"\n{table}\n\n{root / 'README.md'}")
