"""Answers to assignment e."""

from . import Planted, Unusual

PLANTED = [
    Planted(
        "no keepdim",
        "e1",
        "visible",
        "need keepdim=True, to line up with its rows",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        fused = weights.mean(dim=1)
        step = 0.5 * fused + 0.5 * torch.eye(fused.shape[-1])
        step = step / step.sum(dim=-1)
        product = step if product is None else step @ product
    return product[:, 0, prefix:]
""",
    ),
    Planted(
        "product in the wrong order",
        "e1",
        "visible",
        "later layers multiply from the left",
        """
def rollout(attentions, prefix):
    product = torch.eye(attentions[0].shape[-1])
    for weights in attentions:
        step = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1])
        product = product @ (step / step.sum(dim=-1, keepdim=True))
    return product[:, 0, prefix:]
""",
    ),
    Planted(
        "identity missing",
        "e1",
        "visible",
        "the identity is missing",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        step = weights.mean(dim=1)
        step = step / step.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        product = step if product is None else step @ product
    return product[:, 0, prefix:]
""",
    ),
    Planted(
        "prefix token left in the map",
        "e1",
        "visible",
        "a prefix token is left in the map",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        step = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1])
        step = step / step.sum(dim=-1, keepdim=True)
        product = step if product is None else step @ product
    return product[:, 0]
""",
    ),
    Planted(
        "one prefix token, always",
        "e1",
        "visible",
        "you leave out 1: use `prefix`",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        step = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1])
        step = step / step.sum(dim=-1, keepdim=True)
        product = step if product is None else step @ product
    return product[:, 0, 1:]
""",
    ),
    Planted(
        "first picture only",
        "e1",
        "visible",
        "one row for the whole batch",
        """
def rollout(attentions, prefix):
    product = torch.eye(attentions[0].shape[-1])
    for weights in attentions:
        step = 0.5 * weights[0].mean(dim=0) + 0.5 * torch.eye(weights.shape[-1])
        product = step / step.sum(dim=-1, keepdim=True) @ product
    return product[0, prefix:][None]
""",
    ),
    Planted(
        "no renormalisation",
        "e1",
        "visible",
        "rows do not sum to 1, because a query that the threshold emptied",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        step = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1])
        product = step if product is None else step @ product
    return product[:, 0, prefix:]
""",
    ),
    Planted(
        "columns normalised",
        "e1",
        "visible",
        "the columns sum to 1",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        step = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1])
        step = step / step.sum(dim=1, keepdim=True)
        product = step if product is None else step @ product
    return product[:, 0, prefix:]
""",
    ),
    Planted(
        "in-place change of the attention",
        "e1",
        "visible",
        r"changed its input attentions\[0\] in place",
        """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        weights += torch.eye(weights.shape[-1])
        step = weights.mean(dim=1)
        step /= step.sum(dim=-1, keepdim=True)
        product = step if product is None else step @ product
    return product[:, 0, prefix:]
""",
    ),
    Planted(
        "mean over the channels instead of the tokens",
        "e2",
        "visible",
        "averaged over the .channels., one weight per token",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=2, keepdim=True)
    return (alpha * features[:, prefix:]).sum(dim=-1).relu().unflatten(1, tuple(grid))
""",
    ),
    Planted(
        "ReLU missing",
        "e2",
        "visible",
        "the ReLU is missing",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=1, keepdim=True)
    return (alpha * features[:, prefix:]).sum(dim=-1).unflatten(1, tuple(grid))
""",
    ),
    Planted(
        "absolute value instead of ReLU",
        "e2",
        "visible",
        "absolute value takes the place of the ReLU",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=1, keepdim=True)
    return (alpha * features[:, prefix:]).sum(dim=-1).abs().unflatten(1, tuple(grid))
""",
    ),
    Planted(
        "prefix token in the channel weights",
        "e2",
        "visible",
        "prefix tokens' gradient is part of your channel weights",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient.mean(dim=1, keepdim=True)
    return (alpha * features[:, prefix:]).sum(dim=-1).relu().unflatten(1, tuple(grid))
""",
    ),
    Planted(
        "hard-coded 14 x 14",
        "e2",
        "visible",
        "of this shape .*written into the code",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=1, keepdim=True)
    return (alpha * features[:, prefix:]).sum(dim=-1).relu().reshape(-1, 14, 14)
