// Dark, light, or as the system has it: one button goes through the three.

import { $ } from "./dom.js";

const CHOICES = ["system", "dark", "light"];
const SIGNS = { system: "◐", dark: "☾", light: "☀" };
const TOLD = { system: "as the system", dark: "dark", light: "light" };

export function setUpTheme(onChange) {
  const button = $("theme");
  const root = document.documentElement;
  show(root.dataset.theme ?? "system");
  button.addEventListener("click", () => {
    const choice = CHOICES[(CHOICES.indexOf(root.dataset.theme ?? "system") + 1) % CHOICES.length];
    if (choice === "system") delete root.dataset.theme;
    else root.dataset.theme = choice;
    try {
      localStorage.setItem("appliance-theme", choice);
    } catch {
      // not kept then
    }
    show(choice);
    onChange();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);

  function show(choice) {
    button.textContent = SIGNS[choice];
    button.setAttribute("aria-label", `Theme: ${TOLD[choice]}`);
    button.title = `Theme: ${TOLD[choice]}`;
  }
}
