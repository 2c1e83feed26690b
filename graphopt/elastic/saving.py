"""An extracted subnet as files: `save` writes its code and its weights; what reads them is in the code itself."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from graphopt.errors import ElasticError

LOAD = '''


def load(file=None):
    """The subnet with its weights, from a file of safetensors, by default the one beside this file."""
    from pathlib import Path

    from safetensors.torch import load_file

    subnet = Subnet()
    tensors = load_file(file or Path(__file__).with_suffix(".safetensors"))
    with torch.no_grad():
        for name, tensor in [*subnet.named_parameters(), *subnet.named_buffers()]:
            tensor.copy_(tensors[name])
    return subnet
'''


def save(module: nn.Module, folder: str | Path, name: str = "subnet") -> None:
    """Write an extracted module to a folder: ``subnet.py``, its code, and ``subnet.safetensors``, its weights.

    ``from subnet import load; model = load()`` reads them, in any process that has PyTorch and safetensors. The weights
    are named as in the model; tensors that a state dict does not have (constants) are among them.

    Raises ElasticError for a module that `extract` did not write: another one, or one of the model's own class.
    """
    from safetensors.torch import save_file

    code = getattr(module, "code", None)
    if not isinstance(code, str) or type(module).__name__ != "Subnet":
        raise ElasticError(f"module: expected one of Space.extract, got {type(module).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, str(folder / f"{name}.safetensors"))
    (folder / f"{name}.py").write_text(code)
