// The picture to edit, with a brush for where. It is sent when a picture is asked for: `vivace.picture()` gives its
// name on the server, null without one, or what was wrong.
const LONGEST = 2048; // pixels of what is sent
const TYPES = "image/png,image/jpeg,image/webp";

let picture = null; // a canvas
let mask = null; // a canvas of the same size: opaque where it is painted
let strokes = 0;
let sent = null; // the name, while nothing has changed since
let brush = 12; // per cent of the shorter side

const blob = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));
const canvasOf = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

async function choose(file) {
  if (!file) return;
  let source;
  try {
    source = await createImageBitmap(file);
  } catch {
    empty("That is no picture this browser can read; take a PNG, JPEG or WebP file.");
    return;
  }
  const scale = Math.min(1, LONGEST / Math.max(source.width, source.height));
  picture = canvasOf(Math.max(1, Math.round(source.width * scale)), Math.max(1, Math.round(source.height * scale)));
  picture.getContext("2d").drawImage(source, 0, 0, picture.width, picture.height);
  clear();
  painting();
}

function clear() {
  mask = canvasOf(picture.width, picture.height);
  strokes = 0;
  sent = null;
}

function drop() {
  picture = mask = sent = null;
  strokes = 0;
  empty();
}

function empty(problem) {
  const file = h("input", { type: "file", accept: TYPES, onchange: (event) => choose(event.target.files[0]) });
  element.replaceChildren(h("label", {
    class: "drop",
    ondragover: (event) => event.preventDefault(),
    ondrop: (event) => { event.preventDefault(); choose(event.dataTransfer.files[0]); },
  }, file, problem ? h("span", { class: "problem", role: "alert" }, problem) : "Choose a picture, or drop one here"));
}

function painting() {
  const shown = canvasOf(picture.width, picture.height);
  shown.className = "easel";
  const note = h("span", { class: "note" });
  let last = null;
  const draw = () => {
    const context = shown.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(picture, 0, 0);
    context.globalAlpha = 0.55;
    context.drawImage(mask, 0, 0);
    note.textContent = strokes ? "Only what you painted is drawn anew." : "Paint where it shall change; unpainted, all of it may.";
  };
  const at = (event) => {
    const box = shown.getBoundingClientRect();
    return [((event.clientX - box.left) * shown.width) / box.width, ((event.clientY - box.top) * shown.height) / box.height];
  };
  const stroke = (from, to) => {
    const context = mask.getContext("2d");
    Object.assign(context, { strokeStyle: "#ff5a1f", lineCap: "round", lineWidth: (Math.min(mask.width, mask.height) * brush) / 100 });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    strokes += 1;
    sent = null;
    draw();
  };
  shown.addEventListener("pointerdown", (event) => {
    shown.setPointerCapture(event.pointerId);
    stroke(at(event), (last = at(event)));
  });
  shown.addEventListener("pointermove", (event) => {
    if (last) stroke(last, (last = at(event)));
  });
  for (const end of ["pointerup", "pointercancel"]) shown.addEventListener(end, () => (last = null));
  const size = h("input", {
    type: "range", min: 2, max: 40, value: brush, "aria-label": "Brush", oninput: (event) => (brush = Number(event.target.value)),
  });
  element.replaceChildren(shown, h("div", { class: "tools" }, h("label", {}, "Brush", size),
    h("button", { class: "button", onclick: () => { clear(); draw(); } }, "Unpaint"),
    h("button", { class: "button", onclick: drop }, "Remove")), note);
  draw();
}

// As the API takes it: transparent where it is painted.
function holes() {
  const found = canvasOf(mask.width, mask.height);
  const context = found.getContext("2d");
  context.fillRect(0, 0, found.width, found.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(mask, 0, 0);
  return found;
}

async function send() {
  const form = new FormData();
  form.append("image", await blob(picture), "image.png");
  if (strokes) form.append("mask", await blob(holes()), "mask.png");
  const answer = await fetch(new URL("inputs", document.baseURI), { method: "POST", body: form });
  const found = await answer.json();
  return answer.ok ? found : { error: found.error.message };
}

Object.assign(vivace, { choose, drop });
vivace.picture = async () => {
  if (!picture) return null;
  try {
    sent = sent || (await send());
  } catch {
    return { error: "the picture could not be sent; is the server still there?" };
  }
  const found = sent;
  if (found.error) sent = null;
  return found;
};
empty();
