"""Assignment d: fine-tune two arms and compare them fairly. What is checked, and the hints."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import optimize, stats
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from svit_course.judging import Mistake, array, close, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention import sparse_modules, sparsify
from svit_utils.referee import mean_interval, paired_bootstrap, student_interval
from svit_utils.training import tau_factor

Note = dict[str, Any]

# ------------------------------------------------------------------------------------------ d1: two arms, one start

CLASSES, TESTED = 4, 10


class _Watched(VisionTransformer):
    """Notes each forward pass in a list that copies of the model share."""

    diary: ClassVar[list[Note]] = []
    models: ClassVar[list[VisionTransformer]] = []  # kept, so that no two have the same id

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not any(self is model for model in _Watched.models):
            _Watched.models.append(self)
        taus = [float(module.threshold(x.shape[0]).max()) for module in sparse_modules(self).values()]
        _Watched.diary.append(
            {
                "who": next(i for i, model in enumerate(_Watched.models) if self is model),
                "tau": max(taus, default=0.0),
                "sparse": bool(taus),
                "training": self.training,
                "learning": torch.is_grad_enabled(),
                "pictures": x[:, 0, 0, 0].detach().clone(),  # random numbers: they tell which pictures these are
                "weights": _flat(self),
            }
        )
        return super().forward(x, *args, **kwargs)


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])  # a new tensor


def _small(case: Case, kind: type[VisionTransformer] = VisionTransformer) -> VisionTransformer:
    """N = 17 tokens, one block, two heads, float64; attention that is not flat, so that the cut cuts."""
    with torch.random.fork_rng(devices=[]):
        model = kind(img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=2, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(case["data"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def _pictures(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [n, 3, 8, 8] and labels [n] to train on, images [TESTED, 3, 8, 8] to answer."""
    generator = torch.Generator().manual_seed(case["data"] + 1)
    images = torch.randn(case["n"] + TESTED, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (case["n"],), generator=generator)
    return images[:-TESTED], labels, images[-TESTED:]


def _steps_asked(case: Case) -> list[int]:
    return [0, 1, 2, *range(3, case["steps"] + 3)]


def _run(case: Case, fine_tune: Any, seed: int, luck: int) -> Seen:
    """One call, with the global generators in a state of their own."""
    start, (images, labels, test_images) = _small(case, _Watched), _pictures(case)
    before = [images.clone(), labels.clone(), test_images.clone()]
    _Watched.diary.clear()
    _Watched.models.clear()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(luck)
            np.random.seed(luck)  # noqa: NPY002
            settings = {name: case[name] for name in ("tau", "ramp", "steps", "batch_size", "lr")}
            result = fine_tune(start, images, labels, test_images, **settings, seed=seed)
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong("fine_tune should return two tensors, the answers of the dense and of the sparse arm")
    notes = list(_Watched.diary)
    _Watched.diary.clear()
    _Watched.models.clear()
    same = [torch.equal(x, y) for x, y in zip(before, (images, labels, test_images), strict=True)]
    return {
        "dense": result[0],
        "sparse": result[1],
        "notes": notes,
        "start": _flat(start),
        "start_sparse": len(sparse_modules(start)),
        "changed": [n for n, kept in zip(("images", "labels", "test_images"), same, strict=True) if not kept],
    }


def _probe_arms(case: Case, tau_at: Any, fine_tune: Any) -> Seen:
    taus = [tau_at(step, case["tau"], case["ramp"]) for step in _steps_asked(case)]
    runs = [_run(case, fine_tune, seed, luck) for seed, luck in ((case["seed"], 1), (case["seed"], 2), (99, 1))]
    again = [[note["pictures"] for note in run["notes"]] for run in runs[1:]]
    return {"taus": taus, **runs[0], "again": again[0], "other_seed": again[1]}


def _schedule(case: Case, steps: Any) -> np.ndarray:
    return np.array([case["tau"] * tau_factor(step, case["ramp"]) for step in steps])


def _judge_schedule(case: Case, seen: Seen) -> None:
    steps, tau, ramp = np.array(_steps_asked(case)), case["tau"], case["ramp"]
    got = seen["taus"]
    if any(value is None for value in got):
        raise Wrong("tau_at returns None for some step: does it end without `return`?")
    part, long = steps / max(ramp, 1), steps / max(case["steps"], 1)
    mistakes: list[Mistake] = [
        (np.full(len(steps), tau), "tau_at gives the whole tau at step 0: there is no warm-up. It rises from 0"),
        (tau * np.minimum(1, (steps + 1) / max(ramp, 1)), "tau_at is a step ahead: step 0 gets tau = 0, not tau/ramp"),
        (tau * part, "tau_at does not stop at tau: beyond the ramp it goes on rising. min(1, step / ramp)"),
        (
            np.where(steps < ramp, 0.0, tau),
            "tau_at jumps from 0 to tau at the end of the ramp: it should rise in between",
        ),
        (tau * np.minimum(1, long), "tau_at reaches tau at the end of the run: the ramp ends at step `ramp`"),
        (np.minimum(1, part), "tau_at returns the share of tau; multiply it by tau"),
        (np.zeros(len(steps)), "tau_at returns 0 at every step: is step // ramp meant to be step / ramp?"),
    ]
    compare(np.array(got, dtype=float), _schedule(case, steps), "tau_at", mistakes, rtol=1e-9, atol=1e-12)


