"""Answers to assignment d."""

from . import Planted, Unusual

_TAU_AT = """
def tau_at(step, tau, ramp):
    return tau * min(1.0, step / ramp) if ramp else tau
"""

# A whole answer to d1 in which one line can be replaced.
_ARMS = """
def fine_tune(start, images, labels, test_images, *, tau, ramp, steps, batch_size, lr, seed):
    answers = []
    generator = None
    for sparse in (False, True):
        model = copy.deepcopy(start)
        model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            if sparse:
                sparsify(model, tau_at(step, tau, ramp))
            batch = torch.randperm(len(images), generator=generator)[:batch_size]
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if sparse:
            sparsify(model, tau)
        model.eval()
        with torch.no_grad():
            answers.append(model(test_images))
    return answers[0], answers[1]
"""


def _arms(old: str, new: str) -> str:
    """The answer to d1 with ``old`` replaced, which must be in it."""
    assert old in _ARMS
    return _ARMS.replace(old, new)


def _planted(name: str, message: str, old: str, new: str, by: str = "visible") -> Planted:
    return Planted(name, "d1", by, message, _arms(old, new))


_FIRST_GENERATOR = _arms("    generator = None\n", "    generator = torch.Generator().manual_seed(seed)\n")
_OWN_GENERATOR = "        generator = torch.Generator().manual_seed(seed)\n"

