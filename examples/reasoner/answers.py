"""Reads what the reasoner writes: JSON in prose, boxes, points, time segments, choices.

Boxes and points of Cosmos 3 count from 0 to 1000 along each side of the picture, whatever its size;
``pixels(width, height)`` converts. Reasoning in ``<think>`` tags, code fences and prose around the
JSON are skipped. What cannot be read raises AnswerError with the answer in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

SCALE = 1000.0
Json = dict[str, object]


class AnswerError(ValueError):
    """The model's text is not what was asked for."""

    def __init__(self, problem: str, text: str) -> None:
        shown = text.strip()
        super().__init__(f"{problem}: {shown if len(shown) <= 200 else shown[:197] + '...'!r}")


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in 0..1000, upper left corner first (parsing sorts the corners)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in a picture of this size."""
        x1, y1 = _pixels(self.x1, self.y1, width, height)
        x2, y2 = _pixels(self.x2, self.y2, width, height)
        return x1, y1, x2, y2


@dataclass(frozen=True, slots=True)
class Point:
    """A place in 0..1000."""

    x: float
    y: float
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """(x, y) in a picture of this size."""
        return _pixels(self.x, self.y, width, height)


@dataclass(frozen=True, slots=True)
class Segment:
    """Something that happens from ``start`` to ``end``, in seconds (parsing sorts them)."""

    start: float
    end: float
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """A subject that is marked in a picture."""

    number: int
    category: str
    caption: str


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer). The reasoning is empty unless the text opens with ``<think>``.

    A template may have opened the block already: text with only the closing tag counts as well.
    """
    before, closing, after = text.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if not closing:
        return (
            (before.lstrip().removeprefix("<think>").strip(), "") if opened else ("", text.strip())
        )
    if not opened and "<think>" in before:
        return "", text.strip()
    return before.lstrip().removeprefix("<think>").strip(), after.strip()


def find_json(text: str) -> object:
    """The first JSON array or object in the answer. Several objects in a row become a list."""
    _, answer = split_reasoning(text)
    fenced = re.findall(r"```(?:json)?\s(.*?)(?:```|$)", answer, re.DOTALL)
    values = list(_json_values("\n".join(fenced) or answer))
    if not values:
        raise AnswerError("the answer holds no JSON", answer or text)
    return values[0] if len(values) == 1 or isinstance(values[0], list) else values


def parse_boxes(text: str) -> list[Box]:
    """Boxes from ``[{"bbox_2d": [x1, y1, x2, y2], "label": ...}]``, one such object, or bare lists."""
    return [_box(item, text) for item in _items(text)]


def parse_points(text: str) -> list[Point]:
    """Points from ``[{"point_2d": [x, y], "label": ...}]``, one such object, or bare pairs."""
    return [_point(item, text) for item in _items(text)]


def parse_segments(text: str) -> list[Segment]:
    """Segments from ``[{"start": ..., "end": ..., "caption": ...}]`` or one such object.

    Times are seconds (2.5, "2.5", "2.5 s") or clock times ("mm:ss.ff", "hh:mm:ss").
    """
    return [_segment(item, text) for item in _items(text)]


def parse_subjects(text: str) -> list[Subject]:
    """Subjects from ``[{"subject_id": 1, "category": ..., "caption": ...}]`` or one such object."""
    return [_subject(item, text) for item in _items(text)]


def parse_seconds(value: object) -> float:
    """Seconds from a number or from "2.5", "2.5 s", "01:05.25" (minutes) or "1:01:05" (hours)."""
    text = str(value).strip().lower()
    plain = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds?)?", text)
    if plain and not isinstance(value, bool):
        return float(plain[1])
    clock = re.fullmatch(r"(?:(\d+):)?(\d+):(\d{1,2}(?:\.\d+)?)", text)
    if clock is None:
        raise AnswerError("not a time such as 2.5 or 01:05.25", str(value))
    hours, minutes, seconds = int(clock[1] or 0), int(clock[2]), float(clock[3])
    if seconds >= 60 or (clock[1] and minutes >= 60):
        raise AnswerError("seconds and minutes of a clock time must be below 60", str(value))
    return hours * 3600 + minutes * 60 + seconds


def format_seconds(seconds: float) -> str:
    """``mm:ss.ff``, the clock time that the prompts use."""
    hundredths = round(seconds * 100)
    return f"{hundredths // 6000:02d}:{hundredths % 6000 / 100:05.2f}"


