"""What a robot should do next, with the reasoning before the answer."""

from client import arguments, run, typewriter


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "What can be the next immediate action?",
        video="table.mp4",
    )
    reasoner.ask(args.question, video=args.video, reasoning=True, show=typewriter)


if __name__ == "__main__":
    run(main)
