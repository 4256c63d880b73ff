"""``python -m benchmarks.gpu``: the parts in turn, each within its budget; ``python -m benchmarks.gpu pack`` packs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

PARTS = ("prove", "measure", "train")


def parser() -> argparse.ArgumentParser:
    """The command line. Without options, ``PARTS``, ``DEVICE``, ``MINUTES`` and ``BATCH`` of the environment count."""
    environment = os.environ.get
    whole = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prove, measure and train on a GPU.")
    whole.add_argument("command", nargs="?", choices=("run", "pack"), default="run")
    whole.add_argument("--parts", default=environment("PARTS") or ",".join(PARTS), help="of prove,measure,train")
    whole.add_argument("--device", choices=("cuda", "cpu"), default=environment("DEVICE") or "cuda")
    whole.add_argument("--minutes", type=float, default=float(environment("MINUTES") or 5), help="for the part train")
    whole.add_argument("--prove-seconds", type=float, default=120.0)
    whole.add_argument("--measure-seconds", type=float, default=240.0)
    whole.add_argument("--train-images", type=int, help="training pictures of CIFAR-10 at most")
    whole.add_argument("--keep-going", action="store_true", help="measure and train even where a proof failed")
    whole.add_argument("--processes", type=int, help="that compile and compute references (default: the cores but two)")
    whole.add_argument("--out", type=Path, help="folder of the CSV files (default: results/gpu, or build/gpu-cpu)")
    whole.add_argument("--mib", type=float, default=64.0, help="pack: the most that one delivery may be")
    whole.add_argument("--margin", type=float, default=1.5, help="pack: MiB of it to leave free")
    whole.add_argument("--weights", choices=("float32", "float16"), default="float32", help="pack: of DeiT-Tiny")
    return whole


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a proof failed; 2 for a device or a part that is not there."""
    options = parser().parse_args(argv)
    wanted = [part.strip() for part in options.parts.split(",") if part.strip()]
    if unknown := set(wanted) - set(PARTS):
        print(f"error: unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from benchmarks.gpu import plan as plans

    if options.command == "pack":
        return _pack(options, plans.default_packs())
    return _run(options, wanted)


def _pack(options: argparse.Namespace, folders: tuple[Path, ...]) -> int:
    from benchmarks.gpu import pack

    try:
        pack.run(folders, options.mib, options.margin, options.weights)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(pack.printed(folders))
    return 0


def _run(options: argparse.Namespace, wanted: list[str]) -> int:
    import torch

    from benchmarks.gpu import measure, prove, train
    from benchmarks.gpu.plan import Plan, default_out, default_packs

    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no GPU here; DEVICE=cpu rehearses at small size", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    plan = Plan(
        device=options.device,
        out=options.out or default_out(options.device),
        packs=default_packs(),
        prove_seconds=options.prove_seconds,
        measure_seconds=options.measure_seconds,
        train_seconds=60 * options.minutes,
        processes=options.processes or (max(1, cores - 2) if options.device == "cuda" else 1),
        train_images=options.train_images,
    )
    failed = False
    for part in PARTS:
        if part not in wanted:
            continue
        print(f"== {part}", flush=True)
        if part == "prove":
            failed = not prove.run(plan)
            if failed and not options.keep_going:
                print("not proved: the rest is not run (--keep-going runs it all the same)")
                break
        else:
            (measure if part == "measure" else train).run(plan)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
