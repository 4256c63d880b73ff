"""d1: fine-tune a dense and a sparse model from one start, on the same batches, with a warm-up of tau.

The notes that `watched` takes of every forward pass are sorted into the two runs, and judged run by run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from svit_course.checks.d.shared import same_lists
from svit_course.checks.d.watched import Note, flat, learns, pictures, run, small, which
from svit_course.judging import Mistake, array, close, compare
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention import sparsify
from svit_utils.training import tau_factor

Run = list[Note]


def steps_asked(case: Case) -> list[int]:
    """The steps that tau_at is asked about: from 0 to beyond the end of the run."""
    return [0, 1, 2, *range(3, case["steps"] + 3)]


def probe(case: Case, tau_at: Any, fine_tune: Any) -> Seen:
    """The schedule; and three runs: one, the same with other luck, and one with another seed."""
    taus = [tau_at(step, case["tau"], case["ramp"]) for step in steps_asked(case)]
    runs = [run(case, fine_tune, seed, luck) for seed, luck in ((case["seed"], 1), (case["seed"], 2), (99, 1))]
    again, other_seed = ([note["pictures"] for note in run["notes"]] for run in runs[1:])
    return {"taus": taus, **runs[0], "again": again, "other_seed": other_seed}


def judge(case: Case, seen: Seen) -> None:
    """The schedule, then what a fair comparison needs: start, batches, the cut, the training, the answers."""
    judge_schedule(case, seen)
    if seen["changed"]:
        raise Wrong(f"it changed its input {', '.join(seen['changed'])} in place: the caller still needs it")
    dense, sparse = two_runs(case, seen)
    judge_starts(case, seen, dense, sparse)
    judge_order(case, seen, dense, sparse)
    judge_cut(case, sparse)
    judge_updates(case, dense, "dense")
    judge_updates(case, sparse, "sparse")
    judge_answers(case, seen, dense, "dense", "sparse")
    judge_answers(case, seen, sparse, "sparse", "dense")


# ------------------------------------------------------------------------------------------------ the schedule of tau


def schedule(case: Case, steps: Any) -> np.ndarray:
    """The tau of each step: the library's warm-up."""
    return np.array([case["tau"] * tau_factor(step, case["ramp"]) for step in steps])


def schedule_mistakes(case: Case) -> Iterator[Mistake]:
    """Taus of the steps asked."""
    steps, tau, ramp = np.array(steps_asked(case)), case["tau"], case["ramp"]
    part, long = steps / max(ramp, 1), steps / max(case["steps"], 1)
    full = np.full(len(steps), tau)
    yield full, "tau_at gives the full tau at step 0: there is no warm-up. It rises from 0"
    ahead = tau * np.minimum(1, (steps + 1) / max(ramp, 1))
    yield ahead, "tau_at is a step ahead: step 0 gets tau = 0, not tau/ramp"
    yield tau * part, "tau_at does not stop at tau: beyond the ramp it goes on rising. min(1, step / ramp)"
    jump = np.where(steps < ramp, 0.0, tau)
    yield jump, "tau_at jumps from 0 to tau at the end of the ramp: it should rise in between"
    yield tau * np.minimum(1, long), "tau_at reaches tau at the end of the run: the ramp ends at step `ramp`"
    yield np.minimum(1, part), "tau_at returns the share of tau; multiply it by tau"
    yield np.zeros(len(steps)), "tau_at returns 0 at every step: is step // ramp meant to be step / ramp?"