def _two_arms(case: Case, seen: Seen) -> tuple[list[Note], list[Note]]:
    """The notes of the dense and of the sparse arm, training and answering."""
    notes = [note for note in seen["notes"] if len(note["pictures"])]
    trained = {note["who"] for note in notes if _learns(case, note)}
    if not trained:
        raise Wrong("no picture of `images` came through the model with gradients on: is anything trained?")
    if len(trained) == 1:  # one model for both, told apart by the cut
        groups = [[note for note in notes if note["sparse"] == sparse] for sparse in (False, True)]
    else:
        groups = [[note for note in notes if note["who"] == who] for who in sorted(trained)]
    if len(groups) != 2 or not all(any(_learns(case, note) for note in group) for group in groups):
        if not any(note["sparse"] for note in notes):
            raise Wrong("attention is never cut: call sparsify on the sparse arm's model before its steps")
        raise Wrong(f"two arms should be trained, a dense and a sparse one; {len(trained)} model(s) were")
    groups.sort(key=lambda group: max(note["tau"] for note in group if _learns(case, note)))
    dense, sparse = groups
    if max(note["tau"] for note in dense if _learns(case, note)) > 0:
        raise Wrong(
            "both arms are cut: sparsify changes the model that it is given, in place. Leave the dense arm alone"
        )
    if max(note["tau"] for note in sparse if _learns(case, note)) == 0:
        raise Wrong("attention is not cut in training, in neither arm: sparsify(model, tau_at(...)) before each step")
    return dense, sparse


def _which(case: Case, note: Note) -> np.ndarray:
    """Indices of the pictures of a note: 0 to n - 1 to train on, n and up to be answered; -1 is unknown."""
    images, _, test_images = _pictures(case)
    known = torch.cat([images, test_images])[:, 0, 0, 0].numpy()
    same = known[None] == np.asarray(note["pictures"])[:, None]  # [batch, n + TESTED]
    return np.where(same.any(1), same.argmax(1), -1)


def _learns(case: Case, note: Note) -> bool:
    which = _which(case, note)
    return bool(note["learning"] and (which >= 0).all() and (which < case["n"]).all())


def _batches(case: Case, arm: list[Note], name: str) -> np.ndarray:
    """[steps, batch_size], which pictures each step of the arm saw."""
    seen = [_which(case, note) for note in arm if _learns(case, note)]
    if len(seen) != case["steps"]:
        raise Wrong(f"the {name} arm makes {len(seen)} steps, and should make {case['steps']}")
    if any(len(batch) != case["batch_size"] for batch in seen):
        raise Wrong(f"a batch of the {name} arm holds {len(seen[0])} pictures, and should hold {case['batch_size']}")
    return np.stack(seen)


def _judge_order(case: Case, seen: Seen, dense: list[Note], sparse: list[Note]) -> None:
    first, second = _batches(case, dense, "dense"), _batches(case, sparse, "sparse")
    if not np.array_equal(first, second):
        told = f"the first batch is {first[0].tolist()} in the dense arm, {second[0].tolist()} in the sparse one"
        raise Wrong(
            f"the arms see other batches, or the same in another order ({told}): then luck is compared, too. Give each "
            "arm a generator of its own, seeded with `seed`; one that both share goes on where the first arm left it"
        )
    if case["steps"] > 1 and (first == first[0]).all():
        raise Wrong("every step sees the same pictures: draw a batch in each step, from all of `images`")
    pictures = [np.asarray(note["pictures"]) for note in seen["notes"]]
    if not _same_lists(pictures, seen["again"]):
        raise Wrong(
            "two calls with the same seed see other batches: draw them from a generator seeded with `seed`, "
            "torch.Generator().manual_seed(seed)"
        )
    if _same_lists(pictures, seen["other_seed"]):
        raise Wrong("another seed gives the same batches: is `seed` used?")


def _same_lists(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _judge_starts(case: Case, seen: Seen, dense: list[Note], sparse: list[Note]) -> None:
    start = _flat(_small(case)).numpy()
    for name, arm, which, other in (("sparse", sparse, "dense", dense), ("dense", dense, "sparse", sparse)):
        begin = next(note["weights"] for note in arm if _learns(case, note))
        if np.array_equal(begin, start):
            continue
        if close(begin, other[-1]["weights"], 0, 3 * case["lr"]):  # a last step may not be in the notes
            raise Wrong(
                f"the {name} arm starts from the weights with which the {which} one ended, so it has had twice the "
                "training. Train a copy of `start` in each arm: copy.deepcopy(start)"
            )
        raise Wrong(f"the {name} arm does not start from the weights of `start`: copy.deepcopy(start) keeps them")
    if seen["start_sparse"] or not np.array_equal(seen["start"], start):
        raise Wrong(
            "it changed its input start in place: the caller still needs it. Train a copy, copy.deepcopy(start)"
        )


def _judge_cut(case: Case, sparse: list[Note]) -> None:
    got, expected = np.array([n["tau"] for n in sparse if _learns(case, n)]), _schedule(case, range(case["steps"]))
    tau, late = case["tau"], np.concatenate([[0.0], expected[:-1]])
    mistakes: list[Mistake] = [
        (
            np.full(case["steps"], tau),
            "the sparse arm trains at the whole tau from step 0, tau jumps at once: set tau_at(step, "
            "...) before each step",
        ),
        (
            np.full(case["steps"], expected[min(1, case["steps"] - 1)]),
            "the sparse arm's tau does not rise: set it in each step",
        ),
        (np.append(expected[1:], tau), "the sparse arm's tau is a step ahead: step 0 gets tau_at(0)"),
        (late, "the sparse arm's tau is a step behind: set tau_at(step) before the forward pass of that step"),
    ]
    compare(got, expected, "the tau in force in the sparse arm", mistakes, rtol=1e-5, atol=1e-8)


def _gradient(case: Case, note: Note) -> np.ndarray:
    """Of the cross-entropy of the note's batch, at the note's weights and tau."""
    model, (images, labels, _) = _small(case), _pictures(case)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(np.array(note["weights"])), model.parameters())
    if note["tau"] > 0:
        sparsify(model, note["tau"])
    which = torch.from_numpy(_which(case, note))
    gradients = torch.autograd.grad(F.cross_entropy(model(images[which]), labels[which]), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).numpy()


