"""Makes torchvision importable beside a torch its binary does not fit.

torchvision's wheel holds a library of C++ operators for one build of torch. Beside another build (a CUDA
wheel beside a CPU torch, say) the library does not load, and ``import torchvision`` then fails with
``operator torchvision::nms does not exist``, as do timm and transformers, which import it. None of the
models we use calls these operators: their names are enough.

Import this module and call :func:`define_missing_operators` before torchvision, timm or transformers.
"""

import importlib.util
from pathlib import Path

import torch

# `torchvision/_meta_registrations.py` gives these two a fake kernel without asking whether they exist.
SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A library's definitions last only as long as the object lives.
_libraries: list[torch.library.Library] = []


def define_missing_operators() -> bool:
    """Defines the operator names without which ``import torchvision`` fails; a second call does nothing.

    Returns True if names had to be defined (calling such an operator then raises NotImplementedError), False
    if torchvision's own library loads or torchvision is not installed.
    """
    if _libraries:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    # Names defined twice are an error, so the real library has to have its chance first.
    for folder in spec.submodule_search_locations:
        for binary in sorted([*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")]):
            try:
                torch.ops.load_library(str(binary))
            except (ImportError, OSError):
                pass
    missing = [schema for name, schema in SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    _libraries.append(library)
    return True
