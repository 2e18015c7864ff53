// The server's JSON, and its frames once a second. An expired session leads back to the login page.

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** GET `path`; the parsed body. Throws ApiError with the server's own words. */
export async function get(path, options = {}) {
  const response = await fetch(path, { headers: { Accept: "application/json" }, ...options });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/** The error of a response that is none of 2xx; leaves for the login page at 401. */
export async function errorOf(response) {
  if (response.status === 401) location.assign("/console/login");
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // no JSON: a proxy may have answered
  }
  return new ApiError(response.status, error.message ?? `the server answered ${response.status}`, error.code);
}

/** Calls `onFrame` for each frame and `onState` with whether the stream is there. Reconnects by itself; pauses while the page is hidden. */
export function watch(onFrame, onState) {
  let source = null;
  let retry = null;

  function open() {
    clearTimeout(retry);
    if (source || document.hidden) return;
    source = new EventSource("/console/api/live");
    source.onmessage = (event) => {
      onState(true);
      onFrame(JSON.parse(event.data));
    };
    source.onerror = () => {
      onState(false);
      if (source.readyState !== EventSource.CLOSED) return; // the server ended the stream, or is away: the browser connects again
      close();
      retry = setTimeout(open, 3000);
      get("/console/api/snapshot").catch(() => {}); // leaves for the login page if the session is over
    };
  }

  function close() {
    source?.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  window.addEventListener("pagehide", close);
  open();
}