def _judge_updates(case: Case, arm: list[Note], name: str) -> None:
    """Each recorded change of the weights against AdamW's formula (Loshchilov and Hutter 2019), torch's defaults."""
    learning = [note for note in arm if _learns(case, note)]
    if not all(note["training"] for note in learning):
        raise Wrong(f"the {name} arm trains in eval mode, where dropout would be off: model.train() before the steps")
    after = [note["weights"] for note in learning[1:]] + [arm[-1]["weights"]]
    lr, size = case["lr"], len(learning[0]["weights"])
    mean, square, piled_mean, piled_square, piled = (np.zeros(size) for _ in range(5))
    for t, (note, got) in enumerate(zip(learning, after, strict=True), 1):
        w, g = note["weights"], _gradient(case, note)
        piled = piled + g
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        piled_mean, piled_square = 0.9 * piled_mean + 0.1 * piled, 0.999 * piled_square + 0.001 * piled**2

        def moved(m: np.ndarray, v: np.ndarray, t: int = t, w: np.ndarray = w) -> np.ndarray:
            step: np.ndarray = lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            return step

        plain, decay = w - moved(mean, square), 0.01 * lr * w
        if close(got, plain - decay, 0, 2e-3 * lr):
            continue
        reasons: list[Mistake] = [
            (w, f"the weights of the {name} arm stay what they were in step {t - 1}: is optimiser.step() called?"),
            (w - moved(piled_mean, piled_square) - decay, "gradients pile up over the steps: optimiser.zero_grad()"),
            (
                w - lr * g / (np.abs(g) + 1e-8) - decay,
                "the optimiser forgets: make it once, before the loop, not in each step",
            ),
            (plain, "without weight decay: the question asks for torch.optim.AdamW, with its defaults"),
            (w - lr * g, "this is plain gradient descent: the question asks for torch.optim.AdamW(parameters, lr=lr)"),
        ]
        for candidate, sentence in reasons:
            if close(got, candidate, 0, 2e-3 * lr):
                raise Wrong(sentence)
        raise Wrong(
            f"step {t - 1} of the {name} arm is not one of AdamW at the constant rate lr, on the cross-entropy of its "
            "batch: are labels and images taken with the same indices, and nothing clipped or scheduled?"
        )


def _judge_answers(case: Case, seen: Seen, arm: list[Note], name: str, other: str) -> None:
    last = arm[-1]
    answering = [note for note in arm if (_which(case, note) >= case["n"]).all()]
    if not answering or _learns(case, last):
        raise Wrong(f"the {name} arm's trained model is not asked about test_images")
    if any(note["training"] for note in answering):
        raise Wrong(f"the {name} arm answers in train mode, where dropout is active: model.eval() before test_images")
    expected_tau = case["tau"] if name == "sparse" else 0.0
    if not close(last["tau"], expected_tau, 1e-5, 1e-8):
        raise Wrong(
            f"the {name} arm answers at tau = {last['tau']:.4g}, and should be judged at {expected_tau:g}: put "
            "the whole tau "
            "in force before test_images, also where the ramp has not come to its end"
        )
    model, (_, _, test_images) = _small(case), _pictures(case)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(np.array(last["weights"])), model.parameters())
    if expected_tau:
        sparsify(model, expected_tau)
    with torch.no_grad():
        expected = model(test_images).numpy()
    got = array(seen, name, f"the answers of the {name} arm")
    swapped = array(seen, other, f"the answers of the {other} arm")
    if got.shape == expected.shape and close(swapped, expected, 1e-6, 1e-8) and not close(got, expected, 1e-6, 1e-8):
        raise Wrong("the arms are in the wrong order: dense first, then sparse")
    mistakes: list[Mistake] = [
        (expected.argmax(-1), "the classes are returned; this question asks for the logits, [n_test, classes]"),
        (
            F.softmax(torch.from_numpy(expected), -1).numpy(),
            "probabilities are returned; this question asks for the logits",
        ),
    ]
    compare(got, expected, f"the logits of the {name} arm", mistakes, rtol=1e-6, atol=1e-8)


