// One event stream per visible tab: browsers allow six connections per origin, so hidden tabs give theirs back.

const SILENT_MS = 25000;

/** Calls handlers.board, .panel, .status with parsed messages, and .lost(true|false) when the connection goes or comes. */
export function startStream(handlers) {
  let source = null;
  let heard = 0;
  let lost = false;

  const tellLost = (now) => {
    if (now !== lost) handlers.lost((lost = now));
  };
  const on = (name, handle) =>
    source.addEventListener(name, (event) => {
      heard = performance.now();
      tellLost(false);
      handle(JSON.parse(event.data));
    });

  function open() {
    close();
    heard = performance.now();
    source = new EventSource("/events");
    on("board", handlers.board);
    on("panel", handlers.panel);
    on("status", handlers.status);
    source.addEventListener("error", () => tellLost(true));
  }
  function close() {
    if (source) source.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && open());
  // A browser gives up on a stream that was refused (503) and may not notice one that died without a word.
  setInterval(() => {
    if (document.hidden || !source) return;
    if (source.readyState === EventSource.CLOSED || performance.now() - heard > SILENT_MS) {
      tellLost(true);
      open();
    }
  }, 3000);
  if (!document.hidden) open();
}
