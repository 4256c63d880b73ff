"""The loop: what it refuses, what it warns of, and that each option does what it says."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from svit_utils.attention import LearnableThreshold, sparse_modules, sparsify
from svit_utils.training import (
    CheckpointError,
    NonFiniteLossError,
    OutputError,
    TrainConfig,
    evaluate,
    load_best,
    lr_factor,
    tau_factor,
    train,
)
from svit_utils.training.processes import end
from svit_utils.training.recipe import param_groups

CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, checkpoint_every=2, log_every=1)


def micro_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(3)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4} | kwargs
    return VisionTransformer(**options)


def images(n: int = 24) -> TensorDataset:
    """Four classes, each a fixed pattern under noise."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % 4
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    x = patterns[labels] + 0.5 * torch.randn(n, 3, 8, 8, generator=generator)
    return TensorDataset(x, labels)


class Recording(Dataset):
    """Notes which images were asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seen = inner, []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return self.inner[index]


def run(model: nn.Module, config: TrainConfig = CONFIG, data: Any = None, val: Any = None, **kwargs: Any) -> Any:
    return train(model, images() if data is None else data, val, config, progress=False, **kwargs)


def test_it_learns() -> None:
    model = micro_vit()
    before = evaluate(model, images(40)).accuracy
    result = run(model, replace(CONFIG, steps=60, batch_size=8), val=images(40))
    assert before < 0.6 < 0.95 < result.val_accuracy
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert not model.training


def test_every_image_once_per_epoch_in_another_order() -> None:
    data = Recording(images())
    run(micro_vit(), replace(CONFIG, steps=12), data=data)
    first, second = data.seen[:24], data.seen[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


def test_schedules() -> None:
    cosine = [lr_factor(s, 100, 10) for s in range(101)]
    assert cosine[0] == pytest.approx(1 / 11) and cosine[9] == pytest.approx(10 / 11)
    assert cosine[10] == 1.0 and cosine[55] == pytest.approx(0.5) and cosine[100] == pytest.approx(0.0)
    assert [lr_factor(s, 10, 0, "constant") for s in range(10)] == [1.0] * 10
    assert max(lr_factor(s, 100, 0, "onecycle") for s in range(100)) == 1.0
    with pytest.raises(ValueError, match=r"'cosine', 'onecycle', 'constant'.*'linear'"):
        lr_factor(0, 10, 0, "linear")


def test_onecycle_is_that_of_torch() -> None:
    """torch peaks at step 0.3 n - 1 and ends at n - 1; ours at 0.3 n and n: the same curve on that clock."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    n = 1000
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.0, total_steps=n, final_div_factor=1e4 / 25)
    theirs = []
    for _ in range(n):
        theirs.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if len(theirs) < n:
            schedule.step()
    ours = [lr_factor(s, n, 0, "onecycle") for s in range(n)]
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 0.006


def test_tau_rises_linearly_and_ends_at_its_target() -> None:
    assert [tau_factor(s, 4) for s in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert tau_factor(0, 0) == 1.0
    model = micro_vit()
    sparsify(model, 0.2)
    seen = []
    model.register_forward_pre_hook(
        lambda m, _: seen.append(next(iter(sparse_modules(m).values())).threshold.tau) if m.training else None
    )
    result = run(model, replace(CONFIG, tau_warmup_steps=4))
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])
    assert [row["tau_factor"] for row in result.history] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_validation_always_sees_the_full_tau() -> None:
    model = micro_vit()
    sparsify(model, 0.2)
    seen = []
    model.register_forward_pre_hook(
        lambda m, _: None if m.training else seen.append(next(iter(sparse_modules(m).values())).threshold.tau)
    )
    run(model, replace(CONFIG, tau_warmup_steps=6, eval_every=2), val=images(4))
    assert len(seen) >= 3 and seen == pytest.approx([0.2] * len(seen))


def test_an_interrupted_warm_up_leaves_the_full_tau() -> None:
    model = micro_vit()
    sparsify(model, 0.2)

    class Interrupted(Recording):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if len(self.seen) >= 20:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        run(model, replace(CONFIG, tau_warmup_steps=6), data=Interrupted(images()))
    assert next(iter(sparse_modules(model).values())).threshold.tau == pytest.approx(0.2)


