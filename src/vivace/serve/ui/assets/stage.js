// The picture: on its way, done, or why there is none. It tells the gallery.
const PARTS = [["queue_s", "waiting"], ["text_s", "text"], ["denoise_s", "denoising"], ["decode_s", "decoding"]];

function bar(timings) {
  const parts = PARTS.map(([key, name]) => [name, timings[key] || 0]).filter(([, value]) => value >= 0.005);
  // In milliseconds: shares that come to less than one would leave the rest of the bar empty.
  return h("div", { class: "times" },
    h("div", { class: "bar" }, ...parts.map(([name, value]) => h("i", { class: name, style: `flex-grow: ${1000 * value}` }))),
    h("div", { class: "legend" }, ...parts.map(([name, value]) => h("span", { class: name }, `${name} ${seconds(value)}`))));
}

const SHOWN = ["seed", "steps", "size", "guidance", "strength", "preset", "cache", "scheduler", "lora", "model", "negative"];

function facts(picture) {
  const spelled = (value) => (Array.isArray(value) ? value.join(" × ")
    : typeof value === "object" ? Object.entries(value).map(([name, weight]) => `${name} ${weight}`).join(", ") : String(value));
  const known = SHOWN.filter((name) => picture.effective[name] !== undefined);
  return h("dl", { class: "facts" }, ...known.map((name) => h("div", {}, h("dt", {}, name), h("dd", {}, spelled(picture.effective[name])))));
}

function applied(picture) {
  if (!picture.applied.length) return null;
  const rows = picture.applied.map((note) =>
    h("div", { class: note.done ? "done" : "left" }, h("dt", {}, note.name), h("dd", {}, note.detail)));
  const { denoiser, requests_per_call: shared, computed, skipped } = picture.calls;
  const calls = [`${denoiser} denoiser calls`];
  if (skipped !== undefined) calls.push(`${skipped} of ${computed + skipped} skipped by the cache`);
  if (shared > 1) calls.push(`${shared} requests a call`);
  const count = picture.applied.filter((note) => note.done).length;
  return h("details", { class: "applied" },
    h("summary", {}, `What was applied (${count} of ${rows.length})`),
    h("dl", {}, ...rows),
    h("p", {}, calls.join(", ")));
}

function finished(picture) {
  return h("article", { class: "finished" },
    h("div", { class: "frame" }, image(picture)),
    h("div", { class: "under" },
      h("div", { class: "headline" },
        h("span", { class: "took" }, seconds(picture.timings.total_s)),
        h("span", { class: "prompt" }, picture.prompt),
        h("span", { class: "actions" },
          h("a", { class: "button", href: picture.url, download: `vivace-${picture.effective.seed}.png` }, "Save"),
          h("button", { class: "button edit", onclick: () => vivace.edit(picture) }, "Edit"),
          h("button", { class: "button", onclick: () => vivace.again(picture) }, "Use again"))),
      bar(picture.timings), facts(picture), applied(picture)));
}

const working = (state) => work(element, state);
const VIEWS = {
  waiting: working, drawing: working, error: mistake,
  cancelled: () => hint("Cancelled."),
  done: ({ picture }) => finished(picture),
};
const render = (state) => fill(element, state, VIEWS, "Say what to draw, and press Draw. The picture grows here.");

watch("value", () => {
  const state = props.value;
  render(state);
  if (state?.state === "waiting") element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  if (state?.state === "done") vivace.add(state.picture);
});
vivace.show = (picture) => {
  document.querySelector("#tabs button[role=tab]")?.click();
  render({ state: "done", picture });
  element.scrollIntoView({ block: "nearest", behavior: "smooth" });
};
render(props.value);
