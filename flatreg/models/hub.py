"""Models of the Hugging Face Hub, and of folders as timm writes them: data only, no code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatreg.data.text import one_line

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_LARGEST_CONFIG = 1_000_000  # bytes; with the names of 22,000 classes it has half of that
_SECONDS = 5.0  # for an answer of the Hub
_REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What a configuration may say about its weights; it may not say where else to fetch some.
_ABOUT_WEIGHTS = {"num_classes", "mean", "std", "input_size", "fixed_input_size", "pool_size"}
_ABOUT_WEIGHTS |= {"crop_pct", "crop_mode", "interpolation", "first_conv", "classifier"}
_ABOUT_WEIGHTS |= {"label_names"}
_NOWHERE_ELSE = {"custom_load": False, "label_offset": 0}


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a stored model is, apart from its weights.

    Attributes:
        architecture: in timm's registry.
        args: of the network, as its configuration says them: not checked.
        about: entries of timm's `pretrained_cfg`: classes, normalisation, names of layers.
        weights: in the format of safetensors.
    """

    architecture: str
    args: Mapping[str, Any]
    about: Mapping[str, Any]
    weights: Path


def is_stored(name: str) -> bool:
    """Whether the name of a model says where it is stored: `hf-hub:` or `local-dir:`."""
    return name.startswith(("hf-hub:", "local-dir:"))


def find_stored(name: str) -> StoredModel:
    """Find `hf-hub:OWNER/MODEL`, `hf-hub:OWNER/MODEL@REVISION` or `local-dir:FOLDER`.

    Files of the Hub come from its local cache, and only where they are not there from the Hub. Both
    files are of one revision.

    Raises:
        ValueError: there is no such model, the Hub does not answer, or the model is none of timm
            with weights in safetensors.
    """
    source, _, place = name.partition(":")
    if source == "local-dir":
        folder = Path(place).expanduser()
        config, weights = (
            path if path.is_file() else None for path in (folder / _CONFIG, folder / _WEIGHTS)
        )
    else:
        match = _REPOSITORY.fullmatch(place)
        if not match:
            raise ValueError(f"{name}: expected hf-hub:OWNER/MODEL or hf-hub:OWNER/MODEL@REVISION")
        config = fetched(match["id"], _CONFIG, match["revision"])
        # Both of one commit, whose name is that of the folder in the cache.
        weights = config and fetched(match["id"], _WEIGHTS, config.parent.name)
    if config is None or weights is None:
        raise ValueError(
            f"{name}: expected {_CONFIG} and {_WEIGHTS}, as timm writes them; there is no "
            f"{_WEIGHTS if config else _CONFIG}, and pickled weights are not read"
        )
    return _described(name, config, weights)


def cached(repository: str, file: str, revision: str | None = None) -> Path | None:
    """A file in the Hub's local cache; None where it is not in it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetched(repository: str, file: str, revision: str | None = None) -> Path | None:
    """A file of the Hub, from its local cache where it is in it; None where the Hub has none.

    Raises:
        ValueError: it is not in the cache, and the Hub does not have the repository, does not let
            us have it, or does not answer within seconds.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if there := cached(repository, file, revision):
        return there
    try:
        # hf_hub_download repeats for half a minute what gets no answer.
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision), timeout=_SECONDS)
        return Path(hf_hub_download(repository, file, revision=revision, etag_timeout=_SECONDS))
    except EntryNotFoundError:
        return None
    except Exception as error:  # of any kind: it depends on the network
        raise ValueError(
            f"hf-hub:{repository}: {file} is not in the local cache, and the Hub does not give it: "
            f"{one_line(error, 160) or type(error).__name__}"
        ) from error


def _described(name: str, file: Path, weights: Path) -> StoredModel:
    """What the configuration of a model says, in timm's present form or its former flat one."""
    import timm  # seconds to import

    wrong = f"{name}: {_CONFIG} is not that of a model of timm"
    if file.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{wrong}: expected at most {_LARGEST_CONFIG:,} bytes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wrong}: {one_line(error, 80)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{wrong}: expected a map")
    architecture, args = config.get("architecture"), config.get("model_args") or {}
    about = config.get("pretrained_cfg", config)
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(
            f"{wrong}: expected the name of an architecture of timm under 'architecture', got "
            f"{architecture!r:.60}"
        )
    if not isinstance(args, dict) or not isinstance(about, dict):
        raise ValueError(f"{wrong}: expected maps under 'model_args' and 'pretrained_cfg'")
    told = {**about, **config}  # what stands outside `pretrained_cfg` goes first
    kept = {key: told[key] for key in _ABOUT_WEIGHTS & told.keys()} | _NOWHERE_ELSE
    size, cut = kept.get("input_size", []), kept.get("crop_pct", 1)
    if not isinstance(size, list) or not isinstance(cut, (int, float)) or not 0 < cut <= 1:
        raise ValueError(f"{wrong}: expected a list as input_size, and crop_pct in (0, 1]")
    names = kept.get("label_names")  # timm has them as a map too, where numbers are left out
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        kept.pop("label_names", None)
    if size and "in_chans" in args:  # older files have the size of timm's weights, not of theirs
        kept["input_size"] = (args["in_chans"], *size[1:])
    args = {key: value for key, value in args.items() if key not in ("num_classes", "in_chans")}
    return StoredModel(architecture=architecture, args=args, about=kept, weights=weights)
