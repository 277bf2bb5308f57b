"""`python -m pipelines.schema`: the JSON schema of the YAML, for completion and checks in editors."""

from __future__ import annotations

import json
import sys
from typing import Any

from pipelines.recipe import Recipe
from pipelines.steps import STEPS


def recipe_schema() -> dict[str, Any]:
    """JSON schema (2020-12) with the settings of each method beside `step`, as they are written in the YAML."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    definitions = schema["$defs"]
    variants = []
    for kind in STEPS:
        cls = STEPS[kind]
        if cls.nested is None:
            variants.append({"$ref": f"#/$defs/{cls.__name__}"})
            continue
        own = definitions.pop(cls.__name__)
        methods = _references(own["properties"].pop(cls.nested))
        for reference in methods:
            method = definitions[reference.rpartition("/")[2]]
            tag = next(name for name, value in method["properties"].items() if "const" in value)
            variants.append(
                {
                    "type": "object",
                    "title": f"{kind}: {method['properties'][tag]['const']}",
                    "description": method.get("description", own.get("description", "")),
                    "properties": {**own["properties"], **method["properties"]},
                    "required": ["step", tag, *method.get("required", [])],
                    "additionalProperties": False,
                }
            )
    del schema["properties"]["steps"]["items"]
    _allow_names(schema)
    _allow_names(variants)
    schema["properties"]["steps"]["items"] = {"oneOf": variants}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _allow_names(part: Any) -> None:
    """Where one of several methods is chosen, its bare name will do."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _allow_names(value)
    if isinstance(part, dict) and "mapping" in part.get("discriminator", ()):
        names = sorted(part["discriminator"]["mapping"])
        part |= {"anyOf": [{"enum": names}, {"oneOf": part.pop("oneOf"), "discriminator": part.pop("discriminator")}]}


def _references(field: dict[str, Any]) -> list[str]:
    if "$ref" in field:
        return [field["$ref"]]
    return [option["$ref"] for option in field["oneOf"]]


def main() -> int:
    json.dump(recipe_schema(), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
