"""Names of the files in the folder of a job, which `artifacts` writes and the routes serve."""

RECORD, CLIP, THUMBNAIL, SPRITES = "record.json", "video.mp4", "thumbnail.webp", "spritesheet.webp"
LAST = "last.png"  # frame without the controls beside it, for a video that goes on from this one
BEFORE = "before.mp4"  # what the video goes on from, put there before it is made
