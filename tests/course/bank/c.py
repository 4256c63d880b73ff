"""Answers to assignment c."""

from . import Planted, Unusual

# A whole forward with gaps, for answers to c1 that differ in one line.
_FORWARD = """
class ThresholdedAttention(Attention):
    tau = 0.01

    def forward(self, x, attn_mask=None, is_causal=False):
        B, N, C = x.shape
        {split}
        {norms}
        scores = q @ k.transpose(-2, -1) {scale}
        if is_causal:
            attn_mask = torch.ones(N, N, dtype=torch.bool).tril()
        {mask}
        {weights}
        out = {merge}
        return self.proj_drop({proj})
"""
_PARTS = {
    "split": "q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)",
    "norms": "q, k = self.q_norm(q), self.k_norm(k)",
    "scale": "* self.scale",
    "mask": "scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf) "
    "if attn_mask.dtype == torch.bool else scores + attn_mask",
    "weights": "weights = self.attn_drop(thresholded_softmax(scores, self.tau))",
    "merge": "(weights @ v).transpose(1, 2).reshape(B, N, -1)",
    "proj": "self.proj(self.norm(out))",
}


def _forward(**changed: str) -> str:
    return _FORWARD.format(**{**_PARTS, **changed})


_RENORMALISED = "r = (p - self.tau).relu(); z = r.sum(-1, keepdim=True); "

_PATCHED = """
import types


def convert(model, tau):
    names = []
    for name, module in model.named_modules():
        if type(module) is Attention:
            module.tau = tau
            module.forward = types.MethodType(ThresholdedAttention.forward, module)
            names += [name]
    if names:
        return names
    raise ValueError("nothing to convert in " + model.__class__.__name__)


def restore(model):
    for module in model.modules():
        vars(module).pop("forward", None)
        vars(module).pop("tau", None)
"""

_RESTORE = """
def restore(model):
    for module in model.modules():
        if type(module) is ThresholdedAttention:
            module.__class__ = Attention
"""

