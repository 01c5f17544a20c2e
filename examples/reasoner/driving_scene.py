"""What matters for driving on in a scene seen from a vehicle, with the reasoning."""

from client import arguments, run, typewriter


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "The video depicts the observation from the vehicle's camera. You need to think step by "
        "step and identify the objects in the scene that are critical for safe navigation.",
        video="road.mp4",
    )
    reasoner.ask(args.question, video=args.video, reasoning=True, show=typewriter)


if __name__ == "__main__":
    run(main)