def _judge_arms(case: Case, seen: Seen) -> None:
    _judge_schedule(case, seen)
    if seen["changed"]:
        raise Wrong(f"it changed its input {', '.join(seen['changed'])} in place: the caller still needs it")
    dense, sparse = _two_arms(case, seen)
    _judge_starts(case, seen, dense, sparse)
    _judge_order(case, seen, dense, sparse)
    _judge_cut(case, sparse)
    for name, arm in (("dense", dense), ("sparse", sparse)):
        _judge_updates(case, arm, name)
    _judge_answers(case, seen, dense, "dense", "sparse")
    _judge_answers(case, seen, sparse, "sparse", "dense")


D1 = Question(
    name="d1",
    answers=("tau_at", "fine_tune"),
    cases=(
        {
            "what": "eight steps, a ramp over the first four",
            "data": 1,
            "n": 24,
            "tau": 0.08,
            "ramp": 4,
            "steps": 8,
            "batch_size": 6,
            "lr": 0.01,
            "seed": 0,
        },
        {
            "what": "no ramp at all",
            "data": 2,
            "n": 12,
            "tau": 0.07,
            "ramp": 0,
            "steps": 3,
            "batch_size": 4,
            "lr": 0.01,
            "seed": 1,
        },
    ),
    probe=_probe_arms,
    judge=_judge_arms,
    hints=(
        "Write one arm first. What of it has to be the same for the second: start, batches, optimiser's "
        "settings, number "
        "of steps. What differs is one line.",
        "Make everything anew in each arm: copy.deepcopy(start), torch.optim.AdamW on the copy's parameters, and "
        "torch.Generator().manual_seed(seed) for the batches. Then train(), the steps, eval(), the answers.",
        "for sparse in (False, True): ... In the sparse arm call sparsify(model, tau_at(step, tau, ramp)) before each "
        "forward pass (a model that is sparse already gets the new tau), and sparsify(model, tau) before test_images.",
    ),
    section="chapter 3, sections 3, 5 and 6, and chapter 4, section 4.1",
)

# ------------------------------------------------------------------------------------------ d2: the paired interval

_REFERENCE = 40_000  # resamples of the interval that answers are compared with


def _groups(case: Case) -> np.ndarray | None:
    """The group of each image [n], or None: labels with gaps, in no order, groups of different size."""
    if "groups" not in case:
        return None
    rng, m = np.random.default_rng(case["data"] + 1000), case["groups"]
    share = np.asarray(rng.gamma(3.0, 1.0, m))
    member = np.concatenate([np.arange(m), rng.choice(m, case["n"] - m, p=share / share.sum())])
    return np.asarray(rng.permutation(7 * np.arange(m) + 3)[rng.permutation(member)])


def _scores(case: Case) -> tuple[Any, Any]:
    """a and b [n]: scores that share the images' ease; ``right``: whether answers are right; ``skew``: a long tail.

    In groups, a's advantage is the group's, and grows with its size.
    """
    rng, n, groups = np.random.default_rng(case["data"]), case["n"], _groups(case)
    ease = rng.normal(0, case.get("ease", 1.0), n)
    if groups is not None:
        _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        case = {
            **case,
            "shift": case.get("shift", 0.0) + (rng.normal(0, 1, len(sizes)) + 0.7 * sizes / sizes.mean())[member],
        }
    if case.get("right"):
        chances = (1 / (1 + np.exp(-(ease + case.get("base", 1.5) + shift))) for shift in (case.get("shift", 0.0), 0.0))
        first, second = (rng.random(n) < chance for chance in chances)
        return first, second
    if case.get("skew"):
        return ease + rng.exponential(1.0, n) ** 3, ease
    return ease + case.get("shift", 0.0) + 0.6 * rng.standard_normal(n), ease + 0.6 * rng.standard_normal(n)


_NO_MINUS = re.compile(r"boolean subtract|with (?:two|a) bool tensor", re.IGNORECASE)


def _probe_paired(case: Case, paired_interval: Any) -> Seen:
    a, b = _scores(case)
    groups = _groups(case)
    more = () if groups is None else (groups,)
    numpy_state = np.random.get_state()  # noqa: NPY002
    seen: Seen = {}
    try:
        with torch.random.fork_rng(devices=[]):
            for key, resamples, seed, luck in (
                ("interval", case["resamples"], case["seed"], 1),
                ("short", 200, case["seed"], 1),
                ("again", 200, case["seed"], 2),
                ("other_seed", 200, case["seed"] + 1, 1),
                ("one", 1, case["seed"], 1),
            ):
                torch.manual_seed(luck)
                np.random.seed(luck)  # noqa: NPY002
                seen[key] = paired_interval(a, b, resamples, seed, *more)
    except (TypeError, RuntimeError) as error:
        if not _NO_MINUS.search(str(error)):
            raise
        raise Wrong(
            "a and b may hold True and False, which are not subtracted from one another: convert them to float first. "
            "(`^` and logical_xor, which the error recommends, say *whether* the models differ, and not which is right)"
        ) from error
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
    return {**seen, "a": a, "b": b, "groups": groups}


