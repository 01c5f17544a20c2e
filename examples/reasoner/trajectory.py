"""The way a gripper should take through a picture, drawn into OUT/trajectory.png."""

from PIL import Image, ImageDraw, ImageFont

from answers import POINTS, parse_points
from client import arguments, run


def main() -> None:
    question = (
        'You are given the task "Put the red cube into the tray". Specify the 2D trajectory your '
        "end effector should follow in pixel space. Return the trajectory coordinates in JSON "
        'format like this: {"point_2d": [x, y], "label": "gripper trajectory"}.'
    )
    args, reasoner = arguments(__doc__, question, image="table.png")
    picture = Image.open(args.image).convert("RGB")
    answer = reasoner.ask(args.question, image=args.image, reasoning=True, schema=POINTS)
    places = [point.pixels(*picture.size) for point in parse_points(answer.text)]

    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.line(places, fill="gold", width=5, joint="curve")
    for number, (x, y) in enumerate(places, 1):
        print(f"{number}: {x},{y}")
        draw.ellipse((x - 11, y - 11, x + 11, y + 11), fill="crimson", outline="white", width=2)
        draw.text((x, y), str(number), fill="white", font=font, anchor="mm")
    args.out.mkdir(parents=True, exist_ok=True)
    picture.save(args.out / "trajectory.png")
    print(f"drawn: {args.out / 'trajectory.png'}")


if __name__ == "__main__":
    run(main)
