"""Threads that share one model: each gets what it would get alone, and the model comes back as it was.

The situations are those of public reports: Grad-CAM in the threads of a web server (jacobgil/pytorch-grad-cam), hooks
that see another request's activations (pytorch/captum), a model that stays frozen after an explanation that failed.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from research.zeros import value_path_certificate
from svit_utils import TokenSparsityTracker, densify, sparsified, sparsify
from svit_utils.explain import METHODS, attention_maps, attention_rollout, explain, grad_cam, layer_grad_cam
from svit_utils.referee import (
    deletion_curve,
    faithfulness_scores,
    infidelity,
    insertion_curve,
    max_sensitivity,
    road,
    weight_randomisation,
)
from svit_utils.referee.nulls import queries_and_keys
from svit_utils.show.explorer import explorer_data
from svit_utils.show.explorers import attention_explorer_data, threshold_explorer_data
from svit_utils.training import TrainConfig, evaluate, train
from svit_utils.training.evaluation import warn_of_empty_rows

THREADS, ROUNDS = 4, 10
WAIT = 120.0  # seconds until a thread that hangs fails the test


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns every few instructions, so that they meet wherever they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def pictures(thread: int, turn: int, n: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(100 * thread + turn)
    return torch.randn(n, 3, 32, 48, generator=generator)


def half_frozen(model: nn.Module) -> nn.Module:
    """A model in training, the first half of which is frozen and kept in eval mode; gradients of a step lie there."""
    model.train()
    model.pos_drop.p = 0.0
    for block in model.blocks[:2]:
        block.eval().requires_grad_(False)
    model.blocks[1].attn.fused_attn = False
    model(pictures(9, 9)).sum().backward()
    return model


def state(model: nn.Module) -> list[Any]:
    """Everything that an explanation might leave changed."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        found.append([name, type(module), module.training, [len(kind) for kind in hooks]])
        found.append([getattr(module, "fused_attn", None), repr(getattr(module, "normaliser", None))])
        found.append([len(getattr(module, "observers", ())), len(getattr(module, "row_observers", ()))])
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found.append([name, parameter.requires_grad, id(grad), None if grad is None else grad.sum().item()])
    return found


def in_threads(work: Callable[[int, int], Any]) -> list[list[Any]]:
    """`work(thread, turn)` in all threads, which start each turn together."""
    together = threading.Barrier(THREADS)

    def run(thread: int) -> list[Any]:
        done = []
        for turn in range(ROUNDS):
            together.wait(WAIT)
            done.append(work(thread, turn))
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(WAIT) for future in [pool.submit(run, thread) for thread in range(THREADS)]]


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=1e-4)


def tracked(model: nn.Module, x: Tensor) -> Any:
    with TokenSparsityTracker(model) as tracker:
        model(x)
    return tracker.table().drop(columns=["layer", "queries"]).to_numpy()


def evaluated(model: nn.Module, x: Tensor) -> Any:
    found = evaluate(model, TensorDataset(x, torch.zeros(len(x), dtype=torch.long)))
    return [found.loss, found.predictions]


def cut(model: nn.Module, x: Tensor) -> Any:
    """Each thread at a tau of its own."""
    with torch.no_grad(), sparsified(model, 0.01 + 0.02 * float(x[0, 0, 0, 0].sigmoid())):
        return attention_maps(model, x)


def maps(model: nn.Module, x: Tensor) -> Tensor:
    return torch.rand(len(x), 4, 6, generator=torch.Generator().manual_seed(3))


