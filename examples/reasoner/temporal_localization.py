"""Lists what happens in a clip and when."""

from answers import SEGMENTS, format_seconds, parse_segments
from client import arguments, run


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "Describe the notable events in the provided video. Provide the result in json format with "
        "'mm:ss.ff' format for time depiction for each event. Use keywords 'start', 'end' and "
        "'caption' in the json output.",
        video="table.mp4",
    )
    answer = reasoner.ask(args.question, video=args.video, schema=SEGMENTS)
    for event in parse_segments(answer.text):
        print(f"{format_seconds(event.start)} - {format_seconds(event.end)}  {event.caption}")


if __name__ == "__main__":
    run(main)
