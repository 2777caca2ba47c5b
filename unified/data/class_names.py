"""Files that say what classes are called."""

import json
import re
from pathlib import Path

_SYNSET = re.compile(r"(n\d{8})\s+(\S.*)")


def read_class_names(path: str | Path) -> list[str]:
    """Names of classes in the order of their numbers: a line each, a JSON list, or a JSON object of numbers and names.

    A line of ``LOC_synset_mapping.txt`` (``n01440764 tench, Tinca tinca``) gives ``tench, Tinca tinca, n01440764``: each of
    the words is a name for the class, and the last one is no other class's.

    Raises:
        ValueError: if the file is missing or unreadable, or a name is missing.
    """
    text = _text(path)
    if Path(path).suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"class names: {str(path)!r} is no JSON ({error}).") from error
        if isinstance(found, dict):
            missing = [number for number in range(len(found)) if str(number) not in found]
            if missing:
                raise ValueError(f"class names: {str(path)!r} has no name for class {missing[0]} of {len(found)}.")
            found = [found[str(number)] for number in range(len(found))]
    else:
        found = [_name(line) for line in text.rstrip().splitlines()]
    if not isinstance(found, list) or not found:
        raise ValueError(f"class names: {str(path)!r} holds no list of names.")
    for number, name in enumerate(found):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"class names: {str(path)!r} has {name!r} for class {number}; give it a name.")
    return found


def read_synsets(path: str | Path) -> dict[str, str]:
    """Names of ImageNet's classes by their folders, of ``LOC_synset_mapping.txt``; see :func:`read_class_names`.

    Raises:
        ValueError: if the file is missing, or naming the line that is none of a synset and its words.
    """
    names = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        found = _SYNSET.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"class names: line {number} of {str(path)!r}, {line!r}, is no synset with its words.")
        names[found[1]] = _name(line)
    return names


def _name(line: str) -> str:
    found = _SYNSET.fullmatch(line.strip())
    return line.strip() if found is None else f"{found[2].strip()}, {found[1]}"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class names: {str(path)!r} cannot be read ({error}).") from error
