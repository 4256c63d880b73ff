"""Every call of an attention module in its place, or refused; never left out.

The situations are those of public reports: a module used in several places, blocks that hold attention inline or in
parallel, gradient checkpointing, forwards replaced to get at the maps (timm's discussion 1232), several towers.
"""

from __future__ import annotations

from types import MethodType

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from svit_utils import sparsify
from svit_utils.attention import TokenSparsityTracker, sparse_modules
from svit_utils.explain import (
    attention_layers,
    attention_maps,
    attention_rollout,
    class_attention,
    grad_cam,
    layer_grad_cam,
)
from tests.explain.by_hand import TINY, Repeating, calls, check_rollout, even, pictures, sharp, tiny

X = pictures()
CLASS = even([0], 17)
CAMS = [grad_cam, layer_grad_cam]


def reused(pattern: str, **kwargs) -> VisionTransformer:
    """Blocks by letter: "aab" is one block twice, then another."""
    model = tiny(depth=len(set(pattern)), **kwargs)
    letters = sorted(set(pattern))
    model.blocks = nn.Sequential(*[model.blocks[letters.index(letter)] for letter in pattern])
    return model


@pytest.mark.parametrize("pattern", ["aaa", "aab", "abab", "aba", "baab"])
def test_reused_blocks_have_a_map_for_each_call(pattern):
    model = reused(pattern)
    expected = calls(model, X)
    maps = attention_maps(model, X)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(len(pattern))]
    for got, weights in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got.double(), weights, atol=1e-5, rtol=0)
    assert not torch.allclose(maps["blocks.0.attn"], maps[f"blocks.{len(pattern) - 1}.attn"], atol=1e-2)
    check_rollout(attention_rollout(model, X), expected, CLASS, 1)
    for index in range(-len(pattern), len(pattern)):
        got = class_attention(model, X, layer=index)
        torch.testing.assert_close(got.flatten(2).double(), expected[index][:, :, 0, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", ["aaa", "abab"])
def test_reused_sparse_blocks(pattern):
    model = reused(pattern)
    sparsify(model, 0.03)
    seen = []
    modules = set(sparse_modules(model).values())
    for module in modules:
        module.observers.append(lambda _m, record: seen.append(record.weights.detach()))
    model(X)
    for module in modules:
        module.observers.clear()
    maps = attention_maps(model, X)
    assert len(maps) == len(seen) == len(pattern)
    for got, weights in zip(maps.values(), seen, strict=True):
        torch.testing.assert_close(got, weights, atol=1e-6, rtol=0)
    check_rollout(attention_rollout(model, X), seen, CLASS, 1)


EXPLAIN = [attention_maps, attention_rollout, class_attention, grad_cam, layer_grad_cam]


@pytest.mark.parametrize("pattern", ["aaa", "abab"])
def test_reused_blocks_that_checkpointing_runs_once(pattern):
    """timm's `checkpoint_seq` goes through `children()`, which names a module once: another model is computed."""
    model = reused(pattern).double()
    x = X.double()
    plain = model(x)
    model.set_grad_checkpointing()
    expected = calls(model, x)
    assert len(expected) == len(set(pattern)) and not torch.allclose(model(x), plain, atol=1e-2)
    maps = attention_maps(model, x)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(len(expected))]
    for got, weights in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got, weights, atol=1e-9, rtol=0)
    check_rollout(attention_rollout(model, x), expected, CLASS, 1)
    torch.testing.assert_close(class_attention(model, x).flatten(2), expected[-1][:, :, 0, 1:], atol=1e-9, rtol=0)
    for cam in CAMS:
        got = cam(model, x, [3, 1], relu=False)
        torch.testing.assert_close(got, tap_by_hand(model, x, len(expected) - 1, 0, [3, 1]), atol=1e-9, rtol=0)


class Named(nn.Module):
    """A wrapper that gives parts of its model a second name."""

    def __init__(self):
        super().__init__()
        self.vit = tiny()
        self.blocks, self.patch_embed, self.num_prefix_tokens = self.vit.blocks, self.vit.patch_embed, 1

    def forward(self, x):
        return self.vit(x)


