"""Breaks a robot's task into steps."""

from client import arguments, run, typewriter


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "The task is to put the red cube into the tray. "
        "Generate a plan consisting of subtasks to accomplish the task.",
        image="table.png",
    )
    reasoner.ask(args.question, image=args.image, show=typewriter)


if __name__ == "__main__":
    run(main)
