// The page: builds the board's cards, keeps their rows in step with the event stream, and tells the truth about age.

import { Card } from "/static/cards.js";
import { addDecimals, clockTime, duration, plain } from "/static/format.js";
import { startStream } from "/static/stream.js";
import { startTheme } from "/static/theme.js";

const byId = (id) => document.getElementById(id);
const cards = new Map();
const store = new Map();
let board = null;
let boardText = "";
let status = { database: "starting", refreshed_at: null };
let lost = false;
let offsetMs = 0;
let marks = [];

const now = () => Date.now() + offsetMs;
const context = { now, get marks() { return marks; } };

function build(next) {
  const text = JSON.stringify(next);
  store.clear();
  if (text === boardText) return;
  board = next;
  boardText = text;
  byId("site").textContent = board.site;
  byId("title").textContent = board.title;
  for (const card of cards.values()) card.dispose();
  cards.clear();
  for (const panel of board.panels) {
    const card = new Card(panel);
    cards.set(panel.id, card);
    byId(panel.kind === "stat" ? "stats" : "cards").append(card.root);
  }
  byId("board").setAttribute("aria-busy", "false");
}

function keyOf(panel, row) {
  return JSON.stringify(panel.key.map((name) => row[panel.columns.findIndex((column) => column.name === name)]));
}

/** Applies a whole or a difference; false when the difference does not fit what is here. */
function apply(message) {
  const known = store.get(message.id);
  if (message.base === undefined) {
    store.set(message.id, { version: message.version, rows: message.rows, error: message.error });
    return true;
  }
  if (!known || known.version !== message.base) return false;
  const { panel } = cards.get(message.id);
  const rows = new Map(known.rows.map((row) => [keyOf(panel, row), row]));
  for (const key of message.remove) rows.delete(JSON.stringify(key));
  for (const row of message.set) rows.set(keyOf(panel, row), row);
  store.set(message.id, { version: message.version, rows: [...rows.values()], error: "" });
  return true;
}

function onPanel(message) {
  if (!apply(message)) {
    location.reload();
    return;
  }
  const { rows, error } = store.get(message.id);
  if (board.annotations.includes(message.id)) {
    marks = rows.map(([at, text]) => ({ at: Date.parse(at), text }));
    for (const card of cards.values()) if (card.panel.kind === "timeseries") card.redraw();
    return;
  }
  cards.get(message.id)?.update(rows, error, context);
  if (message.id === board.status) showHealth(rows);
  if (message.id === "alerts") showAlerts(rows);
  if (message.id === "cost-rate") showTitle(rows);
}

function showHealth(rows) {
  const column = (name) => cards.get(board.status).panel.columns.findIndex((one) => one.name === name);
  const rank = { bad: 3, warn: 2, unknown: 1, ok: 0 };
  const worst = rows.reduce((a, b) => (rank[b[column("status")]] > rank[a[column("status")]] ? b : a), rows[0]);
  if (!worst) return;
  const state = worst[column("status")];
  const text = { ok: "Ledger sound", unknown: "Ledger waits for data" }[state] || `${worst[column("name")]}: ${worst[column("value")]}`;
  setBadge(byId("status-badge"), state, text);
}

function setBadge(badge, state, text) {
  badge.dataset.status = state;
  byId("status-text").textContent = text;
}

function showAlerts(rows) {
  const { columns } = cards.get("alerts").panel;
  const at = (name) => columns.findIndex((column) => column.name === name);
  const badge = byId("alert-badge");
  badge.hidden = !rows.length;
  if (!rows.length) return;
  const currencies = new Set(rows.map((row) => row[at("currency")]).filter(Boolean));
  const stake = currencies.size === 1 ? addDecimals(rows.map((row) => row[at("money_per_hour")])) : null;
  badge.dataset.status = rows.some((row) => row[at("severity")] === "critical") ? "critical" : "warning";
  const money = stake === null ? "" : ` · ${plain(stake, "money_per_hour", [...currencies][0])} at stake`;
  badge.textContent = `${rows.length} alert${rows.length > 1 ? "s" : ""}${money}`;
}

function showTitle(rows) {
  const shown = rows.filter((row) => row[1] !== null).map((row) => plain(row[1], "money_per_second", row[0]));
  document.title = [shown.join(" + "), board.site].filter(Boolean).join(" · ");
}

function onStatus(next) {
  status = next;
  offsetMs = Date.parse(next.now) - Date.now();
  tell();
}

function tell() {
  const notice = byId("notice");
  const read = status.refreshed_at ? `These figures are of ${clockTime(status.refreshed_at, true)} UTC.` : "There are no figures yet.";
  let text = "";
  if (lost) text = `No connection to GPULedger. ${read} Trying again by itself; if it stays so, see that gpuledger serve (or up) runs.`;
  else if (status.database === "down") text = `${status.message} ${read} Trying again by itself; if it stays so, see gpuledger status.`;
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = !text;
  for (const card of cards.values()) {
    const { state } = card.root.dataset;
    if (text && state === "ready") card.root.dataset.state = "stale";
    if (!text && state === "stale") card.root.dataset.state = "ready";
  }
  if (lost) setBadge(byId("status-badge"), "bad", "No connection");
  else if (status.database === "down") setBadge(byId("status-badge"), "bad", "Database away");
  else if (board && store.has(board.status)) showHealth(store.get(board.status).rows);
}

function tick() {
  const at = new Date(now());
  const clock = byId("clock");
  clock.textContent = at.toISOString().slice(11, 19);
  clock.dateTime = at.toISOString();
  if (status.refreshed_at) {
    const age = now() - Date.parse(status.refreshed_at);
    byId("freshness").textContent = `Figures read at ${clockTime(status.refreshed_at, true)} UTC, ${duration(age)} ago`;
  }
}

startTheme(byId("theme"), () => {
  for (const card of cards.values()) card.redraw();
});
startStream({
  board: build,
  panel: onPanel,
  status: onStatus,
  lost(is) {
    lost = is;
    tell();
  },
});
tick();
setInterval(tick, 1000);
