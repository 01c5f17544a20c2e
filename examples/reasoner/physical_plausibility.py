"""Whether what a clip shows is physically possible: exits with 0 for possible, 3 for impossible."""

import sys

from answers import CHOICE, parse_choice
from client import arguments, run


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "Is this video physically plausible/possible according to your understanding of e.g. "
        "object permanence, shape constancy, continuous trajectories of objects? Assume the normal "
        "laws of physics, and ignore the quality of the simulation engine.\n"
        "(A) Possible\n(B) Impossible",
        video="teleport.mp4",
    )
    answer = reasoner.ask(args.question, video=args.video, schema=CHOICE)
    possible = parse_choice(answer.text) == "A"
    print("possible" if possible else "impossible")
    sys.exit(0 if possible else 3)


if __name__ == "__main__":
    run(main)
