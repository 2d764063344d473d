// Apache ECharts options for the kinds that need a drawing library, and the life of its instances: they are disposed
// with their card, or a page that is open for weeks grows.

import * as echarts from "/static/echarts.esm.min.js";
import { colourOf, know, label } from "/static/colours.js";
import { clockTime, plain, toNumber } from "/static/format.js";

function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function font() {
  return getComputedStyle(document.body).fontFamily;
}

export class Chart {
  constructor(element) {
    this.element = element;
    this.chart = null;
    this.resizer = new ResizeObserver(() => this.chart?.resize());
    this.resizer.observe(element);
  }

  set(option) {
    if (!this.chart) this.chart = echarts.init(this.element, null, { renderer: "svg" });
    const tooltip = {
      renderMode: "richText", confine: true, backgroundColor: ink("--card"), borderColor: ink("--line"), borderWidth: 1, padding: [8, 12],
      textStyle: { color: ink("--ink"), fontFamily: font(), fontSize: 13, lineHeight: 19 },
    };
    const base = { animation: false, useUTC: true, textStyle: { fontFamily: font() } };
    const merged = { ...base, ...option, tooltip: { ...tooltip, ...option.tooltip } };
    this.chart.setOption(merged, { replaceMerge: ["series"] });
  }

  dispose() {
    this.resizer.disconnect();
    this.chart?.dispose();
    this.chart = null;
  }
}

const LAST = ["unattributed", "(operator)"];

/** Rows of (time, series, value) as one aligned set of points: 0 where a minute exists without a series' row, null
 * where the minute itself is missing. Returns {times, series: [{name, currency, values, latest}]}, largest first. */
export function align(panel, rows) {
  const at = (role) => panel.columns.findIndex((column) => column.role === role);
  const [time, name, value, currency] = [at("time"), at("series"), at("value"), at("currency")];
  const found = [...new Set(rows.map((row) => Date.parse(row[time])))].sort((a, b) => a - b);
  const step = panel.step_s * 1000;
  const times = [];
  const known = [];
  for (const ms of found) {
    if (times.length && ms - times.at(-1) > step * 1.5) {
      times.push(times.at(-1) + step);
      known.push(false);
    }
    times.push(ms);
    known.push(true);
  }
  const position = new Map(times.map((ms, n) => [ms, n]));
  const currencies = new Set(currency < 0 ? [] : rows.map((row) => row[currency]).filter(Boolean));
  const byName = new Map();
  for (const row of rows) {
    const id = currencies.size > 1 ? `${row[name]} · ${row[currency]}` : row[name];
    if (!byName.has(id)) {
      byName.set(id, { id, name: row[name], currency: currency < 0 ? "" : row[currency], values: known.map((is) => (is ? 0 : null)) });
    }
    byName.get(id).values[position.get(Date.parse(row[time]))] = toNumber(row[value]);
  }
  const total = (series) => series.values.reduce((sum, v) => sum + (v || 0), 0);
  const weight = (series) => (LAST.includes(series.name) ? -1 - LAST.indexOf(series.name) : total(series));
  const series = [...byName.values()].sort((a, b) => weight(b) - weight(a) || a.id.localeCompare(b.id));
  for (const one of series) one.latest = one.values.at(-1) ?? null;
  know(series.map((one) => one.name));
  return { times, series };
}

function markLine(marks, since, now, narrow) {
  const inside = marks.filter((mark) => mark.at >= since && mark.at <= now);
  if (!inside.length) return undefined;
  const last = inside.at(-1);
  return {
    symbol: ["none", "none"], silent: true,
    lineStyle: { color: ink("--ink"), type: [5, 4], width: 1.3 },
    data: inside.map((mark) => ({
      xAxis: mark.at,
      label: {
        show: mark === last, formatter: narrow ? mark.text.split(" ").slice(0, 2).join(" ") : mark.text, position: "end", distance: 6, color: ink("--ink"), fontSize: 12, fontWeight: 550,
        fontFamily: font(), align: mark.at > (since + now) / 2 ? "right" : "left",
      },
    })),
  };
}

/** A ledger younger than its range fills the chart with what there is, from the first minute on. */
const SHORTEST_MS = 300_000;

