"""Describes a picture and a clip."""

from client import arguments, run, typewriter


def main() -> None:
    question = "Describe it in detail."
    args, reasoner = arguments(__doc__, question, image="table.png", video="table.mp4")
    if args.image:
        print(f"{args.image}:")
        reasoner.ask(args.question, image=args.image, show=typewriter)
        print()
    if args.video:
        print(f"{args.video}:")
        reasoner.ask(args.question, video=args.video, show=typewriter)
        print()


if __name__ == "__main__":
    run(main)