PLANTED = [
    Planted(
        "no warm-up in tau_at",
        "d1",
        "visible",
        "the full tau at step 0: there is no warm-up",
        """
def tau_at(step, tau, ramp):
    return tau
""",
    ),
    Planted(
        "tau beyond tau",
        "d1",
        "visible",
        "does not stop at tau",
        """
def tau_at(step, tau, ramp):
    return tau * step / ramp
""",
    ),
    Planted(
        "tau a step ahead, like the learning rate's warm-up",
        "d1",
        "visible",
        "a step ahead",
        """
def tau_at(step, tau, ramp):
    return tau * min(1.0, (step + 1) / max(ramp, 1))
""",
    ),
    Planted(
        "tau jumps at the end of the ramp",
        "d1",
        "visible",
        "jumps from 0 to tau at the end",
        """
def tau_at(step, tau, ramp):
    return tau if step >= ramp else 0.0
""",
    ),
    Planted(
        "no ramp divides by zero",
        "d1",
        "visible",
        "no ramp at all: it stops with ZeroDivisionError",
        """
def tau_at(step, tau, ramp):
    return tau * min(1.0, step / ramp)
""",
    ),
    _planted(
        "tau jumps at once in the loop",
        "tau jumps at once",
        "tau_at(step, tau, ramp)",
        "tau",
    ),
    _planted(
        "the second arm starts from the first's end",
        "sparse run starts from the weights with which the dense one ended",
        "        model = copy.deepcopy(start)\n",
        "        model = start\n",
    ),
    _planted(
        "the second arm is a copy of the trained start",
        "sparse run starts from the weights with which the dense one ended",
        "copy.deepcopy(start)",
        "start if not sparse else copy.deepcopy(start)",
    ),
    _planted(
        "the start is trained, in the second arm",
        "changed its input start in place",
        "copy.deepcopy(start)",
        "copy.deepcopy(start) if not sparse else start",
    ),
    Planted(
        "batches in another order: one generator for both arms",
        "d1",
        "visible",
        "the same in another order",
        _FIRST_GENERATOR.replace(_OWN_GENERATOR, ""),
    ),
    _planted(
        "another seed for each arm",
        "the same in another order",
        "manual_seed(seed)",
        "manual_seed(seed + sparse)",
    ),
    _planted(
        "seeded, but not with the seed",
        "another seed gives the same batches",
        "manual_seed(seed)",
        "manual_seed(0)",
    ),
    Planted(
        "chance that nobody seeds",
        "d1",
        "visible",
        "two calls with the same seed see other batches",
        _arms(
            "    generator = None\n", "    order = [torch.randperm(len(images))[:batch_size] for _ in range(steps)]\n"
        ).replace("torch.randperm(len(images), generator=generator)[:batch_size]", "order[step]"),
    ),
    _planted(
        "always the first pictures",
        "every step sees the same pictures",
        "torch.randperm(len(images), generator=generator)[:batch_size]",
        "torch.arange(batch_size)",
    ),
    _planted("answers in train mode", "answers in train mode", "        model.eval()\n", ""),
    _planted("trains in eval mode", "trains in eval mode", "        model.train()\n", ""),
    _planted("gradients pile up", "zero_grad", "            optimiser.zero_grad()\n", ""),
    _planted(
        "a new optimiser in every step",
        "make it once, before the loop",
        "            loss = ",
        "            optimiser = torch.optim.AdamW(model.parameters(), lr=lr)\n            loss = ",
    ),
    _planted(
        "labels in the order of the file",
        "labels and images taken with the same indices",
        "labels[batch]",
        "labels[:batch_size]",
    ),
    _planted("plain gradient descent", "plain gradient descent", "torch.optim.AdamW", "torch.optim.SGD"),
    _planted("another learning rate", "constant rate lr", "lr=lr)", "lr=0.3 * lr)"),
    _planted("a step too few", "makes 7 steps, and should make 8", "range(steps)", "range(1, steps)"),
    _planted(
        "both arms cut",
        "both models are cut",
        "            if sparse:\n                sparsify",
        "            if True:\n                sparsify",
    ),
    _planted(
        "judged at the tau of the last step",
        "full tau in force before test_images",
        "        if sparse:\n            sparsify(model, tau)\n",
        "",
        by="visible",
    ),
    _planted("sparse first", "wrong order: dense first", "answers[0], answers[1]", "answers[1], answers[0]"),
    _planted(
        "classes instead of logits", "classes are returned", "model(test_images)", "model(test_images).argmax(-1)"
    ),
    Planted(
        "unpaired bootstrap",
        "d2",
        "visible",
        "that is the \\*unpaired\\* bootstrap",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    rng, n = np.random.default_rng(seed), len(a)
    first = np.asarray(a, float)[rng.integers(0, n, (resamples, n))].mean(axis=1)
    second = np.asarray(b, float)[rng.integers(0, n, (resamples, n))].mean(axis=1)
    return tuple(np.quantile(first - second, [0.025, 0.975]))
""",
    ),
    Planted(
        "no seed",
        "d2",
        "visible",
        "two calls with the same seed give two intervals",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng().integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "a seed of its own",
        "d2",
        "visible",
        "are `seed`, and chance, used",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(0).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "90 % instead of 95",
        "d2",
        "visible",
        "that is the 90 % interval",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.05, 0.95]))
""",
    ),
    Planted(
        "shares given to np.percentile",
        "d2",
        "visible",
        "np.percentile wants 2.5",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.percentile(d[drawn].mean(axis=1), [0.025, 99.975]))
""",
    ),
    Planted(
        "1.96 standard errors of the resampled means",
        "d2",
        "visible",
        "1.96 standard errors",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    means = d[np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))].mean(axis=1)
    error = means.std()
    return d.mean() - 1.96 * error, d.mean() + 1.96 * error
""",
    ),
    Planted(
        "one standard error",
        "d2",
        "visible",
        "one standard error covers 68 %",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    error = d.std(ddof=1) / np.sqrt(len(d))
    return d.mean() - error, d.mean() + error
""",
    ),
    Planted(
        "the interval of one arm",
        "d2",
        "visible",
        "interval of a alone",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    a = np.asarray(a, float)
    drawn = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    return tuple(np.quantile(a[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "b minus a",
        "d2",
        "visible",
        "interval of b - a",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(b, float) - np.asarray(a, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "without replacement",
        "d2",
        "visible",
        "\\*with\\* replacement",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d, rng = np.asarray(a, float) - np.asarray(b, float), np.random.default_rng(seed)
    return tuple(np.quantile([rng.permutation(d).mean() for _ in range(resamples)], [0.025, 0.975]))
""",
    ),
    Planted(
        "resamples and images exchanged",
        "d2",
        "visible",
        "each resample draws `resamples` images",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (len(d), resamples))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "bool cannot be subtracted",
        "d2",
        "visible",
        "right answers \\(bool\\).*convert them to float first",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = a - b
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "right and wrong compared by xor",
        "d2",
        "visible",
        "interval of \\|a - b\\|",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = a ^ b if a.dtype == bool else a - b
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "absolute differences",
        "d2",
        "visible",
        "interval of \\|a - b\\|",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.abs(np.asarray(a, float) - np.asarray(b, float))
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "np.percentile with the shares of np.quantile",
        "d2",
        "visible",
        "counts in per cent",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.percentile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "in percentage points",
        "d2",
        "visible",
        "a hundred times too large",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = 100 * (np.asarray(a, float) - np.asarray(b, float))
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "chapter 4's, with the mean",
        "d2",
        "visible",
        "should be 2 numbers, low and high; it has 3",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return (d.mean(), *np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "groups not used",
        "d2",
        "visible",
        "24 groups: .*`groups` is not used",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
    return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
""",
    ),
    Planted(
        "the mean of the groups' means",
        "d2",
        "visible",
        "a small group counts as much",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    if groups is None:
        drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
        return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
    member = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng, m, means = np.random.default_rng(seed), len(member), []
    for _ in range(resamples):
        means.append(np.mean([d[member[g]].mean() for g in rng.integers(0, m, m)]))
    return tuple(np.quantile(means, [0.025, 0.975]))
""",
    ),
    Planted(
        "groups: divided by n",
        "d2",
        "visible",
        "divided by n = 150 each time",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    if groups is None:
        drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
        return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
    member = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng, m, means = np.random.default_rng(seed), len(member), []
    for _ in range(resamples):
        means.append(sum(d[member[g]].sum() for g in rng.integers(0, m, m)) / len(d))
    return tuple(np.quantile(means, [0.025, 0.975]))
""",
    ),
    Planted(
        "a group drawn twice counts once",
        "d2",
        "visible",
        "counts once",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    rng, labels, means = np.random.default_rng(seed), np.unique(np.arange(len(d)) if groups is None else groups), []
    for _ in range(resamples):
        if groups is None:
            means.append(d[rng.integers(0, len(d), len(d))].mean())
        else:
            means.append(d[np.isin(groups, rng.choice(labels, len(labels)))].mean())
    return tuple(np.quantile(means, [0.025, 0.975]))
""",
    ),
    Planted(
        "drawn within each group",
        "d2",
        "visible",
        "images are drawn within each group",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    if groups is None:
        drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
        return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
    member = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng, m, means = np.random.default_rng(seed), len(member), []
    for _ in range(resamples):
        drawn = [rng.choice(i, len(i)) for i in member]
        means.append(d[np.concatenate(drawn)].mean())
    return tuple(np.quantile(means, [0.025, 0.975]))
""",
    ),
    Planted(
        "as many groups as images",
        "d2",
        "visible",
        "draw as many groups as there are, m = 24",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.asarray(a, float) - np.asarray(b, float)
    if groups is None:
        drawn = np.random.default_rng(seed).integers(0, len(d), (resamples, len(d)))
        return tuple(np.quantile(d[drawn].mean(axis=1), [0.025, 0.975]))
    member = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng, m, means = np.random.default_rng(seed), len(member), []
    for _ in range(resamples):
        means.append(d[np.concatenate([member[g] for g in rng.integers(0, m, len(d))])].mean())
    return tuple(np.quantile(means, [0.025, 0.975]))
""",
    ),
    Planted(
        "normal quantile",
        "d3",
        "visible",
        "the factor is Student's t = 4.30, not the normal 1.96",
        """
def interval_over_seeds(differences):
    m = differences.mean(axis=1)
    half = 1.96 * m.std(ddof=1) / np.sqrt(len(m))
    return m.mean(), m.mean() - half, m.mean() + half
""",
    ),
    Planted(
        "ddof=0",
        "d3",
        "visible",
        "18 % too small. ddof=1",
        """
def interval_over_seeds(differences):
    m = differences.mean(axis=1)
    half = stats.t.ppf(0.975, len(m) - 1) * m.std() / np.sqrt(len(m))
    return m.mean(), m.mean() - half, m.mean() + half
""",
    ),
    Planted(
        "normal quantile and ddof=0",
        "d3",
        "visible",
        "two things: ddof=1",
        """
def interval_over_seeds(differences):
    m = differences.mean(axis=1)
    half = stats.norm.ppf(0.975) * m.std() / np.sqrt(len(m))
    return m.mean(), m.mean() - half, m.mean() + half
""",
    ),
    Planted(
        "divided by S",
        "d3",
        "visible",
        "the standard error has sqrt",
        """
def interval_over_seeds(differences):
    m = differences.mean(axis=1)
    half = stats.t.ppf(0.975, len(m) - 1) * m.std(ddof=1) / len(m)
    return m.mean(), m.mean() - half, m.mean() + half
""",
    ),
    Planted(
        "images taken for seeds",
        "d3",
        "visible",
        "images are taken for seeds",
        """
def interval_over_seeds(differences):
    d = differences.ravel()
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return d.mean(), d.mean() - half, d.mean() + half
""",
    ),
    Planted(
        "one-sided quantile",
        "d3",
        "visible",
        "that is 90 %",
        """
def interval_over_seeds(differences):
    m = differences.mean(axis=1)
    half = stats.t.ppf(0.95, len(m) - 1) * m.std(ddof=1) / np.sqrt(len(m))
    return m.mean(), m.mean() - half, m.mean() + half
""",
    ),
    Planted(
        "NaN for one seed",
        "d3",
        "visible",
        "raise ValueError",
        """
def interval_over_seeds(differences):
    m = differences.mean(axis=1)
    half = stats.t.ppf(0.975, len(m) - 1) * np.sqrt(((m - m.mean()) ** 2).sum() / (len(m) - 1 or np.nan) / len(m))
    return m.mean(), m.mean() - half, m.mean() + half
""",
    ),
    Planted(
        "test set used for choosing",
        "d4",
        "visible",
        "best on the \\*test\\* images",
        """
def choose_tau(validation, test):
    tau = max(sorted(test), key=lambda t: np.mean(test[t]))
    return tau, np.mean(test[tau])
""",
    ),
    Planted(
        "the best test accuracy is reported",
        "d4",
        "visible",
        "the best test accuracy of all is reported",
        """
def choose_tau(validation, test):
    tau = max(sorted(validation), key=lambda t: np.mean(validation[t]))
    return tau, max(np.mean(x) for x in test.values())
""",
    ),
    Planted(
        "the validation accuracy is reported",
        "d4",
        "visible",
        "validation accuracy is reported",
        """
def choose_tau(validation, test):
    tau = max(sorted(validation), key=lambda t: np.mean(validation[t]))
    return tau, np.mean(validation[tau])
""",
    ),
    Planted(
        "the list of test accuracies is returned",
        "d4",
        "visible",
        "the second value is a list, one accuracy per seed",
        """
def choose_tau(validation, test):
    tau = max(sorted(validation), key=lambda t: np.mean(validation[t]))
    return tau, test[tau]
""",
    ),
    Planted(
        "the best single run chooses",
        "d4",
        "visible",
        "best single run",
        """
def choose_tau(validation, test):
    tau = max(sorted(validation), key=lambda t: max(validation[t]))
    return tau, np.mean(test[tau])
""",
    ),
    Planted(
        "ties by the order of the table",
        "d4",
        "visible",
        "tie on validation: take the smaller",
        """
def choose_tau(validation, test):
    tau = max(validation, key=lambda t: np.mean(validation[t]))
    return tau, np.mean(test[tau])
""",
    ),
]