PLANTED = [
    Planted("forgotten scale", "c1", "visible", "scores are not scaled", _forward(scale="")),
    Planted("scaled twice", "c1", "visible", "scaled twice", _forward(scale="* self.scale / q.shape[-1] ** 0.5")),
    Planted("scale of the whole width", "c1", "visible", "that of the whole width", _forward(scale="* C**-0.5")),
    Planted(
        "cut before the softmax",
        "c1",
        "visible",
        "the cut comes before the softmax",
        _forward(weights="weights = (scores - self.tau).relu().softmax(-1)"),
    ),
    Planted(
        "scores below tau masked before the softmax",
        "c1",
        "visible",
        "the cut comes before the softmax|NaN",
        _forward(weights="weights = scores.masked_fill(scores <= self.tau, -torch.inf).softmax(-1)"),
    ),
    Planted(
        "softmax twice",
        "c1",
        "visible",
        "two softmaxes",
        _forward(weights="weights = thresholded_softmax(scores.softmax(-1), self.tau)"),
    ),
    Planted(
        "threshold forgotten",
        "c1",
        "visible",
        "at 0.01, its default",
        _forward(weights="weights = thresholded_softmax(scores)"),
    ),
    Planted(
        "not renormalised",
        "c1",
        "visible",
        "not renormalised",
        _forward(weights="weights = (scores.softmax(-1) - self.tau).relu()"),
    ),
    Planted("no cut", "c1", "visible", "nothing is cut", _forward(weights="weights = scores.softmax(-1)")),
    Planted(
        "q and k swapped for v",
        "c1",
        "visible",
        "mixed up",
        _forward(split="v, k, q = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)"),
    ),
    Planted(
        "heads before q, k, v",
        "c1",
        "visible",
        r"\(H, 3, D\) instead of \(3, H, D\)",
        _forward(split="q, k, v = self.qkv(x).reshape(B, N, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)"),
    ),
    Planted(
        "heads and tokens swapped in the split",
        "c1",
        "visible",
        "heads and tokens are swapped in the split",
        _forward(split="q, k, v = (t.reshape(B, self.num_heads, N, -1) for t in self.qkv(x).chunk(3, dim=-1))"),
    ),
    Planted(
        "heads before tokens in one reshape",
        "c1",
        "visible",
        "the axes of qkv\\(x\\) are cut up in another order",
        _forward(split="q, k, v = self.qkv(x).reshape(B, self.num_heads, N, 3, -1).permute(3, 0, 1, 2, 4)"),
    ),
    Planted(
        "q, k, v before tokens in one reshape",
        "c1",
        "visible",
        "the axes of qkv\\(x\\) are cut up in another order",
        _forward(split="q, k, v = self.qkv(x).reshape(B, 3, self.num_heads, N, -1).transpose(0, 1)"),
    ),
    Planted(
        "no heads",
        "c1",
        "visible",
        "there is one head only",
        _forward(split="q, k, v = self.qkv(x).chunk(3, dim=-1)", merge="weights @ v"),
    ),
    Planted(
        "no heads, scaled by the whole width",
        "c1",
        "visible",
        "there is one head only",
        _forward(split="q, k, v = self.qkv(x).chunk(3, dim=-1)", merge="weights @ v", scale="/ C**0.5"),
    ),
    Planted(
        "every mask taken for a boolean one",
        "c1",
        "visible",
        "a mask of numbers: the mask holds numbers",
        _forward(mask="scores = scores if attn_mask is None else scores.masked_fill(~(attn_mask > 0), -torch.inf)"),
    ),
    Planted(
        "heads and tokens swapped in the merge",
        "c1",
        "visible",
        "swapped when the heads are put together",
        _forward(merge="(weights @ v).reshape(B, N, C)"),
    ),
    Planted("proj left out", "c1", "visible", "self.proj is left out", _forward(proj="self.norm(out)")),
    Planted("no qk_norm", "c1", "visible", "self.q_norm and self.k_norm are left out", _forward(norms="")),
    Planted("mask ignored", "c1", "visible", "attn_mask is ignored", _forward(mask="")),
    Planted(
        "boolean mask added",
        "c1",
        "visible",
        "added as ones and zeros",
        _forward(mask="scores = scores if attn_mask is None else scores + attn_mask"),
    ),
    Planted(
        "boolean mask the wrong way round",
        "c1",
        "visible",
        "wrong way round",
        _forward(mask="scores = scores if attn_mask is None else scores.masked_fill(attn_mask, -torch.inf)"),
    ),
    Planted(
        "hard-coded shape",
        "c1",
        "visible",
        "written into the code",
        _forward(split="q, k, v = self.qkv(x).reshape(1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)"),
    ),
    Planted(
        "dropout in eval mode",
        "c1",
        "visible",
        "two calls in eval mode differ",
        _forward(
            weights="weights = torch.nn.functional.dropout(thresholded_softmax(scores, self.tau), self.attn_drop.p)"
        ),
    ),
    Planted(
        "is_causal ignored",
        "c1",
        "visible",
        "is_causal is ignored",
        _forward().replace("if is_causal:", "if False:"),
    ),
    Planted("norm left out", "c1", "visible", "self.norm is left out", _forward(proj="self.proj(out)")),
    Planted(
        "dropout before the cut",
        "c1",
        "visible",
        "dropout comes last",
        _forward(
            weights="p = self.attn_drop(scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0).softmax(-1)"
            ".masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)); "
            + _RENORMALISED
            + "weights = torch.where(z == 0, p, r / z.masked_fill(z == 0, 1))"
        ),
    ),
    Planted(
        "no dropout",
        "c1",
        "visible",
        "attn_drop drops nothing",
        _forward(weights="weights = thresholded_softmax(scores, self.tau)"),
    ),
    Planted(
        "NaN for a query that sees nothing",
        "c1",
        "visible",
        "softmax over -inf only",
        _forward(
            weights="p = scores.softmax(-1); "
            + _RENORMALISED
            + "weights = self.attn_drop(torch.where(z == 0, p, r / z.masked_fill(z == 0, 1)))"
        ),
    ),
    Planted(
        "gradient cut",
        "c1",
        "visible",
        "no gradient comes through",
        _forward()
        .replace("        B, N, C = x.shape", "        x = x.detach(); B, N, C = x.shape")
        .replace("scores = q @", "scores = q.detach() @")
        .replace("return self", "out = out.detach(); self.requires_grad_(False); return self"),
    ),
    Planted(
        "new modules with random weights",
        "c2",
        "visible",
        "begins with random weights",
        """
def convert(model, tau):
    names = []
    for index, block in enumerate(model.blocks if hasattr(model, "blocks") else []):
        new = ThresholdedAttention(block.attn.qkv.in_features, block.attn.num_heads, qkv_bias=True).double().eval()
        new.tau, new.old = tau, [block.attn]
        block.attn = new
        names.append(f"blocks.{index}.attn")
    if not names:
        raise ValueError(type(model).__name__)
    return names


def restore(model):
    for block in model.blocks:
        block.attn = block.attn.old[0]
""",
    ),
    Planted(
        "copies of the weights in new modules",
        "c2",
        "visible",
        "a new module has taken its place, with copies of the weights",
        """
def convert(model, tau):
    names = []
    for index, block in enumerate(model.blocks if hasattr(model, "blocks") else []):
        new = ThresholdedAttention(block.attn.qkv.in_features, block.attn.num_heads, qkv_bias=True).double().eval()
        new.load_state_dict(block.attn.state_dict())
        new.tau, new.old = tau, [block.attn]
        block.attn = new
        names.append(f"blocks.{index}.attn")
    if not names:
        raise ValueError(type(model).__name__)
    return names


def restore(model):
    for block in model.blocks:
        block.attn = block.attn.old[0]
""",
    ),
    Planted(
        "new modules in float32",
        "c2",
        "visible",
        "a new module has taken its place, with other weights",
        """
def convert(model, tau):
    names = []
    for index, block in enumerate(model.blocks if hasattr(model, "blocks") else []):
        new = ThresholdedAttention(block.attn.qkv.in_features, block.attn.num_heads, qkv_bias=True)
        new.tau, new.old = tau, [block.attn]
        block.attn = new
        names.append(f"blocks.{index}.attn")
    if not names:
        raise ValueError(type(model).__name__)
    return names


def restore(model):
    for block in model.blocks:
        block.attn = block.attn.old[0]
""",
    ),
    Planted(
        "new modules in float32 with the weights loaded",
        "c2",
        "visible",
        "module.__class__ = ThresholdedAttention",
        """
def convert(model, tau):
    names = []
    for index, block in enumerate(model.blocks if hasattr(model, "blocks") else []):
        new = ThresholdedAttention(block.attn.qkv.in_features, block.attn.num_heads, qkv_bias=True)
        new.load_state_dict(block.attn.state_dict())
        new.tau, new.old = tau, [block.attn]
        block.attn = new
        names.append(f"blocks.{index}.attn")
    if not names:
        raise ValueError(type(model).__name__)
    return names


def restore(model):
    for block in model.blocks:
        block.attn = block.attn.old[0]
""",
    ),
    Planted(
        "copies of the parameters in the same module",
        "c2",
        "visible",
        "it holds copies",
        """
import copy


def convert(model, tau):
    names = []
    for name, module in model.named_modules():
        if type(module) in (Attention, ThresholdedAttention):
            module.__class__, module.tau = ThresholdedAttention, tau
            module.qkv = copy.deepcopy(module.qkv)
            names.append(name)
    if not names:
        raise ValueError(type(model).__name__)
    return names
"""
        + _RESTORE,
    ),
    Planted(
        "a wrapper with other keys",
        "c2",
        "visible",
        "changes the keys of the state_dict",
        """
class Wrapper(torch.nn.Module):
    def __init__(self, attn, tau):
        super().__init__()
        self.attn = attn
        attn.__class__, attn.tau = ThresholdedAttention, tau

    def forward(self, x, **kwargs):
        return self.attn(x, **kwargs)


def convert(model, tau):
    if not hasattr(model, "blocks"):
        raise ValueError(type(model).__name__)
    for block in model.blocks:
        block.attn = Wrapper(block.attn, tau)
    return [f"blocks.{i}.attn" for i in range(len(model.blocks))]


def restore(model):
    for block in model.blocks:
        block.attn = block.attn.attn
        block.attn.__class__ = Attention
""",
    ),
    Planted(
        "only the last block",
        "c2",
        "visible",
        "only the last block is cut",
        """
def convert(model, tau):
    if not hasattr(model, "blocks"):
        raise ValueError(type(model).__name__)
    module = model.blocks[-1].attn
    module.__class__, module.tau = ThresholdedAttention, tau
    return [f"blocks.{len(model.blocks) - 1}.attn"]
"""
        + _RESTORE,
    ),
    Planted(
        "return inside the loop",
        "c2",
        "visible",
        "only the first block is cut",
        """
def convert(model, tau):
    for name, module in model.named_modules():
        if type(module) in (Attention, ThresholdedAttention):
            module.__class__, module.tau = ThresholdedAttention, tau
            return [name]
    raise ValueError(type(model).__name__)
"""
        + _RESTORE,
    ),
    Planted(
        "nothing is refused",
        "c2",
        "visible",
        "raise ValueError",
        """
def convert(model, tau):
    names = []
    for name, module in model.named_modules():
        if type(module) in (Attention, ThresholdedAttention):
            module.__class__, module.tau = ThresholdedAttention, tau
            names.append(name)
    return names
"""
        + _RESTORE,
    ),
    Planted(
        "a second call changes nothing",
        "c2",
        "visible",
        "has no attention|a second call of convert",
        """
def convert(model, tau):
    names = []
    for name, module in model.named_modules():
        if type(module) is Attention:
            module.__class__, module.tau = ThresholdedAttention, tau
            names.append(name)
    if not names and not any(isinstance(m, Attention) for m in model.modules()):
        raise ValueError(type(model).__name__ + " has no attention")
    return names
"""
        + _RESTORE,
    ),
    Planted(
        "restored by tau = 0",
        "c2",
        "visible",
        "not bit for bit",
        """
def restore(model):
    for module in model.modules():
        if type(module) is ThresholdedAttention:
            module.tau = 0.0
""",
    ),
    Planted(
        "tau on the class",
        "c2",
        "visible",
        "not the class's",
        """
def convert(model, tau):
    names = []
    ThresholdedAttention.tau = tau
    for name, module in model.named_modules():
        if type(module) in (Attention, ThresholdedAttention):
            module.__class__ = ThresholdedAttention
            names.append(name)
    if not names:
        raise ValueError(type(model).__name__)
    return names
"""
        + _RESTORE,
    ),
    Planted(
        "training mode lost",
        "c2",
        "visible",
        "changes the training mode",
        """
first = convert


def convert(model, tau):
    names = first(model, tau)
    model.eval()
    return names
""",
    ),
    Planted(
        "a stranger is converted",
        "c2",
        "visible",
        "a subclass of Attention that has a forward of its own",
        """
def convert(model, tau):
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.__class__, module.tau = ThresholdedAttention, tau
            names.append(name)
    if not names:
        raise ValueError(type(model).__name__)
    return names
"""
        + _RESTORE,
    ),
    Planted(
        "no restore after an exception",
        "c3",
        "visible",
        "restore in `finally`",
        """
@contextmanager
def cut_for_a_while(model, tau):
    yield convert(model, tau)
    restore(model)
""",
    ),
    Planted(
        "the exception is swallowed",
        "c3",
        "visible",
        "never comes out of it",
        """
@contextmanager
def cut_for_a_while(model, tau):
    try:
        yield convert(model, tau)
    except Exception:
        pass
    restore(model)
""",
    ),
    Planted(
        "converted too late",
        "c3",
        "visible",
        "still dense",
        """
@contextmanager
def cut_for_a_while(model, tau):
    yield [name for name, module in model.named_modules() if type(module) is Attention]
    convert(model, tau)
    restore(model)
""",
    ),
    Planted(
        "return in place of yield",
        "c3",
        "visible",
        "'list' object is not an iterator.: `yield` the names once",
        """
@contextmanager
def cut_for_a_while(model, tau):
    names = convert(model, tau)
    return names
""",
    ),
    Planted(
        "no decorator",
        "c3",
        "visible",
        "keep `@contextmanager`",
        """
def cut_for_a_while(model, tau):
    names = convert(model, tau)
    try:
        yield names
    finally:
        restore(model)
""",
    ),
    Planted(
        "no names",
        "c3",
        "visible",
        "should return the list of the names",
        """
@contextmanager
def cut_for_a_while(model, tau):
    convert(model, tau)
    try:
        yield
    finally:
        restore(model)
""",
    ),
    Planted(
        "dense after a block inside another",
        "c3",
        "visible",
        "note at entry which modules were cut",
        """
@contextmanager
def cut_for_a_while(model, tau):
    names = convert(model, tau)
    try:
        yield names
    finally:
        restore(model)
""",
    ),
    Planted(
        "an interrupt is no Exception",
        "c3",
        "visible",
        "an interrupt is no Exception",
        """
@contextmanager
def cut_for_a_while(model, tau):
    before = {module: module.tau for module in model.modules() if type(module) is ThresholdedAttention}

    def back():
        restore(model)
        for module, old in before.items():
            module.__class__, module.tau = ThresholdedAttention, old

    names = convert(model, tau)
    try:
        yield names
    except Exception:
        back()
        raise
    else:
        back()
""",
    ),
    Planted(
        "weights put back as well",
        "c3",
        "visible",
        "a training step inside the block is undone",
        """
import copy


@contextmanager
def cut_for_a_while(model, tau):
    before = {module: module.tau for module in model.modules() if type(module) is ThresholdedAttention}
    weights = copy.deepcopy(model.state_dict())
    try:
        yield convert(model, tau)
    finally:
        restore(model)
        model.load_state_dict(weights)
        for module, old in before.items():
            module.__class__, module.tau = ThresholdedAttention, old
""",
    ),
    Planted(
        "hook that never fires because attention is fused",
        "c4",
        "visible",
        "a hook on it never fires",
        """
def class_attention_on_grid(model, x):
    seen = []
    handle = model.blocks[-1].attn.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    return seen[0][:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)
""",
    ),
    Planted(
        "no return",
        "c4",
        "visible",
        "does the function end without `return`. Or was nothing recorded",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    h, w = model.patch_embed.grid_size
    grid = seen[0][:, :, 0, model.num_prefix_tokens:].unflatten(-1, (h, w))
""",
    ),
    Planted(
        "prefix token kept, 17 keys on 16 places",
        "c4",
        "visible",
        "the prefix tokens are still in .*of the N = 17 keys",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    h, w = model.patch_embed.grid_size
    return seen[0][:, :, 0].unflatten(-1, (h, w))
""",
    ),
    Planted(
        "prefix token kept, reshaped",
        "c4",
        "visible",
        "the prefix tokens are still in .*of the N = 17 keys",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    h, w = model.patch_embed.grid_size
    return seen[0][:, :, 0].reshape(len(x), -1, h, w)
""",
    ),
    Planted(
        "one prefix token left out of two",
        "c4",
        "visible",
        "only one prefix token is left out",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    h, w = model.patch_embed.grid_size
    return seen[0][:, :, 0, 1:].reshape(len(x), -1, h, w)
""",
    ),
    Planted(
        "the tokens that leave the last block",
        "c4",
        "visible",
        "as forward_features gives them",
        """
@torch.no_grad()
def class_attention_on_grid(model, x):
    a, tokens = model.blocks[-1].attn, model.forward_features(x)
    q, k, _ = a.qkv(tokens).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
    p = (a.q_norm(q) @ a.k_norm(k).transpose(-2, -1) * a.scale).softmax(-1)
    return p[:, :, 0, model.num_prefix_tokens :].unflatten(-1, model.patch_embed.grid_size)
""",
    ),
    Planted(
        "prefix token left in the map",
        "c4",
        "visible",
        "a prefix token is left in the map",
        """
right = class_attention_on_grid


def weights_of_last(model, x):
    attention, seen = model.blocks[-1].attn, []
    handle = attention.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model(x)
    handle.remove()
    qkv = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return (attention.scale * q @ k.transpose(-2, -1)).softmax(dim=-1)


def class_attention_on_grid(model, x):
    h, w = model.patch_embed.grid_size
    return weights_of_last(model, x)[:, :, 0, : h * w].unflatten(-1, (h, w))
""",
    ),
    Planted(
        "hard-coded 14 x 14",
        "c4",
        "visible",
        "written into the code",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    return seen[0][:, :, 0, 1:].reshape(len(x), -1, 14, 14)
""",
    ),
    Planted(
        "a square grid",
        "c4",
        "visible",
        "written into the code",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    row = seen[0][:, :, 0, model.num_prefix_tokens:]
    side = int(row.shape[-1] ** 0.5)
    return row.unflatten(-1, (side, side))
""",
    ),
    Planted(
        "one prefix token, from the front",
        "c4",
        "visible",
        "only one prefix token is left out",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    h, w = model.patch_embed.grid_size
    return seen[0][:, :, 0, 1 : 1 + h * w].unflatten(-1, (h, w))
""",
    ),
    Planted(
        "the column instead of the row",
        "c4",
        "visible",
        "take the class token's \\*row\\*",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    attention.fused_attn = True
    return seen[0][:, :, model.num_prefix_tokens:, 0].unflatten(-1, model.patch_embed.grid_size)
""",
    ),
    Planted(
        "left unfused",
        "c4",
        "visible",
        "put back what you change",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[-1].attn
    attention.fused_attn, seen = False, []
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    model(x)
    handle.remove()
    return seen[0][:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)
""",
    ),
    Planted(
        "scale forgotten in the map",
        "c4",
        "visible",
        "self.scale is forgotten",
        """
def class_attention_on_grid(model, x):
    attention, seen = model.blocks[-1].attn, []
    handle = attention.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model(x)
    handle.remove()
    q, k, _ = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return weights[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)
""",
    ),
    Planted(
        "no qk_norm in the map",
        "c4",
        "visible",
        "q_norm and k_norm are left out",
        """
def class_attention_on_grid(model, x):
    attention, seen = model.blocks[-1].attn, []
    handle = attention.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model(x)
    handle.remove()
    q, k, _ = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    return weights[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)
""",
    ),
]

UNUSUAL = [
    Unusual(
        "einsum, chunk and the cut by hand",
        "c1",
        """
class ThresholdedAttention(Attention):
    tau = 0.01

    def forward(self, x, attn_mask=None, is_causal=False):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.num_heads, -1) for t in self.qkv(x).chunk(3, dim=2))
        s = self.scale * torch.einsum("bnhd,bmhd->bhnm", self.q_norm(q), self.k_norm(k))
        if is_causal:
            s = s + torch.full((n, n), -torch.inf, dtype=s.dtype).triu(1)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            s = torch.where(attn_mask, s, -torch.inf)
        elif attn_mask is not None:
            s = s + attn_mask
        e = (s - s.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
        p = e / e.sum(-1, keepdim=True).clamp(min=1e-30)
        r = torch.clamp(p - self.tau, min=0)
        z = r.sum(-1, keepdim=True)
        p = torch.where(z > 0, r / torch.where(z > 0, z, 1.0), p)
        p = torch.nn.functional.dropout(p, self.attn_drop.p, training=self.training)
        o = torch.einsum("bhnm,bmhd->bnhd", p, v).reshape(b, n, -1)
        return self.proj_drop(self.proj(self.norm(o)))
""",
    ),
    Unusual("timm's lines", "c1", _forward()),
    Unusual("the method of each object", "c2", _PATCHED),
    Unusual(
        "a class",
        "c3",
        """
class cut_for_a_while:
    def __init__(self, model, tau):
        self.model, self.tau = model, tau

    def __enter__(self):
        self.before = [(m, type(m), dict(vars(m))) for m in self.model.modules() if isinstance(m, Attention)]
        return convert(self.model, self.tau)

    def __exit__(self, *error):
        for module, cls, attributes in self.before:
            module.__class__ = cls
            if "tau" in attributes:
                module.tau = attributes["tau"]
        return False
""",
    ),
    Unusual(
        "unfused for one call",
        "c4",
        """
def class_attention_on_grid(model, x):
    attention = model.blocks[len(model.blocks) - 1].attn
    fused, attention.fused_attn, maps = attention.fused_attn, False, []
    handle = attention.attn_drop.register_forward_pre_hook(lambda m, inputs: maps.append(inputs[0].detach()))
    try:
        model(x)
    finally:
        handle.remove()
        attention.fused_attn = fused
    h, w = model.patch_embed.grid_size
    return maps[0][:, :, 0, -h * w :].reshape(x.shape[0], -1, h, w).numpy()
""",
    ),
    Unusual(
        "the blocks one after the other",
        "c4",
        """
@torch.no_grad()
def class_attention_on_grid(model, x):
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    *first, last = model.blocks
    for block in first:
        tokens = block(tokens)
    a = last.attn
    q, k, _ = a.qkv(last.norm1(tokens)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = a.q_norm(q[:, :, 0]), a.k_norm(k)
    p = torch.einsum("bhd,bhmd->bhm", q, k).mul(a.scale).softmax(-1)
    return p[:, :, model.num_prefix_tokens :].reshape(*p.shape[:2], *model.patch_embed.grid_size)
""",
    ),
]