""",
    ),
    Planted(
        "transposed grid",
        "e2",
        "visible",
        "the grid is transposed",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=1, keepdim=True)
    heat = (alpha * features[:, prefix:]).sum(dim=-1).relu()
    return heat.reshape(len(heat), grid[1], grid[0]).transpose(1, 2)
""",
    ),
    Planted(
        "weights of the whole batch",
        "e2",
        "visible",
        "averaged over the batch as well",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=(0, 1))
    return (features[:, prefix:] @ alpha).relu().unflatten(1, tuple(grid))
""",
    ),
    Planted(
        "scaled to a maximum of 1",
        "e2",
        "visible",
        "divided by the map's maximum",
        """
def token_grad_cam(features, gradient, grid, prefix):
    alpha = gradient[:, prefix:].mean(dim=1, keepdim=True)
    heat = (alpha * features[:, prefix:]).sum(dim=-1).relu().unflatten(1, tuple(grid))
    return heat / heat.amax(dim=(1, 2), keepdim=True)
""",
    ),
    Planted(
        "tapped after the last attention",
        "e2",
        "visible",
        "gradient on every patch token is exactly zero",
        """
def tap(model, x, targets):
    kept = []
    handle = model.blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out))
    scores = model(x).gather(1, targets[:, None]).sum()
    handle.remove()
    return kept[0], torch.autograd.grad(scores, kept[0])[0]
""",
    ),
    Planted(
        "gradient of the predicted class",
        "e2",
        "visible",
        "that of the predicted class",
        """
def tap(model, x, targets):
    kept = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda module, args, out: kept.append(out))
    scores = model(x).amax(dim=1).sum()
    handle.remove()
    return kept[0], torch.autograd.grad(scores, kept[0])[0]
""",
    ),
    Planted(
        "a hook left behind",
        "e2",
        "visible",
        "leaves a hook on the model",
        """
def tap(model, x, targets):
    kept = []
    model.blocks[-1].norm1.register_forward_hook(lambda module, args, out: kept.append(out))
    scores = model(x).gather(1, targets[:, None]).sum()
    return kept[0], torch.autograd.grad(scores, kept[0])[0]
""",
    ),
    Planted(
        "argmax on ties",
        "e3",
        "visible",
        "argmax takes the first of the tied maxima",
        """
def pointing_game(maps, masks):
    if maps.shape != masks.shape:
        maps = upsample(maps, tuple(masks.shape[-2:]), mode="nearest")
    highest = maps.flatten(1).argmax(dim=1, keepdim=True)
    return masks.flatten(1).gather(1, highest)[:, 0].float()
""",
    ),
    Planted(
        "any of the tied maxima",
        "e3",
        "visible",
        "a single tied maximum on the object is enough",
        """
def pointing_game(maps, masks):
    if maps.shape != masks.shape:
        maps = upsample(maps, tuple(masks.shape[-2:]), mode="nearest")
    top = maps == maps.amax(dim=(1, 2), keepdim=True)
    return (top & masks).flatten(1).any(dim=1).float()
""",
    ),
    Planted(
        "negative values counted",
        "e3",
        "visible",
        "negative values are counted",
        """
def energy_in_mask(maps, masks):
    if maps.shape != masks.shape:
        maps = upsample(maps, tuple(masks.shape[-2:]), mode="nearest")
    total = maps.flatten(1).sum(dim=1)
    share = masks.flatten(1).float().mean(dim=1)
    return torch.where(total == 0, share, (maps * masks).flatten(1).sum(dim=1) / total)
""",
    ),
    Planted(
        "a blank map gets nothing",
        "e3",
        "visible",
        "without anything positive scores 0 here",
        """
