"""Saving a notebook in JupyterLab does not change which Python it says it was run with.

A notebook's metadata name the kernel and its version. Whoever opens it gets their own there, so that a notebook that
was only looked at would differ from the repository's. `make environment` copies this file into the environment.
"""

import json
from pathlib import Path


def keep_kernel(model, path, contents_manager, **_):
    """Jupyter Server's ``pre_save_hook``: metadata about the kernel stay as the file has them.

    Not where the reader has chosen another kernel, which has another name.
    """
    file = Path(contents_manager.root_dir, path.strip("/"))
    if model["type"] != "notebook" or not file.is_file():
        return
    old, new = json.loads(file.read_text(encoding="utf-8")).get("metadata", {}), model["content"]["metadata"]
    if old.get("kernelspec", {}).get("name") == new.get("kernelspec", {}).get("name"):
        new.update({name: old[name] for name in ("kernelspec", "language_info") if name in old})


get_config().ContentsManager.pre_save_hook = keep_kernel  # type: ignore[name-defined]  # noqa: F821
