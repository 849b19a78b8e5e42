// The console: what a run has learned, and what it does now. One stream feeds every view.

import { html, Note, render, useEffect, useRef, useState } from "./lib.js";
import { key, watch } from "./api.js";
import { Overview } from "./overview.js";
import { TryIt } from "./tryit.js";
import { Judge } from "./judge.js";
import { Decisions } from "./decisions.js";
import { Workers } from "./workers.js";

const VIEWS = [["overview", "Overview"], ["decisions", "Decisions"], ["try", "Try it"], ["judge", "Judge"], ["workers", "Workers"]];
const POINTS = 360; // As many as the gateway keeps.
const THEME = "reward-router-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function useHash() {
  const read = () => VIEWS.find(([name]) => `#${name}` === location.hash)?.[0] ?? "overview";
  const [view, setView] = useState(read);
  useEffect(() => {
    const listen = () => setView(read());
    addEventListener("hashchange", listen);
    return () => removeEventListener("hashchange", listen);
  }, []);
  return view;
}

// [what was chosen, what is shown]
function useTheme() {
  const [chosen, setChosen] = useState(() => localStorage.getItem(THEME) || "auto"), [system, setSystem] = useState(dark.matches);
  useEffect(() => {
    const listen = () => setSystem(dark.matches);
    dark.addEventListener("change", listen);
    return () => dark.removeEventListener("change", listen);
  }, []);
  const shown = chosen === "auto" ? (system ? "dark" : "light") : chosen;
  document.documentElement.dataset.theme = shown;
  return [chosen, shown, (value) => { localStorage.setItem(THEME, value); setChosen(value); }];
}

function useVisible() {
  const [visible, setVisible] = useState(!document.hidden);
  useEffect(() => {
    const listen = () => setVisible(!document.hidden);
    document.addEventListener("visibilitychange", listen);
    return () => document.removeEventListener("visibilitychange", listen);
  }, []);
  return visible;
}

const EMPTY = { link: "connecting", why: "", runs: [], state: null, report: null, points: [] };

function taken(seen, kind, data) {
  if (kind === "history") return { ...seen, points: data };
  if (kind === "runs") return { ...seen, runs: data };
  if (kind === "report") return { ...seen, report: data };
  if (kind === "away" || kind === "locked") return { ...seen, link: kind, why: data };
  const last = seen.points[seen.points.length - 1];
  const points = data.point && (!last || data.point.time_ms > last.time_ms) ? [...seen.points, data.point].slice(-POINTS) : seen.points;
  return { ...seen, link: "live", why: "", state: data, points };
}

function Lock({ why, onKey }) {
  const field = useRef();
  useEffect(() => field.current.focus(), []);
  return html`<main class="narrow"><section class="card"><h1>This gateway asks for an API key</h1>
    <form onSubmit=${(event) => { event.preventDefault(); onKey(field.current.value.trim()); }}>
      <label for="key">API key</label><input id="key" ref=${field} type="password" autocomplete="off" required/>
      <div class="row"><button class="primary">Open</button></div>
    </form>
    <p class="muted">It stays in this tab and is forgotten when the tab is closed.</p>
    ${key.get() && html`<${Note} kind="error">${why}<//>`}</section></main>`;
}

const WORDS = { live: "live", connecting: "connecting…", away: "not connected" };

function App() {
  const [seen, setSeen] = useState(EMPTY), [run, setRun] = useState(""), [opened, setOpened] = useState(0);
  const view = useHash(), [chosen, theme, setTheme] = useTheme(), visible = useVisible(), main = useRef();
  useEffect(() => {
    if (!visible) return undefined;
    return watch(run, (kind, data) => setSeen((old) => taken(old, kind, data)));
  }, [run, opened, visible]);
  const first = useRef(true);
  useEffect(() => {
    document.title = `${VIEWS.find(([name]) => name === view)[1]} · Reward router`;
    if (!first.current) { scrollTo(0, 0); main.current?.focus(); }
    first.current = false;
  }, [view]);
  if (seen.link === "locked") return html`<${Lock} why=${seen.why} onKey=${(value) => { key.set(value); setSeen(EMPTY); setOpened(opened + 1); }}/>`;
  const { runs, state, report, points, link, why } = seen;
  return html`<header>
      <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>To the content</a>
      <div class="brand"><span class="logo" aria-hidden="true"></span><h1>Reward router</h1>
        <span class="link ${link}" role="status"><span class="dot" aria-hidden="true"></span>${WORDS[link]}</span></div>
      <nav aria-label="Views">${VIEWS.map(([name, label]) => html`<a href=${`#${name}`} aria-current=${view === name ? "page" : null}>${label}${name === "judge" && state?.audits_waiting ? "" : ""}</a>`)}</nav>
      <div class="tools">
        ${state && runs.length > 1 && html`<label>Run <select value=${state.run} onChange=${(event) => { setSeen({ ...EMPTY }); setRun(event.target.value); }}>${runs.map((name) => html`<option>${name}</option>`)}</select></label>`}
        <label><span class="hidden">Colours</span><select value=${chosen} onChange=${(event) => setTheme(event.target.value)}><option value="auto">Auto</option><option value="light">Light</option><option value="dark">Dark</option></select></label>
        ${key.get() && html`<button type="button" class="quiet" onClick=${() => { key.set(""); setSeen(EMPTY); setOpened(opened + 1); }}>Forget key</button>`}
      </div>
    </header>
    <main id="main" tabindex="-1" ref=${main}>
      ${link === "away" && html`<${Note} kind="error">Not connected: ${why}. Trying again…<//>`}
      ${!state && link !== "away" && html`<p class="muted loading">Waiting for the gateway…</p>`}
      ${state?.problem && html`<${Note} kind="error">${state.problem}<//>`}
      ${state && view === "overview" && html`<${Overview} state=${state} report=${report} points=${points} theme=${theme}/>`}
      ${state && view === "decisions" && html`<${Decisions} state=${state}/>`}
      ${state && view === "try" && html`<${TryIt} key=${state.run} state=${state}/>`}
      ${state && view === "judge" && html`<${Judge} key=${state.run} run=${state.run}/>`}
      ${state && view === "workers" && html`<${Workers} state=${state}/>`}
    </main>
    <footer class="muted"><a href="docs">API</a> · <a href="metrics">Metrics</a> · run <code>${state?.run ?? "…"}</code>, version ${state?.version ?? "…"}</footer>`;
}

render(html`<${App}/>`, document.getElementById("app"));
