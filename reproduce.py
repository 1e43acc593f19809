"""The paper, one command per table or figure.

    python reproduce.py demo        the main job on the embedded data set, minutes on a CPU
    python reproduce.py main --dataset cifar10 --data data/cifar10 --arch vgg16 \\
        --pretrained vgg16.pth --preset paper
    python reproduce.py all --preset smoke --dataset synthetic        everything, in miniature

Each experiment is a file in experiments/. Models go to --runs, by what determines them, and are
reused, as is every accuracy once measured; a killed run goes on where it was. Results (table.md,
table.csv, results.json, a figure) go to --out. --list prints the commands that train what is
missing, one line each, for a cluster's queue.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import EXPERIMENTS, plots, report, settings
from experiments.study import Study
from utils import arguments
from utils.errors import InputError, script_errors
from utils.files import check_writable


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["demo"]:
        argv = [*settings.DEMO, *argv[1:]]
    parser = arguments.Parser(__doc__)
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, module in EXPERIMENTS.items():
        settings.add_flags(commands.add_parser(name, help=module.CLAIM, description=module.__doc__))
    settings.add_flags(commands.add_parser("all", help="these, in this order, and the report"))
    settings.add_flags(commands.add_parser("pretrain", help="only θ_pre (--pretrain_classes)"))
    commands.add_parser("demo", help="main in miniature, on the embedded data set")
    gather = commands.add_parser("report", help="what the results under --out say of each claim")
    arguments.add(gather, "out", default="results")
    if argv and not argv[0].startswith("-"):
        argv[0] = argv[0].replace("-", "_")
    args = parser.parse_args(argv)
    if args.experiment != "report":
        args.command_line = argv
        settings.resolve(args)
        settings.check(args)
    return args


def run(name: str, study: Study, out: Path) -> None:
    """Measure one experiment; write its table, every row, all about them, and its figure."""
    module, args, start = EXPERIMENTS[name], study.args, time.perf_counter()
    rows = list(module.measure(study))
    table = module.table(rows, study)
    study.write(name, rows, table, out, time.perf_counter() - start)
    module.figure(rows, out / f"{name}.png")
    if args.preset == "demo":
        strips = {c: images.images[:12] for c, images in study.patching().sets.items()}
        plots.samples(strips, out / "samples.png")


def default_out(study: Study, name: str) -> Path:
    """A folder that git ignores, named by all that determines the result."""
    apart = ("out", "runs", "force", "device", "devices", "list", "title", "command_line")
    told = {key: str(value) for key, value in vars(study.args).items() if key not in apart}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return Path(study.args.runs) / "results" / f"{study.name}_{name}_{digest}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        if args.experiment == "report":
            report.write(Path(args.out))
            return
        study = Study(args)
        if args.experiment == "pretrain":
            if not args.pretrains:
                raise InputError("nothing to pretrain: name --pretrain_classes")
            study.train([])
            print(args.pretrained)
            return
        names = [args.experiment] if args.experiment != "all" else list(EXPERIMENTS)
        if args.experiment == "all" and study.target is None:
            print("consistency: left out, it needs a --target_dataset")
            names.remove("consistency")
        if args.experiment == "all" and not args.groups:
            print("compose: left out, it needs at least two --corruptions")
            names.remove("compose")
        jobs = study.jobs(EXPERIMENTS[name] for name in names)
        if args.list:
            study.list_commands(jobs)
            return
        out = Path(args.out) if args.out else default_out(study, args.experiment)
        check_writable(out)
        study.check_data()  # before hours of work
        study.train(jobs)
        for name in names:
            run(name, study, out / name if args.experiment == "all" else out)
        if args.experiment == "all":
            report.write(out)


if __name__ == "__main__":
    main()
