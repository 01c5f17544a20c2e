"""What a person does and will probably do next."""

from client import arguments, run, typewriter


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "What is the person doing with the box? "
        "What will the person likely do next in this situation?",
        video="doorway.mp4",
    )
    reasoner.ask(args.question, video=args.video, show=typewriter)


if __name__ == "__main__":
    run(main)
