// Try it: one instance, its reward and how it came about; say which response is better and see the posterior move.

import { html, Note, number, percent, signed, useRef, useState } from "./lib.js";
import { call } from "./api.js";
import { Beliefs } from "./charts.js";
import { Attempts } from "./decisions.js";

const MOST = 8;
const WAITS = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]; // Seconds between looks at the posterior after a feedback.

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1e3 * seconds));
const rowsOf = (beliefs, after) => beliefs.map((one, k) => ({
  model: one.model, mean: one.mean, sd: one.doubt, draw: one.draw, chance: (after ?? beliefs)[k].propensity, after: after ? after[k].mean : null, afterSd: after ? after[k].doubt : null,
}));

function Responses({ texts, setTexts, result, onBetter, said, asks }) {
  const set = (i, text) => setTexts(texts.map((old, j) => (j === i ? text : old)));
  return html`<div class="responses">${texts.map((text, i) => html`<div class="response ${result?.preferred === i ? "preferred" : ""}">
    <div class="row between"><label for=${`response-${i}`}>Response ${i + 1}${result?.preferred === i ? html` <span class="badge good">preferred</span>` : ""}</label>
      ${texts.length > 1 && !result && html`<button type="button" class="quiet" aria-label=${`Remove response ${i + 1}`} onClick=${() => setTexts(texts.filter((_, j) => j !== i))}>Remove</button>`}</div>
    <textarea id=${`response-${i}`} rows="3" required value=${text} onInput=${(event) => set(i, event.target.value)}></textarea>
    ${result && html`<dl class="components">${Object.entries(result.components).map(([name, values]) => html`<div><dt>${name}</dt><dd>${number(values[i], 3)}</dd></div>`)}</dl>`}
    ${asks && html`<button type="button" class=${said === i ? "primary" : ""} disabled=${said != null} onClick=${() => onBetter(i)}>${said === i ? "You chose this one" : "This one is better"}</button>`}
  </div>`)}</div>`;
}

function Outcome({ result }) {
  const asked = result.beliefs?.find((one) => one.model === result.model);
  return html`<p class="verdict" role="status"><b>${result.model}</b> ${asked ? html`was asked: its draw, ${number(asked.draw, 3)}, was the largest, which had a chance of ${percent(result.propensity)}.` : "answered."}
    ${result.preferred == null ? " It prefers neither." : html` It prefers <b>response ${result.preferred + 1}</b>${result.margin == null ? "" : ` by ${number(result.margin, 3)}`}.`}
    ${result.p_right == null ? "" : html` That is right with a probability of <b>${percent(result.p_right)}</b>.`}
    <span class="muted"> It took ${number(result.timings.total_ms, 1)} ms and cost ${number(result.price)}. ${result.recorded ? "" : "It could not be saved: feedback will be refused."}</span></p>`;
}