def judge_schedule(case: Case, seen: Seen) -> None:
    """tau rises from 0 at step 0 to the full tau at step ``ramp``."""
    got = seen["taus"]
    if any(value is None for value in got):
        raise Wrong("tau_at returns None for some step: does it end without `return`?")
    expected = schedule(case, steps_asked(case))
    compare(np.array(got, dtype=float), expected, "tau_at", schedule_mistakes(case), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------ the two runs


def two_runs(case: Case, seen: Seen) -> tuple[Run, Run]:
    """The notes of the dense and of the sparse run, training and answering."""
    notes = [note for note in seen["notes"] if len(note["pictures"])]
    trained = {note["who"] for note in notes if learns(case, note)}
    if not trained:
        raise Wrong("no picture of `images` came through the model with gradients on: is anything trained?")
    if len(trained) == 1:  # one model for both, told apart by the cut
        groups = [[note for note in notes if note["sparse"] == sparse] for sparse in (False, True)]
    else:
        groups = [[note for note in notes if note["who"] == who] for who in sorted(trained)]
    if len(groups) != 2 or not all(any(learns(case, note) for note in group) for group in groups):
        if not any(note["sparse"] for note in notes):
            raise Wrong("attention is never cut: call sparsify on the sparse model before its steps")
        raise Wrong(f"two models should be trained, a dense and a sparse one; it was {len(trained)}")

    def largest_tau(group: Run) -> float:
        return max(note["tau"] for note in group if learns(case, note))

    dense, sparse = sorted(groups, key=largest_tau)
    if largest_tau(dense) > 0:
        raise Wrong(
            "both models are cut: sparsify changes the model that it is given, in place. Leave the dense one alone"
        )
    if largest_tau(sparse) == 0:
        raise Wrong("attention is not cut in training, in neither run: sparsify(model, tau_at(...)) before each step")
    return dense, sparse


def judge_starts(case: Case, seen: Seen, dense: Run, sparse: Run) -> None:
    """Both begin with the weights of ``start``, which keeps them."""
    start = flat(small(case)).numpy()
    for name, mine, which_other, other in (("sparse", sparse, "dense", dense), ("dense", dense, "sparse", sparse)):
        begin = next(note["weights"] for note in mine if learns(case, note))
        if np.array_equal(begin, start):
            continue
        if close(begin, other[-1]["weights"], 0, 3 * case["lr"]):  # a last step may not be in the notes
            raise Wrong(
                f"the {name} run starts from the weights with which the {which_other} one ended, so it has had twice "
                "the training. Train a copy of `start` in each run: copy.deepcopy(start)"
            )
        raise Wrong(f"the {name} run does not start from the weights of `start`: copy.deepcopy(start) keeps them")
    if seen["start_sparse"] or not np.array_equal(seen["start"], start):
        raise Wrong(
            "it changed its input start in place: the caller still needs it. Train a copy, copy.deepcopy(start)"
        )


def batches(case: Case, notes: Run, name: str) -> np.ndarray:
    """[steps, batch_size], which pictures each step of the run saw."""
    found = [which(case, note) for note in notes if learns(case, note)]
    if len(found) != case["steps"]:
        raise Wrong(f"the {name} run makes {len(found)} steps, and should make {case['steps']}")
    if any(len(batch) != case["batch_size"] for batch in found):
        raise Wrong(f"a batch of the {name} run holds {len(found[0])} pictures, and should hold {case['batch_size']}")
    return np.stack(found)


def judge_order(case: Case, seen: Seen, dense: Run, sparse: Run) -> None:
    """Both see the same batches, which follow from the seed alone."""
    first, second = batches(case, dense, "dense"), batches(case, sparse, "sparse")
    if not np.array_equal(first, second):
        told = f"the first batch is {first[0].tolist()} in the dense run, {second[0].tolist()} in the sparse one"
        raise Wrong(
            f"the runs see other batches, or the same in another order ({told}): then luck is compared, too. Give each "
            "run a generator of its own, seeded with `seed`; one that both share goes on where the first run left it"
        )
    if case["steps"] > 1 and (first == first[0]).all():
        raise Wrong("every step sees the same pictures: draw a batch in each step, from all of `images`")
    shown = [np.asarray(note["pictures"]) for note in seen["notes"]]
    if not same_lists(shown, seen["again"]):
        raise Wrong(
            "two calls with the same seed see other batches: draw them from a generator seeded with `seed`, "
            "torch.Generator().manual_seed(seed)"
        )
    if same_lists(shown, seen["other_seed"]):
        raise Wrong("another seed gives the same batches: is `seed` used?")


# ------------------------------------------------------------------------------------------------ the training


def cut_mistakes(case: Case, expected: np.ndarray) -> Iterator[Mistake]:
    """Taus of the steps of the run."""
    tau, steps = case["tau"], case["steps"]
    at_once = "the sparse run trains at the full tau from step 0, tau jumps at once: set tau_at(step, ...) before each "
    yield np.full(steps, tau), at_once + "step"
    constant = np.full(steps, expected[min(1, steps - 1)])
    yield constant, "the sparse run's tau does not rise: set it in each step"
    yield np.append(expected[1:], tau), "the sparse run's tau is a step ahead: step 0 gets tau_at(0)"
    late = np.concatenate([[0.0], expected[:-1]])
    yield late, "the sparse run's tau is a step behind: set tau_at(step) before the forward pass of that step"


def judge_cut(case: Case, sparse: Run) -> None:
    """The tau in force in every step."""
    got, expected = np.array([n["tau"] for n in sparse if learns(case, n)]), schedule(case, range(case["steps"]))
    what = "the tau in force in the sparse run"
    compare(got, expected, what, cut_mistakes(case, expected), rtol=1e-5, atol=1e-8)


def gradient(case: Case, note: Note) -> np.ndarray:
    """Of the cross-entropy of the note's batch, at the note's weights and tau."""
    model, (images, labels, _) = small(case), pictures(case)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(np.array(note["weights"])), model.parameters())
    if note["tau"] > 0:
        sparsify(model, note["tau"])
    chosen = torch.from_numpy(which(case, note))
    gradients = torch.autograd.grad(F.cross_entropy(model(images[chosen]), labels[chosen]), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).numpy()


class Adam:
    """The step of AdamW without its weight decay (Loshchilov and Hutter 2019), with torch's defaults."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.mean = self.square = np.zeros(())  # running means of the gradient and of its square

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """What the weights lose, given this step's gradient."""
        self.t += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.t), self.square / (1 - 0.999**self.t)
        return np.asarray(self.lr * mean / (np.sqrt(square) + 1e-8))


