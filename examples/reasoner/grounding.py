"""Locates things in a picture and draws their boxes into OUT/grounding.png."""

from PIL import Image, ImageDraw, ImageFont

from answers import BOXES, parse_boxes
from client import arguments, run

COLOURS = ("crimson", "royalblue", "seagreen", "darkorange", "purple")


def main() -> None:
    question = "Locate the accurate bounding box of each cube. Return a json."
    args, reasoner = arguments(__doc__, question, image="table.png")
    picture = Image.open(args.image).convert("RGB")
    answer = reasoner.ask(args.question, image=args.image, schema=BOXES)

    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for index, box in enumerate(parse_boxes(answer.text)):
        left, top, right, bottom = box.pixels(*picture.size)
        print(f"{left},{top} to {right},{bottom}  {box.label}")
        colour = COLOURS[index % len(COLOURS)]
        draw.rectangle((left, top, right, bottom), outline=colour, width=3)
        anchor = (left, max(0, top - 20))
        draw.rectangle(draw.textbbox(anchor, box.label, font=font), fill=colour)
        draw.text(anchor, box.label, fill="white", font=font)
    args.out.mkdir(parents=True, exist_ok=True)
    picture.save(args.out / "grounding.png")
    print(f"drawn: {args.out / 'grounding.png'}")


if __name__ == "__main__":
    run(main)