def test_a_second_name_of_a_layer_is_no_second_call():
    model = Named()
    expected = attention_maps(model.vit, X)
    maps = attention_maps(model, X)
    assert list(maps) == [f"vit.blocks.{i}.attn" for i in range(3)]
    for name, weights in expected.items():
        for same in (f"vit.{name}", name):
            ((got_name, got),) = attention_maps(model, X, layers=same).items()
            assert got_name == same
            torch.testing.assert_close(got, weights)
    for cam in CAMS:
        got = cam(model.vit, X, 1, relu=False)
        for layer in (None, -1, "blocks.2.norm1", "vit.blocks.2.norm1", model.blocks[2].norm1):
            torch.testing.assert_close(cam(model, X, 1, layer=layer, relu=False), got)
    sparsify(model, 0.03)
    with TokenSparsityTracker(model) as tracker:
        model(X)
        model(X)
    assert set(tracker.table()["layer"]) == {f"vit.blocks.{i}.attn" for i in range(3)}


def test_the_tracker_begins_every_pass_at_the_first_place():
    model = reused("aba")
    sparsify(model, 0.03)
    model.set_grad_checkpointing()  # two calls a pass, of three places
    with TokenSparsityTracker(model) as tracker:
        for _ in range(3):
            model(X)
    assert set(tracker.table()["layer"]) == {"blocks.0.attn", "blocks.1.attn"}
    assert tracker.summary().rows == 3 * 2 * (2 * 3 * 17)  # passes, calls, and images x heads x tokens
    model.set_grad_checkpointing(False)
    tracker.reset()
    with tracker:
        model(X)
    assert tracker.table()["layer"].nunique() == 3


def tap_by_hand(model, x, block, call, targets):
    """Signed Grad-CAM at one call of a block's `norm1`, with autograd alone."""
    kept = []
    handle = model.blocks[block].norm1.register_forward_hook(lambda _m, _a, out: kept.append(out))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[range(len(x)), targets].sum(), kept[call])
    channels = gradient[:, 1:].mean(dim=1, keepdim=True)
    return (channels * kept[call][:, 1:]).sum(-1).unflatten(1, (4, 4)).detach()


@pytest.mark.parametrize("cam", CAMS)
@pytest.mark.parametrize(("pattern", "block", "call"), [("aaa", 2, 2), ("abab", 3, 1), ("baab", 3, 1)])
def test_grad_cam_of_a_reused_block_is_that_of_its_last_call(pattern, block, call, cam):
    model = reused(pattern).double()
    x = X.double()
    expected = tap_by_hand(model, x, block, call, [3, 1])
    torch.testing.assert_close(cam(model, x, [3, 1], relu=False), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("cam", CAMS)
def test_grad_cam_by_name_or_index_is_that_of_this_place(cam):
    model, x = reused("aba").double(), X.double()
    for layer, block, call in (("blocks.0.norm1", 0, 0), ("blocks.2.norm1", 2, 1), (0, 0, 0), (-1, 2, 1), (1, 1, 0)):
        expected = tap_by_hand(model, x, block, call, [3, 1])
        torch.testing.assert_close(cam(model, x, [3, 1], layer=layer, relu=False), expected, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match=r"several places.*blocks\.0\.norm1, blocks\.2\.norm1"):
        cam(model, x, layer=model.blocks[0].norm1)


@pytest.mark.parametrize("explain", EXPLAIN, ids=lambda f: f.__name__)
def test_more_calls_than_places_are_refused(explain):
    model = sharp(Repeating(**{**TINY, "depth": 1}))
    with pytest.raises(ValueError, match=r"blocks\.0\S* was called 3 times .* 1 place"):
        explain(model, X)


class Mirrored(VisionTransformer):
    """Averages the logits of an image and its mirror image: two passes through every layer."""

    def forward(self, x, **_):
        return (super().forward(x) + super().forward(x.flip(-1))) / 2


@pytest.mark.parametrize("explain", EXPLAIN, ids=lambda f: f.__name__)
def test_two_passes_in_one_call_are_refused(explain):
    with pytest.raises(ValueError, match=r"was called 2 times .* 1 place"):
        explain(sharp(Mirrored(**TINY)), X)


@pytest.mark.parametrize("number", [2, 3])
def test_parallel_attention_is_one_step_of_the_rollout(number):
    """x + A_1 x + ... + A_n x is one attention with n times the heads ("Three things everyone should know")."""

    class Parallel(ParallelThingsBlock):
        def __init__(self, **kwargs):
            super().__init__(num_parallel=number, **kwargs)

    model = tiny(block_fn=Parallel)
    expected = calls(model, X)
    maps = attention_maps(model, X)
    assert list(maps) == [f"blocks.{i}.attns.{j}.attn" for i in range(3) for j in range(number)]
    for got, weights in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got.double(), weights, atol=1e-5, rtol=0)
    joined = [torch.cat(expected[i : i + number], dim=1) for i in range(0, 3 * number, number)]
    check_rollout(attention_rollout(model, X), joined, CLASS, 1)
    for start in (-1, 2, "blocks.2"):
        check_rollout(attention_rollout(model, X, start_layer=start), joined[2:], CLASS, 1)