BRIEF: dict[str, dict[str, Any]] = {"integrated_gradients": {"steps": 5}}
SEEN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "attention_maps": attention_maps,
    "attention_rollout": attention_rollout,
    "grad_cam": lambda m, x: grad_cam(m, x, relu=False),
    "layer_grad_cam": lambda m, x: layer_grad_cam(m, x, 2, relu=False),
    "explain": lambda m, x: [explain(m, x, method, **BRIEF.get(method, {})) for method in METHODS],
    "sparsified": cut,
    "evaluate": evaluated,
    "deletion_curve": lambda m, x: deletion_curve(m, x, maps(m, x), steps=3),
    "insertion_curve": lambda m, x: insertion_curve(m, x, maps(m, x), steps=3),
    "road": lambda m, x: road(m, x, maps(m, x), percentiles=[50]),
    "infidelity": lambda m, x: infidelity(m, x, maps(m, x), perturbations=3),
    "max_sensitivity": lambda m, x: max_sensitivity(m, x, lambda *a: grad_cam(*a, relu=False), samples=2),
    "faithfulness_scores": lambda m, x: faithfulness_scores(m, x, maps(m, x)),
    "weight_randomisation": lambda m, x: weight_randomisation(m, x, grad_cam).correlation,
    "queries_and_keys": queries_and_keys,
    "threshold_explorer_data": lambda m, x: threshold_explorer_data(m, x[0]).probabilities,
    "explorer_data": lambda m, x: explorer_data(m, x, threshold=0.03).sparse,
    "attention_explorer_data": lambda m, x: attention_explorer_data(m, x, threshold=0.03).sparse,
}
SPARSE = {
    "tracker": tracked,
    "value_path_certificate": lambda m, x: value_path_certificate(m, x)["zeros_checked"].to_numpy(),
    "warn_of_empty_rows": lambda m, x: [warn_of_empty_rows(m, [(x[0], 0)]) or 0],
}
CASES = [(name, False) for name in SEEN] + [(name, True) for name in {**SEEN, **SPARSE}]
CASES.remove(("faithfulness_scores", True))  # slow, and made of scores that are tried one by one


@pytest.mark.parametrize(("name", "sparse"), CASES, ids=[f"{name}-{'sparse' if s else 'dense'}" for name, s in CASES])
def test_threads_get_what_one_gets(name, sparse, family):
    model = family("vit")
    if sparse:
        sparsify(model, 0.03)
    half_frozen(model)
    work = {**SEEN, **SPARSE}[name]
    before = state(model)
    alone = [[work(model, pictures(thread, turn)) for turn in range(ROUNDS)] for thread in range(THREADS)]
    assert state(model) == before
    same(in_threads(lambda thread, turn: work(model, pictures(thread, turn))), alone)
    assert state(model) == before


@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "mean", "siglip", "eva"])
def test_threads_that_do_different_things(kind, family):
    model = half_frozen(family(kind))
    names = ["attention_maps", "grad_cam", "layer_grad_cam", "sparsified", "evaluate", "deletion_curve", "road"]
    before = state(model)

    def work(thread: int, turn: int) -> Any:
        return SEEN[names[(thread + turn) % len(names)]](model, pictures(thread, turn, 2))

    alone = [[work(thread, turn) for turn in range(ROUNDS)] for thread in range(THREADS)]
    same(in_threads(work), alone)
    assert state(model) == before


