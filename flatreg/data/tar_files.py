"""Images in tar files that are never unpacked: WebDataset shards, and classes as folders.

A pass over the headers says where each image lies. So a file has random access like a folder of
images: an epoch's order, a validation split and the place of a resumed training do not depend on
shards, workers or processes.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import product
from pathlib import Path
from posixpath import normpath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flatreg.data.files import check_ordinary
from flatreg.data.progress import progress_bar
from flatreg.data.text import natural_key, one_line, shown

_INFO = ("_info.json", "info.json")  # where timm looks for the files of each split
_IMAGE_KEYS = "jpg;png;webp;jpeg"  # the first three are timm's
_BLOCK = 512  # bytes of zeros after the last member
_AT_ONCE = 2**20  # bytes read at a time
_MOST_SHARDS = 1_000_000
_REMOTE = re.compile(r"\w\w+:(?!:)")  # http:, s3:, pipe:
_RANGE = re.compile(r"\{([^{}]*)\}")
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")
_DIGITS = re.compile(r"[0-9]{1,18}\Z")


class TarImages:
    """Opens images by position; places in arrays, as lists would be copied by every worker."""

    def __init__(self, files: Sequence[str], members: Sequence[_Member]) -> None:
        self._files = tuple(files)
        self._written = [_written(os.stat(file)) for file in self._files]
        self._places = np.array([member.place for member in members], dtype=np.int64).reshape(-1, 3)
        self._names = np.array([member.name.encode(errors="surrogateescape") for member in members])

    def __call__(self, position: int) -> tuple[io.BytesIO, str]:
        """The bytes, and their name in errors.

        Raises:
            ValueError: the tar file was written since it was indexed.
        """
        file, offset, size = self._places[position].tolist()
        name = self._names[position].decode(errors="surrogateescape")
        with open(self._files[file], "rb") as stream:
            if _written(os.fstat(stream.fileno())) != self._written[file]:
                raise ValueError(
                    f"{shown(self._files[file])}: written since its images were indexed: start "
                    "again, and leave it as it is"
                )
            stream.seek(offset)
            return io.BytesIO(stream.read(size)), f"{self._files[file]}, {name}"


def _written(about: os.stat_result) -> tuple[int, int]:
    return about.st_size, about.st_mtime_ns


class _Member(NamedTuple):
    """A file in a tar file."""

    name: str
    place: tuple[int, int, int]
    """Which of the tar files, offset and size in bytes."""


def _members(files: Sequence[str], what: str) -> Iterator[_Member]:
    """The files in tar files, in their order; a leading "./" is not part of a name.

    Raises:
        ValueError: a tar file is missing, compressed, damaged, ends early, has members that are no
            files, or another tar file behind its end.
    """
    for number, file in enumerate(progress_bar(f"index {what}", len(files), over=files)):
        try:
            check_ordinary(Path(file))
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    if not member.isfile() or member.issparse():
                        raise ValueError(f"{member.name} is sparse, or a link: write it whole")
                    name = normpath(member.name)
                    yield _Member(name, (number, member.offset_data, member.size))
            # tarfile takes a damaged or missing header for the end, and the rest would be lost.
            with open(file, "rb") as stream:
                stream.seek(archive.offset)
                if stream.read(_BLOCK) != bytes(_BLOCK):
                    raise ValueError(
                        f"damaged or cut short at byte {archive.offset:,}: copy it anew"
                    )
                while block := stream.read(_AT_ONCE):
                    if block.count(0) < len(block):
                        raise ValueError(
                            f"its end is at byte {archive.offset:,}, and more lies behind it, such "
                            "as another tar file: write them apart"
                        )
        except (OSError, tarfile.TarError, ValueError) as error:
            reason = one_line(getattr(error, "strerror", None) or error)
            with_suffix = file.lower().endswith(("gz", "xz", "bz2", "zst"))
            advice = ": unpack it to a plain .tar, which can be read anywhere" * with_suffix
            raise ValueError(f"{shown(file)}: not read as a tar file: {reason}{advice}") from error


def folders_in_tar(file: Path, what: str) -> tuple[TarImages, list[str]]:
    """Images of a tar file, and the class of each: the folder in which it lies, as timm has it.

    Raises:
        ValueError: as `_members`, no image lies in a folder, or two have one name.
    """
    from timm.data.readers.img_extensions import get_img_extensions  # half a second to import

    suffixes = tuple(get_img_extensions())
    found = [
        (member, Path(member.name).parent.name)
        for member in _members([str(file)], what)
        if member.name.lower().endswith(suffixes)
    ]
    met = set[str]()
    for member, _ in found:
        if member.name in met:
            called = shown(f"{file}, {member.name}")
            raise ValueError(f"{called}: it stands there twice, as after tar -r: write it anew")
        met.add(member.name)
    if not found or not all(label for _, label in found):
        raise ValueError(
            f"{shown(file)}: expected images in a folder a class, found others, or none"
        )
    found.sort(key=lambda pair: natural_key(pair[0].name))
    return TarImages([str(file)], [member for member, _ in found]), [label for _, label in found]


def shards(root: Path, split: str) -> list[str]:
    """The tar files of a split, in timm's words; none may come twice.

    That is a pattern such as "train-{0000..0127}.tar" (a count after "|" is not needed), a name
    that `_info.json` gives files to, or a name that files SPLIT.tar, SPLIT-*.tar or SPLIT/*.tar
    have.

    Raises:
        ValueError: there are none, they are not local, `_info.json` cannot be read, or a file comes
            twice.
    """
    files, met = _named(root, split), set[str]()
    for file in files:
        if os.path.realpath(file) in met:
            raise ValueError(
                f"data: {one_line(split, 60)!r} names {shown(file)} twice, whose images would "
                "count twice"
            )
        met.add(os.path.realpath(file))
    return files


def _named(root: Path, split: str) -> list[str]:
    if _REMOTE.match(split):
        raise ValueError(
            f"data: expected shards on a disk of this machine, got {one_line(split, 60)!r}: fetch "
            "them first"
        )
    if ".tar" in split or ".." in split:
        return [
            str(root / name) for part in split.split("|")[0].split("::") for name in _each(part)
        ]
    for file in (root / name for name in _INFO):
        if file.is_file():
            try:
                named = json.loads(file.read_bytes())["splits"][split]["filenames"]
                return [str(root / str(name)) for name in named]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{shown(file)}: expected splits.{one_line(split, 40)}.filenames, got "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error
    for pattern in (f"{split}.tar", f"{split}-*.tar", f"{split}/*.tar"):
        if found := sorted(glob(pattern, root_dir=root)):
            return [str(root / name) for name in found]
    raise ValueError(
        f"data.root: expected {split}.tar, {split}-*.tar or {split}/*.tar in {shown(root)}, found "
        'none: name them as "train-{0000..0127}.tar"'
    )


def _each(pattern: str) -> list[str]:
    """Every name of a pattern with braces: {0..9} counts, {00..99} with zeros, {a,b} lists."""
    parts = _RANGE.split(pattern)
    choices: list[list[str]] = []
    for place, part in enumerate(parts):
        first, dots, last = part.partition("..")
        if place % 2 == 0:
            choices.append([part])
        elif not dots:
            choices.append(part.split(","))
        elif _DIGITS.match(first) and _DIGITS.match(last) and int(first) <= int(last):
            padded = any(end[0] == "0" and len(end) > 1 for end in (first, last))
            width, numbers = max(len(first), len(last)) * padded, range(int(first), int(last) + 1)
            choices.append([f"{n:0{width}d}" for n in numbers[: _MOST_SHARDS + 1]])
        else:
            raise ValueError(f"data: expected a rising range such as {{00..31}}, got {{{part}}}")
    if math.prod(map(len, choices)) > _MOST_SHARDS:
        raise ValueError(
            f"data: expected at most {_MOST_SHARDS:,} shards, {one_line(pattern, 60)!r} is more"
        )
    return ["".join(names) for names in product(*choices)]


def web_dataset(
    files: Sequence[str], what: str, *, image_key: str | None, target_key: str | None
) -> tuple[TarImages, Tensor]:
    """Images and class numbers of WebDataset shards.

    Members whose names agree up to the first dot of the file's name are one sample. `image_key`
    names the suffixes of images, the best first. The label is the number in `.cls`, or what
    `target_key` names in `.json`.

    Raises:
        ValueError: as `_members`; a sample has no image, no label, or something twice; a label is
            no whole number; two samples have one name in one shard.
    """
    suffixes = (image_key or _IMAGE_KEYS).lower().split(";")
    images, labels = [], []
    seen: set[tuple[int, str]] = set()
    for name, sample in _samples(files, what):
        file = files[next(iter(sample.values())).place[0]]
        called = f"{file}, {name}"
        at = next((sample[suffix] for suffix in suffixes if suffix in sample), None)
        target = sample.get("json" if target_key else "cls")
        if at is None or target is None:
            wanted = f".{'/.'.join(suffixes)} and .{'json' if target_key else 'cls'}"
            raise ValueError(
                f"{shown(called)}: expected {wanted}, got "
                f"{shown(', '.join(f'.{suffix}' for suffix in sample))}"
            )
        if (at.place[0], name) in seen:
            raise ValueError(f"{shown(called)}: two samples of that name: write them apart")
        seen.add((at.place[0], name))
        images.append(at)
        labels.append(_label(file, target, target_key, called))
    return TarImages(files, images), torch.tensor(labels, dtype=torch.long)


def _samples(files: Sequence[str], what: str) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Members that follow each other and have one name: the name, and the member of each suffix."""
    name, sample, shard = "", dict[str, _Member](), -1
    for member in _members(files, what):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        # __meta__.json and its like belong to the shard.
        if not dot or (stem.startswith("__") and stem.endswith("__")):
            continue
        if (folder + slash + stem, member.place[0]) != (name, shard):
            if sample:
                yield name, sample
            name, sample, shard = folder + slash + stem, {}, member.place[0]
        if suffix.lower() in sample:
            raise ValueError(f"{shown(f'{files[shard]}, {member.name}')}: it stands there twice")
        sample[suffix.lower()] = member
    if sample:
        yield name, sample


def _label(file: str, member: _Member, key: str | None, called: str) -> int:
    _, offset, size = member.place
    with open(file, "rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    try:
        value: Any = content.decode("ascii") if key is None else json.loads(content)[key]
        if isinstance(value, bool) or not _WHOLE.fullmatch(str(value)):
            raise TypeError(f"got {one_line(repr(value), 60)}")
        return int(value)
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        where = "in .cls" if key is None else f"as {key!r} in .json"
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"{shown(called)}: expected a class number {where}, got {reason}"
        ) from error
