"""Answers to assignment b."""

from . import Planted, Unusual

# A right answer to b4 that the planted ones spoil in one place.
FUNCTION = """
class ThresholdedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tau):
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        r = (p - tau[:, None, None]).clamp(min=0)
        z = r.sum(-1, keepdim=True)
        empty = z == 0
        a = torch.where(empty, p, r / z.masked_fill(empty, 1))
        ctx.save_for_backward(q, k, v, tau, p, a, z)
        return a @ v

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, tau, p, a, z = ctx.saved_tensors
        empty = z == 0
        scale = q.shape[-1] ** -0.5
        along = d_out @ v.mT
        big_d = (a * along).sum(-1, keepdim=True)
        kept = p > tau[:, None, None]
        g = kept * (along - big_d) / z.masked_fill(empty, 1)
        dtau = -g.sum((0, 2, 3))
        g = torch.where(empty, along, g)
        ds = p * (g - (p * g).sum(-1, keepdim=True))
        return ds @ k * scale, ds.mT @ q * scale, a.mT @ d_out, dtau


def learnable_attention(q, k, v, logit):
    return ThresholdedAttention.apply(q, k, v, torch.sigmoid(logit).to(q.dtype))
"""


def spoiled(right: str, wrong: str) -> str:
    assert FUNCTION.count(right) == 1, right
    return FUNCTION.replace(right, wrong)


