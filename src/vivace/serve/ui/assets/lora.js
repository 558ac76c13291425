// The LoRAs of a model, each with a weight of its own. `vivace.loras()` gives those that are chosen, as [alias, weight].
// The value: what there is to choose from, and what is chosen.
const NONE = "None registered: vivace serve --lora ALIAS=FILE";
let chosen = new Map();

function row(alias) {
  const weight = () => Number((chosen.get(alias) ?? 1).toFixed(2));
  const shown = h("output", { class: "weight" }, weight());
  const slider = h("input", {
    type: "range", min: -2, max: 2, step: 0.05, value: weight(), "aria-label": `Weight of ${alias}`,
    oninput: (event) => {
      chosen.set(alias, Number(event.target.value));
      tick.checked = true;
      shown.textContent = weight();
    },
  });
  const tick = h("input", {
    type: "checkbox", checked: chosen.has(alias),
    onchange: (event) => (event.target.checked ? chosen.set(alias, Number(slider.value)) : chosen.delete(alias)),
  });
  return h("li", {}, h("label", {}, tick, h("span", { class: "what" }, alias)), slider, shown);
}

function render() {
  const names = props.value?.names || [];
  chosen = new Map(props.value?.chosen || []);
  element.replaceChildren(h("h3", {}, "LoRA"),
    names.length ? h("ul", { class: "loras" }, ...names.map(row)) : h("p", { class: "note" }, NONE));
}

watch("value", render);
vivace.loras = () => [...chosen];
render();