def judge_updates(case: Case, notes: Run, name: str) -> None:
    """Each change of the weights is one of AdamW."""
    learning = [note for note in notes if learns(case, note)]
    if not all(note["training"] for note in learning):
        raise Wrong(f"the {name} run trains in eval mode, where dropout would be off: model.train() before the steps")
    after = [note["weights"] for note in learning[1:]] + [notes[-1]["weights"]]
    lr, adam, on_piled, piled = case["lr"], Adam(case["lr"]), Adam(case["lr"]), np.zeros(())
    for t, (note, got) in enumerate(zip(learning, after, strict=True)):
        w, g = note["weights"], gradient(case, note)
        piled = piled + g
        plain, with_piled, decay = w - adam.step(g), w - on_piled.step(piled), 0.01 * lr * w
        if close(got, plain - decay, 0, 2e-3 * lr):
            continue
        first_step = w - lr * g / (np.abs(g) + 1e-8)
        reasons: list[Mistake] = [
            (w, f"the weights of the {name} run stay what they were in step {t}: is optimiser.step() called?"),
            (with_piled - decay, "gradients pile up over the steps: optimiser.zero_grad()"),
            (first_step - decay, "the optimiser forgets: make it once, before the loop, not in each step"),
            (plain, "without weight decay: the question asks for torch.optim.AdamW, with its defaults"),
            (w - lr * g, "this is plain gradient descent: the question asks for torch.optim.AdamW(parameters, lr=lr)"),
        ]
        for candidate, sentence in reasons:
            if close(got, candidate, 0, 2e-3 * lr):
                raise Wrong(sentence)
        raise Wrong(
            f"step {t} of the {name} run is not one of AdamW at the constant rate lr, on the cross-entropy of its "
            "batch: are labels and images taken with the same indices, and nothing clipped or scheduled?"
        )


# ------------------------------------------------------------------------------------------------ the answers


def judge_answers(case: Case, seen: Seen, notes: Run, name: str, other: str) -> None:
    """The trained model's logits of the test images, in eval mode, at the full tau."""
    last = notes[-1]
    answering = [note for note in notes if (which(case, note) >= case["n"]).all()]
    if not answering or learns(case, last):
        raise Wrong(f"the trained {name} model is not asked about test_images")
    if any(note["training"] for note in answering):
        raise Wrong(f"the {name} model answers in train mode, where dropout is active: model.eval() before test_images")
    tau = case["tau"] if name == "sparse" else 0.0
    if not close(last["tau"], tau, 1e-5, 1e-8):
        raise Wrong(
            f"the {name} model answers at tau = {last['tau']:.4g}, and should be judged at {tau:g}: put the full tau "
            "in force before test_images, also where the ramp has not come to its end"
        )
    expected = logits(case, last["weights"], tau)
    got = array(seen, name, f"the answers of the {name} model")
    swapped = array(seen, other, f"the answers of the {other} model")
    if got.shape == expected.shape and close(swapped, expected, 1e-6, 1e-8) and not close(got, expected, 1e-6, 1e-8):
        raise Wrong("the results are in the wrong order: dense first, then sparse")
    probabilities = F.softmax(torch.from_numpy(expected), -1).numpy()
    mistakes = [
        (expected.argmax(-1), "the classes are returned; this question asks for the logits, [n_test, classes]"),
        (probabilities, "probabilities are returned; this question asks for the logits"),
    ]
    compare(got, expected, f"the logits of the {name} model", mistakes, rtol=1e-6, atol=1e-8)


def logits(case: Case, weights: Any, tau: float) -> np.ndarray:
    """Of the test images, [TESTED, classes], with these weights and tau."""
    model, (_, _, test_images) = small(case), pictures(case)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(np.array(weights)), model.parameters())
    if tau:
        sparsify(model, tau)
    with torch.no_grad():
        return np.asarray(model(test_images).numpy())


QUESTION = Question(
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
        {
            "what": "a ramp as long as the run",
            "data": 3,
            "n": 16,
            "tau": 0.09,
            "ramp": 4,
            "steps": 4,
            "batch_size": 4,
            "lr": 0.01,
            "seed": 2,
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Write one run first. What of it has to be the same for the second: start, batches, optimiser's settings, "
        "number of steps. What differs is one line.",
        "Make everything again in each run: copy.deepcopy(start), torch.optim.AdamW on the copy's parameters, and "
        "torch.Generator().manual_seed(seed) for the batches. Then train(), the steps, eval(), the answers.",
        "for sparse in (False, True): ... In the sparse run call sparsify(model, tau_at(step, tau, ramp)) before each "
        "forward pass (a model that is sparse already gets the new tau), and sparsify(model, tau) before test_images.",
    ),
    section="chapter 3, sections 3.3, 3.5 and 3.6, and chapter 4, section 4.1",
)
