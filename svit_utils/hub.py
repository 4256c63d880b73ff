"""Trained models on the Hugging Face Hub, as timm keeps them: timm reads the weights, `load_from_hub` the cut too."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download  # timm brings it
from torch import nn

from svit_utils.files import write_file
from svit_utils.models import load_trained, read_card, save_trained

FILES = ("config.json", "model.safetensors")


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    card: Mapping[str, Any] | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Add model",
    token: str | None = None,
    **as_save_trained: Any,
) -> str:
    """Save a model as `save_trained` does and upload the folder; the repository is made where there is none.

    A README that says how to load the model is written where the repository has none.

    Args:
        model, card, as_save_trained: as for `svit_utils.save_trained`.
        repo_id: ``owner/name``, or a name in one's own account.
        private: of a repository that is made.
        revision: branch; the main one by default.
        commit_message: of the upload.
        token: of the Hub; by default the one of ``hf auth login``.

    Returns:
        ``hf-hub:owner/name``: what ``timm.create_model(…, pretrained=True)`` and `load_from_hub` take.

    Raises:
        ValueError: the model cannot be saved; nothing is uploaded then.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    api = HfApi(token=token, library_name="svit_utils")
    with TemporaryDirectory() as name:
        folder = save_trained(model, Path(name, "model"), card, **as_save_trained)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md", revision=revision):
            write_file(folder / "README.md", _readme(repo_id, read_card(folder)))
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return f"hf-hub:{repo_id}"


def load_from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its card, as `svit_utils.load_trained` returns them, from ``owner/name`` or ``hf-hub:owner/name``.

    Raises:
        WeightsError: what is there was not saved by `save_trained`.
        huggingface_hub.errors.HfHubHTTPError: there is no such repository, or the token may not read it.
    """
    repo_id = repo_id.removeprefix("hf-hub:")
    folder = snapshot_download(repo_id, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(FILES))
    return load_trained(folder)


def _readme(repo_id: str, card: Mapping[str, Any]) -> str:
    cut = (
        f"{len(card['attention'])} attention modules with sparse attention" if card["attention"] else "dense attention"
    )
    return f"""---
library_name: timm
tags: [image-classification, timm, sparse-attention]
---
# {repo_id.rpartition("/")[2]}

timm's `{card["architecture"]}` with {card["num_classes"]} classes and {cut}.

```python
from svit_utils.hub import load_from_hub
model, card = load_from_hub("{repo_id}")        # with its sparse attention

import timm
dense = timm.create_model("hf-hub:{repo_id}", pretrained=True)   # the same weights, dense
```
"""
