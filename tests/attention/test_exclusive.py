"""One model and several threads: who waits for whom, who does not, and what cannot end."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from svit_utils import exclusive as module
from svit_utils.attention import (
    LearnableThreshold,
    SparseAttention,
    TokenSparsityTracker,
    densify,
    sparse_modules,
    sparsified,
    sparsify,
)
from svit_utils.exclusive import ModelInUseError, evaluating, exclusive, in_this_thread

WAIT = 60.0  # seconds until a thread that hangs fails the test


@pytest.fixture(autouse=True)
def _nobody_has_anything_afterwards() -> Iterator[None]:
    yield
    left = list(module._line)
    module._line.clear()
    assert not left


def vit(**arguments: Any) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**{**settings, **arguments}).eval()


def elsewhere(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(WAIT)


def waits(thing: Any, held: Any) -> bool:
    """Whether another thread that wants ``thing`` has to wait while this one has ``held``."""
    with exclusive(held):
        place = module._Place(threading.Thread(), module._parts((thing,)), "", False)
        module._line.append(place)
        try:
            return bool(module._blocking(place))
        finally:
            module._line.remove(place)


MODEL = vit()
SHARED = nn.Sequential(MODEL.blocks[0], nn.Linear(24, 2))
TIED = nn.Linear(24, 5)
TIED.weight = MODEL.head.weight


@pytest.mark.parametrize(
    ("thing", "held", "expected"),
    [
        (MODEL, MODEL, True),
        (nn.DataParallel(MODEL), MODEL, True),
        (MODEL, nn.DataParallel(MODEL), True),
        (torch.compile(MODEL), MODEL, True),
        (MODEL.blocks[0].attn, MODEL, True),
        (MODEL, MODEL.blocks[1].norm1, True),
        (SHARED, MODEL, True),
        (TIED, MODEL, True),
        (copy.copy(MODEL), MODEL, True),
        (MODEL.blocks[0], MODEL.blocks[1], False),
        (copy.deepcopy(MODEL), MODEL, False),
        (pickle.loads(pickle.dumps(MODEL)), MODEL, False),
        (vit(), MODEL, False),
        (torch.default_generator, MODEL, False),
        (torch.default_generator, torch.default_generator, True),
    ],
)
def test_who_waits_for_whom(thing, held, expected):
    assert waits(thing, held) == expected == waits(held, thing)
    assert not module._line


def test_nothing_is_stored_in_the_model():
    model = vit()
    keys, names = list(model.state_dict()), set(vars(model))
    with exclusive(model):
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert list(model.state_dict()) == list(copied.state_dict()) == keys and set(vars(model)) == names
        assert not waits(copied, model)


def test_a_thread_may_enter_again_and_leave_in_any_order():
    model = vit()
    first, second = exclusive(model), exclusive(nn.Sequential(model))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(module._line) == 1
    second.__exit__(None, None, None)
    assert elsewhere(lambda: exclusive(model).__enter__() or True)
    module._line.clear()


def test_a_thread_gets_its_turn_although_another_one_never_rests():
    model, turns, done = vit(), [], threading.Event()

    def busy() -> None:
        while not done.is_set():
            with exclusive(model):
                turns.append("busy")

    def patient() -> None:
        for _ in range(20):
            with exclusive(model):
                turns.append("patient")
        done.set()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(busy), pool.submit(patient)]:
            future.result(WAIT)
    assert turns.count("patient") == 20


def test_two_threads_that_want_two_models_in_another_order():
    one, two = vit(), vit()
    both = threading.Barrier(2)

    def take(first: nn.Module, second: nn.Module) -> str:
        try:
            with exclusive(first):
                both.wait(WAIT)
                with exclusive(second):
                    return "both"
        except ModelInUseError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(take, one, two), pool.submit(take, two, one)]
        said = sorted((future.result(WAIT) for future in found), key=len)
    assert said[0] == "both"
    assert "VisionTransformer is in use by thread" in said[1] and "in the same order" in said[1]
    assert not module._line


def test_parts_held_by_two_threads_that_both_want_the_whole():
    model, both = vit(), threading.Barrier(2)

    def take(part: nn.Module) -> bool:
        try:
            with exclusive(part):
                both.wait(WAIT)
                with exclusive(model):
                    return True
        except ModelInUseError:
            return False

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(take, block) for block in model.blocks]
        assert sorted(future.result(WAIT) for future in found) == [False, True]


@pytest.mark.parametrize("block", ["sparsified", "tracker"])
def test_a_pool_inside_a_block_is_told_why_it_waits(block, monkeypatch):
    """The block waits for the pool and the pool for the block: an error instead of a program that hangs."""
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "_LOOK_AGAIN", 0.01)
    model = vit()
    if block == "tracker":
        sparsify(model, 0.02)
    inside = sparsified(model, 0.02) if block == "sparsified" else TokenSparsityTracker(model)
    with inside, ThreadPoolExecutor(1) as pool:
        with pytest.raises(ModelInUseError, match="enter the block in each thread"):
            pool.submit(lambda: sparsify(model, 0.1)).result(WAIT)
    elsewhere(lambda: densify(model))


def test_an_event_loop_inside_a_block_is_told_too(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "_LOOK_AGAIN", 0.01)
    model = vit()

    async def explain() -> None:
        with sparsified(model, 0.02):
            await asyncio.to_thread(densify, model)

    with pytest.raises(ModelInUseError, match="enter the block in each thread"):
        asyncio.run(explain())
    assert not sparse_modules(model)


def test_two_tasks_that_interleave_are_told():
    model = vit()

    async def cut(tau: float, first: asyncio.Event, then: asyncio.Event) -> None:
        with sparsified(model, tau):
            first.set()
            await then.wait()

    async def both() -> list[Any]:
        one, two, three = asyncio.Event(), asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(cut(0.1, one, two)), asyncio.create_task(cut(0.2, two, three))]
        found = await asyncio.gather(tasks[0], return_exceptions=True)
        three.set()
        return [*found, *await asyncio.gather(tasks[1], return_exceptions=True)]

    first, second = asyncio.run(both())
    assert isinstance(first, RuntimeError) and "left before one that was entered inside" in str(first)
    assert second is None and not sparse_modules(model)


def test_traced_models_can_be_held():
    model = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.zeros(1, 3, 16, 16))
    with evaluating(traced):
        traced(torch.zeros(1, 3, 16, 16))


def test_whoever_works_inside_a_block_is_waited_for(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "_LOOK_AGAIN", 0.01)
    model, inside = vit(), threading.Event()

    def later() -> float:
        assert inside.wait(WAIT)
        with sparsified(model, 0.5):
            return float(next(iter(sparse_modules(model).values())).threshold.tau)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(later)
        with sparsified(model, 0.1):
            inside.set()
            while all(place.granted for place in list(module._line)):  # until the other thread waits
                model(torch.zeros(1, 3, 16, 16))
            for _ in range(20):
                model(torch.zeros(1, 3, 16, 16))
        assert waiting.result(WAIT) == 0.5


def test_a_thread_that_ended_inside_a_block():
    model, kept = vit(), []

    def cut() -> Iterator[int]:
        with sparsified(model, 0.1):
            yield 1

    def start() -> None:
        kept.append(cut())
        next(kept[0])

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(WAIT)
    with pytest.raises(ModelInUseError, match="has ended inside a `with` block"), sparsified(model, 0.2):
        pass
    kept[0].close()  # by another thread than the one that entered
    assert not sparse_modules(model)
    with sparsified(model, 0.2):
        pass


def test_an_abandoned_generator_gives_the_model_back():
    model = vit()

    def cut() -> Iterator[int]:
        with sparsified(model, 0.1):
            yield from range(3)

    assert next(cut()) == 0
    gc.collect()
    assert not sparse_modules(model) and not module._line
    assert elsewhere(lambda: sparsify(model, 0.1).converted)


@pytest.mark.parametrize("start", ["dense", "sparse", "learnable", "born sparse", "hard cut"])
def test_blocks_that_overlap_bring_the_model_back_and_say_so(start):
    """Two generators, or two asyncio tasks, that interleave: the last one to leave brings the model back."""
    model = vit(attn_layer=SparseAttention.using(threshold=0.05)) if start == "born sparse" else vit()
    if start == "learnable":
        sparsify(model, LearnableThreshold(0.05, per="model"))
    elif start in ("sparse", "hard cut"):
        sparsify(model, 0.05, normaliser="hard_cut" if start == "hard cut" else "thresholded")
    before = [(type(m), id(getattr(m, "normaliser", None)), id(getattr(m, "threshold", None))) for m in model.modules()]
    first, second = sparsified(model, 0.1), sparsified(model, 0.2)
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="left before one that was entered inside"):
        first.__exit__(None, None, None)
    assert {round(float(m.threshold.tau), 6) for m in sparse_modules(model).values()} == {0.2}
    second.__exit__(None, None, None)
    after = [(type(m), id(getattr(m, "normaliser", None)), id(getattr(m, "threshold", None))) for m in model.modules()]
    assert after == before and not module._line


def test_a_block_that_is_left_by_the_way_it_was_not_meant():
    """Made dense, made sparse anew, given a new attention, moved: what the block found comes back."""
    model = vit(attn_layer=SparseAttention.using(threshold=0.05))
    kinds, x = [type(block.attn) for block in model.blocks], torch.randn(1, 3, 16, 16)
    expected = model(x)
    with sparsified(model, 0.5):
        densify(model)
    assert [type(block.attn) for block in model.blocks] == kinds
    with sparsified(model, 0.5):
        sparsify(model, LearnableThreshold(0.3))
        model.double()
    torch.testing.assert_close(model(x.double()).float(), expected, atol=1e-5, rtol=1e-5)
    model = vit()
    with sparsified(model, 0.5):
        model.blocks[0].attn = copy.deepcopy(model.blocks[1].attn)
    assert not sparse_modules(model)


def test_the_tracker_entered_twice():
    model = vit()
    sparsify(model, 0.02)
    tracker = TokenSparsityTracker(model)
    with tracker:
        with tracker:
            model(torch.zeros(1, 3, 16, 16))
        model(torch.zeros(1, 3, 16, 16))
    model(torch.zeros(1, 3, 16, 16))
    assert tracker.summary().rows == 2 * 2 * 17 * 3
    assert not module._line and not any(m.row_observers for m in sparse_modules(model).values())


def test_trackers_count_what_all_threads_compute_inside():
    """A model that serves predictions from a pool is tracked as if one thread had made them."""
    block = vit().blocks[0]
    model = nn.Sequential(block, block, block)  # one module in three places: each thread has turns of its own
    sparsify(model, 0.06)
    x = torch.randn(20, 2, 17, 24)
    with TokenSparsityTracker(model) as alone:
        for one in x:
            model(one)
    with TokenSparsityTracker(model) as tracker, ThreadPoolExecutor(4) as pool:
        list(pool.map(model, x))
    difference = (tracker.table().iloc[:, 3:] - alone.table().iloc[:, 3:]).abs().to_numpy()
    assert difference.max() < 1e-6


def test_hooks_see_their_own_thread_and_the_backward_pass():
    model, seen = nn.Linear(2, 2), []
    handle = model.register_forward_hook(in_this_thread(lambda *_: seen.append(threading.get_ident())))
    model(torch.zeros(1, 2))
    elsewhere(lambda: model(torch.zeros(1, 2)))
    assert seen == [threading.get_ident()]
    handle.remove()


def test_evaluating_brings_each_flag_back_whatever_happens():
    model = vit()
    model.train()
    model.blocks[0].eval()
    before = [part.training for part in model.modules()]
    model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        model(torch.zeros(1, 3, 16, 16))
    assert [part.training for part in model.modules()] == before


class Interrupted(nn.Module):
    """A part whose mode cannot be changed, as when Ctrl-C comes just then."""

    def train(self, mode: bool = True) -> nn.Module:
        raise KeyboardInterrupt


def test_a_mode_that_is_changed_half_comes_back():
    model = nn.Sequential(nn.Dropout(), Interrupted(), nn.Dropout())
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        pass
    assert [part.training for part in model] == [True, True, True] and not module._line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not():
    model, held, stop = vit(), threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(model):
            held.set()
            stop.wait(WAIT)

    def child() -> None:
        with sparsified(model, 0.1):
            os._exit(7)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(WAIT)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(WAIT)
        stop.set()
    assert process.exitcode == 7
