"""Turns a hub id, a folder or None (the bundled demo) into a local folder."""

import functools
import re
from collections.abc import Collection
from pathlib import Path

from apt_jax.checkpoints.errors import CheckpointError, first_line
from apt_jax.checkpoints.formats.weight_files import MANIFEST, NAMINGS, ORBAX_WEIGHTS, LoadFormat, choose_format
from apt_jax.tokenization.tokenizer_store import TOKENIZER_FILES

DEMO_FOLDER = Path(__file__).parent / "demo"
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


def check_revision(model: str | None, revision: str | None) -> None:
    """Raises CheckpointError if a revision of the hub is asked of a folder, which has one state only."""
    if revision and (model is None or Path(model).expanduser().is_dir()):
        what = "the bundled demo" if model is None else f"the folder {model}"
        raise CheckpointError(f"revision={revision!r} is for models of the hub, and {what} has none; leave it out")


def _from_hub(repository: str, revision: str | None, load_format: LoadFormat) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    at = f"{repository} at revision {revision}" if revision else repository
    failure: Exception | None = None
    try:  # one request without retries; the calls that download wait half a minute for a dead network
        info = HfApi().model_info(repository, revision=revision)
        names: Collection[str] = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # of the hub, its HTTP library or the network: the cache may still have the model
        failure = error
    fetch = functools.partial(snapshot_download, repository, revision=revision, local_files_only=failure is not None)
    small = [*COMPANION_FILES, MANIFEST]
    try:
        if failure is not None:
            folder = Path(fetch(allow_patterns=small))
            names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        weights: list[str] = []
        if load_format is not LoadFormat.DUMMY:
            chosen = choose_format(names, load_format, f"hub repository {at}")
            weights = [f"{ORBAX_WEIGHTS}/*"] if chosen is LoadFormat.ORBAX else NAMINGS[chosen].matches(names)
        return Path(fetch(allow_patterns=[*small, *weights]))
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_explain(at, failure or error)) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{at} cannot be fetched from the hub: {first_line(error)}") from error


def _explain(at: str, failure: Exception) -> str:
    """Why a repository is neither on the hub nor in its cache, and what to do."""
    from huggingface_hub import errors

    match failure:
        case errors.GatedRepoError():
            return f"hub repository {at} is gated; accept its terms there and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"the hub has no such revision: {at}"
        case errors.RepositoryNotFoundError():
            return f"there is neither a folder nor a public hub repository {at}; check the name, or set HF_TOKEN"
        case errors.HFValidationError():
            return f"there is no folder {at}, and it is no hub id: {first_line(failure)}"
    return (
        f"there is no folder {at}, the hub cannot be reached ({first_line(failure)}), and its cache lacks files of "
        "it; download it where there is a network, or give a folder"
    )
