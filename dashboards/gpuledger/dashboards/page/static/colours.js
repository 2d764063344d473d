// One colour per tenant or pool, the same in every panel and after every reload: chosen by the name's hash, the next
// free one where two names meet. What nobody bears is grey; states have their own colours.

const PALETTES = {
  light: ["#2f6fd0", "#c2620e", "#0d8577", "#7a52c4", "#5f8212", "#c13a66", "#8a6d1b"],
  dark: ["#6ea4f7", "#f0a05a", "#3fbfae", "#b294f5", "#a6c95a", "#f283a5", "#e0c26a"],
};
const NOBODY = { light: "#8b97a5", dark: "#6d7b8b" };
const UNATTRIBUTED = { light: "#5f6b78", dark: "#aab5c1" };
const STATES = {
  light: { active: "#17805a", idle: "#d98a1c", down: "#b3261e", unobserved: "#5f6b78", pending: "#8b97a5", unconfirmed: "#a0437f", reserved_unused: "#c4571f", free: "#b4bfcb", unsliced: "#7c8ea3", complete: "#3f9a6f", open: "#7aa7e0", unbalanced: "#b3261e" },
  dark: { active: "#3fb488", idle: "#eeb04e", down: "#ff7a70", unobserved: "#9aa7b5", pending: "#6d7b8b", unconfirmed: "#dd86c0", reserved_unused: "#ef8048", free: "#4b5a6b", unsliced: "#7f93aa", complete: "#3fa87b", open: "#5b8fd6", unbalanced: "#ff7a70" },
};
const taken = { tenant: new Map(), pool: new Map() };

function hash(name) {
  let h = 2166136261;
  for (const character of name) h = Math.imul(h ^ character.codePointAt(0), 16777619) >>> 0;
  return h;
}

export function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

/** Gives names their colours in alphabetical order; names known already keep theirs. `kind` is tenant or pool. */
export function know(names, kind = "tenant") {
  const mine = taken[kind];
  for (const name of [...new Set(names)].sort()) {
    if (mine.has(name) || name === "(operator)" || name === "unattributed") continue;
    const size = PALETTES.light.length;
    const used = new Set(mine.values());
    let slot = hash(name) % size;
    // Three on, not one: neighbours in the list are the easiest to tell apart, but not all of them equally.
    if (used.size < size) while (used.has(slot)) slot = (slot + 3) % size;
    mine.set(name, slot);
  }
}

export function colourOf(name, kind = "tenant") {
  if (name === "(operator)" || name === "") return NOBODY[theme()];
  if (name === "unattributed") return UNATTRIBUTED[theme()];
  if (!taken[kind].has(name)) know([name], kind);
  return PALETTES[theme()][taken[kind].get(name)];
}

export function stateColour(state) {
  return STATES[theme()][state] || NOBODY[theme()];
}

const LABELS = {
  "(operator)": "Operator", unattributed: "Unattributed", active: "Working", idle: "Held, idle", down: "Held, down",
  unobserved: "Held, not seen", pending: "Held, not seen yet", unconfirmed: "Unconfirmed", reserved_unused: "Reserved, unused",
  free: "Free", unsliced: "In no MIG instance", complete: "Complete", open: "Open", unbalanced: "Unbalanced", ok: "OK", warn: "Look", bad: "Act", unknown: "Unknown",
  firing: "Firing", planned: "Planned", done: "In effect", warning: "Warning", critical: "Critical", info: "Note",
};

export function label(name) {
  return LABELS[name] || (name === "" ? "Nobody" : name);
}
