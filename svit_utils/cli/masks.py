"""`python -m svit_utils explain --masks`: maps of photographs scored against the masks of their objects."""

import argparse
from pathlib import Path
from typing import Any

CHUNK = 16  # pictures in memory at a time
SHOWN = 8  # in the overview
SCORES = ("average_precision", "pointing_game", "energy_in_mask", "iou_at_mask_area")
BASELINES = ("centre", "edges", "random")


def score_masks(options: argparse.Namespace, model: Any, prepare: Any) -> tuple[dict[str, Any], list[str]]:
    """Write maps, scores and an overview of the pictures in the file ``--masks``; (maps by method, lines to print).

    Of ``--images``, else of all pictures listed, those with an object left after the model's crop are scored: against
    the largest object, and against all objects (crowd regions among them). Beside ``--out`` lie ``<out>_scores.csv``,
    a row for each picture, map and mask, and the overview.
    """
    import torch
    from tqdm.auto import tqdm

    from svit_utils.data import coco
    from svit_utils.files import write_rows
    from svit_utils.show import explanation_grid, export_maps, figure_png

    data = coco(options.masks, options.images[0].parent if options.images else None, prepare=prepare)
    places = data.find(options.images) if options.images else list(range(len(data)))
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[Any]] = {method: [] for method in options.methods}
    shown: list[Any] = []
    names: list[str] = []
    for start in tqdm(range(0, len(places), CHUNK), disable=None, desc="explain", leave=False):
        found = [(data.files[place].name, data[place]) for place in places[start : start + CHUNK]]
        found = [(name, picture) for name, picture in found if len(picture.masks)]
        if not found:
            continue
        maps, more = _scored(options, model, found)
        rows += more
        names += [name for name, _ in found]
        for method in options.methods:
            kept[method].append(maps[method])
        shown += found[: SHOWN - len(shown)]
    if not rows:
        raise ValueError(f"no picture has an object: nothing to score among {len(places)} pictures of {options.masks}")
    joined = {method: torch.cat(parts) for method, parts in kept.items()}
    export_maps(options.out, joined, None, {"images": names, "masks": Path(options.masks).name})
    table = options.out.with_name(options.out.stem + "_scores.csv")
    write_rows(table, rows[0], rows)
    overview = options.out.with_name(options.out.stem + "_overview.png")
    pictures = data.denormalise(torch.stack([picture.image for _, picture in shown]))
    grid = {m: (v.mean(dim=1) if v.ndim == 4 else v)[: len(shown)] for m, v in joined.items()}
    largest = torch.stack([picture.largest() for _, picture in shown])
    figure = explanation_grid(pictures, grid, labels=[name[:16] for name, _ in shown], masks=largest)
    overview.write_bytes(figure_png(figure))
    left_out = len(places) - len(names)
    head = [f"{len(names)} pictures scored" + (f", {left_out} without an object left out" if left_out else "")]
    return joined, [*head, *_lines(rows), f"scores: {table}", f"overview: {overview}"]


def _scored(options: argparse.Namespace, model: Any, found: list[Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(maps by method, rows) of some (name, picture)."""
    import torch

    from svit_utils.explain import explain
    from svit_utils.referee import centre_maps, edge_maps, localisation_scores, random_maps

    images = torch.stack([picture.image for _, picture in found])
    targets = None if options.target is None else [options.target] * len(images)
    maps = {method: explain(model, images, method, targets) for method in options.methods}
    flat = {method: each.mean(dim=1) if each.ndim == 4 else each for method, each in maps.items()}
    size = next(iter(flat.values())).shape[-2:]
    noise = torch.cat([random_maps(1, size, seed=picture.number) for _, picture in found])
    flat |= {"centre": centre_maps(len(images), size), "edges": edge_maps(images, size), "random": noise}
    masks = {"largest": torch.stack([picture.largest() for _, picture in found])}
    masks["all"] = torch.stack([picture.everything() for _, picture in found])
    rows = []
    for method, each in flat.items():
        for what, mask in masks.items():
            scores = localisation_scores(each, mask)
            for place, (name, _) in enumerate(found):
                values = {score: f"{float(scores[score][place]):.4f}" for score in SCORES}
                rows.append({"picture": name, "map": method, "mask": what, **values})
    return maps, rows


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """Mean average precision of each map, and its difference from the centre baseline with an interval."""
    import numpy as np

    from svit_utils.referee import paired_bootstrap

    lines = []
    for what in ("largest", "all"):
        lines.append(f"average precision, {'largest object' if what == 'largest' else 'all objects'}:")
        found = {
            name: np.array([float(r["average_precision"]) for r in rows if (r["map"], r["mask"]) == (name, what)])
            for name in dict.fromkeys(row["map"] for row in rows)
        }
        for name, values in found.items():
            against = ""
            if name not in BASELINES and len(values) > 1:
                interval = paired_bootstrap(values, found["centre"])
                against = f"   minus centre {interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
            lines.append(f"  {name:<16}{values.mean():.3f}{against}")
    return lines