PLANTED = [
    Planted(
        "Z taken for a constant, as if detached",
        "b1",
        "visible",
        "D is missing from g",
        """
def grad_p_and_v(p, v, tau, d_out):
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=-1, keepdims=True)
    return (p > tau) * (d_out @ v.T) / z, (r / z).T @ d_out
""",
    ),
    Planted(
        "no 1/Z",
        "b1",
        "visible",
        "g is not divided by Z",
        """
def grad_p_and_v(p, v, tau, d_out):
    r = np.maximum(p - tau, 0)
    a = r / r.sum(axis=-1, keepdims=True)
    big_d = (d_out * (a @ v)).sum(axis=-1, keepdims=True)
    return (p > tau) * (d_out @ v.T - big_d), a.T @ d_out
""",
    ),
    Planted(
        "no indicator",
        "b1",
        "visible",
        "cut keys have a g",
        """
def grad_p_and_v(p, v, tau, d_out):
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=-1, keepdims=True)
    a = r / z
    return (d_out @ v.T - (d_out * (a @ v)).sum(axis=-1, keepdims=True)) / z, a.T @ d_out
""",
    ),
    Planted(
        "the softmax's weights in dv",
        "b1",
        "visible",
        "dv uses the softmax p",
        """
right_b1 = grad_p_and_v
def grad_p_and_v(p, v, tau, d_out):
    return right_b1(p, v, tau, d_out)[0], p.swapaxes(-1, -2) @ d_out
""",
    ),
    Planted(
        "in-place change of the input",
        "b1",
        "visible",
        "changed its input p in place",
        """
right_b1 = grad_p_and_v
def grad_p_and_v(p, v, tau, d_out):
    result = right_b1(p, v, tau, d_out)
    p -= tau
    np.maximum(p, 0, out=p)
    return result
""",
    ),
    Planted(
        "0/0 in an empty row",
        "b1",
        "visible",
        "NaN in g: a row without survivors",
        """
def grad_p_and_v(p, v, tau, d_out):
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=-1, keepdims=True)
    a = r / z
    g = (p > tau) * (d_out @ v.swapaxes(-1, -2) - (d_out * (a @ v)).sum(axis=-1, keepdims=True)) / z
    return g, a.swapaxes(-1, -2) @ d_out
""",
    ),
    Planted(
        "hard-coded shape: only two axes",
        "b1",
        "visible",
        "written into the code",
        """
def grad_p_and_v(p, v, tau, d_out):
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=1, keepdims=True)
    a = r / np.where(z > 0, z, 1)
    g = (p > tau) * (d_out @ v.T - (d_out * (a @ v)).sum(axis=1, keepdims=True)) / np.where(z > 0, z, 1)
    return g, a.T @ d_out
""",
    ),
    Planted(
        "zero gradient for cut keys",
        "b2",
        "visible",
        "cut keys get zero here",
        """
def grad_scores(p, g, tau):
    return (p > tau) * p * (g - tau * g.sum(axis=-1, keepdims=True))
""",
    ),
    Planted(
        "forgotten softmax Jacobian",
        "b2",
        "visible",
        "the softmax's Jacobian is missing",
        """
def grad_scores(p, g, tau):
    return g
""",
    ),
    Planted(
        "half of the Jacobian",
        "b2",
        "visible",
        "half of the softmax's Jacobian",
        """
def grad_scores(p, g, tau):
    return p * g
""",
    ),
    Planted(
        "G without tau",
        "b2",
        "visible",
        "without its factor tau",
        """
def grad_scores(p, g, tau):
    return p * (g - g.sum(axis=-1, keepdims=True))
""",
    ),
    Planted(
        "one sum for the whole array",
        "b2",
        "visible",
        "each row has its own G",
        """
def grad_scores(p, g, tau):
    return p * (g - tau * g.sum())
""",
    ),
    Planted(
        "mean instead of sum",
        "b2",
        "visible",
        r"G is the \*sum\* of g",
        """
def grad_scores(p, g, tau):
    return p * (g - tau * g.mean(axis=-1, keepdims=True))
""",
    ),
    Planted(
        "in-place change of the gradient",
        "b2",
        "visible",
        "changed its input g in place",
        """
def grad_scores(p, g, tau):
    g -= tau * g.sum(axis=-1, keepdims=True)
    g *= p
    return g
""",
    ),
    Planted(
        "wrong sign",
        "b3",
        "visible",
        "dtau has the wrong sign",
        """
right_b3 = grad_tau
grad_tau = lambda p, v, tau, d_out: -right_b3(p, v, tau, d_out)
""",
    ),
    Planted(
        "mean instead of sum",
        "b3",
        "visible",
        "dtau is a mean",
        """
def grad_tau(p, v, tau, d_out):
    kept = (p > tau[:, None, None]).to(p.dtype)
    r = (p - tau[:, None, None]) * kept
    z = r.sum(-1).masked_fill(kept.sum(-1) == 0, 1)
    o = r @ v / z[..., None]
    big_g = ((d_out * (kept @ v)).sum(-1) - kept.sum(-1) * (d_out * o).sum(-1)) / z
    return -big_g.mean(dim=(0, 2))
""",
    ),
    Planted(
        "empty rows counted",
        "b3",
        "visible",
        "right in the heads without empty rows",
        """
def grad_tau(p, v, tau, d_out):
    r = (p - tau[:, None, None]).relu()
    z = r.sum(-1, keepdim=True)
    a = torch.where(z == 0, p, r / z.masked_fill(z == 0, 1))
    along = d_out @ v.transpose(-1, -2)
    g = (a > 0) * (along - (a * along).sum(-1, keepdim=True)) / z.masked_fill(z == 0, 1)
    return -g.sum(dim=(0, 2, 3))
""",
    ),
    Planted(
        "0/0 in an empty row",
        "b3",
        "visible",
        "NaN in dtau: an empty row",
        """
def grad_tau(p, v, tau, d_out):
    kept = (p > tau[:, None, None]).to(p.dtype)
    r = (p - tau[:, None, None]) * kept
    z = r.sum(-1)
    o = r @ v / z[..., None]
    return -(((d_out * (kept @ v)).sum(-1) - kept.sum(-1) * (d_out * o).sum(-1)) / z).sum((0, 2))
""",
    ),
    Planted(
        "one number for all heads",
        "b3",
        "visible",
        "summed into one number",
        """
right_b3 = grad_tau
grad_tau = lambda p, v, tau, d_out: right_b3(p, v, tau, d_out).sum()
""",
    ),
    Planted(
        "D once instead of k times",
        "b3",
        "visible",
        "once for \\*every\\* survivor",
        """
def grad_tau(p, v, tau, d_out):
    kept = (p > tau[:, None, None]).to(p.dtype)
    r = (p - tau[:, None, None]) * kept
    z = r.sum(-1).masked_fill(kept.sum(-1) == 0, 1)
    o = r @ v / z[..., None]
    return -(((d_out * (kept @ v)).sum(-1) - (d_out * o).sum(-1)) / z).sum((0, 2))
""",
    ),
    Planted(
        "Z taken for a constant",
        "b3",
        "visible",
        "takes Z for a constant",
        """
def grad_tau(p, v, tau, d_out):
    kept = (p > tau[:, None, None]).to(p.dtype)
    z = ((p - tau[:, None, None]) * kept).sum(-1).masked_fill(kept.sum(-1) == 0, 1)
    return -((d_out * (kept @ v)).sum(-1) / z).sum((0, 2))
""",
    ),
    Planted(
        "only the first image",
        "b3",
        "visible",
        "only the first image",
        """
right_b3 = grad_tau
grad_tau = lambda p, v, tau, d_out: right_b3(p[:1], v[:1], tau, d_out[:1])
""",
    ),
    Planted(
        "the images are not summed",
        "b3",
        "visible",
        "one number for each image and head",
        """
right_b3 = grad_tau
def grad_tau(p, v, tau, d_out):
    return torch.stack([right_b3(p[i : i + 1], v[i : i + 1], tau, d_out[i : i + 1]) for i in range(len(p))])
""",
    ),
    Planted(
        "tau along the keys",
        "b3",
        "visible",
        "of this shape",
        """
right_b3 = grad_tau
def grad_tau(p, v, tau, d_out):
    kept = p > tau
    return right_b3(p * kept, v, tau, d_out)
""",
    ),
    Planted(
        "gradient cut by detach",
        "b4",
        "visible",
        "no gradient reaches logit",
        spoiled("torch.sigmoid(logit).to(q.dtype)", "torch.sigmoid(logit).to(q.dtype).detach()"),
    ),
    Planted(
        "no gradient for tau",
        "b4",
        "visible",
        "no gradient for tau",
        spoiled("a.mT @ d_out, dtau", "a.mT @ d_out, None"),
    ),
    Planted(
        "one gradient too few",
        "b4",
        "visible",
        "one gradient for each input of forward",
        spoiled("a.mT @ d_out, dtau", "a.mT @ d_out"),
    ),
    Planted(
        "dtau for each row",
        "b4",
        "visible",
        "of another shape than its input",
        spoiled("-g.sum((0, 2, 3))", "-g.sum(-1)"),
    ),
    Planted(
        "wrong sign of dtau",
        "b4",
        "visible",
        "the gradient of tau has the wrong sign",
        spoiled("-g.sum(", "g.sum("),
    ),
    Planted(
        "mean instead of sum",
        "b4",
        "visible",
        "the gradient of tau is a mean",
        spoiled("-g.sum((0, 2, 3))", "-g.sum(-1).mean((0, 2))"),
    ),
    Planted(
        "zero gradient for cut keys",
        "b4",
        "visible",
        "gradient of q is wrong: cut keys get no gradient",
        spoiled("ds = p * (g", "ds = (a > 0) * p * (g"),
    ),
    Planted(
        "forgotten softmax Jacobian",
        "b4",
        "visible",
        "Jacobian is missing",
        spoiled("ds = p * (g - (p * g).sum(-1, keepdim=True))", "ds = g"),
    ),
    Planted(
        "no square root of d",
        "b4",
        "visible",
        "not divided by sqrt",
        spoiled("scale = q.shape[-1] ** -0.5", "scale = 1.0"),
    ),
    Planted(
        "Z taken for a constant",
        "b4",
        "visible",
        "Z is taken for a constant",
        spoiled("kept * (along - big_d)", "kept * along"),
    ),
    Planted(
        "in-place change of d_out",
        "b4",
        "visible",
        "changed its input d_out in place",
        spoiled("along = d_out @ v.mT", "along = d_out @ v.mT; d_out *= scale"),
    ),
    Planted(
        "in-place change of an input",
        "b4",
        "visible",
        "changed its input q in place|changes a tensor in place",
        spoiled("p = (q @ k.mT / q.shape[-1] ** 0.5)", "p = (q.mul_(q.shape[-1] ** -0.5) @ k.mT)"),
    ),
    Planted(
        "autograd does it",
        "b4",
        "visible",
        "does not go through ThresholdedAttention",
        FUNCTION
        + """
def learnable_attention(q, k, v, logit):
    p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    r = (p - torch.sigmoid(logit)[:, None, None]).relu()
    z = r.sum(-1, keepdim=True)
    return torch.where(z == 0, p, r / z.masked_fill(z == 0, 1)) @ v
""",
    ),
    Planted(
        "kept on the class",
        "b4",
        "visible",
        "once another forward pass comes before",
        spoiled(
            "ctx.save_for_backward(q, k, v, tau, p, a, z)", "ThresholdedAttention.kept = (q, k, v, tau, p, a, z)"
        ).replace("ctx.saved_tensors", "ThresholdedAttention.kept"),
    ),
    Planted(
        "hard-coded shape",
        "b4",
        "visible",
        "written into the code",
        spoiled("p = (q @ k.mT", "q = q.reshape(1, 2, 4, 4); p = (q @ k.mT"),
    ),
    Planted(
        "empty rows counted in dtau",
        "b4",
        "visible",
        "gradient of tau is right in the heads without empty rows",
        spoiled("kept = p > tau[:, None, None]", "kept = a > 0"),
    ),
    Planted(
        "an empty row gets no gradient",
        "b4",
        "visible",
        "leaves out the empty rows",
        spoiled("g = torch.where(empty, along, g)", "g = g * 1"),
    ),
    Planted(
        "attributes instead of save_for_backward",
        "b4",
        "visible",
        "was overwritten between forward and backward",
        spoiled("ctx.save_for_backward(q, k, v, tau, p, a, z)", "ctx.kept = (q, k, v, tau, p, a, z)").replace(
            "ctx.saved_tensors", "ctx.kept"
        ),
    ),
    Planted(
        "always float64",
        "b4",
        "visible",
        "leave the dtype as it comes",
        spoiled("return a @ v\n", "return a.double() @ v.double()\n"),
    ),
]

