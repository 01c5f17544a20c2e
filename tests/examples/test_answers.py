"""What the reasoner writes is read back: round trips through the forms that models use, and bounds."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import answers
from answers import AnswerError, Box, Point, Segment, Subject

COORDINATE = st.integers(0, 1000)
PROSE = st.text(st.characters(blacklist_characters="[]{}`<>", blacklist_categories=["Cs"]))
LABEL = st.text(st.characters(blacklist_characters="`", blacklist_categories=["Cs"]), max_size=20)
BOX = st.builds(
    lambda xs, ys, label: Box(xs[0], ys[0], xs[1], ys[1], label),
    st.tuples(COORDINATE, COORDINATE).map(sorted),
    st.tuples(COORDINATE, COORDINATE).map(sorted),
    LABEL,
)


@st.composite
def wrapped(draw: st.DrawFn, value: object) -> str:
    """JSON as a model writes it: bare or fenced, in prose, perhaps after reasoning."""
    text = json.dumps(value, indent=draw(st.sampled_from([None, 2])))
    if draw(st.booleans()):
        text = f"```{draw(st.sampled_from(['json', '']))}\n{text}\n```"
    text = f"{draw(PROSE)}\n{text}\n{draw(PROSE)}"
    if draw(st.booleans()):
        text = f"<think>\nnot this: [1, {draw(PROSE)}\n</think>\n\n{text}"
    return text


@given(st.data(), st.lists(BOX, min_size=1, max_size=5))
def test_boxes_round_trip(data: st.DataObject, boxes: list[Box]) -> None:
    written = [{"bbox_2d": [b.x1, b.y1, b.x2, b.y2], "label": b.label} for b in boxes]
    assert answers.parse_boxes(data.draw(wrapped(written))) == boxes


@given(st.data(), st.lists(st.builds(Point, COORDINATE, COORDINATE, LABEL), min_size=1))
def test_points_round_trip_as_a_list_and_as_one_object_a_line(
    data: st.DataObject, points: list[Point]
) -> None:
    written = [{"point_2d": [p.x, p.y], "label": p.label} for p in points]
    assert answers.parse_points(data.draw(wrapped(written))) == points
    assert answers.parse_points("\n".join(json.dumps(entry) for entry in written)) == points


@given(st.data(), st.integers(0, 359_999), st.integers(0, 359_999), LABEL)
def test_segments_round_trip_in_seconds_and_clock_time(
    data: st.DataObject, one: int, other: int, caption: str
) -> None:
    start, end = sorted((one / 100, other / 100))
    for write in (answers.format_seconds, float, str, "{} s".format):
        written = [{"start": write(start), "end": write(end), "caption": caption}]
        (read,) = answers.parse_segments(data.draw(wrapped(written)))
        assert (read.start, read.end) == pytest.approx((start, end), abs=1e-9)
        assert read.caption == caption


@given(BOX, st.integers(1, 8000), st.integers(1, 8000))
def test_pixels_stay_inside_the_picture(box: Box, width: int, height: int) -> None:
    left, top, right, bottom = box.pixels(width, height)
    assert 0 <= left <= right < width
    assert 0 <= top <= bottom < height
    assert left == pytest.approx(box.x1 * width / 1000, abs=1)
    assert bottom == pytest.approx(box.y2 * height / 1000, abs=1)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (answers.parse_boxes, answers.parse_segments, answers.parse_choice):
        with contextlib.suppress(AnswerError):  # anything else is a bug
            assert len(parse(text)) > 0


@given(PROSE, PROSE)
def test_reasoning_is_split_from_the_answer(thought: str, answer: str) -> None:
    expected = (thought.strip(), answer.strip())
    assert answers.split_reasoning(f"<think>{thought}</think>{answer}") == expected
    assert answers.split_reasoning(f"{thought}</think>\n{answer}") == expected
    assert answers.split_reasoning(answer) == ("", answer.strip())
    assert answers.split_reasoning(f"<think>{thought}") == (thought.strip(), "")


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[10, 20, 30, 40]", [Box(10, 20, 30, 40)]),
        ("[[10, 20, 30, 40], [1, 2, 3, 4]]", [Box(10, 20, 30, 40), Box(1, 2, 3, 4)]),
        ('{"bbox": [30, 40, 10, 20], "name": "cup"}', [Box(10, 20, 30, 40, "cup")]),
        ('See [1]: ```json\n{"bbox_2d": [0, 0, 1000, 1000]}\n```', [Box(0, 0, 1000, 1000)]),
        ('{"bbox_2d": [0.5, 0, 1, 1], "label": "two\nlines"}', [Box(0.5, 0, 1, 1, "two\nlines")]),
    ],
)
def test_forms_of_boxes(text: str, boxes: list[Box]) -> None:
    assert answers.parse_boxes(text) == boxes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("I see no load.", "holds no JSON: 'I see no load.'"),
        ("", "holds no JSON"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6', "cut off"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "unfini', "cut off"),
        ('[{"bbox_2d": [1, 2, 3]}]', "no bbox_2d of 4 numbers"),
        ('[{"label": "a"}]', "no bbox_2d of 4 numbers"),
        ('[{"bbox_2d": [1, 2, 3, "4"]}]', "something else than numbers"),
        ('[{"bbox_2d": [1, 2, 3, true]}]', "something else than numbers"),
        ('[{"bbox_2d": [1, 2, 3, 1280]}]', "leaves the range 0 to 1000"),
        ('[{"bbox_2d": [1, 2, 3, NaN]}]', "leaves the range 0 to 1000"),
        ("<think>[[1, 2, 3, 4]]", "holds no JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_box_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(AnswerError, match=problem):
        answers.parse_boxes(text)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (2.5, 2.5),
        ("7", 7),
        ("2.5 s", 2.5),
        ("3 Seconds", 3),
        ("00:05.64", 5.64),
        ("01:05", 65),
        ("1:5.5", 65.5),
        ("75:00", 4500),
        ("1:01:05.25", 3665.25),
    ],
)
def test_forms_of_times(value: object, seconds: float) -> None:
    assert answers.parse_seconds(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "soon", "-1", "00:75", "1:75:00", "1:2:3:4", True, None])
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(AnswerError, match=r"time|below 60"):
        answers.parse_seconds(value)


def test_segments_need_both_ends() -> None:
    with pytest.raises(AnswerError, match="no start and end"):
        answers.parse_segments('{"start": 1, "caption": "a"}')
    assert answers.parse_segments('{"start": "2 s", "end": 1}') == [Segment(1, 2)]


def test_subjects() -> None:
    text = '[{"subject_id": "subject_2", "category": "cube", "caption": "red"}]'
    assert answers.parse_subjects(text) == [Subject(2, "cube", "red")]
    with pytest.raises(AnswerError, match="no subject_id"):
        answers.parse_subjects('[{"category": "cube"}]')


@pytest.mark.parametrize(
    ("text", "letter"),
    [("(A) Possible", "A"), ("B", "B"), ("<think>(A)?</think>The answer is (B).", "B")],
)
def test_choices(text: str, letter: str) -> None:
    assert answers.parse_choice(text) == letter


@pytest.mark.parametrize("text", ["", "Possible", "(A) or (B)", "<think>(A)"])
def test_an_answer_without_one_clear_choice_is_refused(text: str) -> None:
    with pytest.raises(AnswerError, match="one of A, B"):
        answers.parse_choice(text)
