"""Training graphs in files: one zip of ``graph.json`` and ``constants.safetensors``.

No pickle, no parsing of code: a file holds data only, and loading runs nothing of it. What a loaded graph *does*
when it is run is what its file says, as with any model: it calls operators that are registered here, and a fixed
set of Python functions.

``graph.json`` holds the format number and the version of torch (operators and their decompositions differ between
releases), sizes and guards, the signature, descriptions of the constants, and the nodes in order with what each
gives. Operators are named as in ``torch.ops``, sizes are nested lists (`graphopt.graph.expressions`).
"""

from __future__ import annotations

import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors

from graphopt.errors import LoadError
from graphopt.graph.expressions import short
from graphopt.graph.graph_json import constants_to_store, graph_from_data, graph_to_data
from graphopt.graph.training_graph import TrainingGraph

FORMAT = 1
"""The number of the file format; a release that changes it says how to convert."""

_GRAPH = "graph.json"
_CONSTANTS = "constants.safetensors"
_MAX_JSON = 1 << 28


def save(graph: TrainingGraph, path: str | os.PathLike[str]) -> None:
    """Write ``graph`` to ``path``, replacing what was there at once or not at all.

    Equal graphs give equal files. Of a node's metadata only the value, phase, module path and source line are kept.

    Raises:
        GraphoptError: the graph holds something a file cannot: a Python function or object of the user's, a
            tensor that is not strided. Names the node; nothing is written.
        OSError: the folder does not exist or is full.

    Example:
        >>> import torch, graphopt, tempfile, pathlib
        >>> graph = graphopt.capture(torch.nn.Linear(4, 2), torch.randn(3, 4))
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "linear.graph"
        >>> graph.save(file)
        >>> graphopt.TrainingGraph.load(file).text() == graph.text()
        True
    """
    target = Path(path)
    content = _pack(graph_to_data(graph), constants_to_store(graph.constants))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> TrainingGraph:
    """Read a graph written by `save`, on new fake tensors with one symbol for each free size.

    Raises:
        LoadError: the file is missing, damaged, of another format or torch release, or names an operator that
            is not registered here. Names the file, what came, what was expected and what to do.
    """
    try:
        data, constants = _unpack(Path(path))
        return graph_from_data(data, constants)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # whatever damaged or hostile data provokes below
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise LoadError(f"{path}: is no saved graph or is damaged ({reason}); save the graph anew") from error


def _pack(data: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> bytes:
    data = {"format": FORMAT, "torch": str(torch.__version__), **data}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # ZipInfo has a fixed date, so that equal graphs give equal files.
        archive.writestr(zipfile.ZipInfo(_GRAPH), text, compress_type=zipfile.ZIP_DEFLATED)
        archive.writestr(
            zipfile.ZipInfo(_CONSTANTS), safetensors.save(dict(constants)), compress_type=zipfile.ZIP_STORED
        )
    return buffer.getvalue()


def _unpack(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with zipfile.ZipFile(path) as archive:
            missing = {_GRAPH, _CONSTANTS} - set(archive.namelist())
            if missing:
                raise LoadError(f"holds no {', '.join(sorted(missing))}; expected a file written by TrainingGraph.save")
            if archive.getinfo(_CONSTANTS).compress_type != zipfile.ZIP_STORED:
                raise LoadError(f"{_CONSTANTS} is compressed; expected a file written by TrainingGraph.save")
            with archive.open(_GRAPH) as file:
                text = file.read(_MAX_JSON + 1)
            raw = archive.read(_CONSTANTS)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise LoadError("there is no such file; expected one written by TrainingGraph.save") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise LoadError(f"is no zip file or is cut off ({error}); save the graph anew") from error
    if len(text) > _MAX_JSON:
        raise LoadError(f"{_GRAPH} is larger than {_MAX_JSON} bytes; expected a file written by TrainingGraph.save")
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise LoadError(
            f"has format {short(found)}, this release reads {FORMAT}; save the graph anew with this release"
        )
    if _release(data.get("torch")) != _release(torch.__version__):
        raise LoadError(
            f"was written by torch {short(data.get('torch'))}, this is {torch.__version__}: operators differ "
            "between releases; capture the graph anew, or load it with that release"
        )
    return data, safetensors.load(raw)


def _release(version: Any) -> list[str]:
    return str(version).split(".")[:2]
