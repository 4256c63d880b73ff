"""Answers to assignment f."""

from . import Planted, Unusual

PLANTED = [
    Planted(
        "model left cut",
        "f1",
        "visible",
        r"still cut afterwards \(blocks\.0\.attn",
        """
def output_error(model, taus, images):
    from svit_utils import sparsify
    model.eval()
    with torch.no_grad():
        dense = model(images)
        sparsify(model, taus)
        cut = model(images)
    return (cut - dense).norm(dim=1) / dense.norm(dim=1)
""",
    ),
    Planted(
        "error not relative",
        "f1",
        "visible",
        "error is not relative",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            return (model(images) - dense).norm(dim=1)
""",
    ),
    Planted(
        "relative to the cut model",
        "f1",
        "visible",
        "length of the cut logits",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            cut = model(images)
    return (dense - cut).norm(dim=1) / cut.norm(dim=1)
""",
    ),
    Planted(
        "averaged over the batch by one norm",
        "f1",
        "visible",
        "averaged over the batch",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            return (model(images) - dense).norm() / dense.norm()
""",
    ),
    Planted(
        "relative errors of single logits, averaged",
        "f1",
        "visible",
        "a logit near 0 decides",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            return ((model(images) - dense) / dense).abs().mean(dim=1)
""",
    ),
    Planted(
        "answers instead of logits",
        "f1",
        "visible",
        "these are 0 and 1|0 everywhere",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
        with sparsified(model, taus):
            return (model(images).argmax(dim=1) != labels).double()
""",
    ),
    Planted(
        "both calls dense",
        "f1",
        "visible",
        "are both calls dense",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            pass
        cut = model(images)
    return (cut - dense).norm(dim=1) / dense.norm(dim=1)
""",
    ),
    Planted(
        "one tau for all layers",
        "f1",
        "visible",
        "cut at the same tau",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, max(taus.values())):
            cut = model(images)
    return (cut - dense).norm(dim=1) / dense.norm(dim=1)
""",
    ),
    Planted(
        "train mode",
        "f1",
        "visible",
        "in train mode, and dropout draws again",
        """
def output_error(model, taus, images):
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            cut = model(images)
    return (cut - dense).norm(dim=1) / dense.norm(dim=1)
""",
    ),
    Planted(
        "mode not put back",
        "f1",
        "visible",
        "came in training mode and is in eval mode",
        """
def output_error(model, taus, images):
    model.eval()
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, taus):
            cut = model(images)
    return (cut - dense).norm(dim=1) / dense.norm(dim=1)
""",
    ),
    Planted(
        "layers by range, so a negative index is lost",
        "f1",
        "visible",
        "0 everywhere",
        """
def output_error(model, taus, images):
    was = model.training
    model.eval()
    with torch.no_grad():
        dense = model(images)
        with sparsified(model, {l: taus.get(l, 0.0) for l in range(len(model.blocks))}):
            cut = model(images)
    model.train(was)
    return (cut - dense).norm(dim=1) / dense.norm(dim=1)
""",
    ),
    Planted(
        "hard-coded number of layers",
        "f2",
        "visible",
        "number of layers written into the code",
        """
def sensitivity(model, images, taus):
    return np.array([[output_error(model, {l: t}, images).mean().item() for t in taus] for l in range(4)])
""",
    ),
    Planted(
        "hard-coded, too few",
        "f2",
        "visible",
        "3 rows and the model 5 layers",
        """
def sensitivity(model, images, taus):
    layers = range(min(3, len(model.blocks)))
    return np.array([[output_error(model, {l: t}, images).mean().item() for t in taus] for l in layers])
""",
    ),
    Planted(
        "model left cut, layer after layer",
        "f2",
        "visible",
        "still cut afterwards",
        """
def sensitivity(model, images, taus):
    from svit_utils import sparsify
    table = np.zeros((len(model.blocks), len(taus)))
    with torch.no_grad():
        dense = model(images)
        for l in range(len(model.blocks)):
            for j, t in enumerate(taus):
                sparsify(model, {l: t})
                table[l, j] = ((model(images) - dense).norm(dim=1) / dense.norm(dim=1)).mean()
    return table
