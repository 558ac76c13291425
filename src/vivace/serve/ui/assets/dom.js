// What the parts of the page share. Text always goes in as text: nothing that a server or a browser's memory holds
// becomes markup.
const vivace = (window.vivace = window.vivace || {});

function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const seconds = (value) => (value < 10 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : `${Math.round(value)} s`);

// Cancel stands where Draw was until the last picture that is on its way is over.
vivace.under = vivace.under || 0;
const busy = (more) => document.body.toggleAttribute("data-busy", (vivace.under += more) > 0);
// Before a request goes out. gradio makes a folded part of the page only when it is opened: till then there is no picture.
vivace.send = async (prompt) => {
  busy(1);
  try {
    sessionStorage.setItem("vivace.asked", prompt);
  } catch {
    // A browser may refuse to remember.
  }
  return vivace.picture ? await vivace.picture() : null;
};
vivace.idle = () => busy(-1);

// The full picture while the server keeps it, else its thumbnail.
function image(picture) {
  return h("img", {
    src: picture.url,
    alt: picture.prompt,
    width: picture.width,
    height: picture.height,
    onerror: (event) => {
      if (event.target.src !== picture.thumb) event.target.src = picture.thumb;
    },
  });
}

// A picture on its way: its latest preview, or an empty sheet, and how far it is. What is there is changed, not
// replaced, so that nothing flickers.
function work(element, state, title) {
  if (!element.firstElementChild?.classList.contains("working")) {
    element.replaceChildren(
      h("div", { class: "frame working" },
        h("div", { class: "blank" }),
        h("div", { class: "way" },
          h("div", { class: "way-text" }, h("span", { class: "now" }), h("span", { class: "left" })),
          h("div", { class: "track", role: "progressbar", "aria-valuemin": 0 }, h("div", { class: "fill" })))));
  }
  const find = (name) => element.querySelector(`.${name}`);
  const { step = 0, total = 0, seconds_left: left, preview } = state;
  const drawing = state.state === "drawing" && total > 0;
  const waits = state.state === "warming" ? "warming up" : state.ahead ? `waiting, ${state.ahead} before this one` : "starting";
  const text = drawing ? `step ${step} of ${total}` : waits;
  find("now").textContent = title ? `${title}: ${text}` : text[0].toUpperCase() + text.slice(1);
  find("left").textContent = drawing && typeof left === "number" ? `${seconds(left)} left` : "";
  find("fill").style.width = `${drawing ? (100 * step) / total : 0}%`;
  find("track").setAttribute("aria-valuenow", step);
  find("track").setAttribute("aria-valuemax", total);
  const seen = find("preview");
  if (preview && seen) seen.src = preview;
  else if (preview) find("blank").replaceWith(h("img", { class: "preview", src: preview, alt: "Preview" }));
  else if (seen) seen.replaceWith(h("div", { class: "blank" }));
}

// A finished picture as the one to edit.
vivace.edit = async (picture) => {
  const fold = document.querySelector("#editing > button");
  if (!fold.classList.contains("open")) fold.click();
  while (!vivace.choose) await new Promise(requestAnimationFrame);
  const answer = await fetch(picture.url);
  await vivace.choose(await (answer.ok ? answer : await fetch(picture.thumb)).blob());
  document.getElementById("input").scrollIntoView({ block: "center", behavior: "smooth" });
};

// Where a mistake is: the API's name of a field -> the part of the page.
const WHERE = {
  prompt: "prompt", negative_prompt: "negative", model: "model", size: "size", steps: "steps",
  guidance_scale: "guidance", seed: "seed", quality: "preset", cache: "cache", lora: "lora", strength: "strength",
  image: "input", mask: "input",
};

function mistake(state) {
  const field = document.getElementById(WHERE[state.field?.split(".")[0]] || "");
  field?.classList.add("wrong");
  return h("div", { class: "frame" }, h("div", { class: "notice error", role: "alert" }, h("strong", {}, "No picture"), state.message));
}

// Fills a part of the page from a state, by the views that it has: each makes the part's content, or changes it.
function fill(element, state, views, otherwise) {
  document.querySelectorAll(".wrong").forEach((field) => field.classList.remove("wrong"));
  const view = state && views[state.state];
  const made = view ? view(state) : hint(otherwise);
  if (made) element.replaceChildren(made);
  element.dataset.state = state?.state || "idle";
}

const hint = (text) => h("div", { class: "frame" }, h("div", { class: "notice" }, text));
