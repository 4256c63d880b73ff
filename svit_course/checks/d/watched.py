"""A small model that notes each of its forward passes, so that a whole training run can be judged from its notes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from svit_course.question import Case, Seen, Wrong
from svit_utils.attention import sparse_modules

Note = dict[str, Any]
CLASSES, TESTED = 4, 10


class Watched(VisionTransformer):
    """Notes each forward pass in a list that copies of the model share."""

    diary: ClassVar[list[Note]] = []
    models: ClassVar[list[VisionTransformer]] = []  # kept, so that no two have the same id

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not any(self is model for model in Watched.models):
            Watched.models.append(self)
        taus = [
            float(module.threshold(x.shape[0]).max())
            for module in sparse_modules(self).values()
            if module.threshold is not None
        ]
        Watched.diary.append(
            {
                "who": next(i for i, model in enumerate(Watched.models) if self is model),
                "tau": max(taus, default=0.0),
                "sparse": bool(taus),
                "training": self.training,
                "learning": torch.is_grad_enabled(),
                "pictures": x[:, 0, 0, 0].detach().clone(),  # random numbers: they tell which pictures these are
                "weights": flat(self),
            }
        )
        return super().forward(x, *args, **kwargs)

    @classmethod
    def forget(cls) -> None:
        """Throw all notes away."""
        cls.diary.clear()
        cls.models.clear()


def flat(model: torch.nn.Module) -> Tensor:
    """All parameters in one new tensor."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def small(case: Case, kind: type[VisionTransformer] = VisionTransformer) -> VisionTransformer:
    """N = 17 tokens, one block, two heads, float64; attention that is not flat, so that the cut cuts."""
    with torch.random.fork_rng(devices=[]):
        model = kind(img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=2, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(case["data"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def pictures(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, 3, 8, 8] and labels [n] to train on, images [TESTED, 3, 8, 8] to answer."""
    generator = torch.Generator().manual_seed(case["data"] + 1)
    images = torch.randn(case["n"] + TESTED, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (case["n"],), generator=generator)
    return images[:-TESTED], labels, images[-TESTED:]


def run(case: Case, fine_tune: Any, seed: int, luck: int) -> Seen:
    """One call of the student's function, with its notes.

    Args:
        seed: is handed to the function.
        luck: seed of the global generators, which the function should not depend on.
    """
    start, (images, labels, test_images) = small(case, Watched), pictures(case)
    before = [images.clone(), labels.clone(), test_images.clone()]
    Watched.forget()
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
        raise Wrong("fine_tune should return two tensors, the logits of the dense and of the sparse model")
    notes = list(Watched.diary)
    Watched.forget()
    same = [torch.equal(x, y) for x, y in zip(before, (images, labels, test_images), strict=True)]
    return {
        "dense": result[0],
        "sparse": result[1],
        "notes": notes,
        "start": flat(start),
        "start_sparse": len(sparse_modules(start)),
        "changed": [n for n, kept in zip(("images", "labels", "test_images"), same, strict=True) if not kept],
    }


def which(case: Case, note: Note) -> np.ndarray:
    """Indices of the pictures of a note: 0 to n - 1 to train on, n and up to be answered; -1 is unknown."""
    images, _, test_images = pictures(case)
    known = torch.cat([images, test_images])[:, 0, 0, 0].numpy()
    same = known[None] == np.asarray(note["pictures"])[:, None]  # [batch, n + TESTED]
    return np.where(same.any(1), same.argmax(1), -1)


def learns(case: Case, note: Note) -> bool:
    """Whether the note is of a training step: gradients on, pictures to train on and no others."""
    found = which(case, note)
    return bool(note["learning"] and (found >= 0).all() and (found < case["n"]).all())
