"""Make a torchvision built for CUDA importable beside a CPU build of torch.

PyPI's torchvision for Linux links its compiled operators against CUDA. Beside a CPU torch they do
not load, torchvision shrugs (``extension._has_ops()`` is false), and nearly everything still works,
because the transforms are written in torch. One module does not ask first: it registers fake
kernels for ``nms`` and ``qnms``, whose schemas only the compiled operators would have declared, and
so ``import torchvision`` fails. This hook declares these two schemas, without kernels, at the one
moment between the two. Where the operators do load it does nothing.

A ``.pth`` file calls ``install`` in every interpreter of the environment, because vLLM's engine and
workers are processes of their own. Nothing heavy is imported before torchvision itself is.
"""

import sys
from importlib.machinery import PathFinder

EXTENSION = "torchvision.extension"
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries = []  # a torch Library withdraws its declarations when it is collected


def install():
    """Wait for ``torchvision.extension`` to be imported, in this process."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds what Python's own path finder finds, and completes one module after it has run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != EXTENSION:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_complete(module):
            run(module)
            if not module._has_ops():
                _declare()

        spec.loader.exec_module = run_and_complete
        return spec


def _declare():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, signature in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + signature)
    _libraries.append(library)
