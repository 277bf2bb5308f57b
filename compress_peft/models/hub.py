"""Is it on the hub? Asked with a short time limit, so that a run without network fails in seconds."""

from __future__ import annotations

import os
from typing import Literal

from compress_peft.errors import Problem

TIMEOUT = 5.0  # seconds


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0", "false", "False")


def hub_problem(kind: Literal["model", "dataset"], name: str, revision: str | None, where: str) -> Problem | None:
    """Why the hub does not give this repository to this user; None if it does. Nothing is downloaded.

    where: the key in the recipe.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    local = f"go online, or give a local {'folder' if kind == 'model' else 'file'}: --set {where}=/path"
    if offline():
        return Problem(where, f"{name} is not in the local cache and HF_HUB_OFFLINE is set", local)
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    page = f"https://huggingface.co/{'' if kind == 'model' else 'datasets/'}{name}"
    try:
        ask(name, revision=revision, timeout=TIMEOUT)
    except GatedRepoError:
        fix = f"accept the licence at {page}, then run: hf auth login"
        return Problem(where, f"{name} is gated: its owner asks for a licence and a login", fix)
    except RevisionNotFoundError:
        return Problem(where, f"{name} has no revision {revision}", f"look at {page}")
    except RepositoryNotFoundError:
        return Problem(where, f"the hub has no {kind} {name}", "check the spelling, or log in if it is private")
    except Exception as error:  # transport errors of whatever HTTP library the hub client uses
        what = f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__}: {error})"
        return Problem(where, what, local)
    return None