def test_reused_parallel_blocks():
    model = reused("aba", block_fn=ParallelThingsBlock)
    expected = calls(model, X)
    joined = [torch.cat(expected[i : i + 2], dim=1) for i in (0, 2, 4)]
    check_rollout(attention_rollout(model, X), joined, CLASS, 1)


@pytest.mark.parametrize("pattern", ["abc", "aab"])
def test_attention_inline_in_its_block_is_read(pattern):
    model = reused(pattern, block_fn=ParallelScalingBlock)
    expected = calls(model, X)
    maps = attention_maps(model, X)
    assert list(maps) == list(attention_layers(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    for got, weights in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got.double(), weights, atol=1e-5, rtol=0)
    check_rollout(attention_rollout(model, X), expected, CLASS, 1)
    torch.testing.assert_close(
        class_attention(model, X).flatten(2).double(), expected[-1][:, :, 0, 1:], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "steps"),
    [("vit_small_patch16_18x2_224", 2), ("vit_base_patch16_xp_224", 1), ("vit_pwee_patch16_reg1_gap_256", 1)],
)
def test_timms_own_parallel_models(name, steps):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = sharp(timm.create_model(name, **kwargs))
    expected = calls(model, X)
    joined = [torch.cat(expected[i : i + steps], dim=1) for i in range(0, len(expected), steps)]
    shares = even([0] if model.global_pool == "token" else list(range(1, 17)), 17)
    check_rollout(attention_rollout(model, X), joined, shares, 1)
    first, second = (cam(model.double(), X.double(), 2, relu=False) for cam in CAMS)
    torch.testing.assert_close(first, second, atol=1e-9, rtol=0)
    assert first.abs().max() > 0


@pytest.mark.parametrize("cam", CAMS)
@pytest.mark.parametrize("kind", ["timm", "reentrant", "eva"])
def test_gradient_checkpointing_changes_nothing(kind, cam):
    model = tiny() if kind != "eva" else sharp(Eva(**TINY, global_pool="token"))
    expected, rollout = cam(model, X, [3, 1], relu=False), attention_rollout(model, X)
    model.set_grad_checkpointing()
    timm.layers.set_reentrant_ckpt(kind == "reentrant")
    try:
        torch.testing.assert_close(attention_rollout(model, X), rollout)
        assert len(attention_maps(model, X)) == 3
        if kind == "reentrant":  # such a checkpoint keeps no graph of what is inside, for Captum none at all
            for layer in [None] if cam is grad_cam else [None, "patch_drop"]:
                with pytest.raises(ValueError, match="checkpoint"):
                    cam(model, X, [3, 1], layer=layer)
        else:
            torch.testing.assert_close(cam(model, X, [3, 1], relu=False), expected)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert model.grad_checkpointing


class OwnCheckpoints(VisionTransformer):
    reentrant = False

    def forward_features(self, x, **_):
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.norm(x)


@pytest.mark.parametrize("cam", CAMS)
def test_checkpointing_by_the_models_own_forward(cam):
    torch.manual_seed(0)
    model, plain = sharp(OwnCheckpoints(**TINY)), tiny()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(cam(model, X, [3, 1], relu=False), cam(plain, X, [3, 1], relu=False))
    model.reentrant = True
    torch.testing.assert_close(attention_rollout(model, X), attention_rollout(plain, X))
    with pytest.raises(ValueError, match="checkpoint"):
        cam(model, X, [3, 1])


def with_block(block, place=1, **kwargs):
    """A Vision Transformer one of whose blocks is another one."""
    model = tiny(**kwargs)
    model.blocks[place] = block
    return sharp(model)


