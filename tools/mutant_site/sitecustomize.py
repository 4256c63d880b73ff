"""Breaks the operator on purpose, for ``make mutants``. Only that program puts this folder on PYTHONPATH.

``SVIT_MUTANT`` names the fault:

- ``softmax``: the plain softmax, nothing is cut;
- ``tau2``: the threshold is doubled;
- ``norenorm``: what is left after the cut is not renormalised.

The fault is put in right after `svit_utils.attention.formula` is imported, so that every module that takes the
function from there gets the broken one; ``backend="auto"`` is made to choose that one always. With
``SVIT_MUTANT_LOG`` a line is written to that file at its first call.
"""

import importlib.abc
import importlib.util
import os
import sys

REFERENCE = "svit_utils.attention.formula"
DISPATCH = "svit_utils.attention.functional"
FUNCTION = "cut_and_renormalise"
MUTANTS = ("softmax", "tau2", "norenorm")


def broken(original, kind):
    """The operator with the fault: probabilities [..., N, M] and tau to weights [..., N, M]."""
    said: list[bool] = []

    def operator(probs, tau, *args, **kwargs):
        if not said and os.environ.get("SVIT_MUTANT_LOG"):
            said.append(True)
            with open(os.environ["SVIT_MUTANT_LOG"], "a", encoding="utf-8") as file:
                file.write(kind + "\n")
        if kind == "softmax":
            return probs
        if kind == "tau2":
            return original(probs, 2 * tau, *args, **kwargs)
        weights = original(probs, tau, *args, **kwargs)
        # Where the formula holds, R itself; a fallback row has no sum to leave out.
        left = (probs - tau).relu()
        return left.where((left > 0).any(dim=-1, keepdim=True), weights)

    return operator


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, kind):
        self.loader, self.kind = loader, kind

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        if module.__name__ == REFERENCE:
            setattr(module, FUNCTION, broken(getattr(module, FUNCTION), self.kind))
        else:
            module.backend_for = lambda *args, **kwargs: "reference"  # `thresholded_attention` looks it up there


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, kind):
        self.kind, self.busy = kind, False  # busy: looking for the module itself

    def find_spec(self, name, path=None, target=None):
        if name not in (REFERENCE, DISPATCH) or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.kind)
        return spec


_kind = os.environ.get("SVIT_MUTANT", "")
if _kind:
    if _kind not in MUTANTS:
        raise SystemExit(f"SVIT_MUTANT is {_kind!r}; there are: {', '.join(MUTANTS)}")
    sys.meta_path.insert(0, _Finder(_kind))