class Wrapper(nn.Module):
    """A model inside another one, as DataParallel holds it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, nn.Sequential, torch.compile], ids=lambda w: w.__name__)
def test_a_model_and_its_wrapper_wait_for_each_other(wrap, family):
    model = half_frozen(family("vit"))
    wrapper, before = wrap(model), state(model)

    def work(thread: int, turn: int) -> Any:
        x = pictures(thread, turn)
        if thread == 0:
            return grad_cam(model, x, relu=False)
        if thread == 1:
            return attention_maps(wrapper if wrap is not torch.compile else model, x).values()
        if thread == 2:
            return deletion_curve(model if wrap is torch.compile else wrapper, x, maps(model, x), steps=2)
        with sparsified(wrapper, 0.05):
            return attention_maps(model, x, -1).values()

    def listed(thread: int, turn: int) -> Any:
        found = work(thread, turn)
        return found if isinstance(found, Tensor) else list(found)

    alone = [[listed(thread, turn) for turn in range(ROUNDS)] for thread in range(THREADS)]
    same(in_threads(listed), alone)
    assert state(model) == before


def test_a_part_and_the_whole_wait_for_each_other(family):
    model = half_frozen(family("vit"))
    other = copy.deepcopy(model)
    other.blocks = model.blocks  # two models over one backbone
    before = state(model), state(other)

    def work(thread: int, turn: int) -> Any:
        x = pictures(thread, turn)
        if thread == 0:
            with sparsified(model.blocks[2], 0.05):
                return list(attention_maps(model, x).values())
        return grad_cam(other if thread == 1 else model, x, relu=False)

    alone = [[work(thread, turn) for turn in range(ROUNDS)] for thread in range(THREADS)]
    same(in_threads(work), alone)
    assert (state(model), state(other)) == before


@pytest.mark.parametrize("name", ["attention_maps", "grad_cam", "layer_grad_cam", "queries_and_keys"])
def test_a_thread_that_only_predicts_is_not_seen(name, family):
    model = family("vit")
    work, stop = SEEN[name], threading.Event()
    expected = [work(model, pictures(0, turn)) for turn in range(ROUNDS)]
    logits = model(pictures(7, 7, 3)).detach()

    def predict() -> int:
        count = 0
        while not stop.is_set():
            with torch.no_grad():
                torch.testing.assert_close(model(pictures(7, 7, 3)), logits, atol=1e-4, rtol=1e-4)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        predicting = [pool.submit(predict) for _ in range(2)]
        try:
            for turn in range(ROUNDS):
                same(work(model, pictures(0, turn)), expected[turn])
        finally:
            stop.set()
        assert all(future.result(WAIT) for future in predicting)


def test_training_goes_on_between_explanations(family):
    """A live picture of a training run, from another thread, changes no weight of it."""
    data = TensorDataset(torch.randn(64, 3, 32, 48), torch.arange(64) % 5)
    config = TrainConfig(steps=12, batch_size=8, lr=1e-3)
    model = family("vit")
    sparsify(model, 0.03)
    watched = copy.deepcopy(model)
    train(model, data, data, config, progress=False)
    started, stop = threading.Event(), threading.Event()

    def explain() -> int:
        count = 0
        while not stop.is_set():
            grad_cam(watched, pictures(0, count), relu=False)
            road(watched, pictures(0, count), maps(watched, pictures(0, count)), percentiles=[50])
            count += 1
            started.set()
        return count

    with ThreadPoolExecutor(1) as pool:
        explaining = pool.submit(explain)
        try:
            assert started.wait(WAIT)
            train(watched, data, data, config, progress=False)
        finally:
            stop.set()
        assert explaining.result(WAIT) >= 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


@pytest.mark.parametrize("work", [SEEN[name] for name in SEEN], ids=list(SEEN))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit], ids=lambda e: e.__name__)
def test_whatever_ends_a_call_the_model_comes_back(work, error, family):
    """The reports of models that stay frozen or without fused attention after an error or a Ctrl-C."""
    model = half_frozen(family("vit"))

    def fail(*_: object) -> None:
        raise error("stop")

    handle = model.blocks[2].mlp.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(error):
        work(model, pictures(0, 0))
    assert state(model) == before
    handle.remove()
    with ThreadPoolExecutor(1) as pool:  # and nobody has it any more
        same(pool.submit(grad_cam, model, pictures(0, 0)).result(WAIT), grad_cam(model, pictures(0, 0)))


def test_the_callers_own_functions_may_fail(family):
    model = half_frozen(family("vit"))
    before, x = state(model), pictures(0, 0)

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        max_sensitivity(model, x, interrupted)
    with pytest.raises(KeyboardInterrupt):
        weight_randomisation(model, x, interrupted)
    with pytest.raises(KeyboardInterrupt), sparsified(model, 0.02):
        interrupted()
    assert state(model) == before


def test_evaluation_leaves_batch_statistics_and_dropout_alone(family):
    """A frozen BatchNorm in eval mode (pytorch forums): evaluation neither trains it nor updates it."""
    model = family("vit")
    model.norm = nn.BatchNorm1d(25)
    model.train()
    model.norm.eval()
    model.blocks[0].attn.attn_drop.p = 0.5
    before, buffers = state(model), {name: value.clone() for name, value in model.named_buffers()}
    first, second = evaluated(model, pictures(0, 0, 4)), evaluated(model, pictures(0, 0, 4))
    same(first, second)
    assert state(model) == before
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_sparse_models_copied_while_threads_explain(family):
    model = family("vit")
    sparsify(model, 0.03)
    expected = attention_maps(model, pictures(0, 0))

    def work(thread: int, turn: int) -> Any:
        with TokenSparsityTracker(model):
            twin = copy.deepcopy(model)
        return attention_maps(densify(twin) if thread == 0 else model, pictures(0, 0))

    found = in_threads(work)
    for maps_of_thread in found[1:]:
        for one in maps_of_thread:
            same(one, expected)