UNUSUAL = [
    Unusual(
        "row by row in a loop",
        "b1",
        """
def grad_p_and_v(p, v, tau, d_out):
    g, dv = np.zeros_like(p), np.zeros_like(v)
    for at in np.ndindex(p.shape[:-1]):
        inside = [j for j in range(p.shape[-1]) if p[at][j] > tau]
        total = sum(p[at][j] - tau for j in inside)
        values = v[at[:-1]]
        out = sum((p[at][j] - tau) / total * values[j] for j in inside) if inside else 0
        for j in inside:
            g[at][j] = d_out[at] @ (values[j] - out) / total
            dv[(*at[:-1], j)] += (p[at][j] - tau) / total * d_out[at]
    return g, dv
""",
    ),
    Unusual(
        "the Jacobian as a matrix",
        "b2",
        """
def grad_scores(p, g, tau):
    eye = np.eye(p.shape[-1])
    jacobian = p[..., :, None] * eye - p[..., :, None] * p[..., None, :]
    return np.einsum("...ij,...i->...j", jacobian, g)
""",
    ),
    Unusual(
        "the softmax's Jacobian, without tau",
        "b2",
        """
grad_scores = lambda p, g, tau: p * g - p * (p * g).sum(-1)[..., None]
""",
    ),
    Unusual(
        "einsum, and the empty rows by indexing",
        "b3",
        """
def grad_tau(p, v, tau, d_out):
    t = tau.reshape(1, -1, 1, 1)
    along = torch.einsum("bhnd,bhmd->bhnm", d_out, v)
    r = torch.where(p > t, p - t, torch.zeros_like(p))
    full = r.sum(-1) > 0
    total = torch.zeros(p.shape[:3], dtype=p.dtype)
    a, kept, z = r[full] / r[full].sum(-1, keepdim=True), r[full] > 0, r[full].sum(-1)
    total[full] = ((a * along[full]).sum(-1) * kept.sum(-1) - (along[full] * kept).sum(-1)) / z
    return torch.einsum("bhn->h", total)
""",
    ),
    Unusual(
        "head by head, returned as a stack",
        "b3",
        """
def grad_tau(p, v, tau, d_out):
    found = []
    for h in range(p.shape[1]):
        total = 0.0
        for b in range(p.shape[0]):
            for i in range(p.shape[2]):
                kept = p[b, h, i] > tau[h]
                if kept.any():
                    r = p[b, h, i][kept] - tau[h]
                    o = r @ v[b, h][kept] / r.sum()
                    total -= ((v[b, h][kept] - o) @ d_out[b, h, i]).sum() / r.sum()
        found.append(torch.as_tensor(total, dtype=p.dtype))
    return torch.stack(found)
""",
    ),
    Unusual(
        "computed again in backward, setup_context, a sigmoid by hand",
        "b4",
        """
def parts(q, k, tau):
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.size(-1) ** 0.5
    p = torch.exp(s - s.logsumexp(3, keepdim=True))
    r = torch.clamp(p - tau.view(-1, 1, 1), min=0)
    return p, r, r.sum(3, keepdim=True)

class ThresholdedAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, tau):
        p, r, z = parts(q, k, tau)
        return torch.where(z > 0, r / z, p) @ v

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, tau, out = ctx.saved_tensors
        p, r, z = parts(q, k, tau)
        full = z > 0
        along = d_out @ v.transpose(2, 3)
        big_d = (d_out * out).sum(3, keepdim=True)
        g = torch.where(r > 0, (along - big_d) / z, torch.zeros_like(p))
        big_g = g.sum(3, keepdim=True)
        ds = torch.where(full, p * (g - tau.view(-1, 1, 1) * big_g), p * (along - big_d)) / q.size(-1) ** 0.5
        weights = torch.where(full, r / z, p)
        return ds @ k, ds.transpose(2, 3) @ q, weights.transpose(2, 3) @ d_out, -big_g.sum((0, 2, 3))

def learnable_attention(q, k, v, logit):
    tau = 1 / (1 + torch.exp(-logit))
    return ThresholdedAttention.apply(q, k, v, tau)
""",
    ),
    Unusual(
        "copies instead of save_for_backward",
        "b4",
        spoiled(
            "ctx.save_for_backward(q, k, v, tau, p, a, z)", "ctx.kept = [x.clone() for x in (q, k, v, tau, p, a, z)]"
        ).replace("ctx.saved_tensors", "ctx.kept"),
    ),
]
