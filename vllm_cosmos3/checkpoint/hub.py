"""Where a checkpoint is: a folder as it stands, or a Hugging Face repository in the ordinary cache.

Some have a short name, in the table `SHORT_NAMES`.

The configuration comes first and is read before any weights are asked for: a checkpoint that cannot
be run costs kilobytes, not tens of gigabytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.derived import completed, is_derived
from vllm_cosmos3.errors import CheckpointError, did_you_mean

CONFIGURATION = ["*.json", "*.txt", "*.jinja"]
PARTS = ("transformer", "vision_encoder")  # folders, of which a checkpoint has at least one
CLONE = Path(__file__).parents[2]  # nothing of it is there beside an installed wheel
# Short names wherever a checkpoint is named: for a folder of the clone, or a repository of the hub.
# The repositories have those that the Cosmos Framework gives them.
SHORT_NAMES: dict[str, Path | str] = {
    "demo": CLONE / "checkpoints" / "demo",
    "demo-4step": CLONE / "checkpoints" / "demo-4step",
    "demo-policy": CLONE / "checkpoints" / "demo-policy",
    "Cosmos3-Nano": "nvidia/Cosmos3-Nano",
    "Cosmos3-Nano-Policy-DROID": "nvidia/Cosmos3-Nano-Policy-DROID",
    "Cosmos3-Nano-Sim-Bimanual": "nvidia/Cosmos3-Nano-Sim-Bimanual",
    "Cosmos3-Super": "nvidia/Cosmos3-Super",
    "Cosmos3-Super-Text2Image": "nvidia/Cosmos3-Super-Text2Image",
    "Cosmos3-Super-Image2Video": "nvidia/Cosmos3-Super-Image2Video",
    "Cosmos3-Super-Text2Image-4Step": "nvidia/Cosmos3-Super-Text2Image-4Step",
    "Cosmos3-Super-Image2Video-4Step": "nvidia/Cosmos3-Super-Image2Video-4Step",
    "Cosmos3-Edge": "nvidia/Cosmos3-Edge",
    "Cosmos3-Edge-Policy-DROID": "nvidia/Cosmos3-Edge-Policy-DROID",
    "edge": "nvidia/Cosmos3-Edge",
}
PUBLISHED = tuple(place for place in SHORT_NAMES.values() if isinstance(place, str))


def full_name(model: str | Path) -> str:
    """The folder or repository that a short name stands for; every other name as it is.

    A checkpoint in a folder of that name comes first. A folder that only says what differs from a base
    stands for the complete one, which is put together in the cache.
    Raises CheckpointError where the folder is one of a clone, and this is no clone, and whatever
    `derived.completed` raises.
    """
    name = str(model)
    if name in SHORT_NAMES and not is_checkpoint(Path(name)):
        name = _place(name)
    folder = Path(os.path.expanduser(name))
    return str(completed(folder)) if is_derived(folder) else name


def _place(name: str) -> str:
    place = SHORT_NAMES[name]
    if isinstance(place, Path) and not (is_checkpoint(place) or is_derived(place)):
        raise CheckpointError(
            f"{name} is the folder {place.relative_to(CLONE)} of this project's repository, which is "
            "not part of the installed package: clone the repository and name that folder"
        )
    return str(place)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint in the published layout."""
    return any((folder / part).is_dir() for part in PARTS)


def resolve(model: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of ``model``: a folder, a repository such as ``nvidia/Cosmos3-Nano``, a short name.

    Of a repository the generator's files are downloaded, unless the cache has them, with the token
    of ``hf auth login`` or ``HF_TOKEN``, or without ``weights`` only what describes the model.
    ``revision`` is a branch, tag or commit; folders have none.
    Raises CheckpointError with the fix where there is no such model or it cannot be reached, and
    whatever read_config raises.
    """
    name = full_name(model)
    folder = Path(os.path.expanduser(name))  # leaves a user that nobody knows as it is
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder} is a folder, revision {revision!r} needs a repository")
        return folder
    if "/" not in name:  # the hub has models without an owner, but none of Cosmos 3
        problem = f"{name} is neither a folder nor a repository id such as {PUBLISHED[0]}"
        raise CheckpointError(problem + _hint(name))
    snapshot = _download(name, revision, CONFIGURATION)
    patterns = _weight_patterns(read_config(snapshot))
    if not weights:
        return snapshot
    # The commit, not the branch: it may have moved since the configuration was read.
    return _download(name, snapshot.name, [*CONFIGURATION, *patterns])


def _weight_patterns(config: ModelConfig) -> list[str]:
    """What the generator loads. The vision encoder is the reasoner's."""
    folders = ["transformer", "vae", *(["sound_tokenizer"] if config.sound else [])]
    return [f"{folder}/*.safetensors" for folder in folders]


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.HFValidationError:
        problem = (
            f"model is {name!r}, must be an existing folder "
            "or a Hugging Face repository such as nvidia/Cosmos3-Nano"
        )
    except errors.GatedRepoError:
        problem = (
            f"{name} is gated: accept its terms on {page} "
            "and log in with 'hf auth login' or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        problem = (
            f"{name} is neither a folder nor a Hugging Face repository that this account can see; "
            "check the name, and log in with 'hf auth login' or set HF_TOKEN if it is private"
        )
    except errors.RevisionNotFoundError:
        problem = f"{name} has no revision {revision!r}; {page}/tree/main lists them"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            f"{name} is not a folder, not complete in the Hugging Face cache, and the hub cannot be "
            "reached; check the network, unset HF_HUB_OFFLINE, or name a local folder"
        )
    except (errors.HfHubHTTPError, OSError) as error:
        problem = f"{name} cannot be downloaded: {str(error).strip().splitlines()[0]}"
    raise CheckpointError(problem + _hint(name))


def _hint(name: str) -> str:
    """The name that a name may have been meant to be, as the end of a sentence."""
    near = "" if name in PUBLISHED else did_you_mean(name, (*PUBLISHED, *SHORT_NAMES))
    return f"; {near}" if near else ""
