"""`python -m svit_utils train`: train or fine-tune a model, dense or with the cut, from a profile and options."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python -m svit_utils train                        fine-tune the shipped dense start with tau = 0.01, on a laptop
  python -m svit_utils train --dense                the same steps without the cut, to compare with
  python -m svit_utils train --tau-warmup 0         the whole tau from the first step
  python -m svit_utils train --profile gpu --out runs/vitb
A run that was stopped goes on when the same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command. Where the help names no default, the profile's value is used."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add_profile_arguments(parser)
    cut = parser.add_argument_group("the cut")
    add_threshold_arguments(cut)
    cut.add_argument(
        "--tau-warmup", type=int, metavar="STEPS", help="raise tau linearly from 0 over so many steps (0: not at all)"
    )
    cut.add_argument("--layers", type=int, nargs="+", metavar="BLOCK", help="cut only these blocks, counted from 0")
    cut.add_argument("--learnable", choices=("model", "layer", "head"), help="train tau as well: one per model, ...")
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument("--steps", type=int, help="optimiser steps; warm-ups keep their share of the run")
    recipe.add_argument("--batch-size", type=int, help="images per process and forward pass")
    recipe.add_argument("--grad-accumulation", type=int, help="forward passes per step")
    recipe.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    recipe.add_argument("--weight-decay", type=float, help="of AdamW, on matrices only")
    recipe.add_argument("--schedule", choices=("cosine", "onecycle", "constant"), help="of the learning rate")
    recipe.add_argument("--warmup", type=int, metavar="STEPS", help="linear warm-up of the learning rate")
    recipe.add_argument(
        "--layer-decay", type=float, help="factor on the learning rate from each layer to the one below"
    )
    recipe.add_argument("--label-smoothing", type=float, help="in [0, 1)")
    recipe.add_argument("--mixup", type=float, help="alpha of mixup (0: none)")
    recipe.add_argument("--ema", type=float, metavar="DECAY", help="keep an average of the weights, e.g. 0.999")
    recipe.add_argument("--clip-grad", type=float, help="largest gradient norm")
    recipe.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: autocast; the cut stays in float32")
    recipe.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    recipe.add_argument("--seed", type=int, help="of new weights, data order and augmentation")
    recipe.add_argument("--workers", type=int, help="processes that load images")
    run_ = parser.add_argument_group("the run")
    run_.add_argument(
        "--out", type=Path, default=Path("runs/latest"), help="folder for what the run leaves (default: %(default)s)"
    )
    run_.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="look at the validation images so often (0: at the end)"
    )
    run_.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="write a checkpoint so often")
    add_threads_argument(run_)
    run_.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the checkpoint in --out, if there is one; --no-resume starts again",
    )


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Which profile, data and model; shared with `evaluate`."""
    what = parser.add_argument_group("what")
    what.add_argument(
        "--profile",
        choices=("smoke", "cpu", "gpu", "paper"),
        help="data, model, start, recipe and budget (default: $SVIT_PROFILE, else gpu with CUDA and cpu without)",
    )
    what.add_argument(
        "--data",
        help="planted (generated pictures), cifar10, or a folder with train/, val/ (and test/) of class folders",
    )
    what.add_argument("--model", help="small_vit, or a timm name such as deit_tiny_patch16_224")
    what.add_argument("--img-size", type=int, metavar="PIXELS", help="side of the images")
    what.add_argument(
        "--weights", metavar="START", help="pretrained, scratch, a shipped checkpoint's name, or a .safetensors file"
    )


def add_threshold_arguments(group: Any) -> None:
    """Dense or cut, and how; shared with `evaluate`."""
    group.add_argument("--threshold", type=float, metavar="TAU", help="weights up to tau are cut, in [0, 1)")
    group.add_argument("--dense", action="store_true", help="do not cut at all")
    group.add_argument(
        "--empty-rows",
        choices=("zero", "dense", "top1", "cap"),
        help="what a query gets when no key survives: nothing, its uncut weights, its largest key, or a lower tau",
    )