def _pair(value: Any, what: str, names: str, count: int = 2) -> np.ndarray:
    """Plain numbers, as an array [count]."""
    if value is None:
        raise Wrong(f"{what} is None: does the function end without `return`?")
    try:
        numbers = np.asarray(value, dtype=float).reshape(-1) if not isinstance(value, str) else np.zeros(0)
    except (TypeError, ValueError):
        raise Wrong(f"{what} should be {count} numbers, {names}; not all that came are numbers") from None
    if len(numbers) != count:
        raise Wrong(f"{what} should be {count} numbers, {names}; it has {len(numbers)}")
    return numbers


def _ends(a: np.ndarray, b: np.ndarray, confidence: float, groups: np.ndarray | None = None) -> np.ndarray:
    settings: dict[str, Any] = {"confidence": confidence, "resamples": _REFERENCE, "seed": 12345}
    if groups is None:
        interval = paired_bootstrap(a, b, **settings)
        return np.array([interval.low, interval.high])
    sums, sizes = _by_group(a - b, groups)
    # A share q of the ratios is below t where a share q of the means of sums - t * sizes is below 0.
    ends = [
        optimize.brentq(
            lambda t, end=end: getattr(mean_interval(sums - t * sizes, **settings), end),
            (sums / sizes).min() - 1e-9,
            (sums / sizes).max() + 1e-9,
            xtol=1e-6,
        )
        for end in ("low", "high")
    ]
    return np.array(ends)


