"""The command line: ``python -m research experiment | study | plan | erratum | sinks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import svit_utils
from svit_utils.cli.options import add_threads_argument, set_threads

# The commands import what they need themselves: `--help` need not wait for torch.


def run_experiment(options: argparse.Namespace) -> None:
    """Run an experiment, or what is missing of it; without a name, list them."""
    from research import training
    from research.plans import EXPERIMENTS, get_experiment

    if options.name is None:
        if options.runs:
            raise ValueError("--runs needs the name of an experiment")
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name}: {experiment.title}\n    {' '.join(run.name for run in experiment.runs)}")
        return
    experiment = get_experiment(options.name)
    set_threads(options)
    print(training.run_experiment(experiment, only=options.runs))


def run_study(options: argparse.Namespace) -> None:
    """Train, score and compare what the PLAN.md of a study names, or what is missing of it."""
    from research.second import report as second_tables
    from research.second import run as second
    from research.study import run, studies, tables

    study = studies.get_study(options.profile)
    another = options.profile == "second"
    if options.tables:
        for path in (second_tables if another else tables).write_tables(study, options.out):
            print(path)
    elif options.out is not None:
        raise ValueError("--out goes with --tables only")
    elif another:
        if options.runs:
            raise ValueError("--runs does not go with --profile second")
        print(second.run_second(jobs=options.jobs, parts=options.parts))
    else:
        print(run.run_study(study, jobs=options.jobs, parts=options.parts, runs=options.runs))


def write_plan(options: argparse.Namespace) -> None:
    """Write results/planned.csv: every planned run, in order, for the chapters to read."""
    from pathlib import Path

    from research.plans import planned_rows
    from svit_utils.files import write_rows
    from svit_utils.paths import results_dir

    folder = results_dir() if options.out is None else Path(options.out)
    rows = planned_rows()
    print(write_rows(folder / "planned.csv", rows[0], rows))


def write_erratum(options: argparse.Namespace) -> None:
    """Write results/study/erratum*.csv: the shipped models' maps scored as the first study did, and by patch."""
    from pathlib import Path

    from research import erratum

    for path in erratum.write_erratum(None if options.out is None else Path(options.out), images=options.images):
        print(path)


def write_sinks(options: argparse.Namespace) -> None:
    """Write results/second/deit_sinks.csv: DeiT-Tiny's attention sinks on photographs, dense and cut."""
    from pathlib import Path

    from research.second import photographs

    print(photographs.write_sinks(options.images, None if options.out is None else Path(options.out)))


def run_photographs(options: argparse.Namespace) -> None:
    """Do, or complete, the study on photographs: results/photographs/, by its plan there."""
    from pathlib import Path

    from research.photographs import run

    set_threads(options)
    folder = None if options.out is None else Path(options.out)
    for path in run.write_parts(options.parts or list(run.PARTS), folder):
        print(path)


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(prog="python -m research", description="Make, or complete, what results/ holds.")
    whole.add_argument("--version", action="version", version=f"research, with svit_utils {svit_utils.__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, work: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=work.__doc__, description=work.__doc__)
        command.set_defaults(work=work)
        return command

    experiment = add("experiment", run_experiment)
    experiment.add_argument("name", nargs="?", help="the experiment; left out, the command lists them")
    experiment.add_argument("--runs", nargs="+", metavar="RUN", help="only these; all that are not recorded by default")
    add_threads_argument(experiment)

    study = add("study", run_study)
    study.add_argument(
        "--profile",
        default="full",
        help="full (results/study), second (results/second), deit (results/study_deit) or smoke (build/study-smoke)",
    )
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
    study.add_argument("--parts", nargs="+", metavar="PART", help="only these parts, such as train or localisation")
    study.add_argument("--runs", nargs="+", metavar="RUN", help="score only these runs, such as dense-rho0-seed0")
    study.add_argument("--tables", action="store_true", help="only write the tables, from the recorded scores")
    study.add_argument("--out", metavar="FOLDER", help="with --tables: where to (default: the study's folder)")

    plan = add("plan", write_plan)
    plan.add_argument("--out", metavar="FOLDER", help="where to (default: results/)")

    erratum = add("erratum", write_erratum)
    erratum.add_argument("--images", type=int, default=1000, metavar="N", help="test pictures (default: 1000)")
    erratum.add_argument("--out", metavar="FOLDER", help="where to (default: results/study)")

    sinks = add("sinks", write_sinks)
    sinks.add_argument("--images", type=int, default=200, metavar="N", help="photographs (default: 200)")
    sinks.add_argument("--out", metavar="FOLDER", help="where to (default: results/second)")

    photographs = add("photographs", run_photographs)
    help_parts = "thresholds, finetuned, maps, throughput or tables (default: all, in this order)"
    photographs.add_argument("--parts", nargs="+", metavar="PART", help=help_parts)
    photographs.add_argument("--out", metavar="FOLDER", help="where to (default: results/photographs)")
    add_threads_argument(photographs)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or after a line that says why: 2 where the input is at fault, 1 where training failed."""
    options = parser().parse_args(argv)
    from svit_utils.training import CheckpointError, NonFiniteLossError

    try:
        options.work(options)
        return 0
    except (ValueError, OSError, CheckpointError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLossError) else 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