def energy_in_mask(maps, masks):
    if maps.shape != masks.shape:
        maps = upsample(maps, tuple(masks.shape[-2:]), mode="nearest")
    maps = maps.clamp_min(0)
    return (maps * masks).flatten(1).sum(dim=1) / (maps.flatten(1).sum(dim=1) + 1e-8)
""",
    ),
    Planted(
        "0/0 on a blank map",
        "e3",
        "visible",
        "NaN for a map without anything positive",
        """
def energy_in_mask(maps, masks):
    if maps.shape != masks.shape:
        maps = upsample(maps, tuple(masks.shape[-2:]), mode="nearest")
    maps = maps.clamp_min(0)
    return (maps * masks).flatten(1).sum(dim=1) / maps.flatten(1).sum(dim=1)
""",
    ),
    Planted(
        "enlarged bilinearly",
        "e3",
        "visible",
        "energy: the map is enlarged bilinearly",
        """
def energy_in_mask(maps, masks):
    maps = upsample(maps, tuple(masks.shape[-2:])).clamp_min(0)
    blank = maps.amax(dim=(1, 2), keepdim=True) == 0
    maps = torch.where(blank, 1.0, maps)
    return (maps * masks).flatten(1).sum(dim=1) / maps.flatten(1).sum(dim=1)
""",
    ),
    Planted(
        "the maximum of the bilinear map",
        "e3",
        "visible",
        "pointing: the map is enlarged bilinearly",
        """
def pointing_game(maps, masks):
    size = tuple(masks.shape[-2:])
    maps = torch.nn.functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]
    top = maps == maps.amax(dim=(1, 2), keepdim=True)
    return (top & masks).sum(dim=(1, 2)) / top.sum(dim=(1, 2))
""",
    ),
    Planted(
        "scores of maps as large as the mask only",
        "e3",
        "visible",
        "of this shape",
        """
def pointing_game(maps, masks):
    top = maps == maps.amax(dim=(1, 2), keepdim=True)
    return (top & masks).sum(dim=(1, 2)) / top.sum(dim=(1, 2))
""",
    ),
    Planted(
        "not renormalised",
        "e4",
        "visible",
        "did you renormalise after the cut",
        """
def drawn_through(weights, tau):
    return (weights - tau).relu()
""",
    ),
    Planted(
        "empty rows become zeros",
        "e4",
        "visible",
        "a row without survivors becomes zeros",
        """
def drawn_through(weights, tau):
    r = (weights - tau).relu()
    return r / r.sum(dim=-1, keepdim=True).clamp_min(1e-9)
""",
    ),
    Planted(
        "hard cut",
        "e4",
        "visible",
        "survivors keep their whole p",
        """
def drawn_through(weights, tau):
    r = weights * (weights > tau)
    z = r.sum(dim=-1, keepdim=True)
    return torch.where(z > 0, r / z, weights)
""",
    ),
    Planted(
        "heads averaged before the cut",
        "e4",
        "visible",
        "heads are averaged before the cut",
        """
def attention_map(weights, prefix, tau=None):
    row = weights.mean(dim=1)[:, 0]
    return (row if tau is None else drawn_through(row, tau))[:, prefix:]
""",
    ),
    Planted(
        "prefix left out before the cut",
        "e4",
        "visible",
        "prefix is left out before the cut",
        """
def attention_map(weights, prefix, tau=None):
    rows = weights[:, :, 0, prefix:]
    return (rows if tau is None else drawn_through(rows, tau)).mean(dim=1)
""",
    ),
    Planted(
        "prefix token left in the map",
        "e4",
        "visible",
        "a prefix token is left in the map",
        """
def attention_map(weights, prefix, tau=None):
    rows = weights[:, :, 0]
    return (rows if tau is None else drawn_through(rows, tau)).mean(dim=1)
""",
    ),
    Planted(
        "one prefix token, always",
        "e4",
        "visible",
        "you leave out 1",
        """
def attention_map(weights, prefix, tau=None):
    rows = weights[:, :, 0]
    return (rows if tau is None else drawn_through(rows, tau)).mean(dim=1)[:, 1:]
""",
    ),
    Planted(
        "hard cut, and 0/0 in an empty row",
        "e4",
        "visible",
        "drawn_through",
        """
