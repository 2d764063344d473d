// Dark and light: the system's choice until a person makes one; a click goes automatic, light, dark.

const ICONS = {
  auto: '<svg viewBox="0 0 24 24" aria-hidden="true"><circle cx="12" cy="12" r="8.5"/><path d="M12 3.5v17M12 7.5l5.6 5.6M12 12.5l4 4M12 3.5a8.5 8.5 0 0 1 0 17"/></svg>',
  light: '<svg viewBox="0 0 24 24" aria-hidden="true"><circle cx="12" cy="12" r="4"/><path d="M12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6 7 7M17 17l1.4 1.4M18.4 5.6 17 7M7 17l-1.4 1.4"/></svg>',
  dark: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z"/></svg>',
};
const NAMES = { auto: "automatic", light: "light", dark: "dark" };
const ORDER = ["auto", "light", "dark"];
const KEY = "gpuledger-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function stored() {
  try {
    const choice = localStorage.getItem(KEY);
    return ORDER.includes(choice) ? choice : "auto";
  } catch {
    return "auto";
  }
}

let choice = stored();

function apply() {
  const dark = choice === "dark" || (choice === "auto" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

apply();

export function startTheme(button, changed) {
  const show = () => {
    apply();
    button.innerHTML = ICONS[choice];
    const next = ORDER[(ORDER.indexOf(choice) + 1) % ORDER.length];
    button.setAttribute("aria-label", `Colour theme: ${NAMES[choice]}. Change to ${NAMES[next]}`);
    button.title = `Colour theme: ${NAMES[choice]}`;
  };
  button.addEventListener("click", () => {
    choice = ORDER[(ORDER.indexOf(choice) + 1) % ORDER.length];
    try {
      localStorage.setItem(KEY, choice);
    } catch {
      // Private windows may refuse; the choice then lasts as long as the page.
    }
    show();
    changed();
  });
  system.addEventListener("change", () => {
    show();
    changed();
  });
  show();
}