def _by_group(d: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    same = groups == np.unique(groups)[:, None]  # [m, n]
    return same @ d, same.sum(axis=1)


def _accepted(a: np.ndarray, b: np.ndarray, resamples: int, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Where low and high may lie: of ``resamples`` means, the share below the 2.5 % point is itself random.

    Its standard error is sqrt(0.025 * 0.975 / resamples); five of them, and the reference's own, as quantiles.
    """
    share = 5 * np.sqrt(0.025 * 0.975 * (1 / resamples + 1 / _REFERENCE))
    return _ends(a, b, 0.95 + 2 * share, groups), _ends(a, b, 0.95 - 2 * share, groups)


def _judge_paired(case: Case, seen: Seen) -> None:
    given = _scores(case)
    for name, before in zip("ab", given, strict=True):
        unchanged(before, seen[name], name)
    groups = _groups(case)
    if groups is not None:
        unchanged(groups, seen["groups"], "groups")
    a, b = (x.astype(float) for x in given)
    got = _pair(seen["interval"], "the interval", "low and high")
    n, d, resamples = len(a), a - b, case["resamples"]
    outer, inner = _accepted(a, b, resamples, groups)
    slack = 1e-9
    fits = outer[0] - slack <= got[0] <= inner[0] + slack and inner[1] - slack <= got[1] <= outer[1] + slack
    if not fits:
        raise Wrong(_why_not(got, a, b, resamples, groups))
    short = _pair(seen["short"], "the interval", "low and high")
    if not np.array_equal(short, _pair(seen["again"], "the interval", "low and high")):
        raise Wrong("two calls with the same seed give two intervals: draw from np.random.default_rng(seed)")
    if not case.get("right") and np.array_equal(short, _pair(seen["other_seed"], "the interval", "low and high")):
        raise Wrong("another seed gives the same interval to the last digit: are `seed`, and chance, used at all?")
    one = _pair(seen["one"], "the interval of one resample", "low and high")
    if not close(one[0], one[1], 1e-9, 1e-12):
        raise Wrong(
            "one resample has one mean, so resamples=1 should give low = high: is it a bootstrap, and `resamples` used?"
        )
    if close(one[0], d.mean(), 0, 1e-12) and np.ptp(d) > 0 and n > 30 and not case.get("right"):
        raise Wrong(
            "the interval is built around the mean, with resamples=1 it is the mean itself: 1.96 standard "
            "errors to both "
            "sides are no percentiles. Take the 2.5 % and the 97.5 % point of the resampled means"
        )


def _why_not(got: np.ndarray, a: np.ndarray, b: np.ndarray, resamples: int, groups: np.ndarray | None) -> str:
    """The mistake whose interval lies nearest to ``got``, near enough to be named."""
    d, n = a - b, len(a)
    mean, error = float(d.mean()), float(d.std() / np.sqrt(n))
    sides = np.array([-1.0, 1.0])
    right, z = _ends(a, b, 0.95, groups), stats.norm.ppf(0.975)
    apart = float(np.sqrt((a.var() + b.var()) / n))
    if np.isnan(got).any():
        return "the interval is NaN" + ("" if groups is None else ": the labels of the groups may be any whole numbers")
    if got[0] > got[1]:
        return "the first number should be the lower end, the second the upper one"
    if np.ptp(got) < 1e-12:
        return "the interval has width 0: draw the images *with* replacement; in a permutation the mean never changes"
    paired = "one draw of indices per resample, used for a and for b"
    candidates: list[Mistake] = [
        (
            mean + z * apart * sides,
            f"{np.ptp(got):.3g} wide where {np.ptp(right):.3g} is right: that is the *unpaired* bootstrap, which draws "
            f"the images of a and of b apart. Both answered the same images: {paired}",
        ),
        (_ends(a, b, 0.90), "that is the 90 % interval: 95 % leave 2.5 % out at each end, not 5 %"),
        (_ends(a, b, 0.9995), "far too wide: np.percentile wants 2.5 and 97.5, np.quantile 0.025 and 0.975"),
        (
            mean + error * sides,
            "mean plus and minus one standard error covers 68 %, and is no bootstrap: take percentiles",
        ),
        (
            mean + z * error * sides,
            "that is the mean plus and minus 1.96 standard errors, the same on both sides. The "
            "bootstrap's percentiles follow the skewness: take the 2.5 % and the 97.5 % point of the resampled means",
        ),
        (
            mean + z * d.std() * sides,
            "that is the spread of single images: take the percentiles of the resampled *means*",
        ),
        (
            np.quantile(d, [0.025, 0.975]),
            "these are percentiles of the images' differences: take those of resampled means",
        ),
        (a.mean() + z * a.std() / np.sqrt(n) * sides, f"that is the interval of a alone: resample a - b, {paired}"),
        (b.mean() + z * b.std() / np.sqrt(n) * sides, f"that is the interval of b alone: resample a - b, {paired}"),
        (-right[::-1], "that is the interval of b - a: the question asks for a - b"),
        (
            _ends(np.abs(d), np.zeros(n), 0.95),
            "that is the interval of |a - b|, which says whether the models differ and not which is better: keep the "
            "sign (of right and wrong, as floats, 1 - 0 = 1 and 0 - 1 = -1; `^` loses it)",
        ),
        (100 * right, "a hundred times too large: return a - b itself; percentage points are for the plot"),
        (right - mean, "the interval lies around 0: the mean of a - b is not taken off"),
        (
            mean + z * error * np.sqrt(n / resamples) * sides,
            "each resample draws `resamples` images: it should draw n, as "
            "many as there are; `resamples` says how often",
        ),
    ]
    if groups is not None:  # the cases before this one have none, and look for the mistakes above
        candidates = _group_mistakes(a, b, groups)
    scale = [np.abs(got - candidate).max() / np.ptp(candidate) for candidate, _ in candidates]
    nearest = int(np.argmin(scale))
    if scale[nearest] < 0.06:
        return candidates[nearest][1]
    if mean - 8 * np.ptp(right) < got[0] <= got[1] < right[0]:
        return (
            f"[{got[0]:.4g}, {got[1]:.4g}] lies below the lower end of the right interval, {right[0]:.4g}, as a whole: "
            "np.percentile counts in per cent, 2.5 and 97.5; 0.025 and 0.975 are for np.quantile"
        )
    return (
        f"the interval is [{got[0]:.4g}, {got[1]:.4g}] and should be [{right[0]:.4g}, {right[1]:.4g}], give or "
        "take what "
        f"{resamples} resamples leave to chance"
    )


def _group_mistakes(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> list[Mistake]:
    d, n = a - b, len(a)
    sums, sizes = _by_group(d, groups)
    m, mean = len(sums), d.mean()
    alone = mean_interval(sums / sizes)
    fixed = mean_interval(sums * m / n)
    spread = [d[groups == g].std() for g in np.unique(groups)]
    error = float(np.sqrt(np.square(sums - mean * sizes).sum())) / n  # of a ratio, to first order
    normal = stats.norm.ppf(0.975) * np.array([-1.0, 1.0])
    there = (
        np.random.default_rng(1).random((20_000, m)) < 1 - (1 - 1 / m) ** m
    )  # each with the chance to be drawn at all
    some = there[there.any(axis=1)]
    once = np.quantile((some @ sums) / (some @ sizes), [0.025, 0.975])
    within = float(np.sqrt((sizes * np.square(spread)).sum())) / n
    return [
        (
            _ends(a, b, 0.95),
            "that is the interval for images drawn one by one: `groups` is not used. Images of a group stay together; "
            "draw groups, and each brings all its images",
        ),
        (
            np.array([alone.low, alone.high]),
            "a small group counts as much as a large one: take the mean over all the *images* that were drawn, not the "
            "mean of the groups' means",
        ),
        (
            np.array([fixed.low, fixed.high]),
            f"the sum over the drawn images is divided by n = {n} each time: divide by how many images were drawn, "
            "which changes from resample to resample",
        ),
        (
            once,
            "a group that is drawn twice counts once (a set, or `in`, forgets how often): it brings its images twice",
        ),
        (
            mean + normal * within,
            "images are drawn within each group, so every group is always there: the groups themselves are drawn",
        ),
        (
            mean + normal * error * np.sqrt(m / n),
            f"each resample draws n = {n} groups: draw as many groups as there are, m = {m}",
        ),
    ]


D2 = Question(
    name="d2",
    answers=("paired_interval",),
    cases=(
        {"what": "scores of 200 images", "data": 3, "n": 200, "shift": 0.3, "resamples": 10000, "seed": 0},
        {
            "what": "right answers (bool) on 500 images",
            "data": 4,
            "n": 500,
            "right": True,
            "ease": 3.0,
            "shift": -0.8,
            "resamples": 2000,
            "seed": 5,
        },
        {
            "what": "20 images, one much unlike the others",
            "data": 6,
            "n": 20,
            "skew": True,
            "resamples": 10000,
            "seed": 1,
        },
        {"what": "150 images in 24 groups", "data": 7, "n": 150, "groups": 24, "resamples": 4000, "seed": 2},
    ),
    probe=_probe_paired,
    judge=_judge_paired,
    hints=(
        "Which images does a resample hold? Draw indices, n of n with replacement, and look both models' answers up. "
        "In groups, what is drawn is a group.",
        "Take the difference of each image first, d = a - b as floats (bool cannot be subtracted). Then a resample is "
        "d[indices].mean(), and pairing comes by itself.",
        "np.random.default_rng(seed).integers(0, n, (resamples, n)) are all the indices; d[indices].mean(axis=1) is "
        "one mean for each resample; np.quantile(means, [0.025, 0.975]) is the answer. With groups: the sum and the "
        "size of each group first, then draw m of m groups, and divide the sum of the drawn sums by that of the sizes.",
    ),
    section="chapter 4, section 4.1 (the groups are this question's own)",
)

# ------------------------------------------------------------------------------------------ d3: over the seeds


def _differences(case: Case) -> np.ndarray:
    """Right answers of one model minus the other's, [S, n]: -1, 0 or 1, with luck from seed to seed."""
    rng, shape = np.random.default_rng(case["data"]), (case["seeds"], case["n"])
    ease, luck = rng.normal(1.5, 2.0, case["n"]), rng.normal(0, case.get("luck", 0.4), (case["seeds"], 1))
    a = rng.random(shape) < 1 / (1 + np.exp(-(ease + case.get("shift", -0.6) + luck)))
    b = rng.random(shape) < 1 / (1 + np.exp(-ease))
    return a.astype(float) - b


def _probe_seeds(case: Case, interval_over_seeds: Any) -> Seen:
    differences = _differences(case)
    try:
        with np.errstate(all="ignore"):
            result = interval_over_seeds(differences)
    except ValueError as error:
        if case["seeds"] > 1:
            raise
        return {"refused": str(error), "differences": differences}
    return {"interval": result, "differences": differences}


def _judge_seeds(case: Case, seen: Seen) -> None:
    d = _differences(case)
    unchanged(d, seen["differences"], "differences")
    runs, n = d.shape
    if runs == 1:
        if "refused" not in seen:
            raise Wrong(
                "one seed says nothing about the spread between seeds: raise ValueError, instead of a number or NaN"
            )
        return
    got = _pair(seen["interval"], "the result", "mean, low and high", 3)
    means = d.mean(axis=1)
    mean, spread, root = float(means.mean()), float(means.std(ddof=1)), float(np.sqrt(runs))
    t, z = float(stats.t.ppf(0.975, runs - 1)), float(stats.norm.ppf(0.975))
    expected = student_interval(means)

    def around(half: float) -> np.ndarray:
        return np.array([mean, mean - half, mean + half])

    small = spread * np.sqrt((runs - 1) / runs)
    every = student_interval(d.ravel())
    images = student_interval(d.mean(axis=0))
    few = f"with {runs} seeds the factor is Student's t = {t:.2f}, not the normal {z:.2f}: three runs say little about "
    few += "their own spread. stats.t.ppf(0.975, S - 1)"
    pooled = (
        "the images are taken for seeds: average over the images of each seed first, axis=1, and take the S means as "
    )
    pooled += "the data"
    mistakes: list[Mistake] = [
        (around(z * spread / root), few),
        (around(1.96 * spread / root), few),
        (around(2 * spread / root), few),
        (
            around(t * small / root),
            f"the spread is divided by S, not by S - 1: np.std has ddof=0 unless told; with {runs} "
            f"seeds that is {100 * (1 - small / spread):.0f} % too small. ddof=1",
        ),
        (around(z * small / root), f"two things: ddof=1 in the standard deviation; and {few}"),
        (around(t * spread / runs), "the standard deviation is divided by S: the standard error has sqrt(S)"),
        (around(t * spread), "that is the spread of single seeds: the mean's standard error is smaller, s / sqrt(S)"),
        (
            around(t * spread / np.sqrt(n)),
            "divided by the root of the number of images: S seeds are the data here, sqrt(S)",
        ),
        (around(t * spread / np.sqrt(n * runs)), "divided by sqrt(S n): the images are no further seeds, sqrt(S)"),
        (
            around(float(stats.t.ppf(0.975, runs)) * spread / root),
            "t with S degrees of freedom: the mean has used one up, S - 1",
        ),
        (
            around(float(stats.t.ppf(0.95, runs - 1)) * spread / root),
            "that is 90 %: 95 % in the middle leave 2.5 % on each side, stats.t.ppf(0.975, S - 1)",
        ),
        (around(t * spread**2 / root), "the variance is used where the standard deviation belongs"),
        (np.array([every.mean, every.low, every.high]), pooled),
        (np.array([images.mean, images.low, images.high]), pooled),
        (around(z * float(d.std()) / np.sqrt(d.size)), pooled),
        (around(z * float(d.std(ddof=1)) / np.sqrt(d.size)), pooled),
        (np.array([expected.low, expected.mean, expected.high]), "the order is mean, low, high"),
        (np.array([mean, expected.high, expected.low]), "low comes before high"),
    ]
    compare(got, [expected.mean, expected.low, expected.high], "(mean, low, high)", mistakes, rtol=1e-7, atol=1e-10)


D3 = Question(
    name="d3",
    answers=("interval_over_seeds",),
    cases=(
        {"what": "three seeds, 300 images", "data": 1, "seeds": 3, "n": 300},
        {"what": "five seeds, 120 images", "data": 2, "seeds": 5, "n": 120},
    ),
    probe=_probe_seeds,
    judge=_judge_seeds,
    hints=(
        "How many numbers are the data? S, one per training run. Which axis holds the images?",
        "delta_s is the mean over the images of seed s. Then mean plus and minus t * s / sqrt(S), with the standard "
        "deviation s that divides by S - 1 (ddof=1).",
        "t = stats.t.ppf(0.975, S - 1): 12.7 for two seeds, 4.30 for three, 2.78 for five. For S < 2 raise ValueError.",
    ),
    section="chapter 4, section 4.2",
)

# ------------------------------------------------------------------------------------------ d4: choosing tau


def _tables(case: Case) -> tuple[dict[float, list[float]], dict[float, list[float]]]:
    validation = {float(tau): list(accuracies) for tau, accuracies, _ in case["rows"]}
    test = {float(tau): list(accuracies) for tau, _, accuracies in case["rows"]}
    return validation, test


def _probe_choice(case: Case, choose_tau: Any) -> Seen:
    validation, test = _tables(case)
    result = choose_tau(validation, test)
    return {"choice": result, "validation": list(validation.values()), "test": list(test.values())}


def _judge_choice(case: Case, seen: Seen) -> None:
    validation, test = _tables(case)
    for name, table in (("validation", validation), ("test", test)):
        if not _same_lists(seen[name], list(table.values())):
            raise Wrong(f"it changed its input {name} in place: the caller still needs it")
    choice = seen["choice"]
    if isinstance(choice, list) and len(choice) == 2 and isinstance(choice[1], list | np.ndarray):
        raise Wrong("the second value is a list, one accuracy per seed: return its mean, one number")
    got = _pair(choice, "the result", "the chosen tau and what it reports", 2)
    taus = np.array(list(validation))
    on_val, on_test = (np.array([np.mean(table[tau]) for tau in taus]) for table in (validation, test))
    single, best = (np.array([max(table[tau]) for tau in taus]) for table in (validation, test))
    tied = on_val == on_val.max()
    chosen = int(np.flatnonzero(taus == taus[tied].min())[0])
    top, runs = int(on_test.argmax()), validation[float(taus[chosen])]
    lucky = test[float(taus[chosen])][int(np.argmax(runs))]  # the test accuracy of the seed best on validation

    def row(i: int, reported: float | None = None) -> np.ndarray:
        return np.array([taus[i], on_test[i] if reported is None else reported])

    snoop = (
        f"tau = {taus[top]:g} is best on the *test* images, {100 * on_test[top]:.1f} %. They may not choose: choose on "
        "validation, then report what the chosen tau has on test"
    )
    mistakes: list[Mistake] = [
        (row(top), snoop),
        (row(top, on_val[top]), snoop),
        (row(int(best.argmax()), best.max()), snoop + ". And a single run is not the mean over seeds"),
        (
            row(chosen, on_test.max()),
            "the tau is chosen on validation, but the best test accuracy of all is reported: report "
            "the test accuracy of the chosen tau, whatever it is",
        ),
        (
            row(chosen, on_val[chosen]),
            "the validation accuracy is reported: it is too good, having chosen. Report test's",
        ),
        (row(chosen, best[chosen]), "the best seed on test is reported: report the mean over the seeds"),
        (
            row(chosen, lucky),
            "one seed's test accuracy is reported, of the one best on validation: report the mean over the seeds",
        ),
        *(
            (row(int(i)), "two taus tie on validation: take the smaller, which cuts less")
            for i in np.flatnonzero(tied)
            if i != chosen
        ),
        (
            row(int(single.argmax())),
            "chosen by the best single run: compare means over the seeds. A lucky seed is no merit",
        ),
        (row(int(on_val.argmin())), "the worst on validation is chosen"),
        (np.array([on_test[chosen], taus[chosen]]), "the order is tau, then its test accuracy"),
        (np.array([chosen, on_test[chosen]]), "that is the position of the tau in the table: return the tau itself"),
    ]
    compare(got, row(chosen), "(tau, test accuracy)", mistakes, rtol=1e-9, atol=1e-9)


D4 = Question(
    name="d4",
    answers=("choose_tau",),
    cases=(
        {
            "what": "validation and test disagree",
            "rows": [
                [0.0025, [0.950, 0.952, 0.951], [0.958, 0.957, 0.963]],
                [0.005, [0.960, 0.958, 0.959], [0.951, 0.955, 0.953]],
                [0.01, [0.895, 0.981, 0.890], [0.890, 0.921, 0.912]],
            ],
        },
        {"what": "a tie on validation", "rows": [[0.01, [0.75, 0.5], [0.5, 0.5]], [0.005, [0.5, 0.75], [0.5, 0.75]]]},
    ),
    probe=_probe_choice,
    judge=_judge_choice,
    hints=(
        "Two tables, two purposes. Which one may the function look at before it has chosen?",
        "The mean over the seeds for each tau in `validation`; the tau with the largest; the mean of test[that tau].",
        "max(sorted(validation), key=lambda tau: mean of validation[tau]): max keeps the first of equals, and "
        "sorted puts the "
        "smaller tau first. A dict may come in any order.",
    ),
    section="chapter 4, sections 4.2 (validation chooses, test reports) and 4.7",
)

QUESTIONS = (D1, D2, D3, D4)
