"""Answers to assignment a."""

from . import Planted, Unusual

PLANTED = [
    Planted(
        "no keepdims",
        "a1",
        "visible",
        "A sum or a maximum has lost its axis: keepdims=True",
        """
def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1))
    return e / e.sum(axis=-1)
""",
    ),
    Planted(
        "no keepdims in the sum",
        "a1",
        "visible",
        "A sum or a maximum has lost its axis: keepdims=True",
        """
def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1)
""",
    ),
    Planted(
        "a small number added to the sum",
        "a2",
        "visible",
        "1e-06 is added to the row's sum, so that a row sums to 0.9999: divide by the sum itself",
        """
def cut(p, tau):
    r = np.maximum(p - tau, 0)
    return r / (r.sum(axis=-1, keepdims=True) + 1e-6)
""",
    ),
    Planted(
        "k.T",
        "a3",
        "visible",
        r"\.T turns all axes around",
        """
def attention(q, k, v, tau):
    return cut(softmax(q @ k.T / np.sqrt(q.shape[-1])), tau) @ v
""",
    ),
    Planted(
        "wrong axis",
        "a1",
        "visible",
        "columns sum to 1, not the rows",
        """
def softmax(scores):
    e = np.exp(scores - scores.max(axis=0))
    return e / e.sum(axis=0)
""",
    ),
    Planted(
        "overflow",
        "a1",
        "visible",
        "Subtract the row's maximum first",
        """
def softmax(scores):
    e = np.exp(scores)
    return e / e.sum(axis=-1, keepdims=True)
""",
    ),
    Planted(
        "in-place change of the input",
        "a1",
        "visible",
        "changed its input scores in place",
        """
def softmax(scores):
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
""",
    ),
    Planted(
        "axis 1 instead of the last",
        "a1",
        "visible",
        "runs over axis 1|of this shape",
        """
def softmax(scores):
    if scores.ndim == 1:
        scores, flat = scores[None], True
    else:
        flat = False
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    out = e / e.sum(axis=1, keepdims=True)
    return out[0] if flat else out
""",
    ),
    Planted(
        "no renormalisation",
        "a2",
        "visible",
        r"your rows sum to 0\.35: did you renormalise after the cut",
        """
def cut(p, tau):
    return np.maximum(p - tau, 0)
""",
    ),
    Planted(
        "> where a subtraction belongs",
        "a2",
        "visible",
        "the formula subtracts tau",
        """
def cut(p, tau):
    r = np.where(p > tau, p, 0)
    z = r.sum(axis=-1, keepdims=True)
    return r / np.where(z > 0, z, 1)
""",
    ),
    Planted(
        "0/0 in an empty row",
        "a2",
        "visible",
        "NaN in a row that loses every key",
        """
def cut(p, tau):
    r = np.maximum(p - tau, 0)
    return r / r.sum(axis=-1, keepdims=True)
""",
    ),
    Planted(
        "sums of the columns",
        "a2",
        "visible",
        "sums of the columns",
        """
def cut(p, tau):
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=0, keepdims=True)
    return r / np.where(z > 0, z, 1)
""",
    ),
    Planted(
        "tau before the softmax",
        "a3",
        "visible",
        "before the softmax",
        """
def attention(q, k, v, tau):
    scores = q @ k.T / np.sqrt(q.shape[-1])
    return softmax(np.maximum(scores - tau, 0)) @ v
""",
    ),
    Planted(
        "no square root of d",
        "a3",
        "visible",
        "not divided by sqrt",
        """
def attention(q, k, v, tau):
    return cut(softmax(q @ k.T), tau) @ v
""",
    ),
    Planted(
        "only two axes",
        "a3",
        "visible",
        "of this shape",
        """
def attention(q, k, v, tau):
    return cut(softmax(q @ k.T / np.sqrt(q.shape[-1])), tau) @ v
""",
    ),
    Planted(
        "through NumPy",
        "a4",
        "visible",
        "goes through NumPy|no gradient comes through",
        """
def attention_torch(q, k, v, tau):
    a = cut(softmax((q @ k.transpose(-1, -2)).detach().numpy() / q.shape[-1] ** 0.5), tau)
    a = torch.from_numpy(a)
    return (a @ v.detach()), a
""",
    ),
    Planted(
        "gradient cut by detach",
        "a4",
        "visible",
        "gradient of q is not|detach",
        """
def attention_torch(q, k, v, tau):
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    r = (p - tau).relu()
    z = r.sum(-1, keepdim=True).detach()
    a = torch.where(z == 0, p, r / z.masked_fill(z == 0, 1))
    return a @ v, a
""",
    ),
    Planted(
        "where differentiates 0/0",
        "a4",
        "visible",
        "torch.where chooses the value",
        """
def attention_torch(q, k, v, tau):
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    r = (p - tau) * (p > tau)
    z = r.sum(-1, keepdim=True)
    a = torch.where(z == 0, p, r / z)
    return a @ v, a
""",
    ),
    Planted(
        "one empty row sends all rows back",
        "a4",
        "visible",
        "decide for each row",
        """
def attention_torch(q, k, v, tau):
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    r = (p - tau).relu()
    z = r.sum(-1, keepdim=True)
    a = p if (z == 0).any() else r / z
    return a @ v, a
""",
    ),
    Planted(
        "hard-coded shape",
        "a4",
        "visible",
        "written into the code",
        """
def attention_torch(q, k, v, tau):
    q, k, v = (x.reshape(1, 2, 4, 3) for x in (q, k, v))
    p = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
    r = (p - tau).relu()
    a = r / r.sum(-1, keepdim=True)
    return a @ v, a
""",
    ),
]

UNUSUAL = [
    Unusual(
        "logsumexp by hand",
        "a1",
        """
def softmax(scores):
    top = scores.max(axis=-1, keepdims=True)
    return np.exp(scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True)))
""",
    ),
    Unusual(
        "row by row in a loop",
        "a2",
        """
def cut(p, tau):
    rows = []
    for row in p.reshape(-1, p.shape[-1]):
        kept = [x - tau if x > tau else 0.0 for x in row]
        total = sum(kept)
        rows.append([x / total if total else 0.0 for x in kept])
    return np.array(rows).reshape(p.shape)
""",
    ),
    Unusual(
        "einsum",
        "a3",
        """
attention = lambda q, k, v, tau: np.einsum(
    "...nm,...md->...nd", cut(softmax(np.einsum("...nd,...md->...nm", q, k) * q.shape[-1] ** -0.5), tau), v
)
""",
    ),
    Unusual(
        "0/0 whose gradient relu masks",
        "a4",
        """
def attention_torch(q, k, v, tau):
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    r = torch.relu(p - tau)
    z = r.sum(-1, keepdim=True)
    weights = torch.where(z == 0, p, r / z)
    return weights @ v, weights
""",
    ),
    Unusual(
        "the empty rows by indexing",
        "a4",
        """
def attention_torch(q, k, v, tau):
    p = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) / q.size(-1) ** 0.5, dim=3)
    r = torch.clamp(p - tau, min=0)
    full = r.sum(3) > 0
    weights = p.clone()
    weights[full] = r[full] / r[full].sum(1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v), weights
""",
    ),
]
