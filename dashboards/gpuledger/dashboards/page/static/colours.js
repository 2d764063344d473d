// One colour per tenant or pool, the same in every panel and after every reload: chosen by the name's hash, the next
// free one where two names meet. What nobody bears is grey; states have their own colours.

const PALETTES = {
  light: ["#2f6fd0", "#0d8577", "#bb5f12", "#7a52c4", "#bf3f6a", "#5b7f12", "#1779a8", "#95602b", "#4a5fd6", "#a0437f"],
  dark: ["#6ea4f7", "#3fbfae", "#eb9b4f", "#ab8cf0", "#ee7fa3", "#a3c455", "#56b7e6", "#d0a06d", "#8f9dfb", "#dd86c0"],
};
const NOBODY = { light: "#8b97a5", dark: "#6d7b8b" };
const UNATTRIBUTED = { light: "#5f6b78", dark: "#aab5c1" };
const STATES = {
  light: { active: "#17805a", idle: "#d98a1c", down: "#b3261e", unobserved: "#5f6b78", pending: "#8b97a5", unconfirmed: "#a0437f", reserved_unused: "#c4571f", free: "#b4bfcb", complete: "#3f9a6f", open: "#7aa7e0", unbalanced: "#b3261e" },
  dark: { active: "#3fb488", idle: "#eeb04e", down: "#ff7a70", unobserved: "#9aa7b5", pending: "#6d7b8b", unconfirmed: "#dd86c0", reserved_unused: "#ef8048", free: "#4b5a6b", complete: "#3fa87b", open: "#5b8fd6", unbalanced: "#ff7a70" },
};
const taken = new Map();

function hash(name) {
  let h = 2166136261;
  for (const character of name) h = Math.imul(h ^ character.codePointAt(0), 16777619) >>> 0;
  return h;
}

export function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

/** Gives names their colours in alphabetical order; names known already keep theirs. */
export function know(names) {
  for (const name of [...new Set(names)].sort()) {
    if (taken.has(name) || name === "(operator)" || name === "unattributed") continue;
    const size = PALETTES.light.length;
    const used = new Set(taken.values());
    let slot = hash(name) % size;
    if (used.size < size) while (used.has(slot)) slot = (slot + 1) % size;
    taken.set(name, slot);
  }
}

export function colourOf(name) {
  if (name === "(operator)" || name === "") return NOBODY[theme()];
  if (name === "unattributed") return UNATTRIBUTED[theme()];
  if (!taken.has(name)) know([name]);
  return PALETTES[theme()][taken.get(name)];
}

export function stateColour(state) {
  return STATES[theme()][state] || NOBODY[theme()];
}

const LABELS = {
  "(operator)": "Operator", unattributed: "Unattributed", active: "Working", idle: "Held, idle", down: "Held, down",
  unobserved: "Held, not seen", pending: "Held, not seen yet", unconfirmed: "Unconfirmed", reserved_unused: "Reserved, unused",
  free: "Free", complete: "Complete", open: "Open", unbalanced: "Unbalanced", ok: "OK", warn: "Look", bad: "Act", unknown: "Unknown",
  firing: "Firing", planned: "Planned", done: "In effect", warning: "Warning", critical: "Critical", info: "Note",
};

export function label(name) {
  return LABELS[name] || (name === "" ? "Nobody" : name);
}