UNUSUAL = [
    Unusual(
        "both arms in one loop, sparse made first, batches in advance, tau by scale_",
        "d1",
        _TAU_AT
        + """
def fine_tune(start, images, labels, test_images, *, tau, ramp, steps, batch_size, lr, seed):
    from svit_utils.attention import sparse_modules
    draw = np.random.default_rng(seed)
    plan = np.stack([draw.choice(len(images), batch_size, replace=False) for _ in range(steps)])
    models = {"sparse": copy.deepcopy(start), "dense": copy.deepcopy(start)}
    sparsify(models["sparse"], tau)
    optimisers = {name: torch.optim.AdamW(model.train().parameters(), lr) for name, model in models.items()}
    for step, batch in enumerate(torch.from_numpy(plan)):
        for module in sparse_modules(models["sparse"]).values():
            module.threshold.set_warmup(tau_at(step, 1.0, ramp))
        for name, model in models.items():
            model.zero_grad()
            torch.nn.CrossEntropyLoss()(model(images[batch]), labels[batch]).backward()
            optimisers[name].step()
    for module in sparse_modules(models["sparse"]).values():
        module.threshold.set_warmup(1.0)
    with torch.inference_mode():
        return [torch.cat([models[name].eval()(x[None]) for x in test_images]) for name in ("dense", "sparse")]
""",
    ),
    Unusual(
        "an epoch at a time, through a DataLoader, the cut put in when tau is above 0",
        "d1",
        """
tau_at = lambda step, tau, ramp: tau if step >= ramp else tau * step / ramp

def one_arm(model, images, labels, test_images, taus, batch_size, lr, seed):
    torch.manual_seed(seed)
    data = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True)
    optimiser, step = torch.optim.AdamW(model.parameters(), lr=lr), 0
    while step < len(taus) - 1:
        for x, y in loader:
            if step == len(taus) - 1:
                break
            if taus[step] > 0:
                sparsify(model, taus[step])
            model.train()
            optimiser.zero_grad()
            (-F.log_softmax(model(x), -1)[range(len(y)), y].mean()).backward()
            optimiser.step()
            step += 1
    if taus[-1] > 0:
        sparsify(model, taus[-1])
    return model.eval()(test_images)

def fine_tune(start, images, labels, test_images, *, tau, ramp, steps, batch_size, lr, seed):
    taus = [tau_at(step, tau, ramp) for step in range(steps)] + [tau]
    sparse = one_arm(copy.deepcopy(start), images, labels, test_images, taus, batch_size, lr, seed)
    dense = one_arm(copy.deepcopy(start), images, labels, test_images, [0.0] * len(taus), batch_size, lr, seed)
    return dense, sparse
""",
    ),
    Unusual(
        "multinomial counts instead of indices",
        "d2",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    d = np.subtract(a, b, dtype=float)
    belongs = np.eye(len(d)) if groups is None else (np.array(sorted(set(groups)))[:, None] == groups).astype(float)
    m = len(belongs)
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), resamples)
    return np.percentile(counts @ (belongs @ d) / (counts @ belongs.sum(1)), (2.5, 97.5)).tolist()
