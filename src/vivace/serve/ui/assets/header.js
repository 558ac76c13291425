// Light or dark: as the system has it, until somebody says otherwise.
const shade = (dark) => document.body.classList.toggle("dark", dark); // without an argument: the other one
const asked = localStorage.getItem("vivace.shade");
if (asked) shade(asked === "dark");
element.querySelector("#shade").addEventListener("click", () => {
  localStorage.setItem("vivace.shade", shade() ? "dark" : "light");
});