""",
    ),
    Planted(
        "layers pile up",
        "f2",
        "visible",
        "layers pile up",
        """
def sensitivity(model, images, taus):
    layers = range(len(model.blocks))
    return np.array(
        [[output_error(model, {k: t for k in range(l + 1)}, images).mean().item() for t in taus] for l in layers]
    )
""",
    ),
    Planted(
        "all layers at one tau",
        "f2",
        "visible",
        "every layer is cut at once",
        """
def sensitivity(model, images, taus):
    layers = range(len(model.blocks))
    row = [output_error(model, dict.fromkeys(layers, t), images).mean().item() for t in taus]
    return np.array([row for _ in layers])
""",
    ),
    Planted(
        "rows and columns exchanged",
        "f2",
        "visible",
        r"rows and columns are exchanged|has 4 rows and the model 3 layers|shape",
        """
def sensitivity(model, images, taus):
    layers = range(len(model.blocks))
    return np.array([[output_error(model, {l: t}, images).mean().item() for l in layers] for t in taus])
""",
    ),
    Planted(
        "the largest error of the images",
        "f2",
        "visible",
        "asks for the mean",
        """
def sensitivity(model, images, taus):
    layers = range(len(model.blocks))
    return np.array([[output_error(model, {l: t}, images).max().item() for t in taus] for l in layers])
""",
    ),
    Planted(
        "taus sorted",
        "f2",
        "visible",
        "columns are sorted by tau",
        """
def sensitivity(model, images, taus):
    layers = range(len(model.blocks))
    return np.array([[output_error(model, {l: t}, images).mean().item() for t in sorted(taus)] for l in layers])
