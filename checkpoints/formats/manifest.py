"""The file that makes a converted folder a checkpoint: what it holds, written last.

A folder without it does not load, so a conversion that was killed leaves nothing that does.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.formats.weight_files import MANIFEST
from apt_jax.files import EVERYBODY, Unreadable, read_file, read_json, replace_file

_VERSION, _VERSION_INT8 = 2, 3  # older releases read 2


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `apt-jax convert` wrote."""

    fingerprint: str  # of the weights, see `fingerprint.weights_fingerprint`
    sample: str  # another of them, see `fingerprint.SampledFingerprint`
    dtype: str  # of the weights
    config_hash: str  # of config.json's bytes
    files: dict[str, int]  # path inside the folder to size in bytes, of everything but the manifest
    int8_parts: tuple[str, ...] = ()  # what is quantised, see `execution/weights/int8.py`

    def __post_init__(self) -> None:
        texts = self.fingerprint, self.sample, self.dtype, self.config_hash
        if not (all(isinstance(text, str) for text in texts) and isinstance(self.files, dict)):
            raise TypeError("a field of the manifest is of another type")

    @classmethod
    def of(
        cls, folder: Path, *, fingerprint: str, sample: str, dtype: str, int8_parts: tuple[str, ...] = ()
    ) -> "Manifest":
        """Describe the files that lie in `folder` now."""
        return cls(fingerprint, sample, dtype, _hash(folder / "config.json"), _sizes(folder), int8_parts)

    def write(self, folder: Path) -> None:
        """Put the manifest into `folder` in one step, after everything before it is on disk."""
        fields = {"version": _VERSION_INT8 if self.int8_parts else _VERSION, **dataclasses.asdict(self)}
        if not self.int8_parts:
            del fields["int8_parts"]
        text = json.dumps(fields, indent=1, sort_keys=True)
        replace_file(folder / MANIFEST, text.encode(), mode=EVERYBODY, durable=True)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest and check sizes and config.json against it.

        Raises:
            CheckpointError: there is none (an interrupted conversion), it is corrupt or of a newer version, or a
                file is missing, of another size, or changed.
        """
        path = folder / MANIFEST
        manifest = cls._parse(path)
        sizes = _sizes(folder)
        for name, size in manifest.files.items():
            if name not in sizes:
                raise CheckpointError(f"{folder / name} is missing, though {MANIFEST} names it; convert again")
            if sizes[name] != size:
                raise CheckpointError(
                    f"{folder / name} has {sizes[name]} bytes, not the {size} of {MANIFEST}; convert again"
                )
        if _hash(folder / "config.json") != manifest.config_hash:
            raise CheckpointError(f"{folder / 'config.json'} was changed after the conversion; convert again")
        return manifest

    @classmethod
    def _parse(cls, path: Path) -> "Manifest":
        try:
            fields: dict[str, Any] = read_json(path)
            version = fields.pop("version")
            if version == 1:  # it had no sample
                version, fields["sample"] = _VERSION, fields["fingerprint"]
            if version == _VERSION_INT8:
                return cls(**{**fields, "int8_parts": tuple(map(str, fields["int8_parts"]))})
            if version == _VERSION:
                return cls(**fields)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path.parent} has no {MANIFEST}: its conversion was interrupted; delete it and run `apt-jax convert` "
                "again"
            ) from error
        except Unreadable as error:
            raise CheckpointError(str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is truncated or corrupt; convert again") from error
        raise CheckpointError(
            f"{path} has {version=}, and this release reads {_VERSION} and {_VERSION_INT8}; convert again"
        )


def _sizes(folder: Path) -> dict[str, int]:
    found = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return {name: size for name, size in sorted(found.items()) if not name.endswith(MANIFEST)}


def _hash(path: Path) -> str:
    try:
        return hashlib.blake2b(read_file(path), digest_size=20).hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except Unreadable as error:
        raise CheckpointError(str(error)) from error
