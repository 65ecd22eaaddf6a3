"""The files of a merged model: replaced as one, and checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import cached_file

CONFIG = "config.json"
CHECKSUMS = "eas_files"
"""Where `config.json` has the SHA-256 of each file of weights, by its name."""
SCRATCH = ".saving-"
WEIGHTS = re.compile(r"model(-[0-9a-f]{8})?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
INDEX = ".safetensors.index.json"


def install(new: Path, folder: Path) -> None:
    """Move the files of a model from `new` into `folder`, so that at every moment the model that was there loads, or
    the new one does.

    What is loaded is what `config.json` says: first the new weights come in under names of their own, then a
    `config.json` that names them takes the place of the old one, in one step. After it the old weights go, and the new
    ones get the usual names: as second names of the same files, then a `config.json` that names these. Where a file
    system has no second names, they keep their own.

    Args:
        new: A folder on the same file system, which holds nothing but the model.
        folder: Where a model may be.
    """
    config = json.loads((new / CONFIG).read_text(encoding="utf-8"))
    weights = sorted(file.name for file in new.iterdir() if WEIGHTS.fullmatch(file.name))
    others = sorted(file.name for file in new.iterdir() if file.name not in (*weights, CONFIG))
    old = [file.name for file in folder.iterdir() if WEIGHTS.fullmatch(file.name)]
    config |= {CHECKSUMS: {name: sha256(new / name) for name in weights if not name.endswith(INDEX)}}
    if not weights or not old:
        for name in (*weights, *others):
            os.replace(new / name, folder / name)
        _replace_json(new, folder / CONFIG, config)
        return
    tag = secrets.token_hex(4)
    own = {name: re.sub("^model", f"model-{tag}", name) for name in weights}
    for name in weights:
        if name.endswith(INDEX):
            index = json.loads((new / name).read_text(encoding="utf-8"))
            index["weight_map"] = {key: own[file] for key, file in index["weight_map"].items()}
            (new / own[name]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(new / own[name], folder / own[name])
        else:
            os.replace(new / name, folder / own[name])
    first = next((own[name] for name in weights if name.endswith(INDEX)), own[weights[0]])
    sums = {own[name]: value for name, value in config[CHECKSUMS].items()}
    code = [name for name in others if name.endswith(".py")]
    for name in code:  # what an old config.json needs, too
        os.replace(new / name, folder / name)
    _replace_json(new, folder / CONFIG, config | {"transformers_weights": first, CHECKSUMS: sums})
    for name in set(others) - set(code):
        os.replace(new / name, folder / name)
    for name in old:
        (folder / name).unlink()
    try:
        for name in weights:
            if name.endswith(INDEX):
                os.replace(new / name, folder / name)
            else:
                os.link(folder / own[name], folder / name)
    except OSError:
        return
    _replace_json(new, folder / CONFIG, config)
    for name in own.values():
        (folder / name).unlink()


def clear(folder: Path) -> None:
    """Remove what saves that were killed have left in `folder`."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_json(scratch: Path, target: Path, content: dict) -> None:
    file = scratch / f"{target.name}.new"
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(file, target)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(name: str | os.PathLike, **where) -> list[str]:
    """Compare the weights of a merged model with the checksums that were saved with them.

    Args:
        name: A folder, or the name of a repository.
        where: What says where that is, such as `revision`, `cache_dir`, `subfolder`, as `from_pretrained` takes it.

    Returns:
        The names of the files.

    Raises:
        ValueError: if there are no checksums, or a file is not as it was saved.
        OSError: if a file is not there.
    """
    config, _ = PreTrainedConfig.get_config_dict(name, **where)
    sums = config.get(CHECKSUMS)
    if not isinstance(sums, dict) or not sums:
        raise ValueError(
            f"{name} has no checksums (`{CHECKSUMS}` in config.json) to verify its weights with: models that are saved "
            "after `merge_and_unload()` have, if an attention is skipped."
        )
    for file, expected in sums.items():
        if not WEIGHTS.fullmatch(file):
            raise ValueError(f"`{CHECKSUMS}` in config.json names {file!r}, which is no file of weights.")
        if sha256(Path(cached_file(name, file, **where))) != expected:
            raise ValueError(
                f"{file} of {name} is not as it was saved: its SHA-256 is not the one in config.json. Download it "
                "again, or merge again."
            )
    return list(sums)