""",
    ),
    Planted(
        "budget exceeded: each layer for itself",
        "f3",
        "visible",
        "the budget is exceeded: .* each layer holds the budget by itself",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    allowed = np.where(np.asarray(error_table) <= budget, sparsity_table, -1)
    return [taus[j] for j in allowed.argmax(axis=1)]
""",
    ),
    Planted(
        "budget exceeded: the mean over layers",
        "f3",
        "visible",
        "the budget is exceeded: .*",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    layers = np.arange(len(error_table))
    choices = [list(c) for c in product(range(len(taus)), repeat=len(layers))]
    held = [c for c in choices if error_table[layers, c].mean() <= budget]
    return [taus[j] for j in max(held, key=lambda c: sparsity_table[layers, c].sum())]
""",
    ),
    Planted(
        "one tau for all layers",
        "f3",
        "visible",
        "one tau for all layers",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    held = [j for j in range(len(taus)) if error_table[:, j].sum() <= budget]
    if not held:
        raise ValueError("no choice")
    return [taus[max(held, key=lambda j: sparsity_table[:, j].sum())]] * len(error_table)
""",
    ),
    Planted(
        "indices instead of values",
        "f3",
        "visible",
        r"are indices, .*return taus\[j\]",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    layers = np.arange(len(error_table))
    choices = [list(c) for c in product(range(len(taus)), repeat=len(layers))]
    held = [c for c in choices if error_table[layers, c].sum() <= budget]
    return max(held, key=lambda c: sparsity_table[layers, c].sum())
""",
    ),
    Planted(
        "budget split evenly",
        "f3",
        "visible",
        "the budget is split evenly",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    share = budget / len(error_table)
    allowed = np.where(np.asarray(error_table) <= share, sparsity_table, -1)
    return [taus[j] for j in allowed.argmax(axis=1)]
""",
    ),
    Planted(
        "maximises the error",
        "f3",
        "visible",
        "of all choices yours has the largest error",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    layers = np.arange(len(error_table))
    choices = [list(c) for c in product(range(len(taus)), repeat=len(layers))]
    held = [c for c in choices if error_table[layers, c].sum() <= budget]
    return [taus[j] for j in max(held, key=lambda c: error_table[layers, c].sum())]
""",
    ),
    Planted(
        "minimises the error",
        "f3",
        "visible",
        "The budget may be spent",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    return [taus[j] for j in np.asarray(error_table).argmin(axis=1)]
""",
    ),
    Planted(
        "in-place change of the input table",
        "f3",
        "visible",
        "changed its input sparsity_table in place",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    layers = np.arange(len(error_table))
    sparsity_table[error_table > budget] = -1e9
    choices = [list(c) for c in product(range(len(taus)), repeat=len(layers))]
    held = [c for c in choices if error_table[layers, c].sum() <= budget]
    return [taus[j] for j in max(held, key=lambda c: sparsity_table[layers, c].sum())]
""",
    ),
    Planted(
        "layer after layer with what is left of the budget",
        "f3",
        "visible",
        "one after the other",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    chosen, left = [], budget
    for errors, cuts in zip(error_table, sparsity_table):
        j = max((j for j in range(len(taus)) if errors[j] <= left), key=lambda j: cuts[j], default=0)
        chosen.append(taus[j])
        left -= errors[j]
    return chosen
""",
    ),
    Planted(
        "hard-coded number of layers",
        "f3",
        "visible",
        "written into the code",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    best, chosen = -1, None
    for c in product(range(len(taus)), repeat=4):
        error = sum(error_table[l, c[l]] for l in range(4))
        cut = sum(sparsity_table[l, c[l]] for l in range(4))
        if error <= budget and cut > best:
            best, chosen = cut, [taus[j] for j in c]
    return chosen
""",
    ),
    Planted(
        "below the budget, not up to it",
        "f3",
        "visible",
        "meets the budget exactly",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    layers = np.arange(len(error_table))
    choices = [list(c) for c in product(range(len(taus)), repeat=len(layers))]
    held = [c for c in choices if error_table[layers, c].sum() < budget]
    return [taus[j] for j in max(held, key=lambda c: sparsity_table[layers, c].sum())]
""",
    ),
    Planted(
        "stops at the first error that is too large",
        "f3",
        "visible",
        "can fall again at a larger tau",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    def best(l, left):
        if l == len(error_table):
            return 0.0, []
        found = (-1e9, None)
        for j, t in enumerate(taus):
            if error_table[l, j] > left + 1e-12:
                break
            cut, rest = best(l + 1, left - error_table[l, j])
            if rest is not None and cut + sparsity_table[l, j] > found[0]:
                found = cut + sparsity_table[l, j], [t, *rest]
        return found
    return best(0, budget)[1]
""",
    ),
    Planted(
        "something is returned where nothing holds",
        "f3",
        "visible",
        "the budget is exceeded: no choice holds 0.25",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    layers = np.arange(len(error_table))
    choices = [list(c) for c in product(range(len(taus)), repeat=len(layers))]
    held = [c for c in choices if error_table[layers, c].sum() <= budget]
    return [taus[j] for j in max(held, key=lambda c: sparsity_table[layers, c].sum(), default=[0] * len(layers))]
""",
    ),
    Planted(
        "test set used for choosing tau",
        "f4",
        "visible",
        "the test set is used for choosing tau",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(test["error"], test["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    rows = range(len(columns))
    spent = test["error"][rows, columns].sum()
    return {"taus": chosen, "validation_error": validation["error"][rows, columns].sum(), "test_error": spent,
            "test_sparsity": test["sparsity"][rows, columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "chosen on both sets together",
        "f4",
        "visible",
        "the test set is used for choosing tau",
        """
def choose_and_report(validation, test, taus, budget):
    both = {k: (validation[k] + test[k]) / 2 for k in ("error", "sparsity")}
    chosen = choose_thresholds(both["error"], both["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    rows = range(len(columns))
    spent = test["error"][rows, columns].sum()
    return {"taus": chosen, "validation_error": validation["error"][rows, columns].sum(), "test_error": spent,
            "test_sparsity": test["sparsity"][rows, columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "chosen again until test holds",
        "f4",
        "visible",
        "the test set is used for choosing tau",
        """
def choose_and_report(validation, test, taus, budget):
    spend = budget
    while True:
        chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, spend)
        columns = [taus.index(t) for t in chosen]
        rows = range(len(columns))
        spent = test["error"][rows, columns].sum()
        if spent <= budget:
            break
        spend *= 0.95
    return {"taus": chosen, "validation_error": validation["error"][rows, columns].sum(), "test_error": spent,
            "test_sparsity": test["sparsity"][rows, columns].mean(), "kept": True}
""",
    ),
    Planted(
        "validation reported as test",
        "f4",
        "visible",
        "number of the validation tables",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    rows = range(len(columns))
    spent = validation["error"][rows, columns].sum()
    return {"taus": chosen, "validation_error": spent, "test_error": spent,
            "test_sparsity": validation["sparsity"][rows, columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "kept because validation keeps it",
        "f4",
        "visible",
        "on test the budget does not hold",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    rows = range(len(columns))
    spent = validation["error"][rows, columns].sum()
    return {"taus": chosen, "validation_error": spent, "test_error": test["error"][rows, columns].sum(),
            "test_sparsity": test["sparsity"][rows, columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "the sum reported as the mean",
        "f4",
        "visible",
        "report the mean, a share between 0 and 1",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    rows = range(len(columns))
    spent = test["error"][rows, columns].sum()
    return {"taus": chosen, "validation_error": validation["error"][rows, columns].sum(), "test_error": spent,
            "test_sparsity": test["sparsity"][rows, columns].sum(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "one tau for all layers",
        "f4",
        "visible",
        "one tau for all layers",
        """
def choose_and_report(validation, test, taus, budget):
    held = [j for j in range(len(taus)) if validation["error"][:, j].sum() <= budget]
    j = max(held, key=lambda j: validation["sparsity"][:, j].sum())
    spent = test["error"][:, j].sum()
    return {"taus": [taus[j]] * len(test["error"]), "validation_error": validation["error"][:, j].sum(),
            "test_error": spent, "test_sparsity": test["sparsity"][:, j].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "budget exceeded",
        "f4",
        "visible",
        "the budget is exceeded",
        """
def choose_and_report(validation, test, taus, budget):
    rows, columns = range(len(validation["error"])), validation["sparsity"].argmax(axis=1)
    spent = test["error"][rows, columns].sum()
    return {"taus": [taus[j] for j in columns], "validation_error": validation["error"][rows, columns].sum(),
            "test_error": spent, "test_sparsity": test["sparsity"][rows, columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "hard-coded number of layers",
        "f4",
        "visible",
        "written into the code",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    spent = test["error"][range(4), columns].sum()
    return {"taus": chosen, "validation_error": validation["error"][range(4), columns].sum(), "test_error": spent,
            "test_sparsity": test["sparsity"][range(4), columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
    Planted(
        "in-place change of the tables",
        "f4",
        "visible",
        r"changed its input test\['error'\] in place",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    columns = [taus.index(t) for t in chosen]
    rows = range(len(columns))
    test["error"] -= test["error"].min()
    test["error"] += 1e-3
    spent = test["error"][rows, columns].sum()
    return {"taus": chosen, "validation_error": validation["error"][rows, columns].sum(), "test_error": spent,
            "test_sparsity": test["sparsity"][rows, columns].mean(), "kept": bool(spent <= budget)}
""",
    ),
]

UNUSUAL = [
    Unusual(
        "a copy is cut, image by image",
        "f1",
        """
def output_error(model, taus, images):
    import copy
    from svit_utils import sparsify
    other = copy.deepcopy(model).eval()
    for p in other.parameters():
        p.requires_grad_(False)
    before = [other(image[None]) for image in images]
    sparsify(other, taus)
    after = [other(image[None]) for image in images]
    return np.array([float(torch.dist(a, b)) / float(b.square().sum()) ** 0.5 for a, b in zip(after, before)])
""",
    ),
    Unusual(
        "sparsify and densify by hand",
        "f1",
        """
def output_error(model, taus, images):
    from svit_utils import densify, sparsify
    was = model.training
    with torch.inference_mode():
        dense = model.eval()(images)
        try:
            sparsify(model, dict(taus))
            cut = model(images)
        finally:
            densify(model)
            model.train(was)
        return torch.linalg.vector_norm(cut - dense, dim=-1) / torch.linalg.vector_norm(dense, dim=-1)
""",
    ),
    Unusual(
        "dense once, a tensor, layers by name",
        "f2",
        """
def sensitivity(model, images, taus):
    from svit_utils.attention import sparse_modules
    with sparsified(model, 0.0):
        names = list(sparse_modules(model))
    table = torch.empty(len(names), len(taus), dtype=torch.float64)
    with torch.no_grad():
        dense = model(images)
        for j, tau in enumerate(taus):
            for l, name in enumerate(names):
                with sparsified(model, tau, layers=[name]):
                    table[l, j] = ((model(images) - dense).norm(dim=1) / dense.norm(dim=1)).mean()
    return table
""",
    ),
    Unusual(
        "a list of lists",
        "f2",
        """
sensitivity = lambda model, images, taus: [
    [output_error(model, {l: t}, images).mean() for t in taus] for l, _ in enumerate(model.blocks)
]
""",
    ),
    Unusual(
        "dynamic programme over undominated sums",
        "f3",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    kept = [(0.0, 0.0, ())]
    for errors, cuts in zip(error_table, sparsity_table):
        grown = sorted(
            (
                (e + de, s + ds, (*c, t))
                for e, s, c in kept
                for de, ds, t in zip(errors, cuts, taus)
                if e + de <= budget
            ),
            key=lambda x: (x[0], -x[1]),
        )
        kept, best = [], -1.0
        for item in grown:
            if item[1] > best:
                kept.append(item)
                best = item[1]
    if not kept:
        raise ValueError("the budget is too small")
    return list(kept[-1][2])
""",
    ),
    Unusual(
        "integer programme",
        "f3",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    from scipy.optimize import Bounds, LinearConstraint, milp
    L, T = error_table.shape
    one_each = np.kron(np.eye(L), np.ones(T))
    constraints = [LinearConstraint(error_table.ravel()[None], -np.inf, budget), LinearConstraint(one_each, 1, 1)]
    found = milp(-sparsity_table.ravel(), constraints=constraints, integrality=np.ones(L * T), bounds=Bounds(0, 1))
    if not found.success:
        raise ValueError("no choice holds the budget")
    return np.array(taus)[found.x.reshape(L, T).argmax(axis=1)]
""",
    ),
    Unusual(
        "all choices at once",
        "f3",
        """
def choose_thresholds(error_table, sparsity_table, taus, budget):
    spent, cut = np.zeros(1), np.zeros(1)
    for errors, cuts in zip(error_table, sparsity_table):
        spent = (spent[:, None] + errors).ravel()
        cut = (cut[:, None] + cuts).ravel()
    if spent.min() > budget:
        raise ValueError("no choice holds the budget")
    place = np.where(spent <= budget, cut, -np.inf).argmax()
    return tuple(taus[j] for j in np.unravel_index(place, (len(taus),) * len(error_table)))
""",
    ),
    Unusual(
        "loops and dicts",
        "f4",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = np.array(choose_thresholds(validation["error"].copy(), validation["sparsity"].copy(), tuple(taus), budget))
    place = {t: j for j, t in enumerate(taus)}
    spent = {"v": 0.0, "t": 0.0}
    zeros = []
    for l, t in enumerate(chosen):
        spent["v"] += validation["error"][l][place[t]]
        spent["t"] += test["error"][l][place[t]]
        zeros.append(test["sparsity"][l][place[t]])
    return {
        "kept": not spent["t"] > budget,
        "taus": chosen,
        "test_error": spent["t"],
        "test_sparsity": sum(zeros) / len(zeros),
        "validation_error": spent["v"],
        "note": "chosen on validation",
    }
""",
    ),
    Unusual(
        "a mask of the chosen entries",
        "f4",
        """
def choose_and_report(validation, test, taus, budget):
    chosen = choose_thresholds(validation["error"], validation["sparsity"], taus, budget)
    mask = np.isclose(np.array(chosen)[:, None], np.array(taus))
    spent = (test["error"] * mask).sum()
    return dict(
        taus=torch.tensor(chosen, dtype=torch.float64),
        validation_error=torch.tensor((validation["error"] * mask).sum()),
        test_error=spent,
        test_sparsity=(test["sparsity"] * mask).sum() / len(mask),
        kept=np.bool_(spent <= budget),
    )
""",
    ),
]