def parse_choice(text: str, choices: str = "AB") -> str:
    """The letter of a multiple choice answer such as "(B) Impossible"."""
    _, answer = split_reasoning(text)
    marked = re.findall(rf"\(([{choices}])\)", answer) or re.findall(rf"\b([{choices}])\b", answer)
    if len(set(marked)) != 1:
        raise AnswerError(f"the answer is not one of {', '.join(choices)}", answer or text)
    return str(marked[0])


def _json_values(text: str) -> Iterator[object]:
    """Every array or object that stands in the text, one after the other."""
    decoder, position = json.JSONDecoder(strict=False), 0  # line breaks within strings
    while opening := re.compile(r"[\[{]").search(text, position):
        try:
            value, position = decoder.raw_decode(text, opening.start())
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
                raise AnswerError("the JSON of the answer is cut off", text) from None
            position = opening.start() + 1  # a bracket of the prose
            continue
        except RecursionError:
            raise AnswerError("the JSON of the answer is nested too deeply", text) from None
        if value:  # "[]" in prose says nothing
            yield value


def _items(text: str) -> list[object]:
    """The entries of the answer's list; one object or one list of numbers counts as one entry."""
    value = find_json(text)
    if isinstance(value, list) and not all(isinstance(v, int | float) for v in value):
        return value
    return [value]


def _numbers(item: object, keys: tuple[str, ...], count: int, text: str) -> tuple[list[float], str]:
    """The coordinates of an entry, each in 0..1000, and its label."""
    label = ""
    values: object = item
    if isinstance(item, dict):
        label = str(item.get("label", item.get("name", "")))
        values = next((item[key] for key in keys if key in item), None)
    if not isinstance(values, list) or len(values) != count:
        raise AnswerError(f"an entry has no {keys[0]} of {count} numbers", text)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise AnswerError(f"{keys[0]} holds something else than numbers", text)
    if not all(math.isfinite(v) and 0 <= v <= SCALE for v in values):
        raise AnswerError(f"{keys[0]} leaves the range 0 to 1000", text)
    return [float(v) for v in values], label


def _box(item: object, text: str) -> Box:
    (x1, y1, x2, y2), label = _numbers(item, ("bbox_2d", "bbox", "box", "bounding_box"), 4, text)
    return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), label)


def _point(item: object, text: str) -> Point:
    (x, y), label = _numbers(item, ("point_2d", "point"), 2, text)
    return Point(x, y, label)


def _segment(item: object, text: str) -> Segment:
    if not isinstance(item, dict) or not {"start", "end"} <= item.keys():
        raise AnswerError("an entry has no start and end", text)
    start, end = sorted((parse_seconds(item["start"]), parse_seconds(item["end"])))
    return Segment(start, end, str(item.get("caption", "")))


def _subject(item: object, text: str) -> Subject:
    if not isinstance(item, dict) or not {"subject_id", "category", "caption"} <= item.keys():
        raise AnswerError("an entry has no subject_id, category and caption", text)
    number = re.search(r"\d+", str(item["subject_id"]))  # 1, "1" or "subject_1"
    if number is None:
        raise AnswerError("a subject_id has no number", text)
    return Subject(int(number[0]), str(item["category"]), str(item["caption"]))


def _pixels(x: float, y: float, width: int, height: int) -> tuple[int, int]:
    return min(width - 1, round(x / SCALE * width)), min(height - 1, round(y / SCALE * height))


# Schemas of the same answers, for servers that shall hold the model to them (structured output).
_TEXT = {"type": "string", "maxLength": 200}


def _list_of(**properties: object) -> Json:
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 8}


def _coordinates(count: int) -> Json:
    number = {"type": "integer", "minimum": 0, "maximum": 1000}
    return {"type": "array", "items": number, "minItems": count, "maxItems": count}


BOXES = _list_of(bbox_2d=_coordinates(4), label=_TEXT)
POINTS = _list_of(point_2d=_coordinates(2), label=_TEXT)
SUBJECTS = _list_of(
    subject_id={"type": "integer", "minimum": 0, "maximum": 99}, category=_TEXT, caption=_TEXT
)
_CLOCK = {"type": "string", "pattern": r"^00:[0-5][0-9]\.[0-9][0-9]$"}
SEGMENTS = _list_of(start=_CLOCK, end=_CLOCK, caption=_TEXT)
CHOICE: Json = {"type": "string", "enum": ["(A) Possible", "(B) Impossible"]}