class Inline(nn.Module):
    """Attention by a function, in a block whose name says nothing of it."""

    def __init__(self, dim=24, **_):
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)

    def forward(self, x, **_):
        q, k, v = self.mix(self.norm1(x))[:, None].chunk(3, dim=-1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


class TorchBlock(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(dim, 3, 48, batch_first=True)

    def forward(self, x, **_):
        return self.layer(x)


UNREADABLE = {
    "differential": lambda: Block(24, 3, attn_layer="diff", qkv_bias=True),
    "inline": Inline,
    "torch": TorchBlock,
    "differential_parallel": lambda: DiffParallelScalingBlock(24, 3),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_block_that_cannot_be_read_is_refused_not_left_out(kind, place):
    model = with_block(UNREADABLE[kind](), place)
    for explain in (attention_maps, attention_rollout):
        with pytest.raises(ValueError, match=rf"blocks\.{place}\S* \(\w+\).* cannot be read"):
            explain(model, X)
    for index in range(3):  # an index still counts every block
        if index == place:
            for wanted in (index, index - 3):
                with pytest.raises(ValueError, match=rf"blocks\.{place}\S* \(\w+\).* cannot be read"):
                    class_attention(model, X, layer=wanted)
        else:
            maps = attention_maps(model, X, layers=[index])
            assert list(maps) == list(attention_maps(model, X, layers=index - 3)) == [f"blocks.{index}.attn"]
    assert list(attention_maps(model, X, layers=[i for i in range(3) if i != place])) == [
        f"blocks.{i}.attn" for i in range(3) if i != place
    ]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("beit_base_patch16_224", {"patch_size": 8}),
        ("vit_relpos_base_patch16_224", {"patch_size": 8}),
        ("vit_dpwee_patch16_reg1_gap_256", {"patch_size": 8}),
        ("vit_dlittle_patch16_reg1_gap_256", {"patch_size": 8}),
        ("cait_xxs24_224", {"patch_size": 8}),
        ("convit_tiny", {"patch_size": 8}),
    ],
)
def test_families_whose_attention_cannot_be_read(name, kwargs):
    size = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = sharp(timm.create_model(name, **size, **kwargs))
    for explain in (attention_maps, attention_rollout, class_attention):
        with pytest.raises(ValueError, match=r"no attention whose map can be read|no token grid"):
            explain(model, X)


@pytest.mark.parametrize("last", [False, True])
def test_a_forward_replaced_on_one_module_is_noticed(last):
    """The usual recipe for attention maps (pytorch-image-models discussion 1232) replaces `attn.forward`."""
    model = tiny()
    attn = model.blocks[2 if last else 1].attn

    def forward(self, x, attn_mask=None, is_causal=False):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        self.attn_map = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((self.attn_map @ v).transpose(1, 2).reshape(b, n, c))

    attn.forward = MethodType(forward, attn)
    name = f"blocks.{2 if last else 1}.attn"
    for explain in (attention_maps, attention_rollout):
        with pytest.raises(ValueError, match=rf"{name} .*cannot be read"):
            explain(model, X)
    if last:
        with pytest.raises(ValueError, match=rf"{name} .*cannot be read"):
            class_attention(model, X)
    else:
        assert class_attention(model, X).shape == (2, 3, 4, 4)


def test_one_dropout_shared_by_all_layers_mixes_nothing_up():
    model = tiny()
    expected = calls(model, X)
    for block in model.blocks:
        block.attn.attn_drop = model.blocks[0].attn.attn_drop
    for got, weights in zip(attention_maps(model, X).values(), expected, strict=True):
        torch.testing.assert_close(got.double(), weights, atol=1e-5, rtol=0)


class Early(VisionTransformer):
    """Leaves after two of three blocks."""

    def forward_features(self, x, **_):
        return self.norm(self.blocks[:2](self._pos_embed(self.patch_embed(x))))


def test_a_layer_that_does_not_run_is_said():
    model = sharp(Early(**TINY))
    expected = calls(model, X)
    assert list(attention_maps(model, X)) == ["blocks.0.attn", "blocks.1.attn"]
    check_rollout(attention_rollout(model, X), expected, CLASS, 1)
    for layer in (-1, 2, "blocks.2.attn"):
        with pytest.raises(ValueError, match=r"blocks\.2\.attn was not called"):
            class_attention(model, X, layer=layer)
    for cam in CAMS:
        with pytest.raises(ValueError, match=r"blocks\.2\.norm1 was not called"):
            cam(model, X)
        assert cam(model, X, layer="blocks.1.norm1", relu=False).abs().max() > 0


class Pair(nn.Module):
    """A wrapper of two models, of one input or of two."""

    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x):
        return self.left(x) + self.right(x)


class Clip(Pair):
    """A text tower that a forward pass of images does not call."""

    def forward(self, x):
        return self.left(x)


