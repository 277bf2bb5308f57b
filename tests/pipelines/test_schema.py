"""The JSON schema accepts what the recipes contain and refuses what the parser refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipelines.grid import expand, read_sweep
from pipelines.recipe import parse_recipe
from pipelines.schema import main, recipe_schema
from pipelines.steps import STEPS

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("smoke/*.yaml")])
SCHEMA = recipe_schema()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid_for_parser_and_schema(path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    parse_recipe(raw, path.stem)
    Draft202012Validator(SCHEMA).validate(raw)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_the_project_is_valid(path: Path) -> None:
    base, axes, _ = read_sweep(path, [])
    variants = expand(base, axes, [], Path("runs"))
    assert len(variants) == math.prod(len(options) for options in axes.values())


def test_the_schema_knows_all_steps_and_refuses_typos() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    shown = json.dumps(SCHEMA["properties"]["steps"])
    assert all(f'"{kind}"' in shown or STEPS[kind].__name__ in shown for kind in STEPS)
    raw = yaml.safe_load((CONFIGS[0].parent / "smollm2_135m_nf4_para.yaml").read_text())
    raw["steps"][0]["blok_size"] = 64
    errors = list(Draft202012Validator(SCHEMA).iter_errors(raw))
    assert len(errors) == 1 and list(errors[0].path) == ["steps", 0]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))