export function TryIt({ state }) {
  const [prompt, setPrompt] = useState("What is 17 × 6? Explain in one sentence.");
  const [texts, setTexts] = useState(["17 × 6 = 102, because 10 × 6 = 60 and 7 × 6 = 42.", "It is 112."]);
  const [result, setResult] = useState(null), [before, setBefore] = useState(null), [after, setAfter] = useState(null);
  const [said, setSaid] = useState(null), [busy, setBusy] = useState(""), [error, setError] = useState(""), [note, setNote] = useState("");
  const turn = useRef(0);
  const request = { prompt, responses: texts, run: state.run };
  const fresh = () => { turn.current += 1; setResult(null); setBefore(null); setAfter(null); setSaid(null); setError(""); setNote(""); return turn.current; };
  const edit = (set) => (value) => { if (result || before) fresh(); set(value); };
  async function guarded(word, work) {
    setBusy(word);
    try { await work(); } catch (problem) { setError(problem.message); } finally { setBusy(""); }
  }
  const ask = () => guarded("Asking…", async () => {
    const mine = fresh(), reply = await call("reward", { ...request, explain: true });
    if (mine === turn.current) { setResult(reply); setBefore(reply.beliefs); }
  });
  const look = () => guarded("Looking…", async () => {
    const mine = fresh(), reply = await call("beliefs", request);
    if (mine === turn.current) setBefore(reply.beliefs);
  });
  const tell = (value, choice) => guarded("Sending…", async () => {
    const mine = turn.current;
    const feedback = { decision_id: result.decision_id, run: state.run, ...value };
    // What was learned from others meanwhile must not look like the effect of this feedback.
    const earlier = await call("beliefs", request);
    await call("feedback", feedback);
    setSaid(choice);
    setNote("It is in the log. Waiting for the posterior…");
    for (const seconds of WAITS) {
      await pause(seconds);
      const now = await call("beliefs", request);
      if (mine !== turn.current) return;
      if (now.posterior_version > earlier.posterior_version) {
        setBefore(earlier.beliefs.map((one, k) => ({ ...one, draw: before[k].draw })));
        setAfter(now.beliefs);
        const moves = now.beliefs.map((one, k) => [one.model, one.mean == null ? 0 : one.mean - earlier.beliefs[k].mean]).filter(([, by]) => Math.abs(by) >= 5e-4);
        const events = now.posterior_version - earlier.posterior_version;
        setNote(`The posterior has learned from ${events === 1 ? "one event" : `${events} events`}: ${moves.map(([model, by]) => `${model} ${signed(by)}`).join(", ") || "nothing moved by more than 0.0005"} on texts like these.`);
        return;
      }
    }
    setNote("The posterior has not learned from it yet: see the lag of the log.");
  });
  const preference = state.signal === "preference", several = texts.length > 1;
  return html`<section class="card"><h2>Try it</h2>
    <p class="muted">Sends a real request to run <code>${state.run}</code>; what you say of it teaches the run.</p>
    <form onSubmit=${(event) => { event.preventDefault(); ask(); }} onKeyDown=${(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); event.currentTarget.requestSubmit(); } }}>
      <label for="prompt">Prompt</label>
      <textarea id="prompt" rows="2" required value=${prompt} onInput=${(event) => edit(setPrompt)(event.target.value)}></textarea>
      <${Responses} texts=${texts} setTexts=${edit(setTexts)} result=${result} said=${said} asks=${result && preference && several} onBetter=${(i) => tell({ preferred: i }, i)}/>
      <div class="row"><button class="primary" disabled=${!!busy}>${busy || "Ask for rewards"}</button>
        <button type="button" disabled=${!!busy} onClick=${look}>Whom would it ask?</button>
        <button type="button" disabled=${texts.length >= MOST} onClick=${() => edit(setTexts)([...texts, ""])}>Add a response</button>
        <span class="muted small">Ctrl+Enter asks</span></div>
    </form>
    ${error && html`<${Note} kind="error">${error}<//>`}
    ${result && html`<${Outcome} result=${result}/>`}
    ${result && state.signal === "reward" && html`<div class="row"><span>How did ${result.model} do?</span><button type="button" disabled=${said != null} onClick=${() => tell({ reward: 1 }, 1)}>Well</button><button type="button" disabled=${said != null} onClick=${() => tell({ reward: 0 }, 0)}>Badly</button></div>`}
    ${result && state.signal === "loss" && html`<${Note}>This run learns from DPO losses, which your trainer sends; here is nothing to say.<//>`}
    <div role="status">${note && html`<${Note} kind="good">${note}<//>`}</div>
    ${before && html`<${Beliefs} rows=${rowsOf(before, after)} chosen=${result?.model} caption=${after ? "Before and after your word" : result ? "What was believed and drawn" : "What it believes, with a draw; nobody was asked"}/>`}
    ${result && html`<${Attempts} attempts=${result.attempts}/>`}
  </section>`;
}
