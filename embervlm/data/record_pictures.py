"""The picture of a record, however it is given: as a path, or as the picture itself, like in Parquet files.

Several pictures become one file, their composite.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from embervlm.data.record_fields import COMPOSED_OF, MAX_PICTURES, FieldRules, Report, kind, quote
from embervlm.run_dir import naming_unwritten

PICTURE_NAMES = (
    "image",
    "image_path",
    "image_file",
    "image_name",
    "image_filename",
    "img",
    "img_path",
    "picture",
    "picture_path",
    "photo",
    "images",
    "file_name",
    "filename",
    "path",
)
"""Fields that name a record's picture, whatever their case; the last three only where what they name ends as pictures
do."""
_ANY_FILE = PICTURE_NAMES[-3:]
MAX_REMEMBERED_IMAGES = 100_000
"""Looked-up picture paths that are kept, so that memory does not grow with the file."""
_SUFFIX = re.compile(
    r"\.(jpe?g|jfif|jp2|png|webp|bmp|gif|tiff?|avif|heic|heif|ppm|pgm|pnm|tga|img)(?:\?.*)?$", re.IGNORECASE
)
_ENCODED = re.compile(r"(?:image|img|picture|photo)s?[_-]?(?:base64|b64|bytes|data)$")
"""Names of fields that contain a picture as text."""
PLACEHOLDER = re.compile(
    r"<\|?(?:image|img|picture)(?:[ _-]?(?:placeholder|token|soft_token|pad|here))?[ _-]?(\d*)\|?>"
    r"|<start_of_image>|\[(?:image|img)\]",
    re.IGNORECASE,
)
"""Where other data sets put the picture into the text."""
_VIDEO_PLACEHOLDER = re.compile(r"<\|?video(?:[ _-]?(?:placeholder|token|pad))?[ _-]?\d*\|?>", re.IGNORECASE)


def read_picture(value: Mapping[str, Any], metadata: dict[str, Any], rules: FieldRules, report: Report) -> str | None:
    """The resolved path of the record's picture; None if it has none, or if something was reported.

    Of several pictures it is the path of their composite, and `metadata` says of what it was made. A field that was
    taken for it leaves `metadata`.
    """
    given = {
        name: item for name, item in value.items() if name.casefold() in PICTURE_NAMES and _names_picture(name, item)
    }
    if not given:
        for name, item in metadata.items():
            if _looks_like_picture(item) or _is_called_picture(name, item):
                report(
                    f"{quote(name)}: names a picture in a field that is not read; rename the field to "
                    f"image, or remove it"
                )
                return None
        return None
    name = next(name for name in ("image", *given) if name in given)
    found = _given_as(name, given[name], report)
    if not found:
        return None
    for other, item in given.items():
        if other != name and not _same_pictures(_given_as(other, item, lambda _: None), found):
            report(f"{quote(other)}: names another picture than {name}; keep one of the two")
            return None
    if name != "image":
        metadata.pop(name, None)
    if len(found) > 1:
        return _compose(name, found, metadata, rules, report)
    (one,) = found
    return _read_bytes(name, one, rules, report) if isinstance(one, Embedded) else _read_path(name, one, rules, report)


def names_picture(value: Mapping[str, Any]) -> bool:
    """Whether a record has a picture, in a field that is read or in one that is not."""
    return any(_is_called_picture(name, item) or _looks_like_picture(item) for name, item in value.items())


def without_pictures(value: Any) -> Any:
    """A record for whoever reads texts alone: without its pictures, their boxes and their places in the question."""
    if not isinstance(value, dict):
        return value
    kept = {
        name: item
        for name, item in value.items()
        if not _is_called_picture(name, item) and not _looks_like_picture(item) and name != "boxes"
    }
    for name in ("instruction", "question"):
        if isinstance(kept.get(name), str):
            kept[name] = PLACEHOLDER.sub("", kept[name]).strip()
    if "metadata" in kept:
        kept["metadata"] = without_pictures(kept["metadata"])
    return kept


def pictures_beside(output_file: Path) -> Path:
    """Folder into which a command that writes records puts pictures that the records contained."""
    return output_file.with_name(f"{output_file.stem}-pictures")


def check_placeholders(instruction: str, num_pictures: int, report: Report) -> str:
    """`instruction` without picture placeholders, because the picture always comes before the text.

    Of several pictures, those that stand within the text become "picture 1", "picture 2", ...: by the number that a
    placeholder itself has (`<image_2>`), else in their order.
    """
    if video := _VIDEO_PLACEHOLDER.search(instruction):
        report(f"instruction: contains {video[0]}, and videos are not read; give frames in images, or remove this")
    places = list(PLACEHOLDER.finditer(instruction))
    if not places:
        return instruction
    numbers = [int(place[1]) for place in places if place[1]]
    if not num_pictures:
        report(
            f"instruction: contains {places[0][0]}, but the record has no picture; give its path in image, "
            "or remove this"
        )
    elif len(numbers) == len(places):
        if max(numbers) > num_pictures or min(numbers) < 1:
            wrong = next(place[0] for place in places if not 1 <= int(place[1]) <= num_pictures)
            report(f"instruction: contains {wrong}, but the record has {num_pictures} picture(s); correct one of them")
    elif len(places) != num_pictures:
        report(
            f"instruction: contains {len(places)} picture placeholders for {num_pictures} "
            "picture(s); write one for each, or none"
        )
    stands_before = not instruction[: places[-1].start()].replace(places[0][0], "").strip()
    if num_pictures < 2 or (stands_before and not numbers):
        return PLACEHOLDER.sub("", instruction).strip()
    order = iter(range(1, len(places) + 1))
    return PLACEHOLDER.sub(lambda place: f"picture {place[1] or next(order)}", instruction).strip()


class Embedded(NamedTuple):
    """A picture that is contained in the record itself."""

    data: bytes
    name: str


def _names_picture(name: str, item: Any) -> bool:
    """Whether a field of `PICTURE_NAMES` says anything; `image` always does."""
    if name == "image":
        return item is not None
    if name.casefold() in _ANY_FILE:
        return isinstance(item, str) and _SUFFIX.search(item) is not None
    return item not in (None, "", [], {})


def _is_called_picture(name: str, item: Any) -> bool:
    """Whether a field that nothing reads is a picture by its name: `image_base64`, not `image_metadata`."""
    if name.casefold() in PICTURE_NAMES:
        return _names_picture(name, item)
    return _ENCODED.search(name.casefold()) is not None and isinstance(item, str) and bool(item)


def _looks_like_picture(item: Any) -> bool:
    if isinstance(item, list):
        return bool(item) and all(map(_looks_like_picture, item))
    if isinstance(item, str):
        return (
            len(item) < 4096
            and "\n" not in item
            and (_SUFFIX.search(item) is not None or item.startswith("data:image"))
        )
    if isinstance(item, dict):
        return isinstance(item.get("bytes"), bytes)
    return isinstance(item, bytes)


def _given_as(name: str, item: Any, report: Report) -> list[str | Embedded]:
    """The paths or contents that one field gives; [] if something was reported."""
    items = item if isinstance(item, list) else [item]
    if not 0 < len(items) <= MAX_PICTURES:
        report(f"{name}: contains {len(items)} pictures; give 1 to {MAX_PICTURES}, or leave the field out")
        return []
    found = [_one_of(name, one, report) for one in items]
    return [one for one in found if one is not None] if None not in found else []


def _one_of(name: str, item: Any, report: Report) -> str | Embedded | None:
    """The path or content of one picture; None if something was reported."""
    if isinstance(item, bytes):
        return Embedded(item, "")
    if isinstance(item, dict):
        data, path = item.get("bytes"), item.get("path")
        if isinstance(data, bytes) and data:
            return Embedded(data, path if isinstance(path, str) else "")
        item = path if isinstance(path, str) else item
    if not isinstance(item, str):
        report(f"{name}: is {kind(item)}, not a string; give the path of the picture, or leave the field out")
        return None
    return item


def _same_pictures(some: Sequence[str | Embedded], others: Sequence[str | Embedded]) -> bool:
    return len(some) == len(others) and all(map(_is_same_picture, some, others))


def _is_same_picture(one: str | Embedded, other: str | Embedded) -> bool:
    """Whether two fields may name one picture: equal contents, or a path that is the end of the other.

    A content without a name may be that of any path.
    """
    if isinstance(one, Embedded) and isinstance(other, Embedded):
        return one.data == other.data
    names = [part.name if isinstance(part, Embedded) else part for part in (one, other)]
    if isinstance(one, Embedded) or isinstance(other, Embedded):  # a path within an archive, and one within a folder
        names = [os.path.basename(name.rstrip("/")) for name in names]
        return not all(names) or names[0] == names[1]
    return same_path(*names)


def same_path(one: str, other: str) -> bool:
    """Whether one path is the end of the other: "a/1.png" of "/data/a/1.png"."""
    parts = [[part for part in name.split("/") if part not in ("", ".")] for name in (one, other)]
    shortest = min(map(len, parts))
    return parts[0][len(parts[0]) - shortest :] == parts[1][len(parts[1]) - shortest :]


def _compose(
    name: str, found: Sequence[str | Embedded], metadata: dict[str, Any], rules: FieldRules, report: Report
) -> str | None:
    """Writes the composite to a file, named after what it is made of."""
    if metadata.get("boxes"):
        report("metadata.boxes: are places in one picture, but the record has several; leave them out")
        return None
    if rules.unpack_dir is None:
        report(
            f"{name}: contains {len(found)} pictures, which are not put together here; give one picture, or use "
            "`embervlm data filter` or a training run"
        )
        return None
    from embervlm.data.composite import composite_file
    from embervlm.data.images import ImageError, load_image

    digest, sources = hashlib.blake2b(digest_size=12), list[str | bytes]()
    for one in found:
        if isinstance(one, Embedded):
            digest.update(hashlib.blake2b(one.data).digest())
            sources.append(one.data)
        elif (path := _read_path(name, one, rules, report)) is not None:
            about = os.stat(path)
            digest.update(repr((path, about.st_mtime_ns, about.st_size)).encode("utf-8", "surrogatepass"))
            sources.append(path)
    if len(sources) < len(found):
        return None
    out = Path(rules.unpack_dir) / f"{len(found)}-pictures-{digest.hexdigest()}.jpg"
    try:
        if not out.exists():
            content = composite_file([load_image(source) for source in sources])
            with naming_unwritten(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                write_whole(out, content)
    except ImageError as error:
        report(f"{name}: {error}")
        return None
    names = [one.name if isinstance(one, Embedded) else source for one, source in zip(found, sources)]
    metadata[COMPOSED_OF] = names
    return os.path.realpath(out)


def _read_bytes(name: str, found: Embedded, rules: FieldRules, report: Report) -> str | None:
    """Writes the picture to a file of its own, named after its content."""
    if rules.unpack_dir is None:
        report(
            f"{name}: contains the picture itself, which is not unpacked here; `embervlm data filter` "
            f"writes it to a file"
        )
        return None
    suffix = _SUFFIX.search(found.name)
    digest = hashlib.blake2b(found.data, digest_size=12).hexdigest()
    path = Path(rules.unpack_dir) / f"{digest}.{suffix[1].lower() if suffix else 'img'}"
    with naming_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found.data)
    return os.path.realpath(path)


def write_whole(path: Path, content: bytes) -> None:
    """Beside its place and renamed into it: another run may be reading the same picture."""
    if not path.exists() or path.stat().st_size != len(content):
        part = path.with_name(f"{uuid4().hex}.tmp")
        part.write_bytes(content)
        os.replace(part, path)


def _read_path(name: str, image: str, rules: FieldRules, report: Report) -> str | None:
    if len(rules.images) >= MAX_REMEMBERED_IMAGES:
        rules.images.clear()
    if image not in rules.images:
        rules.images[image] = _resolve(image, rules)
    resolved, problem = rules.images[image]
    if problem:
        report(f"{name}: {problem}")
    return resolved


def _resolve(image: str, rules: FieldRules) -> tuple[str | None, str]:
    """Resolved path and no problem, or None and the problem. One `lstat` per picture: data sets have many."""
    if not image.strip():
        return None, "is empty; give the path of the picture, or leave the field out"
    if image.lower().startswith(("http://", "https://")):
        return None, f"{quote(image)} is a URL, which is not downloaded; download it yourself and give its path"
    folder, name = os.path.split(os.path.join(rules.image_root, image))
    try:
        if folder not in rules.folders:
            rules.folders[folder] = os.path.realpath(folder)
        path = os.path.join(rules.folders[folder], name)
        mode = os.lstat(path).st_mode if name not in ("", ".", "..") else stat.S_IFLNK
        if stat.S_ISLNK(mode):
            path = os.path.realpath(path)
    except (OSError, ValueError):  # ValueError: a null byte or half a surrogate pair
        mode, path = 0, os.path.join(rules.folders.get(folder, folder), name)
    if not rules.allow_outside and not is_inside(path, rules.image_root):
        advice = "move the picture there, or set image_root or allow_outside"
        return None, f"{quote(image)} leaves {rules.image_root}; {advice}"
    if mode == 0 or (stat.S_ISLNK(mode) and not os.path.exists(path)):
        return None, f"{quote(image)} is not in {rules.image_root}; correct the path, or set image_root"
    if not stat.S_ISREG(mode) and not os.path.isfile(path):
        return None, f"{quote(image)} is not a file; give the path of one picture"
    return path, ""


def is_inside(path: str, root: str) -> bool:
    """Whether the resolved `path` lies in the resolved folder `root`."""
    return (os.path.normpath(path) + os.sep).startswith(root.rstrip(os.sep) + os.sep)
