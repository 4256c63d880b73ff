"""Hints that are followed to the letter lead to an answer that holds."""

from __future__ import annotations

import re

import pytest

from svit_course import hint, question
from tests.course.test_bank import ALL, answered, first_failure

# Each hint's code, as somebody types it who follows the last step word by word. What stands in ⟨…⟩ is in the hint.
FOLLOWED = {
    "a1": """
def softmax(scores):
    e = np.exp(scores - scores.max(⟨axis=-1⟩, ⟨keepdims=True⟩))
    return e / e.sum(axis=-1, keepdims=True)
""",
    "a2": """
def cut(p, tau):
    r = ⟨np.maximum(p - tau, 0)⟩
    z = r.sum(⟨axis=-1⟩, ⟨keepdims=True⟩)
    return np.divide(r, z, out=np.zeros_like(r), where=z > 0)
""",
    "a3": """
def attention(q, k, v, tau):
    ⟨d = q.shape[-1]⟩
    return ⟨cut(softmax(q @ k.swapaxes(-1, -2) / np.sqrt(d)), tau) @ v⟩
""",
    "a4": """
def attention_torch(q, k, v, tau):
    p = torch.softmax(q @ ⟨k.transpose(-2, -1)⟩ / q.shape[-1] ** 0.5, ⟨dim=-1⟩)
    r = torch.relu(p - tau)
    z = r.sum(dim=-1, keepdim=True)
    empty = z == 0
    a = ⟨r / z.masked_fill(empty, 1.0)⟩
    weights = ⟨torch.where(empty, p, a)⟩
    return weights @ v, weights
""",
    "b1": """
def grad_p_and_v(p, v, tau, d_out):
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=-1, keepdims=True)
    z = np.where(z == 0, 1, z)
    a = r / z
    along = d_out @ v.swapaxes(-1, -2)
    d = (d_out * (a @ v)).sum(axis=-1, keepdims=True)
    g = ⟨(p > tau) *⟩ (along - d) / z
    return g, a.swapaxes(-1, -2) @ d_out
""",
    "b2": """
def grad_scores(p, g, tau):
    G = g.sum(axis=-1, keepdims=True)
    return ⟨p * (g - tau * G)⟩
""",
    "b3": """
def grad_tau(p, v, tau, d_out):
    t = ⟨tau[:, None, None]⟩
    survives = p > t
    k = survives.sum(dim=-1)
    r = torch.relu(p - t)
    z = r.sum(dim=-1)
    z = torch.where(k == 0, torch.ones_like(z), z)
    u = survives.to(p.dtype) @ v
    o = r @ v / z[..., None]
    G = ((d_out * u).sum(dim=-1) - k * (d_out * o).sum(dim=-1)) / z
    G = torch.where(k == 0, torch.zeros_like(G), G)
    return -G.sum(⟨dim=(0, 2)⟩)
""",
    "b4": """
class ThresholdedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tau):
        p = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        r = torch.relu(p - tau[:, None, None])
        z = r.sum(dim=-1, keepdim=True)
        empty = z == 0
        weights = torch.where(empty, p, r / z.masked_fill(empty, 1.0)).to(v.dtype)
        ⟨ctx.save_for_backward⟩(q, k, v, p, r, z, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, p, r, z, weights = ⟨ctx.saved_tensors⟩
        empty = z == 0
        along = d_out @ v.transpose(-2, -1)
        d = (weights * along).sum(dim=-1, keepdim=True)
        g = (r > 0) * (along - d) / z.masked_fill(empty, 1.0)
        dtau = -g.sum(dim=(0, 2, 3))
        g = torch.where(empty, along, g)
        ds = ⟨p * (g - (p * g).sum(dim=-1, keepdim=True))⟩
        root = q.shape[-1] ** 0.5
        return ds @ k / root, ds.transpose(-2, -1) @ q / root, weights.transpose(-2, -1) @ d_out, dtau

def learnable_attention(q, k, v, logit):
    ⟨tau = torch.sigmoid(logit)⟩
    return ⟨ThresholdedAttention.apply(q, k, v, tau)⟩
""",
    "c1": """
class ThresholdedAttention(Attention):
    tau = 0.01

    def forward(self, x, attn_mask=None, is_causal=False):
        H = self.num_heads
        q, k, v = ⟨self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)⟩.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        scores = q @ k.transpose(-2, -1) * self.scale
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask = attn_mask
            scores = scores.⟨masked_fill(~mask, -inf)⟩
        elif attn_mask is not None:
            scores = scores + attn_mask
        A = self.attn_drop(⟨thresholded_softmax(scores, self.tau)⟩)
        x = (A @ v).⟨transpose(1, 2)⟩.⟨flatten(2)⟩
        return self.proj_drop(self.proj(self.norm(x)))

inf = float("inf")
""",
    "c2": """
def convert(model, tau):
    names = []
    for name, module in ⟨model.named_modules()⟩:
        if type(module) in (Attention, ThresholdedAttention):
            ⟨module.__class__ = ThresholdedAttention⟩
            ⟨module.tau = tau⟩
            names.append(name)
    if not names:
        ⟨raise ValueError(f'{type(model).__name__} has no ...')⟩
    return names

def restore(model):
    for name, module in model.named_modules():
        if type(module) is ThresholdedAttention:
            module.__class__ = Attention
            ⟨del module.tau⟩
""",
    "c3": """
⟨@contextmanager⟩
def cut_for_a_while(model, tau):
    before = {module: module.tau for module in model.modules() if type(module) is ThresholdedAttention}
    names = convert(model, tau)
    try:
        ⟨yield names⟩
    finally:
        ⟨restore(model)⟩
        for module, old in before.items():
            module.__class__ = ThresholdedAttention
            module.tau = old
""",
    "c4": """
def class_attention_on_grid(model, x):
    kept = []
    attention = ⟨model.blocks[-1].attn⟩
    handle = attention.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        with torch.no_grad():
            model(x)
            q, k, v = attention.qkv(kept[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = attention.q_norm(q), attention.k_norm(k)
            weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    finally:
        handle.remove()
    return ⟨weights[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)⟩
""",
    "d1": """
def tau_at(step, tau, ramp):
    return tau * min(1, step / ramp) if ramp else tau

def fine_tune(start, images, labels, test_images, *, tau, ramp, steps, batch_size, lr, seed):
    answers = []
    ⟨for sparse in (False, True):⟩
        model = ⟨copy.deepcopy(start)⟩
        optimiser = ⟨torch.optim.AdamW⟩(model.parameters(), lr=lr)
        generator = ⟨torch.Generator().manual_seed(seed)⟩
        model.train()
        for step in range(steps):
            if sparse:
                ⟨sparsify(model, tau_at(step, tau, ramp))⟩
            batch = torch.randint(len(images), (batch_size,), generator=generator)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        model.eval()
        if sparse:
            ⟨sparsify(model, tau)⟩
        with torch.no_grad():
            answers.append(model(test_images))
    return answers[0], answers[1]
""",
    "d2": """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    n = len(d)
    if groups is None:
        indices = ⟨np.random.default_rng(seed).integers(0, n, (resamples, n))⟩
        means = ⟨d[indices].mean(axis=1)⟩
    else:
        names, of = np.unique(groups, return_inverse=True)
        sums, sizes = np.array([[d[of == g].sum(), (of == g).sum()] for g in range(len(names))]).T
        m = len(names)
        drawn = np.random.default_rng(seed).integers(0, m, (resamples, m))
        means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return ⟨np.quantile(means, [0.025, 0.975])⟩
""",
    "d3": """
def interval_over_seeds(differences):
    delta = np.asarray(differences).mean(axis=1)
    S = len(delta)
    if S < 2:
        raise ValueError("one seed")
    t = ⟨stats.t.ppf(0.975, S - 1)⟩
    half = t * delta.std(⟨ddof=1⟩) / np.sqrt(S)
    return delta.mean(), delta.mean() - half, delta.mean() + half
""",
    "d4": """
def choose_tau(validation, test):
    tau = ⟨max(sorted(validation), key=lambda tau:⟩ np.mean(validation[tau]))
    return tau, np.mean(test[tau])
""",
    "e1": """
def rollout(attentions, prefix):
    product = None
    for weights in attentions:
        fused = weights.mean(dim=1)
        step = fused / 2 + torch.eye(fused.shape[-1]) / 2
        ⟨step = step / step.sum(dim=-1, keepdim=True)⟩
        ⟨product = step if product is None else step @ product⟩
    return ⟨product[:, 0, prefix:]⟩
""",
    "e2": """
def tap(model, x, targets):
    layer = ⟨model.blocks[-1].norm1⟩
    ⟨kept = []⟩
    ⟨handle = layer.register_forward_hook(lambda module, args, out: kept.append(out))⟩
    ⟨logits = model(x)⟩
    ⟨handle.remove()⟩
    ⟨score = logits.gather(1, targets[:, None]).sum()⟩
    tokens = kept[0]
    (gradient,) = ⟨torch.autograd.grad(score, tokens)⟩
    return tokens.detach(), gradient

def token_grad_cam(features, gradient, grid, prefix):
    alpha = ⟨gradient[:, prefix:].mean(dim=1, keepdim=True)⟩
    return (alpha * features[:, prefix:]).sum(dim=-1)⟨.relu()⟩⟨.unflatten(1, grid)⟩
""",
    "e3": """
def energy_in_mask(maps, masks):
    maps = upsample(maps, tuple(masks.shape[-2:]), ⟨mode="nearest"⟩)
    positive, inside = maps.flatten(1).clamp_min(0), masks.flatten(1)
    ⟨blank = positive.amax(dim=1, keepdim=True) == 0⟩
    ⟨positive = torch.where(blank, 1.0, positive)⟩
    return ⟨(positive * inside).sum(1) / positive.sum(1)⟩

def pointing_game(maps, masks):
    maps = upsample(maps, tuple(masks.shape[-2:]), mode="nearest")
    values, inside = maps.flatten(1), masks.flatten(1)
    ⟨top = values == values.amax(dim=1, keepdim=True)⟩
    return ⟨(top & inside).sum(1) / top.sum(1)⟩
""",
    "e4": """
def drawn_through(weights, tau):
    ⟨r = (weights - tau).relu()⟩
    ⟨z = r.sum(dim=-1, keepdim=True)⟩
    return ⟨torch.where(z > 0, r / z.clamp_min(1e-12), weights)⟩

def attention_map(weights, prefix, tau=None):
    ⟨rows = weights[:, :, 0]⟩
    ⟨if tau is not None: rows = drawn_through(rows, tau)⟩
    return ⟨rows.mean(dim=1)[:, prefix:]⟩
""",
    "f1": """
def output_error(model, taus, images):
    was = model.training
    model.eval()
    with torch.no_grad():
        ⟨dense = model(images)⟩
        ⟨with sparsified(model, taus):⟩
            ⟨cut = model(images)⟩
    ⟨model.train(was)⟩
    return ⟨(cut - dense).norm(dim=1) / dense.norm(dim=1)⟩
""",
    "f2": """
def sensitivity(model, images, taus):
    rows = []
    for l in ⟨range(len(model.blocks))⟩:
        rows.append([⟨output_error(model, {l: t}, images).mean()⟩ for t in taus])
    return np.array(rows)
""",
    "f3": """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    import itertools
    layers, best, chosen = len(error_table), -1, None
    for js in ⟨itertools.product(range(len(taus)), repeat=⟩layers):
        if sum(⟨error_table[l, j]⟩ for l, j in enumerate(js)) <= budget:
            cut = sum(⟨sparsity_table[l, j]⟩ for l, j in enumerate(js))
            if cut > best:
                best, chosen = cut, js
    if chosen is None:
        raise ValueError("no choice")
    return [⟨taus[j]⟩ for j in chosen]
""",
    "f4": """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    ⟨columns = [list(taus).index(t) for t in chosen]⟩
    test_error = ⟨test['error'][range(len(columns)), columns].sum()⟩
    return {
        "taus": chosen,
        "validation_error": validation["error"][range(len(columns)), columns].sum(),
        "test_error": test_error,
        "test_sparsity": test["sparsity"][range(len(columns)), columns].mean(),
        "kept": ⟨test_error <= budget⟩,
    }
""",
}


@pytest.mark.parametrize("name", ALL)
def test_a_hint_that_is_followed_to_the_letter_leads_to_an_answer(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hint(name, len(question(name).hints))
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for quoted in re.findall(r"⟨(.+?)⟩", FOLLOWED[name]):
        assert quoted in said, f"{name}: no hint says {quoted}"
    assert first_failure(name, answered(name, re.sub("[⟨⟩]", "", FOLLOWED[name]))) is None
