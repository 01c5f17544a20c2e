// What can be made: a row for each mode of the capability block, in the order in which they are offered.

const VIDEO = { length: true, size: true, sound: true, continues: false };

export const MODES = {
  text2video: { label: "Video", hint: "from text", ...VIDEO },
  image2video: { label: "Picture to video", input: "image", inputLabel: "First frame", ...VIDEO },
  video2video: { label: "Clip to video", input: "video", inputLabel: "Clip to go on from", ...VIDEO },
  text2image: { label: "Image", size: true },
  transfer: { label: "Follow a clip", input: "video", inputLabel: "Clip to follow", control: true },
  policy: { label: "Robot policy", input: "image", inputLabel: "What the robot sees", actions: true },
  inverse_dynamics: { label: "Actions of a clip", input: "video", inputLabel: "Clip", actions: true },
  forward_dynamics: { label: "Video of actions", input: "image", inputLabel: "First frame", actions: true, rows: true },
};

/** The modes that a checkpoint has, of those that the page knows. */
export const offered = (capability) => Object.keys(MODES).filter((name) => capability.modes.includes(name));
