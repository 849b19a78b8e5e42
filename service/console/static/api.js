// Calls to the gateway that served the page. The API key stays in this tab's session storage.

const NAME = "reward-router-key";
const SILENCE_SECONDS = 20; // Without a word for so long the stream is opened again.

export const key = {
  get: () => sessionStorage.getItem(NAME) || "",
  set: (value) => (value ? sessionStorage.setItem(NAME, value) : sessionStorage.removeItem(NAME)),
};

const headers = () => (key.get() ? { authorization: `Bearer ${key.get()}` } : {});

export class Refused extends Error {
  constructor(status, document) {
    super(document?.error?.message || `the gateway answered ${status}`);
    this.status = status;
  }
}

// The answer to a GET, or to a POST of `body`.
export async function call(path, body) {
  const options =
    body === undefined
      ? { headers: headers() }
      : { method: "POST", headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, { ...options, cache: "no-store" });
  const document = await response.json().catch(() => null);
  if (!response.ok) throw new Refused(response.status, document);
  return document;
}

// Server-sent events of a run as [kind, data]. EventSource can send no key.
async function* events(run, signal) {
  const response = await fetch(`events${run ? `?run=${encodeURIComponent(run)}` : ""}`, { headers: headers(), signal, cache: "no-store" });
  if (!response.ok) throw new Refused(response.status, await response.json().catch(() => null));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let timer;
    const silence = new Promise((_, fail) => {
      timer = setTimeout(() => fail(new Error("the gateway says nothing")), 1e3 * SILENCE_SECONDS);
    });
    const { done, value } = await Promise.race([reader.read(), silence]).finally(() => clearTimeout(timer));
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const [first, second] = frame.split("\n");
      yield [first.slice("event: ".length), JSON.parse(second.slice("data: ".length))];
    }
  }
}

// Watch a run until the returned function is called; `on(kind, data)` gets the events, and `away` or `locked` with a reason.
export function watch(run, on) {
  const stop = new AbortController();
  (async () => {
    let pause = 1;
    while (!stop.signal.aborted) {
      const attempt = new AbortController();
      const end = () => attempt.abort();
      stop.signal.addEventListener("abort", end);
      try {
        for await (const [kind, data] of events(run, attempt.signal)) {
          pause = 1;
          if (!stop.signal.aborted) on(kind, data);
        }
        on("away", "the gateway has closed the stream");
      } catch (error) {
        if (stop.signal.aborted) return;
        on(error.status === 401 ? "locked" : "away", error.message);
        if (error.status === 401) return;
      } finally {
        stop.signal.removeEventListener("abort", end);
        attempt.abort();
      }
      await new Promise((resolve) => setTimeout(resolve, 1e3 * pause));
      pause = Math.min(2 * pause, 15);
    }
  })();
  return () => stop.abort();
}
