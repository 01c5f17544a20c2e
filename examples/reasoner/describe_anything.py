"""Describes each subject that carries a number in the picture."""

from answers import SUBJECTS, parse_subjects
from client import arguments, run


def main() -> None:
    args, reasoner = arguments(
        __doc__,
        "Please caption the notable attributes in the provided image. List and describe all marked "
        "subjects in the image with their categories and detailed captions using a json with "
        'keyword "subject_id", "category" and "caption".',
        image="marked.png",
    )
    answer = reasoner.ask(args.question, image=args.image, schema=SUBJECTS)
    for subject in parse_subjects(answer.text):
        print(f"{subject.number} ({subject.category}): {subject.caption}")


if __name__ == "__main__":
    run(main)