def drawn_through(weights, tau):
    r = torch.where(weights >= tau, weights, 0.0)
    return r / r.sum(dim=-1, keepdim=True)
""",
    ),
]

UNUSUAL = [
    Unusual(
        "the class row carried backwards, with W + I",
        "e1",
        """
def rollout(attentions, prefix):
    row = None
    for weights in reversed(attentions):
        n = weights.shape[-1]
        step = weights.mean(1) + torch.eye(n)
        step = step / step.sum(-1, keepdim=True)
        row = step[:, :1] if row is None else row @ step
    return row[:, 0, prefix:]
""",
    ),
    Unusual(
        "NumPy, picture by picture",
        "e1",
        """
def rollout(attentions, prefix):
    import numpy as np

    maps = []
    for picture in range(len(attentions[0])):
        product = np.eye(attentions[0].shape[-1])
        for weights in attentions:
            step = weights[picture].numpy().astype(float).mean(axis=0) + np.eye(len(product))
            product = (step / step.sum(axis=1)[:, None]) @ product
        maps.append(product[0, prefix:])
    return np.stack(maps)
""",
    ),
    Unusual(
        "backward with retain_grad, einsum on channels first",
        "e2",
        """
def tap(model, x, targets):
    kept = {}

    def keep(module, arguments, output):
        output.retain_grad()
        kept["tokens"] = output

    with torch.enable_grad():
        handle = model.blocks[-1].norm1.register_forward_hook(keep)
        logits = model(x)
        handle.remove()
        logits[torch.arange(len(x)), targets].sum().backward()
    return kept["tokens"], kept["tokens"].grad


def token_grad_cam(features, gradient, grid, prefix):
    h, w = grid
    f, g = (t[:, prefix:].transpose(1, 2).reshape(len(t), -1, h, w) for t in (features, gradient))
    return torch.clamp(torch.einsum("bc,bchw->bhw", g.mean((2, 3)), f), min=0)
""",
    ),
    Unusual(
        "one picture at a time, in Python numbers",
        "e3",
        """
import torch.nn.functional as F


def _pairs(maps, masks):
    for heat, mask in zip(maps, masks):
        yield F.interpolate(heat[None, None], size=mask.shape, mode="nearest")[0, 0], mask


def energy_in_mask(maps, masks):
    scores = []
    for heat, mask in _pairs(maps, masks):
        positive = heat.double().clamp(min=0)
        if positive.sum() == 0:
            positive = positive + 1
        scores.append(float(positive[mask].sum() / positive.sum()))
    return torch.tensor(scores)


def pointing_game(maps, masks):
    return torch.stack([mask[heat == heat.max()].double().mean() for heat, mask in _pairs(maps, masks)])
""",
    ),
    Unusual(
        "the mask's share in every patch in place of larger maps",
        "e3",
        """
def _share(maps, masks):
    size = tuple(maps.shape[-2:])
    return torch.nn.functional.adaptive_avg_pool2d(masks.double(), size).flatten(1), maps.double().flatten(1)


def energy_in_mask(maps, masks):
    share, values = _share(maps, masks)
    values = values.clamp_min(0)
    values = torch.where((values > 0).any(dim=1, keepdim=True), values, torch.ones_like(values))
    return (values * share).sum(dim=1) / values.sum(dim=1)


def pointing_game(maps, masks):
    share, values = _share(maps, masks)
    top = (values == values.amax(dim=1, keepdim=True)).double()
    return (top * share).sum(dim=1) / top.sum(dim=1)
""",
    ),
    Unusual(
        "the rows with survivors by indexing",
        "e4",
        """
def drawn_through(weights, tau):
    out = weights.clone()
    over = (weights - tau).clamp(min=0)
    some = (over > 0).any(dim=-1)
    out[some] = over[some] / over[some].sum(dim=-1, keepdim=True)
    return out


def attention_map(weights, prefix, tau=None):
    if tau is not None:
        weights = drawn_through(weights, tau)
    return torch.einsum("bhm->bm", weights[..., 0, prefix:]) / weights.size(1)
""",
    ),
]