def add_threads_argument(group: Any) -> None:
    """How many processor threads; shared with `evaluate`."""
    group.add_argument(
        "--threads", type=int, metavar="N", help="processor threads (default: all; with 1, runs repeat bit for bit)"
    )


def set_threads(options: argparse.Namespace) -> None:
    """Put ``--threads`` into force.

    Raises:
        ValueError: fewer than one.
    """
    if options.threads is None:
        return
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    import torch

    torch.set_num_threads(options.threads)


def chosen_profile(options: argparse.Namespace) -> Any:
    """The profile with the data, model and threshold options put in.

    Raises:
        ValueError: options that do not go together.
    """
    from dataclasses import replace

    from svit_utils.training import get_profile

    if options.dense and (options.threshold is not None or getattr(options, "learnable", None)):
        raise ValueError("--dense goes neither with --threshold nor with --learnable")
    changes = {
        "data": options.data,
        "model": options.model,
        "img_size": options.img_size,
        "start": options.weights,
        "threshold": options.threshold,
        "empty_rows": options.empty_rows,
    }
    return replace(get_profile(options.profile), **{k: v for k, v in changes.items() if v is not None})


def run(options: argparse.Namespace) -> int:
    """Train; 0, or 2 after a message where the input is at fault, or 1 where the run failed."""
    import logging

    from svit_utils.training import CheckpointError, NonFiniteLossError

    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return _run(options)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from svit_utils.models import save_weights
    from svit_utils.provenance import provenance
    from svit_utils.training import build_data, build_model, evaluate, train

    set_threads(options)
    profile = chosen_profile(options)
    if options.steps is not None:
        if options.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {options.steps}")
        profile = profile.with_steps(options.steps)
    changes = {
        "batch_size": options.batch_size,
        "grad_accumulation": options.grad_accumulation,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "schedule": options.schedule,
        "warmup_steps": options.warmup,
        "tau_warmup_steps": 0 if options.dense else options.tau_warmup,
        "layer_decay": options.layer_decay,
        "label_smoothing": options.label_smoothing,
        "mixup": options.mixup,
        "ema_decay": options.ema,
        "clip_grad": options.clip_grad,
        "precision": options.precision,
        "compile": options.compile or None,
        "seed": options.seed,
        "num_workers": options.workers,
        "eval_every": options.eval_every,
        "checkpoint_every": options.checkpoint_every,
    }
    config = replace(profile.config, **{k: v for k, v in changes.items() if v is not None})
    profile = replace(profile, config=config)
    print(profile if not options.dense else f"{profile} -- dense: nothing is cut")

    data = build_data(profile)
    classes = len(getattr(data.train, "classes", range(10)))
    model = build_model(
        profile, sparse=not options.dense, num_classes=classes, learnable=options.learnable, layers=options.layers
    )
    result = train(model, data.train, data.val, config, out_dir=options.out, resume=options.resume)
    judged = result.ema if result.ema is not None else model
    test = evaluate(judged, data.test, batch_size=config.batch_size, precision=config.precision)

    described = {k: v for k, v in asdict(profile).items() if k not in ("config", "summary", "name")}
    card = {
        "profile": profile.name,
        **described,
        "threshold": None if options.dense else profile.threshold,
        "layers": options.layers,
        "learnable": options.learnable,
        "num_classes": classes,
        **asdict(config),
        "val_accuracy": result.val_accuracy,
        "test_accuracy": test.accuracy,
        "test_images": test.n,
        **provenance(seed=config.seed),
    }
    save_weights(judged, options.out / "model.safetensors", {k: str(v) for k, v in card.items()})
    text = json.dumps(card | {"val_best": result.best_val_accuracy, "train_loss": result.final_loss}, indent=2)
    (options.out / "run.json").write_text(text + "\n", encoding="utf-8")
    print(f"validation {result.val_accuracy:.2%} (best {result.best_val_accuracy:.2%}), test {test.accuracy:.2%}")
    print(f"weights, curves and provenance are in {options.out}: model.safetensors, metrics.csv, run.json")
    return 0
