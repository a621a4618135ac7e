// Dragging over the waveform chooses a stretch; `element`, `props` and `trigger` are Gradio's.
let start = null;
const strip = () => element.querySelector(".strip");
const second = event => {
  const box = strip().getBoundingClientRect();
  const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
  return Math.round(share * props.value.seconds * 100) / 100;
};
const ends = event => [start, second(event)].sort((a, b) => a - b);
element.addEventListener("pointerdown", event => {
  if (!props.value.seconds || !event.target.closest(".strip")) return;
  event.preventDefault();
  element.setPointerCapture(event.pointerId);
  start = second(event);
});
element.addEventListener("pointermove", event => {
  if (start === null) return;
  const [first, last] = ends(event), share = 100 / props.value.seconds;
  Object.assign(element.querySelector(".chosen").style, { left: `${first * share}%`, width: `${(last - first) * share}%` });
});
element.addEventListener("pointerup", event => {
  if (start === null) return;
  const [first, last] = ends(event);
  start = null;
  props.value = { ...props.value, first: last > first ? first : null, last: last > first ? last : null };
  trigger("input");
});
element.addEventListener("pointercancel", () => { start = null; });
