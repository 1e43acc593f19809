"""The log of the authors' program: TA and RA of standard and patched models, over several runs.

{"std"|"patched": {"clean": [TA of each run], "robust": {corruption: latest RA}}}

"std" also has "severity", {corruption: of the images of its RA}, which theirs and older ones lack.
"""

from argparse import Namespace
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from statistics import fmean

from utils import checkpoint
from utils.errors import InputError
from utils.files import hold

KINDS = ("std", "patched")


def read(path: Path, flag: str = "--save_log") -> dict:
    """The log at `path`, empty where there is none; InputError for anything else in the file."""
    if not path.exists():
        return {kind: {"clean": [], "robust": {}} for kind in KINDS}
    log = checkpoint.read(path, "log")
    if not all(_is_entry(log.get(kind)) for kind in KINDS):
        raise InputError(f"{flag} {path}: holds something else than a log of this script")
    return log


def _is_entry(entry: object) -> bool:
    match entry:
        case {"clean": list(clean), "robust": dict(robust)}:
            known = isinstance(entry.get("severity", {}), dict)
            return known and all(isinstance(a, Real) for a in (*clean, *robust.values()))
    return False


def checked(args: Namespace, severities: Mapping[str, int]) -> dict[str, float]:
    """The RA of the baseline in --baseline_log, by corruption; empty where none is named.

    Raises InputError where it, or --save_log, has one of `severities` measured at another severity.
    """
    paths = {f: path for f in ("save_log", "baseline_log") if (path := getattr(args, f))}
    standard = {flag: read(Path(path), f"--{flag}")["std"] for flag, path in paths.items()}
    for flag, entry in standard.items():
        for name, known in entry.get("severity", {}).items():
            if severities.get(name, known) != known:
                said = f"holds {name} at severity {known}, here it is {severities[name]}"
                raise InputError(f"--{flag} {paths[flag]}: {said}; name another file")
    return standard["baseline_log"]["robust"] if args.baseline_log else {}


def update(path: Path, standard: dict, patched: dict, severities: Mapping[str, int]) -> None:
    """Add a run, {"TA": …, "RA": {…}} of each model, and print the averages over the runs.

    Processes that add to one log at the same time take turns.
    """
    with hold(path.with_name(f".{path.name}.lock")):
        log = read(path)
        log["std"].setdefault("severity", {}).update(severities)
        for kind, row in zip(KINDS, (standard, patched), strict=True):
            log[kind]["clean"].append(row["TA"])
            log[kind]["robust"].update(row["RA"])
        checkpoint.save(log, path)
    print(f"\n{path}: averages over {len(log['std']['clean'])} runs")
    for kind in KINDS:
        clean, robust = log[kind]["clean"], log[kind]["robust"]
        told = f"RA {fmean(robust.values()):.2f} over {len(robust)} corruptions"
        print(f"  {kind:<8} TA {fmean(clean):.2f}  {told}")
