// The same picture made two ways, one over the other: what is right of the handle is the right one.
function overlay([left, right]) {
  const box = h("div", { class: "overlay", style: `--cut: 50%; aspect-ratio: ${left.width} / ${left.height}` },
    image(left), image(right),
    h("span", { class: "tag" }, left.title), h("span", { class: "tag right" }, right.title), h("i", { class: "handle" }),
    h("input", {
      type: "range", min: 0, max: 100, step: 0.1, value: 50, "aria-label": "How much of the left picture is seen",
      oninput: (event) => box.style.setProperty("--cut", `${event.target.value}%`),
    }));
  box.children[1].classList.add("over");
  return h("div", { class: "frame" }, box);
}

function verdict({ sides: [left, right], difference }) {
  const ratio = left.seconds / right.seconds;
  const faster = ratio >= 1 ? [right, left] : [left, right];
  const speed = Math.abs(ratio - 1) < 0.03 ? "As quick as each other"
    : `${faster[0].title} is ${Math.max(ratio, 1 / ratio).toFixed(2)}× as fast as ${faster[1].title}`;
  const pixels = difference === 0 ? "the pictures are the same" : `pixels differ by ${(100 * difference).toFixed(2)} % on average`;
  return `${speed}; ${pixels}. Same seed, ${left.effective.seed}; each was warmed up before it was timed.`;
}

function result(state) {
  const slowest = Math.max(...state.sides.map((side) => side.seconds));
  const row = (side) => h("div", { class: "side" },
    h("span", { class: "title" }, side.title),
    h("span", { class: "track" }, h("i", { class: "fill", style: `width: ${(100 * side.seconds) / slowest}%` })),
    h("span", { class: "took" }, seconds(side.seconds)));
  return h("article", { class: "finished" }, overlay(state.sides),
    h("div", { class: "under" }, h("div", { class: "sides" }, ...state.sides.map(row)), h("p", { class: "verdict" }, verdict(state))));
}

const working = (state) => work(element, state, `${state.side + 1} of 2, ${state.title}`);
const VIEWS = {
  warming: working, waiting: working, drawing: working, error: mistake,
  cancelled: () => hint("Cancelled."), compared: result,
};
const IDLE = "Draws the prompt twice with the same seed and settings, once each way, and lays one picture over the other.";
const render = (state) => fill(element, state, VIEWS, IDLE);

watch("value", () => {
  const state = props.value;
  const done = state?.state === "compared";
  const turns = done || !element.querySelector(".working"); // from nothing to a picture on its way, or from that to both
  render(state);
  if (state?.state && turns) element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  if (done) state.sides.forEach((side) => vivace.add(side));
});
render(props.value);
