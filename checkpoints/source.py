"""Where a model lies: a hub id, a folder, or the bundled demo; always answered with a local folder."""

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

from checkpoints.errors import CheckpointError, first_line
from checkpoints.weight_files import MANIFEST, NAMINGS, ORBAX_WEIGHTS, LoadFormat, choose_format

DEMO_FOLDER = Path(__file__).parent / "demo"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
COMPANION_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str | None, *, revision: str | None = None, load_format: LoadFormat = LoadFormat.AUTO) -> Path:
    """Return the folder that holds `model`, fetching it from the Hugging Face hub if it is a hub id.

    A name that is a folder here is that folder. A hub id is fetched into the hub's cache, weights in one format
    only, and served from the cache where the hub cannot be reached.

    Raises:
        CheckpointError: there is no such folder or repository, or it lacks what `load_format` needs.
    """
    if model is None:
        if not (DEMO_FOLDER / "config.json").is_file():
            raise CheckpointError(f"the bundled demo model is not at {DEMO_FOLDER}; name a model")
        return DEMO_FOLDER
    if not model:
        raise CheckpointError("the model's name is empty; give a folder or a hub id such as facebook/opt-125m")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{model} is a file; give the folder that holds it and config.json")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no folder {model}, and it is no hub id such as facebook/opt-125m")
    return _from_hub(model, revision, load_format)


def _from_hub(repository: str, revision: str | None, load_format: LoadFormat) -> Path:
    from huggingface_hub import HfApi

    small = [*COMPANION_FILES, MANIFEST]
    folder = _snapshot(repository, revision, small)
    if load_format is LoadFormat.DUMMY:
        return folder
    commit = folder.name
    names: Collection[str] = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    with contextlib.suppress(Exception):  # whatever keeps the hub from answering, its cache may do
        names = HfApi().list_repo_files(repository, revision=commit)
    chosen = choose_format(names, load_format, f"hub repository {repository}")
    weights = [f"{ORBAX_WEIGHTS}/*"] if chosen is LoadFormat.ORBAX else NAMINGS[chosen].matches(names)
    return _snapshot(repository, commit, [*small, *weights])


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{repository} at revision {revision}" if revision else repository
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"hub repository {at} is gated; accept its terms there and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"hub repository {repository} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repository} here and no public repository of that name on the hub; "
            "check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repository} here, the hub cannot be reached, and its cache lacks files of {at} "
            f"({first_line(error)}); download it where there is a network, or give a folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"{at} cannot be fetched from the hub: {first_line(error)}") from error