class Twin(VisionTransformer):
    """A Vision Transformer with a second one of the same size inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.other = VisionTransformer(**kwargs)

    def forward(self, x, **_):
        return super().forward(x) + self.other(x)


def test_two_towers_have_their_maps_by_name_and_no_rollout():
    model = Pair(tiny(), sharp(VisionTransformer(**{**TINY, "class_token": False, "global_pool": "avg"})))
    expected = calls(model, X)
    maps = attention_maps(model, X)
    assert list(maps) == [f"{side}.blocks.{i}.attn" for side in ("left", "right") for i in range(3)]
    for got, weights in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got.double(), weights, atol=1e-5, rtol=0)
    for explain in (attention_rollout, class_attention, *CAMS):
        with pytest.raises(ValueError, match="no token grid can be established for Pair"):
            explain(model, X)


class Speaking(Pair):
    """What it does not have itself, it takes from its left tower."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("left"), name)


def test_a_wrapper_that_speaks_for_one_of_its_towers():
    model = Speaking(tiny(), tiny())
    for explain in (attention_rollout, class_attention):
        with pytest.raises(ValueError, match=r"left\.blocks and right\.blocks.*one after another"):
            explain(model, X)
    for cam in CAMS:
        with pytest.raises(ValueError, match="give the layer"):
            cam(model, X)
        got = cam(model, X, [3, 1], layer="left.blocks.2.norm1", relu=False)
        torch.testing.assert_close(got, cam(model.left, X, [3, 1], relu=False))


@pytest.mark.parametrize("explain", EXPLAIN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["script", "trace", "fx"])
@pytest.mark.filterwarnings("ignore")
def test_programs_made_of_a_model(kind, explain):
    make = {"script": torch.jit.script, "trace": lambda m: torch.jit.trace(m, X), "fx": torch.fx.symbolic_trace}[kind]
    model = tiny()
    for block in model.blocks if kind == "fx" else ():
        block.attn.fused_attn = False  # timm 1.0.26 hands `is_causal` on, which torch.fx makes a symbol
    with pytest.raises(ValueError, match=r"TorchScript|no token grid|no attention whose map can be read"):
        explain(make(model), X)


def test_a_tower_inside_the_model_is_not_multiplied_into_its_rollout():
    model = sharp(Twin(**TINY))
    for explain in (attention_rollout, class_attention):
        with pytest.raises(ValueError, match=r"blocks and other\.blocks.*one after another"):
            explain(model, X)
    assert list(attention_maps(model, X))[3:] == [f"other.blocks.{i}.attn" for i in range(3)]
    check_rollout(attention_rollout(model.other, X), calls(model.other, X), CLASS, 1)


def test_towers_that_share_their_weights():
    tower = tiny()
    with pytest.raises(ValueError, match="no token grid can be established for Pair"):
        attention_rollout(Pair(tower, tower), X)
    maps = attention_maps(Pair(tower, tower), X)  # two places, two calls
    assert len(maps) == 6
    torch.testing.assert_close(maps["left.blocks.1.attn"], maps["right.blocks.1.attn"])


def test_a_tower_that_is_not_called_has_no_maps():
    model = Clip(tiny(), tiny())
    assert list(attention_maps(model, X)) == [f"left.blocks.{i}.attn" for i in range(3)]
    with pytest.raises(ValueError, match=r"right\.blocks\.2\.attn was not called"):
        attention_maps(model, X, layers=-1)


class TwoAttentions(nn.Module):
    """Attention twice in a block; whether one after another, only its forward says."""

    def __init__(self, dim=24):
        super().__init__()
        self.norm1, self.first, self.second = nn.LayerNorm(dim), Block(dim, 3).attn, Block(dim, 3).attn

    def forward(self, x, **_):
        x = x + self.first(self.norm1(x))
        return x + self.second(x)


def test_two_attentions_in_an_unknown_block_have_no_rollout():
    model = with_block(TwoAttentions())
    assert list(attention_maps(model, X))[1:3] == ["blocks.1.first", "blocks.1.second"]
    with pytest.raises(ValueError, match=r"blocks\.1 \(TwoAttentions\) .*rollout_matrix"):
        attention_rollout(model, X)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_tracker_gives_each_tower_its_own_class_rows(swapped):
    with_class, without = tiny(), sharp(VisionTransformer(**{**TINY, "class_token": False, "global_pool": "avg"}))
    model = Pair(without, with_class) if swapped else Pair(with_class, without)
    sparsify(model, 0.02)
    with TokenSparsityTracker(model) as tracker:
        model(X)
    table = tracker.table()
    of_class = set(table[table["queries"] == "class"]["layer"])
    assert of_class == {f"{'right' if swapped else 'left'}.blocks.{i}.attn" for i in range(3)}
    assert set(table[table["queries"] == "all"]["layer"]) == {
        f"{side}.blocks.{i}.attn" for side in ("left", "right") for i in range(3)
    }