/** Stacked steps over time up to `now`; `hidden` holds ids that the legend has switched off. */
export function timeseries(panel, aligned, { now, marks, hidden, narrow }) {
  const { times, series } = aligned;
  const since = Math.max(now - (panel.range_s || 3600) * 1000, Math.min(times[0] ?? 0, now - SHORTEST_MS));
  const shown = series.filter((one) => !hidden.has(one.id));
  const end = times.length && now - times.at(-1) < panel.step_s * 2000 ? [now] : [];
  const points = [...times, ...end];
  const drawn = shown.map((one, n) => ({
    id: one.id, name: label(one.id), type: "line", step: "end", symbol: "none", stack: panel.stacked ? "all" : undefined, connectNulls: false,
    lineStyle: { width: 1.2, color: colourOf(one.name) }, itemStyle: { color: colourOf(one.name) },
    areaStyle: panel.stacked ? { color: colourOf(one.name), opacity: one.name === "(operator)" ? 0.3 : 0.62 } : undefined,
    emphasis: { disabled: true },
    data: points.map((ms, k) => [ms, one.values[Math.min(k, times.length - 1)]]),
    markLine: n === 0 ? markLine(marks, since, now, narrow) : undefined,
  }));
  const currency = shown[0]?.currency;
  return {
    grid: { left: 4, right: 12, top: 30, bottom: 8, containLabel: true },
    xAxis: {
      type: "time", min: since, max: now, splitNumber: 6, axisLine: { lineStyle: { color: ink("--line") } }, axisTick: { show: false },
      axisLabel: { color: ink("--ink-3"), fontSize: 12, hideOverlap: true, formatter: (ms) => clockTime(ms) },
      axisPointer: { label: { show: false }, lineStyle: { color: ink("--ink-3") } },
    },
    yAxis: {
      type: "value", min: 0, splitNumber: 4, splitLine: { lineStyle: { color: ink("--grid") } },
      axisLabel: { color: ink("--ink-3"), fontSize: 12, formatter: (value) => axisValue(value, panel.unit, currency) },
    },
    tooltip: {
      trigger: "axis", order: "valueDesc",
      formatter: (items) => tooltipText(items, panel.unit, currency),
    },
    series: drawn,
  };
}

function axisValue(value, unit, currency) {
  if (!unit.startsWith("money")) return plain(value, unit, currency);
  const options = { style: "currency", currency, currencyDisplay: "narrowSymbol", maximumFractionDigits: 3, minimumFractionDigits: 0 };
  return /^[A-Z]{3}$/.test(currency || "") ? new Intl.NumberFormat("en-GB", options).format(value) : String(value);
}

function tooltipText(items, unit, currency) {
  const known = items.filter((item) => item.value[1] !== null);
  const total = known.reduce((sum, item) => sum + item.value[1], 0);
  const lines = [...known].sort((a, b) => b.value[1] - a.value[1]).map((item) => `${item.seriesName}   ${plain(item.value[1], unit, currency)}`);
  const at = items.length ? `${clockTime(items[0].value[0])} UTC` : "";
  return [at, ...lines, known.length > 1 ? `Together   ${plain(total, unit, currency)}` : ""].filter(Boolean).join("\n");
}

/** Flows from left to right; rows with mark 1 stand out. */
export function sankey(panel, rows) {
  const at = (role) => panel.columns.findIndex((column) => column.role === role);
  const [source, target, value, mark] = [at("source"), at("target"), at("value"), at("mark")];
  know(rows.flatMap((row) => [row[source], row[target]]));
  const sum = (column, name) => rows.filter((row) => row[column] === name).reduce((n, row) => n + Number(row[value]), 0);
  const node = (side, column, name) => ({
    name: `${side}${name}`, itemStyle: { color: colourOf(name), borderWidth: 0 }, depth: side === "<" ? 0 : 1,
    label: {
      position: side === "<" ? "right" : "left", formatter: `{n|${label(name)}}\n{v|${plain(sum(column, name), panel.unit)} ${side === "<" ? "before" : "after"}}`,
      align: side === "<" ? "left" : "right",
      rich: { n: { color: ink("--ink"), fontSize: 13, fontWeight: 600, lineHeight: 17 }, v: { color: ink("--ink"), fontSize: 12, lineHeight: 16 } },
    },
  });
  const names = (column) => [...new Set(rows.map((row) => row[column]))];
  return {
    tooltip: {
      trigger: "item",
      formatter: (item) => (item.dataType === "edge" ? `${item.data.text}   ${plain(item.value, panel.unit)} GPUs` : `${label(item.name.slice(1))}   ${plain(item.value, panel.unit)} GPUs`),
    },
    series: [{
      type: "sankey", left: 2, right: 2, top: 10, bottom: 10, nodeWidth: 10, nodeGap: 22, draggable: false, layoutIterations: 0, emphasis: { disabled: true },
      data: [...names(source).map((name) => node("<", source, name)), ...names(target).map((name) => node(">", target, name))],
      links: rows.map((row) => ({
        source: `<${row[source]}`, target: `>${row[target]}`, value: Number(row[value]),
        text: row[mark] ? `${label(row[source])} → ${label(row[target])}` : `${label(row[source])} keeps`,
        lineStyle: { color: row[mark] ? colourOf(row[target]) : colourOf(row[source]), opacity: row[mark] ? 0.6 : 0.16, curveness: 0.5 },
      })),
    }],
  };
}

export function donut(panel, slices) {
  return {
    tooltip: { trigger: "item", formatter: (item) => `${item.name}   ${item.data.text}   ${Math.round(item.percent)} %` },
    series: [{
      type: "pie", radius: ["62%", "88%"], center: ["50%", "50%"], label: { show: false }, emphasis: { scale: false },
      itemStyle: { borderColor: ink("--card"), borderWidth: 2, borderRadius: 4 },
      data: slices.map((slice) => ({ name: label(slice.name), value: Number(slice.value), text: slice.text, itemStyle: { color: slice.colour } })),
    }],
  };
}