def test_accumulation_equals_the_large_batch() -> None:
    whole, parts = micro_vit(), micro_vit()
    run(whole, replace(CONFIG, batch_size=8))
    run(parts, replace(CONFIG, batch_size=2, grad_accumulation=4))
    start = micro_vit().state_dict()
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=name)
    assert (whole.state_dict()["head.weight"] - start["head.weight"]).abs().max() > 1e-2


def test_what_is_exempt_from_weight_decay() -> None:
    model = micro_vit()
    sparsify(model, LearnableThreshold(0.1, per="head"))
    for config in (CONFIG, replace(CONFIG, layer_decay=0.5)):
        groups = param_groups(model, config)
        decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
        exempt = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        assert len(decayed) + len(exempt) == len(list(model.parameters())) and not decayed & exempt
        for name, p in model.named_parameters():
            free = p.ndim <= 1 or name in ("pos_embed", "cls_token") or ".threshold." in name
            assert (id(p) in exempt) == free, name


def test_layer_decay_scales_the_learning_rates() -> None:
    model = micro_vit()
    lrs = {id(p): g["lr"] for g in param_groups(model, replace(CONFIG, layer_decay=0.5)) for p in g["params"]}
    named = dict(model.named_parameters())
    head, last, first, patch = (
        lrs[id(named[n])]
        for n in ("head.weight", "blocks.1.mlp.fc1.weight", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight")
    )
    assert head == CONFIG.lr and last / first == pytest.approx(2) and first / patch == pytest.approx(2)
    before = copy.deepcopy(model.state_dict())
    run(model, replace(CONFIG, layer_decay=0.5, steps=1, clip_grad=None, weight_decay=0.0))
    moved = {name: float((model.state_dict()[name] - before[name]).abs().max()) for name in before}
    # The first step of Adam is the learning rate times the sign of the gradient.
    assert moved["head.weight"] == pytest.approx(CONFIG.lr, rel=1e-2)
    assert moved["blocks.0.mlp.fc1.weight"] == pytest.approx(first, rel=1e-2)


def test_average_of_the_weights() -> None:
    model = micro_vit()
    result = run(model, replace(CONFIG, ema_decay=0.9), val=images(8))
    average, last, start = result.ema.state_dict(), model.state_dict(), micro_vit().state_dict()
    assert not torch.equal(average["head.weight"], last["head.weight"])
    assert (average["head.weight"] - last["head.weight"]).norm() < (start["head.weight"] - last["head.weight"]).norm()


def test_best_weights_are_those_that_validation_judged(tmp_path: Path) -> None:
    val = images(16)
    model = micro_vit()
    result = run(model, replace(CONFIG, steps=20, eval_every=1, ema_decay=0.9), val=val, out_dir=tmp_path)
    best = load_best(micro_vit(), tmp_path)
    assert evaluate(best, val).accuracy == result.best_val_accuracy
    assert max(row["val_accuracy"] for row in result.history) == result.best_val_accuracy
    last = load_file(tmp_path / "last.safetensors")
    assert all(torch.equal(last[name], value) for name, value in model.state_dict().items())


def test_mixup_and_smoothing_change_the_targets() -> None:
    losses = {}
    for name, change in {"plain": {}, "smooth": {"label_smoothing": 0.2}, "mixup": {"mixup": 0.5}}.items():
        losses[name] = run(micro_vit(), replace(CONFIG, steps=2, **change)).history[0]["loss"]
    assert len({round(loss, 6) for loss in losses.values()}) == 3
    with pytest.raises(ValueError, match="even batch_size, got 3"):
        replace(CONFIG, mixup=0.5, batch_size=3)


def test_bf16_runs_and_differs() -> None:
    a, b = micro_vit(), micro_vit()
    full, half = run(a), run(b, replace(CONFIG, precision="bf16"))
    assert all(p.dtype == torch.float32 for p in b.parameters())
    assert full.history[0]["loss"] != half.history[0]["loss"]
    assert full.history[0]["loss"] == pytest.approx(half.history[0]["loss"], abs=0.05)


def test_a_learned_tau_moves() -> None:
    model = micro_vit()
    sparsify(model, LearnableThreshold(0.15, per="layer"))
    run(model)
    taus = [float(m.threshold.tau.detach()) for m in sparse_modules(model).values()]
    assert all(abs(tau - 0.15) > 1e-4 for tau in taus) and taus[0] != taus[1]


class Broken(Recording):
    """NaN in every image from the given call on."""

    def __init__(self, inner: Any, after: int) -> None:
        super().__init__(inner)
        self.after = after

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return (image * math.nan if len(self.seen) > self.after else image), label


def test_nan_stops_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 5; .*last good checkpoint is kept in .*"):
        run(micro_vit(), data=Broken(images(), after=5 * 4), out_dir=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["run"]["step"] == 4
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    # And it is good: with whole data the run comes to its end.
    assert run(micro_vit(), out_dir=tmp_path).steps == CONFIG.steps


def test_nan_before_any_checkpoint_promises_none(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError) as caught:
        run(micro_vit(), data=Broken(images(), after=0), out_dir=tmp_path)
    assert "at step 0" in str(caught.value) and "kept" not in str(caught.value)


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path: Path) -> None:
    """An infinite gradient spoils the weights after a finite loss."""
    model = micro_vit()
    calls = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * math.nan if len(calls) == 4 else gradient

    model.head.weight.register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="the weights are not finite at step 4"):
        run(model, out_dir=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"] == 2


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    run(micro_vit(), out_dir=tmp_path)
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    weights = torch.load(path, weights_only=True)["model"]["head.weight"].numpy().tobytes()
    place = good.index(weights)
    flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    for bad in (good[: len(good) // 2], b"", b"not a checkpoint", flipped):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged .*resume=False"):
            run(micro_vit(), out_dir=tmp_path)
    assert run(micro_vit(), out_dir=tmp_path, resume=False).steps == CONFIG.steps
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + CONFIG.steps


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    model = micro_vit()
    run(model, out_dir=tmp_path)
    with pytest.raises(
        CheckpointError, match=r"belongs to another run: model was \S+ and is \S+, start was .*Choose another out_dir"
    ):
        run(micro_vit(embed_dim=16), out_dir=tmp_path)
    cut = micro_vit()
    sparsify(cut, 0.1)
    with pytest.raises(CheckpointError, match="model was"):
        run(cut, out_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"run: lr was 0.01 and is 0.02\. "):
        run(micro_vit(), replace(CONFIG, lr=2e-2), out_dir=tmp_path)
    with pytest.raises(CheckpointError, match="images was 24 and is 20"):
        run(micro_vit(), data=images(20), out_dir=tmp_path)
    elsewhere = micro_vit()
    with torch.no_grad():
        elsewhere.head.weight[0, 0] += 0.1
    with pytest.raises(CheckpointError, match=r"run: start was weights-\w+ and is weights-\w+\. "):
        run(elsewhere, out_dir=tmp_path)
    again = micro_vit()
    result = run(again, replace(CONFIG, log_every=3), out_dir=tmp_path)  # what does not change the result may differ
    assert result.steps == CONFIG.steps
    assert torch.equal(again.head.weight, model.head.weight)


def test_resume_false_forgets_the_old_run_before_it_starts(tmp_path: Path) -> None:
    run(micro_vit(), val=images(8), out_dir=tmp_path)
    assert {"checkpoint.pt", "best.safetensors", "last.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    with pytest.raises(NonFiniteLossError):
        run(micro_vit(), data=Broken(images(), after=0), out_dir=tmp_path, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 1, "the columns' names only"


def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    """Killed at step 5 of 6, after the checkpoint of step 4: row 5 goes, with the half line the kill left."""
    with pytest.raises(NonFiniteLossError):
        run(micro_vit(), data=Broken(images(), after=5 * 4), out_dir=tmp_path)
    path = tmp_path / "metrics.csv"
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "1", "2", "3", "4", "5"]
    path.write_text(path.read_text() + "6,0.12")
    result = run(micro_vit(), out_dir=tmp_path)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    unbroken = run(micro_vit())
    assert [row["loss"] for row in result.history] == [row["loss"] for row in unbroken.history]


def test_no_write_permission_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = Recording(images())
    with pytest.raises(OutputError, match=r"cannot write to the output folder .*file.*choose another out_dir"):
        run(micro_vit(), data=data, out_dir=tmp_path / "file" / "out")
    assert data.seen == []


def test_warns_once_when_most_rows_are_empty(caplog: pytest.LogCaptureFixture) -> None:
    for tau, expected in ((0.5, 1), (0.01, 0)):
        model = micro_vit()
        sparsify(model, tau)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="svit_utils"):
            run(model)
        assert sum("rows lose every key" in record.message for record in caplog.records) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*31\), got -1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"schedule": "linear"}, "schedule must be one of .*'linear'"),
        ({"precision": "fp8"}, "precision must be 'fp32' or 'bf16', got 'fp8'"),
        ({"tau_warmup_steps": 7}, r"tau_warmup_steps must lie in \[0, steps = 6\], got 7"),
        ({"warmup_steps": -1}, r"warmup_steps must lie in \[0, steps = 6\], got -1"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \(0, 1\) or be None, got 1.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images, fewer than one batch of 4"):
        run(micro_vit(), data=images(3))


class Constant(nn.Module):
    """Always answers class 1, with logit 2."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 2.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 4)


def test_evaluate_counts_right() -> None:
    data = TensorDataset(torch.zeros(10, 3, 8, 8), torch.tensor([0, 1, 1, 2, 1, 3, 0, 1, 2, 2]))
    model = Constant().train()
    result = evaluate(model, data, batch_size=4)
    assert result.n == 10 and result.accuracy == 0.4
    assert result.correct.dtype == np.bool_ and result.correct.tolist() == [i in (1, 2, 4, 7) for i in range(10)]
    assert result.predictions.tolist() == [1] * 10
    assert result.loss == pytest.approx(
        float(F.cross_entropy(model.logits.detach().expand(10, 4), data.tensors[1])), abs=1e-6
    )
    assert model.training, "the mode is put back"
    assert evaluate(model, data, batch_size=4, limit=3).correct.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="limit must be at least 1 image, got 0"):
        evaluate(model, data, limit=0)
    with pytest.raises(ValueError, match="'fp32' or 'bf16', got 'int8'"):
        evaluate(model, data, precision="int8")


def test_evaluate_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    evaluate(Constant(), images(8))
    assert torch.equal(before, torch.get_rng_state())


def _one_of_two(folder: str, accumulation: int) -> None:
    from accelerate.state import PartialState

    torch.set_num_threads(1)
    data, model = Recording(images()), micro_vit()
    config = replace(CONFIG, batch_size=2 // accumulation, grad_accumulation=accumulation)
    train(model, data, images(8), config, out_dir=folder, progress=False)
    state = PartialState()
    text = json.dumps({"processes": state.num_processes, "seen": data.seen, "head": model.head.weight.tolist()})
    (Path(folder) / f"rank{state.process_index}.json").write_text(text)
    end()


def launch_two(rendezvous: Path, function: Any, *args: Any) -> None:
    """As Accelerate's ``debug_launcher``, but its processes start from nothing: it forks, and torch does not
    allow autograd in the fork of a process that has used it."""
    from accelerate.utils import PrepareForLaunch, patch_environment
    from torch.multiprocessing import start_processes

    with patch_environment(
        world_size=2,
        master_addr="127.0.0.1",
        master_port="29500",
        accelerate_mixed_precision="no",
        accelerate_debug_rdv_file=str(rendezvous),
        accelerate_use_cpu="yes",
        gloo_socket_ifname="lo",
    ):
        start_processes(PrepareForLaunch(function, debug=True), args=args, nprocs=2, start_method="spawn")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the rendezvous file is not shared on Windows")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_share_the_batch(tmp_path: Path, accumulation: int) -> None:
    """Two processes of two images do what one does with four: the same images, the same weights in both."""
    alone, data = micro_vit(), Recording(images())
    train(alone, data, None, CONFIG, progress=False)
    launch_two(tmp_path / "rendezvous", _one_of_two, str(tmp_path), accumulation)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    together, size = [], 2 // accumulation
    for micro in range(CONFIG.steps * accumulation):
        a, b = (rank["seen"][size * micro : size * (micro + 1)] for rank in ranks)
        together += a + b
    assert together == data.seen
    assert ranks[0]["head"] == ranks[1]["head"]
    np.testing.assert_allclose(ranks[0]["head"], alone.head.weight.tolist(), atol=2e-4)
    assert (tmp_path / "last.safetensors").exists()
