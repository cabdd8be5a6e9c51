"""Which weight files a folder or a hub repository holds, and which of them to read."""

import dataclasses
import enum
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from apt_jax.checkpoints.errors import CheckpointError, some
from apt_jax.files import Unreadable, check_file, read_json


class LoadFormat(enum.StrEnum):
    """Values of `--load-format`."""

    AUTO = "auto"
    SAFETENSORS = "safetensors"
    PT = "pt"
    FLAX = "flax"
    ORBAX = "orbax"
    DUMMY = "dummy"


MANIFEST = "apt_jax_manifest.json"  # what `apt-jax convert` writes last
ORBAX_WEIGHTS = "weights"
CACHE_RANGES = "cache_ranges.bin"  # beside them, of `apt-jax convert --cache-dtype int8`


@dataclasses.dataclass(frozen=True)
class Naming:
    """File names of one Hugging Face format."""

    single: str
    shard: re.Pattern[str]

    @property
    def index(self) -> str:
        """The file that says which shard holds which tensor."""
        return f"{self.single}.index.json"

    def matches(self, names: Collection[str]) -> list[str]:
        """Those of `names` that belong to the format."""
        return sorted(n for n in names if n in (self.single, self.index) or self.shard.fullmatch(n))


NAMINGS = {
    LoadFormat.SAFETENSORS: Naming("model.safetensors", re.compile(r"model-\d+-of-\d+\.safetensors")),
    LoadFormat.PT: Naming("pytorch_model.bin", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
    LoadFormat.FLAX: Naming("flax_model.msgpack", re.compile(r"flax_model-\d+-of-\d+\.msgpack")),
}


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The files of one checkpoint, in order, and for a sharded one the file that should hold each key."""

    format: LoadFormat
    paths: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str] = dataclasses.field(default_factory=dict)


def torch_is_installed() -> bool:
    """Whether `pytorch_model.bin` can be read here."""
    return importlib.util.find_spec("torch") is not None


def choose_format(names: Collection[str], requested: LoadFormat, where: str) -> LoadFormat:
    """Pick the format to read among the files `names`.

    A converted checkpoint first, then safetensors, then `pytorch_model.bin` where torch is installed, then
    `flax_model.msgpack`, then `pytorch_model.bin` all the same, for its reader says what to do about torch.

    Raises:
        CheckpointError: nothing in `where` is in the requested format, or in any.
    """
    present = [f for f, naming in NAMINGS.items() if naming.matches(names)]
    if MANIFEST in names or (ORBAX_WEIGHTS in names and not present):  # the latter is an interrupted conversion
        present.insert(0, LoadFormat.ORBAX)
    if requested is LoadFormat.DUMMY:
        return requested
    if requested is not LoadFormat.AUTO:
        if requested not in present:
            has = f"it has {', '.join(present)}" if present else "it has no weights"
            raise CheckpointError(f"{where} has no weights in load_format={requested.value!r}; {has}")
        return requested
    if not present:
        raise CheckpointError(
            f"{where} has no weights: expected {', '.join(n.single for n in NAMINGS.values())}, their sharded "
            "forms, or a folder written by `apt-jax convert`; --load-format dummy makes random weights"
        )
    if LoadFormat.PT in present and len(present) > 1 and not torch_is_installed():
        present.remove(LoadFormat.PT)
    return present[0]


def find_weight_files(folder: Path, load_format: LoadFormat) -> WeightFiles:
    """List the files of a Hugging Face format in `folder`, sharded or not.

    Raises:
        CheckpointError: a file cannot be read; a shard is missing or is not in the index; or the folder holds
            both a whole and a sharded checkpoint.
    """
    naming = NAMINGS[load_format]
    present = naming.matches([path.name for path in folder.iterdir()])
    for name in present:
        _check_readable(folder / name)
    shards = [name for name in present if naming.shard.fullmatch(name)]
    index = folder / naming.index
    if naming.single in present:
        if len(present) > 1:
            others = some([name for name in present if name != naming.single])
            raise CheckpointError(f"{folder} holds both {naming.single} and {others}; remove one of the two")
        return WeightFiles(load_format, (folder / naming.single,))
    if naming.index not in present:
        raise CheckpointError(f"{index} is missing, so the shards {some(shards)} cannot be read; fetch it")
    weight_map = _read_index(index)
    wanted = list(dict.fromkeys(weight_map.values()))
    for name in wanted:
        if name not in shards:
            raise CheckpointError(f"{folder / name} is missing, though {naming.index} names it; fetch it")
    for name in shards:
        if name not in wanted:
            raise CheckpointError(f"{folder / name} is not named by {naming.index}; remove it or fetch the index again")
    return WeightFiles(load_format, tuple(folder / name for name in sorted(wanted)), index, weight_map)


def _check_readable(path: Path) -> None:
    """The libraries that read weights would wait for ever for a pipe."""
    try:
        check_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is a link to a file that is missing; fetch it again") from error
    except Unreadable as error:
        raise CheckpointError(str(error)) from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
        ok = isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())
    except Unreadable as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt; fetch it again") from error
    if not ok:
        raise CheckpointError(f"{path} has no weight_map from tensor to file; fetch it again")
    return weight_map
