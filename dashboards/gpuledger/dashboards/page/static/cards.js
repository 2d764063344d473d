// One card per panel: title, description, the same rows as a table, and the drawing of its kind. Text only ever enters
// the document as text.

import { Chart, align, donut, sankey, timeseries } from "/static/charts.js";
import { colourOf, know, label, stateColour } from "/static/colours.js";
import { element } from "/static/dom.js";
import { addDecimals, clockTime, dateTime, duration, formatValue, plain, relative } from "/static/format.js";
import { drawTable } from "/static/tables.js";

// Of 24: cards up to this width stand two in a row on a narrower screen.
const HALF = 10;

export class Card {
  constructor(panel) {
    this.panel = panel;
    this.rows = null;
    this.error = "";
    this.chart = null;
    this.hidden = new Set();
    this.asTable = false;
    this.sort = null;
    this.drawn = "";
    const id = `panel-${panel.id}`;
    this.body = element("div", { class: "body" }, element("div", { class: "bone" }));
    this.about = element("p", { class: "about", id: `${id}-about`, text: panel.description, hidden: "" });
    const about = element("button", { class: "small-button", type: "button", "aria-expanded": "false", "aria-controls": `${id}-about`, "aria-label": `About ${panel.title}`, title: "What this shows", icon: "about" });
    about.addEventListener("click", () => {
      this.about.hidden = !this.about.hidden;
      about.setAttribute("aria-expanded", String(!this.about.hidden));
    });
    this.tableButton = element("button", { class: "small-button", type: "button", "aria-pressed": "false", "aria-label": `${panel.title} as a table`, title: "Exact figures as a table", icon: "table" });
    this.tableButton.addEventListener("click", () => {
      this.asTable = !this.asTable;
      this.tableButton.setAttribute("aria-pressed", String(this.asTable));
      this.redraw();
    });
    this.heading = element("h2", { id: `${id}-title`, text: panel.title });
    const plainTable = panel.kind === "table" && panel.look === "table";
    this.root = element(
      "section",
      { class: "card", id, "aria-labelledby": `${id}-title`, "data-kind": panel.kind, "data-state": "loading", "--w": panel.width, "data-half": panel.width <= HALF ? "" : null },
      element("header", {}, this.heading, about, plainTable ? null : this.tableButton),
      this.about,
      this.body,
    );
  }

  column(role) {
    return this.panel.columns.findIndex((column) => column.role === role);
  }

  update(rows, error, context) {
    this.rows = rows;
    this.error = error;
    this.context = context;
    this.redraw();
  }

