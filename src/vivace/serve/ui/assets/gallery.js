// What this tab has drawn: kept by the browser, so that a reload does not lose it. Event: "again", a picture's fields.
const KEY = "vivace.made";
const MOST = 60;

let made = [];
try {
  made = JSON.parse(sessionStorage.getItem(KEY)) || [];
} catch {
  // A browser may refuse to remember.
}

function keep() {
  // The oldest go where the browser has no room for all.
  for (let count = made.length; count >= 0; count -= 5) {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(made.slice(0, count)));
      return;
    } catch {
      continue;
    }
  }
}

function card(picture) {
  const { steps, preset, seed } = picture.effective;
  return h("li", {},
    h("button", { class: "thumb", title: picture.prompt, onclick: () => vivace.show(picture) },
      h("img", { src: picture.thumb, alt: picture.prompt, loading: "lazy" })),
    h("div", { class: "caption" },
      h("span", { class: "what" }, picture.prompt),
      h("span", { class: "how" }, `${picture.title || preset}, ${steps} steps, seed ${seed}, ${seconds(picture.timings.total_s)}`)),
    h("button", { class: "button", onclick: () => vivace.again(picture) }, "Use again"));
}

function render() {
  element.replaceChildren(made.length
    ? h("section", {}, h("h2", {}, `Drawn in this tab (${made.length})`), h("ul", { class: "cards" }, ...made.map(card)))
    : "");
}

vivace.add = (picture) => {
  if (made.some((one) => one.id === picture.id)) return;
  made = [picture, ...made].slice(0, MOST);
  keep();
  render();
};
vivace.again = (picture) => {
  if (!picture.form.edit) vivace.drop?.(); // or it would be drawn over the one that is chosen now
  vivace.model = null; // which may be another one now
  trigger("again", picture.form);
  document.getElementById("ask").scrollIntoView({ block: "nearest", behavior: "smooth" });
};
render();
