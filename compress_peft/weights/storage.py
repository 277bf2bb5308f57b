"""Compressed weights as plain named tensors and back, for safetensors.

The codes are stored under the parameter's own name (as packed bytes: a loader that does not know them stops at the
wrong shape), the other components as "<parameter>.<component>". What is not a tensor, the spec, goes elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compress_peft.errors import CorruptFile, Problem, UserError
from compress_peft.weights.compressed import CompressedWeight

Spec = dict[str, Any]


def split_state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """(tensors, specs): every tensor of the state dict, compressed weights in parts (tied ones once);
    their specs by parameter name."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, CompressedWeight):
            tensors[name] = value
            continue
        place = next(iter(value.components().values())).data_ptr()
        if place and place in seen:
            continue  # tied to one before: loading ties it again
        seen.add(place)
        specs[name] = value.spec()
        for component, tensor in value.components().items():
            tensors[stored_name(name, component, value)] = tensor
    return tensors, specs


def stored_name(parameter: str, component: str, weight: CompressedWeight | type[CompressedWeight]) -> str:
    return parameter if component == weight.component_names[0] else f"{parameter}.{component}"


def join_weight(name: str, spec: Spec, tensors: Mapping[str, Tensor]) -> CompressedWeight:
    """The weight of parameter `name` from its stored tensors, which are keyed as `split_state_dict` names them.

    Raises:
        CorruptFile: parts are missing or do not fit the spec.
    """
    kinds = CompressedWeight._kinds
    first = kinds[spec["kind"]].component_names[0] if spec.get("kind") in kinds else ""
    components = {
        (first if stored == name else stored.removeprefix(name + ".")): tensor for stored, tensor in tensors.items()
    }
    try:
        return CompressedWeight.from_components(spec, components)
    except UserError as error:
        problems = [Problem(f"{name}.{p.where}", p.what, "get or write the model folder again") for p in error.problems]
        raise CorruptFile(problems) from error
