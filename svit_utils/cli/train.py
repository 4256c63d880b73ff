"""`python -m svit_utils train`: train or fine-tune a model, dense or with the cut, from a profile and options."""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from svit_utils.cli.options import (
    add_profile_arguments,
    add_threads_argument,
    add_threshold_arguments,
    chosen_profile,
    set_threads,
)

EXAMPLES = """examples:
  python -m svit_utils train                        fine-tune the shipped dense start with tau = 0.01, on a laptop
  python -m svit_utils train --dense                the same steps without the cut, to compare with
  python -m svit_utils train --tau-warmup 0         the full tau from the first step
  python -m svit_utils train --profile gpu --out runs/vitb
A run that was stopped goes on when the same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command. Where the help names no default, the profile's value is used."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add_profile_arguments(parser)
    cut = parser.add_argument_group("the cut")
    add_threshold_arguments(cut)
    cut.add_argument("--tau-warmup", type=int, metavar="STEPS", help="raise tau linearly from 0 over these steps")
    cut.add_argument("--layers", type=int, nargs="+", metavar="BLOCK", help="cut only these blocks, counted from 0")
    cut.add_argument(
        "--learnable", choices=("model", "layer", "head"), help="train tau too: one for all, or one for each"
    )
    # An option of the recipe is stored under the name of its field in TrainConfig.
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument("--steps", type=int, help="optimiser steps; warm-ups keep their share of the run")
    recipe.add_argument("--batch-size", type=int, help="images per process and forward pass")
    recipe.add_argument("--grad-accumulation", type=int, help="forward passes per step")
    recipe.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    recipe.add_argument("--weight-decay", type=float, help="weight decay of AdamW, on matrices only")
    recipe.add_argument("--schedule", choices=("cosine", "onecycle", "constant"), help="how the rate falls")
    recipe.add_argument("--warmup", dest="warmup_steps", type=int, metavar="STEPS", help="raise the rate linearly")
    recipe.add_argument("--layer-decay", type=float, help="factor on the learning rate from a layer to the one below")
    recipe.add_argument("--label-smoothing", type=float, help="in [0, 1)")
    recipe.add_argument("--mixup", type=float, help="alpha of mixup (0: none)")
    recipe.add_argument("--ema", dest="ema_decay", type=float, metavar="DECAY", help="average the weights, e.g. 0.999")
    recipe.add_argument("--clip-grad", type=float, help="largest gradient norm")
    recipe.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: autocast; the cut stays in float32")
    recipe.add_argument("--compile", action="store_const", const=True, help="run the model through torch.compile")
    recipe.add_argument("--seed", type=int, help="seed of new weights, data order and augmentation")
    recipe.add_argument("--workers", dest="num_workers", type=int, help="processes that load images")
    run_ = parser.add_argument_group("the run")
    out = Path("runs/latest")
    run_.add_argument("--out", type=Path, default=out, help="folder for what the run leaves (default: %(default)s)")
    run_.add_argument("--eval-every", type=int, metavar="STEPS", help="steps between validations (0: at the end)")
    run_.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="steps between checkpoints")
    add_threads_argument(run_)
    resume = "go on from the checkpoint in --out, if there is one; --no-resume starts again"
    run_.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help=resume)


def run(options: argparse.Namespace) -> int:
    """Train; 0, or 2 after a message where the input is at fault, or 1 where the run failed."""
    import logging

    from svit_utils.training import CheckpointError, NonFiniteLossError, Stopped
    from svit_utils.training.checkpoints import checkpoint_step

    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with ExitStack() as stack:
            return _run(options, stack)
    except (ValueError, OSError, CheckpointError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLossError) else 2
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        step = checkpoint_step(options.out)
        kept = "there is no checkpoint yet, so the same command starts again"
        if step is not None and options.resume:
            kept = f"{options.out} holds a checkpoint of step {step}, from which the same command goes on"
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, stack: ExitStack) -> int:
    from dataclasses import asdict, fields, replace

    from svit_utils.files import write_file
    from svit_utils.models import save_trained
    from svit_utils.provenance import provenance
    from svit_utils.training import build_data, build_model, evaluate, train
    from svit_utils.training.outputs import locked, writing
    from svit_utils.training.processes import by_main, end, start

    profile = chosen_profile(options)
    if options.steps is not None:
        if options.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {options.steps}")
        profile = profile.with_steps(options.steps)
    changes = {field.name: getattr(options, field.name, None) for field in fields(profile.config)}
    changes["tau_warmup_steps"] = 0 if options.dense else options.tau_warmup
    config = replace(profile.config, **{k: v for k, v in changes.items() if v is not None})
    profile = replace(profile, config=config)
    processes = start()
    stack.callback(end)
    set_threads(options)  # after Accelerate, which sets a number of its own for several processes on a CPU
    by_main(processes, lambda: stack.enter_context(locked(options.out)))  # until all is written
    if processes.is_main_process:
        print(profile if not options.dense else f"{profile} -- dense: nothing is cut")

    with processes.local_main_process_first():  # which downloads what is missing
        data = build_data(profile)
    classes = len(getattr(data.train, "classes", range(10)))
    model = build_model(
        profile, sparse=not options.dense, num_classes=classes, learnable=options.learnable, layers=options.layers
    )
    result = train(model, data.train, data.val, config, out_dir=options.out, resume=options.resume)
    judged = result.ema if result.ema is not None else model
    if not processes.is_main_process:
        return 0
    test = evaluate(judged, data.test, batch_size=config.batch_size, precision=config.precision)

    card = {
        "profile": profile.name,
        **{k: v for k, v in asdict(profile).items() if k not in ("config", "summary", "name")},
        **{name: None for name in ("threshold", "empty_rows") if options.dense or name not in profile.taken},
        "layers": options.layers,
        "learnable": options.learnable,
        "num_classes": classes,
        **asdict(config),
        "val_accuracy": result.val_accuracy,
        "test_accuracy": test.accuracy,
        "test_images": test.n,
        **provenance(seed=config.seed, processes=processes.num_processes),
    }
    with writing(options.out / "model.safetensors"):
        save_trained(judged, options.out / "model.safetensors", card | _about_images(data.train, profile))
    text = json.dumps(card | {"val_best": result.best_val_accuracy, "train_loss": result.final_loss}, indent=2)
    write_file(options.out / "run.json", text + "\n")
    print(f"validation {result.val_accuracy:.2%} (best {result.best_val_accuracy:.2%}), test {test.accuracy:.2%}")
    print(f"weights, curves and provenance are in {options.out}: model.safetensors, metrics.csv, run.json")
    return 0


def _about_images(dataset: Any, profile: Any) -> dict[str, Any]:
    """Class names, pixel statistics and crop of the images that the model was trained on, as timm names them."""
    import torch

    from svit_utils.data import preprocessing
    from svit_utils.models import pretrained_config

    photographs = profile.data not in ("planted", "cifar10")  # small pictures are resized whole
    prepare = preprocessing(pretrained_config(profile.model), img_size=profile.img_size)
    mean = dataset.denormalise(torch.zeros(3, 1, 1)).flatten()
    std = dataset.denormalise(torch.ones(3, 1, 1)).flatten() - mean
    return {
        "label_names": list(dataset.classes),
        "mean": [round(value, 6) for value in mean.tolist()],
        "std": [round(value, 6) for value in std.tolist()],
        "interpolation": prepare.interpolation if photographs else "bicubic",
        "crop_pct": prepare.crop_pct if photographs else 1.0,
        "crop_mode": prepare.crop_mode,
    }
