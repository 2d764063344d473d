// Numbers, money and time as people read them. Amounts arrive as decimal strings and are added and shown without
// passing through a float; only drawing uses `toNumber`.

const NANO = 9;
const locale = "en-GB";
const formats = new Map();

function numberFormat(options) {
  const key = JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(locale, options));
  return formats.get(key);
}

export function toNumber(text) {
  return text === null || text === undefined || text === "" ? null : Number(text);
}

function toNano(text) {
  const [, sign, whole, part = ""] = /^(-?)(\d+)(?:\.(\d+))?$/.exec(String(text));
  const nano = BigInt(whole + (part + "000000000").slice(0, NANO));
  return sign ? -nano : nano;
}

/** The exact sum of decimal strings with at most nine decimals; nulls are left out, null when nothing is left. */
export function addDecimals(texts) {
  const known = texts.filter((text) => text !== null && text !== undefined);
  if (!known.length) return null;
  const sum = known.reduce((total, text) => total + toNano(text), 0n);
  const digits = (sum < 0n ? -sum : sum).toString().padStart(NANO + 1, "0");
  return `${sum < 0n ? "-" : ""}${digits.slice(0, -NANO)}.${digits.slice(-NANO)}`;
}

function moneyOptions(currency) {
  return /^[A-Z]{3}$/.test(currency || "") ? { style: "currency", currency, currencyDisplay: "narrowSymbol" } : {};
}

function moneyDigits(unit, size) {
  if (unit === "money_per_second") return size < 0.1 ? 5 : size < 10 ? 4 : 2;
  if (size >= 10000) return 0;
  return size > 0 && size < 0.01 ? 6 : 2;
}

const PER = { money_per_second: "/s", money_per_hour: "/h" };

/** {text, exact}: `text` is short, `exact` has every digit and the currency's code. `per` is "/s", "/h" or "". */
export function formatValue(value, unit, currency = "") {
  const per = PER[unit] || "";
  if (value === null || value === undefined) return { text: "–", per: "", exact: "not known" };
  if (unit.startsWith("money")) {
    const size = Math.abs(Number(value));
    const digits = moneyDigits(unit, size);
    const big = size >= 1e6 ? { notation: "compact", maximumFractionDigits: 2 } : {};
    const text = numberFormat({ minimumFractionDigits: digits, maximumFractionDigits: digits, ...moneyOptions(currency), ...big });
    return { text: text.format(String(value)), per, exact: `${trimZeros(value)} ${currency}${per}`.trim() };
  }
  if (unit === "share") {
    const part = Number(value);
    const text = part > 0 && part < 0.0005 ? "< 0.1%" : numberFormat({ style: "percent", maximumFractionDigits: 1 }).format(part);
    return { text, per, exact: String(value) };
  }
  if (unit === "gpus" || unit === "count") {
    const size = Math.abs(Number(value));
    const digits = unit === "count" || size >= 100 || Number.isInteger(Number(value)) ? 0 : size < 1 ? 2 : 1;
    return { text: numberFormat({ maximumFractionDigits: digits }).format(String(value)), per, exact: trimZeros(value) };
  }
  if (unit === "time") return { text: clockTime(value), per, exact: dateTime(value) };
  return { text: String(value), per, exact: String(value) };
}

export function plain(value, unit, currency) {
  const { text, per } = formatValue(value, unit, currency);
  return text + per;
}

function trimZeros(value) {
  const text = String(value);
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** HH:MM:SS, or with the date when it is not today (UTC). */
export function clockTime(iso, seconds = false) {
  const at = new Date(iso).toISOString();
  const time = at.slice(11, seconds ? 19 : 16);
  return at.slice(0, 10) === new Date().toISOString().slice(0, 10) ? time : `${at.slice(5, 10)} ${time}`;
}

export function dateTime(iso) {
  return new Date(iso).toISOString().replace("T", " ").replace(/\.\d+Z$/, " UTC");
}

export function duration(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

/** "12 min ago" or "in 3 min". */
export function relative(iso, nowMs) {
  const left = Date.parse(iso) - nowMs;
  return left > 0 ? `in ${duration(left)}` : `${duration(-left)} ago`;
}