  /** Draws again with the same rows: another theme, time or legend. */
  redraw() {
    if (this.rows === null) return;
    this.root.dataset.state = this.error ? "error" : this.rows.length ? "ready" : "empty";
    if (this.error) this.message("This panel could not be read", this.error);
    else if (!this.rows.length) this.empty();
    else if (this.asTable) this.frame("table", () => element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${this.panel.title}, table` }), (box) => drawTable(this, box, true));
    else this.draw();
  }

  draw() {
    const draw = { stat: "stat", timeseries: "timeseries", bargauge: "share", barchart: "bars", donut: "donut", sankey: "sankey", statetimeline: "timeline", table: this.panel.look }[this.panel.kind];
    this[draw]();
  }

  /** Keeps what `make` built for this kind of content while it stays the same, so that focus and scroll survive. */
  frame(name, make, fill) {
    if (this.drawn !== name) {
      this.drop();
      this.drawn = name;
      this.content = make();
      this.body.replaceChildren(this.content);
    }
    fill(this.content);
  }

  drop() {
    this.chart?.dispose();
    this.chart = null;
    this.drawn = "";
  }

  dispose() {
    this.drop();
    this.root.remove();
  }

  message(title, text) {
    this.drop();
    this.body.replaceChildren(element("p", { class: "message" }, element("b", { text: title }), text));
  }

  empty() {
    if (["alerts", "gaps"].includes(this.panel.look)) {
      this.drop();
      this.body.replaceChildren(element("p", { class: "all-good" }, element("span", { icon: "ok" }), this.panel.empty));
    } else this.message(this.panel.kind === "stat" ? "–" : "Nothing to show yet", this.panel.empty);
  }

  money(row, column) {
    const currency = this.column("currency");
    return formatValue(row[column], this.panel.columns[column].unit, currency < 0 ? "" : row[currency]);
  }

  stat() {
    const [value, second] = [this.column("value"), this.column("second")];
    const rows = this.rows.filter((row) => row[value] !== null);
    if (!rows.length) {
      this.empty();
      return;
    }
    this.frame("stat", () => element("div"), (box) => {
      const unit = this.panel.columns[second];
      box.replaceChildren(
        ...rows.slice(0, 3).flatMap((row) => {
          const shown = this.money(row, value);
          const more = second < 0 || row[second] === null ? null : this.money(row, second);
          const of = unit?.unit === "gpus" ? "of " : "";
          return [
            element("p", { class: "stat-value", title: shown.exact }, shown.text, shown.per ? element("small", { text: shown.per }) : null),
            more ? element("p", { class: "stat-more", title: more.exact, text: `${of}${more.text}${more.per} ${unit.title}` }) : null,
          ].filter(Boolean);
        }),
      );
    });
  }

  timeseries() {
    const aligned = align(this.panel, this.rows);
    this.frame(
      "timeseries",
      () => {
        const box = element("div", { class: "body" }, element("div", { class: "chart", role: "img" }), element("ul", { class: "legend", "aria-label": "Series; press to hide or show" }));
        this.chart = new Chart(box.firstChild);
        return box;
      },
      (box) => {
        const marks = this.context.marks;
        box.firstChild.setAttribute("aria-label", this.summary(aligned, marks));
        this.chart.set(timeseries(this.panel, aligned, { now: this.context.now(), marks, hidden: this.hidden, narrow: box.clientWidth < 520 }));
        this.legend(box.lastChild, aligned.series);
      },
    );
  }

  summary(aligned, marks) {
    const now = aligned.series.map((one) => `${label(one.id)} ${plain(one.latest, this.panel.unit, one.currency)}`).join(", ");
    const moved = marks.map((mark) => `${clockTime(mark.at)} ${mark.text}`).join("; ");
    return `${this.panel.title}, latest: ${now}.${moved ? ` Transfers: ${moved}.` : ""} Exact figures: as a table.`;
  }

  legend(list, series) {
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    list.replaceChildren(
      ...series.map((one) => {
        const button = element(
          "button", { type: "button", "data-id": one.id, "aria-pressed": String(!this.hidden.has(one.id)) },
          element("span", { class: "swatch", "--c": colourOf(one.name) }), element("span", { text: label(one.id) }), element("b", { text: plain(one.latest, this.panel.unit, one.currency) }),
        );
        button.addEventListener("click", () => {
          if (!this.hidden.delete(one.id)) this.hidden.add(one.id);
          this.redraw();
        });
        return element("li", {}, button);
      }),
    );
    if (focused !== null) [...list.querySelectorAll("button")].find((button) => button.dataset.id === focused)?.focus();
  }

  share() {
    const [name, value] = [this.column("category"), this.column("value")];
    const sums = new Map();
    for (const row of this.rows) sums.set(row[name], addDecimals([sums.get(row[name]) ?? null, row[value]]));
    const parts = [...sums].filter(([, amount]) => Number(amount) > 0);
    const total = addDecimals(parts.map(([, amount]) => amount));
    if (total === null) {
      this.message("No GPU in service", this.panel.empty);
      return;
    }
    const percent = (amount) => formatValue(Number(amount) / Number(total), "share").text;
    const [second, currency] = [this.column("second"), this.column("currency")];
    const cost = (state) => (second < 0 ? [] : this.rows.filter((row) => row[name] === state && row[second] !== null && row[currency]).map((row) => plain(row[second], this.panel.columns[second].unit, row[currency]))).join(" + ");
    const hatched = (state) => (["unobserved", "pending", "unconfirmed"].includes(state) ? "hatched" : "");
    this.frame("share", () => element("div", { class: "body" }), (box) => {
      box.replaceChildren(
        element("p", { class: "lead" }, element("b", { text: plain(total, "gpus") }), " GPUs in service"),
        element("div", { class: "share", role: "img", "aria-label": parts.map(([state, amount]) => `${label(state)} ${percent(amount)}`).join(", ") },
          ...parts.map(([state, amount]) => {
            const bar = element("i", { class: hatched(state), "--c": stateColour(state), title: `${label(state)}: ${plain(amount, "gpus")} GPUs, ${percent(amount)}` });
            bar.style.flexGrow = Number(amount);
            return bar;
          })),
        element("ul", { class: "share-list" }, ...parts.map(([state, amount]) =>
          element("li", {}, element("span", { class: `swatch ${hatched(state)}`, "--c": stateColour(state) }), element("span", {}, label(state), cost(state) ? element("em", { text: cost(state) }) : null),
            element("span", { class: "n", text: plain(amount, "gpus"), title: formatValue(amount, "gpus").exact }), element("span", { class: "p", text: percent(amount) })))),
      );
    });
  }

  bars() {
    const [name, value, second] = [this.column("category"), this.column("value"), this.column("second")];
    const size = (column) => Math.max(...this.rows.map((row) => Math.abs(Number(row[column] ?? 0))));
    const most = Math.max(size(value), size(second)) || 1;
    const { columns } = this.panel;
    know(this.rows.map((row) => row[name]));
    this.frame("bars", () => element("div", { class: "body" }, element("p", { class: "key" }, element("span", {}, element("i"), columns[value].title), element("span", {}, element("i", { class: "second" }), columns[second].title)), element("ul", { class: "bars" })), (box) => {
      const bar = (row, column, more) => {
        const line = element("div", { class: `bar ${more}`, "--c": colourOf(row[name]) });
        line.style.width = `${(100 * Math.abs(Number(row[column] ?? 0))) / most}%`;
        return line;
      };
      box.lastChild.replaceChildren(
        ...this.rows.map((row) => {
          const [cost, charged] = [this.money(row, value), this.money(row, second)];
          return element("li", {}, element("span", { class: "who", text: label(row[name]), title: row[name] }),
            element("div", { class: "pair", "aria-hidden": "true" }, bar(row, value, ""), bar(row, second, "second")),
            element("div", { class: "sums" }, element("b", { text: cost.text, title: cost.exact }), element("span", { text: row[second] === null ? "not charged" : `${charged.text} charged`, title: charged.exact })));
        }),
      );
    });
  }

  donut() {
    const [name, value, currency] = [this.column("category"), this.column("value"), this.column("currency")];
    know(this.rows.map((row) => row[name]), this.panel.columns[name].name);
    const slices = this.rows.map((row) => ({ name: row[name], value: row[value], text: this.money(row, value).text, exact: this.money(row, value).exact, colour: colourOf(row[name], this.panel.columns[name].name) }));
    const totals = [...new Set(this.rows.map((row) => row[currency]))].map((unit) => {
      const sum = addDecimals(this.rows.filter((row) => row[currency] === unit).map((row) => row[value]));
      return formatValue(sum, this.panel.unit, unit);
    });
    this.frame("donut", () => {
      const box = element("div", { class: "donut" }, element("div", { class: "chart", role: "img" }), element("div", { class: "total" }), element("ul", { class: "share-list" }));
      this.chart = new Chart(box.firstChild);
      return box;
    }, (box) => {
      const [chart, total, list] = box.children;
      chart.setAttribute("aria-label", slices.map((slice) => `${slice.name} ${slice.text}`).join(", "));
      this.chart.set(donut(this.panel, slices));
      total.replaceChildren(...totals.map((sum) => element("b", { text: sum.text, title: sum.exact })), element("span", { text: "today, UTC" }));
      const all = slices.reduce((sum, slice) => sum + Number(slice.value), 0) || 1;
      list.replaceChildren(...slices.map((slice) => element("li", {}, element("span", { class: "swatch", "--c": slice.colour }), element("span", { text: label(slice.name) }),
        element("span", { class: "n", text: slice.text, title: slice.exact }), element("span", { class: "p", text: formatValue(Number(slice.value) / all, "share").text }))));
    });
  }

  sankey() {
    const [source, target, value, mark] = ["source", "target", "value", "mark"].map((role) => this.column(role));
    const when = this.panel.columns.findIndex((column) => column.unit === "time");
    this.frame("sankey", () => {
      const box = element("div", { class: "body" }, element("p", { class: "lead" }), element("div", { class: "chart", role: "img" }));
      this.chart = new Chart(box.lastChild);
      return box;
    }, (box) => {
      const moves = this.rows.filter((row) => row[mark]);
      const text = moves.map((row) => [element("b", { text: `${plain(row[value], "gpus")} GPUs` }), ` ${label(row[source])} → ${label(row[target])}`]);
      const at = this.rows[0][when];
      box.firstChild.replaceChildren(...text.flatMap((part, n) => (n ? [" · ", ...part] : part)), element("span", { title: dateTime(at), text: ` · ${relative(at, this.context.now())}, ${clockTime(at)} UTC` }));
      box.lastChild.setAttribute("aria-label", this.rows.map((row) => (row[mark] ? `${plain(row[value], "gpus")} GPUs moved from ${row[source]} to ${row[target]}` : `${row[source]} keeps ${plain(row[value], "gpus")}`)).join(", "));
      this.chart.set(sankey(this.panel, this.rows));
    });
  }

  timeline() {
    const [time, name, value] = [this.column("time"), this.column("series"), this.column("value")];
    const now = this.context.now();
    const since = now - (this.panel.range_s || 3600) * 1000;
    const step = this.panel.step_s * 1000;
    const lines = new Map();
    for (const row of this.rows) lines.set(row[name], [...(lines.get(row[name]) || []), [Date.parse(row[time]), row[value]]]);
    this.frame("timeline", () => element("div", { class: "body" }), (box) => {
      const cells = [...lines].sort(([a], [b]) => a.localeCompare(b)).flatMap(([pool, minutes]) => {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        svg.setAttribute("viewBox", "0 0 1000 22");
        svg.setAttribute("preserveAspectRatio", "none");
        svg.setAttribute("role", "img");
        svg.setAttribute("aria-label", `${pool}: ${counts(minutes)}`);
        for (const [from, to, state] of runs(minutes.sort((a, b) => a[0] - b[0]), step)) {
          const rect = document.createElementNS(svg.namespaceURI, "rect");
          const x = (ms) => (1000 * (Math.min(Math.max(ms, since), now) - since)) / (now - since);
          for (const [k, v] of Object.entries({ x: x(from), width: Math.max(0, x(to) - x(from)), y: 0, height: 22, fill: stateColour(state) })) rect.setAttribute(k, v);
          const title = document.createElementNS(svg.namespaceURI, "title");
          title.textContent = `${label(state)}, ${clockTime(from)}–${clockTime(to)} UTC`;
          rect.append(title);
          svg.append(rect);
        }
        return [element("span", { class: "name", text: pool }), svg];
      });
      const states = [...new Set(this.rows.map((row) => row[value]))];
      box.replaceChildren(
        element("div", { class: "timeline" }, ...cells, element("div", { class: "axis" }, element("span", { text: clockTime(since) }), element("span", { text: duration(now - since) }), element("span", { text: "now" }))),
        element("ul", { class: "legend" }, ...states.map((state) => element("li", {}, element("span", { class: "who-cell lead" }, element("span", { class: "swatch", "--c": stateColour(state) }), label(state))))),
      );
    });
  }

  table() {
    this.frame("table", () => element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": this.panel.title }), (box) => drawTable(this, box, false));
  }

  checks() {
    const [name, value, status, action] = ["name", "value", "status", "action"].map((key) => this.panel.columns.findIndex((column) => column.name === key));
    this.frame("checks", () => element("ul", { class: "checks" }), (list) => {
      list.replaceChildren(...this.rows.map((row) => element("li", {},
        element("span", { class: "mark-cell", "data-status": row[status], icon: row[status], title: label(row[status]) }),
        element("span", {}, row[name], element("span", { class: "sr", text: `: ${label(row[status])}, ` })), element("span", { class: "now", text: row[value] }),
        ["ok", "unknown"].includes(row[status]) ? null : element("span", { class: "do", text: row[action] }))));
    });
  }

  moves() {
    const at = (key) => this.panel.columns.findIndex((column) => column.name === key);
    this.frame("moves", () => element("ul", { class: "moves" }), (list) => {
      list.replaceChildren(...this.rows.map((row) => {
        const when = row[at("start_at")];
        return element("li", {},
          element("span", { class: "who-cell" }, element("b", { text: `${plain(row[at("gpus")], "count")} GPUs` }), element("span", { class: "swatch", "--c": colourOf(row[at("from_tenant")]) }), `${label(row[at("from_tenant")])} →`, element("span", { class: "swatch", "--c": colourOf(row[at("to_tenant")]) }), label(row[at("to_tenant")])),
          element("span", { class: "pill", "data-status": row[at("status")], text: label(row[at("status")]) }),
          element("p", {}, element("span", { title: dateTime(when), text: `${clockTime(when)} UTC, ${relative(when, this.context.now())}` }), ` · ${row[at("pool")]}`, row[at("why")] ? ` · ${row[at("why")]}` : ""));
      }));
    });
  }

  gaps() {
    const at = (key) => this.panel.columns.findIndex((column) => column.name === key);
    this.frame("gaps", () => element("ul", { class: "moves" }), (list) => {
      list.replaceChildren(...this.rows.map((row) => {
        const [from, to, batches] = [row[at("from_at")], row[at("to_at")], row[at("batches")]];
        return element("li", {},
          element("b", { text: row[at("node")] }), element("span", { title: "not seen", text: duration(Date.parse(to) - Date.parse(from)) }),
          element("p", {}, element("span", { title: `${dateTime(from)} to ${dateTime(to)}`, text: `${clockTime(from)} to ${clockTime(to)} UTC, ${relative(to, this.context.now())}` }), ` · ${plain(batches, "count")} ${batches === 1 ? "batch" : "batches"} · ${row[at("reason")]}`));
      }));
    });
  }

  alerts() {
    const at = (key) => this.panel.columns.findIndex((column) => column.name === key);
    this.frame("alerts", () => element("ul", { class: "alerts" }), (list) => {
      list.replaceChildren(...this.rows.map((row) => {
        const stake = row[at("money_per_hour")] === null ? null : this.money(row, at("money_per_hour"));
        const since = row[at("started_at")];
        return element("li", { "data-status": row[at("severity")] }, element("b", { text: row[at("summary")] }),
          stake ? element("span", { class: "stake", text: stake.text + stake.per, title: stake.exact }) : element("span"),
          element("p", {}, [row[at("tenant")], row[at("pool")]].filter(Boolean).join(" · "), " · ", element("span", { title: dateTime(since), text: `since ${clockTime(since)} UTC` }), row[at("action")] ? `. ${row[at("action")]}` : ""));
      }));
    });
  }
}

function counts(minutes) {
  const n = new Map();
  for (const [, state] of minutes) n.set(state, (n.get(state) || 0) + 1);
  return [...n].map(([state, count]) => `${count} minutes ${label(state).toLowerCase()}`).join(", ");
}

function runs(minutes, step) {
  const found = [];
  for (const [at, state] of minutes) {
    const last = found.at(-1);
    if (last && last[2] === state && last[1] === at) last[1] = at + step;
    else found.push([at, at + step, state]);
  }
  return found;
}