""",
    ),
    Unusual(
        "a loop in torch, a and b looked up apart, groups in a dict, sorted by hand",
        "d2",
        """
def paired_interval(a, b, resamples, seed, groups=None):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    generator, means = torch.Generator().manual_seed(seed), []
    images = {}
    for i, group in enumerate(range(len(a)) if groups is None else groups.tolist()):
        images.setdefault(group, []).append(i)
    images = [torch.tensor(i) for i in images.values()]
    for _ in range(resamples):
        drawn = torch.randint(len(images), (len(images),), generator=generator)
        if groups is not None:
            drawn = torch.cat([images[g] for g in drawn])
        means.append(float(a[drawn].mean() - b[drawn].mean()))
    means.sort()
    return means[int(0.025 * resamples)], means[min(int(0.975 * resamples), resamples - 1)]
""",
    ),
    Unusual(
        "scipy's own interval",
        "d3",
        """
def interval_over_seeds(differences):
    if len(differences) == 1:
        raise ValueError("one seed")
    m = differences.mean(1)
    return (m.mean(), *stats.t.interval(0.95, len(m) - 1, loc=m.mean(), scale=stats.sem(m)))
""",
    ),
    Unusual(
        "a sort of tuples",
        "d4",
        """
def choose_tau(validation, test):
    ranked = sorted((-sum(v) / len(v), t) for t, v in validation.items())
    tau = ranked[0][1]
    return [tau, sum(test[tau]) / len(test[tau])]
""",
    ),
]
